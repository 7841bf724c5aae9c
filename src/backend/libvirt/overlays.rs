// SPDX-License-Identifier: LGPL-2.1-or-later

//! Overlays under libvirt: `qemu-img` makes them before the switch, and libvirt's block commit
//! merges them back.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::SystemTime;

use super::block_commit::{BlockCommit, MergeFailure};
use super::call::Caller;
use super::drives;
use crate::backend::guest::Place;
use crate::backend::images::{self, id};
use crate::backend::overlay_file::{self, Beforehand, OverlayFile};
use crate::error::{Code, Error, Result, fail};
use crate::model::domain::{Domain, Source, Storage};
use crate::model::journal::{NotedFile, NotedOverlay};
use crate::model::{DiskPlan, Drive, Role};
use crate::sys;

/// The backing chain of each disk, from the top down, with its target.
type Chains = [(String, Vec<String>)];

/// The overlays of one snapshot.
#[derive(Debug, Default)]
pub struct Overlays {
    disks: Vec<DiskPlan>,
    /// The files of those that were made so far.
    made: Vec<OverlayFile>,
    /// How far those are merged that were, by their paths.
    merges: BTreeMap<String, Merge>,
}

/// How far an overlay is merged. The domain may have written to the image below since: a second
/// merge would put older data over that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Merge {
    /// The domain may have been switched to the image below. It has ended before that was known.
    Pivoting,
    /// The domain was switched to the image below.
    Pivoted,
    /// `qemu-img` has merged it, and it was last written at this time. The domain's definition may
    /// still name it, and a domain that is started writes to it again.
    Committed(SystemTime),
}

impl Overlays {
    /// The disks that get an overlay.
    pub fn disks(&self) -> &[DiskPlan] {
        &self.disks
    }

    /// The overlays that were made so far, with their files.
    pub fn made(&self) -> impl Iterator<Item = (&DiskPlan, &OverlayFile)> {
        self.disks.iter().zip(&self.made)
    }

    /// Creates the overlays. Each gets the owner of its image. If the image is not on this machine,
    /// the overlay gets the owner of the file `owner`.
    pub fn create(
        &mut self,
        disks: &[DiskPlan],
        beforehand: Beforehand,
        owner: Option<&Path>,
    ) -> Result<()> {
        self.disks = disks.to_vec();
        for disk in disks {
            self.made.push(create(disk, beforehand, owner)?);
        }
        Ok(())
    }

    /// Takes over overlays that another process has made, with their files. Those at the paths
    /// `merged` are merged already.
    pub fn adopted(
        noted: &[(NotedOverlay, Option<NotedFile>)],
        merged: &[String],
    ) -> Result<Overlays> {
        let mut overlays = Overlays::default();
        let pivoted = merged.iter().map(|overlay| (overlay.clone(), Merge::Pivoted));
        overlays.merges.extend(pivoted);
        let mut without_file = Vec::new();
        for (noted, file) in noted {
            let NotedOverlay { disk, image, format, overlay, is_reused, .. } = noted;
            let file = file.as_ref().map(|file| OverlayFile::reopen(&file.known, *is_reused));
            let file = file.transpose().map_err(|error| {
                Error::system(format!("cannot open the overlay '{overlay}'"), error)
            })?;
            let plan = DiskPlan {
                drive: Drive::of_image(disk, Role::Disk, "", image, format),
                overlay: overlay.clone(),
                reuse: *is_reused,
                on_device: false,
            };
            // Those with files are the first, as while overlays are made.
            match file.flatten() {
                Some(file) => {
                    overlays.disks.push(plan);
                    overlays.made.push(file);
                }
                None => without_file.push(plan),
            }
        }
        overlays.disks.extend(without_file);
        Ok(overlays)
    }

    /// The files of those that were made so far, as a journal notes them.
    pub fn noted_files(&self) -> Vec<NotedFile> {
        let noted = |(disk, file): (&DiskPlan, &OverlayFile)| file.noted(&disk.overlay);
        self.made().filter_map(noted).map(NotedFile::of).collect()
    }

