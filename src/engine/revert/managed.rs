// SPDX-License-Identifier: LGPL-2.1-or-later

//! Reverts a domain of a stock libvirt to a snapshot.
//!
//! libvirt 9.9 and later can revert to snapshots with a memory image, and do so, unless that would
//! do harm (see [`stock_can`]). Otherwise it is done here: fresh overlays are made on the
//! snapshot's images, the running domain is ended, its memory is restored with its disks on those
//! overlays, its definition is put on them too, and the snapshot is made the current one.
//!
//! Everything that can be checked is checked before the domain is ended. Its definition changes
//! only when it runs again: until then it can be started as it was. The guest's writes since the
//! last snapshot are lost, as a revert means. The overlays that have them are removed at the end,
//! if a snapshot or a revert made them and no snapshot needs them; in doubt they stay.
//!
//! A transient domain would lose its snapshot list when it ends. So it is defined for the time of
//! the revert.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Value;
use tempfile::{NamedTempFile, TempPath};

use super::plan::{Left, Situation};
use crate::backend::images::{self, Graph, Id, id};
use crate::backend::libvirt::snapshot_def::SnapshotDef;
use crate::backend::libvirt::{CallError, ManagedDomain, ManagedSnapshot, SnapshotTree};
use crate::backend::{locks, overlay_file, revert_file};
use crate::deadline::Deadline;
use crate::engine::users::Users;
use crate::error::{Code, Error, Result, fail};
use crate::image::{Format, Image, is_other_machine};
use crate::libvirt::{RESTORES_SPARSE, RESTORES_ZSTD, restore, undefine, xml};
use crate::model::domain::{Disk, Source, Storage, domain_disks};
use crate::model::flags::RevertFlags;
use crate::model::{Compared, Notes, generated_name};
use crate::monitor::json;
use crate::sys;
use crate::tool;

/// The first libvirt that reverts to snapshots with a memory image.
const STOCK_REVERTS: (u64, u64, u64) = (9, 9, 0);
/// The first libvirt with `VIR_DOMAIN_UNDEFINE_KEEP_TPM`.
const KEEPS_TPM: (u64, u64, u64) = (8, 9, 0);

/// Reverts a domain. The domain is held.
pub fn run(snapshot: &ManagedSnapshot, flags: RevertFlags) -> Result<()> {
    let domain = &snapshot.domain;
    let tree = SnapshotTree::read(domain)?;
    let target = tree.get(&snapshot.name)?;
    let version = domain.version()?;
    let users = Users::read(domain, &tree.volumes)?;
    let revert = Revert { domain, version, tree: &tree, target, flags, users: &users };
    let state = revert.read_state()?;
    // These checks are made before libvirt's own revert too, which ends the domain first, and
    // checks then.
    revert.check(&state)?;
    if version >= STOCK_REVERTS && stock_can(&tree, target, &state.disks, &users) {
        wait_for_free_names(target);
        return snapshot.revert_by_libvirt(flags).map_err(|error| match error {
            CallError::Refused(error) => error.into(),
            error => error.into_error(&format!("cannot revert to snapshot '{}'", snapshot.name)),
        });
    }
    revert.run(&state)
}

/// Whether libvirt's own revert is used.
pub fn is_libvirts(snapshot: &ManagedSnapshot) -> Result<bool> {
    let domain = &snapshot.domain;
    if domain.version()? < STOCK_REVERTS {
        return Ok(false);
    }
    let tree = SnapshotTree::read(domain)?;
    let disks = disks_of(domain).map_err(|error| error.into_error("cannot look at the domain"))?;
    let users = Users::read(domain, &tree.volumes)?;
    Ok(stock_can(&tree, tree.get(&snapshot.name)?, &disks, &users))
}

