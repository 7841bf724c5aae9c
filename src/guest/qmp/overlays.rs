//! Overlays by QMP: created while the guest runs, switched to in one transaction, merged back when a snapshot fails.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Command as Process;
use std::thread::sleep;
use std::time::Duration;

use serde_json::{Value, json};

use crate::error::{Code, Error, Result, fail};
use crate::guest::PATIENCE;
use crate::monitor::{Command, Deadline, Execute, Failure, Monitor};
use crate::snapshot::DiskPlan;
use crate::sys;

/// Of every node that we add.
pub const NODE_PREFIX: &str = "instantsnap-";
/// A merge that makes no progress for so long is given up.
const STALLED: Duration = Duration::from_secs(60);

/// An overlay, and how far it has come.
#[derive(Debug)]
pub struct Overlay {
    disk: DiskPlan,
    /// The node of the overlay's format, and of its file.
    node: String,
    file_node: String,
    made: Made,
    merge: Merge,
}

/// How far an overlay has been merged into the image below. Once it is, that one is the newer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Merge {
    Not,
    /// QEMU was told to complete it, and has not said yet that it has.
    Completing,
    Done,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Made {
    Nothing,
    File,
    FileNode,
    Node,
}

impl Overlay {
    /// One that is still to be made.
    pub fn new(disk: &DiskPlan, index: usize) -> Overlay {
        // Unique among the nodes of earlier snapshots, which are in use below.
        let mut random = [0; 4];
        let got = rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::NONBLOCK);
        let random = got.map_or(std::process::id(), |_| u32::from_ne_bytes(random));
        let node = format!("{NODE_PREFIX}{random:08x}-{index}");
        Overlay { disk: disk.clone(), file_node: format!("{node}f"), node, made: Made::Nothing, merge: Merge::Not }
    }
}

/// Creates one: file, node of the file, qcow2 format, node of the format. QEMU itself formats it, with the backing file as
/// it knows it.
pub fn create(monitor: &mut Monitor, overlay: &mut Overlay) -> Result<()> {
    let drive = &overlay.disk.drive;
    let path = &overlay.disk.overlay;
    if !drive.file.starts_with('/') && !drive.file.contains(':') {
        fail!(
            ConfigUnsupported,
            "the image of disk '{}' has the relative path '{}', which cannot be resolved: start QEMU with an absolute one",
            drive.name(),
            drive.file
        );
    }
    if drive.file.starts_with("/dev/fdset/") {
        fail!(
            ConfigUnsupported,
            "the image of disk '{}' was opened as a file descriptor ('{}'), which no overlay can refer to: start QEMU with \
             its path",
            drive.name(),
            drive.file
        );
    }
    let file = create_file(path, &drive.file, drive.name())?;
    overlay.made = Made::File;

    let step = format!("cannot create external snapshot file '{path}' of disk '{}'", drive.name());
    let cache = json!({ "direct": drive.options.direct, "no-flush": drive.options.no_flush });
    let mut options = json!({
        "driver": "file",
        "node-name": overlay.file_node,
        "filename": path,
        "auto-read-only": true,
        "cache": cache,
    });
    match drive.options.aio.as_deref() {
        // QEMU wants O_DIRECT for it.
        Some("native") if !drive.options.direct => {}
        Some(aio) => options["aio"] = json!(aio),
        None => {}
    }
    if let Some(discard) = &drive.options.discard {
        options["discard"] = json!(discard);
    }
    blockdev_add(monitor, &step, options)?;
    overlay.made = Made::FileNode;

    let format = json!({
        "driver": "qcow2",
        "file": overlay.file_node,
        "size": drive.size,
        "backing-file": drive.file,
        "backing-fmt": drive.format,
    });
    let job = format!("{}-create", overlay.node);
    let command = Command::new("blockdev-create", json!({ "job-id": job, "options": format }));
    monitor.run(&step, command, Deadline::after(PATIENCE))?;
    wait_for_jobs(monitor, &[job], |_, _| ())
        .map_err(|error| Error::new(error.code, format!("{step}: {}", error.message)))?;

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

    // From the switch on the guest's data is in it: its name must not be lost in a crash of the host.
    file.sync_all().and_then(|()| sys::sync_parent(Path::new(path))).map_err(|error| Error::system(step, error))
}

