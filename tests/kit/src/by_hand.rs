// SPDX-License-Identifier: LGPL-2.1-or-later

//! A background snapshot that is taken and restored by single commands.
//!
//! In the right order it is the baseline for the library's measurements. In a wrong order it is the
//! control experiment which shows that the tick guest notices a torn snapshot.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use serde_json::{Value, json};

use crate::guest::Guest;
use crate::machine::{Format, make_image};
use crate::qmp::Client;
use crate::wait::{DEADLINE, wait_for};

/// When the guest is resumed after `migrate`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resume {
    /// When pages have been saved, so that write tracking is armed. This is right.
    Armed,
    /// As soon as the migration is `active`. This is wrong: memory can become newer than the disks.
    Active,
}

/// A snapshot: QEMU's own stream, and the images that the snapshot is based on.
#[derive(Debug)]
pub struct Snapshot {
    pub memory: PathBuf,
    pub disks: Vec<(PathBuf, Format)>,
    /// The pause by QEMU's own time stamps, from STOP to the last RESUME, in microseconds.
    pub pause_us: u64,
    /// The last number that the guest had printed when it was stopped.
    pub tick: u32,
}

/// A snapshot whose guest has been resumed and whose memory is still flowing.
#[derive(Debug)]
pub struct Draining {
    client: Client,
    drain: JoinHandle<io::Result<u64>>,
    snapshot: Snapshot,
}

/// Takes a snapshot of a running guest until the guest is resumed, into files in the guest's
/// directory whose names end in `name`. The overlays are created beforehand.
pub fn begin(guest: &Guest, name: &str, resume: Resume) -> Draining {
    let mut client = guest.control();
    let memory = guest.directory().join(format!("memory.{name}"));
    let mut disks = Vec::new();
    let mut switch = Vec::new();
    for (index, disk) in guest.disks().iter().enumerate() {
        let top = top_of(&mut client, &disk.device);
        let overlay = guest.directory().join(format!("overlay-{index}.{name}"));
        let node = format!("overlay-{index}-{name}");
        let file = PathBuf::from(top["file"].as_str().expect("an image file"));
        let format = if top["drv"] == "raw" { Format::Raw } else { Format::Qcow2 };
        make_image(&overlay, Format::Qcow2, Some((&file, format)));
        // The overlay's backing file is the existing node, which is not opened a second time.
        let open = json!({"driver": "qcow2", "node-name": node, "backing": null,
            "file": {"driver": "file", "filename": overlay}});
        run(&mut client, "blockdev-add", open);
        switch.push(json!({"type": "blockdev-snapshot",
            "data": {"node": top["node-name"], "overlay": node}}));
        disks.push((file, format));
    }
    let drain = send_pipe(&mut client, &memory);
    set_capability(&mut client, true);

    client.events();
    run(&mut client, "stop", json!({}));
    let tick = guest.serial().tick.expect("a guest that counts");
    run(&mut client, "transaction", json!({"actions": switch}));
    run(&mut client, "migrate", json!({"uri": "fd:snapshot"}));
    let status = |client: &mut Client| run(client, "query-migrate", json!({}));
    wait_for(DEADLINE, || {
        let now = status(&mut client);
        match resume {
            Resume::Armed => pages_saved(&now).then_some(()),
            Resume::Active => (now["status"] == "active" || pages_saved(&now)).then_some(()),
        }
    })
    .unwrap_or_else(|| guest.fail("the snapshot's migration does not get going"));
    // QEMU before 9 resumes the guest by itself when write tracking is armed.
    if run(&mut client, "query-status", json!({}))["running"] != true {
        run(&mut client, "cont", json!({}));
    }
    let events = client.events();
    let when = |name| events.iter().filter(move |event| event.name == name);
    let stopped = when("STOP").next().expect("a STOP event").timestamp_us;
    let resumed = when("RESUME").next_back().expect("a RESUME event").timestamp_us;
    let snapshot = Snapshot { memory, disks, pause_us: resumed - stopped, tick };
    Draining { client, drain, snapshot }
}

