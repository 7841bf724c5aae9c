// SPDX-License-Identifier: LGPL-2.1-or-later

//! A libvirtd with the library in it, and unmodified clients.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use instantsnap_testkit::{Client, Daemon, Guest, Machine, Mode, wait_for};

/// The flags of an instant snapshot, LIVE | INSTANT.
pub const INSTANT: u32 = 0x500;
/// libvirt's own snapshot of a running guest.
pub const LIVE: u32 = 0x100;

/// The script with which a [`Subject::client`] takes a snapshot, by XML and flags.
pub const CREATE: &str =
    "attempt(lambda: domain.snapshotCreateXML(sys.argv[3], int(sys.argv[4])).getName())";

/// The path of the library under test, which cargo puts beside this program.
pub fn library() -> PathBuf {
    let library = std::env::current_exe().unwrap().with_file_name("libinstantsnap_preload.so");
    assert!(library.exists(), "{} is not there", library.display());
    library
}

/// A session daemon with the library in it.
pub fn session(variables: &[(&'static str, &str)]) -> Daemon {
    Daemon::preloaded(Mode::Session, &[&library()], variables).expect("there is always one")
}

/// The error that libvirt's client received.
#[derive(Clone, Debug, PartialEq)]
pub struct Refused {
    /// `virErrorNumber`.
    pub code: i64,
    /// `virErrorDomain`.
    pub domain: i64,
    pub message: String,
}

/// A guest of such a daemon.
pub struct Subject {
    pub guest: Guest,
    /// A monitor of QEMU that libvirt does not know of.
    monitor: PathBuf,
}

const PRELUDE: &str = "
import json, libvirt, sys
libvirt.registerErrorHandler(lambda *_: None, None)
connection = libvirt.open(sys.argv[1])
domain = connection.lookupByName(sys.argv[2])
def attempt(call):
    try:
        print(json.dumps(call()), flush=True)
    except libvirt.libvirtError as error:
        print(json.dumps([error.get_error_code(), error.get_error_domain(), error.get_error_message()]), flush=True)
        sys.exit(3)
";

impl Subject {
    /// Starts a machine, and waits until it counts.
    pub fn start(machine: &Machine, daemon: &Daemon) -> Subject {
        static STARTED: AtomicU32 = AtomicU32::new(0);
        let directory = daemon
            .directory()
            .join(format!("guests/m-{}", STARTED.fetch_add(1, Ordering::Relaxed)));
        std::fs::create_dir(&directory).unwrap();
        daemon.give(&directory);
        let monitor = directory.join("m.sock");
        let option = format!("unix:{},server=on,wait=off", monitor.display());
        let guest = machine.clone().arg("-qmp").arg(&option).start_under(daemon);
        guest.wait_ticks(2);
        Subject { guest, monitor }
    }

    /// A client of that monitor.
    pub fn control(&self) -> Client {
        Client::connect(&self.monitor).unwrap()
    }

    /// The memory image of a snapshot.
    pub fn memory(&self, name: &str) -> PathBuf {
        self.guest.directory().join(format!("{name}.mem"))
    }

    /// A `<domainsnapshot>` with a name and a memory image.
    pub fn xml(&self, name: &str) -> String {
        format!(
            "<domainsnapshot><name>{name}</name><memory snapshot='external' \
             file='{}'/></domainsnapshot>",
            self.memory(name).display()
        )
    }

    /// A script in an unmodified python3-libvirt (or that of the Python that
    /// INSTANTSNAP_TEST_PYTHON names). It has `domain`, and `attempt`, which prints the result or
    /// the error of a call.
    pub fn client(&self, script: &str, args: &[&str]) -> Command {
        self.client_of(&self.guest.daemon().uri(), script, args)
    }

    /// The same by another URI.
    pub fn client_of(&self, uri: &str, script: &str, args: &[&str]) -> Command {
        let python = std::env::var_os("INSTANTSNAP_TEST_PYTHON")
            .unwrap_or_else(|| "/usr/bin/python3".into());
        let mut command = Command::new(python);
        command
            .arg("-c")
            .arg(format!("{PRELUDE}{script}"))
            .args([uri, self.guest.name()])
            .args(args);
        command
            .env_clear()
            .envs([("LC_ALL", "C"), ("PATH", "/usr/bin:/bin")])
            .env("HOME", "/nonexistent")
            .env("INSTANTSNAP_STATE_DIRECTORY", self.guest.daemon().directory().join("client"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// A client that takes a snapshot.
    pub fn create(&self, name: &str, flags: u32) -> Command {
        self.client(CREATE, &[&self.xml(name), &flags.to_string()])
    }

    /// Takes an instant snapshot by an unmodified client.
    pub fn snapshot(&self, name: &str) -> Result<String, Refused> {
        answer(self.create(name, INSTANT).output().unwrap())
    }

    /// Starts a client that takes an instant snapshot beside the test.
    pub fn spawn(&self, name: &str) -> Child {
        self.create(name, INSTANT).spawn().unwrap()
    }

    /// Reverts to a snapshot.
    pub fn revert(&self, name: &str) -> Result<String, Refused> {
        let script = "attempt(lambda: str(domain.revertToSnapshot(domain.snapshotLookupByName(sys.argv[3]))))";
        answer(self.client(script, &[name]).output().unwrap())
    }

    /// Calls a method of a snapshot.
    pub fn on_snapshot(&self, name: &str, call: &str) -> Result<String, Refused> {
        let script =
            format!("attempt(lambda: str(domain.snapshotLookupByName(sys.argv[3]).{call}))");
        answer(self.client(&script, &[name]).output().unwrap())
    }

    /// The snapshots that libvirt has recorded.
    pub fn snapshots(&self) -> Vec<String> {
        self.guest
            .virsh("snapshot-list", &["--name", "--topological"])
            .split_whitespace()
            .map(str::to_owned)
            .collect()
    }

    /// Waits until memory is draining, and slows the drain down so that it does not end before
    /// [`Slowed`] is dropped.
    pub fn slow_down(&self, name: &str) -> Slowed {
        self.try_slow_down(name).unwrap_or_else(|why| self.guest.fail(&why))
    }

    /// The same. The error is for a drain that has not begun in time or has already ended.
    pub fn try_slow_down(&self, name: &str) -> Result<Slowed, String> {
        let memory = self.memory(name);
        let mut control = self.control();
        wait_for(Duration::from_secs(60), || {
            let written = std::fs::metadata(&memory).map_or(0, |data| data.len());
            // The header of the image takes 64 KiB and more.
            (written > 128 << 10).then_some(())
        })
        .ok_or("no memory is being saved")?;
        let parameters =
            control.execute("query-migrate-parameters", serde_json::json!({})).unwrap();
        limit(&mut control, 4096);
        let status = control.execute("query-migrate", serde_json::json!({})).unwrap();
        let slowed = Slowed { control, before: parameters["max-bandwidth"].as_u64().unwrap() };
        if status["status"] != "active" {
            return Err(format!("too late: {status}"));
        }
        // The first pages can come before the guest is resumed and libvirt has noticed that.
        let runs = || (self.guest.virsh("domstate", &[]).trim() == "running").then_some(());
        wait_for(Duration::from_secs(60), runs).ok_or("it is not resumed")?;
        Ok(slowed)
    }

    /// Waits until the memory image is complete.
    pub fn wait_complete(&self, name: &str) {
        let memory = self.memory(name);
        wait_for(Duration::from_secs(60), || {
            let mut magic = [0; 16];
            File::open(&memory).ok()?.read_exact(&mut magic).ok()?;
            (&magic == b"LibvirtQemudSave").then_some(())
        })
        .unwrap_or_else(|| self.guest.fail("the memory image does not become complete"));
    }

    /// Restores a snapshot in a daemon without the library, and checks that memory, disks and
    /// serial line are of one moment. The clone checks every page and every disk within one tick,
    /// so it must count on.
    pub fn restore_clone(&self, name: &str, clones: &Daemon) -> Guest {
        let clone = clones.restore(&self.guest, &self.memory(name));
        clone.wait_ticks(5);
        clone
    }

    /// Whether an instant snapshot of the guest was taken or tried: libvirt marks a domain to which
    /// commands were passed through its monitor.
    pub fn was_instant(&self) -> bool {
        self.guest.virsh("dominfo", &[]).contains("custom monitor")
    }
}

/// See [`Subject::slow_down`].
pub struct Slowed {
    control: Client,
    before: u64,
}

impl Drop for Slowed {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            limit(&mut self.control, self.before);
        }
    }
}

fn limit(control: &mut Client, bytes: u64) {
    control
        .execute("migrate-set-parameters", serde_json::json!({ "max-bandwidth": bytes }))
        .unwrap();
}

/// The result or the error that a client printed.
#[track_caller]
pub fn answer(output: Output) -> Result<String, Refused> {
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let value: serde_json::Value = serde_json::from_str(out.trim())
        .unwrap_or_else(|_| panic!("{}: {out}{err}", output.status));
    match output.status.code() {
        Some(0) => Ok(value.as_str().unwrap_or_default().to_owned()),
        _ => Err(Refused {
            code: value[0].as_i64().unwrap(),
            domain: value[1].as_i64().unwrap(),
            message: value[2].as_str().unwrap().to_owned(),
        }),
    }
}

/// Whether a process has a file mapped.
pub fn has_mapped(pid: u32, file: &Path) -> bool {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    maps.lines().any(|line| line.ends_with(file.to_str().unwrap()))
}
