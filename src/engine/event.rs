// SPDX-License-Identifier: LGPL-2.1-or-later

//! The events of a snapshot that is being taken.

use std::time::Duration;

use crate::migration::Flow;

/// An event of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// What has happened.
    pub kind: EventKind,
    /// The time of the event, by CLOCK_MONOTONIC.
    pub time: Duration,
    /// How long the guest had been paused by then.
    pub paused: Duration,
    /// The progress of saving memory; zero in events that do not report it.
    pub flow: Flow,
}

/// The kinds of events, in their order: the first three come once at most, then `Progress` any
/// number of times, then one of the last two. (The memory of a non-live snapshot is saved before
/// the instant, and its progress is reported before that.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// The vCPUs have stopped. Not reported for a guest that was paused already.
    Paused,
    /// The disks are on their overlays.
    Switched,
    /// Memory and disks are captured, and the guest runs again if it ran before. From now on the
    /// caller may change it.
    Instant,
    /// Memory flows into the image.
    Progress,
    /// The snapshot is complete and on disk.
    Complete,
    /// The snapshot failed, with this `virErrorNumber`, and everything is undone.
    Failed(i32),
}
