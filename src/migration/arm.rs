// SPDX-License-Identifier: LGPL-2.1-or-later

//! Waits until QEMU has armed its tracking of memory writes, or cannot arm it any more.

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
/// Only page counts prove that it is armed (or the migration's end does): see
/// [`commands::Migration::has_pages`]. QEMU's main loop sent the reply with the counts, so QEMU
/// carries out a `cont` that is sent after it after the arming. Returns that reply.
///
/// While the migration sets up, the guest must stay in a state that QEMU can capture: see
/// [`run_state`]. `ran`: the guest ran before the snapshot.
pub fn wait_armed(
    guest: &mut dyn Guest,
    ran: bool,
    cancel: &Cancel,
    deadline: Deadline,
) -> Result<Migration> {
    let backoff = Backoff::default();
    loop {
        let migration = match commands::query_migrate(guest, deadline) {
            // The limit has passed while QEMU answered, or while we slept.
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

/// Pauses a guest again that was resumed only to save QEMU from an abort. QEMU is going to stop it,
/// arm, and resume it: the pause follows that.
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

/// Waits until the guest can be resumed, and returns whether the caller has to resume it. It is for
/// a caller that sent `stop` while the migration set up, and does not know whether QEMU has
/// carried that out, or whether it was in time.
///
/// After the setup QEMU stops a running guest, arms, and resumes the guest by itself. If a `cont`
/// comes in between, QEMU overlooks it, or waits forever for a pause that is over. QEMU does not
/// stop a guest that is paused already. So a guest that runs is left alone; and QEMU did not pause
/// a guest that was seen paused before QEMU was seen to set up.
pub fn wait_resumable(guest: &mut dyn Guest, deadline: Deadline) -> bool {
    let backoff = Backoff::default();
    let mut query = || {
        let running = commands::query_status(guest, deadline)?.running;
        let migration = commands::query_migrate(guest, deadline)?;
        Ok::<_, Error>((running, migration.is_between_setup_and_armed()))
    };
    while deadline.left().is_some() {
        match query() {
            Ok((true, _)) => return false,
            Ok((false, false)) => return true,
            // The next query may tell.
            Ok((false, true)) | Err(_) => backoff.wait(),
        }
    }
    true
}
