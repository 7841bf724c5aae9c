// SPDX-License-Identifier: LGPL-2.1-or-later

//! What several test programs share: a guest of the kit that the library has opened, and restored
//! snapshots that are checked.

pub mod backend;
pub mod driver;
mod handle;
pub mod inside;
pub mod jobs;
pub mod nbd;
pub mod random_clients;
pub mod sshd;
pub mod tree;
pub mod virt;
pub mod watchdog;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use driver::TestDriver;
pub use handle::{Handle, image_format};
use instantsnap::engine::{Observer, Phase, prepare_revert};
use instantsnap::error::{Code, Error};
use instantsnap::model::Record;
use instantsnap::model::flags::{INSTANT, LIVE};
use instantsnap_testkit::{Binary, Fingerprint, Format, Guest, Machine, Proxy, fingerprint, skip};

/// The flags of an instant snapshot.
pub const INSTANTLY: u32 = LIVE | INSTANT;

/// The phases of a successful snapshot.
pub const PHASES: [Phase; 8] = [
    Phase::Validate,
    Phase::Plan,
    Phase::Prepare,
    Phase::Pause,
    Phase::Switch,
    Phase::Arm,
    Phase::Drain,
    Phase::Finish,
];

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
        let handle = backend::open_guest(&guest, &guest.qmp(), None, &state_dir).unwrap();
        Opened { handle, guest }
    }

    /// Opens the guest by another socket, which is a proxy's.
    pub fn through(guest: Guest, socket: &Path) -> Opened {
        let state_dir = guest.directory().join("state");
        std::fs::create_dir_all(&state_dir).unwrap();
        let handle = backend::open_guest(&guest, socket, None, &state_dir).unwrap();
        Opened { handle, guest }
    }

    pub fn state_dir(&self) -> PathBuf {
        self.guest.directory().join("state")
    }

    /// Takes an instant snapshot with this name.
    pub fn snapshot(&self, name: &str) -> Result<String, Error> {
        self.create(&named(name), INSTANTLY)
    }

    /// Takes a snapshot. Returns its name.
    pub fn create(&self, xml: &str, flags: u32) -> Result<String, Error> {
        self.handle.create(xml, flags, &mut ())
    }

    /// The state that a failure must not change: QEMU, the files that it has open, and the
    /// directory's content.
    pub fn trace(&self) -> Trace {
        Trace {
            qemu: fingerprint(&mut self.guest.control()),
            open_files: self.guest.open_files().into_iter().collect(),
            files: files_below(self.guest.directory()),
        }
    }

    /// Restores a snapshot in a new QEMU, and checks that memory, disks and serial line are of one
    /// moment. The clone checks every page and every disk within one tick, so it must count on.
    /// Returns the clone and the first number that it prints.
    pub fn restore_clone(&self, name: &str) -> (Opened, u32) {
        let clone = self.start_clone(name);
        clone.handle.load(name, 0).unwrap_or_else(|error| clone.guest.fail(&error.message));
        clone.guest.wait_ticks(5);
        let first = first_tick(&clone.guest);
        (clone, first)
    }

    /// Starts a QEMU that waits for the memory of a snapshot.
    pub fn start_clone(&self, name: &str) -> Opened {
        let plan = prepare_revert(&self.state_dir(), name, None).unwrap();
        let disks: Vec<_> =
            plan.disks.iter().map(|disk| (disk.file.clone(), Format::Qcow2)).collect();
        let guest = self.guest.machine().for_revert(&disks).start();
        let handle = backend::open_guest(&guest, &guest.qmp(), None, &self.state_dir()).unwrap();
        Opened { handle, guest }
    }
}

impl Opened {
    /// Opens a guest by a driver; see [`TestDriver::new`].
    pub fn by_driver(guest: Guest, pauses: bool) -> (Opened, Arc<TestDriver>) {
        let state_dir = guest.directory().join("state");
        std::fs::create_dir_all(&state_dir).unwrap();
        let driver = Arc::new(TestDriver::new(&guest, state_dir, pauses));
        (Opened { handle: Handle::open_driver(driver.clone()).unwrap(), guest }, driver)
    }

