// SPDX-License-Identifier: LGPL-2.1-or-later

//! Plans which of the overlays that a domain leaves behind by a revert are removed. The plan is
//! made of values only.
//!
//! An overlay is removed if
//!
//! * a snapshot or a revert made it: a snapshot names it, or its name is that of a revert's file,
//!   or its backing file is an image that a snapshot froze;
//! * no snapshot needs it, and the domain does not run on it;
//! * the revert restores the same disk: a revert is meant to lose the data above the snapshot's
//!   image. A disk that the snapshot does not have keeps all its images.
//!
//! In doubt a file stays.

use std::collections::BTreeSet;

use crate::backend::images::{Graph, Id};
use crate::backend::revert_file;

/// A disk of the domain before the revert.
#[derive(Clone, Debug)]
pub struct Left {
    /// The disk's target.
    pub target: String,
    /// The image that the domain used.
    pub image: Id,
    /// The backing file of that image, if it has one.
    pub below: Option<Id>,
}

/// The facts that the plan is made from.
#[derive(Debug, Default)]
pub struct Situation {
    /// The images with their backing files.
    pub graph: Graph,
    /// The disks that the domain had.
    pub left: Vec<Left>,
    /// The images of the snapshot that the domain is reverted to, by target.
    pub restored: Vec<(String, Id)>,
    /// The overlays that the domain runs on now.
    pub fresh: BTreeSet<Id>,
    /// The images of all snapshots.
    pub snapshots: BTreeSet<Id>,
    /// The overlays that snapshots name.
    pub overlays: BTreeSet<Id>,
    /// The images that snapshots froze, deleted ones included.
    pub frozen: BTreeSet<Id>,
}

impl Situation {
    /// The overlays that the domain and its snapshots do not need any more. Another guest may still
    /// use one.
    pub fn unneeded(&self) -> Vec<&Id> {
        let needed = &self.graph.with_all_below(&self.snapshots) | &self.fresh;
        let is_unneeded = |left: &&Left| {
            self.is_ours(left) && !needed.contains(&left.image) && self.is_restored(left)
        };
        self.left.iter().filter(is_unneeded).map(|left| &left.image).collect()
    }

    /// Whether a snapshot or a revert made the image.
    fn is_ours(&self, left: &Left) -> bool {
        self.overlays.contains(&left.image)
            || revert_file::has_revert_name(&left.image)
            || left.below.as_ref().is_some_and(|below| self.frozen.contains(below))
    }

    /// Whether the revert restores this disk to an image of its chain.
    fn is_restored(&self, left: &Left) -> bool {
        let restored = self.restored.iter().find(|(target, _)| *target == left.target);
        let Some((_, image)) = restored else { return false };
        let lineage: BTreeSet<&Id> = self.graph.chain(image).collect();
        let mut layers = self.graph.chain(&left.image);
        layers.any(|layer| lineage.contains(layer) && self.frozen.contains(layer))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A domain on `vda`: `base` frozen by a snapshot, the guest on `overlay`.
    fn situation() -> Situation {
        let [base, overlay, fresh] = ["/base", "/overlay", "/base.s-abcdef.revert"].map(Id::from);
        let mut graph = Graph::default();
        graph.insert(&base, None);
        graph.insert(&overlay, Some(&base));
        graph.insert(&fresh, Some(&base));
        Situation {
            graph,
            left: vec![Left {
                target: "vda".into(),
                image: overlay.clone(),
                below: Some(base.clone()),
            }],
            restored: vec![("vda".into(), base.clone())],
            fresh: [fresh].into(),
            snapshots: [base.clone()].into(),
            overlays: [overlay].into(),
            frozen: [base].into(),
        }
    }

    #[test]
    fn what_the_guest_wrote_since_the_snapshot_goes() {
        assert_eq!(situation().unneeded(), [&Id::from("/overlay")]);
        // The overlay is recognized by its backing file alone.
        let situation = Situation { overlays: BTreeSet::new(), ..situation() };
        assert_eq!(situation.unneeded(), [&Id::from("/overlay")]);
    }

    #[test]
    fn what_a_snapshot_stands_on_stays() {
        let mut situation = situation();
        let younger = Id::from("/younger");
        situation.graph.insert(&younger, Some(&Id::from("/overlay")));
        situation.snapshots.insert(younger);
        assert!(situation.unneeded().is_empty());
    }

    #[test]
    fn a_disk_that_is_not_brought_back_keeps_all_that_it_has() {
        let other = Situation { restored: vec![("vdb".into(), "/base".into())], ..situation() };
        assert!(other.unneeded().is_empty());
        // Another disk has this target by now.
        let mut another = situation();
        another.graph.insert(&"/another".into(), None);
        another.graph.insert(&"/another.s-abcdef.revert".into(), Some(&"/another".into()));
        another.left[0] = Left {
            target: "vda".into(),
            image: "/another.s-abcdef.revert".into(),
            below: Some("/another".into()),
        };
        assert!(another.unneeded().is_empty());
    }

    #[test]
    fn an_image_that_the_user_made_stays() {
        let mut situation = situation();
        let own = Id::from("/own");
        situation.graph.insert(&own, Some(&Id::from("/between")));
        situation.graph.insert(&Id::from("/between"), Some(&Id::from("/base")));
        situation.left[0] =
            Left { target: "vda".into(), image: own, below: Some("/between".into()) };
        assert!(situation.unneeded().is_empty());
    }
}
