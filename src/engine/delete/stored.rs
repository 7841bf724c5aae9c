// SPDX-License-Identifier: LGPL-2.1-or-later

//! Deletes a snapshot without children that the library records itself: merges what the guest has
//! written since into the images below, and removes the snapshot's files.
//!
//! From the first merge on the snapshot cannot be reverted to, because its images receive newer
//! data. So its memory image is renamed to `….deleting` before the first merge. The record is
//! removed last: until then, a delete that failed, or whose caller was killed, can be repeated from
//! the beginning, and skips what was done.
//!
//! A record can be wrong, or be edited to have another file removed. So a file that it names is
//! removed only if it is proven to be the snapshot's: a memory image by its magic, an overlay by
//! its backing file, a copy of UEFI variables by its name and content. If a file is not the
//! snapshot's, nothing is deleted or changed.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use serde_json::json;

use super::stored_plan::{self, Action, Image, Situation};
use crate::backend::images::{self, Id, id};
use crate::backend::locks;
use crate::backend::qmp::drives;
use crate::backend::qmp::jobs::{self, Merge, NODE_PREFIX, Until};
use crate::backend::{Connector, DEFAULT_TIMEOUT, Guest};
use crate::deadline::Deadline;
use crate::engine::page_server::arrival::check_arrived;
use crate::engine::revert::map::check_unmapped;
use crate::error::{Error, Result, fail};
use crate::image::{deleting, is_another, pages_file_of, remove_pages_file};
use crate::model::flags::DeleteFlags;
use crate::model::nvram::Found;
use crate::model::{Drive, Record, RecordedDisk, Store};
use crate::monitor::Command;
use crate::sys;

/// `instantsnap_snapshot_delete`.
pub fn delete(
    connector: &dyn Connector,
    store: &Store,
    name: &str,
    flags: DeleteFlags,
) -> Result<()> {
    // The guest is held first, so that no other operation makes a child of the snapshot.
    let files_stay = flags.is_metadata_only() || flags.is_children_only();
    let guest = if files_stay { None } else { Some(connector.begin()?) };
    let record = store.read_to_use(name)?;
    let listed = store.list()?;
    let child =
        listed.iter().find(|other| other.name != name && other.parent.as_deref() == Some(name));
    if let Some(child) = child.filter(|_| flags != DeleteFlags::METADATA_ONLY) {
        fail!(
            OperationUnsupported,
            "snapshot '{name}' has children ('{}'): deleting such a one is not supported for this \
             guest yet; delete them first, the youngest before the others",
            child.name
        );
    }
    match guest {
        Some(mut guest) => {
            let memory = Path::new(&record.memory_file);
            let deleted = check_unmapped(store, name, [memory, &deleting(memory)])
                .and_then(|()| store.others(name))
                .and_then(|others| Ok((images_of(&others)?, others)))
                .and_then(|(kept, others)| {
                    Delete { guest: &mut *guest, record: &record, others, kept }.run()
                });
            let named = |error: Error| {
                Error::new(
                    error.code,
                    format!("cannot delete snapshot '{name}': {}", error.message),
                )
            };
            deleted.map_err(named)?;
            store.forget(name)
        }
        None if flags.is_children_only() => Ok(()),
        None => store.forget(name),
    }
}

/// The images of snapshots, and all images below them, each with the name of the youngest snapshot
/// that needs it.
fn images_of(records: &[Record]) -> Result<BTreeMap<Id, String>> {
    let mut images = BTreeMap::new();
    // From the youngest on: its chain mostly has the images of the others.
    for record in records.iter().rev() {
        for disk in record.disks.iter().filter(|disk| Path::new(&disk.image).exists()) {
            if !images.contains_key(&id(&disk.image)) {
                for images::Layer { path: image, .. } in images::chain(&disk.image, &disk.format)? {
                    images.entry(id(&image)).or_insert_with(|| record.name.clone());
                }
            }
        }
    }
    Ok(images)
}