    /// Where each overlay is in these chains, which can lack the images below the first.
    pub fn places(&self, chains: &Chains) -> Vec<(String, Place)> {
        let is_image = |disk: &DiskPlan, image: &str| id(image) == id(&disk.drive.file);
        let one = |disk: &DiskPlan| match place(disk, chains) {
            Some((0, None)) => Place::Active,
            Some((depth, Some(below))) if is_image(disk, below) => match depth {
                0 => Place::Active,
                _ => Place::Covered,
            },
            Some(_) => Place::Changed,
            None => {
                let mut chains = chains.iter();
                let chain = chains.find(|(target, _)| target == disk.drive.name());
                match chain.and_then(|(_, chain)| chain.first()) {
                    Some(top) if is_image(disk, top) => Place::OnImage,
                    _ => Place::Elsewhere,
                }
            }
        };
        self.disks.iter().map(|disk| (disk.overlay.clone(), one(disk))).collect()
    }

    /// Checks that each disk is still on its overlay, or on an image above it, and each overlay on
    /// the snapshot's image.
    pub fn check_chains(&self, chains: &Chains) -> Result<()> {
        for disk in &self.disks {
            if place(disk, chains).is_none_or(|(_, below)| below != Some(disk.drive.file.as_str()))
            {
                fail!(
                    OperationFailed,
                    "another client has changed the images of disk '{}' while memory was being \
                     saved: '{}' is no longer on '{}'",
                    disk.drive.name(),
                    disk.overlay,
                    disk.drive.file
                );
            }
        }
        Ok(())
    }

    /// Refuses a disk whose overlay is being merged: the merge writes to the snapshot's image.
    pub fn check_not_merging(&self, domain: &Domain) -> Result<()> {
        let is_merging =
            |disk: &&DiskPlan| domain.disk(disk.drive.name()).is_some_and(|disk| disk.is_merging);
        if let Some(disk) = self.disks.iter().find(is_merging) {
            fail!(
                OperationFailed,
                "another client has begun to merge '{}' of disk '{}' back while memory was being \
                 saved: its images are no longer those of the instant",
                disk.overlay,
                disk.drive.name()
            );
        }
        Ok(())
    }

    /// Merges the overlays of disks that were detached. Only the overlays have the guest's writes.
    /// Returns whether there were any.
    pub fn merge_detached(&mut self, domain: &Domain) -> Result<bool> {
        let detached = |disk: &DiskPlan| domain.disk(disk.drive.name()).is_none();
        let mut found = false;
        let made = self.disks.iter().zip(&self.made);
        for (disk, file) in made.filter(|(disk, _)| detached(disk)) {
            if !Path::new(&disk.overlay).exists() {
                continue;
            }
            // The domain's definition may name it.
            found = true;
            if images::is_surely_empty(file.file()) {
                continue;
            }
            commit_once(disk, file, &mut self.merges).map_err(|error| {
                error.and(format!(
                    "disk '{}' was detached meanwhile, and what the guest wrote to it is in '{}', \
                     which could not be merged and must not be removed: run `qemu-img commit` on \
                     it when the cause is fixed",
                    disk.drive.name(),
                    disk.overlay
                ))
            })?;
        }
        Ok(found)
    }

