// SPDX-License-Identifier: LGPL-2.1-or-later

//! The task that the engine gives to a watchdog.

use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use crate::image::Drain;
use crate::model::Reservation;
use crate::own_file::KnownFile;

/// The task of a watchdog.
pub struct Task<'a> {
    /// The descriptors that hold the guest for this operation.
    pub held: &'a [BorrowedFd<'a>],
    /// The reservation of the snapshot's name in a state directory.
    pub reservation: Option<&'a Reservation>,
    /// The snapshot's durable journal, which is removed when all is undone.
    pub journal: Option<KnownFile>,
    /// Disks are left to a storage hook.
    pub has_manual: bool,
    /// The guest ran before the snapshot.
    pub running: bool,
    /// The file that exists once the snapshot is recorded; `None` if the watchdog cannot check
    /// that.
    pub record: Option<PathBuf>,
    /// How long the guest may be paused; `None` if that is not limited.
    pub pause_limit: Option<Duration>,
    /// The drain of QEMU's stream.
    pub drain: &'a Drain,
    /// The QMP commands that put the settings back, by name and arguments.
    pub restore: &'a [(&'a str, Value)],
    /// The snapshot's files, which an undo removes or empties.
    pub files: &'a [KnownFile],
}