struct Delete<'a> {
    guest: &'a mut dyn Guest,
    record: &'a Record,
    others: Vec<Record>,
    /// Images that other snapshots need.
    kept: BTreeMap<Id, String>,
}

/// Gives each image one name, even if its file has several (hard links, mounts).
#[derive(Default)]
struct Names(BTreeMap<(u64, u64), Id>);

impl Names {
    fn id(&mut self, path: &str) -> Id {
        match Path::new(path).metadata() {
            Ok(file) => {
                // A device can have several nodes, of which each is an inode.
                let is_device = file.file_type().is_block_device();
                let inode = (file.dev(), file.ino());
                let key = if is_device { (u64::MAX, file.rdev()) } else { inode };
                self.0.entry(key).or_insert_with(|| id(path)).clone()
            }
            Err(_) => id(path),
        }
    }
}

/// The merge of one disk.
struct Job<'a> {
    id: String,
    disk: &'a RecordedDisk,
    /// The nodes of the overlay and of the image below.
    overlay: String,
    image: String,
    merge: Merge,
}

impl<'a> Delete<'a> {
    fn run(&mut self) -> Result<()> {
        let status = self.guest.status()?.status;
        if status == "inmigrate" {
            fail!(OperationInvalid, "QEMU waits for a snapshot: load it first, or end it");
        }
        check_arrived(self.guest)?;
        let left_over = jobs::left_over(self.guest)?;
        jobs::give_up(self.guest, &left_over)?;
        self.check_no_jobs()?;
        let drives = self.guest.drives()?;
        let actions = self.situation(&drives)?.plan()?;
        let disks: Vec<_> = self.record.disks.iter().zip(actions).collect();
        let mut merges = self.prepare(&disks, &drives)?;
        self.check_files()?;
        self.hide_memory_image()?;
        self.merge(&mut merges)?;
        let removed = disks.iter().filter(|(_, action)| *action != Action::Keep);
        self.remove_files(removed.map(|(disk, _)| &*disk.overlay)).map_err(|error| {
            error.and(
                "the guest runs on without the snapshot's overlays: delete the snapshot again when \
                 the cause is fixed",
            )
        })
    }

    /// Checks that the files to be removed are those that the record describes.
    fn check_files(&self) -> Result<()> {
        let memory = Path::new(&self.record.memory_file);
        for file in [memory, &deleting(memory)] {
            if locks::is_in_use(file) {
                fail!(
                    OperationInvalid,
                    "memory image '{}' is being read: the memory of a guest that was reverted to \
                     the snapshot is still coming from it. Wait until all of it is in \
                     (instantsnap_memory_wait), or end that guest",
                    file.display()
                );
            }
            if is_another(file) {
                return self.refuse("memory image", file, "is no memory image");
            }
            let is_its = |other: &&Record| sys::same_file(Path::new(&other.memory_file), file);
            if let Some(other) = self.others.iter().find(is_its) {
                return self.refuse(
                    "memory image",
                    file,
                    &format!("is also that of snapshot '{}'", other.name),
                );
            }
        }
        for nvram in &self.record.nvram {
            let found = nvram.compare(&self.record.memory_file).map_err(|error| {
                Error::system(
                    format!("cannot look at the copy of UEFI variables '{}'", nvram.copy),
                    error,
                )
            })?;
            if found == Found::Another {
                return self.refuse(
                    "copy of UEFI variables",
                    Path::new(&nvram.copy),
                    "is not the one that was made",
                );
            }
        }
        for disk in &self.record.disks {
            let overlay = Path::new(&disk.overlay);
            // An overlay that stays needs no proof.
            if !is_there(&disk.overlay) || self.kept.contains_key(&id(&disk.overlay)) {
                continue;
            }
            let layers = images::chain(&disk.overlay, "qcow2")?;
            if !layers.get(1).is_some_and(|below| same(&below.path, &disk.image)) {
                let what = format!("overlay of disk '{}'", disk.name);
                return self.refuse(
                    &what,
                    overlay,
                    &format!("does not stand on its image '{}'", disk.image),
                );
            }
        }
        Ok(())
    }