    /// Merges the overlays that are in use back into the images below.
    pub fn merge(&mut self, caller: &mut Caller, chains: &Chains) -> Result<()> {
        let mut in_use = self
            .disks
            .iter()
            .filter_map(|disk| Some((disk, place(disk, chains)?)))
            .collect::<Vec<_>>();
        if let Some((disk, _)) = in_use.iter().find(|(_, (depth, _))| *depth > 0) {
            fail!(
                OperationFailed,
                "disk '{}' has another image on top of '{}' by now (another client took a \
                 snapshot meanwhile): the overlays {} stay in use, and must not be removed",
                disk.drive.name(),
                disk.overlay,
                self.paths()
            );
        }
        let merges = &mut self.merges;
        let merged = in_use.drain(..).try_for_each(|(disk, _)| {
            let failure = match merge(disk, caller) {
                Ok(()) => {
                    merges.insert(disk.overlay.clone(), Merge::Pivoted);
                    return Ok(());
                }
                Err(failure) => failure,
            };
            if failure.may_have_pivoted {
                merges.insert(disk.overlay.clone(), Merge::Pivoting);
            }
            Err(failure.error)
        });
        merged.map_err(|error| {
            error.and(format!(
                "the domain goes on with the overlays {}, which must not be removed: merge them \
                 with `virsh blockcommit DOMAIN DISK --shallow --active --pivot` when the cause is \
                 mended",
                self.unmerged()
            ))
        })
    }

    /// Merges the overlays of a domain that does not run.
    pub fn merge_offline(&mut self) -> Result<()> {
        for (disk, file) in self.disks.iter().zip(&self.made) {
            if !Path::new(&disk.overlay).exists() {
                continue;
            }
            commit_once(disk, file, &mut self.merges).map_err(|error| {
                Error::new(
                    error.code,
                    format!(
                        "the domain has ended, and what the guest wrote after the instant is in \
                         {}, which could not be merged and must not be removed ({}): run `qemu-img \
                         commit` on each when the cause is fixed, and put the domain's definition \
                         back, before it is started again",
                        unmerged(&self.disks, &self.merges),
                        error.message
                    ),
                )
            })?;
        }
        Ok(())
    }

    /// Empties the overlays that were formatted for the snapshot. They must not be in use.
    pub fn empty(&self) -> Result<()> {
        for (disk, file) in self.made().filter(|(_, file)| file.is_new()) {
            let step = format!("cannot empty '{}' of disk '{}'", disk.overlay, disk.drive.name());
            if sys::is_locked(file.file(), sys::IMAGE_LOCKS) {
                fail!(OperationFailed, "{step}: it is in use");
            }
            if !file.is_device() {
                file.file().set_len(0).map_err(|error| Error::system(&step, error))?;
            }
            format(disk, file)?;
        }
        Ok(())
    }

    /// A domain's definition, with the images below in place of the overlays, named as in `before`;
    /// `None` if it names no overlay.
    pub fn without(&self, domain_xml: &str, before: &str) -> Result<Option<String>> {
        let domain = Domain::parse(domain_xml)?;
        let chains = drives::chains(&domain);
        let named = |disk: &&DiskPlan| place(disk, &chains).is_some_and(|(depth, _)| depth == 0);
        let before = Domain::parse(before)?;
        let source = |disk| {
            let DiskPlan { drive, overlay, .. }: &DiskPlan = disk;
            let storage =
                before.storage(drive.name()).filter(|storage| storage.name() != Some(overlay));
            let storage = storage.unwrap_or_else(|| Storage::at(&drive.file));
            Source { target: drive.name(), storage, format: &drive.format }
        };
        let sources: Vec<_> = self.disks.iter().filter(named).map(source).collect();
        if sources.is_empty() {
            return Ok(None);
        }
        domain.with_sources(&sources).map(Some)
    }

    /// Removes the overlays that were made for the snapshot, and empties existing files that were
    /// empty. They must not be in use.
    pub fn discard(&mut self) -> Result<()> {
        while let (Some(file), Some(disk)) =
            (self.made.last(), self.disks.iter().take(self.made.len()).next_back())
        {
            file.discard().map_err(|error| {
                Error::system(format!("cannot discard '{}'", disk.overlay), error)
            })?;
            self.made.pop();
        }
        Ok(())
    }

    /// The paths of the overlays, for a message.
    pub fn paths(&self) -> String {
        unmerged(&self.disks, &BTreeMap::new())
    }

