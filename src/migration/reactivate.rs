// SPDX-License-Identifier: LGPL-2.1-or-later

//! Activates the disks again after a non-live migration.
//!
//! When a migration completes, QEMU hands its disks over to a destination, though there is none
//! here. QEMU takes them back when the guest resumes, and when a guest has been loaded. A guest
//! that stays paused would be left with inactive disks, on which no operation is possible, not even
//! the merge of an overlay. QEMU 10.0 and later have a command for it; before that, an NBD export
//! of a node activates it as a side effect.

use serde_json::json;

use crate::backend::{DEFAULT_TIMEOUT, Guest};
use crate::deadline::Deadline;
use crate::error::Result;
use crate::monitor::{Command, commands};

const STEP: &str = "cannot activate the disks of the paused guest again";
const EXPORT: &str = "instantsnap-reactivate";

/// Makes all disks active.
pub fn reactivate_disks(guest: &mut dyn Guest) -> Result<()> {
    if commands::has_command(guest, "blockdev-set-active", deadline())? {
        let command = Command::new("blockdev-set-active", json!({ "active": true }));
        return guest.run(STEP, command, deadline()).map(drop);
    }
    // The socket is abstract, so that there is no file, and no client knows its name. If QEMU has
    // an NBD server of the user's already, that one is used. The name is unique, because other
    // guests are snapshotted at the same time, by this process too.
    let mut random = [0; 8];
    let _ = rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::NONBLOCK);
    let name = format!("{EXPORT}-{}-{:016x}", std::process::id(), u64::from_ne_bytes(random));
    let address = json!({ "type": "unix", "data": { "path": name, "abstract": true } });
    let started = guest
        .execute(Command::new("nbd-server-start", json!({ "addr": address })), deadline())
        .is_ok();
    let result = export_each(guest);
    if started {
        guest.run(STEP, Command::new("nbd-server-stop", json!({})), deadline())?;
    }
    result
}

fn export_each(guest: &mut dyn Guest) -> Result<()> {
    let blocks = guest.run(STEP, Command::new("query-block", json!({})), deadline())?;
    for block in blocks.as_array().into_iter().flatten() {
        let Some(node) = block["inserted"]["node-name"].as_str() else { continue };
        let export = json!({ "type": "nbd", "id": EXPORT, "node-name": node, "writable": false });
        guest.run(STEP, Command::new("block-export-add", export), deadline())?;
        guest.run(
            STEP,
            Command::new("block-export-del", json!({ "id": EXPORT, "mode": "hard" })),
            deadline(),
        )?;
    }
    Ok(())
}

fn deadline() -> Deadline {
    Deadline::after(DEFAULT_TIMEOUT)
}
