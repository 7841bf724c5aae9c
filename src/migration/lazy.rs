// SPDX-License-Identifier: LGPL-2.1-or-later

//! A load whose memory follows while the guest runs: what QEMU keeps of it, and how far it is.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::names::FD_NAME;
use crate::backend::{DEFAULT_TIMEOUT, Guest};
use crate::deadline::Deadline;
use crate::error::{Code, Error, Result};
use crate::monitor::{Command, Failure, commands};
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

/// How far the memory is, as far as QEMU says it: other clients' migrations hide it, even those
/// that QEMU refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// QEMU has not begun to load.
    NotBegun,
    /// It comes.
    UnderWay,
    /// Its source was lost, and QEMU waits for another one.
    Interrupted,
    /// All of it is in; or QEMU speaks of another client's migration.
    Unclear,
}

impl Arrival {
    /// Asks QEMU.
    pub fn ask(guest: &mut dyn Guest) -> Result<Arrival> {
        let migration = commands::query_migrate(guest, Deadline::after(DEFAULT_TIMEOUT))?;
        Ok(match migration.status.as_deref() {
            Some("postcopy-paused") => Arrival::Interrupted,
            None | Some("none") => Arrival::NotBegun,
            Some("setup" | "completed" | "failed" | "cancelling" | "cancelled") => Arrival::Unclear,
            Some(_) => Arrival::UnderWay,
        })
    }

    /// Whether QEMU waits for another source, whatever it says of its state.
    pub fn is_interrupted(guest: &mut dyn Guest) -> Result<bool> {
        let step = "cannot ask whether the guest waits for its memory";
        // There is no such descriptor. So this is always refused, but for that reason only if it
        // could go on.
        let uri = json!({ "uri": format!("fd:{FD_NAME}-none") });
        let command = Command::new("migrate-recover", uri);
        match guest.execute(command, Deadline::after(DEFAULT_TIMEOUT)) {
            Ok(_) => Ok(true),
            Err(Failure::Refused(_, reason)) => Ok(!reason.contains("postcopy is paused")),
            Err(failure) => Err(failure.into_error(step)),
        }
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
