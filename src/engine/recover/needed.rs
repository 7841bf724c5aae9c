// SPDX-License-Identifier: LGPL-2.1-or-later

//! Who else needs the images that an undo would change or remove: other snapshots of the state
//! directory, other interrupted ones, and any image in the same directory, made by whomever.

use std::collections::BTreeSet;
use std::fs::Metadata;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::backend::images;
use crate::error::Result;
use crate::model::Store;
use crate::model::journal::{NotedOverlay, ReadJournal};

/// An image, whichever of its names is used.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Id {
    Inode(u64, u64),
    Device(u64),
    Name(String),
}

impl Id {
    fn of(path: &str) -> Id {
        let of_file = |found: Metadata| match found.file_type().is_block_device() {
            true => Id::Device(found.rdev()),
            false => Id::Inode(found.dev(), found.ino()),
        };
        Path::new(path).metadata().map_or_else(|_| Id::Name(path.into()), of_file)
    }
}

/// An image of another owner, with those below it.
#[derive(Debug)]
struct Other {
    /// Who needs it, for a message.
    owner: String,
    id: Id,
    below: BTreeSet<Id>,
    /// It is needed as it is, and not only as one that must not lose what is below it.
    is_frozen: bool,
}

/// The images of others.
#[derive(Debug)]
pub struct Others(Vec<Other>);

impl Others {
    /// Looks for the images of all others than the snapshot of this journal.
    pub fn find(store: &Store, journal: &ReadJournal) -> Result<Others> {
        let own: BTreeSet<Id> =
            journal.intent.planned.overlays.iter().map(|own| Id::of(&own.overlay)).collect();
        let mut others = Vec::new();
        let mut add = |path: &str, owner: String, is_frozen| {
            let id = Id::of(path);
            if !own.contains(&id) {
                others.push(Other { owner, id, below: below(path), is_frozen });
            }
        };
        for record in store.others(&journal.intent.snapshot)? {
            for disk in &record.disks {
                add(&disk.image, format!("the snapshot '{}'", record.name), true);
                let owner = format!("the overlay '{}' of snapshot '{}'", disk.overlay, record.name);
                add(&disk.overlay, owner, false);
            }
        }
        for name in store.journals()? {
            let Ok(Some(Ok(other))) = store.read_journal(&name) else { continue };
            for overlay in
                other.intent.planned.overlays.iter().filter(|_| name != journal.intent.snapshot)
            {
                let NotedOverlay { overlay, .. } = overlay;
                add(
                    overlay,
                    format!("the overlay '{overlay}' of the unfinished snapshot '{name}'"),
                    false,
                );
            }
        }
        for path in directories(journal).iter().flat_map(|directory| files_in(directory)) {
            add(&path, format!("the image '{path}'"), false);
        }
        Ok(Others(others))
    }

    /// Who needs this image as it is, or has an image that stands on it.
    pub fn need(&self, image: &str) -> Option<&str> {
        let id = Id::of(image);
        let needs = |other: &&Other| other.below.contains(&id) || other.is_frozen && other.id == id;
        self.0.iter().find(needs).map(|other| &*other.owner)
    }
}

/// The directories of the journal's images.
fn directories(journal: &ReadJournal) -> BTreeSet<PathBuf> {
    let overlays = journal.intent.planned.overlays.iter();
    let files = overlays.flat_map(|overlay| [&overlay.overlay, &overlay.image]);
    // A link leads to the directory of the file itself.
    let real = |file: &String| Path::new(file).canonicalize().unwrap_or_else(|_| file.into());
    files
        .flat_map(|file| [PathBuf::from(file), real(file)])
        .filter_map(|file| file.parent().filter(|parent| parent.is_absolute()).map(Path::to_owned))
        // Nobody keeps images among the device nodes.
        .filter(|directory| !directory.starts_with("/dev"))
        .collect()
}

fn files_in(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.path().to_str().map(str::to_owned)).collect()
}

/// The images below an image, by the headers of qcow2.
fn below(path: &str) -> BTreeSet<Id> {
    let mut found = BTreeSet::new();
    let mut pending = images::files_below(path);
    while let Some(path) = pending.pop() {
        if found.insert(Id::of(&path)) {
            pending.extend(images::files_below(&path));
        }
    }
    found
}
