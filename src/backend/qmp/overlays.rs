// SPDX-License-Identifier: LGPL-2.1-or-later

//! Overlays by QMP: they are created while the guest runs, switched to in one transaction, and
//! merged back when a snapshot fails.

use serde_json::{Value, json};

use super::jobs::{self, Merge, NODE_PREFIX, Until};
use crate::backend::guest::{DEFAULT_TIMEOUT, MonitorOverlay};
use crate::backend::images;
use crate::backend::overlay_file::{self, Beforehand, OverlayFile};
use crate::deadline::Deadline;
use crate::error::{Code, Error, Result, fail};
use crate::model::journal::{NotedFile, NotedOverlay};
use crate::model::{DiskPlan, Drive, Role};
use crate::monitor::{Command, Execute, Failure};
use crate::sys;

/// An overlay, and how far it was made and merged.
#[derive(Debug)]
pub struct Overlay {
    disk: DiskPlan,
    /// The nodes of the overlay's format and of its file.
    node: String,
    file_node: String,
    made: Made,
    /// Its file, once it was made.
    own: Option<OverlayFile>,
    merge: Merge,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Made {
    Nothing,
    File,
    FileNode,
    Node,
}

impl Overlay {
    /// An overlay that is still to be made.
    pub fn new(disk: &DiskPlan, index: usize) -> Overlay {
        // The name must differ from those of earlier snapshots' nodes, which are in use in the
        // chain below.
        let mut random = [0; 4];
        let got = rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::NONBLOCK);
        let random = got.map_or(std::process::id(), |_| u32::from_ne_bytes(random));
        let node = format!("{NODE_PREFIX}{random:08x}-{index}");
        Overlay {
            disk: disk.clone(),
            file_node: format!("{node}f"),
            node,
            made: Made::Nothing,
            own: None,
            merge: Merge::Not,
        }
    }
}

impl Overlay {
    /// The overlay, as a journal notes it.
    pub fn noted(&self) -> NotedOverlay {
        NotedOverlay {
            disk: self.disk.drive.name().into(),
            overlay: self.disk.overlay.clone(),
            node: self.node.clone(),
            file_node: self.file_node.clone(),
            image_node: self.disk.drive.node.clone(),
            image: self.disk.drive.file.clone(),
            format: self.disk.drive.format.clone(),
            is_reused: self.disk.reuse,
        }
    }

    /// Its file, as a journal notes it.
    pub fn noted_file(&self) -> Option<NotedFile> {
        self.own.as_ref()?.noted(&self.disk.overlay).map(NotedFile::of)
    }

    /// An overlay that another process has made.
    fn adopted(noted: &NotedOverlay, file: Option<&NotedFile>) -> Result<Overlay> {
        let NotedOverlay { disk, image_node, image, format, .. } = noted;
        let drive = Drive::of_image(disk, Role::Disk, image_node, image, format);
        let (overlay, reuse) = (noted.overlay.clone(), noted.is_reused);
        let own = file.map(|file| OverlayFile::reopen(&file.known, reuse)).transpose();
        let own = own
            .map_err(|error| Error::system(format!("cannot open the overlay '{overlay}'"), error))?
            .flatten();
        Ok(Overlay {
            disk: DiskPlan { drive, overlay, reuse, on_device: false },
            node: noted.node.clone(),
            file_node: noted.file_node.clone(),
            made: Made::Nothing,
            own,
            merge: Merge::Not,
        })
    }

    /// The overlay, as the watchdog needs to know it to undo it.
    pub fn for_recovery(&self, merges: bool) -> MonitorOverlay {
        MonitorOverlay {
            overlay: self.disk.overlay.clone(),
            node: self.node.clone(),
            file_node: self.file_node.clone(),
            image_node: merges.then(|| self.disk.drive.node.clone()),
            file: self.own.as_ref().and_then(OverlayFile::known),
            complaint: format!(
                "a caller that took a snapshot was killed, and the overlay '{}' of disk '{}' could \
                 not be merged back into '{}': the guest goes on with it, and it must not be \
                 removed; merge it (QMP block-commit) when the cause is fixed",
                self.disk.overlay,
                self.disk.drive.name(),
                self.disk.drive.file
            ),
        }
    }
}

/// The switch of a disk to an overlay, as a driver is told of it.
#[derive(Clone, Debug)]
pub struct Switch {
    /// The disk's name.
    pub disk: String,
    /// The node that the disk is on before the switch.
    pub node: String,
    /// The overlay's node.
    pub overlay_node: String,
    /// The overlay's file.
    pub overlay: String,
}

impl From<&Overlay> for Switch {
    fn from(overlay: &Overlay) -> Switch {
        Switch {
            disk: overlay.disk.drive.name().into(),
            node: overlay.disk.drive.node.clone(),
            overlay_node: overlay.node.clone(),
            overlay: overlay.disk.overlay.clone(),
        }
    }
}

