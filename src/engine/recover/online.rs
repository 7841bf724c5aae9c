// SPDX-License-Identifier: LGPL-2.1-or-later

//! Undoes an interrupted snapshot with the help of the guest's QEMU, which still runs.

use std::time::Duration;

use super::files;
use super::report::{Report, What};
use crate::backend::{DEFAULT_TIMEOUT, Guest};
use crate::deadline::Deadline;
use crate::error::{Result, fail};
use crate::migration::{Settings, reactivate_disks};
use crate::model::journal::ReadJournal;
use crate::monitor::commands::{self, Progress};

/// A migration whose reader has ended fails in less time than this.
const MIGRATION_END: Duration = Duration::from_secs(60);

/// Undoes the snapshot. The guest comes first.
pub fn undo(guest: &mut dyn Guest, journal: &ReadJournal, report: &mut Report) -> Result<()> {
    let failed = wait_migration(guest)?;
    resume(guest, journal, failed, report)?;
    if Settings::recover(guest)? {
        report.undone(What::Settings, "migration", "QEMU has the settings of before the snapshot");
    }
    merge(guest, journal, report)?;
    files::remove(journal, report);
    for disk in &journal.intent.planned.manual {
        if journal.may_have_switched() {
            let why = "a storage hook may have made a snapshot of it, which was not recorded";
            report.left(What::Storage, disk, why);
        }
    }
    Ok(())
}

/// Waits for the end of the migration: the reader of its stream has ended. Returns whether it has
/// failed.
fn wait_migration(guest: &mut dyn Guest) -> Result<bool> {
    let deadline = Deadline::after(MIGRATION_END);
    loop {
        let migration = commands::query_migrate(guest, Deadline::after(DEFAULT_TIMEOUT))?;
        match migration.progress() {
            Progress::UnderWay if deadline.left().is_some() => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Progress::UnderWay => fail!(
                OperationInvalid,
                "a migration of the guest is in progress: wait for it to end, or cancel it, and \
                 recover the guest then"
            ),
            Progress::Failed => return Ok(true),
            Progress::None | Progress::Completed => return Ok(false),
        }
    }
}

/// Resumes the guest, if the snapshot has paused it.
fn resume(
    guest: &mut dyn Guest,
    journal: &ReadJournal,
    failed: bool,
    report: &mut Report,
) -> Result<()> {
    const GUEST: &str = "guest";
    let status = guest.status()?;
    if !journal.intent.planned.running {
        // QEMU deactivates the disks of a guest that it has saved while it was paused.
        if status.status == "postmigrate" && journal.record().is_none() {
            reactivate_disks(guest)?;
        }
        return Ok(());
    }
    if failed && journal.may_have_switched() && !guest.capabilities().background_can_be_cancelled {
        let why = "this QEMU leaves the guest's memory write-protected if nobody reads its stream \
                   to the end: if the guest hangs, end it and start it again; its disks are whole";
        report.left(What::Guest, GUEST, why);
    }
    let paused = ["paused", "prelaunch", "postmigrate", "finish-migrate"];
    if status.running || !paused.contains(&&*status.status) {
        return Ok(());
    }
    // The journal says that the snapshot was about to pause the guest, and not that the guest ran
    // again. After a migration of another client the guest may run elsewhere.
    let is_ours = journal.may_have_switched() && journal.record().is_none();
    if is_ours && status.status != "postmigrate" {
        guest.resume(Deadline::after(DEFAULT_TIMEOUT))?;
        report.undone(What::Guest, GUEST, "the snapshot had paused it, and it runs again");
    } else {
        report.left(What::Guest, GUEST, "another client has paused, saved or migrated it");
    }
    Ok(())
}

/// Merges the overlays into their images, and discards them.
fn merge(guest: &mut dyn Guest, journal: &ReadJournal, report: &mut Report) -> Result<()> {
    let overlays = files::overlays(journal, report);
    guest.adopt_overlays(&overlays)?;
    let merged = guest.merge_disks();
    if journal.intent.planned.running && guest.status()?.status == "io-error" {
        guest.resume(Deadline::after(DEFAULT_TIMEOUT))?;
    }
    if let Err(error) = merged.and_then(|()| guest.discard_overlays()) {
        let names: Vec<_> = overlays.iter().map(|(overlay, _)| &*overlay.overlay).collect();
        report.undecided(What::Overlay, &names.join(", "), error.message);
        return Ok(());
    }
    for (overlay, file) in &overlays {
        if file.is_some() {
            let why = "the disk is on its image again, with all that the guest has written";
            report.undone(What::Overlay, &overlay.overlay, why);
        }
    }
    Ok(())
}
