// SPDX-License-Identifier: LGPL-2.1-or-later

//! Reads all snapshot definitions of a domain.

use std::path::Path;

use super::managed_domain::ManagedDomain;
use super::snapshot_def::SnapshotDef;
use super::volumes::Volume;
use crate::backend::images;
use crate::error::{Code, Error, Result};
use crate::model::domain::Disk;

/// All snapshots of a domain.
#[derive(Debug)]
pub struct SnapshotTree {
    /// Parents first.
    pub snapshots: Vec<SnapshotDef>,
    /// The name of the current snapshot.
    pub current: Option<String>,
    /// The volumes that the snapshots' disks are on.
    pub volumes: Vec<Volume>,
}

impl SnapshotTree {
    /// Reads all definitions.
    pub fn read(domain: &ManagedDomain) -> Result<SnapshotTree> {
        let texts = domain.snapshots();
        let texts =
            texts.map_err(|error| error.into_error("cannot read the domain's snapshots"))?;
        let parse = |(name, text): (_, String)| SnapshotDef::parse(name, &text);
        let snapshots = texts.all.into_iter().map(parse).collect::<Result<Vec<_>>>()?;
        let volumes = volumes_of(&snapshots);
        let named = snapshots.into_iter().map(|snapshot| snapshot.with_paths(&volumes));
        let snapshots = named.collect::<Result<Vec<_>>>()?;
        Ok(SnapshotTree { snapshots, current: texts.current, volumes })
    }

    /// The snapshot of this name.
    pub fn get(&self, name: &str) -> Result<&SnapshotDef> {
        self.snapshots.iter().find(|snapshot| snapshot.name == name).ok_or_else(|| {
            Error::new(
                Code::NoDomainSnapshot,
                format!("no domain snapshot with matching name '{name}'"),
            )
        })
    }

    /// Whether the snapshot is the current one.
    pub fn is_current(&self, snapshot: &SnapshotDef) -> bool {
        self.current.as_ref() == Some(&snapshot.name)
    }

    /// The children of a snapshot.
    pub fn children(&self, name: &str) -> impl Iterator<Item = &SnapshotDef> {
        self.snapshots.iter().filter(move |snapshot| snapshot.parent.as_deref() == Some(name))
    }

    /// The names of all descendants of a snapshot, parents first.
    pub fn descendants<'a>(&'a self, name: &'a str) -> Vec<&'a str> {
        let mut found = vec![name];
        // A child comes after its parent.
        for snapshot in &self.snapshots {
            if snapshot.parent.as_deref().is_some_and(|parent| found.contains(&parent)) {
                found.push(&snapshot.name);
            }
        }
        found.split_off(1)
    }
}

/// The volumes that disks of snapshots are on in the definitions of libvirt's own snapshots. The
/// path of a volume is the backing file of the disk's overlay.
fn volumes_of(snapshots: &[SnapshotDef]) -> Vec<Volume> {
    let on_volumes = snapshots.iter().flat_map(|snapshot| {
        let volume = |disk: &Disk| Some((disk.target.clone(), disk.volume.clone()?));
        snapshot.images.iter().filter_map(volume).map(move |found| (snapshot, found))
    });
    let volume =
        |(snapshot, (target, (pool, name))): (&SnapshotDef, (String, (String, String)))| {
            let of_disk = snapshot.disks.iter().chain(&snapshot.revert_disks);
            let overlays = of_disk.filter(|disk| disk.target == target);
            let below = overlays
                .filter_map(|disk| images::below(disk.overlay.as_deref()?, "qcow2"))
                .map(|(below, _)| below);
            let path = below.into_iter().find(|below| Path::new(below).exists())?;
            Some(Volume { pool, name, path })
        };
    on_volumes.filter_map(volume).collect()
}
