// SPDX-License-Identifier: LGPL-2.1-or-later

//! Plans which images a delete of snapshots merges and removes. The plan is made of values only.
//!
//! * An image is *needed* if the domain or a kept snapshot is on it, or if it is below such an
//!   image.
//! * Overlays that were made for the deleted snapshots are removed if they are not needed. An image
//!   that the user made is never removed.
//! * If the image of a deleted snapshot is needed, the overlay above it is merged into it, so that
//!   chains do not grow. But that is done only if the image has no other overlay, and neither a
//!   kept snapshot nor the domain is on the image. Otherwise both stay: copying would save more
//!   space, but nothing is lost.
//! * An overlay that a snapshot names, and that neither the domain nor another snapshot refers to
//!   any more, is a *stray*. A revert removes the overlays that it leaves behind. So a stray can
//!   have the newest data of a disk that was detached from the domain. Neither a stray nor an image
//!   below it is ever removed.
//!
//! A file counts as an overlay of ours if it is an overlay of a snapshot's image, or an overlay
//! with the name of a revert's file. In doubt a file stays.

use std::collections::BTreeSet;

use crate::backend::images::{Graph, Id};
use crate::backend::revert_file;

/// A disk of a snapshot that was switched to an overlay.
#[derive(Clone, Debug)]
pub struct Switched {
    /// Its target.
    pub target: String,
    /// The image with the content at the instant.
    pub image: Option<Id>,
}

/// A snapshot.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// The disks that were switched.
    pub switched: Vec<Switched>,
    /// All images that it needs.
    pub images: Vec<Id>,
    /// All overlays that it names, with the disks' targets.
    pub overlays: Vec<(String, Id)>,
    /// Its images must not be replaced by others: it has internal snapshots, or its disks are not
    /// known.
    pub fixed: bool,
}

/// The facts that the plan is made from.
#[derive(Debug, Default)]
pub struct Situation {
    pub graph: Graph,
    /// The snapshots to delete.
    pub deleted: Vec<Snapshot>,
    /// The snapshots to keep.
    pub kept: Vec<Snapshot>,
    /// The images that the running domain is on, by target; empty if it is shut off.
    pub live: Vec<(String, Id)>,
    /// The images that the domain is on at its next start.
    pub config: Vec<(String, Id)>,
    /// Images that deleted snapshots froze, and that stayed because they were needed.
    pub former: BTreeSet<Id>,
    /// An earlier delete of the snapshots was interrupted.
    pub begun: bool,
}

/// A merge: a base, and the overlays above it, from the bottom up, that are merged into it.
#[derive(Clone, Debug)]
pub struct Merge {
    pub base: Id,
    pub overlays: Vec<Id>,
}

/// The result of the planning.
#[derive(Debug, Default)]
pub struct Plan {
    pub merges: Vec<Merge>,
    /// The files that are not needed after the merges.
    pub removed: BTreeSet<Id>,
    /// [`Situation::former`] after the delete.
    pub former: BTreeSet<Id>,
}

/// Why the delete is refused.
#[derive(Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// An overlay that nothing refers to may have the newest data of a disk.
    Stray { target: String, overlay: Id },
    /// The images of this disk of a snapshot would be removed, but the domain has no disk on them
    /// any more.
    Detached { target: String, image: Id },
}

