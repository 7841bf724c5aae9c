// SPDX-License-Identifier: LGPL-2.1-or-later

//! The QMP commands that the watchdog sends on the monitor's socket.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use serde_json::{Value, json};

use super::files::{self, Discard};
use super::journal::DurableJournal;
use super::remaining::Remaining;
use super::reply::{MARK, Reader, Reply};
use super::stage::Stage;
use crate::backend::MonitorOverlay;
use crate::machine_log::Message;
use crate::model::journal::Line;
use crate::own_file::KnownFile;
use crate::sys::wait_ready;

/// The time between two tries to complete a block job.
const PAUSE_MS: i32 = 50;

/// The id of a command whose reply the watchdog does not wait for.
const LATE_MARK: &str = "instantsnap-watchdog-late";

/// The QMP commands of an undo, made in advance.
#[derive(Debug)]
pub struct QmpScript {
    pub resume: String,
    /// The same command, whose reply is left to the caller.
    resume_late: String,
    restore: Vec<String>,
    query_migrate: String,
    query_status: String,
    overlays: Vec<Overlay>,
    files: Vec<Discard>,
}

/// The commands that undo one overlay.
#[derive(Debug)]
struct Overlay {
    /// Empty if the watchdog must not merge the overlay.
    commit: String,
    complete: String,
    delete: String,
    delete_file_node: String,
    file: Option<Discard>,
    /// The journal's line that the overlay is merged.
    merged: Vec<u8>,
    complaint: Message,
}

impl Overlay {
    fn new(overlay: &MonitorOverlay) -> Overlay {
        let MonitorOverlay { overlay, node, file_node, image_node, file, complaint } = overlay;
        let merged = Line::Merged { overlays: vec![overlay.clone()] };
        let job = format!("{node}-undo");
        let delete = |node: &str| line("blockdev-del", &json!({ "node-name": node }));
        let commit = |image: &String| {
            line("block-commit", &json!({ "job-id": job, "device": node, "base-node": image }))
        };
        Overlay {
            commit: image_node.as_ref().map(commit).unwrap_or_default(),
            complete: line("block-job-complete", &json!({ "device": job })),
            delete: delete(node),
            delete_file_node: delete(file_node),
            file: file.as_ref().and_then(Discard::new),
            merged: merged.text().unwrap_or_default(),
            complaint: Message::error(complaint),
        }
    }

    /// Merges the overlay into the image below if it is in use, and removes it once it is not.
    /// Returns whether it is removed.
    fn undo(
        &self,
        monitor: &OwnedFd,
        switched: bool,
        journal: Option<&DurableJournal>,
        stream: &mut Remaining,
    ) -> bool {
        let mut execute = |command: &str| execute(monitor, command, stream);
        let is_ours = switched && !self.commit.is_empty();
        let begun = is_ours && execute(&self.commit).is_some_and(|reply| reply.done);
        if begun {
            // QEMU refuses to complete the job until all data is merged. When the job has ended,
            // QEMU replies that there is no such job.
            loop {
                match execute(&self.complete) {
                    None => return false,
                    Some(reply) if reply.no_job => break,
                    Some(_) => wait_ready([None, None], PAUSE_MS),
                };
            }
        }
        match execute(&self.delete) {
            Some(reply) if reply.done => {
                execute(&self.delete_file_node);
                // QEMU has refused to merge it, and not to let it go: the disk was not switched, or
                // another client has detached it, or it was merged before. The recovery can tell.
                if is_ours && !begun && !self.file.as_ref().is_some_and(Discard::is_empty_overlay) {
                    self.complaint.send();
                    return false;
                }
                journal.map(|journal| journal.append(&self.merged));
                self.file.iter().for_each(Discard::run);
                true
            }
            // QEMU keeps an overlay that is in use. A driver merges its own overlays.
            Some(_) if is_ours => {
                self.complaint.send();
                false
            }
            _ => false,
        }
    }
}

