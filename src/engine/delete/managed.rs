// SPDX-License-Identifier: LGPL-2.1-or-later

//! Deletes snapshots of a domain of a stock libvirt.
//!
//! libvirt 9.9 and later can delete a snapshot that has at most one child and whose overlays the
//! domain is on. If libvirt can delete it, libvirt does ([`stock_can`]). Otherwise it is done here,
//! as [`plan`](super::plan) plans it.
//!
//! Nothing is changed while another QEMU has one of these images open, or another domain of the
//! connection needs one.
//!
//! The order of the steps ensures that an interrupted delete loses nothing, and can be repeated.
//! First the memory images of the deleted snapshots are renamed to `….deleting`, and the directory
//! is synced, so that no caller can revert to a snapshot whose images are partly merged. Then the
//! images are merged, and after each merge the definitions that name its images are changed. Then
//! libvirt forgets the deleted snapshots. Files are removed last.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::plan::{self, Merge, Obstacle, Plan, Situation, Switched};
use super::renew::Renewal;
use crate::backend::images::{self, Graph, Id, Image, id};
use crate::backend::libvirt::forget::{by_libvirt, forget_alone};
use crate::backend::libvirt::snapshot_def::{Replaced, SnapshotDef, domain_with_replaced};
use crate::backend::libvirt::{
    BlockCommit, CallError, ManagedDomain, ManagedSnapshot, MergeFailure, SnapshotTree, volumes,
};
use crate::engine::users::Users;
use crate::error::{Code, Error, Result, fail};
use crate::image::{deleting, is_another, pages_file_of, remove_pages_file};
use crate::libvirt::xml;
use crate::model::domain::{Disk, Source, Storage, domain_disks};
use crate::model::flags::DeleteFlags;
use crate::model::snapshot_xml::SnapshotDisk;
use crate::sys;

/// The first libvirt that deletes snapshots with a memory image. It also crashes when it reverts
/// without a current snapshot.
const STOCK_DELETES: (u64, u64, u64) = (9, 9, 0);

/// Deletes a snapshot. The domain is held.
pub fn run(snapshot: &ManagedSnapshot, flags: DeleteFlags) -> Result<()> {
    let domain = &snapshot.domain;
    let tree = SnapshotTree::read(domain)?;
    let target = tree.get(&snapshot.name)?;
    if flags.is_metadata_only() {
        return forget_alone(domain, &tree, target, flags);
    }
    let version = domain.version()?;
    let users = Users::read(domain, &tree.volumes)?;
    if flags == DeleteFlags::NONE && stock_can(domain, version, &tree, target)? {
        let touched = target.external().filter_map(changed_by_libvirt).flatten().collect();
        check_unused(&users, &target.name, &touched)?;
        let kept: Vec<&SnapshotDef> =
            tree.snapshots.iter().filter(|other| other.name != target.name).collect();
        let renewal = Renewal::begin(domain, &tree, &kept, &touched)?;
        let deleted = snapshot.delete_by_libvirt(flags);
        if matches!(deleted, Err(CallError::Late | CallError::Lost(_))) {
            // The delete may still go on, and change the images that would be noted.
            return deleted.map_err(|error| by_libvirt(error, &target.name));
        }
        // Even a delete that failed halfway keeps the content of the other snapshots' images.
        renewal.end(domain, None)?;
        return deleted.map_err(|error| by_libvirt(error, &target.name));
    }
    Delete::prepare(domain, version, &tree, target, flags)?.run(&users)
}

/// Whether libvirt's own delete is used.
pub fn is_libvirts(snapshot: &ManagedSnapshot, flags: DeleteFlags) -> Result<bool> {
    if flags.is_metadata_only() {
        return Ok(true);
    }
    let domain = &snapshot.domain;
    let tree = SnapshotTree::read(domain)?;
    let target = tree.get(&snapshot.name)?;
    Ok(flags == DeleteFlags::NONE && stock_can(domain, domain.version()?, &tree, target)?)
}

