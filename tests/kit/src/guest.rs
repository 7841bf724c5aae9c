// SPDX-License-Identifier: LGPL-2.1-or-later

//! A running QEMU with its guest: its sockets and files, the output on its serial line, and its end
//! with the test.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::Mutex;
use std::time::Duration;

use tempfile::TempDir;

use serde_json::json;

use crate::daemon::Daemon;
use crate::machine::{Format, Machine};
use crate::qmp::Client;
use crate::serial::Serial;
use crate::wait::{DEADLINE, wait_for};

/// A disk of a guest, as it was at the start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// The id of the device (`vd0`), or under libvirt the target (`vda`).
    pub device: String,
    /// The id of the drive (`drive-0`) or the name of the node (`disk-0`), depending on the
    /// attachment; empty under libvirt.
    pub backend: String,
    pub file: PathBuf,
    pub format: Format,
}

/// A running QEMU. It is killed, and its directory removed, when this is dropped.
#[derive(Debug)]
pub struct Guest {
    machine: Machine,
    runner: Runner,
    disks: Vec<Disk>,
    directory: TempDir,
}

/// The program that has started QEMU.
#[derive(Debug)]
enum Runner {
    Kit { child: Mutex<Child>, pid: u32 },
    Libvirt { daemon: Daemon, name: String },
}

impl Guest {
    /// A guest whose QEMU has just been started and can still fail.
    pub(crate) fn spawned(
        machine: Machine,
        directory: TempDir,
        child: Child,
        disks: Vec<Disk>,
    ) -> Guest {
        let pid = child.id();
        Guest { machine, runner: Runner::Kit { child: Mutex::new(child), pid }, disks, directory }
    }

    pub(crate) fn of_libvirt(
        machine: Machine,
        directory: TempDir,
        daemon: Daemon,
        name: String,
        disks: Vec<Disk>,
    ) -> Guest {
        Guest { machine, runner: Runner::Libvirt { daemon, name }, disks, directory }
    }

    /// The machine that it was started from.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// The guest's own directory for logs, sockets and images. It exists as long as this object,
    /// even after [`Guest::kill`].
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The QMP socket for the library under test. Under libvirt there is none.
    pub fn qmp(&self) -> PathBuf {
        assert!(
            matches!(self.runner, Runner::Kit { .. }),
            "libvirt has this QEMU's monitor for itself"
        );
        self.directory().join("qmp.sock")
    }

    /// The libvirtd of the domain. Panics where the guest is not a domain.
    pub fn daemon(&self) -> &Daemon {
        self.domain().0
    }

    /// The domain's name. Panics where the guest is not a domain.
    pub fn name(&self) -> &str {
        self.domain().1
    }

    fn domain(&self) -> (&Daemon, &str) {
        match &self.runner {
            Runner::Libvirt { daemon, name } => (daemon, name),
            Runner::Kit { .. } => panic!("not a domain of libvirt's"),
        }
    }

    /// Runs a virsh command for this domain, whose name follows the first word.
    #[track_caller]
    pub fn virsh(&self, command: &str, args: &[&str]) -> String {
        let (daemon, name) = self.domain();
        daemon.virsh(&[&[command, name], args].concat())
    }

    /// Starts the shut off domain.
    pub fn start_domain(&self) {
        self.start_domain_with(&[]);
    }

    pub(crate) fn start_domain_with(&self, options: &[&str]) {
        self.try_start_domain_with(options).unwrap_or_else(|error| self.fail(&error));
    }

    pub(crate) fn try_start_domain_with(&self, options: &[&str]) -> Result<(), String> {
        let (daemon, name) = self.domain();
        daemon
            .try_virsh(&[&["start", name], options].concat())
            .map(drop)
            .map_err(|error| format!("virsh start: {error}"))
    }

    /// The disks, in the order in which they were added.
    pub fn disks(&self) -> &[Disk] {
        &self.disks
    }

    /// The process id of QEMU. Under libvirt it is that of the present QEMU; panics when the domain
    /// is shut off.
    pub fn pid(&self) -> u32 {
        match &self.runner {
            Runner::Kit { pid, .. } => *pid,
            Runner::Libvirt { daemon, name } => {
                daemon.qemu_pid(name).unwrap_or_else(|| self.fail("no QEMU runs"))
            }
        }
    }

    /// A client of the kit's own QMP socket. QEMU serves one client at a time, so drop it before
    /// the next. Under libvirt the client uses `virsh qemu-monitor-command`, which takes the
    /// domain's job for each command and has no events.
    pub fn control(&self) -> Client {
        if let Runner::Libvirt { daemon, name } = &self.runner {
            return Client::through_libvirt(daemon.clone(), name.clone());
        }
        let socket = self.directory().join("control.sock");
        wait_for(DEADLINE, || match Client::connect(&socket) {
            Err(error) if !self.alive() => self.fail(&format!("QEMU has ended ({error})")),
            result => result.ok(),
        })
        .unwrap_or_else(|| self.fail("no answer on control.sock (is another client open?)"))
    }