    fn refuse(&self, what: &str, file: &Path, reason: &str) -> Result<()> {
        fail!(
            InvalidDomainSnapshot,
            "the {what} that its metadata names ('{}') {reason}: correct the metadata, or \
             delete only the metadata (VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY) and remove the \
             rest of the snapshot yourself",
            file.display()
        )
    }

    /// Collects the facts that the plan is made from.
    fn situation<'s>(&'s self, drives: &'s [Drive]) -> Result<Situation<'s>> {
        let mut names = Names::default();
        let mut disks = Vec::new();
        for RecordedDisk { name, overlay, image, .. } in &self.record.disks {
            // An overlay that cannot be read has no known images below; the steps read it again if
            // they need it.
            let is_there = is_there(overlay);
            let layers = match is_there {
                true => images::chain(overlay, "qcow2").unwrap_or_default(),
                false => Vec::new(),
            };
            disks.push(stored_plan::Disk {
                name,
                overlay: Image { path: overlay, id: names.id(overlay) },
                image: Image { path: image, id: names.id(image) },
                is_there,
                below: layers.iter().skip(1).map(|layer| names.id(&layer.path)).collect(),
            });
        }
        let drives = drives.iter().map(|drive| stored_plan::Drive {
            names: &drive.names,
            file: &drive.file,
            layers: [&drive.file]
                .into_iter()
                .chain(&drive.backing)
                .map(|file| names.id(file))
                .collect(),
            unsupported_reason: drive.unsupported_reason.as_deref(),
        });
        let drives = drives.collect();
        let kept = self.kept.iter().map(|(image, other)| {
            (image.to_str().map_or_else(|| image.clone(), |image| names.id(image)), other.clone())
        });
        let kept = kept.collect();
        let all = self.others.iter().chain([self.record]).flat_map(|record| &record.disks);
        let frozen = all.map(|disk| names.id(&disk.image)).collect();
        Ok(Situation { disks, drives, kept, frozen })
    }

    /// Prepares the merges. This finds the reasons for a refusal that only QEMU and the kernel
    /// know. It changes nothing, except that it closes overlays that no disk is on.
    fn prepare(
        &mut self,
        disks: &[(&'a RecordedDisk, Action)],
        drives: &[Drive],
    ) -> Result<Vec<Job<'a>>> {
        let mut merges = Vec::new();
        for (disk, action) in disks {
            match action {
                Action::Merge(drive) => {
                    merges.push(self.prepare_merge(&drives[*drive], disk, merges.len())?);
                }
                Action::Remove => {
                    self.close(&disk.overlay)?;
                    check_unused(&disk.overlay)?;
                }
                Action::Keep => {}
            }
        }
        Ok(merges)
    }

    fn prepare_merge(
        &mut self,
        drive: &Drive,
        disk: &'a RecordedDisk,
        index: usize,
    ) -> Result<Job<'a>> {
        let (name, overlay, image) = (drive.name(), &disk.overlay, &disk.image);
        let pid = self.guest.pid();
        // QEMU itself would notice it too, but only after the merges of earlier disks have begun.
        let open =
            |file: &&String| pid.is_some_and(|pid| locks::is_in_use_besides(Path::new(file), pid));
        if let Some(file) = [image, overlay].into_iter().find(open) {
            fail!(
                OperationInvalid,
                "another QEMU has '{file}' of disk '{name}' open (it holds a lock on it), and it \
                 would be changed or removed: end that guest first; nothing was changed"
            );
        }
        let nodes = drives::nodes(self.guest, pid, false)?;
        let on_image = |protocol| {
            nodes.iter().filter(move |node| node.protocol == protocol && same(&node.file, image))
        };
        // The node of the format is preferred to that of the file.
        let mut found =
            if on_image(false).next().is_some() { on_image(false) } else { on_image(true) };
        let (Some(node), None) = (found.next(), found.next()) else {
            fail!(
                ConfigUnsupported,
                "QEMU does not have the image '{image}' of disk '{name}' open once, and once only"
            );
        };
        Ok(Job {
            id: format!("{NODE_PREFIX}delete-{index}"),
            disk,
            overlay: drive.node.clone(),
            image: node.name.clone(),
            merge: Merge::Not,
        })
    }