impl Draining {
    /// Waits until all memory is in the file, and disables the capability again.
    pub fn finish(mut self, guest: &Guest) -> Snapshot {
        let status = wait_for(DEADLINE, || {
            let now = run(&mut self.client, "query-migrate", json!({}));
            let status = now["status"].as_str().unwrap_or("").to_owned();
            ["completed", "failed", "cancelled"].contains(&&*status).then_some(status)
        });
        if status.as_deref() != Some("completed") {
            guest.fail(&format!("the snapshot's migration has ended as {status:?}"));
        }
        self.drain.join().expect("the drain panicked").expect("memory cannot be written");
        set_capability(&mut self.client, false);
        self.snapshot
    }
}

/// Starts the guest's machine again on fresh overlays of the snapshot's images, loads the memory,
/// and resumes the guest.
pub fn restore_clone(original: &Guest, snapshot: &Snapshot) -> Guest {
    let overlay = |(file, format): &(PathBuf, Format)| {
        let mut overlay = file.clone().into_os_string();
        overlay.push(".back");
        let overlay = PathBuf::from(overlay);
        let _ = std::fs::remove_file(&overlay);
        make_image(&overlay, Format::Qcow2, Some((file, *format)));
        (overlay, Format::Qcow2)
    };
    let disks: Vec<_> = snapshot.disks.iter().map(overlay).collect();
    let guest = original.machine().for_revert(&disks).start();
    load(&guest, &snapshot.memory);
    guest
}

/// Feeds QEMU's stream to a guest started with `-incoming defer`, and resumes it.
pub fn load(guest: &Guest, memory: &Path) {
    let mut client = guest.control();
    let mut file = File::open(memory).expect("the memory file");
    let (read, write) = pipe();
    client
        .execute_with_fd("getfd", json!({"fdname": "snapshot"}), read.as_fd())
        .unwrap_or_else(|error| panic!("getfd: {error}"));
    drop(read);
    let feed = std::thread::spawn(move || io::copy(&mut file, &mut { write }));
    run(&mut client, "migrate-incoming", json!({"uri": "fd:snapshot"}));
    wait_for(DEADLINE, || {
        let status = client.execute("query-migrate", json!({})).unwrap_or_default();
        match status["status"].as_str() {
            Some("completed") => Some(()),
            Some("failed") => guest.fail("the snapshot cannot be loaded"),
            _ if !guest.alive() => guest.fail("QEMU has ended while it was loading"),
            _ => None,
        }
    })
    .unwrap_or_else(|| guest.fail("the snapshot is not loaded in time"));
    feed.join().expect("the feed panicked").expect("memory cannot be read");
    run(&mut client, "cont", json!({}));
}

fn run(client: &mut Client, command: &str, arguments: Value) -> Value {
    client.execute(command, arguments).unwrap_or_else(|error| panic!("{command}: {error}"))
}

fn set_capability(client: &mut Client, state: bool) {
    let set = json!([{"capability": "background-snapshot", "state": state}]);
    run(client, "migrate-set-capabilities", json!({"capabilities": set}));
}

fn pages_saved(migration: &Value) -> bool {
    let pages = |kind: &str| migration["ram"][kind].as_u64().unwrap_or(0);
    pages("normal") + pages("duplicate") > 0 || migration["status"] == "completed"
}

/// The top node of a device's chain, by `query-block`.
fn top_of(client: &mut Client, device: &str) -> Value {
    let blocks = run(client, "query-block", json!({}));
    let ours = |block: &&Value| {
        // The qdev path is the id, or `/machine/peripheral/ID/virtio-backend`.
        block["qdev"].as_str().is_some_and(|path| path.split('/').any(|part| part == device))
    };
    let found = blocks.as_array().into_iter().flatten().find(ours);
    found.unwrap_or_else(|| panic!("no device {device} in {blocks}"))["inserted"].clone()
}

fn pipe() -> (File, File) {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).expect("a pipe");
    (read.into(), write.into())
}

/// Gives QEMU the write end of a pipe as `snapshot`. A thread copies the data into the file.
fn send_pipe(client: &mut Client, memory: &Path) -> JoinHandle<io::Result<u64>> {
    let mut file = File::create(memory).expect("the memory file");
    let (read, write) = pipe();
    let _ = rustix::pipe::fcntl_setpipe_size(&read, 1 << 20); // only for speed
    client
        .execute_with_fd("getfd", json!({"fdname": "snapshot"}), write.as_fd())
        .unwrap_or_else(|error| panic!("getfd: {error}"));
    std::thread::spawn(move || io::copy(&mut { read }, &mut file))
}
