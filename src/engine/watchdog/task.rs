// SPDX-License-Identifier: LGPL-2.1-or-later

//! What the engine has a watchdog for.

use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use crate::image::Drain;
use crate::model::Reservation;
use crate::own_file::KnownFile;

/// What a watchdog is there for.
pub struct Task<'a> {
    /// What holds the guest for this operation.
    pub held: &'a [BorrowedFd<'a>],
    /// What holds the snapshot's name in a state directory.
    pub reservation: Option<&'a Reservation>,
    /// The file that there is once it is recorded, where that is known.
    pub record: Option<PathBuf>,
    /// For how long the guest may be paused, where that is limited.
    pub pause_limit: Option<Duration>,
    /// The way of QEMU's stream.
    pub drain: &'a Drain,
    /// QMP commands that put the settings back.
    pub restore: &'a [(&'a str, Value)],
    /// The snapshot's, to be removed.
    pub files: &'a [KnownFile],
}
