// SPDX-License-Identifier: LGPL-2.1-or-later

//! Plans what a delete of a snapshot that the library records itself does with its overlays. The
//! plan is made of values only.
//!
//! * If the guest is on the snapshot's overlay, the overlay is merged into the snapshot's image,
//!   and removed. It must be the guest's active image, and be directly on that image; and no other
//!   snapshot may need either.
//! * An overlay that another snapshot needs stays. One that does not exist any more needs nothing.
//! * Every other overlay was merged before, or was left behind by a revert, and is removed. But an
//!   overlay of a detached disk may have the disk's newest data: then the delete is refused.

use std::collections::{BTreeMap, BTreeSet};

use crate::backend::images::Id;
use crate::error::{Result, fail};

/// The facts that the plan is made from.
#[derive(Debug, Default)]
pub struct Situation<'a> {
    /// The snapshot's disks.
    pub disks: Vec<Disk<'a>>,
    /// The guest's drives.
    pub drives: Vec<Drive<'a>>,
    /// Images that other snapshots need, with the name of a snapshot that needs each.
    pub kept: BTreeMap<Id, String>,
    /// The images that snapshots froze, including this snapshot.
    pub frozen: BTreeSet<Id>,
}

/// A disk of the snapshot.
#[derive(Clone, Debug)]
pub struct Disk<'a> {
    /// Its name.
    pub name: &'a str,
    /// The overlay that the guest went on with.
    pub overlay: Image<'a>,
    /// The image with the snapshot's content.
    pub image: Image<'a>,
    /// The overlay exists.
    pub is_there: bool,
    /// The images below the overlay, as far as they are known.
    pub below: Vec<Id>,
}

/// A drive of the guest.
#[derive(Clone, Debug)]
pub struct Drive<'a> {
    /// Its names, the best one first.
    pub names: &'a [String],
    /// The path of its active image.
    pub file: &'a str,
    /// Its active image and those below.
    pub layers: Vec<Id>,
    /// Why its overlay cannot be merged.
    pub unsupported_reason: Option<&'a str>,
}

/// An image, with its name in the record.
#[derive(Clone, Debug)]
pub struct Image<'a> {
    pub path: &'a str,
    pub id: Id,
}

/// What is done with the overlay of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It is merged into the image below, through the drive with this index in the situation, and
    /// removed.
    Merge(usize),
    /// It is removed.
    Remove,
    /// It stays, or does not exist.
    Keep,
}