impl Situation {
    /// Plans which images are merged, and which are removed.
    pub fn plan(&self) -> Result<Plan, Obstacle> {
        let graph = &self.graph;
        let live: Vec<Id> = self.live.iter().map(|(_, image)| image.clone()).collect();
        let in_use: Vec<Id> =
            live.iter().chain(self.config.iter().map(|(_, image)| image)).cloned().collect();
        let pinned: BTreeSet<Id> =
            self.kept.iter().flat_map(|kept| kept.images.iter().cloned()).collect();
        let anchored = graph.with_all_below(in_use.iter().chain(&pinned));
        let images: BTreeSet<Id> =
            self.deleted.iter().flat_map(Snapshot::frozen).chain(&self.former).cloned().collect();
        // An image that a snapshot froze does not have a disk's newest data, even if an earlier
        // snapshot names it as its overlay.
        let frozen = graph.with_all_below(&images);
        let is_stray = |overlay: &Id| {
            graph.get(overlay).is_some() && !anchored.contains(overlay) && !frozen.contains(overlay)
        };
        let strays = self.kept.iter().flat_map(|kept| &kept.overlays).map(|(_, overlay)| overlay);
        let needed = &anchored | &graph.with_all_below(strays.filter(|overlay| is_stray(overlay)));

        for (target, overlay) in self.deleted.iter().flat_map(|deleted| &deleted.overlays) {
            if is_stray(overlay)
                && !needed.contains(overlay)
                && !self.was_merged(overlay, &images, |image| {
                    in_use.contains(image) || pinned.contains(image)
                })
            {
                return Err(Obstacle::Stray { target: target.clone(), overlay: overlay.clone() });
            }
        }
        let overlays = self
            .deleted
            .iter()
            .flat_map(|deleted| deleted.overlays.iter().map(|(_, overlay)| overlay.clone()));
        let written = frozen.iter().cloned().chain(overlays);
        let removed: BTreeSet<Id> =
            written.filter(|image| !needed.contains(image) && self.is_overlay(image)).collect();
        self.check_attached(&removed)?;

        let fixed: BTreeSet<Id> = self
            .kept
            .iter()
            .filter(|kept| kept.fixed)
            .flat_map(|kept| kept.images.iter().cloned())
            .collect();
        let differs =
            |image: &Id| in_use.contains(image) && !live.is_empty() && !live.contains(image);
        // The one overlay that can be merged into an image.
        let mergeable = |image: &Id| -> Option<Id> {
            if !images.contains(image)
                || !needed.contains(image)
                || pinned.contains(image)
                || in_use.contains(image)
            {
                return None;
            }
            let mut overlays = graph.overlays(image).filter(|overlay| !removed.contains(*overlay));
            let (overlay, None) = (overlays.next()?, overlays.next()) else { return None };
            let whole = anchored.contains(overlay) && !fixed.contains(overlay) && !differs(overlay);
            (whole && self.is_overlay(overlay)).then(|| overlay.clone())
        };
        let uppers: BTreeSet<Id> = images.iter().filter_map(mergeable).collect();
        let bases = images.iter().filter(|image| !uppers.contains(*image));
        let merges: Vec<Merge> = bases
            .map(|base| Merge {
                base: base.clone(),
                overlays: std::iter::successors(mergeable(base), mergeable).collect(),
            })
            .filter(|merge| !merge.overlays.is_empty())
            .collect();
        // An image takes the place of one that was merged into it and that other overlays are on.
        let merged: BTreeSet<&Id> = merges.iter().flat_map(|merge| &merge.overlays).collect();
        let merged_into = |base: &Id| {
            merges.iter().find(|merge| merge.base == *base).map(|merge| &merge.overlays)
        };
        let is_former = |image: &&Id| match merged_into(image) {
            Some(overlays) => overlays.last().is_some_and(|top| images.contains(top)),
            None => {
                graph.overlays(image).next().is_some()
                    && !removed.contains(*image)
                    && !merged.contains(image)
            }
        };
        let former = images.iter().filter(is_former).cloned().collect();
        Ok(Plan { merges, removed, former })
    }

    /// Whether a snapshot or a revert made an image. That a record names the image is no proof: the
    /// record can be wrong, or be edited to have another file removed.
    pub fn is_overlay(&self, image: &Id) -> bool {
        let Some(backing) = self.graph.get(image).and_then(|image| image.backing.as_ref()) else {
            return false;
        };
        revert_file::has_revert_name(image) || self.is_frozen(backing)
    }

    /// Whether a snapshot froze this image.
    fn is_frozen(&self, image: &Id) -> bool {
        self.former.contains(image)
            || self
                .deleted
                .iter()
                .chain(&self.kept)
                .flat_map(Snapshot::frozen)
                .any(|frozen| frozen == image)
    }

    /// Whether an interrupted delete has merged an overlay: the domain or a snapshot is on the
    /// image that it was merged into.
    fn was_merged(
        &self,
        overlay: &Id,
        images: &BTreeSet<Id>,
        is_used: impl Fn(&Id) -> bool,
    ) -> bool {
        self.begun
            && self
                .graph
                .chain(overlay)
                .skip(1)
                .any(|below| images.contains(below) && is_used(below))
    }