/// Takes over overlays that another process has made, with their files. Ends the jobs on them.
/// Those at the paths `merged` are merged already.
pub fn adopt(
    monitor: &mut dyn Execute,
    noted: &[(NotedOverlay, Option<NotedFile>)],
    merged: &[String],
) -> Result<Vec<Overlay>> {
    let left = jobs::left_over(monitor)?;
    let is_theirs = |id: &&String| {
        noted.iter().any(|(overlay, _)| id.starts_with(&format!("{}-", overlay.node)))
    };
    jobs::give_up(monitor, &left.iter().filter(is_theirs).cloned().collect::<Vec<_>>())?;
    let nodes = node_names(monitor)?;
    let mut overlays = Vec::new();
    for (noted, file) in noted {
        let mut overlay = Overlay::adopted(noted, file.as_ref())?;
        overlay.made = match () {
            () if nodes.contains(&overlay.node) => Made::Node,
            () if nodes.contains(&overlay.file_node) => Made::FileNode,
            () if overlay.own.is_some() => Made::File,
            () => Made::Nothing,
        };
        if merged.contains(&overlay.disk.overlay) {
            overlay.merge = Merge::Done;
        }
        overlays.push(overlay);
    }
    Ok(overlays)
}

/// The names of QEMU's block nodes.
fn node_names(monitor: &mut dyn Execute) -> Result<Vec<String>> {
    let command = Command::new("query-named-block-nodes", json!({ "flat": true }));
    let nodes =
        monitor.run("cannot ask for block nodes", command, Deadline::after(DEFAULT_TIMEOUT))?;
    let name = |node: &Value| node["node-name"].as_str().map(str::to_owned);
    Ok(nodes.as_array().into_iter().flatten().filter_map(name).collect())
}

/// Creates an overlay: the file, the file's node, the qcow2 format, the format's node. QEMU itself
/// formats it, with the backing file's name that QEMU uses, unless it is an overlay already.
pub fn create(monitor: &mut dyn Execute, overlay: &mut Overlay) -> Result<()> {
    let drive = &overlay.disk.drive;
    let path = &overlay.disk.overlay;
    if !drive.file.starts_with('/') && !drive.file.contains(':') {
        fail!(
            ConfigUnsupported,
            "the image of disk '{}' has the relative path '{}', which cannot be resolved: start \
             QEMU with an absolute one",
            drive.name(),
            drive.file
        );
    }
    let own = overlay.own.insert(OverlayFile::open(&overlay.disk, Beforehand::Taken)?);
    overlay.made = Made::File;

    let step = format!("cannot create external snapshot file '{path}' of disk '{}'", drive.name());
    let cache = json!({ "direct": drive.options.direct, "no-flush": drive.options.no_flush });
    let mut options = json!({
        "driver": if own.is_device() { "host_device" } else { "file" },
        "node-name": overlay.file_node,
        "filename": path,
        "auto-read-only": true,
        "cache": cache,
    });
    match drive.options.aio.as_deref() {
        // QEMU supports `native` only with O_DIRECT.
        Some("native") if !drive.options.direct => {}
        Some(aio) => options["aio"] = json!(aio),
        None => {}
    }
    if let Some(discard) = &drive.options.discard {
        options["discard"] = json!(discard);
    }
    blockdev_add(monitor, &step, options)?;
    overlay.made = Made::FileNode;

    if own.is_new() {
        let format = json!({
            "driver": "qcow2",
            "file": overlay.file_node,
            "size": drive.size,
            "backing-file": drive.file,
            "backing-fmt": drive.format,
        });
        let job = format!("{}-create", overlay.node);
        let command = Command::new("blockdev-create", json!({ "job-id": job, "options": format }));
        monitor.run(&step, command, Deadline::after(DEFAULT_TIMEOUT))?;
        jobs::wait(monitor, &[job], Until::Completed, |_, _| ())
            .map_err(|error| Error::new(error.code, format!("{step}: {}", error.message)))?;
    }

    let mut options = json!({
        "driver": "qcow2",
        "node-name": overlay.node,
        "file": overlay.file_node,
        "backing": null,
        "cache": cache,
    });
    if let Some(detect_zeroes) = &drive.options.detect_zeroes {
        options["detect-zeroes"] = json!(detect_zeroes);
    }
    if let Some(discard) = &drive.options.discard {
        options["discard"] = json!(discard);
    }
    blockdev_add(monitor, &step, options)?;
    overlay.made = Made::Node;

    // From the switch on the overlay has the guest's data: its name must survive a crash of the
    // host.
    own.sync(path).map_err(|error| Error::system(step, error))
}

fn blockdev_add(monitor: &mut dyn Execute, step: &str, options: Value) -> Result<()> {
    monitor
        .run(step, Command::new("blockdev-add", options), Deadline::after(DEFAULT_TIMEOUT))
        .map(drop)
}

