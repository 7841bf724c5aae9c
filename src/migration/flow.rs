// SPDX-License-Identifier: LGPL-2.1-or-later

//! The progress of saving memory into the image, and the observer that is told of it.

use std::time::Duration;

/// The progress of saving memory into the image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    /// The bytes that the image has so far; of a sparse one, those that a raw one would have.
    pub done: u64,
    /// How many bytes it is expected to have at most, without the devices' state; 0 where that is
    /// not known.
    pub total: u64,
    /// The bytes per second since the last report.
    pub per_second: u64,
    /// Pages of the guest's memory that QEMU has not saved yet.
    pub pages_left: u64,
}

/// Receives the progress while memory is saved.
pub trait FlowObserver {
    /// How often the observer wants a report; `None`: never. Each report costs a query to QEMU.
    fn interval(&self) -> Option<Duration>;

    /// The last report.
    fn flow(&self) -> Flow;

    /// Takes a new report.
    fn progress(&mut self, flow: Flow);
}
