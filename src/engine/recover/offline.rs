// SPDX-License-Identifier: LGPL-2.1-or-later

//! Undoes an interrupted snapshot whose QEMU has ended.
//!
//! If an overlay has data, the guest wrote it after the switch, and it is merged into the image
//! below by qemu-img. Before that it must be proved that no other process has written to that image
//! since, and that nobody needs the overlay or that image: a merge into an image that a guest was
//! started on again would destroy it.
//!
//! The journal says which merges were begun and done. A merge that was begun is repeated: it writes
//! the whole overlay once more, whatever a part of an earlier merge has written.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::files;
use super::needed::Others;
use super::note::{note, note_undo};
use super::report::{Report, What};
use crate::backend::images::{self, Header};
use crate::backend::overlay_file::{self, OverlayFile};
use crate::error::{Error, Result};
use crate::model::Store;
use crate::model::journal::{JournalFile, Line, NotedFile, NotedOverlay, ReadJournal};
use crate::procfs;
use crate::sys;

/// An overlay of a QEMU that has ended.
struct Left {
    noted: NotedOverlay,
    file: OverlayFile,
    /// The guest has written to it, and that is not merged yet.
    has_data: bool,
}

impl Left {
    /// Opens it. `None` if another file, or none, is at its path by now.
    fn open(noted: NotedOverlay, file: &NotedFile, journal: &ReadJournal) -> Result<Option<Left>> {
        let step =
            |error| Error::system(format!("cannot open the overlay '{}'", noted.overlay), error);
        let Some(file) = OverlayFile::reopen(&file.known, noted.is_reused).map_err(step)? else {
            return Ok(None);
        };
        let has_data = has_data(&noted, file.file(), journal)?;
        Ok(Some(Left { noted, file, has_data }))
    }
}

/// Whether the guest has written to an overlay, and that is not merged yet.
pub fn has_data(noted: &NotedOverlay, file: &File, journal: &ReadJournal) -> Result<bool> {
    if journal.has_merged(&noted.overlay) {
        return Ok(false);
    }
    // An overlay that was being made may have no header yet.
    if !journal.may_have_switched() {
        return Ok(!images::is_surely_empty(file) && Header::read(file).is_some());
    }
    images::has_data(file).map_err(|error| {
        let step = format!(
            "the guest may have written to the overlay '{}', which cannot be read: repair it, or \
             make its storage available",
            noted.overlay
        );
        Error::system(step, error)
    })
}

/// Undoes the snapshot. Returns whether its overlays are gone.
pub fn undo(
    store: &Store,
    journal: &ReadJournal,
    file: &mut JournalFile,
    report: &mut Report,
) -> Result<bool> {
    if journal.intent.planned.by_driver && journal.may_have_switched() {
        return Ok(leave_to_driver(store, journal, report));
    }
    let overlays = files::overlays(journal, report);
    // The guest may have written to them. If one is missing or not known, its storage may not be
    // there yet.
    let unknown: Vec<_> = overlays
        .iter()
        .filter(|(noted, file)| {
            journal.may_have_switched() && file.is_none() && !journal.has_merged(&noted.overlay)
        })
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
        return Ok(false);
    }
    let mut all = Vec::new();
    for (noted, file) in overlays {
        let Some(file) = file else { continue };
        all.extend(Left::open(noted, &file, journal)?);
    }
    let others = Others::find(store, journal)?;
    let mut undecided = false;
    for left in &all {
        if let Some(why) = why_not(left, journal, &others) {
            report.undecided(What::Overlay, &left.noted.overlay, why);
            undecided = true;
        }
    }
    // Each disk is as it was at the guest's end, or none is changed.
    if undecided {
        return Ok(false);
    }
    note_undo(journal, file)?;
    for left in all.iter().filter(|left| left.has_data) {
        if let Err(why) = merge(left, journal, file)? {
            report.undecided(What::Overlay, &left.noted.overlay, why);
            return Ok(false);
        }
    }
    for left in &all {
        let overlay = &left.noted.overlay;
        if let Some(why) = overlay_in_use(left) {
            report.undecided(What::Overlay, overlay, why);
            continue;
        }
        match left.file.discard() {
            Ok(()) => report.undone(
                What::Overlay,
                overlay,
                match left.has_data || journal.has_merged(overlay) {
                    true => {
                        "what the guest wrote last is in the image below, and the overlay is \
                             removed"
                    }
                    false => "it had no data, and is removed",
                },
            ),
            Err(error) => report.undecided(
                What::Overlay,
                overlay,
                format!("it has no data any more, and cannot be removed: {error}"),
            ),
        }
    }
    Ok(true)
}

/// A driver's record of the disks names the overlays since the switch, and only the driver can
/// change that: an overlay that was merged and removed would be missed at the guest's next start.
fn leave_to_driver(store: &Store, journal: &ReadJournal, report: &mut Report) -> bool {
    let path = store.journal_path(&journal.intent.snapshot);
    for NotedOverlay { overlay, image, .. } in &journal.intent.planned.overlays {
        let why = format!(
            "a driver's record of the guest's disks may name it, so it was neither merged nor \
             removed: if the driver names '{image}' for the disk, or can be made to, run `qemu-img \
             commit {overlay}` before the guest is started, have the driver name '{image}', and \
             remove the overlay; else let the guest go on with the overlay; at last remove the \
             journal '{}'",
            path.display()
        );
        report.undecided(What::Overlay, overlay, why);
    }
    journal.intent.planned.overlays.is_empty()
}

