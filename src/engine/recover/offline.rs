// SPDX-License-Identifier: LGPL-2.1-or-later

//! Undoes an interrupted snapshot whose QEMU has ended.
//!
//! If an overlay has data, the guest wrote it after the switch, and it is merged into the image
//! below by qemu-img. Before that it must be proved that no other process has written to that image
//! since, and that nobody needs the overlay: a merge into an image that a guest was started on
//! again would destroy it.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::SystemTime;

use super::files;
use super::report::{Report, What};
use crate::backend::images::{self, Header};
use crate::backend::overlay_file::{self, OverlayFile};
use crate::error::{Error, Result};
use crate::model::journal::{NotedOverlay, ReadJournal};
use crate::model::{Record, Store};
use crate::sys;

/// An overlay of a QEMU that has ended.
struct Left {
    noted: NotedOverlay,
    file: OverlayFile,
    /// The guest has written to it.
    has_data: bool,
}

/// Undoes the snapshot.
pub fn undo(store: &Store, journal: &ReadJournal, report: &mut Report) -> Result<()> {
    let mut all = Vec::new();
    let overlays = files::overlays(journal, report);
    // The guest may have written to them. If one is missing or not known, its storage may not be
    // there yet.
    let unknown: Vec<_> = overlays
        .iter()
        .filter(|(_, file)| journal.may_have_switched() && file.is_none())
        .map(|(overlay, _)| overlay)
        .collect();
    for overlay in &unknown {
        let why = format!(
            "the guest may have written to it, and it is missing, or not known to be the \
             snapshot's: make its storage available, or merge it into '{}' by hand; nothing was \
             changed",
            overlay.image
        );
        report.undecided(What::Overlay, &overlay.overlay, why);
    }
    if !unknown.is_empty() {
        return Ok(());
    }
    for (noted, file) in overlays {
        let Some(file) = file else { continue };
        let step =
            |error| Error::system(format!("cannot open the overlay '{}'", noted.overlay), error);
        let Some(file) = OverlayFile::reopen(&file.known, noted.is_reused).map_err(step)? else {
            continue;
        };
        let empty = Header::read(file.file())
            .is_none_or(|header| header.is_empty(file.file()).unwrap_or(false));
        all.push(Left { noted, has_data: !empty, file });
    }
    let others = store.others(&journal.intent.snapshot)?;
    let mut undecided = false;
    for left in &all {
        if let Some(why) = why_not(left, journal, &others) {
            report.undecided(What::Overlay, &left.noted.overlay, why);
            undecided = true;
        }
    }
    // Each disk is as it was at the guest's end, or none is changed.
    if undecided {
        return Ok(());
    }
    for Left { noted, file, .. } in all.iter().filter(|left| left.has_data) {
        if let Err(error) = overlay_file::commit(file.file(), &noted.image, &noted.format) {
            report.undecided(
                What::Overlay,
                &noted.overlay,
                format!(
                    "what the guest wrote last is in it, and could not be merged into '{}' ({}): \
                     run `qemu-img commit` on it before the guest is started",
                    noted.image, error.message
                ),
            );
            return Ok(());
        }
    }
    for Left { noted, file, has_data } in &all {
        match file.discard() {
            Ok(()) => report.undone(
                What::Overlay,
                &noted.overlay,
                match has_data {
                    true => {
                        "what the guest wrote last is in the image below, and the overlay is \
                             removed"
                    }
                    false => "it had no data, and is removed",
                },
            ),
            Err(error) => report.undecided(
                What::Overlay,
                &noted.overlay,
                format!("it has no data any more, and cannot be removed: {error}"),
            ),
        }
    }
    files::remove(journal, report);
    Ok(())
}

/// Why an overlay can neither be merged nor removed; `None` if it can.
fn why_not(left: &Left, journal: &ReadJournal, others: &[Record]) -> Option<String> {
    let Left { noted, file, has_data } = left;
    let NotedOverlay { overlay, image, .. } = noted;
    if sys::is_locked(file.file(), sys::IMAGE_LOCKS) {
        return Some(format!(
            "a QEMU has it open: if that is this guest, started again, it needs the overlay; merge \
             it into '{image}' by a block job, or keep it"
        ));
    }
    let needed = |path: &String| {
        let mut images = others.iter().flat_map(|record| &record.disks).map(|disk| &disk.image);
        images.any(|needed| sys::same_file(Path::new(needed), Path::new(path)))
    };
    if needed(overlay) || files::has_image_on_it(overlay) {
        return Some("another image stands on it, or another snapshot needs it".into());
    }
    if !has_data {
        return None;
    }
    if needed(image) {
        return Some(format!("another snapshot needs '{image}' as it is"));
    }
    let by_hand = format!(
        "what the guest wrote last may be in it: if the image '{image}' was not used since, run \
         `qemu-img commit {overlay}` and remove it"
    );
    let backing = Header::read(file.file()).and_then(|header| header.backing);
    let is_on_image = backing.is_some_and(|backing| {
        images::id(&images::resolve(overlay, &backing)) == images::id(image)
    });
    if !is_on_image {
        return Some(format!("it does not stand on '{image}' any more; {by_hand}"));
    }
    match image_since(left, journal) {
        Ok(()) => None,
        Err(why) => Some(format!("'{image}' {why}; {by_hand}")),
    }
}

/// Proves that the image below the overlay was not written since the switch; else the reason.
fn image_since(left: &Left, journal: &ReadJournal) -> std::result::Result<(), String> {
    let image = &left.noted.image;
    let found = Path::new(image)
        .metadata()
        .ok()
        .filter(|found| found.is_file())
        .ok_or("is no file, so that it is not known whether it was written since")?;
    if journal.inode_of_image(image).is_some_and(|inode| inode != found.ino()) {
        return Err("was replaced by another file".into());
    }
    let locked =
        sys::open_file(Path::new(image)).map(|file| sys::is_locked(&file, sys::IMAGE_LOCKS));
    if !locked.is_ok_and(|locked| !locked) {
        return Err("is open in a QEMU".into());
    }
    let written = |time: std::io::Result<SystemTime>| time.map_err(|error| error.to_string());
    let overlay = left.file.file().metadata().and_then(|found| found.modified());
    if written(found.modified())? > written(overlay)? {
        return Err("was written later than the overlay".into());
    }
    Ok(())
}
