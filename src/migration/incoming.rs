// SPDX-License-Identifier: LGPL-2.1-or-later

//! Starts an incoming migration, and waits for it.

use serde_json::json;

use super::backoff::Backoff;
use crate::backend::{DEFAULT_TIMEOUT, Guest, Liveness};
use crate::deadline::Deadline;
use crate::error::{Code, Error, Result, fail};
use crate::monitor::commands::{self, Progress};
use crate::monitor::{Command, Failure};

/// Starts an incoming migration. QEMU 9.1 and later can report why it cannot load instead of
/// ending.
pub fn start_incoming(guest: &mut dyn Guest, uri: &str) -> Result<()> {
    let step = "cannot start loading memory";
    let command = Command::new("migrate-incoming", json!({ "uri": uri, "exit-on-error": false }));
    match guest.execute(command, Deadline::after(DEFAULT_TIMEOUT)) {
        Ok(_) => Ok(()),
        Err(Failure::Refused(_, reason)) if reason.contains("exit-on-error") => {
            let command = Command::new("migrate-incoming", json!({ "uri": uri }));
            guest.run(step, command, Deadline::after(DEFAULT_TIMEOUT)).map(drop)
        }
        Err(failure) => Err(failure.into_error(step)),
    }
}

/// Waits until an incoming migration has ended. How long it takes depends on the size of memory, so
/// only the time to each of QEMU's replies is limited.
pub fn wait_loaded(guest: &mut dyn Guest) -> Result<()> {
    wait(guest).map_err(|error| match guest.liveness() {
        Liveness::Exited => Error::new(
            Code::OperationFailed,
            "QEMU ended while it loaded the memory image, as it does when the machine differs from \
             that of the snapshot: see its standard error",
        ),
        _ => error,
    })
}

fn wait(guest: &mut dyn Guest) -> Result<()> {
    let backoff = Backoff::default();
    loop {
        let migration = commands::query_migrate(guest, Deadline::after(DEFAULT_TIMEOUT))?;
        match migration.progress() {
            Progress::Completed => return Ok(()),
            Progress::Failed => {
                fail!(OperationFailed, "QEMU cannot load the memory image: {}", migration.reason())
            }
            // It has not begun yet, or is under way.
            Progress::None | Progress::UnderWay => {}
        }
        backoff.wait();
    }
}

/// Waits until a guest whose devices are loaded can run, while its memory may still come.
pub fn wait_devices(guest: &mut dyn Guest) -> Result<()> {
    let (backoff, deadline) = (Backoff::default(), Deadline::after(DEFAULT_TIMEOUT));
    while commands::query_status(guest, deadline)?.status == "inmigrate" {
        if deadline.left().is_none() {
            fail!(OperationTimeout, "QEMU has loaded the devices, and does not let the guest run");
        }
        backoff.wait();
    }
    Ok(())
}