    /// Refuses a guest with block jobs of other clients. Such a job can hide a disk's images, use
    /// them, or change the disk's chain meanwhile, and QEMU does not tell which disk it is for.
    fn check_no_jobs(&mut self) -> Result<()> {
        let command = Command::new("query-block-jobs", json!({}));
        let others = self.guest.run(
            "cannot ask for block jobs",
            command,
            Deadline::after(DEFAULT_TIMEOUT),
        )?;
        if let Some(job) = others.as_array().and_then(|jobs| jobs.first()) {
            let text = |what: &str| job[what].as_str().unwrap_or_default().to_owned();
            fail!(
                OperationInvalid,
                "block job '{}' ({}) is under way: wait for it, or cancel it",
                text("device"),
                text("type")
            );
        }
        Ok(())
    }

    /// Renames the memory image, so that no caller reverts to the snapshot from now on.
    fn hide_memory_image(&self) -> Result<()> {
        let memory = Path::new(&self.record.memory_file);
        let failed = |error| {
            Error::system(format!("cannot rename its memory image '{}'", memory.display()), error)
        };
        match std::fs::rename(memory, deleting(memory)) {
            // It does not exist, or was renamed before.
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        if deleting(memory).exists() {
            // A power cut must not bring the old name back once images are being merged.
            sys::sync_parent(memory).map_err(|error| {
                self.restore_memory_image();
                failed(error)
            })?;
        }
        Ok(())
    }

    fn restore_memory_image(&self) {
        let memory = Path::new(&self.record.memory_file);
        let _ = std::fs::rename(deleting(memory), memory);
    }

    /// Merges all disks. None is completed before all can be completed.
    fn merge(&mut self, merges: &mut [Job]) -> Result<()> {
        let step = "cannot merge its overlays into their images";
        let mut ids = Vec::new();
        for job in merges.iter() {
            let started = jobs::start_merge(self.guest, step, &job.id, &job.overlay, &job.image);
            if let Err(error) = started {
                // A merge that QEMU refuses has written nothing. A merge that was not answered may
                // have begun.
                if ids.is_empty() && jobs::left_over(self.guest).is_ok_and(|jobs| jobs.is_empty()) {
                    self.restore_memory_image();
                    return Err(error.and("nothing was changed"));
                }
                return Err(self.give_up(merges, error));
            }
            ids.push(job.id.clone());
        }
        let monitor = &mut *self.guest;
        let named = |error: Error| Error::new(error.code, format!("{step}: {}", error.message));
        if let Err(error) = jobs::wait(monitor, &ids, Until::Ready, |_, _| ()) {
            return Err(self.give_up(merges, named(error)));
        }
        let completed = jobs::wait(monitor, &ids, Until::Completed, |id, merge| {
            merges.iter_mut().filter(|job| job.id == id).for_each(|job| job.merge = merge);
        });
        completed.map_err(|error| self.with_state(merges, named(error)))
    }

    /// Cancels the merges that were begun. `error` is the reason.
    fn give_up(&mut self, merges: &[Job], error: Error) -> Error {
        let monitor = &mut *self.guest;
        let ended = jobs::left_over(monitor).and_then(|begun| jobs::give_up(monitor, &begun));
        let error = match ended {
            Ok(()) => error,
            Err(cancel_error) => error.and(cancel_error.message),
        };
        self.with_state(merges, error)
    }

    /// Adds to the error which image each disk is on after a merge that failed.
    fn with_state(&self, merges: &[Job], error: Error) -> Error {
        let place = |job: &Job| match job.merge {
            Merge::Not => format!("disk '{}' is on '{}'", job.disk.name, job.disk.overlay),
            Merge::Completing => {
                format!(
                    "disk '{}' is on '{}' or '{}'",
                    job.disk.name, job.disk.overlay, job.disk.image
                )
            }
            Merge::Done => format!("disk '{}' is on '{}'", job.disk.name, job.disk.image),
        };
        let places: Vec<String> = merges.iter().map(place).collect();
        error.and(format!(
            "the guest has lost nothing ({}), but the snapshot cannot be reverted to any more: \
             delete it again when the cause is fixed",
            places.join(", ")
        ))
    }

    /// Removes these overlays, and the snapshot's other files, except for the record.
    fn remove_files<'o>(&mut self, overlays: impl Iterator<Item = &'o str>) -> Result<()> {
        for overlay in overlays.filter(|overlay| is_there(overlay)) {
            self.close(overlay)?;
            if let Some(drive) =
                self.guest.drives()?.iter().find(|drive| is_in_chain(drive, overlay))
            {
                fail!(
                    OperationFailed,
                    "disk '{}' still needs the overlay '{overlay}'",
                    drive.name()
                );
            }
            check_unused(overlay)?;
            images::remove(Path::new(overlay))
                .map_err(|error| Error::system(format!("cannot remove '{overlay}'"), error))?;
        }
        for nvram in &self.record.nvram {
            remove(&nvram.copy)?;
        }
        let memory = Path::new(&self.record.memory_file);
        remove_pages_file(memory).map_err(|error| {
            Error::system(format!("cannot remove '{}'", pages_file_of(memory).display()), error)
        })?;
        [deleting(memory).as_path(), memory].into_iter().try_for_each(remove)
    }