    /// Starts a machine, waits until it counts, and opens it by a driver.
    pub fn start_by_driver(machine: &Machine, pauses: bool) -> (Opened, Arc<TestDriver>) {
        let guest = machine.start();
        guest.wait_ticks(2);
        Opened::by_driver(guest, pauses)
    }
}

impl Opened {
    /// Takes a snapshot that must fail with this code and all of these parts in its message.
    /// Asserts that nothing is left of it, that QEMU is as before, and that the guest counts on.
    #[track_caller]
    pub fn assert_fails(&self, xml: &str, flags: u32, code: Code, parts: &[&str]) -> Error {
        self.assert_fails_observed(xml, flags, &mut (), code, parts)
    }

    /// The same with an observer.
    #[track_caller]
    pub fn assert_fails_observed(
        &self,
        xml: &str,
        flags: u32,
        observer: &mut dyn Observer,
        code: Code,
        parts: &[&str],
    ) -> Error {
        let before = self.trace();
        let error = self.handle.create(xml, flags, observer).expect_err("this must fail");
        assert_says(&error, code, parts);
        assert_untouched(self, &before);
        if before.is_running() {
            self.guest.wait_ticks(3);
        }
        error
    }

    /// Asserts that the guest is unharmed: it finds each of its sectors unchanged, and a snapshot
    /// of it succeeds and can be restored.
    #[track_caller]
    pub fn assert_well(&self) {
        self.guest.wait_ticks(ALL_SECTORS);
        self.snapshot("well").unwrap_or_else(|error| panic!("no snapshot any more: {error}"));
        self.guest.wait_ticks(3);
        self.restore_clone("well");
    }
}

/// A machine that counts, opened through a proxy. The guest must outlive the proxy, as it does in
/// `let (opened, proxy)`.
pub fn through_proxy(machine: &Machine) -> (Opened, Proxy) {
    let guest = machine.start();
    guest.wait_ticks(2);
    let proxy = Proxy::start(&guest.directory().join("proxy.sock"), &guest.qmp());
    (Opened::through(guest, proxy.path()), proxy)
}

/// The number of rounds in which the tick guest checks every sector that it writes.
pub const ALL_SECTORS: u32 = 65;

/// The first number that a clone prints completely: its log can begin in the middle of a line.
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

impl Trace {
    /// Whether the guest was running.
    pub fn is_running(&self) -> bool {
        self.qemu.0["status"][1] == true
    }
}

/// Asserts that nothing is left of a failed attempt. Waits for what QEMU closes or the kernel frees
/// a moment later.
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

/// All files below a directory, without lock files.
pub fn files_below(directory: &Path) -> Vec<PathBuf> {
    // A state directory that was used once has a lock file.
    let is_lock = |path: &Path| path.file_name().is_some_and(|name| name == ".lock");
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            files.extend(files_below(&path));
        } else if !is_lock(&path) {
            files.push(path);
        }
    }
    files.sort();
    files
}

/// A `<domainsnapshot>` with a name only.
pub fn named(name: &str) -> String {
    format!("<domainsnapshot><name>{name}</name></domainsnapshot>")
}

/// A machine with this many disks, alternately raw and qcow2.
pub fn machine(binary: &'static Binary, disks: usize) -> Machine {
    (0..disks).fold(Machine::new(binary), |machine, n| {
        machine.disk(if n % 2 == 0 { Format::Raw } else { Format::Qcow2 })
    })
}

/// An observer that calls a function when a phase begins.
pub struct At<F: FnMut(Phase)>(pub F);

impl<F: FnMut(Phase)> instantsnap::engine::Observer for At<F> {
    fn phase(&mut self, phase: Phase) {
        (self.0)(phase);
    }
}

/// Asserts the error's code, and all of these parts in its message.
#[track_caller]
pub fn assert_says(error: &Error, code: Code, parts: &[&str]) {
    eprintln!("{:?}: {error}", error.code);
    assert_eq!(error.code, code, "{error}");
    for part in parts {
        assert!(error.message.contains(part), "{part:?} is not in {:?}", error.message);
    }
}

/// Asserts that the result is an error with this code, and with this part in its message.
#[track_caller]
pub fn assert_error<T: std::fmt::Debug>(result: Result<T, Error>, code: Code, part: &str) {
    let error = result.expect_err("this must fail");
    assert_eq!(error.code, code, "{error}");
    assert!(error.message.contains(part), "{part:?} is not in {:?}", error.message);
}