fn blockdev_add(monitor: &mut Monitor, step: &str, options: Value) -> Result<()> {
    monitor.run(step, Command::new("blockdev-add", options), Deadline::after(PATIENCE)).map(drop)
}

/// Creates the file, owned and readable as the image below it, so that whoever could open that one can open this.
fn create_file(path: &str, image: &str, disk: &str) -> Result<File> {
    let step = format!("cannot create external snapshot file '{path}' of disk '{disk}'");
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    let file = match file {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            fail!(ConfigUnsupported, "external snapshot file for disk '{disk}' already exists: '{path}'; name another")
        }
        Err(error) => return Err(Error::system(step, error)),
    };
    if let Err(error) = sys::liken(&file, Path::new(image)) {
        let _ = sys::remove_file(Path::new(path));
        return Err(Error::system(step, error));
    }
    Ok(file)
}

/// Switches all of them, with their bitmaps, in one transaction.
pub fn switch(monitor: &mut Monitor, overlays: &[Overlay], deadline: Deadline) -> Result<()> {
    if overlays.is_empty() {
        return Ok(());
    }
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

/// Merges those that are active back into the images below, all at once.
pub fn merge(monitor: &mut Monitor, overlays: &mut [Overlay]) -> Result<()> {
    let mut jobs = Vec::new();
    let started = start_merging(monitor, overlays, &mut jobs);
    // Those that did start are seen to their end, whatever became of the others.
    let ended = wait_for_jobs(monitor, &jobs, |job, merge| {
        overlays.iter_mut().filter(|overlay| merge_job(overlay) == job).for_each(|overlay| overlay.merge = merge);
    });
    started.and(ended).map_err(|error| {
        error.and(format!(
            "the guest goes on with the overlays {}, which must not be removed: merge them with block-commit when the \
             cause is mended",
            paths(overlays)
        ))
    })
}

fn merge_job(overlay: &Overlay) -> String {
    format!("{}-undo", overlay.node)
}

fn start_merging(monitor: &mut Monitor, overlays: &[Overlay], jobs: &mut Vec<String>) -> Result<()> {
    let step = "cannot merge the overlays back into their images";
    let blocks = monitor.run(step, Command::new("query-block", json!({})), Deadline::after(PATIENCE))?;
    let is_active = |overlay: &&Overlay| {
        let mut blocks = blocks.as_array().into_iter().flatten();
        blocks.any(|block| block["inserted"]["node-name"] == overlay.node)
    };
    for overlay in overlays.iter().filter(is_active) {
        let job = merge_job(overlay);
        let arguments = json!({
            "job-id": job,
            "device": overlay.node,
            "base-node": overlay.disk.drive.node,
            "auto-dismiss": false,
        });
        monitor.run(step, Command::new("block-commit", arguments), Deadline::after(PATIENCE))?;
        jobs.push(job);
    }
    Ok(())
}

/// Waits for jobs that do not dismiss themselves, completes those that are ready, and dismisses them all.
/// `tell` learns how far each has come.
fn wait_for_jobs(monitor: &mut Monitor, ids: &[String], mut tell: impl FnMut(&str, Merge)) -> Result<()> {
    let mut left: Vec<&String> = ids.iter().collect();
    let mut first_error = None;
    let mut seen = Vec::new();
    let mut deadline = Deadline::after(STALLED);
    let mut nap = Duration::from_micros(200);
    while !left.is_empty() {
        let jobs = monitor.run(
            "cannot ask for block jobs",
            Command::new("query-jobs", json!({})),
            Deadline::after(PATIENCE),
        )?;
        let ours = |job: &&Value| ids.iter().any(|id| job["id"] == **id);
        let jobs: Vec<Value> = jobs.as_array().into_iter().flatten().filter(ours).cloned().collect();
        let mut ended = Vec::new();
        for &id in &left {
            let Some(job) = jobs.iter().find(|job| job["id"] == **id) else {
                first_error.get_or_insert(Error::new(Code::OperationFailed, format!("block job '{id}' is gone")));
                ended.push(id);
                continue;
            };
            match job["status"].as_str() {
                Some("ready") => {
                    tell(id, Merge::Completing);
                    job_command(monitor, "job-complete", id)?;
                }
                Some("concluded") if job_command(monitor, "job-dismiss", id)? => {
                    match job["error"].as_str() {
                        Some(error) => {
                            tell(id, Merge::Not);
                            first_error.get_or_insert(Error::new(Code::OperationFailed, error));
                        }
                        None => tell(id, Merge::Done),
                    }
                    ended.push(id);
                }
                _ => {}
            }
        }
        left.retain(|id| !ended.contains(id));
        if jobs != seen {
            deadline = Deadline::after(STALLED);
            seen = jobs;
        } else if deadline.left().is_none() {
            for id in &left {
                let _ = job_command(monitor, "job-cancel", id);
            }
            fail!(OperationTimeout, "it makes no progress");
        }
        if !left.is_empty() {
            sleep(nap);
            nap = (nap * 2).min(Duration::from_millis(20));
        }
    }
    first_error.map_or(Ok(()), Err)
}

/// Whether it was done.
fn job_command(monitor: &mut Monitor, command: &str, id: &str) -> Result<bool> {
    let step = format!("cannot end block job '{id}' ({command})");
    let command = Command::new(command, json!({ "id": id }));
    match monitor.execute(command, Deadline::after(PATIENCE)) {
        Ok(_) => Ok(true),
        // It has moved on since it was asked for; the next look shows where to.
        Err(Failure::Refused(..)) => Ok(false),
        Err(failure) => Err(failure.into_error(&step)),
    }
}

/// Removes nodes and files of those that are not in use. Those that could not be removed are kept in the list.
pub fn discard(monitor: &mut Monitor, overlays: &mut Vec<Overlay>) -> Result<()> {
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

fn discard_one(monitor: &mut Monitor, overlay: &Overlay) -> Result<()> {
    let nodes = [(Made::Node, &overlay.node), (Made::FileNode, &overlay.file_node)];
    if overlay.made == Made::FileNode {
        // Where an answer was lost, the job that formats it can be there still, and have the node in use. Where it is not,
        // this says so.
        let _ = wait_for_jobs(monitor, &[format!("{}-create", overlay.node)], |_, _| ());
    }
    // A command whose reply was lost can have made one step more than we know of.
    for (made, node) in nodes {
        let command = Command::new("blockdev-del", json!({ "node-name": node }));
        match monitor.execute(command, Deadline::after(PATIENCE)) {
            Ok(_) => {}
            Err(Failure::Refused(..)) if overlay.made < made => {}
            Err(failure) => {
                let step = format!("cannot remove the overlay '{}', which stays", overlay.disk.overlay);
                return Err(failure.into_error(&step));
            }
        }
    }
    remove(overlay)
}

fn remove(overlay: &Overlay) -> Result<()> {
    if overlay.made < Made::File {
        return Ok(());
    }
    let path = &overlay.disk.overlay;
    sys::remove_file(Path::new(path)).map_err(|error| Error::system(format!("cannot remove '{path}'"), error))
}

/// For a QEMU that has ended. `switched`: the overlays may hold what the guest wrote; then they are merged by `qemu-img`, or
/// kept.
pub fn merge_and_discard_offline(overlays: &mut Vec<Overlay>, switched: bool) -> Result<()> {
    for overlay in overlays.iter().filter(|overlay| switched && overlay.made == Made::Node) {
        let merged = match overlay.merge {
            Merge::Not => commit_offline(&overlay.disk.overlay),
            Merge::Done => Ok(()),
            Merge::Completing => Err(Error::new(
                Code::OperationFailed,
                format!(
                    "it ended just when '{}' was merged: which of the two was written last is the newer",
                    overlay.disk.overlay
                ),
            )),
        };
        merged.map_err(|error| {
            Error::new(
                error.code,
                format!(
                    "QEMU has ended, and what the guest wrote after the instant is in {}, which could not be merged and \
                     must not be removed ({}): run `qemu-img commit` on each when the cause is mended, before the guest is \
                     started again",
                    paths(overlays),
                    error.message
                ),
            )
        })?;
    }
    overlays.drain(..).rev().try_for_each(|overlay| remove(&overlay))
}

fn commit_offline(overlay: &str) -> Result<()> {
    let mut commit = Process::new("qemu-img");
    commit.args(["commit", "-q", "-d", "-f", "qcow2", overlay]);
    sys::run_tool(&mut commit).map_err(|reason| Error::new(Code::OperationFailed, reason))
}

fn paths(overlays: &[Overlay]) -> String {
    overlays.iter().map(|overlay| format!("'{}'", overlay.disk.overlay)).collect::<Vec<_>>().join(", ")
}
