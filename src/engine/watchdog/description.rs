// SPDX-License-Identifier: LGPL-2.1-or-later

//! The description of a watchdog's task: all that the watchdog needs except its descriptors. The
//! program reads it as JSON.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::task::Task;
use crate::backend::{MonitorOverlay, RecoveryCommands};
use crate::engine::program::{AbsolutePath, cgroup};
use crate::image::Format;
use crate::own_file::{KnownFile, from_root};

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The description of a watchdog's task.
#[derive(Debug, Serialize, Deserialize)]
pub struct Description {
    version: String,
    pub means: Means,
    /// The snapshot's files, which an undo removes or empties.
    pub files: Vec<KnownFile>,
    /// The file that reserves the snapshot's name.
    pub reserved: Option<KnownFile>,
    /// The snapshot's durable journal.
    pub journal: Option<KnownFile>,
    /// Disks are left to a storage hook.
    pub has_manual: bool,
    /// The guest ran before the snapshot.
    pub running: bool,
    /// The file that exists once the snapshot is recorded; `None` if the watchdog cannot check
    /// that.
    pub record: Option<AbsolutePath>,
    /// How long the guest may be paused; `None` if that is not limited.
    pub pause_limit: Option<Duration>,
    /// Where QEMU's stream begins in the memory image.
    pub offset: u64,
    /// The format that the memory image is to have.
    pub format: Format,
    /// The directory of the cgroup that the program moves itself to; `None` if it stays in the
    /// caller's.
    pub cgroup: Option<AbsolutePath>,
}

/// The means by which a watchdog reaches the guest.
#[derive(Debug, Serialize, Deserialize)]
pub enum Means {
    None,
    Monitor { restore: Vec<(String, Value)>, overlays: Vec<MonitorOverlay> },
    Commands(Box<RecoveryCommands>),
}

impl Description {
    pub fn new(task: &Task, means: Means) -> Description {
        let known = |file: &KnownFile| file.clone().with_absolute_path();
        let reserved = task.reservation.and_then(|reservation| reservation.known().ok());
        let record = task.record.as_deref().map(|record| AbsolutePath(from_root(record)));
        Description {
            version: VERSION.into(),
            means,
            files: task.files.iter().map(known).collect(),
            reserved: reserved.as_ref().map(known),
            journal: task.journal.as_ref().map(known),
            has_manual: task.has_manual,
            running: task.running,
            record,
            pause_limit: task.pause_limit,
            offset: task.drain.offset(),
            format: task.drain.format(),
            cgroup: cgroup::setting().map(|directory| AbsolutePath(from_root(&directory))),
        }
    }

    /// Whether this version of the library has made the description.
    pub fn is_current(&self) -> bool {
        self.version == VERSION
    }
}