/// Whether libvirt's own delete, if it has one, works: on a running domain that is on the
/// snapshot's overlays, directly above its images. (Of any other snapshot without children, libvirt
/// removes the images without a check whether they are needed.)
fn stock_can(
    domain: &ManagedDomain,
    version: (u64, u64, u64),
    tree: &SnapshotTree,
    target: &SnapshotDef,
) -> Result<bool> {
    if version < STOCK_DELETES {
        return Ok(false);
    }
    let step = "cannot look at the domain";
    if !domain.is_active().map_err(|error| error.into_error(step))? {
        return Ok(false);
    }
    let live = domain_disks(&domain.xml(0).map_err(|error| error.into_error(step))?)?;
    let is_on = |(disk, image): (&SnapshotDisk, Option<&Disk>)| {
        let (Some(overlay), Some(image)) =
            (&disk.overlay, image.and_then(|image| image.file.as_ref()))
        else {
            return false;
        };
        let layers = live
            .iter()
            .find(|live| live.target == disk.target)
            .map(Disk::layers)
            .unwrap_or_default();
        layers.windows(2).any(|pair| id(pair[0]) == id(overlay) && id(pair[1]) == id(image))
    };
    let children = tree.children(&target.name).count();
    let files = target
        .images()
        .filter_map(|image| image.file.as_deref())
        .all(|file| Path::new(file).is_file());
    let shared = tree
        .snapshots
        .iter()
        .filter(|other| other.name != target.name)
        .flat_map(SnapshotDef::images)
        .any(|image| {
            let theirs = image.file.as_deref().map(id);
            target
                .external()
                .any(|(_, own)| own.and_then(|own| own.file.as_deref()).map(id) == theirs)
        });
    let begun = target.memory.as_deref().is_some_and(|memory| deleting(Path::new(memory)).exists());
    // libvirt does not know of overlays that the snapshot named before a revert to it: a merge
    // would change the image below them.
    let left = target.notes.left.iter().any(|(_, file)| images::is_there(file, "qcow2"));
    // libvirt does not know of images either that stayed when their snapshots were deleted, and
    // that can be removed now.
    let former = tree.snapshots.iter().any(|snapshot| !snapshot.notes.former.is_empty());
    // libvirt cannot remove an overlay on a block device.
    let overlays = target.external().filter_map(|(disk, _)| disk.overlay.as_deref());
    let files = files && overlays.map(Path::new).all(Path::is_file);
    let rooted = target.parent.is_some() || !tree.is_current(target) || tree.snapshots.len() == 1;
    // libvirt has no paths for volumes.
    let rooted = rooted && !tree.snapshots.iter().any(|snapshot| snapshot.on_volumes);
    let alone = children <= usize::from(!tree.is_current(target)) && !shared && rooted;
    Ok(alone && files && !begun && !left && !former && target.external().all(is_on))
}

/// The images of a disk that libvirt's own delete changes or removes.
fn changed_by_libvirt((disk, image): (&SnapshotDisk, Option<&Disk>)) -> Option<[Id; 2]> {
    Some([id(disk.overlay.as_deref()?), id(image?.file.as_deref()?)])
}

/// Refuses to change or remove images that other guests use.
fn check_unused(users: &Users, target: &str, touched: &BTreeSet<Id>) -> Result<()> {
    for image in touched {
        if let Some(user) = users.of(image) {
            fail!(
                OperationInvalid,
                "cannot delete snapshot '{}': the image '{}' would be changed or removed, and \
                 {user}: end that guest, or take the image from it, or delete the metadata alone \
                 (VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY); nothing was changed",
                target,
                image.display()
            );
        }
    }
    Ok(())
}

struct Delete<'a> {
    domain: &'a ManagedDomain,
    version: (u64, u64, u64),
    tree: &'a SnapshotTree,
    /// The snapshots to delete, children first.
    deleted: Vec<&'a SnapshotDef>,
    kept: Vec<&'a SnapshotDef>,
    /// The disks of the running domain; empty if it is shut off.
    live: Vec<Disk>,
    /// The disks of the domain's definition.
    config: Vec<Disk>,
    /// The images that the domain is on now, and at its next start, by target. Images on volumes
    /// are included.
    tops: [Vec<(String, Id)>; 2],
}

