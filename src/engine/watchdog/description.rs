// SPDX-License-Identifier: LGPL-2.1-or-later

//! What a watchdog is told before it begins: everything but its descriptors. The program reads it
//! as JSON.

use std::path::{Path, PathBuf, absolute};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::task::Task;
use crate::backend::{MonitorOverlay, RecoveryCommands};
use crate::own_file::{KnownFile, as_bytes};

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// A watchdog's task, in words.
#[derive(Debug, Serialize, Deserialize)]
pub struct Description {
    version: String,
    pub means: Means,
    /// The snapshot's, to be removed.
    pub files: Vec<KnownFile>,
    /// The file that holds the snapshot's name.
    pub reserved: Option<KnownFile>,
    /// The file that there is once the snapshot is recorded, where that is known.
    pub record: Option<AbsolutePath>,
    /// For how long the guest may be paused, where that is limited.
    pub pause_limit: Option<Duration>,
    /// Where QEMU's stream begins in the memory image.
    pub offset: u64,
}

/// By what a watchdog acts.
#[derive(Debug, Serialize, Deserialize)]
pub enum Means {
    None,
    Monitor { restore: Vec<(String, Value)>, overlays: Vec<MonitorOverlay> },
    Commands(Box<RecoveryCommands>),
}

/// A path that means the same in every directory.
#[derive(Debug, Serialize, Deserialize)]
pub struct AbsolutePath(#[serde(with = "as_bytes")] pub PathBuf);

impl Description {
    pub fn new(task: &Task, means: Means) -> Description {
        let known = |file: &KnownFile| KnownFile { path: from_root(&file.path), ..file.clone() };
        let reserved = task.reservation.and_then(|reservation| reservation.known().ok());
        let record = task.record.as_deref().map(|record| AbsolutePath(from_root(record)));
        Description {
            version: VERSION.into(),
            means,
            files: task.files.iter().map(known).collect(),
            reserved: reserved.as_ref().map(known),
            record,
            pause_limit: task.pause_limit,
            offset: task.drain.offset(),
        }
    }

    /// Whether it is of this version of the library.
    pub fn is_current(&self) -> bool {
        self.version == VERSION
    }
}

/// The program's working directory is not the caller's.
fn from_root(path: &Path) -> PathBuf {
    absolute(path).unwrap_or_else(|_| path.into())
}
