// SPDX-License-Identifier: LGPL-2.1-or-later

//! Snapshots by single QMP commands, and their undo.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use instantsnap_testkit::{Client, wait_for};
use serde_json::{Value, json};

const LONG: Duration = Duration::from_secs(600);

/// A QEMU whose guest has one disk.
pub struct Monitor {
    client: Client,
    /// The directory of the overlays.
    directory: PathBuf,
}

impl Monitor {
    pub fn new(client: Client, directory: &Path) -> Monitor {
        Monitor { client, directory: directory.to_owned() }
    }

    /// The pauses of the guest since the last call in microseconds, by QEMU's own STOP and RESUME
    /// events.
    pub fn pauses(&mut self) -> Vec<u64> {
        // All events before the reply have arrived.
        self.command("query-status", json!({}));
        let (mut pauses, mut stopped) = (Vec::new(), None);
        for event in self.client.events() {
            match event.name.as_str() {
                "STOP" => stopped = stopped.or(Some(event.timestamp_us)),
                "RESUME" => {
                    pauses.extend(stopped.take().map(|stopped| event.timestamp_us - stopped))
                }
                _ => {}
            }
        }
        assert_eq!(stopped, None, "the guest was stopped, and not resumed");
        assert!(!pauses.is_empty(), "no STOP and RESUME events");
        pauses
    }

    /// Takes a snapshot up to the resume of the guest, with QEMU's stream going through `cat`. If
    /// not `prepared`, the overlay is created within the pause.
    pub fn begin(&mut self, prepared: bool, memory: File) -> Child {
        let overlay = self.directory.join("by-hand.overlay");
        let top = self.top();
        if prepared {
            self.create_overlay(&overlay, &top);
        }
        let cat = self.send_pipe_to_cat(memory);
        self.set_background(true);

        self.command("stop", json!({}));
        if !prepared {
            self.create_overlay(&overlay, &top);
        }
        let switch = json!({ "node": top["node-name"], "overlay": "by-hand" });
        let actions = json!([{ "type": "blockdev-snapshot", "data": switch }]);
        self.command("transaction", json!({ "actions": actions }));
        self.command("migrate", json!({ "uri": "fd:by-hand" }));
        while !self.saves_pages() {
            std::thread::sleep(Duration::from_micros(20));
        }
        if self.command("query-status", json!({}))["running"] != true {
            self.command("cont", json!({}));
        }
        cat
    }

    /// Waits until all memory has gone through `cat`.
    pub fn finish(&mut self, cat: Child) {
        self.end(cat, "completed");
    }

    /// Cancels the migration. It is not for QEMU 7.2, which would leave the guest's memory
    /// write-protected.
    pub fn cancel(&mut self, cat: Child) {
        self.command("migrate_cancel", json!({}));
        self.end(cat, "cancelled");
    }

    fn end(&mut self, mut cat: Child, wanted: &str) {
        assert!(cat.wait().unwrap().success());
        wait_for(LONG, || {
            let migration = self.command("query-migrate", json!({}));
            let status = migration["status"].as_str().unwrap();
            assert_ne!(status, "failed");
            (status == wanted).then_some(())
        })
        .expect("the migration does not end");
        self.set_background(false);
    }

    fn saves_pages(&mut self) -> bool {
        let migration = self.command("query-migrate", json!({}));
        let pages = |kind: &str| migration["ram"][kind].as_u64().unwrap_or(0);
        assert_ne!(migration["status"], "failed");
        pages("normal") + pages("duplicate") > 0
    }

    /// QEMU creates the overlay, as with libvirt.
    fn create_overlay(&mut self, path: &Path, top: &Value) {
        File::create(path).unwrap();
        let file = json!({ "driver": "file", "node-name": "by-hand-file", "filename": path });
        self.command("blockdev-add", file);
        let options = json!({
            "driver": "qcow2", "file": "by-hand-file", "size": top["image"]["virtual-size"],
            "backing-file": top["file"], "backing-fmt": top["drv"],
        });
        self.command("blockdev-create", json!({ "job-id": "by-hand", "options": options }));
        while self.command("query-jobs", json!({}))[0]["status"] != "concluded" {}
        self.command("job-dismiss", json!({ "id": "by-hand" }));
        let overlay = json!({ "driver": "qcow2", "node-name": "by-hand", "file": "by-hand-file", "backing": null });
        self.command("blockdev-add", overlay);
    }

    fn send_pipe_to_cat(&mut self, memory: File) -> Child {
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let cat = Command::new("cat").stdin(Stdio::from(read)).stdout(memory).spawn().unwrap();
        self.client
            .execute_with_fd("getfd", json!({ "fdname": "by-hand" }), write.as_fd())
            .unwrap();
        cat
    }

    fn set_background(&mut self, state: bool) {
        let set = json!([{ "capability": "background-snapshot", "state": state }]);
        self.command("migrate-set-capabilities", json!({ "capabilities": set }));
    }

    /// Merges everything into the base image, and removes all overlays.
    pub fn flatten(&mut self) {
        let top = self.top();
        if top["image"]["backing-image"].is_object() {
            self.command(
                "block-commit",
                json!({ "job-id": "flatten", "device": top["node-name"] }),
            );
        }
        wait_for(LONG, || {
            let jobs = self.command("query-block-jobs", json!({}));
            if jobs[0]["ready"] == true && jobs[0]["status"] == "ready" {
                let _ = self.client.execute("block-job-complete", json!({ "device": "flatten" }));
            }
            jobs.as_array().is_some_and(Vec::is_empty).then_some(())
        })
        .expect("the overlays cannot be merged");
        let nodes = self.command("query-named-block-nodes", json!({ "flat": true }));
        let mut ours: Vec<(&str, &str)> = Vec::new();
        for node in nodes.as_array().unwrap() {
            let (name, file) =
                (node["node-name"].as_str().unwrap(), node["file"].as_str().unwrap());
            if name.starts_with("by-hand") || name.starts_with("instantsnap-") {
                ours.push((name, file));
            }
        }
        // A format node has to be removed before its file node.
        for (name, file) in ours.iter().chain(&ours) {
            let _ = self.client.execute("blockdev-del", json!({ "node-name": name }));
            let _ = std::fs::remove_file(file);
        }
    }

    fn top(&mut self) -> Value {
        let blocks = self.command("query-block", json!({}));
        let block = blocks.as_array().unwrap().iter().find(|block| block["inserted"].is_object());
        block.expect("a disk")["inserted"].clone()
    }

    /// Runs a command that must succeed.
    pub fn command(&mut self, command: &str, arguments: Value) -> Value {
        self.client.execute(command, arguments).unwrap_or_else(|error| panic!("{command}: {error}"))
    }
}
