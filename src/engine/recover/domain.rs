// SPDX-License-Identifier: LGPL-2.1-or-later

//! Recovers a domain of libvirt whose snapshot was interrupted.
//!
//! The journal says what was made and how far the snapshot was. What it does not say is asked of
//! libvirt, whose view of the domain is the true one: the chain of images that each disk has in the
//! running domain, or else in its definition, and the record of the snapshot. An overlay that a
//! disk is on, directly above the image that it was made on, has the disk's newest data, whichever
//! QEMU runs by now. If a chain is another one, another client has changed it since: then nothing
//! of disks and files is changed.

use std::path::Path;
use std::time::Duration;

use super::needed::Others;
use super::note::{note, note_undo};
use super::online::{may_merge, put_settings_back, resume, wait_migration};
use super::report::{Report, What};
use super::{files, offline};
use crate::backend::overlay_file::OverlayFile;
use crate::backend::{DEFAULT_TIMEOUT, Guest, Liveness, Place};
use crate::deadline::Deadline;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::model::journal::{
    JournalFile, Line, NotedDomain, NotedFile, NotedOverlay, Presence, ReadJournal,
};
use crate::model::{Frozen, Record, Reservation, Store};
use crate::own_file::OwnFile;
use crate::sys;

/// A qemu-img that makes an overlay ends in this time, even on a busy machine.
const QEMU_IMG_END: Duration = Duration::from_secs(5);

/// An overlay of the snapshot.
struct Found {
    noted: NotedOverlay,
    /// Its file, if it is known to be the snapshot's.
    file: Option<NotedFile>,
    place: Place,
}

/// The state of the domain.
#[derive(Clone, Copy)]
enum State {
    /// It runs, with the snapshot's QEMU or with another one.
    Runs { same: bool },
    /// It does not run.
    Ended,
}

/// What is known of an overlay's content.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Content {
    /// A QEMU has it open.
    InUse,
    /// It has data that the guest wrote.
    Data,
    /// It has none, or does not exist.
    None,
}

/// Recovers the domain. Without a `guest`, nothing is done: libvirt must be asked.
pub fn recover(
    store: &Store,
    reservation: &Reservation,
    journal: &ReadJournal,
    domain: &NotedDomain,
    guest: Option<&mut dyn Guest>,
    report: &mut Report,
) -> Result<()> {
    if journal.is_undone() {
        name_storage(journal, report);
        return Ok(());
    }
    let Some(guest) = guest else {
        let why = format!(
            "it is of domain '{}' of libvirt ('{}'): open that domain, and recover it \
             (instantsnap_recover())",
            domain.name, domain.uri
        );
        report.undecided(What::Snapshot, &domain.snapshot, why);
        return Ok(());
    };
    let mut file = store.continue_journal(reservation)?;
    let state = match find_qemu(journal, &mut file, guest, report)? {
        Ok(state) => state,
        Err(why) => {
            report.undecided(What::Snapshot, &domain.snapshot, why);
            return Ok(());
        }
    };
    let memory = &journal.intent.planned.memory;
    // The record of a snapshot whose memory image is another's by now is another's too.
    let is_ours = journal.find(memory, || true).0 != Presence::Another;
    let is_recorded = guest.adopt_domain(domain, memory)? && is_ours;
    let Some(found) = find(journal, guest, report)? else { return Ok(()) };
    if is_complete(journal, is_recorded, state, &found) {
        remove_copies(journal, report);
        let why = match journal.intent.planned.is_recorded {
            true => "it was complete and recorded",
            false => "it was complete, and was not to be recorded",
        };
        report.finished(What::Snapshot, &domain.snapshot, why);
        return Ok(());
    }
    let is_whole = match state {
        State::Runs { same } => {
            undo_running(store, journal, &mut file, guest, &found, same, report)?
        }
        State::Ended => {
            let (file, found) = (&mut file, &found[..]);
            undo_ended(store, journal, file, domain, guest, found, report)?
        }
    };
    if !is_whole {
        return Ok(());
    }
    if is_recorded {
        match guest.withdraw() {
            Ok(()) => {
                let why = "it was recorded and not complete: libvirt has no record of it any more";
                report.undone(What::Snapshot, &domain.snapshot, why);
            }
            Err(error) => {
                report.undecided(What::Snapshot, &domain.snapshot, error.message);
                return Ok(());
            }
        }
    }
    files::remove(journal, report);
    if journal.may_have_switched() {
        name_storage(journal, report);
    }
    Ok(())
}

