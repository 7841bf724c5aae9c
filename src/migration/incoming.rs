// SPDX-License-Identifier: LGPL-2.1-or-later

//! Waits for an incoming migration.

use super::backoff::Backoff;
use crate::backend::{DEFAULT_TIMEOUT, Guest};
use crate::deadline::Deadline;
use crate::error::{Result, fail};
use crate::monitor::commands::{self, Progress};

/// Waits until an incoming migration has ended. How long it takes depends on the size of memory, so
/// only the time to each of QEMU's replies is limited.
pub fn wait_loaded(guest: &mut dyn Guest) -> Result<()> {
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
