// SPDX-License-Identifier: LGPL-2.1-or-later

//! Takes over the snapshot of a process that has ended, for its recovery.

use std::path::{Path, absolute};

use super::call::Retry;
use super::guest::{LibvirtGuest, Registered};
use super::overlays::Overlays;
use super::snapshot_def::SnapshotDef;
use super::survey::Survey;
use super::{drives, volumes};
use crate::backend::guest::Place;
use crate::error::Result;
use crate::libvirt::xml::INACTIVE;
use crate::model::domain::Domain;
use crate::model::journal::{NotedDomain, NotedFile, NotedOverlay};

impl LibvirtGuest<'_> {
    /// Reads the domain, and finds the snapshot's record. Returns whether libvirt has it.
    pub(super) fn adopt(&mut self, noted: &NotedDomain, memory: &Path) -> Result<bool> {
        if self.session.id.is_some() {
            self.survey = Survey::read(&mut self.session)?;
        }
        // The definition as it was before the switch, which put the overlays into it.
        self.survey.inactive_xml.clone_from(&noted.definition);
        let Some(found) = self.session.snapshot_def(&noted.snapshot)? else { return Ok(false) };
        // Another client can have taken a snapshot of that name since.
        let is_it = |named: &str| absolute(named).is_ok_and(|named| named == memory);
        if !found.memory.as_deref().is_some_and(is_it) {
            return Ok(false);
        }
        let wanted = noted.snapshot.clone();
        let step = format!("cannot look for snapshot '{wanted}'");
        let snapshot = self
            .session
            .call_with_timeout(&step, Retry::Safe, move |domain| domain.find(&wanted))?;
        self.registered =
            snapshot.map(|snapshot| Registered { snapshot, parent: found.parent.clone() });
        Ok(self.registered.is_some())
    }

    /// Takes over overlays with their files. Those at the paths `merged` are merged already.
    pub(super) fn adopt_files(
        &mut self,
        overlays: &[(NotedOverlay, Option<NotedFile>)],
        merged: &[String],
    ) -> Result<()> {
        self.overlays = Overlays::adopted(overlays, merged)?;
        self.is_adopted = true;
        Ok(())
    }

    /// Ends merges of the overlays that nobody completes any more: the undo that began them was
    /// killed too. The disks stay on the overlays.
    pub(super) fn end_merges_left(&mut self) -> Result<()> {
        let domain = self.domain_with_paths()?;
        let is_merging = |target: &&str| domain.disk(target).is_some_and(|disk| disk.is_merging);
        let targets = self.overlays.disks().iter().map(|disk| disk.drive.name());
        let merging: Vec<_> = targets.filter(is_merging).map(str::to_owned).collect();
        for target in merging {
            let step = format!("cannot end the merge of disk '{target}' that was begun before");
            // libvirt returns when the job has ended.
            self.session.call_with_timeout(&step, Retry::Never, move |domain| {
                domain.block_job_abort(&target, 0)
            })?;
        }
        Ok(())
    }

    /// Where each overlay is: in the running domain, or else in its definition.
    pub(super) fn places_now(&mut self) -> Result<Vec<(String, Place)>> {
        let flags = if self.session.id.is_some() { 0 } else { INACTIVE };
        let xml = volumes::with_paths(&self.session.xml(flags)?, &self.survey.volumes)?;
        Ok(self.overlays.places(&drives::chains(&Domain::parse(&xml)?)))
    }

    /// The images at the instant of all snapshots but this one.
    pub(super) fn images_of_all_but(&mut self, snapshot: &str) -> Result<Vec<String>> {
        let mut images = Vec::new();
        for other in self.session.snapshot_defs()?.iter().filter(|other| other.name != snapshot) {
            images.extend(images_of(other));
        }
        Ok(images)
    }
}

/// The images of the disks that got an overlay, and those below.
fn images_of(snapshot: &SnapshotDef) -> impl Iterator<Item = String> {
    let images = snapshot.external().filter_map(|(_, image)| image);
    images.flat_map(|image| image.layers().into_iter().map(str::to_owned))
}