    /// Refuses to remove images of a disk that the domain does not have. That includes an image
    /// that a snapshot froze: another client may have made it the disk's newest image since.
    fn check_attached(&self, removed: &BTreeSet<Id>) -> Result<(), Obstacle> {
        for switched in self.deleted.iter().flat_map(|deleted| &deleted.switched) {
            let Some(image) = switched.image.as_ref().filter(|image| removed.contains(*image))
            else {
                continue;
            };
            let lineage: BTreeSet<&Id> = self.graph.chain(image).collect();
            let is_on_it = |(target, top): &(String, Id)| {
                let mut common = self.graph.chain(top).filter(|layer| lineage.contains(layer));
                common.any(|layer| *target == switched.target || self.is_frozen(layer))
            };
            if !self.live.iter().chain(&self.config).any(is_on_it) {
                return Err(Obstacle::Detached {
                    target: switched.target.clone(),
                    image: image.clone(),
                });
            }
        }
        Ok(())
    }
}

impl Snapshot {
    /// The images that the snapshot froze.
    pub fn frozen(&self) -> impl Iterator<Item = &Id> {
        self.switched.iter().filter_map(|switched| switched.image.as_ref())
    }
}

impl Plan {
    /// The overlays that are removed, after a merge or without one.
    pub fn goes(&self) -> impl Iterator<Item = &Id> {
        self.merges.iter().flat_map(|merge| &merge.overlays).chain(&self.removed)
    }

