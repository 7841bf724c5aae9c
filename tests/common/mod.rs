//! What several tests need: the library on a guest of the kit, and a snapshot brought back and checked.

#![allow(dead_code)] // Each test program uses its own part.

use std::path::{Path, PathBuf};
use std::time::Duration;

use instantsnap::engine::{Handle, Phase, prepare_revert};
use instantsnap::error::{Code, Error};
use instantsnap::flags::{INSTANT, LIVE};
use instantsnap_testkit::{Binary, Fingerprint, Format, Guest, Machine, fingerprint};

/// An instant snapshot.
pub const INSTANTLY: u32 = LIVE | INSTANT;

/// A guest of the kit, opened by the library, with a state directory of its own.
pub struct Opened {
    pub handle: Handle,
    pub guest: Guest,
}

impl Opened {
    /// Starts a machine, waits until it counts, and opens it.
    pub fn start(machine: &Machine) -> Opened {
        let guest = machine.start();
        guest.wait_ticks(2);
        Opened::open(guest)
    }

    /// Opens a guest.
    pub fn open(guest: Guest) -> Opened {
        let state_dir = guest.directory().join("state");
        std::fs::create_dir_all(&state_dir).unwrap();
        let handle = Handle::open_qmp(&guest.qmp(), None, &state_dir).unwrap();
        Opened { handle, guest }
    }

    /// The same guest by another socket (a proxy's).
    pub fn through(guest: Guest, socket: &Path) -> Opened {
        let state_dir = guest.directory().join("state");
        std::fs::create_dir_all(&state_dir).unwrap();
        let handle = Handle::open_qmp(socket, None, &state_dir).unwrap();
        Opened { handle, guest }
    }

    pub fn state_dir(&self) -> PathBuf {
        self.guest.directory().join("state")
    }

    /// Takes an instant snapshot with this name.
    pub fn snapshot(&self, name: &str) -> Result<String, Error> {
        self.create(&named(name), INSTANTLY)
    }

    /// Takes a snapshot; returns its name.
    pub fn create(&self, xml: &str, flags: u32) -> Result<String, Error> {
        self.handle.create(xml, flags, &mut ()).map(|record| record.name)
    }

    /// What a failure must leave as it is: QEMU, its files, the directory's content.
    pub fn trace(&self) -> Trace {
        Trace {
            qemu: fingerprint(&mut self.guest.control()),
            open_files: self.guest.open_files().into_iter().collect(),
            files: files_below(self.guest.directory()),
        }
    }

    /// Brings a snapshot back in a new QEMU, and checks that memory, disks and serial line are of one moment: the clone
    /// verifies every page and every disk within one tick, so it must tick on. Returns it, and the first number it says.
    pub fn bring_back(&self, name: &str) -> (Opened, u32) {
        let clone = self.start_clone(name);
        clone.handle.load(name, 0).unwrap_or_else(|error| clone.guest.fail(&error.message));
        clone.guest.wait_ticks(5);
        let first = first_tick(&clone.guest);
        (clone, first)
    }

    /// A QEMU that waits for the memory of a snapshot.
    pub fn start_clone(&self, name: &str) -> Opened {
        let plan = prepare_revert(&self.state_dir(), name, None).unwrap();
        let disks: Vec<_> = plan.disks.iter().map(|disk| (disk.file.clone(), Format::Qcow2)).collect();
        let guest = self.guest.machine().for_revert(&disks).start();
        let handle = Handle::open_qmp(&guest.qmp(), None, &self.state_dir()).unwrap();
        Opened { handle, guest }
    }
}

/// The first number that a clone says whole: its log can begin in the middle of a line.
pub fn first_tick(clone: &Guest) -> u32 {
    let log = std::fs::read_to_string(clone.directory().join("serial.log")).unwrap();
    let mut numbers = log.lines().filter_map(|line| line.strip_prefix("T ")?.parse().ok());
    numbers.next().expect("the clone has said a number")
}

/// See [`Opened::trace`].
#[derive(Clone, Debug, PartialEq)]
pub struct Trace {
    pub qemu: Fingerprint,
    open_files: Vec<(String, usize)>,
    files: Vec<PathBuf>,
}

/// Asserts that nothing is left of a failed attempt. What QEMU closes or the kernel frees a moment later is waited for.
#[track_caller]
pub fn assert_untouched(opened: &Opened, before: &Trace) {
    let after = instantsnap_testkit::wait_for(Duration::from_secs(10), || {
        let after = opened.trace();
        (after == *before).then_some(after)
    });
    if after.is_none() {
        let after = opened.trace();
        panic!(
            "something is left:\n{}{:?}\n{:?}\n{:?}\n{:?}",
            before.qemu.differences(&after.qemu),
            before.open_files,
            after.open_files,
            before.files,
            after.files
        );
    }
}

fn files_below(directory: &Path) -> Vec<PathBuf> {
    // Logs grow, and a state directory that was used once has its lock file.
    let passed_over = |path: &Path| path.file_name().is_some_and(|name| name == ".lock");
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            files.extend(files_below(&path));
        } else if !passed_over(&path) {
            files.push(path);
        }
    }
    files.sort();
    files
}

/// `<domainsnapshot>` with just a name.
pub fn named(name: &str) -> String {
    format!("<domainsnapshot><name>{name}</name></domainsnapshot>")
}

/// A machine with so many disks, raw and qcow2 in turn.
pub fn machine(binary: &'static Binary, disks: usize) -> Machine {
    (0..disks)
        .fold(Machine::new(binary), |machine, n| machine.disk(if n % 2 == 0 { Format::Raw } else { Format::Qcow2 }))
}

/// An observer that does something when a phase begins.
pub struct At<F: FnMut(Phase)>(pub F);

impl<F: FnMut(Phase)> instantsnap::engine::Observer for At<F> {
    fn phase(&mut self, phase: Phase) {
        (self.0)(phase);
    }
}

/// Asserts code and a part of the message.
#[track_caller]
pub fn assert_error<T: std::fmt::Debug>(result: Result<T, Error>, code: Code, part: &str) {
    let error = result.expect_err("this must fail");
    assert_eq!(error.code, code, "{error}");
    assert!(error.message.contains(part), "{part:?} is not in {:?}", error.message);
}