/// Names what a storage hook may have left. The journal does not stay for it, because the domain's
/// next snapshot needs its place.
fn name_storage(journal: &ReadJournal, report: &mut Report) {
    for disk in &journal.intent.planned.manual {
        let why = "the storage hook may have made a snapshot of it, which is not recorded: look \
                   there, and remove that snapshot";
        report.left(What::Storage, disk, why);
    }
}

/// Finds out whether the domain runs. If it runs with the snapshot's QEMU, the guest comes first:
/// it runs again, and the settings are put back. The inner error is the reason why nothing can be
/// done.
fn find_qemu(
    journal: &ReadJournal,
    file: &mut JournalFile,
    guest: &mut dyn Guest,
    report: &mut Report,
) -> Result<std::result::Result<State, &'static str>> {
    const NOT_HERE: &str = "the snapshot's QEMU still runs, and libvirt has another one for this \
                            domain, or none: recover the domain of that QEMU";
    let noted = journal.intent.planned.qemu.as_ref().map(|qemu| qemu.pid);
    let has_ended = journal.has_qemu_ended();
    let liveness = if guest.has_qemu() { guest.liveness() } else { Liveness::Exited };
    Ok(match (liveness, has_ended) {
        (Liveness::Unresponsive, _) => Err("the domain's QEMU, or libvirt, does not answer"),
        // If nothing is known of that QEMU, locks on the images show whether it runs.
        (Liveness::Exited, Some(true) | None) => Ok(State::Ended),
        (Liveness::Exited, Some(false)) => Err(NOT_HERE),
        (Liveness::Alive, Some(false)) if guest.pid() != noted => Err(NOT_HERE),
        (Liveness::Alive, Some(false)) => {
            let failed = wait_migration(guest)?;
            if resume(guest, journal, failed, report)? {
                note(file, &Line::Resumed)?;
            }
            put_settings_back(guest, report)?;
            Ok(State::Runs { same: true })
        }
        (Liveness::Alive, Some(true)) => Ok(State::Runs { same: false }),
        // QEMU's process cannot be seen from here, or could not when the snapshot was taken. Only
        // the snapshot's own QEMU has its settings, which it gets before the guest is paused.
        (Liveness::Alive, None) => {
            let failed = wait_migration(guest)?;
            let same = put_settings_back(guest, report)?;
            if same && resume(guest, journal, failed, report)? {
                note(file, &Line::Resumed)?;
            }
            Ok(State::Runs { same })
        }
    })
}