/// Whether libvirt's own revert, if it has one, works and does no harm:
///
/// * it requires all images to be files, also those of disks that the snapshot left out, and puts
///   these disks, even a CD-ROM, on overlays: the next revert would lose what is written to such a
///   disk from then on;
/// * it would leave a disk that was left to a storage hook with its present content;
/// * it crashes the daemon if there is no current snapshot;
/// * it removes the overlays that the current snapshot names, even those that another snapshot or
///   another guest needs, and those of disks that the domain does not have any more; and it cannot
///   remove overlays on block devices;
/// * it cannot read a sparse memory image, although libvirt can restore it by other means, and
///   finds that out when it has ended the domain. An image that this process may not look at can
///   have been converted to a sparse one.
fn stock_can(tree: &SnapshotTree, target: &SnapshotDef, disks: &[Disk], users: &Users) -> bool {
    let on_files = target.external().all(|(_, image)| {
        let file = image.and_then(|image| image.file.as_deref());
        file.is_some_and(|file| Path::new(file).is_file())
    });
    // libvirt checks all disks that the domain will have.
    let is_switched = |image: &Disk| target.external().any(|(disk, _)| disk.target == image.target);
    let on_files = on_files
        && target.images().filter(|image| image.present).all(|image| {
            let file = image.file.as_deref();
            image.kind == "file"
                && file.is_some_and(|file| Path::new(file).is_file())
                && is_switched(image)
        });
    // libvirt has no paths for volumes.
    let on_files = on_files && !target.on_volumes;
    let manual = target.disks.iter().any(|disk| disk.is_manual());
    let Some(current) = tree.current.as_deref().and_then(|current| tree.get(current).ok()) else {
        return false;
    };
    let leaves =
        if current.revert_disks.is_empty() { &current.disks } else { &current.revert_disks };
    let removed =
        leaves.iter().filter(|disk| disk.is_external()).filter_map(|disk| disk.overlay.as_deref());
    let Ok(needed) = needed_by_snapshots(tree) else { return false };
    let is_on = |overlay: &Id| {
        disks.iter().filter_map(|disk| disk.file.as_deref()).any(|file| id(file) == *overlay)
    };
    let harmed = |overlay: Id| {
        overlay.exists()
            && (!overlay.is_file()
                || needed.contains(&overlay)
                || !is_on(&overlay)
                || users.of(&overlay).is_some())
    };
    let is_readable = MemoryFormat::of(target) == MemoryFormat::Other;
    on_files && !manual && is_readable && !removed.map(id).any(harmed)
}

/// Whether the snapshot's memory image is compressed by zstd. If this process may not read it, the
/// notes of the snapshot say so.
fn is_zstd(target: &SnapshotDef) -> bool {
    let memory = Path::new(target.memory.as_deref().unwrap_or_default());
    match sys::open_file(memory) {
        Ok(file) => matches!(Image::format_of(&file), Some(Format::Zstd(_))),
        Err(error) if error.kind() == ErrorKind::NotFound => false,
        Err(_) => is_noted_as_zstd(&target.notes, memory),
    }
}

fn is_noted_as_zstd(notes: &Notes, memory: &Path) -> bool {
    notes.memory.as_ref().is_some_and(|noted| {
        let format = Format::named(&noted.format);
        matches!(format, Some(Format::Zstd(_))) && noted.compare(memory) != Compared::Replaced
    })
}

/// Whether libvirt's own revert can read the memory image of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MemoryFormat {
    /// It cannot.
    Sparse,
    /// It can; or it is libvirt that says so.
    Other,
    /// It could when the snapshot was taken. The file may have been replaced since: this process
    /// may not look.
    Unseen,
    /// Neither the image nor the notes tell.
    Unknown,
}

impl MemoryFormat {
    /// Reads the image, or, if this process may not do that, the notes of the snapshot.
    fn of(target: &SnapshotDef) -> MemoryFormat {
        let memory = Path::new(target.memory.as_deref().unwrap_or_default());
        match sys::open_file(memory) {
            Ok(file) => match Image::format_of(&file) {
                Some(Format::Sparse) => MemoryFormat::Sparse,
                _ => MemoryFormat::Other,
            },
            Err(error) if error.kind() == ErrorKind::NotFound => MemoryFormat::Other,
            Err(_) => MemoryFormat::noted(&target.notes, memory),
        }
    }