/// Switches all disks to their overlays, with their bitmaps, in one transaction.
pub fn switch(monitor: &mut dyn Execute, overlays: &[Overlay], deadline: Deadline) -> Result<()> {
    let mut actions = Vec::new();
    for overlay in overlays {
        for bitmap in &overlay.disk.drive.bitmaps {
            actions.push(json!({ "type": "block-dirty-bitmap-add", "data": {
                "node": overlay.node,
                "name": bitmap.name,
                "granularity": bitmap.granularity,
                "persistent": true,
            }}));
        }
        let data = json!({ "node": overlay.disk.drive.node, "overlay": overlay.node });
        actions.push(json!({ "type": "blockdev-snapshot", "data": data }));
    }
    let command = Command::new("transaction", json!({ "actions": actions }));
    monitor.run("cannot switch the disks to their overlays", command, deadline).map(drop)
}

/// Resizes the overlay of a disk.
pub fn resize(
    monitor: &mut dyn Execute,
    overlays: &[Overlay],
    disk: &DiskPlan,
    size: u64,
    deadline: Deadline,
) -> Result<()> {
    let step = format!("cannot give disk '{}' its new size back", disk.drive.name());
    for overlay in overlays.iter().filter(|overlay| overlay.disk.overlay == disk.overlay) {
        let command =
            Command::new("block_resize", json!({ "node-name": overlay.node, "size": size }));
        monitor.run(&step, command, deadline)?;
    }
    Ok(())
}

/// Merges the active overlays back into the images below, all at once. If it is not known of one
/// whether its data is in the image below, none is merged.
pub fn merge(monitor: &mut dyn Execute, overlays: &mut [Overlay]) -> Result<()> {
    let mut jobs = Vec::new();
    let started = start_merging(monitor, overlays, &mut jobs);
    // The jobs that were started are waited for, even if others failed to start.
    let ended = jobs::wait(monitor, &jobs, Until::Completed, |job, merge| {
        overlays
            .iter_mut()
            .filter(|overlay| merge_job(overlay) == job)
            .for_each(|overlay| overlay.merge = merge);
    });
    started.and(ended).map_err(|error| {
        error.and(format!(
            "the guest goes on with the overlays {}, which must not be removed: merge them with \
             block-commit when the cause is fixed",
            paths(overlays)
        ))
    })
}

fn merge_job(overlay: &Overlay) -> String {
    format!("{}-undo", overlay.node)
}

fn start_merging(
    monitor: &mut dyn Execute,
    overlays: &[Overlay],
    jobs: &mut Vec<String>,
) -> Result<()> {
    let step = "cannot merge the overlays back into their images";
    let blocks = monitor.run(
        step,
        Command::new("query-block", json!({})),
        Deadline::after(DEFAULT_TIMEOUT),
    )?;
    let is_attached = |node: &str| {
        let mut blocks = blocks.as_array().into_iter().flatten();
        blocks.any(|block| block["inserted"]["node-name"] == node)
    };
    let command = Command::new("query-named-block-nodes", json!({ "flat": true }));
    let nodes = monitor.run(step, command, Deadline::after(DEFAULT_TIMEOUT))?;
    for overlay in overlays.iter().filter(|overlay| !is_attached(&overlay.node)) {
        // Only a merge puts a disk back on its image.
        if overlay.merge == Merge::Done || is_attached(&overlay.disk.drive.node) {
            continue;
        }
        if was_switched_to(overlay, &nodes)? {
            fail!(
                OperationFailed,
                "{step}: disk '{}' is neither on its overlay '{}' nor on its image '{}', because \
                 it was detached, or because another client has put an image on top: what the \
                 guest wrote last is in the overlay; attach the disk to the node '{}' again, or \
                 merge that node (block-commit) and remove the overlay",
                overlay.disk.drive.name(),
                overlay.disk.overlay,
                overlay.disk.drive.file,
                overlay.node
            );
        }
    }
    for overlay in overlays.iter().filter(|overlay| is_attached(&overlay.node)) {
        let job = merge_job(overlay);
        jobs::start_merge(monitor, step, &job, &overlay.node, &overlay.disk.drive.node)?;
        jobs.push(job);
    }
    Ok(())
}

/// Whether a disk was switched to an overlay: the node has an image below it only since then. If
/// there is no node any more, the file says whether it has data.
fn was_switched_to(overlay: &Overlay, nodes: &Value) -> Result<bool> {
    let mut nodes = nodes.as_array().into_iter().flatten();
    if let Some(node) = nodes.find(|node| node["node-name"] == overlay.node) {
        return Ok(!node["backing_file"].is_null());
    }
    let has_data = overlay.own.as_ref().map_or(Ok(false), |own| images::has_data(own.file()));
    has_data.map_err(|error| {
        Error::system(format!("cannot read the overlay '{}'", overlay.disk.overlay), error)
    })
}