/// Merges an overlay, unless another process has begun to use it or the image below. The inner
/// error is why it was not merged.
fn merge(
    left: &Left,
    journal: &ReadJournal,
    file: &mut JournalFile,
) -> Result<std::result::Result<(), String>> {
    let NotedOverlay { overlay, image, format, .. } = &left.noted;
    // The merge of another disk can have taken long.
    if let Some(why) = overlay_in_use(left) {
        return Ok(Err(why));
    }
    if let Err(why) = image_since(left, journal) {
        return Ok(Err(format!("'{image}' {why}; {}", by_hand(&left.noted))));
    }
    note(file, &Line::merging(vec![overlay.clone()]))?;
    if let Err(error) = overlay_file::commit(left.file.file(), image, format) {
        return Ok(Err(format!(
            "what the guest wrote last is in it, and could not be merged into '{image}' ({}): run \
             `qemu-img commit` on it before the guest is started",
            error.message
        )));
    }
    note(file, &Line::Merged { overlays: vec![overlay.clone()] })?;
    Ok(Ok(()))
}

fn overlay_in_use(left: &Left) -> Option<String> {
    sys::is_locked(left.file.file(), sys::IMAGE_LOCKS).then(|| {
        format!(
            "a QEMU has it open: if that is this guest, started again, it needs the overlay; merge \
             it into '{}' by a block job, or keep it",
            left.noted.image
        )
    })
}

fn by_hand(noted: &NotedOverlay) -> String {
    let NotedOverlay { overlay, image, .. } = noted;
    format!(
        "what the guest wrote last may be in it: if the image '{image}' was not used since, run \
         `qemu-img commit {overlay}` and remove it"
    )
}

/// Why the overlay of a domain that has ended can neither be merged nor removed; `None` if it can.
/// `frozen` are the images that the domain's other snapshots need as they are.
pub fn why_left(
    noted: &NotedOverlay,
    file: &NotedFile,
    journal: &ReadJournal,
    others: &Others,
    frozen: &[String],
) -> Result<Option<String>> {
    let Some(left) = Left::open(noted.clone(), file, journal)? else { return Ok(None) };
    let is_frozen =
        |path: &str| frozen.iter().any(|frozen| sys::same_file(Path::new(frozen), Path::new(path)));
    if is_frozen(&noted.overlay) || left.has_data && is_frozen(&noted.image) {
        return Ok(Some("another snapshot of the domain needs it, or the image below".into()));
    }
    Ok(why_not(&left, journal, others))
}

/// Why an overlay can neither be merged nor removed; `None` if it can.
fn why_not(left: &Left, journal: &ReadJournal, others: &Others) -> Option<String> {
    let Left { noted, file, has_data } = left;
    let NotedOverlay { overlay, image, .. } = noted;
    if let Some(why) = overlay_in_use(left) {
        return Some(why);
    }
    if let Some(other) = others.need(overlay) {
        return Some(format!("{other} stands on it, or needs it as it is"));
    }
    if !has_data {
        return None;
    }
    if let Some(other) = others.need(image) {
        return Some(format!(
            "it has what the guest wrote last, and cannot be merged into '{image}', because \
             {other} stands on that image, or needs it as it is: keep the overlay and start the \
             guest on it, or merge it when the other does not need '{image}' any more"
        ));
    }
    let backing = Header::read(file.file()).and_then(|header| header.backing);
    let is_on_image = backing.is_some_and(|backing| {
        images::id(&images::resolve(overlay, &backing)) == images::id(image)
    });
    if !is_on_image {
        return Some(format!("it does not stand on '{image}' any more; {}", by_hand(noted)));
    }
    let since = image_since(left, journal);
    since.err().map(|why| format!("'{image}' {why}; {}", by_hand(noted)))
}

/// Proves that the image below the overlay was not written since the switch, but by a merge of the
/// overlay; else the reason.
fn image_since(left: &Left, journal: &ReadJournal) -> std::result::Result<(), String> {
    let NotedOverlay { overlay, image, .. } = &left.noted;
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
    let image_written = written(found.modified())?;
    // Under libvirt, a merge that is noted can have been refused: the domain was saved.
    let is_certain = journal.intent.planned.domain.is_none();
    match journal.has_begun_merging(overlay).filter(|_| is_certain) {
        // The merge can have ended after all, and a guest can have run on the image since.
        Some(_) if journal.is_long_before(Path::new(image)) => {
            Err("was written long after its merge began".into())
        }
        Some(true) => Ok(()),
        Some(false) if is_before_boot(image_written) => Ok(()),
        Some(false) => Err("was half merged, and written since the host was started".into()),
        None => {
            let overlay = left.file.file().metadata().and_then(|found| found.modified());
            if image_written > written(overlay)? {
                return Err("was written later than the overlay".into());
            }
            Ok(())
        }
    }
}

fn is_before_boot(time: SystemTime) -> bool {
    procfs::boot_time().is_some_and(|boot| time <= UNIX_EPOCH + Duration::from_secs(boot))
}