impl QmpScript {
    /// Makes the commands. `restore` has the commands that put the settings back, by name and
    /// arguments. `files` are the snapshot's files.
    pub fn new(
        restore: &[(String, Value)],
        overlays: &[MonitorOverlay],
        files: &[KnownFile],
    ) -> QmpScript {
        QmpScript {
            resume: line("cont", &json!({})),
            resume_late: json!({ "execute": "cont", "id": LATE_MARK }).to_string() + "\n",
            restore: restore.iter().map(|(name, arguments)| line(name, arguments)).collect(),
            query_migrate: line("query-migrate", &json!({})),
            query_status: line("query-status", &json!({})),
            overlays: overlays.iter().map(Overlay::new).collect(),
            files: files.iter().filter_map(Discard::new).collect(),
        }
    }

    /// Resumes the guest of a stopped caller. The caller may go on at any time, and it reads the
    /// replies on the monitor. So the watchdog does not wait for a reply. Returns whether it has
    /// sent the command.
    pub fn resume_late(&self, monitor: &OwnedFd) -> bool {
        let line = self.resume_late.as_bytes();
        send(monitor, line, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) == Ok(line.len())
    }

    /// Whether a migration is under way; `None` if QEMU has ended.
    pub fn is_migrating(&self, monitor: &OwnedFd, stream: &mut Remaining) -> Option<bool> {
        execute(monitor, &self.query_migrate, stream).map(|reply| reply.migrating)
    }

    /// Whether the end of a migration has stopped the guest.
    pub fn is_stopped_by_migration(&self, monitor: &OwnedFd, stream: &mut Remaining) -> bool {
        execute(monitor, &self.query_status, stream).is_some_and(|reply| reply.stopped_by_migration)
    }

    /// Undoes everything but the pause: the settings, the files and the overlays. `is_noted`: the
    /// journal on disk says so. Returns whether no overlay is left.
    pub fn undo(
        &self,
        monitor: &OwnedFd,
        stage: Stage,
        journal: Option<&DurableJournal>,
        is_noted: bool,
        stream: &mut Remaining,
    ) -> bool {
        for command in self.restore.iter().filter(|_| !stage.is_restored()) {
            execute(monitor, command, stream);
        }
        // The first merge changes an image of the snapshot. The snapshot must not look complete
        // from then on, not even after a loss of power.
        let is_spoilt = files::discard_for_good(&self.files) || !stage.is_restored();
        if !is_spoilt && !is_noted {
            self.overlays.iter().for_each(|overlay| overlay.complaint.send());
            return false;
        }
        let mut done = true;
        for overlay in &self.overlays {
            done &= overlay.undo(monitor, stage.is_switched(), journal, stream);
        }
        done
    }
}

fn line(name: &str, arguments: &Value) -> String {
    json!({ "execute": name, "arguments": arguments, "id": MARK }).to_string() + "\n"
}

/// Sends a command, and waits for the reply without a limit, because QEMU forgets what it has not
/// read when the connection ends. Meanwhile reads the stream, because QEMU may be waiting for that.
/// Returns `None` if QEMU has ended.
pub fn execute(monitor: &OwnedFd, command: &str, stream: &mut Remaining) -> Option<Reply> {
    let mut left = command.as_bytes();
    while !left.is_empty() {
        match send(monitor, left, SendFlags::NOSIGNAL) {
            Ok(sent) => left = left.get(sent..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            // QEMU has yet to read what was sent before. There is no hurry.
            Err(Errno::AGAIN) => {
                wait_ready([(!stream.ended).then_some(&stream.pipe), None], 10);
                if !stream.ended {
                    stream.discard();
                }
            }
            Err(_) => return None,
        }
    }
    let mut reader = Reader::new();
    loop {
        wait_ready([Some(monitor), (!stream.ended).then_some(&stream.pipe)], -1);
        if !stream.ended {
            stream.discard();
        }
        if !wait_ready([Some(monitor), None], 0) {
            continue;
        }
        let mut buffer = [0; 4096];
        let got = match rustix::io::read(monitor, &mut buffer) {
            Ok(0) => return None,
            Ok(got) => got,
            Err(Errno::AGAIN | Errno::INTR) => continue,
            Err(_) => return None,
        };
        let mut replies = buffer.iter().take(got).filter_map(|byte| reader.read(*byte));
        // Only one command at a time waits for a reply, so the rest of the buffer is not needed.
        if let Some(reply) = replies.find(|reply| reply.ours) {
            return Some(reply);
        }
    }
}