impl Situation<'_> {
    /// Plans the action for each disk's overlay, or returns why the delete is refused.
    pub fn plan(&self) -> Result<Vec<Action>> {
        self.disks.iter().map(|disk| self.action(disk)).collect()
    }

    fn action(&self, disk: &Disk) -> Result<Action> {
        let has_overlay = |drive: &Drive| drive.layers.contains(&disk.overlay.id);
        match self.drives.iter().position(has_overlay) {
            Some(index) => self.merge(disk, index),
            None if !disk.is_there || self.kept.contains_key(&disk.overlay.id) => Ok(Action::Keep),
            None => self.remove(disk),
        }
    }

    fn merge(&self, disk: &Disk, index: usize) -> Result<Action> {
        let drive = &self.drives[index];
        let name = drive.names.first().map_or(disk.name, String::as_str);
        let Disk { overlay, image, .. } = disk;
        if drive.layers.first() != Some(&overlay.id) {
            fail!(
                OperationInvalid,
                "disk '{name}' is on '{}', which stands on the snapshot's overlay '{}': merge it \
                 into that first (block-commit)",
                drive.file,
                overlay.path
            );
        }
        if drive.layers.get(1) != Some(&image.id) {
            fail!(
                OperationInvalid,
                "the overlay '{}' of disk '{name}' does not stand on the snapshot's image '{}' any \
                 more",
                overlay.path,
                image.path
            );
        }
        if let Some(reason) = drive.unsupported_reason {
            fail!(ConfigUnsupported, "disk '{name}' {reason}");
        }
        if let Some(other) = self.kept.get(&image.id).or(self.kept.get(&overlay.id)) {
            fail!(
                OperationInvalid,
                "snapshot '{other}' stands on '{}', into which '{}' would be merged: delete that \
                 one first",
                image.path,
                overlay.path
            );
        }
        Ok(Action::Merge(index))
    }

    /// Whether a disk is attached to the guest. It is found by its image, or by its name if the
    /// drive is on images of the disk's snapshots: another disk can have its name now.
    fn is_attached(&self, disk: &Disk) -> bool {
        let stands_on = |image: &Id| disk.below.contains(image) && self.frozen.contains(image);
        self.drives.iter().any(|drive| {
            drive.layers.contains(&disk.image.id)
                || drive.names.iter().any(|name| name == disk.name)
                    && drive.layers.iter().any(stands_on)
        })
    }

    fn remove(&self, disk: &Disk) -> Result<Action> {
        if !self.is_attached(disk) {
            fail!(
                OperationInvalid,
                "the guest has no disk '{}', whose overlay '{}' can hold what was written last: \
                 attach the disk, or delete the metadata alone \
                 (VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY) and keep or remove the files yourself",
                disk.name,
                disk.overlay.path
            );
        }
        Ok(Action::Remove)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    type Content = BTreeMap<usize, u32>;

    #[derive(Clone, Debug)]
    struct File {
        below: Option<usize>,
        data: Content,
    }

    #[derive(Clone, Debug)]
    struct Snapshot {
        parent: Option<usize>,
        image: usize,
        overlay: usize,
        content: Content,
    }

    /// A guest with one disk, its files by number, and its snapshots by number.
    #[derive(Debug, Default)]
    struct Simulated {
        files: BTreeMap<usize, File>,
        active: Option<usize>,
        detached: Option<usize>,
        snapshots: BTreeMap<usize, Snapshot>,
        current: Option<usize>,
        number: usize,
    }

    fn image_id(file: usize) -> Id {
        Id::from(format!("/{file}"))
    }

    impl Simulated {
        fn next(&mut self) -> usize {
            self.number += 1;
            self.number
        }

        fn create(&mut self, below: Option<usize>) -> usize {
            let file = self.next();
            self.files.insert(file, File { below, data: Content::new() });
            file
        }

        fn layers(&self, top: usize) -> Vec<usize> {
            std::iter::successors(Some(top), |file| self.files.get(file)?.below).collect()
        }

        fn content(&self, top: usize) -> Content {
            let layers = self.layers(top).into_iter().rev();
            layers.flat_map(|file| self.files[&file].data.clone()).collect()
        }

        fn write(&mut self, random: &mut Random) {
            let (block, value) = (random.below(5), self.next() as u32);
            if let Some(active) = self.active {
                self.files.get_mut(&active).unwrap().data.insert(block, value);
            }
        }

        fn snapshot(&mut self) {
            let Some(image) = self.active else { return };
            let (content, overlay) = (self.content(image), self.create(Some(image)));
            let snapshot = Snapshot { parent: self.current, image, overlay, content };
            self.active = Some(overlay);
            let name = self.next();
            self.snapshots.insert(name, snapshot);
            self.current = Some(name);
        }

        /// Reverts: the guest goes on with a fresh overlay of the snapshot's image, and the record
        /// names the overlay.
        fn revert(&mut self, name: usize) {
            let overlay = self.create(Some(self.snapshots[&name].image));
            self.snapshots.get_mut(&name).unwrap().overlay = overlay;
            (self.active, self.current, self.detached) = (Some(overlay), Some(name), None);
        }

        fn ids(&self, top: usize) -> Vec<Id> {
            self.layers(top).into_iter().map(image_id).collect()
        }

        /// Whether the snapshot was deleted.
        fn delete(&mut self, name: usize) -> bool {
            let Snapshot { image, overlay, .. } = self.snapshots[&name].clone();
            let paths = [format!("/{overlay}"), format!("/{image}")];
            let names = ["vda".to_owned()];
            let others = || self.snapshots.iter().filter(|(other, _)| **other != name);
            let kept = others().flat_map(|(other, snapshot)| {
                self.ids(snapshot.image).into_iter().map(|id| (id, other.to_string()))
            });
            let there = self.files.contains_key(&overlay);
            let situation = Situation {
                disks: vec![Disk {
                    name: "vda",
                    overlay: Image { path: &paths[0], id: image_id(overlay) },
                    image: Image { path: &paths[1], id: image_id(image) },
                    is_there: there,
                    below: if there { self.ids(overlay).split_off(1) } else { vec![] },
                }],
                drives: self
                    .active
                    .iter()
                    .map(|active| Drive {
                        names: &names,
                        file: "/active",
                        layers: self.ids(*active),
                        unsupported_reason: None,
                    })
                    .collect(),
                kept: kept.collect(),
                frozen: self.snapshots.values().map(|other| image_id(other.image)).collect(),
            };
            match situation.plan().map(|actions| actions[0]) {
                Err(_) => return false,
                Ok(Action::Merge(0)) => {
                    let data = self.files.remove(&overlay).unwrap().data;
                    self.files.get_mut(&image).unwrap().data.extend(data);
                    self.active = Some(image);
                }
                Ok(Action::Merge(_)) => unreachable!("the guest has one drive"),
                Ok(Action::Remove) => {
                    self.files.remove(&overlay);
                }
                Ok(Action::Keep) => {}
            }
            let removed = self.snapshots.remove(&name).unwrap();
            if self.current == Some(name) {
                self.current = removed.parent;
            }
            true
        }

        fn check(&self, active: Option<&Content>) {
            for (name, snapshot) in &self.snapshots {
                assert_eq!(self.content(snapshot.image), snapshot.content, "{name} of {self:#?}");
            }
            assert_eq!(self.active.map(|top| self.content(top)).as_ref(), active, "{self:#?}");
        }
    }

    #[test]
    fn deleting_childless_snapshots_in_any_order_loses_no_content() {
        let (mut deleted, mut refused) = (0, 0);
        for seed in 1..200 {
            let mut random = Random(u64::wrapping_mul(seed, 0x9e37_79b9_7f4a_7c15));
            let mut guest = Simulated::default();
            guest.active = Some(guest.create(None));
            for _ in 0..40 {
                guest.write(&mut random);
                let before = guest.active.map(|top| guest.content(top));
                let names: Vec<usize> = guest.snapshots.keys().copied().collect();
                match random.below(8) {
                    0..=2 => guest.snapshot(),
                    3 if !names.is_empty() => {
                        guest.revert(names[random.below(names.len())]);
                        continue;
                    }
                    4 if seed % 3 == 0 => {
                        // The disk is detached, and attached again.
                        let again = guest.detached.take();
                        (guest.detached, guest.active) = (guest.active, again.or(None));
                        if guest.active.is_none() && guest.detached.is_none() {
                            break;
                        }
                        continue;
                    }
                    5..=7 => {
                        let is_parent = |name: &usize| {
                            guest.snapshots.values().any(|other| other.parent == Some(*name))
                        };
                        let childless = names.iter().copied().filter(|name| !is_parent(name));
                        let childless: Vec<usize> = childless.collect();
                        if !childless.is_empty() {
                            let detached = guest.detached.map(|top| guest.content(top));
                            let done = guest.delete(childless[random.below(childless.len())]);
                            *(if done { &mut deleted } else { &mut refused }) += 1;
                            assert_eq!(guest.detached.map(|top| guest.content(top)), detached);
                        }
                    }
                    _ => {}
                }
                guest.check(before.as_ref());
            }
        }
        assert!(deleted > 100 && refused > 10, "{deleted} deleted, {refused} refused");
    }

    /// Plans the delete of a snapshot of one disk, whose guest is on these images.
    fn plan(active: &[usize], change: impl FnOnce(&mut Situation)) -> Result<Action> {
        let names = ["vda".to_owned()];
        let mut situation = Situation {
            disks: vec![Disk {
                name: "vda",
                overlay: Image { path: "/2", id: image_id(2) },
                image: Image { path: "/1", id: image_id(1) },
                is_there: true,
                below: vec![image_id(1)],
            }],
            drives: vec![Drive {
                names: &names,
                file: "/active",
                layers: active.iter().copied().map(image_id).collect(),
                unsupported_reason: None,
            }],
            kept: BTreeMap::new(),
            frozen: BTreeSet::from([image_id(1)]),
        };
        change(&mut situation);
        situation.plan().map(|actions| actions[0])
    }

    #[test]
    fn a_merge_is_refused_where_another_image_or_snapshot_would_lose_its_content() {
        let keep = |file| {
            move |situation: &mut Situation| {
                situation.kept.insert(image_id(file), "other".into());
            }
        };
        let refused = |planned: Result<Action>| planned.unwrap_err().message;
        assert_eq!(plan(&[2, 1], |_| ()), Ok(Action::Merge(0)));
        assert_eq!(plan(&[2, 1], keep(3)), Ok(Action::Merge(0)));
        assert!(refused(plan(&[2, 1], keep(1))).contains("snapshot 'other' stands on '/1'"));
        assert!(refused(plan(&[2, 1], keep(2))).contains("snapshot 'other' stands on '/1'"));
        assert!(refused(plan(&[3, 2, 1], |_| ())).contains("merge it into that first"));
        assert!(refused(plan(&[2, 3, 1], |_| ())).contains("does not stand on"));
        let unsupported = |situation: &mut Situation| {
            situation.drives[0].unsupported_reason = Some("is encrypted");
        };
        assert!(refused(plan(&[2, 1], unsupported)).contains("is encrypted"));
    }

    #[test]
    fn an_overlay_that_the_guest_is_not_on_is_removed_unless_it_is_needed_or_was_detached() {
        assert_eq!(plan(&[1], |_| ()), Ok(Action::Remove));
        assert_eq!(plan(&[4, 1], |_| ()), Ok(Action::Remove));
        let needed = |situation: &mut Situation| {
            situation.kept.insert(image_id(2), "other".into());
        };
        assert_eq!(plan(&[1], needed), Ok(Action::Keep));
        assert_eq!(plan(&[9], |situation| situation.disks[0].is_there = false), Ok(Action::Keep));
        assert!(plan(&[9], |_| ()).unwrap_err().message.contains("the guest has no disk 'vda'"));
    }
}