    /// All images that are changed or removed.
    pub fn touched(&self, graph: &Graph) -> BTreeSet<Id> {
        let mut touched = self.removed.clone();
        for merge in &self.merges {
            touched.insert(merge.base.clone());
            touched.extend(merge.overlays.iter().cloned());
            // These overlays get the base as their backing file.
            touched.extend(
                merge.overlays.last().into_iter().flat_map(|top| graph.overlays(top)).cloned(),
            );
        }
        touched
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::engine::revert::plan::{self as revert, Left};
    use crate::random::Random;

    type Content = BTreeMap<usize, u32>;

    #[derive(Debug, Default)]
    struct File {
        backing: Option<Id>,
        data: Content,
    }

    #[derive(Clone, Debug)]
    struct Taken {
        name: usize,
        parent: Option<usize>,
        /// Target, image, overlay.
        disks: Vec<(String, Id, Id)>,
        /// The overlays that it named before a revert to it.
        left: Vec<(String, Id)>,
        contents: Vec<Content>,
    }

    /// A simulated domain: its images, its snapshots, and the content that they must have.
    #[derive(Debug, Default)]
    struct Simulated {
        files: BTreeMap<Id, File>,
        attached: Vec<(String, Id)>,
        /// Detached disks, with their content.
        detached: Vec<(String, Id, Content)>,
        taken: Vec<Taken>,
        current: Option<usize>,
        former: BTreeSet<Id>,
        number: u32,
    }

    impl Simulated {
        fn content(&self, top: &Id) -> Content {
            let file = self.files.get(top).unwrap_or_else(|| panic!("{} is gone", top.display()));
            let mut content =
                file.backing.as_ref().map(|below| self.content(below)).unwrap_or_default();
            content.extend(file.data.clone());
            content
        }

        fn next(&mut self) -> u32 {
            self.number += 1;
            self.number
        }

        fn create(&mut self, name: String, backing: Option<&Id>) -> Id {
            let id = Id::from(name);
            self.files.insert(id.clone(), File { backing: backing.cloned(), data: Content::new() });
            id
        }

        fn write(&mut self, random: &mut Random) {
            for (_, top) in self.attached.clone() {
                let (block, value) = (random.below(6), self.next());
                self.files.get_mut(&top).unwrap().data.insert(block, value);
            }
        }

        fn snapshot(&mut self) {
            let name = self.next() as usize;
            let (mut disks, mut contents) = (Vec::new(), Vec::new());
            for (target, image) in std::mem::take(&mut self.attached) {
                contents.push(self.content(&image));
                let overlay = self.create(format!("/{target}.{name}"), Some(&image));
                disks.push((target.clone(), image, overlay.clone()));
                self.attached.push((target, overlay));
            }
            self.taken.push(Taken { name, parent: self.current, disks, left: vec![], contents });
            self.current = Some(name);
        }

        /// Reverts as [`crate::engine::revert::managed`] does, by its plan.
        fn revert(&mut self, place: usize) {
            let before = std::mem::take(&mut self.attached);
            let left = before.iter().map(|(target, image)| {
                let below = self.files[image].backing.clone();
                Left { target: target.clone(), image: image.clone(), below }
            });
            let frozen =
                self.taken.iter().flat_map(|taken| &taken.disks).map(|(_, image, _)| image);
            let frozen: BTreeSet<Id> = frozen.cloned().collect();
            let overlays = self.taken.iter().flat_map(|taken| &taken.disks);
            let mut situation = revert::Situation {
                left: left.collect(),
                snapshots: frozen.clone(),
                frozen: &frozen | &self.former,
                overlays: overlays.map(|(.., overlay)| overlay.clone()).collect(),
                ..revert::Situation::default()
            };
            let mut to = self.taken[place].clone();
            for (target, image, overlay) in &mut to.disks {
                to.left.push((target.clone(), overlay.clone()));
                let number = self.next();
                *overlay =
                    self.create(format!("/{target}.{}-{number:06}.revert", to.name), Some(image));
                self.attached.push((target.clone(), overlay.clone()));
                situation.restored.push((target.clone(), image.clone()));
                situation.fresh.insert(overlay.clone());
            }
            to.left.retain(|(_, overlay)| self.files.contains_key(overlay));
            self.taken[place] = to.clone();
            for (image, file) in &self.files {
                situation.graph.insert(image, file.backing.as_ref());
            }
            // The domain gets the disks of the snapshot: a disk that was attached since is
            // detached.
            for (target, top) in before {
                let again = to.disks.iter().find(|(disk, ..)| *disk == target);
                let below = again.map(|(_, image, _)| self.chain(image)).unwrap_or_default();
                if !self.chain(&top).iter().any(|layer| below.contains(layer)) {
                    let content = self.content(&top);
                    self.detached.push((target, top, content));
                }
            }
            for overlay in situation.unneeded() {
                self.files.remove(overlay);
            }
            self.current = Some(to.name);
        }

        fn chain(&self, top: &Id) -> Vec<Id> {
            std::iter::successors(Some(top.clone()), |id| self.files[id].backing.clone()).collect()
        }

        fn situation(&self, deleted: &[usize]) -> Situation {
            let snapshot = |taken: &Taken| Snapshot {
                switched: taken
                    .disks
                    .iter()
                    .map(|(target, image, _)| Switched {
                        target: target.clone(),
                        image: Some(image.clone()),
                    })
                    .collect(),
                images: taken.disks.iter().map(|(_, image, _)| image.clone()).collect(),
                overlays: taken
                    .disks
                    .iter()
                    .map(|(target, _, overlay)| (target.clone(), overlay.clone()))
                    .chain(taken.left.clone())
                    .collect(),
                fixed: taken.disks.is_empty(),
            };
            // Files that neither the domain nor a snapshot names are not known.
            let mut graph = Graph::default();
            let tops =
                self.taken.iter().flat_map(|taken| taken.disks.iter().flat_map(|(_, i, o)| [i, o]));
            let tops = tops
                .chain(self.taken.iter().flat_map(|taken| taken.left.iter().map(|(_, left)| left)));
            for top in tops
                .chain(self.attached.iter().map(|(_, top)| top))
                .filter(|top| self.files.contains_key(*top))
            {
                for layer in self.chain(top) {
                    graph.insert(&layer, self.files[&layer].backing.as_ref());
                }
            }
            let part = |is_deleted: bool| {
                let taken = self
                    .taken
                    .iter()
                    .filter(move |taken| deleted.contains(&taken.name) == is_deleted);
                taken.map(snapshot).collect()
            };
            Situation {
                graph,
                deleted: part(true),
                kept: part(false),
                live: self.attached.clone(),
                config: self.attached.clone(),
                former: self.former.clone(),
                begun: false,
            }
        }

        fn descendants(&self, name: usize) -> Vec<usize> {
            let mut found = vec![name];
            for taken in &self.taken {
                if taken.parent.is_some_and(|parent| found.contains(&parent)) {
                    found.push(taken.name);
                }
            }
            found
        }

        /// Deletes as [`crate::engine::delete::managed`] does. Returns false if the plan refuses.
        fn delete(&mut self, deleted: &[usize]) -> bool {
            let situation = self.situation(deleted);
            let plan = match situation.plan() {
                Ok(plan) => plan,
                Err(obstacle) => {
                    assert!(!self.detached.is_empty(), "{obstacle:?} {self:#?}");
                    return false;
                }
            };
            for merge in &plan.merges {
                let top = merge.overlays.last().unwrap();
                for overlay in &merge.overlays {
                    let data = self.files[overlay].data.clone();
                    self.files.get_mut(&merge.base).unwrap().data.extend(data);
                }
                for upper in situation.graph.overlays(top) {
                    self.files.get_mut(upper).unwrap().backing = Some(merge.base.clone());
                }
                let moved = |id: &mut Id| {
                    if merge.overlays.contains(id) {
                        id.clone_from(&merge.base);
                    }
                };
                self.attached.iter_mut().for_each(|(_, top)| moved(top));
                let kept = self.taken.iter_mut().filter(|taken| !deleted.contains(&taken.name));
                kept.flat_map(|taken| &mut taken.disks).for_each(|(_, image, overlay)| {
                    moved(image);
                    moved(overlay);
                });
                self.files.retain(|id, _| !merge.overlays.contains(id));
            }
            self.files.retain(|id, _| !plan.removed.contains(id));
            self.former = plan.former;
            for name in deleted {
                let parent = self.taken.iter().find(|taken| taken.name == *name).unwrap().parent;
                let orphaned = self.taken.iter_mut().filter(|taken| taken.parent == Some(*name));
                orphaned.for_each(|taken| taken.parent = parent);
                self.taken.retain(|taken| taken.name != *name);
            }
            if self.taken.is_empty() {
                // Without snapshots no record can have the note.
                self.former.clear();
            }
            true
        }

        fn check(&self, attached: &[Content]) {
            for taken in &self.taken {
                for ((_, image, _), content) in taken.disks.iter().zip(&taken.contents) {
                    assert_eq!(self.content(image), *content, "snapshot {} {self:#?}", taken.name);
                }
            }
            for ((_, top), content) in self.attached.iter().zip(attached) {
                assert_eq!(self.content(top), *content, "the domain's {} {self:#?}", top.display());
            }
            for (_, top, content) in &self.detached {
                assert_eq!(self.content(top), *content, "the detached {} {self:#?}", top.display());
            }
        }
    }

    #[test]
    fn whatever_was_done_no_delete_loses_what_a_snapshot_the_domain_or_a_detached_disk_has() {
        for seed in 1..160 {
            let mut random = Random(u64::wrapping_mul(seed, 0x9e37_79b9_7f4a_7c15));
            let mut domain = Simulated::default();
            for target in ["vda", "vdb"] {
                let golden = domain.create(format!("/{target}.golden"), None);
                let own = domain.create(format!("/{target}.own"), Some(&golden));
                domain.attached.push((target.into(), own));
            }
            for _ in 0..40 {
                domain.write(&mut random);
                let attached = |domain: &Simulated| -> Vec<Content> {
                    domain.attached.iter().map(|(_, top)| domain.content(top)).collect()
                };
                let before = attached(&domain);
                match random.below(10) {
                    0..=3 => domain.snapshot(),
                    4 | 5 if !domain.taken.is_empty() => {
                        let to = random.below(domain.taken.len());
                        domain.revert(to);
                        domain.check(&attached(&domain));
                        continue;
                    }
                    6 if seed % 3 == 0 && !domain.attached.is_empty() => {
                        let (target, top) =
                            domain.attached.remove(random.below(domain.attached.len()));
                        let content = domain.content(&top);
                        domain.detached.push((target, top, content));
                        continue;
                    }
                    7..=9 if !domain.taken.is_empty() => {
                        let name = domain.taken[random.below(domain.taken.len())].name;
                        let mut deleted = match random.below(4) {
                            0 => vec![name],
                            1 => domain.descendants(name),
                            // Only the descendants.
                            2 => domain.descendants(name).split_off(1),
                            _ => domain
                                .taken
                                .iter()
                                .map(|taken| taken.name)
                                .filter(|_| random.below(2) == 0)
                                .collect(),
                        };
                        deleted.reverse();
                        domain.delete(&deleted);
                    }
                    _ => {}
                }
                domain.check(&before);
                if domain.taken.is_empty() && seed % 3 != 0 {
                    assert!(
                        domain
                            .attached
                            .iter()
                            .all(|(_, top)| top.to_string_lossy().ends_with(".own")),
                        "{domain:#?}"
                    );
                    assert_eq!(domain.files.len(), 4, "{domain:#?}");
                }
            }
        }
    }
}
