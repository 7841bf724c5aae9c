// SPDX-License-Identifier: LGPL-2.1-or-later

//! Undoes an interrupted snapshot with the help of the guest's QEMU, which still runs.

use std::path::Path;
use std::time::Duration;

use super::files;
use super::needed::Others;
use super::note::{note, note_undo};
use super::report::{Report, What};
use crate::backend::{DEFAULT_TIMEOUT, Guest};
use crate::deadline::Deadline;
use crate::error::{Result, fail};
use crate::migration::{Settings, reactivate_disks};
use crate::model::Store;
use crate::model::journal::{JournalFile, Line, NotedOverlay, ReadJournal};
use crate::monitor::commands::{self, Progress};

/// A migration whose reader has ended fails in less time than this.
const MIGRATION_END: Duration = Duration::from_secs(60);

/// Undoes the snapshot. The guest comes first. Returns whether its overlays are gone.
pub fn undo(
    guest: &mut dyn Guest,
    store: &Store,
    journal: &ReadJournal,
    file: &mut JournalFile,
    report: &mut Report,
) -> Result<bool> {
    let failed = wait_migration(guest)?;
    if resume(guest, journal, failed, report)? {
        note(file, &Line::Resumed)?;
    }
    note_undo(journal, file)?;
    put_settings_back(guest, report)?;
    merge(guest, store, journal, file, report)
}

/// Puts back the migration settings that the snapshot has left in QEMU. Returns whether there were
/// any.
pub fn put_settings_back(guest: &mut dyn Guest, report: &mut Report) -> Result<bool> {
    let were_left = Settings::recover(guest)?;
    if were_left {
        report.undone(What::Settings, "migration", "QEMU has the settings of before the snapshot");
    }
    Ok(were_left)
}

/// Waits for the end of the migration: the reader of its stream has ended. Returns whether it has
/// failed.
pub fn wait_migration(guest: &mut dyn Guest) -> Result<bool> {
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

/// Resumes the guest, if the snapshot has paused it. Returns whether it was resumed.
pub fn resume(
    guest: &mut dyn Guest,
    journal: &ReadJournal,
    failed: bool,
    report: &mut Report,
) -> Result<bool> {
    const GUEST: &str = "guest";
    let status = guest.status()?;
    if !journal.intent.planned.running {
        // QEMU deactivates the disks of a guest that it has saved while it was paused.
        if status.status == "postmigrate" && journal.record().is_none() {
            reactivate_disks(guest)?;
        }
        return Ok(false);
    }
    if failed && journal.may_have_switched() && !guest.capabilities().background_can_be_cancelled {
        let why = "this QEMU leaves the guest's memory write-protected if nobody reads its stream \
                   to the end: if the guest hangs, end it and start it again; its disks are whole";
        report.left(What::Guest, GUEST, why);
    }
    let paused = ["paused", "prelaunch", "postmigrate", "finish-migrate"];
    if status.running || !paused.contains(&&*status.status) {
        return Ok(false);
    }
    // The journal says that the snapshot was about to pause the guest, and not that the guest ran
    // again. After a migration of another client the guest may run elsewhere.
    let has_run = |NotedOverlay { overlay, image, .. }: &NotedOverlay| {
        [overlay, image].into_iter().any(|file| journal.is_long_before(Path::new(file)))
    };
    let is_ours = journal.may_be_paused() && !journal.intent.planned.overlays.iter().any(has_run);
    if is_ours && status.status != "postmigrate" {
        guest.resume(Deadline::after(DEFAULT_TIMEOUT))?;
        report.undone(What::Guest, GUEST, "the snapshot had paused it, and it runs again");
        return Ok(true);
    }
    report.left(What::Guest, GUEST, "another client has paused, saved or migrated it");
    Ok(false)
}

/// Merges the overlays into their images, and discards them. Returns whether they are gone.
fn merge(
    guest: &mut dyn Guest,
    store: &Store,
    journal: &ReadJournal,
    file: &mut JournalFile,
    report: &mut Report,
) -> Result<bool> {
    let overlays = files::overlays(journal, report);
    if journal.may_have_switched() && !may_merge(store, journal, report)? {
        return Ok(false);
    }
    guest.adopt_overlays(&overlays, &journal.merged())?;
    let merged = if journal.may_have_switched() { guest.merge_disks() } else { Ok(()) };
    if journal.intent.planned.running && guest.status()?.status == "io-error" {
        guest.resume(Deadline::after(DEFAULT_TIMEOUT))?;
    }
    if merged.is_ok() {
        // From here on an overlay that is missing is none that is missed.
        let merged = overlays.iter().map(|(overlay, _)| overlay.overlay.clone()).collect();
        note(file, &Line::Merged { overlays: merged })?;
    }
    if let Err(error) = merged.and_then(|()| guest.discard_overlays()) {
        let names: Vec<_> = overlays.iter().map(|(overlay, _)| &*overlay.overlay).collect();
        report.undecided(What::Overlay, &names.join(", "), error.message);
        return Ok(false);
    }
    for (overlay, file) in &overlays {
        if file.is_some() {
            let why = "the disk is on its image again, with all that the guest has written";
            report.undone(What::Overlay, &overlay.overlay, why);
        }
    }
    Ok(true)
}

/// Whether no other snapshot and no other image needs the images that the guest would write to
/// after the merge. Else the guest goes on with its overlays.
pub fn may_merge(store: &Store, journal: &ReadJournal, report: &mut Report) -> Result<bool> {
    let others = Others::find(store, journal)?;
    let mut may = true;
    for overlay in &journal.intent.planned.overlays {
        if let Some(other) = others.need(&overlay.image) {
            let why = format!(
                "the guest goes on with it, and it was not merged into '{}', because {other} \
                 stands on that image, or needs it as it is",
                overlay.image
            );
            report.undecided(What::Overlay, &overlay.overlay, why);
            may = false;
        }
    }
    Ok(may)
}
