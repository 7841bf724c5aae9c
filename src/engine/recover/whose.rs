// SPDX-License-Identifier: LGPL-2.1-or-later

//! Whose an interrupted snapshot is: several guests can have one state directory, for example a
//! guest and the clones of its snapshots.

use std::path::{Path, PathBuf};

use crate::backend::Guest;
use crate::error::Result;
use crate::model::journal::{NotedOverlay, ReadJournal};
use crate::model::{Drive, Record, Store};
use crate::sys;

/// An operation that is about to begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next<'a> {
    /// A snapshot of the guest.
    Create,
    /// A load of this snapshot, or a revert to it.
    Load(&'a str),
    /// The deletion of this snapshot.
    Delete(&'a str),
}

/// Whether the journal is of a snapshot of this guest, by its QEMU, its socket or its disks.
pub fn is_of(journal: &ReadJournal, guest: &mut dyn Guest) -> Result<bool> {
    let planned = &journal.intent.planned;
    // A QEMU that still runs is this guest's, or another's.
    if journal.has_qemu_ended() == Some(false)
        && let (Some(noted), Some(pid)) = (&planned.qemu, guest.pid())
    {
        return Ok(noted.pid == pid);
    }
    if planned.socket.is_some()
        && guest.socket().as_deref().and_then(Path::to_str) == planned.socket.as_deref()
    {
        return Ok(true);
    }
    let drives = guest.drives()?;
    Ok(planned.overlays.iter().any(|overlay| drives.iter().any(|drive| is_on(drive, overlay))))
}

/// Whether a drive is on the overlay, at any depth, or was started on the image below it again. A
/// clone has such an image below its own.
fn is_on(drive: &Drive, NotedOverlay { overlay, image, .. }: &NotedOverlay) -> bool {
    let same = |a: &str, b: &str| sys::same_file(Path::new(a), Path::new(b));
    same(&drive.file, image) || drive.images().iter().any(|used| same(used, overlay))
}

/// Whether the operation uses files that the interrupted snapshot has made, or stands on.
pub fn touches(store: &Store, journal: &ReadJournal, next: Next) -> bool {
    let (name, is_delete) = match next {
        // It uses those of its own guest.
        Next::Create => return false,
        Next::Load(name) => (name, false),
        Next::Delete(name) => (name, true),
    };
    if journal.intent.snapshot == name {
        return true;
    }
    // If the record cannot be read, the operation fails for that.
    let Ok(record) = store.read(name) else { return false };
    let used = files_of(&record, is_delete);
    journal.files().any(|file| used.iter().any(|used| sys::same_file(used, file)))
}

/// The files of a snapshot that a load reads, and those that a deletion changes or removes.
fn files_of(record: &Record, is_delete: bool) -> Vec<PathBuf> {
    let mut files = vec![PathBuf::from(&record.memory_file)];
    files.extend(record.nvram.iter().map(|nvram| PathBuf::from(&nvram.copy)));
    for disk in &record.disks {
        files.push(PathBuf::from(&disk.image));
        files.extend(disk.frozen.iter().map(|frozen| PathBuf::from(&frozen.file)));
        if is_delete {
            files.push(PathBuf::from(&disk.overlay));
        }
    }
    files
}
