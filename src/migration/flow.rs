// SPDX-License-Identifier: LGPL-2.1-or-later

//! How far memory has come on its way into the image, and who is told of it.

use std::time::Duration;

/// Memory on its way into the image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    /// Bytes of the image so far.
    pub done: u64,
    /// How many they are expected to become at most, without the devices; 0 where that is not
    /// known.
    pub total: u64,
    /// The rate since the last progress.
    pub per_second: u64,
    /// Pages of the guest's memory that QEMU has not saved yet.
    pub pages_left: u64,
}

/// Who is told how far memory has come while it is saved.
pub trait FlowObserver {
    /// How often to be told; `None`: not at all. QEMU must be asked for it.
    fn interval(&self) -> Option<Duration>;

    /// What was told last.
    fn flow(&self) -> Flow;

    /// How far memory has come now.
    fn progress(&mut self, flow: Flow);
}