    /// The paths of those that are not merged.
    fn unmerged(&self) -> String {
        unmerged(&self.disks, &self.merges)
    }
}

fn unmerged(disks: &[DiskPlan], merges: &BTreeMap<String, Merge>) -> String {
    let is_left =
        |disk: &&DiskPlan| matches!(merges.get(&disk.overlay), None | Some(Merge::Pivoting));
    let of_disk = |disk: &DiskPlan| format!("'{}' of disk '{}'", disk.overlay, disk.drive.name());
    disks.iter().filter(is_left).map(of_disk).collect::<Vec<_>>().join(", ")
}

/// The depth of a disk's overlay in its chain, and the image below it.
fn place<'a>(disk: &DiskPlan, chains: &'a Chains) -> Option<(usize, Option<&'a str>)> {
    let (_, chain) = chains.iter().find(|(target, _)| target == disk.drive.name())?;
    let depth = chain.iter().position(|image| *image == disk.overlay)?;
    Some((depth, chain.get(depth + 1).map(String::as_str)))
}

fn create(disk: &DiskPlan, beforehand: Beforehand, owner: Option<&Path>) -> Result<OverlayFile> {
    let file = OverlayFile::open(disk, beforehand)?;
    if !file.is_new() {
        return Ok(file);
    }
    let owner =
        owner.filter(|_| !disk.drive.file.starts_with('/') && matches!(file, OverlayFile::Made(_)));
    let given = owner.map_or(Ok(()), |owner| sys::give_to_owner_of(owner, file.file()));
    let given = given.map_err(|error| {
        Error::system(format!("cannot set the owner of '{}'", disk.overlay), error)
    });
    match given.and_then(|()| format(disk, &file)) {
        Ok(()) => Ok(file),
        Err(error) => {
            let _ = file.discard();
            Err(error)
        }
    }
}

fn format(disk: &DiskPlan, file: &OverlayFile) -> Result<()> {
    let (drive, path) = (&disk.drive, &disk.overlay);
    let step = format!("cannot create external snapshot file '{path}' of disk '{}'", drive.name());
    file.format(&drive.file, &drive.format, drive.size)
        .map_err(|reason| Error::new(Code::OperationFailed, format!("{step}: {reason}")))?;
    file.sync(path).map_err(|error| Error::system(&step, error))
}

/// Merges an overlay that no QEMU has open, unless that was done.
fn commit_once(
    disk: &DiskPlan,
    file: &OverlayFile,
    merges: &mut BTreeMap<String, Merge>,
) -> Result<()> {
    let written = || {
        let written = file.file().metadata().and_then(|found| found.modified());
        written.map_err(|error| Error::system(format!("cannot look at '{}'", disk.overlay), error))
    };
    match merges.get(&disk.overlay) {
        Some(Merge::Pivoted) => return Ok(()),
        Some(Merge::Committed(time)) if *time == written()? => return Ok(()),
        Some(Merge::Pivoting) => fail!(
            OperationFailed,
            "the domain ended just when '{}' was merged: the overlay or its image, whichever was \
             written last, is the newer one",
            disk.overlay
        ),
        Some(Merge::Committed(_)) | None => {}
    }
    overlay_file::commit(file.file(), &disk.drive.file, &disk.drive.format)?;
    merges.insert(disk.overlay.clone(), Merge::Committed(written()?));
    Ok(())
}

