// SPDX-License-Identifier: LGPL-2.1-or-later

//! A load whose memory follows while the guest runs: what QEMU keeps of it, and how far it is.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::backend::{DEFAULT_TIMEOUT, Guest};
use crate::deadline::Deadline;
use crate::error::{Code, Error, Result};
use crate::monitor::commands;
use crate::own_file::as_bytes;

/// A load whose memory follows. It is recorded in QEMU with the settings that are to be put back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lazy {
    /// An argument of the processes that serve the pages.
    pub token: String,
    /// The snapshot's name.
    pub snapshot: String,
    /// The memory image, its device and its inode.
    #[serde(with = "as_bytes")]
    pub image: PathBuf,
    pub id: (u64, u64),
}

/// How far the memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// It comes.
    UnderWay,
    /// Its source was lost, and QEMU waits for another one.
    Interrupted,
    /// All of it is in, or no more comes.
    Ended,
}

impl Arrival {
    /// Asks QEMU.
    pub fn ask(guest: &mut dyn Guest) -> Result<Arrival> {
        let migration = commands::query_migrate(guest, Deadline::after(DEFAULT_TIMEOUT))?;
        Ok(match migration.status.as_deref() {
            Some("postcopy-paused") => Arrival::Interrupted,
            None | Some("none" | "completed" | "failed" | "cancelled") => Arrival::Ended,
            Some(_) => Arrival::UnderWay,
        })
    }
}

impl Lazy {
    /// The error for an operation that cannot begin before all memory is in.
    pub fn still_coming(&self) -> Error {
        Error::new(
            Code::OperationInvalid,
            format!(
                "the guest's memory is still coming from snapshot '{}': wait until all of it is in \
                 (instantsnap_memory_wait) and try again",
                self.snapshot
            ),
        )
    }
}