impl Opened {
    /// Opens a guest whose domain XML is known.
    pub fn with_domain(guest: Guest, domain_xml: &str) -> Opened {
        let state_dir = guest.directory().join("state");
        std::fs::create_dir_all(&state_dir).unwrap();
        let handle =
            backend::open_guest(&guest, &guest.qmp(), Some(domain_xml), &state_dir).unwrap();
        Opened { handle, guest }
    }

    /// The record of a snapshot.
    pub fn record(&self, name: &str) -> Record {
        self.handle.store().unwrap().read(name).unwrap()
    }

    /// The active image of a device.
    pub fn active_image(&self, device: &str) -> String {
        block_of(&self.guest, device)["inserted"]["file"].as_str().unwrap().to_owned()
    }
}

/// The entry of `query-block` for the device with this id.
pub fn block_of(guest: &Guest, device: &str) -> serde_json::Value {
    let blocks = guest.control().execute("query-block", serde_json::json!({})).unwrap();
    let mut blocks = blocks.as_array().unwrap().iter();
    let own = |block: &&serde_json::Value| {
        block["qdev"].as_str().is_some_and(|qdev| qdev.contains(device))
    };
    blocks.find(own).unwrap_or_else(|| panic!("no {device}")).clone()
}

/// Runs a command, and returns its output. Panics with its output when it fails.
#[track_caller]
pub fn run(program: &str, args: &[&str]) -> String {
    let output = std::process::Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(
        output.status.success(),
        "{program} {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Lets a test that is not run by root damage a memory image, which nobody may write.
pub fn let_write(image: &Path) {
    std::fs::set_permissions(image, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
}

/// The variable that names the qemu-img that the library runs.
pub const QEMU_IMG: &str = "INSTANTSNAP_QEMU_IMG";

/// Writes a script that stands in for qemu-img, and returns its path.
pub fn qemu_img_stand_in(directory: &Path, script: &str) -> PathBuf {
    let file = directory.join("qemu-img");
    std::fs::write(&file, script).unwrap();
    std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    file
}

/// How many pages of a file the kernel has not written yet; `None` where it does not tell (Linux
/// before 6.5).
pub fn unwritten(file: &str) -> Option<u64> {
    const CACHESTAT: libc::c_long = 451;
    let file = std::fs::File::open(file).unwrap();
    let (range, mut pages) = ([0_u64; 2], [0_u64; 5]);
    // SAFETY: an open file, a range that covers it, and room for the five numbers of `struct
    // cachestat`.
    let result = unsafe {
        libc::syscall(
            CACHESTAT,
            std::os::fd::AsRawFd::as_raw_fd(&file),
            range.as_ptr(),
            pages.as_mut_ptr(),
            0,
        )
    };
    (result == 0).then(|| pages[1] + pages[2])
}

/// A stand-in for another guest's QEMU that has an image open.
pub struct OtherQemu(std::process::Child);

impl OtherQemu {
    pub fn open(image: &Path, read_only: bool) -> OtherQemu {
        let mut command = std::process::Command::new("qemu-io");
        command.args(["-f", "qcow2"]).args(read_only.then_some("-r")).arg(image);
        let mut child = command
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        use std::io::Read;
        // It has the image open when it prints its prompt.
        let mut prompt = [0; 1];
        child.stdout.as_mut().unwrap().read_exact(&mut prompt).unwrap();
        OtherQemu(child)
    }
}

impl Drop for OtherQemu {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// A loop device, which is detached when dropped.
pub struct Loop(pub String);

impl Loop {
    /// Skips the test where the machine has no free loop device.
    pub fn on(file: &Path) -> Loop {
        Loop::try_on(file).unwrap_or_else(|| skip("no loop device can be made here"))
    }

    /// Returns `None` where the machine has no free loop device.
    pub fn try_on(file: &Path) -> Option<Loop> {
        let output =
            std::process::Command::new("losetup").args(["--find", "--show"]).arg(file).output();
        let output = output.ok().filter(|output| output.status.success())?;
        Some(Loop(String::from_utf8(output.stdout).unwrap().trim().to_owned()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup").args(["-d", &self.0]).status();
        let _ = std::os::unix::fs::chown(&self.0, Some(0), None);
    }
}
