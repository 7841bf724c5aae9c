// SPDX-License-Identifier: LGPL-2.1-or-later

//! The description of a page server's task: all that it needs except its descriptors.

use serde::{Deserialize, Serialize};

use super::task::Task;
use crate::engine::program::{AbsolutePath, cgroup};
use crate::migration::post_copy::Start;
use crate::own_file::from_root;

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The description of a page server's task, as JSON.
#[derive(Debug, Serialize, Deserialize)]
pub struct Description {
    version: String,
    is_resumed: bool,
    /// Where QEMU's stream begins in the image.
    pub offset: u64,
    pub first: Vec<(usize, u64)>,
    pub bandwidth: Option<u64>,
    pub monitor: Option<AbsolutePath>,
    pub cgroup: Option<AbsolutePath>,
}

impl Description {
    pub fn new(task: &Task) -> Description {
        Description {
            version: VERSION.into(),
            is_resumed: task.start == Start::Resumed,
            offset: task.image.stream_offset,
            first: task.first.clone(),
            bandwidth: task.bandwidth,
            monitor: task.monitor.map(|monitor| AbsolutePath(from_root(monitor))),
            cgroup: cgroup::setting().map(|directory| AbsolutePath(from_root(&directory))),
        }
    }

    /// Whether this version of the library has made the description.
    pub fn is_current(&self) -> bool {
        self.version == VERSION
    }

    pub fn start(&self) -> Start {
        if self.is_resumed { Start::Resumed } else { Start::Fresh }
    }
}