fn merge(disk: &DiskPlan, caller: &mut Caller) -> std::result::Result<(), MergeFailure> {
    let commit = BlockCommit {
        target: disk.drive.name().to_owned(),
        base: None,
        // The overlay is named: libvirt refuses the merge if another client has merged it by then.
        // The images below must not be merged.
        top: Some(disk.overlay.clone()),
        top_id: id(&disk.overlay),
        active: true,
        shallow: true,
    };
    let step = format!("cannot merge '{}' back into '{}'", disk.overlay, disk.drive.file);
    commit.run(caller, &step)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tool::Tool;

    fn write(path: &str, pattern: &str) {
        let write = format!("write -P {pattern} 0 4k");
        Tool::new("qemu-io").args(["-f", "qcow2", "-c", &write, path]).run().unwrap();
    }

    #[test]
    fn an_overlay_that_was_merged_is_not_merged_again_over_what_the_guest_wrote_since() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        let mut plans = Vec::new();
        for target in ["vda", "vdb"] {
            let image = path(target);
            std::fs::write(&image, vec![0; 1 << 20]).unwrap();
            let mut drive = Drive::of_image(target, Role::Disk, "", &image, "raw");
            drive.size = 1 << 20;
            let overlay = path(&format!("{target}.overlay"));
            plans.push(DiskPlan { drive, overlay, reuse: false, on_device: false });
        }
        let mut overlays = Overlays::default();
        overlays.create(&plans, Beforehand::Refused, None).unwrap();
        let content = |disk: &DiskPlan| std::fs::read(&disk.drive.file).unwrap()[0];
        let (one, two) = (&plans[0], &plans[1]);
        write(&one.overlay, "1");
        write(&two.overlay, "1");
        // The guest went on with the image of the first, while the second was not merged yet.
        overlays.merges.insert(one.overlay.clone(), Merge::Pivoted);
        std::fs::write(&one.drive.file, vec![9; 1 << 20]).unwrap();
        overlays.merge_offline().unwrap();
        assert_eq!((content(one), content(two)), (9, 1));
        // Another client started the domain on its image.
        std::fs::write(&two.drive.file, vec![8; 1 << 20]).unwrap();
        overlays.merge_offline().unwrap();
        assert_eq!((content(one), content(two)), (9, 8));
        // Another client started the domain on the overlay.
        write(&two.overlay, "2");
        overlays.merge_offline().unwrap();
        assert_eq!((content(one), content(two)), (9, 2));
        assert!(!overlays.unmerged().contains("vd"), "{}", overlays.unmerged());

        // The domain ended in the switch.
        overlays.merges.insert(two.overlay.clone(), Merge::Pivoting);
        write(&two.overlay, "3");
        let error = overlays.merge_offline().unwrap_err();
        assert!(error.message.contains(&two.overlay), "{error}");
        assert!(!error.message.contains(&one.overlay), "{error}");
        assert_eq!((content(one), content(two)), (9, 2));
    }

    #[test]
    fn an_overlay_that_another_process_has_merged_is_not_merged_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        let (image, overlay) = (path("image"), path("overlay"));
        std::fs::write(&image, vec![9; 1 << 20]).unwrap();
        let mut drive = Drive::of_image("vda", Role::Disk, "", &image, "raw");
        drive.size = 1 << 20;
        let plan = DiskPlan { drive, overlay: overlay.clone(), reuse: false, on_device: false };
        let mut made = Overlays::default();
        made.create(&[plan], Beforehand::Refused, None).unwrap();
        write(&overlay, "1");
        let noted = NotedOverlay {
            disk: "vda".into(),
            overlay: overlay.clone(),
            node: String::new(),
            file_node: String::new(),
            image_node: String::new(),
            image: image.clone(),
            format: "raw".into(),
            is_reused: false,
        };
        let found = [(noted, made.noted_files().pop())];
        let without_disks = Domain::parse("<domain><name>d</name></domain>").unwrap();
        let mut adopted = Overlays::adopted(&found, &[overlay]).unwrap();
        adopted.merge_offline().unwrap();
        adopted.merge_detached(&without_disks).unwrap();
        assert_eq!(std::fs::read(&image).unwrap()[0], 9);
        // One that is not known to be merged is.
        let mut adopted = Overlays::adopted(&found, &[]).unwrap();
        adopted.merge_detached(&without_disks).unwrap();
        assert_eq!(std::fs::read(&image).unwrap()[0], 1);
    }
}