/// Finds the overlays. `None` if one cannot be accessed, which is reported.
fn find(
    journal: &ReadJournal,
    guest: &mut dyn Guest,
    report: &mut Report,
) -> Result<Option<Vec<Found>>> {
    let overlays = files::overlays(journal, report);
    if let Err(error) = guest.adopt_overlays(&overlays, &journal.merged()) {
        let names: Vec<_> = overlays.iter().map(|(noted, _)| &*noted.overlay).collect();
        let why = format!("{}: recover the domain as a user who may", error.message);
        report.undecided(What::Overlay, &names.join(", "), why);
        return Ok(None);
    }
    let places = guest.places()?;
    let place_of = |noted: &NotedOverlay| {
        let known = places.iter().find(|(overlay, _)| *overlay == noted.overlay);
        known.map_or(Place::Elsewhere, |(_, place)| *place)
    };
    let found =
        overlays.into_iter().map(|(noted, file)| Found { place: place_of(&noted), noted, file });
    let found: Vec<_> = found.collect();
    // A qemu-img that the killed process was running can have one open for a moment.
    let deadline = Deadline::after(QEMU_IMG_END);
    for unused in found.iter().filter(|found| found.place != Place::Active) {
        while content(unused, journal)? == Content::InUse && deadline.left().is_some() {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    Ok(Some(found))
}

/// Whether the snapshot is proved to be complete: its memory image is, its images are as they were
/// at the instant, and the domain that runs is above them.
fn is_complete(journal: &ReadJournal, is_recorded: bool, state: State, found: &[Found]) -> bool {
    let planned = &journal.intent.planned;
    if journal.is_undoing() || planned.is_recorded != is_recorded {
        return false;
    }
    let Some(record) = journal.record().and_then(|record| Record::parse(record).ok()) else {
        return false;
    };
    let is_there = journal.find(&planned.memory, || false).0 == Presence::Same;
    let is_frozen = |frozen: &[Frozen]| {
        // Nothing proves that an image that is no regular file was not written.
        !frozen.is_empty() && frozen.iter().all(|frozen| frozen.change().is_none())
    };
    // UEFI variables are compared after the image is complete.
    (journal.is_complete() || record.nvram.is_empty())
        && is_there
        && Image::open(&planned.memory).is_ok()
        && record.disks.len() == found.len()
        && record.disks.iter().all(|disk| is_frozen(&disk.frozen))
        && found.iter().all(|found| {
            // The definition of a domain that has ended does not name the images below the first.
            let is_above = matches!(found.place, Place::Active | Place::Covered);
            found.file.is_some() && (is_above || is_recorded && matches!(state, State::Ended))
        })
}

/// Removes the copies of UEFI variables, which were only compared.
fn remove_copies(journal: &ReadJournal, report: &mut Report) {
    for copy in &journal.intent.planned.copies {
        let (_, file) = journal.find(Path::new(copy), || false);
        let removed = |file: NotedFile| OwnFile::reopen(&file.known).ok()??.remove().ok();
        if file.and_then(removed).is_some() {
            report.undone(What::Firmware, copy, "it was only compared, and is removed");
        }
    }
}

/// What is in an overlay. A file that is not known to be the snapshot's counts as none.
fn content(found: &Found, journal: &ReadJournal) -> Result<Content> {
    let Some(file) = &found.file else { return Ok(Content::None) };
    let opened = OverlayFile::reopen(&file.known, found.noted.is_reused).map_err(|error| {
        let step = format!("cannot open the overlay '{}'", found.noted.overlay);
        Error::system(step, error)
    })?;
    let Some(opened) = opened else { return Ok(Content::None) };
    if sys::is_locked(opened.file(), sys::IMAGE_LOCKS) {
        return Ok(Content::InUse);
    }
    let has_data = offline::has_data(&found.noted, opened.file(), journal)?;
    Ok(if has_data { Content::Data } else { Content::None })
}

/// Undoes the snapshot of a domain that runs, with the same QEMU or with another one. Returns
/// whether that is done.
fn undo_running(
    store: &Store,
    journal: &ReadJournal,
    file: &mut JournalFile,
    guest: &mut dyn Guest,
    found: &[Found],
    same: bool,
    report: &mut Report,
) -> Result<bool> {
    let mut is_decided = true;
    for one in found {
        if let Some(why) = why_not(one, journal, same)? {
            report.undecided(What::Overlay, &one.noted.overlay, why);
            is_decided = false;
        }
    }
    // Each disk is as it was, or none is changed.
    if !is_decided || journal.may_have_switched() && !may_merge(store, journal, report)? {
        return Ok(false);
    }
    note_undo(journal, file)?;
    let merged = if journal.may_have_switched() { guest.merge_disks() } else { Ok(()) };
    if same && journal.intent.planned.running && guest.status()?.status == "io-error" {
        guest.resume(Deadline::after(DEFAULT_TIMEOUT))?;
    }
    if merged.is_ok() {
        // From here on an overlay that is missing is none that is missed.
        let overlays = found.iter().map(|found| found.noted.overlay.clone()).collect();
        note(file, &Line::Merged { overlays })?;
    }
    if let Err(error) = merged.and_then(|()| guest.discard_overlays()) {
        let names: Vec<_> = found.iter().map(|found| &*found.noted.overlay).collect();
        report.undecided(What::Overlay, &names.join(", "), error.message);
        return Ok(false);
    }
    for found in found.iter().filter(|found| found.file.is_some()) {
        let why = "the disk is on its image again, with all that the guest has written";
        report.undone(What::Overlay, &found.noted.overlay, why);
    }
    Ok(true)
}

/// Why an overlay of a domain that runs can neither be merged nor removed; `None` if it can.
fn why_not(found: &Found, journal: &ReadJournal, same: bool) -> Result<Option<String>> {
    let NotedOverlay { disk, overlay, image, .. } = &found.noted;
    let changed = "another client has changed them since; nothing of the snapshot was changed";
    let by_hand = format!(
        "where nothing has written to '{image}' since, run `qemu-img commit {overlay}` while the \
         domain is off, and remove it"
    );
    Ok(match (found.place, content(found, journal)?) {
        (Place::Active, _) if found.file.is_some() => None,
        (Place::Active, _) => Some(format!(
            "disk '{disk}' is on it, and it is not known to be the snapshot's: another client has \
             changed it since"
        )),
        (Place::Covered, _) => {
            Some(format!("disk '{disk}' has other images on top of it by now: {changed}"))
        }
        (Place::Changed, _) => {
            Some(format!("disk '{disk}' has it between other images than before: {changed}"))
        }
        (Place::OnImage | Place::Elsewhere, Content::InUse) if !journal.may_have_switched() => {
            Some("another program has it open, and may need it".into())
        }
        (Place::OnImage | Place::Elsewhere, Content::InUse) => Some(format!(
            "a QEMU has it open, and libvirt says that disk '{disk}' is not on it: libvirt was \
             ended when it switched the disks. End the domain in its guest; then {by_hand}"
        )),
        // Only a merge can have put the disk of this QEMU back on its image.
        (Place::OnImage, Content::Data) if same => None,
        (Place::OnImage | Place::Elsewhere, Content::Data) if journal.may_have_switched() => {
            Some(format!(
                "disk '{disk}' is not on it, and what the guest wrote last may be in it: {by_hand}"
            ))
        }
        (Place::OnImage | Place::Elsewhere, _) => None,
    })
}

/// Undoes the snapshot of a domain that has ended. Returns whether that is done.
fn undo_ended(
    store: &Store,
    journal: &ReadJournal,
    file: &mut JournalFile,
    domain: &NotedDomain,
    guest: &mut dyn Guest,
    found: &[Found],
    report: &mut Report,
) -> Result<bool> {
    let others = Others::find(store, journal)?;
    let frozen = guest.images_of_others(&domain.snapshot)?;
    let mut is_decided = true;
    for Found { noted, file, place } in found {
        let why = match (place, file) {
            (_, None) if journal.has_merged(&noted.overlay) => None,
            // The definition is put back once the overlays are merged, and then they are removed.
            (Place::OnImage, None) if domain.definition.is_some() => {
                if journal.may_have_switched() {
                    let why =
                        "it is not there any more, and the domain's definition is on its image";
                    report.left(What::Overlay, &noted.overlay, why);
                }
                None
            }
            // Its storage may not be there yet.
            (_, None) if journal.may_have_switched() => Some(
                "the guest may have written to it, and it is missing, or not known to be the \
                 snapshot's: make its storage available"
                    .to_owned(),
            ),
            (Place::Covered | Place::Changed, _) => {
                Some("another client has put the domain's disk on other images since".to_owned())
            }
            (_, None) => None,
            (_, Some(file)) => offline::why_left(noted, file, journal, &others, &frozen)?,
        };
        if let Some(why) = why {
            let why = format!("{why}; nothing was changed");
            report.undecided(What::Overlay, &noted.overlay, why);
            is_decided = false;
        }
    }
    if !is_decided {
        return Ok(false);
    }
    note_undo(journal, file)?;
    if let Err(error) = guest.merge_and_discard_offline(journal.may_have_switched()) {
        let names: Vec<_> = found.iter().map(|found| &*found.noted.overlay).collect();
        report.undecided(What::Overlay, &names.join(", "), error.message);
        return Ok(false);
    }
    for found in found.iter().filter(|found| found.file.is_some()) {
        let why = match journal.may_have_switched() {
            true => "what the guest wrote last is in the image below, which the domain is on again",
            false => "it had no data, and is removed",
        };
        report.undone(What::Overlay, &found.noted.overlay, why);
    }
    Ok(true)
}