    fn noted(notes: &Notes, memory: &Path) -> MemoryFormat {
        match notes.memory.as_ref().map(|noted| (noted, noted.compare(memory))) {
            Some((_, Compared::Replaced)) => MemoryFormat::Unknown,
            Some((noted, _)) if noted.format == Format::Sparse.name() => MemoryFormat::Sparse,
            Some((_, Compared::Same)) => MemoryFormat::Other,
            Some((_, Compared::Unseen)) => MemoryFormat::Unseen,
            // libvirt took this snapshot itself.
            None if *notes == Notes::default() => MemoryFormat::Other,
            None => MemoryFormat::Unknown,
        }
    }
}

/// The disks of the running domain, or else of its definition.
fn disks_of(domain: &ManagedDomain) -> std::result::Result<Vec<Disk>, CallError> {
    let xml = domain.xml(if domain.is_active()? { 0 } else { xml::INACTIVE })?;
    Ok(domain_disks(&xml).unwrap_or_default())
}

/// Waits until libvirt's own names for overlays are free. libvirt names the overlays that it makes
/// after the current second, and fails if such a file exists, for example after a revert in the
/// same second.
fn wait_for_free_names(target: &SnapshotDef) {
    let taken = || {
        let now =
            SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs().to_string();
        let mut files = target.external().filter_map(|(_, image)| image?.file.as_deref());
        files.any(|file| Path::new(&generated_name(file, &now)).exists())
    };
    let deadline = Deadline::after(Duration::from_secs(3));
    while taken() && deadline.left().is_some() {
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The images of all snapshots, and all images below them.
fn needed_by_snapshots(tree: &SnapshotTree) -> Result<BTreeSet<Id>> {
    let mut graph = Graph::default();
    let mut tops = Vec::new();
    for image in tree.snapshots.iter().flat_map(SnapshotDef::images) {
        if let Some(file) = &image.file {
            graph.add(file, &image.format)?;
            tops.push(id(file));
        }
    }
    Ok(graph.with_all_below(&tops))
}

struct Revert<'a> {
    domain: &'a ManagedDomain,
    version: (u64, u64, u64),
    tree: &'a SnapshotTree,
    target: &'a SnapshotDef,
    flags: RevertFlags,
    users: &'a Users,
}

/// The domain before the revert.
struct State {
    active: bool,
    persistent: bool,
    /// Its disks.
    disks: Vec<Disk>,
}

/// A fresh overlay. Its file is removed when it is dropped, unless it is kept.
struct Overlay {
    target: String,
    path: TempPath,
    text: String,
}

impl Revert<'_> {
    fn read_state(&self) -> Result<State> {
        let refused = |error: CallError| {
            error.into_error(&format!("cannot revert to snapshot '{}'", self.target.name))
        };
        let active = self.domain.is_active().map_err(refused)?;
        let persistent = self.domain.is_persistent().map_err(refused)?;
        let xml = self.domain.xml(if active { 0 } else { xml::INACTIVE }).map_err(refused)?;
        Ok(State { active, persistent, disks: domain_disks(&xml)? })
    }

    fn run(&self, state: &State) -> Result<()> {
        let State { active, persistent, disks } = state;
        let overlays = self.create_overlays(*active)?;
        let sources: Vec<Source> = overlays.iter().map(Overlay::source).collect();
        let domain_xml = self.target.domain_on(&sources)?;
        let config = self.target.config_on(&sources)?;
        let record = self.target.with_overlays(&sources, &self.target.notes_afterwards())?;

        if *active {
            self.end_domain(*persistent)?;
        }
        let restored = self.restore(&domain_xml);
        let paths = match &restored {
            Err(CallError::Refused(_)) => Vec::new(),
            // The domain runs on them, or may do so soon if libvirt did not answer.
            _ => keep(overlays)?,
        };
        restored.map_err(|error| self.failed(error, &paths, *active, *persistent))?;
        self.settle(&config, &record, *persistent)?;
        self.remove_left(disks, &paths);
        Ok(())
    }

    /// Checks everything that can be checked before the domain is ended.
    fn check(&self, state: &State) -> Result<()> {
        let name = &self.target.name;
        for (disk, image) in self.target.external() {
            let Some(file) = image.and_then(|image| image.file.as_deref()) else {
                fail!(
                    ConfigUnsupported,
                    "cannot revert to snapshot '{name}': the image of disk '{}' is not on local \
                     storage",
                    disk.target
                );
            };
            if images::is_of_server(file) {
                continue;
            }
            if !Path::new(file).exists() {
                fail!(
                    InvalidDomainSnapshot,
                    "cannot revert to snapshot '{name}': the image '{file}' of disk '{}' is \
                     missing",
                    disk.target
                );
            }
            // The domain's own QEMU is ended for the revert.
            let own = state.active
                && state
                    .disks
                    .iter()
                    .filter_map(|disk| disk.file.as_deref())
                    .any(|own| id(own) == id(file));
            if !own && locks::is_written(Path::new(file)) {
                fail!(
                    OperationInvalid,
                    "cannot revert to snapshot '{name}': another QEMU writes to the image '{file}' \
                     of disk '{}': end that guest; the domain was left as it is",
                    disk.target
                );
            }
        }
        if let Some(disk) = self.target.disks.iter().find(|disk| disk.is_manual())
            && !self.flags.is_forced()
        {
            fail!(
                ConfigUnsupported,
                "cannot revert to snapshot '{name}': disk '{}' was left to a storage hook: revert \
                 the disk by the storage's own means first, then use \
                 VIR_DOMAIN_SNAPSHOT_REVERT_FORCE",
                disk.target
            );
        }
        self.check_not_half_deleted()?;
        if !self.flags.is_forced() {
            self.check_frozen()?;
        }
        self.check_memory(state.active)?;
        if self
            .domain
            .has_managed_save()
            .map_err(|error| error.into_error("cannot look at the domain"))?
        {
            fail!(
                OperationInvalid,
                "cannot revert to snapshot '{name}': the domain has a managed save image, which \
                 would be resumed on other disks at its next start: start the domain, or remove \
                 the image (virsh managedsave-remove)"
            );
        }
        for disk in state.disks.iter().filter(|disk| state.active && disk.present) {
            let job = self.domain.has_block_job(&disk.target);
            if job.map_err(|error| error.into_error("cannot look at the domain's block jobs"))? {
                fail!(
                    OperationInvalid,
                    "cannot revert to snapshot '{name}': disk '{}' has an active block job: wait \
                     for it, or abort it (virsh blockjob)",
                    disk.target
                );
            }
        }
        Ok(())
    }

    /// Refuses images that were written or replaced since the snapshot: they are newer than its
    /// memory.
    fn check_frozen(&self) -> Result<()> {
        for (disk, image) in self.target.external() {
            let mut layers = self
                .target
                .notes
                .frozen
                .iter()
                .filter(|(target, _)| *target == disk.target)
                .peekable();
            // If libvirt itself has changed the definition, to delete another snapshot, the notes
            // are about other images.
            let noted = layers.peek().map(|(_, top)| id(&top.file));
            if noted.is_some() && noted == image.and_then(|image| image.file.as_deref()).map(id) {
                layers.try_for_each(|(target, frozen)| frozen.check(target, &self.target.name))?;
            }
        }
        Ok(())
    }

    /// Refuses a snapshot whose delete was interrupted. Its definition has no overlays any more:
    /// the domain would write to images that other snapshots need.
    fn check_not_half_deleted(&self) -> Result<()> {
        let others = || self.tree.snapshots.iter().filter(|other| other.name != self.target.name);
        let mut graph = Graph::default();
        let mut tops = Vec::new();
        for image in others().flat_map(SnapshotDef::external).filter_map(|(_, image)| image) {
            if let Some(file) = &image.file {
                graph.add(file, &image.format)?;
                tops.push(id(file));
            }
        }
        let needed = graph.with_all_below(&tops);
        let has_overlay =
            |image: &Disk| self.target.external().any(|(disk, _)| disk.target == image.target);
        let written =
            self.target.images.iter().filter(|image| !image.read_only && !has_overlay(image));
        for file in written.filter_map(|image| image.file.as_deref()) {
            if needed.contains(&id(file)) {
                fail!(
                    InvalidDomainSnapshot,
                    "cannot revert to snapshot '{}': the domain would write to the image '{file}', \
                     which other snapshots are on (was the snapshot being deleted? Delete it \
                     again)",
                    self.target.name
                );
            }
        }
        Ok(())
    }

    /// Checks the memory image. libvirt itself checks an image that we may not read, or that is
    /// compressed.
    fn check_memory(&self, active: bool) -> Result<()> {
        let memory = self.memory();
        let unusable = |what: &str| {
            let message = format!(
                "cannot revert to snapshot '{}': its memory image '{memory}' {what}; the domain \
                 was left as it is",
                self.target.name
            );
            Error::new(Code::InvalidDomainSnapshot, message)
        };
        match sys::open_file(Path::new(memory)) {
            Ok(file) => {
                let noted = Image::check(&file).map_err(|what| unusable(&what))?;
                let wanted = self.target.machine();
                if let (Some(noted), Some(wanted)) = (noted, wanted)
                    && is_other_machine(wanted, &noted)
                {
                    let what = format!(
                        "is of a machine of type '{noted}', and the snapshot's domain has the type \
                         '{wanted}'"
                    );
                    return Err(unusable(&what));
                }
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(unusable("is missing"));
            }
            Err(_) => {}
        }
        if is_zstd(self.target) {
            let what = match self.version >= RESTORES_ZSTD {
                false => "which libvirt 10.4 and later restores",
                true if tool::is_installed("zstd") => "",
                true => "and the program zstd, by which libvirt restores it, is not installed",
            };
            if !what.is_empty() {
                fail!(
                    ConfigUnsupported,
                    "cannot revert to snapshot '{}': its memory image '{memory}' is compressed by \
                     zstd, {what}: convert it to a raw one (instantsnap_image_convert()); the \
                     domain was left as it is",
                    self.target.name
                );
            }
        }
        match MemoryFormat::of(self.target) {
            MemoryFormat::Sparse if !self.restores_sparse(active) => fail!(
                ConfigUnsupported,
                "cannot revert to snapshot '{}': its memory image '{memory}' is sparse, which \
                 libvirt 11.2 and later restores, with QEMU 9.0 and later: convert it to a raw one \
                 (instantsnap_image_convert()); the domain was left as it is",
                self.target.name
            ),
            MemoryFormat::Unknown => fail!(
                AccessDenied,
                "cannot revert to snapshot '{}': this user may not read its memory image \
                 '{memory}', and the snapshot's notes do not say whether it is sparse, as it is \
                 now: libvirt's own revert would end the domain and fail then. Revert as a user \
                 that may read the image (root); the domain was left as it is",
                self.target.name
            ),
            // If it has become sparse, the revert that is made here restores it, where libvirt can.
            MemoryFormat::Sparse | MemoryFormat::Unseen | MemoryFormat::Other => {}
        }
        self.domain.saved_xml(memory).map(drop).map_err(|error| match error {
            CallError::Refused(error) => unusable(&format!("cannot be used ({})", error.message)),
            error => error.into_error(&format!("cannot look at the memory image '{memory}'")),
        })
    }

    /// Whether libvirt and its QEMU can restore a sparse image. If the domain does not run, its
    /// QEMU is not asked.
    fn restores_sparse(&self, active: bool) -> bool {
        let capabilities = r#"{"execute":"query-migrate-capabilities"}"#;
        let qemu_can = || {
            let reply = self.domain.monitor_command(capabilities);
            reply.map_or(true, |reply| reply.contains("\"mapped-ram\""))
        };
        self.version >= RESTORES_SPARSE && (!active || qemu_can())
    }

    fn memory(&self) -> &str {
        self.target.memory.as_deref().unwrap_or_default()
    }

    fn create_overlays(&self, active: bool) -> Result<Vec<Overlay>> {
        let images = self.target.external().filter_map(|(disk, image)| Some((disk, image?)));
        images
            .map(|(disk, image)| {
                let file = image.file.as_deref().unwrap_or_default();
                let fresh =
                    fresh_file(Path::new(file), disk.overlay.as_deref(), &self.target.name)?;
                if images::server_of(file, &image.format).is_some() {
                    let size = self.size_of(file, &image.format, active)?;
                    let made = overlay_file::format(fresh.as_file(), file, &image.format, size);
                    made.map_err(|reason| {
                        Error::new(
                            Code::OperationFailed,
                            format!("cannot create an overlay of '{file}': {reason}"),
                        )
                    })?;
                } else {
                    overlay_file::create_on(fresh.as_file(), file, &image.format)?;
                }
                // The domain's definition will name the overlay, and libvirt syncs the definition.
                fresh.as_file().sync_all().and_then(|()| sys::sync_parent(fresh.path())).map_err(
                    |error| {
                        Error::system(format!("cannot write '{}'", fresh.path().display()), error)
                    },
                )?;
                let path = fresh.into_temp_path();
                let text = path.to_str().map(str::to_owned);
                let text = text.ok_or_else(|| {
                    Error::new(
                        Code::SystemError,
                        format!("the path of the new image {path:?} is not UTF-8"),
                    )
                })?;
                Ok(Overlay { target: disk.target.clone(), path, text })
            })
            .collect()
    }

    /// The size of a server's image, or of an overlay on one. The domain's QEMU is asked first: it
    /// may be the only client that the server accepts.
    fn size_of(&self, name: &str, format: &str, active: bool) -> Result<u64> {
        let overlay = if images::is_of_server(name) { None } else { images::Header::at(name) };
        if let Some(header) = overlay {
            return Ok(header.size);
        }
        let blocks = r#"{"execute":"query-block"}"#;
        let reply = active.then(|| self.domain.monitor_command(blocks).ok()).flatten();
        let reply = reply.and_then(|reply| json::parse(reply.as_bytes()).ok());
        let size = reply.and_then(|reply| {
            let mut blocks = reply["return"].as_array()?.iter();
            blocks.find_map(|block| size_in_chain(&block["inserted"]["image"], name))
        });
        size.map_or_else(|| images::size_on_server(name, format), Ok)
    }

    /// Ends the domain. From here on the guest's present state is lost.
    fn end_domain(&self, persistent: bool) -> Result<()> {
        let step = format!("cannot end the domain to revert it to snapshot '{}'", self.target.name);
        let ended = (|| {
            if !persistent {
                self.domain.define(&self.domain.xml(xml::INACTIVE | xml::SECURE)?)?;
            }
            self.domain.destroy()
        })();
        ended.map_err(|error: CallError| {
            // A call without an answer may still end the domain. Without the definition, its
            // snapshots would be lost then.
            if !persistent && matches!(error, CallError::Refused(_)) {
                let _ = self.undefine();
            }
            error.into_error(&step)
        })
    }

    fn restore(&self, domain_xml: &str) -> std::result::Result<(), CallError> {
        let runs = self.flags.runs().unwrap_or(self.target.state != "paused");
        let state = if runs { restore::RUNNING } else { restore::PAUSED };
        let nvram = if self.flags.resets_nvram() { restore::RESET_NVRAM } else { 0 };
        self.domain.restore(self.memory(), domain_xml, state | nvram)
    }

    /// The error for a memory image that could not be restored, with the state that the domain is
    /// in.
    fn failed(
        &self,
        error: CallError,
        kept: &[PathBuf],
        was_active: bool,
        persistent: bool,
    ) -> Error {
        let domain = &self.domain.name;
        let step = format!(
            "cannot restore the memory image '{}' of snapshot '{}' of domain '{domain}'",
            self.memory(),
            self.target.name
        );
        let is_over = matches!(error, CallError::Refused(_));
        let mut error = error.into_error(&step);
        if !is_over {
            let kept: Vec<_> = kept.iter().map(|file| file.display().to_string()).collect();
            return error.and(format!(
                "libvirt may still restore it, on its new overlays, which stay ({}): check its state \
                 by `virsh domstate '{domain}'`, and revert it again",
                kept.join(", ")
            ));
        }
        if was_active {
            error = error.and(
                "the domain was ended for the revert and is shut off, on the disks that it had",
            );
        }
        if was_active && !persistent {
            error = error
                .and("it was transient and is defined now, so that its snapshots are not lost");
        }
        error.and(format!("it can be started as it was: virsh start '{domain}'"))
    }

    /// Updates libvirt's definitions after the domain runs again.
    fn settle(&self, config: &str, record: &str, persistent: bool) -> Result<()> {
        let (name, domain) = (&self.target.name, &self.domain.name);
        let runs = format!("the domain was reverted to snapshot '{name}' and runs");
        if persistent {
            self.domain.define(config).map_err(|error| {
                error.into_error(&format!("{runs}, but its configuration, which is still on the old disks, cannot be changed")).and(
                    format!("fix it before its next start: virsh dumpxml --inactive --migratable '{domain}' > FILE; virsh define FILE"),
                )
            })?;
        }
        self.domain.redefine(record, true).map_err(|error| {
            error
                .into_error(&format!("{runs}, but it cannot be made the current snapshot"))
                .and(format!("fix it: virsh snapshot-current '{domain}' --snapshotname '{name}'"))
        })?;
        if !persistent {
            self.undefine().map_err(|error| {
                error
                    .into_error(&format!("{runs}, but was transient and stays defined"))
                    .and(format!("fix it: virsh undefine '{domain}' --keep-nvram"))
            })?;
        }
        Ok(())
    }

    fn undefine(&self) -> std::result::Result<(), CallError> {
        let tpm = if self.version >= KEEPS_TPM { undefine::KEEP_TPM } else { 0 };
        self.domain.undefine(undefine::KEEP_NVRAM | tpm)
    }

    /// Removes the overlays that the domain was on, if that is safe ([`super::plan`]). Failures are
    /// ignored: an overlay that stays only takes space.
    fn remove_left(&self, left: &[Disk], fresh: &[PathBuf]) {
        let Ok(situation) = self.situation(left, fresh) else { return };
        for overlay in situation.unneeded() {
            if self.users.other_domain_on(overlay).is_none() && !locks::is_in_use(overlay) {
                let _ = images::remove(overlay);
            }
        }
    }

    /// Collects the facts that the plan is made from.
    fn situation(&self, left: &[Disk], fresh: &[PathBuf]) -> Result<Situation> {
        let mut situation = Situation {
            fresh: fresh.iter().map(|path| id(&path.to_string_lossy())).collect(),
            frozen: frozen(self.tree),
            ..Situation::default()
        };
        for image in self.tree.snapshots.iter().flat_map(SnapshotDef::images) {
            if let Some(file) = &image.file {
                situation.graph.add(file, &image.format)?;
                situation.snapshots.insert(id(file));
            }
        }
        let overlays = self.tree.snapshots.iter().flat_map(SnapshotDef::overlays);
        situation.overlays = overlays.map(|(overlay, _)| id(overlay)).collect();
        for (disk, image) in self.target.external() {
            if let Some(file) = image.and_then(|image| image.file.as_deref()) {
                situation.restored.push((disk.target.clone(), id(file)));
            }
        }
        for disk in left {
            let Some(file) = disk.file.as_deref() else { continue };
            // An image that cannot be read stays.
            if situation.graph.add(file, &disk.format).is_ok() {
                let below = images::below(file, &disk.format).map(|(below, _)| id(&below));
                situation.left.push(Left { target: disk.target.clone(), image: id(file), below });
            }
        }
        Ok(situation)
    }
}

