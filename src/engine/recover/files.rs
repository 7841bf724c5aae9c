// SPDX-License-Identifier: LGPL-2.1-or-later

//! The files that an interrupted snapshot has left.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::report::{Report, What};
use crate::backend::images::Header;
use crate::image;
use crate::model::journal::{NotedFile, NotedOverlay, Presence, ReadJournal};
use crate::own_file::OwnFile;
use crate::sys;

/// Finds the overlays that the snapshot has made, with their files. Reports those whose place
/// another file has taken.
pub fn overlays(
    journal: &ReadJournal,
    report: &mut Report,
) -> Vec<(NotedOverlay, Option<NotedFile>)> {
    let mut found = Vec::new();
    for overlay in &journal.intent.planned.overlays {
        let (presence, file) = find(journal, overlay);
        if presence == Presence::Another && !overlay.is_reused {
            report.left(What::Overlay, &overlay.overlay, "it is not known to be the snapshot's");
        }
        found.push((overlay.clone(), file));
    }
    found
}

/// Finds an overlay. A file that the snapshot made was noted by its path as it was given, and one
/// that existed before by its path without links.
fn find(journal: &ReadJournal, overlay: &NotedOverlay) -> (Presence, Option<NotedFile>) {
    let given = Path::new(&overlay.overlay);
    let path = given.canonicalize().unwrap_or_else(|_| given.into());
    match journal.find(given, || false) {
        (Presence::Same, file) => (Presence::Same, file),
        _ => journal.find(&path, || is_new_overlay(&path, &overlay.image)),
    }
}

/// Whether a file can be an overlay that was being made: empty, or without data.
fn is_new_overlay(path: &Path, image: &str) -> bool {
    let Ok(file) = sys::open_file(path) else { return false };
    let is_on_image =
        |header: &Header| header.backing.as_deref().is_none_or(|backing| backing == image);
    match Header::read(&file) {
        Some(header) => is_on_image(&header) && header.is_empty(&file).unwrap_or(false),
        // The file is zeros until QEMU writes the header.
        None => is_zero(file),
    }
}

fn is_zero(file: File) -> bool {
    let mut head = [0; 4096];
    let mut file = file.take(head.len() as u64);
    let read = file.read(&mut head).unwrap_or(0);
    head[..read].iter().all(|byte| *byte == 0)
}

/// Removes the memory image and the copies of UEFI variables.
pub fn remove(journal: &ReadJournal, report: &mut Report) {
    let memory = (What::Memory, journal.intent.planned.memory.clone());
    let copies = journal.intent.planned.copies.iter().map(|copy| (What::Firmware, copy.into()));
    for (what, path) in copies.chain([memory]) {
        let is_plausible = || what == What::Memory && is_partial_image(&path);
        let (presence, file) = journal.find(&path, is_plausible);
        let object = path.to_string_lossy();
        let removed = || OwnFile::reopen_to_remove(&file?.known).ok()??.remove().ok();
        match presence {
            Presence::Gone => {}
            Presence::Same if removed().is_some() => {
                report.undone(what, &object, "it was incomplete, and is removed");
            }
            Presence::Same => report.undecided(what, &object, "it cannot be removed"),
            Presence::Another => report.left(what, &object, "it is not known to be the snapshot's"),
        }
    }
    // The file of notes goes with the image.
    let pages = image::pages_file_of(&journal.intent.planned.memory);
    if let (Presence::Same, Some(file)) = journal.find(&pages, || image::is_pages_file(&pages)) {
        let removed = OwnFile::reopen_to_remove(&file.known)
            .and_then(|own| own.map_or(Ok(()), |own| own.remove()));
        if removed.is_err() {
            let why = "it cannot be removed, and nothing needs it";
            report.left(What::Memory, &pages.to_string_lossy(), why);
        }
    }
}

fn is_partial_image(path: &Path) -> bool {
    path.metadata().is_ok_and(|found| found.len() == 0) || image::is_partial(path)
}
