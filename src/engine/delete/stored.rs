// SPDX-License-Identifier: LGPL-2.1-or-later

//! Deleting a snapshot without children: what the guest has written since goes into the images
//! below, and the snapshot's files go.
//!
//! From the first merge on the snapshot is spoilt, since its images take in what is younger. So its
//! memory image is renamed before, to `….deleting`, and nobody goes back to it any more. The record
//! goes last: until then a deletion that failed, or whose caller was killed, is done again from the
//! beginning, and finds done what was done.
//!
//! A record can be wrong, or be meant to have another file removed. So what it names is removed
//! only if it is proven to be what the record says: a memory image by how it begins, an overlay by
//! the image that it stands on, a copy of UEFI variables by its name and content. Where a file is
//! another, the snapshot is not deleted, and nothing is changed.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde_json::json;

use super::stored_plan::{self, Action, Image, Situation};
use crate::backend::images::{self, Id, id};
use crate::backend::locks;
use crate::backend::qmp::drives;
use crate::backend::qmp::jobs::{self, Merge, NODE_PREFIX, Until};
use crate::backend::{Connector, DEFAULT_TIMEOUT, Guest};
use crate::deadline::Deadline;
use crate::error::{Error, Result, fail};
use crate::image::{deleting, is_another};
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
    // Taken first: nobody makes the snapshot a child meanwhile.
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
            let deleted = store
                .others(name)
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

/// The images of snapshots, and all below them, with the name of the youngest that stands on each.
fn images_of(records: &[Record]) -> Result<BTreeMap<Id, String>> {
    let mut images = BTreeMap::new();
    // The youngest stand on the images of the others, mostly.
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

/// One name for each image, though a file can have several (hard links, mounts).
#[derive(Default)]
struct Names(BTreeMap<(u64, u64), Id>);

impl Names {
    fn id(&mut self, path: &str) -> Id {
        match Path::new(path).metadata() {
            Ok(file) => self.0.entry((file.dev(), file.ino())).or_insert_with(|| id(path)).clone(),
            Err(_) => id(path),
        }
    }
}

/// The merge of one disk.
struct Job<'a> {
    id: String,
    disk: &'a RecordedDisk,
    /// The node of its overlay, and the one below.
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
        let left_over = jobs::left_over(self.guest)?;
        jobs::give_up(self.guest, &left_over)?;
        self.check_no_jobs()?;
        let drives = self.guest.drives()?;
        let actions = self.situation(&drives)?.plan()?;
        let disks: Vec<_> = self.record.disks.iter().zip(actions).collect();
        let mut merges = self.prepare(&disks, &drives)?;
        self.check_files()?;
        self.disarm()?;
        self.merge(&mut merges)?;
        let removed = disks.iter().filter(|(_, action)| *action != Action::Keep);
        self.remove_files(removed.map(|(disk, _)| &*disk.overlay)).map_err(|error| {
            error.and(
                "the guest runs on without the snapshot's overlays: delete the snapshot again when \
                 the cause is fixed",
            )
        })
    }

    /// What will be removed must be what the record says that it is.
    fn check_files(&self) -> Result<()> {
        let memory = Path::new(&self.record.memory_file);
        for file in [memory, &deleting(memory)] {
            if is_another(file) {
                return self.refuse("memory image", file, "is none");
            }
            let is_its = |other: &&Record| sys::same_file(Path::new(&other.memory_file), file);
            if let Some(other) = self.others.iter().find(is_its) {
                return self.refuse(
                    "memory image",
                    file,
                    &format!("is that of snapshot '{}', too", other.name),
                );
            }
        }
        for nvram in &self.record.nvram {
            let found = nvram.look(&self.record.memory_file).map_err(|error| {
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
            // What does not go needs no proof.
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
            "the {what} that its metadata names ('{}') {reason}: mend the metadata, or delete it \
             alone (VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY) and remove what is left of the \
             snapshot yourself",
            file.display()
        )
    }

    /// What the plan is made of.
    fn situation<'s>(&'s self, drives: &'s [Drive]) -> Result<Situation<'s>> {
        let mut names = Names::default();
        let mut disks = Vec::new();
        for RecordedDisk { name, overlay, image, .. } in &self.record.disks {
            // What cannot be read is not known; the steps read it again where they rely on it.
            let layers = match is_there(overlay) {
                true => images::chain(overlay, "qcow2").unwrap_or_default(),
                false => Vec::new(),
            };
            disks.push(stored_plan::Disk {
                name,
                overlay: Image { path: overlay, id: names.id(overlay) },
                image: Image { path: image, id: names.id(image) },
                is_there: is_there(overlay),
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

    /// What is to be merged. Of all that stands in the way, what only QEMU and the kernel know is
    /// found here; nothing is changed but that images which no disk is on are closed.
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
        // QEMU itself finds out too, but only when the merges of the disks before are under way.
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
        // The node of the format, where there is one on top of that of the file.
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

    /// Another's job can hide a disk's images, have them in use, or change its chain meanwhile; of
    /// which disk QEMU does not tell.
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

    /// From now on nobody goes back to the snapshot.
    fn disarm(&self) -> Result<()> {
        let memory = Path::new(&self.record.memory_file);
        let failed = |error| {
            Error::system(format!("cannot rename its memory image '{}'", memory.display()), error)
        };
        match std::fs::rename(memory, deleting(memory)) {
            // It is gone, or was renamed before.
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        if deleting(memory).exists() {
            // A power cut must not bring the old name back once images are being merged.
            sys::sync_parent(memory).map_err(|error| {
                self.arm();
                failed(error)
            })?;
        }
        Ok(())
    }

    fn arm(&self) {
        let memory = Path::new(&self.record.memory_file);
        let _ = std::fs::rename(deleting(memory), memory);
    }

    /// Merges all disks: as long as not all can be completed, none is.
    fn merge(&mut self, merges: &mut [Job]) -> Result<()> {
        let step = "cannot merge its overlays into their images";
        let mut ids = Vec::new();
        for job in merges.iter() {
            let started = jobs::start_merge(self.guest, step, &job.id, &job.overlay, &job.image);
            if let Err(error) = started {
                // QEMU refuses it before it has written anything; where it did not answer, it may
                // have begun.
                if ids.is_empty() && jobs::left_over(self.guest).is_ok_and(|jobs| jobs.is_empty()) {
                    self.arm();
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
        completed.map_err(|error| self.spoilt(merges, named(error)))
    }

    /// Ends what was begun. `error` is why.
    fn give_up(&mut self, merges: &[Job], error: Error) -> Error {
        let monitor = &mut *self.guest;
        let ended = jobs::left_over(monitor).and_then(|begun| jobs::give_up(monitor, &begun));
        let error = match ended {
            Ok(()) => error,
            Err(left) => error.and(left.message),
        };
        self.spoilt(merges, error)
    }

    /// What is to be known after a merge that failed.
    fn spoilt(&self, merges: &[Job], error: Error) -> Error {
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

    /// Removes these overlays, and what else is the snapshot's, but for the record.
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
        [deleting(memory).as_path(), memory].into_iter().try_for_each(remove)
    }

    /// Removes the nodes of an overlay that no disk is on any more.
    fn close(&mut self, overlay: &str) -> Result<()> {
        let pid = self.guest.pid();
        let mut nodes = drives::nodes(self.guest, pid, false)?;
        // QEMU's own go by themselves. That of the format goes first, as it has that of the file in
        // use.
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

/// An error where some QEMU has the file open.
fn check_unused(overlay: &str) -> Result<()> {
    // What cannot be looked at is not known to be unused.
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