/// The images that snapshots froze, including deleted ones.
fn frozen(tree: &SnapshotTree) -> BTreeSet<Id> {
    let images = tree
        .snapshots
        .iter()
        .flat_map(SnapshotDef::external)
        .filter_map(|(_, image)| image?.file.as_deref());
    let former =
        tree.snapshots.iter().flat_map(|snapshot| &snapshot.notes.former).map(String::as_str);
    images.chain(former).map(id).collect()
}

fn keep(overlays: Vec<Overlay>) -> Result<Vec<PathBuf>> {
    let keep = |overlay: Overlay| overlay.path.keep();
    let kept = overlays.into_iter().map(keep).collect::<std::result::Result<_, _>>();
    kept.map_err(|error| Error::system("cannot keep an overlay", error.error))
}

/// The size of an image in a chain that QEMU reports.
fn size_in_chain(top: &Value, name: &str) -> Option<u64> {
    let mut layers = std::iter::successors(Some(top), |layer| layer.get("backing-image"));
    let is_it =
        |layer: &&Value| layer["filename"].as_str().is_some_and(|other| id(other) == id(name));
    layers.find(is_it)?["virtual-size"].as_u64()
}

impl Overlay {
    fn source(&self) -> Source<'_> {
        Source { target: &self.target, storage: Storage::file(&self.text), format: "qcow2" }
    }
}