/// Removes the nodes and the files of overlays that are not in use. The list keeps those that could
/// not be removed.
pub fn discard(monitor: &mut dyn Execute, overlays: &mut Vec<Overlay>) -> Result<()> {
    let mut first_error = None;
    overlays.retain(|overlay| match discard_one(monitor, overlay) {
        Ok(()) => false,
        Err(error) => {
            first_error.get_or_insert(error);
            true
        }
    });
    first_error.map_or(Ok(()), Err)
}

fn discard_one(monitor: &mut dyn Execute, overlay: &Overlay) -> Result<()> {
    if overlay.made == Made::Nothing {
        return Ok(());
    }
    let nodes = [(Made::Node, &overlay.node), (Made::FileNode, &overlay.file_node)];
    if overlay.made == Made::FileNode {
        // If an answer was lost, the formatting job may still exist and use the node. If it does
        // not exist, this call fails, which is ignored.
        let _ =
            jobs::wait(monitor, &[format!("{}-create", overlay.node)], Until::Completed, |_, _| ());
    }
    // A command whose reply was lost may have made one node more than was noted.
    for (made, node) in nodes {
        let command = Command::new("blockdev-del", json!({ "node-name": node }));
        match monitor.execute(command, Deadline::after(DEFAULT_TIMEOUT)) {
            Ok(_) => {}
            Err(Failure::Refused(..)) if overlay.made < made => {}
            Err(failure) => {
                let step =
                    format!("cannot remove the overlay '{}', which stays", overlay.disk.overlay);
                return Err(failure.into_error(&step));
            }
        }
    }
    discard_file(overlay)
}

fn discard_file(overlay: &Overlay) -> Result<()> {
    let Some(own) = &overlay.own else { return Ok(()) };
    own.discard()
        .map_err(|error| Error::system(format!("cannot discard '{}'", overlay.disk.overlay), error))
}

/// Merges the overlays of a QEMU that has ended, by `qemu-img`. If one cannot be merged, all are
/// kept.
pub fn merge_offline(overlays: &mut [Overlay]) -> Result<()> {
    for at in 0..overlays.len() {
        let overlay = &overlays[at];
        if overlay.made != Made::Node {
            continue;
        }
        let merged = match (&overlay.merge, &overlay.own) {
            (Merge::Not, Some(own)) => overlay_file::commit(
                own.file(),
                &overlay.disk.drive.file,
                &overlay.disk.drive.format,
            ),
            (Merge::Not | Merge::Done, _) => Ok(()),
            (Merge::Completing, _) => Err(Error::new(
                Code::OperationFailed,
                format!(
                    "QEMU ended just when '{}' was merged: the overlay or its image, whichever \
                     was written last, is the newer one",
                    overlay.disk.overlay
                ),
            )),
        };
        merged.map_err(|error| {
            Error::new(
                error.code,
                format!(
                    "QEMU has ended, and what the guest wrote after the instant is in {}, which \
                     could not be merged and must not be removed ({}): run `qemu-img commit` on \
                     each when the cause is fixed, before the guest is started again",
                    paths(overlays),
                    error.message
                ),
            )
        })?;
        overlays[at].merge = Merge::Done;
    }
    Ok(())
}

/// Merges and discards the overlays of a QEMU that has ended. `switched`: the overlays may have the
/// guest's writes; then they are merged, unless that was done.
pub fn merge_and_discard_offline(overlays: &mut Vec<Overlay>, switched: bool) -> Result<()> {
    if switched {
        merge_offline(overlays)?;
    }
    let mut first_error = None;
    for overlay in overlays.drain(..).rev() {
        if let Err(error) = check_closed(&overlay).and_then(|()| discard_file(&overlay)) {
            first_error.get_or_insert(error);
        }
    }
    first_error.map_or(Ok(()), Err)
}

/// Refuses to discard an overlay that another QEMU has open, which was started after the merge.
fn check_closed(overlay: &Overlay) -> Result<()> {
    if overlay.own.as_ref().is_some_and(|own| sys::is_locked(own.file(), sys::IMAGE_LOCKS)) {
        fail!(
            OperationFailed,
            "QEMU has ended, and another QEMU has the overlay '{}' of disk '{}' open: the overlay \
             stays, and its content until then is in the image below",
            overlay.disk.overlay,
            overlay.disk.drive.name()
        );
    }
    Ok(())
}

fn paths(overlays: &[Overlay]) -> String {
    let of_disk = |overlay: &Overlay| {
        format!("'{}' of disk '{}'", overlay.disk.overlay, overlay.disk.drive.name())
    };
    overlays.iter().map(of_disk).collect::<Vec<_>>().join(", ")
}
