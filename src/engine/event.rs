// SPDX-License-Identifier: LGPL-2.1-or-later

//! What happens to a snapshot that is being taken.

use std::time::Duration;

use crate::migration::Flow;

/// Something that has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// What.
    pub kind: EventKind,
    /// When: CLOCK_MONOTONIC.
    pub time: Duration,
    /// For how long the guest had been paused by then.
    pub paused: Duration,
    /// How far memory had come; nothing where it says nothing of that.
    pub flow: Flow,
}

/// What can happen, in its order: the first three once at most, then progress any number of times,
/// then one of the last two. (Memory of a plain snapshot is saved before the instant, and so is its
/// progress.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// The vCPUs have stopped. Not of a guest that was paused already.
    Paused,
    /// The disks are on their overlays.
    Switched,
    /// Memory and disks are held, and the guest runs if it ran: it may be changed now.
    Instant,
    /// Memory flows into the image.
    Progress,
    /// The snapshot is complete and on disk.
    Complete,
    /// It failed, by a `virErrorNumber`, and everything is undone.
    Failed(i32),
}