fn has_data_elsewhere(graph: &Graph, image: &Id) -> bool {
    graph.get(image).is_some_and(|image| image.has_data_elsewhere)
}

impl<'a> Delete<'a> {
    fn prepare(
        domain: &'a ManagedDomain,
        version: (u64, u64, u64),
        tree: &'a SnapshotTree,
        target: &'a SnapshotDef,
        flags: DeleteFlags,
    ) -> Result<Delete<'a>> {
        let mut names =
            if flags == DeleteFlags::CHILDREN_ONLY { vec![] } else { vec![target.name.as_str()] };
        if flags != DeleteFlags::NONE {
            names.extend(tree.descendants(&target.name));
        }
        let (mut deleted, kept): (Vec<_>, Vec<_>) =
            tree.snapshots.iter().partition(|snapshot| names.contains(&snapshot.name.as_str()));
        deleted.reverse();
        if let Some(internal) = deleted.iter().find(|snapshot| snapshot.is_internal()) {
            fail!(
                OperationUnsupported,
                "cannot delete snapshot '{}' with the others: it is inside of its images; delete \
                 it first (virsh snapshot-delete)",
                internal.name
            );
        }
        let step = "cannot read the domain's XML";
        let refused = |error: CallError| error.into_error(step);
        let read = |flags| {
            let text = domain.xml(flags).map_err(refused)?;
            let named = domain_disks(&volumes::with_paths(&text, &tree.volumes)?)?;
            let known =
                named.into_iter().filter_map(|disk| Some((disk.target, id(disk.file.as_deref()?))));
            // Without paths in place of volumes: libvirt gets the names that it uses itself.
            Ok::<_, Error>((domain_disks(&text)?, known.collect()))
        };
        let none = || (Vec::new(), Vec::new());
        let (live, on) = if domain.is_active().map_err(refused)? { read(0)? } else { none() };
        let (config, later) =
            if domain.is_persistent().map_err(refused)? { read(xml::INACTIVE)? } else { none() };
        Ok(Delete { domain, version, tree, deleted, kept, live, config, tops: [on, later] })
    }

    fn run(&self, users: &Users) -> Result<()> {
        let situation = self.situation()?;
        self.check_images_are_known(&situation)?;
        let plan = situation.plan().map_err(|obstacle| self.refusal(&obstacle))?;
        self.check(&plan, &situation.graph)?;
        check_unused(users, self.name(), &plan.touched(&situation.graph))?;
        // Until the definitions of its children are changed, no caller may revert to a snapshot
        // that is being deleted.
        let hidden = if plan.merges.is_empty() && self.kept_children().next().is_none() {
            vec![]
        } else {
            self.hide_memory_images()?
        };
        let touched = plan.touched(&situation.graph);
        let renewal = Renewal::begin(self.domain, self.tree, &self.kept, &touched)
            .inspect_err(|_| restore_memory_images(&hidden))?;
        let merged = self.merge_all(&situation.graph, &plan, &hidden);
        let replaced = match merged {
            Ok(replaced) => replaced,
            Err(error) => {
                // The merges so far have kept the content of the kept snapshots' images.
                let _ = renewal.end(self.domain, None);
                return Err(error);
            }
        };
        if let Err(error) = self.change_config(&replaced, &plan) {
            let _ = renewal.end(self.domain, None);
            return Err(error);
        }
        renewal.end(self.domain, Some(&plan.former))?;
        self.forget()?;
        self.remove_files(&plan)
    }

    /// Checks that a domain that was shut off is still shut off, or does not use an image that is
    /// to be removed. Another client may have started it before its definition was changed.
    fn check_not_started(&self, plan: &Plan) -> Result<()> {
        let step = "cannot see whether the domain was started meanwhile";
        if !self.live.is_empty()
            || !self.domain.is_active().map_err(|error| error.into_error(step))?
        {
            return Ok(());
        }
        let xml = self.domain.xml(0).map_err(|error| error.into_error(step))?;
        let images = domain_disks(&volumes::with_paths(&xml, &self.tree.volumes)?)?;
        let goes = |image: &Id| plan.goes().any(|going| going == image);
        match images.iter().flat_map(Disk::layers).find(|image| goes(&id(image))) {
            Some(image) => fail!(
                OperationFailed,
                "another client has started the domain while snapshot '{}' was being deleted, and \
                 it goes on with '{image}': delete the snapshot again",
                self.name()
            ),
            None => Ok(()),
        }
    }

    /// Collects the facts that the plan is made from.
    fn situation(&self) -> Result<Situation> {
        let [live, config] = self.tops.clone();
        let memory = self.memory_files();
        Ok(Situation {
            graph: self.graph()?,
            deleted: self.deleted.iter().copied().map(known).collect(),
            kept: self.kept.iter().copied().map(known).collect(),
            live,
            config,
            former: self
                .tree
                .snapshots
                .iter()
                .flat_map(|snapshot| &snapshot.notes.former)
                .map(|file| id(file))
                .collect(),
            begun: memory.iter().all(|file| !file.exists())
                && memory.iter().any(|file| deleting(file).exists()),
        })
    }

    /// Refuses an overlay of a server's image that names the image differently from the snapshot:
    /// the two names would count as two images, and the overlay would not be merged, without an
    /// error.
    fn check_is_on(
        &self,
        situation: &Situation,
        deleted: &SnapshotDef,
        (disk, overlay): (&str, &str),
        image: &str,
    ) -> Result<()> {
        let overlay_id = id(overlay);
        if images::is_of_server(image)
            && !situation.graph.chain(&overlay_id).any(|below| *below == id(image))
        {
            fail!(
                OperationUnsupported,
                "cannot delete snapshot '{}': the overlay '{overlay}' of disk '{disk}' does not \
                 call the image below it '{image}', as the snapshot does, but {}: nothing was \
                 changed",
                deleted.name,
                images::server_of(overlay, "qcow2")
                    .map_or("differently".into(), |name| format!("'{name}'"))
            );
        }
        Ok(())
    }

    /// Refuses an overlay in use whose image has no known path: it cannot be merged into that.
    fn check_images_are_known(&self, situation: &Situation) -> Result<()> {
        let tops: Vec<&Id> =
            situation.live.iter().chain(&situation.config).map(|(_, top)| top).collect();
        let pinned = situation.kept.iter().flat_map(|kept| &kept.images);
        let used = situation.graph.with_all_below(tops.iter().copied().chain(pinned));
        for deleted in &self.deleted {
            for (disk, image) in deleted.external() {
                let Some(overlay) =
                    disk.overlay.as_deref().filter(|overlay| used.contains(&id(overlay)))
                else {
                    continue;
                };
                let Some(image) = image else { continue };
                if let Some(file) = image.file.as_deref() {
                    self.check_is_on(situation, deleted, (&disk.target, overlay), file)?;
                    continue;
                }
                let advice = match tops.contains(&&id(overlay)) {
                    true => format!(
                        "merge it while the domain runs (virsh blockcommit '{}' {} --shallow \
                         --active --pivot), remove the file, and delete the snapshot again",
                        self.domain.name, disk.target
                    ),
                    false => "delete the snapshots that came after it first".to_owned(),
                };
                fail!(
                    OperationUnsupported,
                    "cannot delete snapshot '{}': the image of disk '{}' is on storage of type \
                     '{}', and the overlay '{overlay}' cannot be merged into it: {advice}; \
                     nothing was changed",
                    deleted.name,
                    disk.target,
                    image.kind
                );
            }
        }
        Ok(())
    }

    fn refusal(&self, obstacle: &Obstacle) -> Error {
        let message = match obstacle {
            Obstacle::Stray { target, overlay } => format!(
                "neither the domain nor a snapshot refers to '{}' any more, the overlay of disk \
                 '{target}', which can hold what was written to it last: attach the disk with it \
                 again, or, where it is of no use, remove the file",
                overlay.display()
            ),
            Obstacle::Detached { target, image } => format!(
                "the domain has no disk '{target}' on the snapshot's images any more, of which '{}' \
                 would be removed: attach the disk again",
                image.display()
            ),
        };
        let message = format!(
            "cannot delete snapshot '{}': {message}; or delete the metadata alone \
             (VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY) and keep or remove the files yourself; \
             nothing was changed",
            self.name()
        );
        Error::new(Code::OperationInvalid, message)
    }

    /// All images of the domain and of its snapshots.
    fn graph(&self) -> Result<Graph> {
        let mut graph = Graph::default();
        let disks = self
            .tree
            .snapshots
            .iter()
            .flat_map(SnapshotDef::images)
            .chain(&self.live)
            .chain(&self.config);
        let images = disks.filter_map(|disk| Some((disk.file.as_deref()?, disk.format.as_str())));
        let overlays = self.tree.snapshots.iter().flat_map(SnapshotDef::overlays);
        let left = self.tree.snapshots.iter().flat_map(|snapshot| &snapshot.notes.left);
        let left = left.map(|(_, overlay)| (overlay.as_str(), "qcow2"));
        for (file, format) in images.chain(overlays).chain(left) {
            graph.add(file, format)?;
        }
        Ok(graph)
    }

    fn check(&self, plan: &Plan, graph: &Graph) -> Result<()> {
        if plan.merges.is_empty() {
            return Ok(());
        }
        let step = "cannot look at the domain";
        if self.domain.has_managed_save().map_err(|error| error.into_error(step))? {
            fail!(
                OperationInvalid,
                "cannot delete snapshot '{}': the domain has a managed save image, which needs its \
                 disks as they are: start the domain, or remove the image (virsh \
                 managedsave-remove)",
                self.name()
            );
        }
        self.check_servers(plan, graph)?;
        for disk in self.live.iter().filter(|disk| disk.present) {
            if self.domain.has_block_job(&disk.target).map_err(|error| error.into_error(step))? {
                fail!(
                    OperationInvalid,
                    "cannot delete snapshot '{}': disk '{}' has an active block job: wait for it, \
                     or abort it (virsh blockjob)",
                    self.name(),
                    disk.target
                );
            }
        }
        Ok(())
    }

    /// Checks that qemu-img can read the images on servers that a merge needs: it would wait for a
    /// server without end.
    fn check_servers(&self, plan: &Plan, graph: &Graph) -> Result<()> {
        let is_live = |top: &Id| {
            self.live.iter().any(|disk| disk.layers().iter().any(|layer| id(layer) == *top))
        };
        for merge in plan.merges.iter().filter(|merge| !merge.overlays.last().is_some_and(is_live))
        {
            let lowest = graph.chain(&merge.base).last().and_then(|lowest| graph.get(lowest));
            let Some(lowest) = lowest.filter(|lowest| images::is_of_server(&lowest.path)) else {
                continue;
            };
            images::size_on_server(&lowest.path, &lowest.format).map_err(|error| {
                let advice = match self.live.is_empty() {
                    true => "delete it when the server answers",
                    false => {
                        "if the server accepts only the domain's QEMU, shut the domain off, and \
                         delete it then"
                    }
                };
                error.and(format!(
                    "snapshot '{}' cannot be deleted now: {advice}; nothing was changed",
                    self.name()
                ))
            })?;
        }
        Ok(())
    }

    /// The snapshot's name, for messages.
    fn name(&self) -> &str {
        self.deleted.last().map_or("", |deleted| &deleted.name)
    }

    /// The kept snapshots whose parents are deleted.
    fn kept_children(&self) -> impl Iterator<Item = &SnapshotDef> {
        let goes = |name: &String| self.deleted.iter().any(|deleted| deleted.name == *name);
        self.kept.iter().copied().filter(move |kept| kept.parent.as_ref().is_some_and(goes))
    }

    /// Renames the memory images of the deleted snapshots. Returns those that were renamed.
    fn hide_memory_images(&self) -> Result<Vec<PathBuf>> {
        let mut hidden = Vec::new();
        for memory in self.memory_files() {
            match std::fs::rename(&memory, deleting(&memory)) {
                Ok(()) => hidden.push(memory.clone()),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => {
                    restore_memory_images(&hidden);
                    return Err(self.cannot_rename(&memory, error));
                }
            }
            // A power cut must not bring the old name back once images are being merged. Also, a
            // rename by an earlier, interrupted delete may not be on disk yet.
            if deleting(&memory).exists()
                && let Err(error) = sys::sync_parent(&memory)
            {
                restore_memory_images(&hidden);
                return Err(self.cannot_rename(&memory, error));
            }
        }
        Ok(hidden)
    }

    fn cannot_rename(&self, memory: &Path, error: std::io::Error) -> Error {
        let step = format!(
            "cannot delete snapshot '{}': cannot rename its memory image '{}'",
            self.name(),
            memory.display()
        );
        Error::system(step, error)
    }

    /// The memory images of the deleted snapshots, except those that a kept snapshot names too.
    fn memory_files(&self) -> BTreeSet<PathBuf> {
        let files = |snapshots: &[&SnapshotDef]| -> BTreeSet<PathBuf> {
            snapshots
                .iter()
                .filter_map(|snapshot| snapshot.memory.as_ref())
                .map(PathBuf::from)
                .collect()
        };
        // A definition can name any file.
        let mut files = &files(&self.deleted) - &files(&self.kept);
        files.retain(|file| !is_another(file));
        files
    }

    /// Merges the images, and changes the definitions after each merge. Returns which images were
    /// replaced by which.
    fn merge_all(&self, graph: &Graph, plan: &Plan, hidden: &[PathBuf]) -> Result<Vec<Replaced>> {
        let mut replaced = Vec::new();
        for merge in &plan.merges {
            self.merge(graph, merge).map_err(|failure| {
                if failure.begun || !replaced.is_empty() {
                    let more = format!(
                        "the domain and its other snapshots are intact, but '{}' cannot be reverted \
                         to any more: delete it again",
                        self.name()
                    );
                    return failure.error.and(more);
                }
                restore_memory_images(hidden);
                failure.error.and("nothing was changed")
            })?;
            let base = graph.get(&merge.base).expect("an image of the graph");
            replaced.push(Replaced {
                images: merge.overlays.clone(),
                by: Storage::at(&base.path),
                format: base.format.clone(),
            });
            self.change_records(&replaced)?;
        }
        Ok(replaced)
    }

    fn merge(&self, graph: &Graph, merge: &Merge) -> std::result::Result<(), MergeFailure> {
        let (base, top) = (&merge.base, merge.overlays.last().expect("at least one"));
        let (base_image, top_image) =
            (graph.get(base).expect("of the graph"), graph.get(top).expect("of the graph"));
        if let Some(image) =
            [base].into_iter().chain(&merge.overlays).find(|image| has_data_elsewhere(graph, image))
        {
            let message = format!(
                "the image '{}' has its data in another file: it cannot be merged",
                image.display()
            );
            return Err(MergeFailure {
                error: Error::new(Code::OperationUnsupported, message),
                begun: false,
                may_have_pivoted: false,
            });
        }
        let live =
            self.live.iter().find(|disk| disk.layers().iter().any(|layer| id(layer) == *top));
        match live {
            Some(disk) => self.merge_live(disk, merge, base_image)?,
            None => {
                images::commit(top_image, &base_image.path).map_err(|error| MergeFailure {
                    error,
                    begun: true,
                    may_have_pivoted: false,
                })?;
            }
        }
        // QEMU has changed the backing files of the images that it has open.
        let open = |overlay: &Id| {
            live.is_some_and(|disk| disk.layers().iter().any(|layer| id(layer) == *overlay))
        };
        for overlay in graph.overlays(top).filter(|overlay| !open(overlay)) {
            let overlay = graph.get(overlay).expect("of the graph");
            images::rebase(overlay, &base_image.path, &base_image.format)
                .map_err(|error| MergeFailure { error, begun: true, may_have_pivoted: false })?;
        }
        Ok(())
    }

    /// Merges images that a running domain has open, through libvirt.
    fn merge_live(
        &self,
        disk: &Disk,
        merge: &Merge,
        base_image: &Image,
    ) -> std::result::Result<(), MergeFailure> {
        let (base, top) = (&merge.base, merge.overlays.last().expect("at least one"));
        let called = |image: &Id| disk.layers().into_iter().find(|layer| id(layer) == *image);
        let step = format!(
            "cannot merge images of disk '{}' to delete snapshot '{}'",
            disk.target,
            self.name()
        );
        // libvirt finds no server's image by its name. And an image on a volume has a path here,
        // but another name in libvirt.
        let below = called(base).filter(|name| !images::is_of_server(name));
        let shallow = below.is_none() && merge.overlays.len() == 1;
        if below.is_none() && !shallow {
            let is_last =
                disk.is_whole && disk.layers().last().is_some_and(|layer| id(layer) == *base);
            if !is_last || base_image.format != "raw" {
                // Without a base, libvirt would merge into the lowest image, which may be another
                // one.
                let message = format!(
                    "{step}: libvirt does not call '{}' by its path: shut the domain off, and \
                     delete the snapshot then",
                    base.display()
                );
                return Err(MergeFailure {
                    error: Error::new(Code::OperationUnsupported, message),
                    begun: false,
                    may_have_pivoted: false,
                });
            }
        }
        let commit = BlockCommit {
            target: disk.target.clone(),
            base: below.map(str::to_owned),
            top: called(top).map(str::to_owned),
            top_id: top.clone(),
            active: disk.file.as_deref().map(id).as_ref() == Some(top),
            shallow,
        };
        self.domain.merge(&commit, &step)
    }

    /// Changes the definitions of the kept snapshots to the images that have the content of theirs.
    fn change_records(&self, replaced: &[Replaced]) -> Result<()> {
        for kept in &self.kept {
            // The definition is read again: its notes may have been removed.
            let step = format!("cannot read the record of snapshot '{}'", kept.name);
            let found =
                self.domain.snapshot(&kept.name).map_err(|error| error.into_error(&step))?;
            let Some(text) = found else { continue };
            let now =
                SnapshotDef::parse(kept.name.clone(), &text)?.with_paths(&self.tree.volumes)?;
            if let Some(record) = now.with_replaced(replaced)? {
                self.redefine(kept, &record)?;
            }
        }
        Ok(())
    }

    fn redefine(&self, snapshot: &SnapshotDef, record: &str) -> Result<()> {
        let redefined = self.domain.redefine(record, self.tree.is_current(snapshot));
        redefined.map_err(|error| {
            error
                .into_error(&format!(
                    "cannot change the record of snapshot '{}' to delete '{}'",
                    snapshot.name,
                    self.name()
                ))
                .and(format!(
                    "all images that it names exist and are intact: delete '{}' again",
                    self.name()
                ))
        })
    }

    /// Changes the domain's definition to the images that have the content of its own. If another
    /// client has started the domain meanwhile, on an image that is to be removed, the old
    /// definition is put back: the image has what the guest writes.
    fn change_config(&self, replaced: &[Replaced], plan: &Plan) -> Result<()> {
        let step = "cannot change the domain's disks";
        let define = |xml: &str| self.domain.define(xml).map_err(|error| error.into_error(step));
        let mut before = None;
        if !self.config.is_empty() && !replaced.is_empty() {
            let xml = self
                .domain
                .xml(xml::INACTIVE | xml::SECURE)
                .map_err(|error| error.into_error(step))?;
            if let Some(changed) =
                domain_with_replaced(&volumes::with_paths(&xml, &self.tree.volumes)?, replaced)?
            {
                define(&changed)?;
                before = Some(xml);
            }
        }
        self.check_not_started(plan)
            .or_else(|error| before.map_or(Ok(()), |xml| define(&xml)).and(Err(error)))
    }

    /// Removes the deleted snapshots from libvirt's snapshot list.
    fn forget(&self) -> Result<()> {
        for deleted in &self.deleted {
            let step = format!("cannot delete the record of snapshot '{}'", deleted.name);
            if self.kept_children().any(|kept| kept.parent.as_ref() == Some(&deleted.name)) {
                self.redefine(deleted, &deleted.without_overlays())?;
            }
            self.domain.forget(&deleted.name, DeleteFlags::METADATA_ONLY.bits()).map_err(
                |error| {
                    error.into_error(&step).and(
                    "its memory image is renamed to '….deleting' or still there: delete it again",
                )
                },
            )?;
        }
        self.avoid_no_current()
    }

    /// Makes a snapshot the current one if there is none. libvirt >= 9.9 crashes when it reverts
    /// without a current snapshot, and it removes the overlays of the current one when it reverts.
    /// So this is a snapshot at the end of a branch, and its overlays are those that the domain is
    /// on.
    fn avoid_no_current(&self) -> Result<()> {
        if self.version < STOCK_DELETES || self.tree.current.is_none() {
            return Ok(());
        }
        let tree = SnapshotTree::read(self.domain)?;
        let leaf = tree.snapshots.iter().rev().find(|snapshot| snapshot.is_ours());
        let (None, Some(leaf)) = (&tree.current, leaf) else { return Ok(()) };
        let disks =
            if self.live.is_empty() { self.domain.xml(xml::INACTIVE) } else { self.domain.xml(0) };
        let disks = domain_disks(
            &disks.map_err(|error| error.into_error("cannot read the domain's XML"))?,
        )?;
        let is_switched =
            |disk: &&Disk| leaf.external().any(|(switched, _)| switched.target == disk.target);
        let source = |disk: &'_ Disk| -> Option<(String, String, String)> {
            Some((disk.target.clone(), disk.file.clone()?, disk.format.clone()))
        };
        let tops: Vec<_> = disks.iter().filter(is_switched).filter_map(source).collect();
        let sources: Vec<Source> = tops
            .iter()
            .map(|(target, file, format)| Source { target, storage: Storage::at(file), format })
            .collect();
        let record = leaf.with_overlays(&sources, &leaf.notes_afterwards())?;
        let step = format!("cannot make snapshot '{}' the current one", leaf.name);
        self.domain.redefine(&record, true).map_err(|error| error.into_error(&step))
    }

    /// The last step: the snapshots are deleted, and only their files are left.
    fn remove_files(&self, plan: &Plan) -> Result<()> {
        let memory = self.memory_files().into_iter().flat_map(|memory| [deleting(&memory), memory]);
        let overlays = plan.goes().cloned();
        let removed = memory.map(|file| (sys::remove_file(&file), file));
        let pages = self.memory_files().into_iter();
        let pages = pages.map(|memory| (remove_pages_file(&memory), pages_file_of(&memory)));
        let removed = pages.chain(removed);
        let removed = removed.chain(overlays.map(|file| (images::remove(&file), file)));
        let failed: Vec<_> = removed
            .filter_map(|(removed, file)| {
                Some(format!("'{}' ({})", file.display(), removed.err()?))
            })
            .collect();
        if failed.is_empty() {
            return Ok(());
        }
        fail!(
            OperationFailed,
            "snapshot '{}' is deleted, but some of its files, which are not needed any more, could \
             not be removed: remove them: {}",
            self.name(),
            failed.join(", ")
        )
    }
}

/// The facts of a snapshot for the plan.
fn known(recorded: &SnapshotDef) -> plan::Snapshot {
    let file = |image: &Disk| image.file.as_deref().map(id);
    let switched = recorded
        .external()
        .map(|(disk, image)| Switched { target: disk.target.clone(), image: image.and_then(file) });
    plan::Snapshot {
        switched: switched.collect(),
        images: recorded.images().filter_map(file).collect(),
        overlays: recorded
            .overlays_of_disks()
            .map(|(target, overlay)| (target.to_owned(), id(overlay)))
            .collect(),
        fixed: recorded.is_internal() || recorded.disks.is_empty(),
    }
}

fn restore_memory_images(hidden: &[PathBuf]) {
    for memory in hidden {
        let _ = std::fs::rename(deleting(memory), memory);
    }
}
