// SPDX-License-Identifier: LGPL-2.1-or-later

//! Waiting until QEMU has armed its tracking of memory writes, or will not any more.

use super::backoff::Backoff;
use super::run_state;
use crate::backend::{DEFAULT_TIMEOUT, Guest};
use crate::cancel::Cancel;
use crate::deadline::Deadline;
use crate::error::{Code, Error, Result, fail};
use crate::monitor::commands::{self, Migration, Progress};

/// Waits until write tracking is armed: from then on the guest may run, and its memory is saved as
/// it is now.
///
/// Only page counts prove it (or that the migration has ended): see
/// [`commands::Migration::has_pages`]. Their reply came through QEMU's main loop, so a `cont` sent
/// after it is carried out after the arming. Returns that reply.
///
/// While it sets up, the guest must stay in a state that QEMU can capture: see [`run_state`].
/// `ran`: it ran before.
pub fn wait_armed(
    guest: &mut dyn Guest,
    ran: bool,
    cancel: &Cancel,
    deadline: Deadline,
) -> Result<Migration> {
    let backoff = Backoff::default();
    loop {
        let migration = match commands::query_migrate(guest, deadline) {
            // The limit has passed while it answered, or while we slept.
            Err(error) if error.code == Code::OperationTimeout => {
                fail!(
                    OperationTimeout,
                    "the tracking of memory writes is not armed within the limit of the pause"
                )
            }
            answer => answer?,
        };
        match migration.progress() {
            Progress::Completed => return Ok(migration),
            Progress::UnderWay if migration.has_pages() => return Ok(migration),
            Progress::UnderWay if migration.is_setting_up() => {
                run_state::keep_capturable(guest, deadline).inspect_err(|_| {
                    if !ran {
                        pause_once_armed(guest);
                    }
                })?
            }
            Progress::UnderWay => {}
            Progress::None | Progress::Failed => {
                fail!(
                    OperationFailed,
                    "cannot arm the tracking of memory writes: {}",
                    migration.reason()
                )
            }
        }
        cancel.check()?;
        backoff.wait();
    }
}

/// Pauses a guest that was resumed for the sake of QEMU, which is going to stop and resume it by
/// itself before that.
fn pause_once_armed(guest: &mut dyn Guest) {
    let (backoff, deadline) = (Backoff::default(), Deadline::after(DEFAULT_TIMEOUT));
    while deadline.left().is_some()
        && commands::query_migrate(guest, deadline).is_ok_and(|migration| {
            migration.progress() == Progress::UnderWay && !migration.has_pages()
        })
    {
        backoff.wait();
    }
    let _ = guest.pause(deadline);
}

/// Waits until a guest can be resumed that was to be paused while its migration set up, by somebody
/// who does not know whether that was done, and in time. Returns whether it is to be resumed now.
///
/// When it has set up, QEMU stops a guest that runs, arms, and resumes it by itself; a `cont` in
/// between it overlooks, or it waits for good for a pause that is no more. It does not stop one
/// that is paused already. So a guest that runs is left alone, and one that was seen paused before
/// QEMU was seen setting up was not paused by QEMU.
pub fn wait_resumable(guest: &mut dyn Guest, deadline: Deadline) -> bool {
    let backoff = Backoff::default();
    let mut look = || {
        let running = commands::query_status(guest, deadline)?.running;
        let migration = commands::query_migrate(guest, deadline)?;
        Ok::<_, Error>((running, migration.is_between_setup_and_armed()))
    };
    while deadline.left().is_some() {
        match look() {
            Ok((true, _)) => return false,
            Ok((false, false)) => return true,
            // What is not known now may be in a moment.
            Ok((false, true)) | Err(_) => backoff.wait(),
        }
    }
    true
}