    /// The last output of the guest.
    pub fn serial(&self) -> Serial {
        Serial::read(&self.directory().join("serial.log"))
    }

    /// Waits until the guest has counted `more` further than it has now (0: has counted at all).
    /// Returns the last number. Panics when the guest says TORN, and when [`DEADLINE`] passes.
    pub fn wait_ticks(&self, more: u32) -> u32 {
        self.try_ticks(more, DEADLINE).unwrap_or_else(|trouble| self.fail(&trouble))
    }

    /// The same with another deadline and without a panic. The error describes the failure, by the
    /// guest's own line where there is one.
    pub fn try_ticks(&self, more: u32, deadline: Duration) -> Result<u32, String> {
        let mut goal = self.serial().tick.map(|tick| tick + more);
        wait_for(deadline, || {
            let serial = self.serial();
            if let Some(trouble) = serial.trouble {
                return Some(Err(trouble));
            }
            if !self.alive() {
                return Some(Err("QEMU has ended".to_owned()));
            }
            let tick = serial.tick?;
            // The log of a clone starts empty at an arbitrary number, so its first line is the
            // reference.
            (tick >= *goal.get_or_insert(tick + more)).then_some(Ok(tick))
        })
        .unwrap_or_else(|| Err(format!("no {more} ticks within {deadline:?}")))
    }

    /// Whether the QEMU process is alive.
    pub fn alive(&self) -> bool {
        match &self.runner {
            Runner::Kit { child, .. } => {
                matches!(child.lock().expect("poisoned").try_wait(), Ok(None))
            }
            Runner::Libvirt { daemon, name } => daemon.qemu_pid(name).is_some(),
        }
    }

    /// Kills QEMU as `kill -9` does, and waits until it is gone.
    pub fn kill(&self) {
        match &self.runner {
            Runner::Kit { child, .. } => {
                let mut child = child.lock().expect("poisoned");
                let _ = child.kill();
                let _ = child.wait();
            }
            Runner::Libvirt { daemon, name } => daemon.kill_qemu(name),
        }
    }

    /// The files that QEMU has open, with their counts. A test compares them to find leaks. Pipes
    /// are counted together. Sockets are left out (QEMU notices only later that a client has
    /// disconnected), and so is `/dev/userfaultfd` (QEMU 8.0 and later keep it open from the first
    /// snapshot on).
    pub fn open_files(&self) -> BTreeMap<String, usize> {
        let mut files = BTreeMap::new();
        let entries = std::fs::read_dir(format!("/proc/{}/fd", self.pid())).expect("/proc/PID/fd");
        for entry in entries.flatten() {
            let Ok(target) = std::fs::read_link(entry.path()) else {
                continue;
            };
            let target = target.to_string_lossy();
            let kind = match target.split_once(":[") {
                Some((kind, _)) => kind,
                None => &target,
            };
            if kind != "socket" && kind != "/dev/userfaultfd" {
                *files.entry(kind.to_owned()).or_default() += 1;
            }
        }
        files
    }

    /// Panics with `message` and all output of QEMU and the guest.
    pub fn fail(&self, message: &str) -> ! {
        let tail = |path: &Path| {
            let bytes = std::fs::read(path).unwrap_or_default();
            let text = String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(600)..]);
            format!("--- {}\n{text}", path.display())
        };
        let logs = match &self.runner {
            Runner::Kit { .. } => {
                format!(
                    "{}\n{}",
                    tail(&self.directory().join("stderr.log")),
                    self.qemu_description()
                )
            }
            Runner::Libvirt { daemon, name } => {
                format!("{}\n--- libvirtd\n{}", tail(&daemon.qemu_log(name)), daemon.log())
            }
        };
        panic!(
            "{message}\n{logs}\n{}\n--- {:?}",
            tail(&self.directory().join("serial.log")),
            self.machine
        )
    }
}

impl Guest {
    /// QEMU's own description of a guest that misbehaves.
    fn qemu_description(&self) -> String {
        let Ok(mut client) = Client::connect(&self.directory().join("control.sock")) else {
            return String::new();
        };
        let human = |line: &str| ("human-monitor-command", json!({ "command-line": line }));
        let questions = [
            ("query-status", json!({})),
            ("query-migrate", json!({})),
            ("query-block-jobs", json!({})),
            human("info registers"),
            human("info block"),
        ];
        let answers = questions.into_iter().map(|(command, arguments)| {
            match client.execute(command, arguments) {
                Ok(answer) => {
                    format!(
                        "--- {command}\n{}\n",
                        answer.as_str().map_or_else(|| answer.to_string(), str::to_owned)
                    )
                }
                Err(error) => format!("--- {command}\n{error:?}\n"),
            }
        });
        answers.collect()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.kill();
    }
}
