// SPDX-License-Identifier: LGPL-2.1-or-later

//! A running QEMU with its guest: where its sockets and files are, what its serial line says, and
//! that it is gone when the test is.

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
    /// Id of the device (`vd0`); under libvirt the target (`vda`).
    pub device: String,
    /// Id of the drive (`drive-0`) or name of the node (`disk-0`), by how it was attached; empty
    /// under libvirt.
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

/// Who has started QEMU.
#[derive(Debug)]
enum Runner {
    Kit { child: Mutex<Child>, pid: u32 },
    Libvirt { daemon: Daemon, name: String },
}

impl Guest {
    /// One whose QEMU has just been started, and may yet end.
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

    /// What it was started as.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Its own directory: logs, sockets, images. It lasts as long as this object, also after
    /// [`Guest::kill`].
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The QMP socket for the library under test. There is none under libvirt.
    pub fn qmp(&self) -> PathBuf {
        assert!(
            matches!(self.runner, Runner::Kit { .. }),
            "libvirt has this QEMU's monitor for itself"
        );
        self.directory().join("qmp.sock")
    }

    /// The libvirtd that it is a domain of. Panics where it is none.
    pub fn daemon(&self) -> &Daemon {
        self.domain().0
    }

    /// Its name as a domain. Panics where it is none.
    pub fn name(&self) -> &str {
        self.domain().1
    }

    fn domain(&self) -> (&Daemon, &str) {
        match &self.runner {
            Runner::Libvirt { daemon, name } => (daemon, name),
            Runner::Kit { .. } => panic!("not a domain of libvirt's"),
        }
    }

    /// A virsh command for this domain: its name follows the first word.
    #[track_caller]
    pub fn virsh(&self, command: &str, args: &[&str]) -> String {
        let (daemon, name) = self.domain();
        daemon.virsh(&[&[command, name], args].concat())
    }

    /// Starts the domain, which is shut off.
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

    /// The disks, in the order in which they were asked for.
    pub fn disks(&self) -> &[Disk] {
        &self.disks
    }

    /// The process id of QEMU. Under libvirt it is of the QEMU that runs now: panics when the
    /// domain is shut off.
    pub fn pid(&self) -> u32 {
        match &self.runner {
            Runner::Kit { pid, .. } => *pid,
            Runner::Libvirt { daemon, name } => {
                daemon.qemu_pid(name).unwrap_or_else(|| self.fail("no QEMU runs"))
            }
        }
    }

    /// A client of the kit's own QMP socket. QEMU serves one at a time: drop it before the next.
    /// Under libvirt it goes through `virsh qemu-monitor-command`, which takes the domain's job for
    /// each command, and knows no events.
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

    /// What the guest has said last.
    pub fn serial(&self) -> Serial {
        Serial::read(&self.directory().join("serial.log"))
    }

    /// Waits until the guest has counted `more` further than it has now (0: has counted at all);
    /// returns the last number. Panics when it says TORN, and when [`DEADLINE`] passes.
    pub fn wait_ticks(&self, more: u32) -> u32 {
        self.try_ticks(more, DEADLINE).unwrap_or_else(|trouble| self.fail(&trouble))
    }

    /// The same with another deadline, and without panic: the error says what went wrong, by the
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
            // A clone's log starts empty, and anywhere: it counts from its first line on.
            (tick >= *goal.get_or_insert(tick + more)).then_some(Ok(tick))
        })
        .unwrap_or_else(|| Err(format!("no {more} ticks within {deadline:?}")))
    }

    /// Whether the QEMU process is there.
    pub fn alive(&self) -> bool {
        match &self.runner {
            Runner::Kit { child, .. } => {
                matches!(child.lock().expect("poisoned").try_wait(), Ok(None))
            }
            Runner::Libvirt { daemon, name } => daemon.qemu_pid(name).is_some(),
        }
    }

    /// Ends QEMU as by `kill -9`, and waits until it is gone.
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

    /// The files that QEMU has open, with how often: a test compares them to find leaks. Pipes are
    /// counted together. Left out are sockets (QEMU notices only later that a client has gone) and
    /// `/dev/userfaultfd` (QEMU 8.0 and later open it once, at the first snapshot, for good).
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

    /// Panics with `message` and all that QEMU and the guest have said.
    pub fn fail(&self, message: &str) -> ! {
        let tail = |path: &Path| {
            let bytes = std::fs::read(path).unwrap_or_default();
            let text = String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(600)..]);
            format!("--- {}\n{text}", path.display())
        };
        let logs = match &self.runner {
            Runner::Kit { .. } => {
                format!("{}\n{}", tail(&self.directory().join("stderr.log")), self.qemus_view())
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
    /// What QEMU says of a guest that does not do what it should.
    fn qemus_view(&self) -> String {
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
