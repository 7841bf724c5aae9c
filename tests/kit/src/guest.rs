//! A running QEMU with its guest: where its sockets and files are, what its serial line says, and
//! that it is gone when the test is.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::Mutex;
use std::time::Duration;

use tempfile::TempDir;

use crate::machine::{Format, Machine};
use crate::qmp::Client;
use crate::serial::Serial;
use crate::wait::{DEADLINE, wait_for};

/// A disk of a guest, as it was at the start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Id of the device: `vd0`.
    pub device: String,
    /// Id of the drive (`drive-0`) or name of the node (`disk-0`), by how it was attached.
    pub backend: String,
    pub file: PathBuf,
    pub format: Format,
}

/// A running QEMU. It is killed, and its directory removed, when this is dropped.
#[derive(Debug)]
pub struct Guest {
    machine: Machine,
    directory: TempDir,
    child: Mutex<Child>,
    pid: u32,
    disks: Vec<Disk>,
}

impl Guest {
    pub(crate) fn running(machine: Machine, directory: TempDir, child: Child, disks: Vec<Disk>) -> Guest {
        let pid = child.id();
        let guest = Guest { machine, directory, child: Mutex::new(child), pid, disks };
        drop(guest.control());
        guest
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

    /// The QMP socket for the library under test.
    pub fn qmp(&self) -> PathBuf {
        self.directory().join("qmp.sock")
    }

    /// The disks, in the order in which they were asked for.
    pub fn disks(&self) -> &[Disk] {
        &self.disks
    }

    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// A client of the kit's own QMP socket. QEMU serves one at a time: drop it before the next.
    pub fn control(&self) -> Client {
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
        matches!(self.child.lock().expect("poisoned").try_wait(), Ok(None))
    }

    /// Ends QEMU as by `kill -9`, and reaps it.
    pub fn kill(&self) {
        let mut child = self.child.lock().expect("poisoned");
        let _ = child.kill();
        let _ = child.wait();
    }

    /// The files that QEMU has open, with how often: a test compares them to find leaks. Pipes are
    /// counted together. Left out are sockets (QEMU notices only later that a client has gone) and
    /// `/dev/userfaultfd` (QEMU 8.0 and later open it once, at the first snapshot, for good).
    pub fn open_files(&self) -> BTreeMap<String, usize> {
        let mut files = BTreeMap::new();
        let entries = std::fs::read_dir(format!("/proc/{}/fd", self.pid)).expect("/proc/PID/fd");
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
        let tail = |name: &str| {
            let bytes = std::fs::read(self.directory().join(name)).unwrap_or_default();
            let text = String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(600)..]);
            format!("--- {name}\n{text}")
        };
        panic!("{message}\n{}\n{}\n--- {:?}", tail("stderr.log"), tail("serial.log"), self.machine)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.kill();
    }
}