    /// Removes the nodes of an overlay that no disk is on any more.
    fn close(&mut self, overlay: &str) -> Result<()> {
        let pid = self.guest.pid();
        let mut nodes = drives::nodes(self.guest, pid, false)?;
        // QEMU removes its own nodes by itself. The format's node is removed first, because it uses
        // the file's node.
        nodes.retain(|node| same(&node.file, overlay) && !node.name.starts_with('#'));
        nodes.sort_by_key(|node| node.protocol);
        for node in nodes {
            let command = Command::new("blockdev-del", json!({ "node-name": node.name }));
            self.guest.run(
                &format!("cannot close the overlay '{overlay}'"),
                command,
                Deadline::after(DEFAULT_TIMEOUT),
            )?;
        }
        Ok(())
    }
}

fn same(a: &str, b: &str) -> bool {
    a == b || sys::same_file(Path::new(a), Path::new(b))
}

fn is_there(overlay: &str) -> bool {
    images::is_there(overlay, "qcow2")
}

fn is_in_chain(drive: &Drive, image: &str) -> bool {
    same(&drive.file, image) || drive.backing.iter().any(|below| same(below, image))
}

/// Refuses a file that a QEMU has open.
fn check_unused(overlay: &str) -> Result<()> {
    // A file that cannot be opened may be in use.
    sys::open_file(Path::new(overlay))
        .map_err(|error| Error::system(format!("cannot open '{overlay}'"), error))?;
    if locks::is_in_use(Path::new(overlay)) {
        fail!(
            OperationInvalid,
            "the snapshot's overlay '{overlay}' is in use, and not by a disk of this guest: delete \
             the snapshot through the guest that is on it, or end that one first"
        );
    }
    Ok(())
}

fn remove(path: impl AsRef<Path>) -> Result<()> {
    let path = path.as_ref();
    sys::remove_file(path)
        .map_err(|error| Error::system(format!("cannot remove '{}'", path.display()), error))
}
