// SPDX-License-Identifier: LGPL-2.1-or-later

//! Keeps the notes of the kept snapshots true while a delete changes their images: a revert must
//! not refuse these changes. An image that another client had changed before keeps its old note.

use std::collections::BTreeSet;

use crate::backend::images::{self, Id, id};
use crate::backend::libvirt::snapshot_def::SnapshotDef;
use crate::backend::libvirt::{ManagedDomain, SnapshotTree};
use crate::error::Result;
use crate::model::{Frozen, Notes};

/// The kept snapshots. Each has a list of the disks whose images are about to change, and were as
/// noted until now.
#[derive(Debug)]
pub struct Renewal(Vec<(String, Disks)>);

type Disks = BTreeSet<String>;

impl Renewal {
    /// Removes the notes about images that are about to change, so that an interrupted delete
    /// leaves no wrong notes.
    pub fn begin(
        domain: &ManagedDomain,
        tree: &SnapshotTree,
        kept: &[&SnapshotDef],
        touched: &BTreeSet<Id>,
    ) -> Result<Renewal> {
        let mut begun = Vec::new();
        for snapshot in kept {
            let disks = unchanged(&snapshot.notes.frozen, touched);
            if !disks.is_empty() {
                let frozen = snapshot
                    .notes
                    .frozen
                    .iter()
                    .filter(|(disk, _)| !disks.contains(disk))
                    .cloned()
                    .collect();
                redefine(domain, tree, snapshot, &Notes { frozen, ..snapshot.notes.clone() })?;
            }
            begun.push((snapshot.name.clone(), disks));
        }
        Ok(Renewal(begun))
    }

    /// Notes the state of these images after the delete. `former`: see [`Notes::former`]; `None`
    /// leaves that unchanged.
    pub fn end(&self, domain: &ManagedDomain, former: Option<&BTreeSet<Id>>) -> Result<()> {
        let tree = SnapshotTree::read(domain)?;
        for (name, disks) in &self.0 {
            let Ok(snapshot) = tree.get(name) else { continue };
            let mut notes = snapshot.notes.clone();
            for (disk, image) in
                snapshot.external().filter(|(disk, _)| disks.contains(&disk.target))
            {
                let Some((file, format)) =
                    image.and_then(|image| Some((image.file.as_ref()?, &image.format)))
                else {
                    continue;
                };
                let layers: Vec<String> =
                    images::chain(file, format)?.into_iter().map(|layer| layer.path).collect();
                notes.frozen.retain(|(target, _)| *target != disk.target);
                notes.frozen.extend(
                    Frozen::of_all(&layers).into_iter().map(|frozen| (disk.target.clone(), frozen)),
                );
            }
            if let Some(former) = former {
                notes.former =
                    former.iter().map(|image| image.to_string_lossy().into_owned()).collect();
            }
            if notes != snapshot.notes {
                redefine(domain, &tree, snapshot, &notes)?;
            }
        }
        Ok(())
    }
}

/// The disks that have one of these images, if all their images are as noted.
fn unchanged(frozen: &[(String, Frozen)], touched: &BTreeSet<Id>) -> BTreeSet<String> {
    let named: BTreeSet<&String> = frozen
        .iter()
        .filter(|(_, frozen)| touched.contains(&id(&frozen.file)))
        .map(|(disk, _)| disk)
        .collect();
    let whole = |disk: &&String| {
        frozen.iter().filter(|(of, _)| of == *disk).all(|(_, frozen)| frozen.change().is_none())
    };
    named.into_iter().filter(whole).cloned().collect()
}

fn redefine(
    domain: &ManagedDomain,
    tree: &SnapshotTree,
    snapshot: &SnapshotDef,
    notes: &Notes,
) -> Result<()> {
    let step = format!("cannot change the notes in the record of snapshot '{}'", snapshot.name);
    domain
        .redefine(&snapshot.with_notes(notes)?, tree.is_current(snapshot))
        .map_err(|error| error.into_error(&step))
}