/// Creates a new file for an overlay, named after the image and the snapshot. It goes beside the
/// image, or, if the image is no file, beside the overlay that was made of it for the snapshot.
fn fresh_file(image: &Path, overlay: Option<&str>, snapshot: &str) -> Result<NamedTempFile> {
    let model = match overlay {
        Some(overlay) if !image.is_file() => Path::new(overlay),
        _ => image,
    };
    let directory = model.parent().unwrap_or(Path::new("/"));
    let named_after = if images::is_of_server(&image.to_string_lossy()) { model } else { image };
    let file = revert_file::create_in(directory, named_after, snapshot).map_err(|error| {
        Error::system(
            format!(
                "cannot create an overlay of '{}' in '{}'",
                image.display(),
                directory.display()
            ),
            error,
        )
    })?;
    sys::copy_owner_and_mode(file.as_file(), model).map_err(|error| {
        Error::system(format!("cannot set the owner of '{}'", file.path().display()), error)
    })?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::NotedMemory;

    #[test]
    fn an_image_that_the_caller_may_not_look_at_is_not_left_to_libvirts_own_revert() {
        let [image, other] = [(); 2].map(|()| NamedTempFile::new().unwrap());
        let unseen = image.path().join("below a file");
        let noted = |format, path: &Path| {
            let memory = NotedMemory::of(image.path(), format);
            MemoryFormat::noted(&Notes { memory, ..Notes::default() }, path)
        };
        for format in ["raw", "zstd"] {
            assert_eq!(noted(format, image.path()), MemoryFormat::Other);
            assert_eq!(noted(format, other.path()), MemoryFormat::Unknown);
            assert_eq!(noted(format, &unseen), MemoryFormat::Unseen);
        }
        for (format, is_zstd) in [("raw", false), ("zstd", true), ("sparse", false)] {
            let memory = NotedMemory::of(image.path(), format);
            let notes = Notes { memory, ..Notes::default() };
            assert_eq!(is_noted_as_zstd(&notes, image.path()), is_zstd);
            assert_eq!(is_noted_as_zstd(&notes, &unseen), is_zstd);
            assert!(!is_noted_as_zstd(&notes, other.path()));
        }
        assert_eq!(noted("sparse", image.path()), MemoryFormat::Sparse);
        assert_eq!(noted("sparse", other.path()), MemoryFormat::Unknown);
        assert_eq!(noted("sparse", &unseen), MemoryFormat::Sparse);
    }
}
