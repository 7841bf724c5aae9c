// SPDX-License-Identifier: LGPL-2.1-or-later

//! Finishes a snapshot that was complete when its process and its watchdog were killed.

use std::path::Path;

use super::report::{Report, What};
use crate::backend::Guest;
use crate::error::{Code, Result};
use crate::image::Image;
use crate::model::journal::{Presence, ReadJournal};
use crate::model::{Drive, Record, Reservation, Store};
use crate::sys;

/// Whether the snapshot is recorded, so that only the name of the current snapshot can be missing.
pub fn is_recorded(store: &Store, journal: &ReadJournal) -> bool {
    let memory = &journal.intent.planned.memory;
    !journal.is_undoing()
        && store
            .read(&journal.intent.snapshot)
            .is_ok_and(|recorded| Path::new(&recorded.memory_file) == memory)
}

/// Finishes the snapshot, if it is recorded already, or proved to be complete. Returns whether
/// nothing is left to undo: the snapshot was finished, or must be left as it is.
pub fn finish(
    store: &Store,
    journal: &ReadJournal,
    reservation: &Reservation,
    guest: Option<&mut dyn Guest>,
    report: &mut Report,
) -> Result<bool> {
    let name = &journal.intent.snapshot;
    let memory = &journal.intent.planned.memory;
    match store.read(name) {
        // The record could not be completed, and its removal did not reach the disk.
        Ok(recorded) if Path::new(&recorded.memory_file) == memory && journal.is_undoing() => {
            store.forget(name)?;
            report.undone(What::Snapshot, name, "it had failed, and its record is removed");
        }
        Ok(recorded) if Path::new(&recorded.memory_file) == memory => {
            // The snapshot becomes the current one after it was recorded.
            if store.current()? == recorded.parent {
                store.set_current(name)?;
            }
            report.finished(What::Snapshot, name, "it was complete and recorded");
            return Ok(true);
        }
        Ok(recorded) => {
            let why = format!(
                "'{}' is the record of a snapshot with another memory image ('{}'): move one of \
                 the two away; nothing was changed",
                store.record_path(name).display(),
                recorded.memory_file
            );
            report.undecided(What::Snapshot, name, why);
            return Ok(true);
        }
        Err(error) if error.code == Code::NoDomainSnapshot => {}
        // It may be complete: nothing of it may be removed.
        Err(error) => {
            let why = format!(
                "it seems to be recorded, and its record cannot be read ({}): repair the record, \
                 or remove it so that the snapshot is undone; nothing was changed",
                error.message
            );
            report.undecided(What::Snapshot, name, why);
            return Ok(true);
        }
    }
    let Some(record) = proved(journal) else { return Ok(false) };
    // A watchdog may have begun to undo the snapshot: then a disk is on its image again. A disk
    // that is not there was detached.
    if let Some(guest) = guest
        && is_on_image(&guest.drives()?, &record)
    {
        return Ok(false);
    }
    if !journal.intent.planned.is_recorded {
        report.finished(What::Snapshot, name, "it was complete, and was not to be recorded");
        return Ok(true);
    }
    store.commit(reservation, record)?;
    report.finished(What::Snapshot, name, "it was complete, and is recorded now");
    Ok(true)
}

/// Whether a disk of the guest is on its image, and not on the overlay or on later images above it.
fn is_on_image(drives: &[Drive], record: &Record) -> bool {
    let images: Vec<_> = drives.iter().flat_map(Drive::images).collect();
    let is_used =
        |path: &str| images.iter().any(|image| sys::same_file(Path::new(image), Path::new(path)));
    record.disks.iter().any(|disk| !is_used(&disk.overlay) && is_used(&disk.image))
}

/// The record of a snapshot that is proved to be complete.
fn proved(journal: &ReadJournal) -> Option<Record> {
    if journal.is_undoing() {
        return None;
    }
    let record = Record::parse(journal.record()?).ok()?;
    // UEFI variables are compared after the image is complete.
    if !journal.is_complete() && !record.nvram.is_empty() {
        return None;
    }
    let is_there = |path: &str| journal.find(Path::new(path), || false).0 == Presence::Same;
    let is_there = |path: &str| {
        is_there(path)
            || Path::new(path).canonicalize().is_ok_and(|path| is_there(&path.to_string_lossy()))
    };
    let memory = Image::open(&journal.intent.planned.memory).is_ok()
        && is_there(&journal.intent.planned.memory.to_string_lossy());
    // The images of a snapshot whose undo had begun were written, or their overlays removed.
    let mut disks = record.disks.iter();
    let disks = disks.all(|disk| {
        // Nothing proves that an image that is no regular file was not written.
        is_there(&disk.overlay)
            && !disk.frozen.is_empty()
            && disk.frozen.iter().all(|frozen| frozen.change().is_none())
    });
    let copies = record.nvram.iter().all(|nvram| is_there(&nvram.copy));
    (memory && disks && copies).then_some(record)
}
