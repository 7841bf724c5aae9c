// SPDX-License-Identifier: LGPL-2.1-or-later

//! The library for LD_PRELOAD in unmodified programs, which are Debian's virsh and python3-libvirt,
//! with a libvirtd of each test's own.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use instantsnap_testkit::compile::{gcc, workspace};
use instantsnap_testkit::{Binary, DEADLINE, Daemon, Format, Guest, Machine, test, wait_for};

/// The error of libvirt before 9.9 for a revert.
const CANNOT_REVERT: &str = "revert to external snapshot not supported yet";
/// The public functions.
const FUNCTIONS: [&str; 3] =
    ["virDomainRevertToSnapshot", "virDomainSnapshotCreateXML", "virDomainSnapshotDelete"];
/// The functions of libvirt's driver.
const DRIVERS: [&str; 3] = ["qemuSnapshotCreateXML", "qemuSnapshotDelete", "qemuSnapshotRevert"];
const UPGRADE: (&str, &str) = ("INSTANTSNAP_UPGRADE_LIVE", "1");
const DEBUG: (&str, &str) = ("INSTANTSNAP_DEBUG", "1");
/// A function that a libvirt too old for instantsnap lacks.
const LACKS: (&str, &str) = ("INSTANTSNAP_TEST_LACKS", "virDomainQemuMonitorCommandWithFiles");

/// The path of a library of this workspace, which cargo puts beside this program.
fn built(name: &str) -> PathBuf {
    let library = std::env::current_exe().unwrap().with_file_name(name);
    assert!(library.exists(), "{} is not there", library.display());
    library
}

fn preload() -> PathBuf {
    built("libinstantsnap_preload.so")
}

/// A program without the library, isolated from the user's files and settings.
fn program(name: &str) -> Command {
    let mut command = Command::new(name);
    command
        .env("LC_ALL", "C")
        .env("HOME", "/nonexistent")
        .env("XDG_CACHE_HOME", "/nonexistent")
        .stdin(Stdio::null());
    for variable in ["LD_PRELOAD", "INSTANTSNAP_UPGRADE_LIVE", "INSTANTSNAP_DEBUG"] {
        command.env_remove(variable);
    }
    command
}

/// The same program with the library preloaded.
fn preloaded(name: &str) -> Command {
    let mut command = program(name);
    command.env("LD_PRELOAD", preload());
    command
}

/// The same with a libvirt that is too old.
fn preloaded_with_old_libvirt(name: &str) -> Command {
    static SHIM: OnceLock<PathBuf> = OnceLock::new();
    let shim = SHIM.get_or_init(|| {
        gcc(
            &workspace().join("tests/kit/shim/lacking.c"),
            "lacking-in-a-client.so",
            "-shared -fPIC",
        )
    });
    let mut command = program(name);
    command
        .env("LD_PRELOAD", format!("{}:{}", preload().display(), shim.display()))
        .env(LACKS.0, LACKS.1);
    command
}

/// The output of a program, and whether it succeeded.
#[derive(Debug, PartialEq)]
struct Said {
    ok: bool,
    out: String,
    err: String,
}

impl Said {
    fn of(command: &mut Command) -> Said {
        let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap().trim().to_owned();
        Said { ok: output.status.success(), out: text(output.stdout), err: text(output.stderr) }
    }

    /// Asserts that it succeeded and printed nothing on stderr.
    #[track_caller]
    fn quietly(self) -> String {
        assert!(self.ok && self.err.is_empty(), "{self:?}");
        self.out
    }

    #[track_caller]
    fn fails_with(&self, part: &str) {
        assert!(!self.ok && self.err.contains(part), "{part:?} is not in {self:?}");
    }
}

/// A guest of a session daemon.
struct Subject {
    guest: Guest,
}

impl Subject {
    fn start(binary: &'static Binary) -> Subject {
        let guest = Machine::new(binary).disk(Format::Qcow2).start_under(&Daemon::session());
        guest.wait_ticks(2);
        Subject { guest }
    }

    /// virsh with a command for this guest.
    fn virsh(&self, command: Command, words: &[&str]) -> Command {
        let mut command = command;
        command
            .args(["-q", "-c", &self.guest.daemon().uri(), words[0], self.guest.name()])
            .args(&words[1..]);
        command
    }

    /// `virsh snapshot-create-as`, with the memory in a file.
    fn create_as(&self, command: Command, name: &str, words: &[&str]) -> Command {
        let memory = format!("file={}", self.memory(name).display());
        self.virsh(
            command,
            &[&["snapshot-create-as", "--name", name, "--memspec", &memory], words].concat(),
        )
    }

    fn memory(&self, name: &str) -> PathBuf {
        self.guest.directory().join(format!("{name}.mem"))
    }

    /// A script for python3-libvirt, which finds the guest in `domain` and a request in `xml`.
    fn python(&self, command: Command, name: &str, script: &str) -> Command {
        let mut command = command;
        let begin = "import libvirt, sys\n\
                     domain = libvirt.open(sys.argv[1]).lookupByName(sys.argv[2])\n\
                     xml = sys.argv[3]\n";
        let xml = format!(
            "<domainsnapshot><name>{name}</name><memory snapshot='external' \
             file='{}'/></domainsnapshot>",
            self.memory(name).display()
        );
        command.arg("-c").arg(format!("{begin}{script}")).args([
            &self.guest.daemon().uri(),
            self.guest.name(),
            &xml,
        ]);
        command
    }

    /// Whether an instant snapshot of the guest was taken or tried. libvirt marks a domain to which
    /// commands were passed through its monitor, and nothing else in these tests does so. The time
    /// at which memory is saved does not tell: so little of it can be saved before the guest runs
    /// again.
    fn was_instant(&self) -> bool {
        self.guest.virsh("dominfo", &[]).contains("custom monitor")
    }

    fn snapshots(&self) -> Vec<String> {
        self.guest
            .virsh("snapshot-list", &["--name"])
            .split_whitespace()
            .map(str::to_owned)
            .collect()
    }
}

#[test]
fn preload_library_exports_six_functions_without_needing_libvirt() {
    let output = |program: &str, args: &[&str]| {
        let output = Command::new(program).args(args).arg(preload()).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let symbols = output("nm", &["-D", "--defined-only"]);
    let mut symbols: Vec<_> =
        symbols.lines().filter_map(|line| line.split_whitespace().last()).collect();
    symbols.sort();
    assert_eq!(symbols, [DRIVERS, FUNCTIONS].concat());
    assert!(!output("readelf", &["-d"]).contains("libvirt"));
}

/// virsh and Python's module request `virDomainSnapshotCreateXML@LIBVIRT_0.8.0`, and the library's
/// function has no version.
#[test]
fn versioned_references_are_bound_to_the_preload_library() {
    let directory = tempfile::tempdir().unwrap();
    for (program, arg, object) in
        [("virsh", "--version", "virsh"), ("/usr/bin/python3", "-cimport libvirt", "libvirtmod")]
    {
        let log = directory.path().join(object);
        let mut command = preloaded(program);
        Said::of(
            command
                .arg(arg)
                .env("LD_BIND_NOW", "1")
                .env("LD_DEBUG", "bindings")
                .env("LD_DEBUG_OUTPUT", &log),
        );
        let logs = std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().path());
        let mut logs =
            logs.filter(|path| path.to_str().unwrap().starts_with(log.to_str().unwrap()));
        let log = std::fs::read_to_string(logs.next().expect("no log")).unwrap();
        for function in FUNCTIONS {
            let symbol = format!("`{function}' [LIBVIRT_0.8.0]");
            let bound: Vec<_> = log.lines().filter(|line| line.ends_with(&symbol)).collect();
            assert!(!bound.is_empty(), "{object} does not call {function}()");
            for line in bound {
                assert!(line.contains(object), "{line}");
                assert!(line.contains(&format!("to {}", preload().display())), "{line}");
            }
        }
    }
}

/// libvirt's test driver needs no daemon and has snapshots, which the library must not handle.
#[test]
fn other_libvirt_drivers_are_not_affected() {
    let script = "snapshot-create-as test s --live --memspec file=/nowhere/s --diskspec vda,snapshot=no; \
                  snapshot-list test --name; snapshot-revert test s; snapshot-delete test s; snapshot-revert test s";
    let virsh =
        |mut command: Command| Said::of(command.args(["-q", "-c", "test:///default", script]));
    let without = virsh(program("virsh"));
    let with = virsh({
        let mut command = preloaded("virsh");
        command.envs([UPGRADE, DEBUG]);
        command
    });
    assert_eq!(without.out, "s");
    without.fails_with("no domain snapshot with matching name 's'");
    assert_eq!(with, without);
}

#[test]
fn live_snapshot_is_a_stock_snapshot_without_the_variable() {
    for binary in Binary::under_libvirt() {
        let subject = Subject::start(binary);
        for (name, value) in [("zero", Some("0")), ("unset", None)] {
            let mut command = preloaded("virsh");
            if let Some(value) = value {
                command.env(UPGRADE.0, value);
            }
            Said::of(&mut subject.create_as(command, name, &["--live"])).quietly();
            assert!(!subject.was_instant());
        }
        assert_eq!(subject.snapshots(), ["unset", "zero"]);
        subject.guest.wait_ticks(3);
    }
}

#[test]
fn live_snapshot_by_virsh_is_instant_with_the_variable() {
    for binary in Binary::under_libvirt() {
        let subject = Subject::start(binary);
        let mut command = preloaded("virsh");
        command.envs([UPGRADE, DEBUG]);
        Said::of(&mut subject.create_as(command, "s", &["--live", "--description", "before"]))
            .quietly();
        assert!(subject.was_instant());
        assert_eq!(subject.snapshots(), ["s"]);
        assert!(
            subject
                .guest
                .virsh("snapshot-dumpxml", &["s"])
                .contains("<description>before</description>")
        );
        subject.guest.wait_ticks(3);
        let clone = subject.guest.daemon().another().restore(&subject.guest, &subject.memory("s"));
        clone.wait_ticks(5);
    }
}

/// Only LIVE snapshots of disks and memory in files are upgraded.
#[test]
fn only_live_snapshots_with_memory_are_upgraded() {
    let subject = Subject::start(&Binary::all()[0]);
    let virsh = |words: &[&str]| {
        let mut command = preloaded("virsh");
        command.envs([UPGRADE, DEBUG]);
        let said = Said::of(
            &mut subject.virsh(command, &[&["snapshot-create-as", "--name", "s"], words].concat()),
        );
        assert!(!said.err.contains("instantsnap"), "{said:?}");
        said
    };
    virsh(&["--print-xml"]).quietly();
    virsh(&["--live", "--disk-only"]).fails_with("live snapshot creation is supported only");
    virsh(&["--disk-only", "--no-metadata"]).quietly();
    let memory = format!("file={}", subject.memory("s").display());
    virsh(&["--memspec", &memory, "--diskspec", "vda,file=/nowhere/s", "--no-metadata"])
        .fails_with("/nowhere/s");
    virsh(&["--live", "--memspec", "snapshot=external"]).fails_with("memory");
    virsh(&["--live"]).fails_with("live snapshot creation is supported only");
    // libvirt reports an error in the XML.
    let mut command = preloaded("/usr/bin/python3");
    command.envs([UPGRADE, DEBUG]);
    let script = "domain.snapshotCreateXML('<domainsnapshot><memory file=\"/x\"', 0x100)";
    let said = Said::of(&mut subject.python(command, "s", script));
    said.fails_with("XML");
    assert!(!said.err.contains("instantsnap") && !subject.was_instant(), "{said:?}");
    subject.guest.virsh("destroy", &[]);
    virsh(&["--live", "--memspec", &memory])
        .fails_with("memory state cannot be saved with offline");
    assert!(subject.snapshots().is_empty());
}

/// A caller that did not ask for INSTANT gets libvirt's own snapshot, and the reason only in debug
/// mode.
#[test]
fn refused_upgrade_falls_back_to_a_stock_snapshot() {
    let subject = Subject::start(&Binary::all()[0]);
    let create = |name: &str, debug: bool| {
        let mut command = preloaded_with_old_libvirt("virsh");
        command.envs([UPGRADE]);
        if debug {
            command.envs([DEBUG]);
        }
        Said::of(&mut subject.create_as(command, name, &["--live"]))
    };
    create("refused", false).quietly();
    let said = create("explained", true);
    let reason =
        "instantsnap-preload: a LIVE snapshot stays libvirt's own: libvirt 8.2 or later is needed";
    assert!(said.ok && said.err.starts_with(reason) && said.err.lines().count() == 1, "{said:?}");
    assert!(!subject.was_instant());
    // A snapshot that was begun and has failed is not repeated in another way.
    let mut command = preloaded("virsh");
    command.envs([UPGRADE, DEBUG]);
    let words = ["--name", "failed", "--live", "--memspec", "file=/nowhere/failed.mem"];
    let said =
        Said::of(&mut subject.virsh(command, &[&["snapshot-create-as"], &words[..]].concat()));
    said.fails_with("/nowhere");
    assert!(!said.err.contains("stays libvirt's own"), "{said:?}");
    assert_eq!(subject.snapshots(), ["explained", "refused"]);
    subject.guest.wait_ticks(3);
}

#[test]
fn refusal_by_libvirt_keeps_libvirts_message() {
    let subject = Subject::start(&Binary::all()[0]);
    let quiesce = |mut command: Command| {
        command.envs([UPGRADE]);
        Said::of(&mut subject.create_as(command, "s", &["--live", "--quiesce"]))
    };
    let without = quiesce(program("virsh"));
    without.fails_with("VIR_DOMAIN_SNAPSHOT_CREATE_QUIESCE");
    assert_eq!(quiesce(preloaded("virsh")), without);
}

/// An error handler is called before the failed function returns, and can call again.
#[test]
fn nested_call_from_an_error_handler_goes_to_libvirt() {
    let subject = Subject::start(&Binary::all()[0]);
    let script = "said = []\n\
                  def handler(_, error):\n    \
                      said.append(error[2])\n    \
                      if len(said) == 1:\n        take(0x500)\n\
                  def take(flags):\n    \
                      try:\n        domain.snapshotCreateXML(xml, flags)\n    \
                      except libvirt.libvirtError:\n        pass\n\
                  libvirt.registerErrorHandler(handler, None)\n\
                  take(0x400)\n\
                  print(*said, sep='\\n')";
    let said = Said::of(&mut subject.python(preloaded("/usr/bin/python3"), "s", script)).quietly();
    let said: Vec<_> = said.lines().collect();
    assert!(said.len() == 2 && said[0].contains("VIR_DOMAIN_SNAPSHOT_CREATE_LIVE"), "{said:?}");
    assert!(said[1].contains("unsupported flags (0x400)"), "{said:?}");
    assert!(!subject.was_instant() && subject.snapshots().is_empty());
}

#[test]
fn python_takes_an_instant_snapshot() {
    for binary in Binary::under_libvirt() {
        let subject = Subject::start(binary);
        let script = "snapshot = domain.snapshotCreateXML(xml, 0x500)\n\
                      assert libvirt.virGetLastError() is None\n\
                      print(snapshot.getName(), snapshot.isCurrent(), domain.snapshotCurrent().getName())";
        let said = Said::of(&mut subject.python(preloaded("/usr/bin/python3"), "s", script));
        assert_eq!(said.quietly(), "s 1 s");
        assert!(subject.was_instant());
        subject.guest.wait_ticks(3);
        let clone = subject.guest.daemon().another().restore(&subject.guest, &subject.memory("s"));
        clone.wait_ticks(5);
    }
}

/// Without the library libvirt refuses bit 10 as before. With it, the error arrives by the
/// exception, by the connection and by the handler.
#[test]
fn python_client_receives_the_error() {
    let subject = Subject::start(&Binary::all()[0]);
    let attempt = |command: Command, flags: u32| {
        let script = format!(
            "handled = []\n\
             libvirt.registerErrorHandler(lambda _, error: handled.append(error[2]), None)\n\
             try:\n    domain.snapshotCreateXML(xml, {flags})\n\
             except libvirt.libvirtError as error:\n    \
                 assert handled[-1] == error.get_error_message(), handled\n    \
                 print(error.get_error_code(), error.get_error_domain(), error)\n"
        );
        Said::of(&mut subject.python(command, "s", &script)).quietly()
    };
    assert!(attempt(program("/usr/bin/python3"), 0x500).contains("unsupported flags (0x400)"));
    // INSTANT without LIVE, with DISK_ONLY, and with REDEFINE.
    for (flags, named) in [(0x400, "LIVE"), (0x510, "DISK_ONLY"), (0x501, "REDEFINE")] {
        let said = attempt(preloaded("/usr/bin/python3"), flags);
        assert!(said.starts_with("8 10 ") && said.contains(named), "{flags:x}: {said}");
    }
    let said = attempt(preloaded_with_old_libvirt("/usr/bin/python3"), 0x500);
    assert!(said.starts_with("84 10 ") && said.contains(LACKS.1), "{said}");
    assert!(subject.snapshots().is_empty());
    subject.guest.wait_ticks(3);
}

/// An older libvirt refuses to revert to an external snapshot.
#[test]
fn virsh_reverts_to_an_external_snapshot() {
    let refuses = Daemon::version() < (9, 9, 0);
    for binary in Binary::under_libvirt() {
        let subject = Subject::start(binary);
        Said::of(&mut subject.python(
            preloaded("/usr/bin/python3"),
            "s",
            "domain.snapshotCreateXML(xml, 0x500)",
        ))
        .quietly();
        let later = subject.guest.wait_ticks(20);
        if refuses {
            Said::of(&mut subject.virsh(program("virsh"), &["snapshot-revert", "s"]))
                .fails_with(CANNOT_REVERT);
            let command = preloaded_with_old_libvirt("virsh");
            Said::of(&mut subject.virsh(command, &["snapshot-revert", "s"]))
                .fails_with(CANNOT_REVERT);
        }
        let mut command = preloaded("virsh");
        command.envs([DEBUG]);
        Said::of(&mut subject.virsh(command, &["snapshot-revert", "s"])).quietly();
        let tick = subject.guest.wait_ticks(5);
        eprintln!("{}: left at {later}, back at {tick}", binary.name);
        assert_eq!(subject.snapshots(), ["s"]);
        // libvirt's default error handler would print a refusal of libvirt's on stderr.
        let script = "assert domain.revertToSnapshot(domain.snapshotLookupByName('s')) == 0";
        Said::of(&mut subject.python(preloaded("/usr/bin/python3"), "s", script)).quietly();
        subject.guest.wait_ticks(5);
    }
}

/// The call fails with the error, and by default libvirt prints it on stderr once.
#[test]
fn error_of_a_revert_or_delete_is_the_error_of_the_call() {
    let subject = Subject::start(&Binary::all()[0]);
    Said::of(&mut subject.create_as(program("virsh"), "s", &["--live"])).quietly();
    for (method, part) in [
        ("domain.revertToSnapshot(snapshot, 3)", "VIR_DOMAIN_SNAPSHOT_REVERT_PAUSED"),
        ("snapshot.delete(5)", "VIR_DOMAIN_SNAPSHOT_DELETE_CHILDREN_ONLY"),
    ] {
        let script = format!(
            "snapshot = domain.snapshotLookupByName('s')\n\
             try:\n    {method}\n\
             except libvirt.libvirtError as error:\n    print(error)\n"
        );
        let said = Said::of(&mut subject.python(preloaded("/usr/bin/python3"), "s", &script));
        assert!(said.ok && said.out.contains(part), "{said:?}");
        assert_eq!(said.err, format!("libvirt: QEMU Driver error : {}", said.out));
    }
    std::fs::remove_file(subject.memory("s")).unwrap();
    let said = Said::of(&mut subject.virsh(preloaded("virsh"), &["snapshot-revert", "s"]));
    said.fails_with("error: Failed to revert snapshot s\nerror: ");
    said.fails_with("s.mem");
    assert_eq!(subject.snapshots(), ["s"]);
    subject.guest.wait_ticks(3);
}

/// Snapshots without memory, or with memory in a disk, are left to libvirt.
#[test]
fn revert_and_delete_of_stock_snapshots_are_left_to_libvirt() {
    let subject = Subject::start(&Binary::all()[0]);
    Said::of(&mut subject.virsh(program("virsh"), &["snapshot-create-as", "--name", "internal"]))
        .quietly();
    for words in [
        &["snapshot-revert", "internal"][..],
        &["snapshot-delete", "internal"],
        &["snapshot-revert", "internal"],
        &["snapshot-create-as", "--name", "disks", "--disk-only"],
        &["snapshot-delete", "disks", "--metadata"],
    ] {
        let said = Said::of(&mut subject.virsh(preloaded("virsh"), words));
        assert_eq!(
            said.ok,
            !said.err.contains("no domain snapshot with matching name"),
            "{words:?}: {said:?}"
        );
    }
    assert!(subject.snapshots().is_empty());
    subject.guest.wait_ticks(3);
}

#[test]
fn virsh_deletes_a_snapshot() {
    for binary in Binary::under_libvirt() {
        let subject = Subject::start(binary);
        for name in ["a", "b"] {
            let mut command = preloaded("virsh");
            command.envs([UPGRADE]);
            Said::of(&mut subject.create_as(command, name, &["--live"])).quietly();
            subject.guest.wait_ticks(2);
        }
        for (name, left) in [("b", vec!["a"]), ("a", vec![])] {
            Said::of(&mut subject.virsh(preloaded("virsh"), &["snapshot-delete", name])).quietly();
            assert_eq!(subject.snapshots(), left);
            assert!(!subject.memory(name).exists());
            subject.guest.wait_ticks(3);
        }
    }
}

/// Older versions of libvirt do not support some deletes, like that with children.
#[test]
fn virsh_deletes_a_snapshot_with_its_children() {
    let subject = Subject::start(&Binary::all()[0]);
    for name in ["a", "b"] {
        Said::of(&mut subject.create_as(program("virsh"), name, &["--live"])).quietly();
    }
    let words = ["snapshot-delete", "a", "--children"];
    Said::of(&mut subject.virsh(program("virsh"), &words)).fails_with("not supported");
    Said::of(&mut subject.virsh(preloaded("virsh"), &words)).quietly();
    assert!(subject.snapshots().is_empty());
    subject.guest.wait_ticks(3);
}

/// A copy of the library alone, as it is installed.
#[test]
fn preload_library_works_without_libinstantsnap() {
    let directory = tempfile::tempdir().unwrap();
    let preload = directory.path().join("libinstantsnap-preload.so");
    std::fs::copy(self::preload(), &preload).unwrap();
    let mut command = program("/usr/bin/python3");
    command.env("LD_PRELOAD", &preload).arg("-c").arg(
        "import libvirt\n\
         libvirt.open('test:///default').lookupByName('test').snapshotCreateXML('<x/>', 0x500)",
    );
    Said::of(&mut command).fails_with("libvirtError: the domain is run by libvirt's TEST driver");
}

/// A program that is linked with libinstantsnap uses its own functions and its own last error.
#[test]
fn program_linked_with_libinstantsnap_uses_its_own_functions() {
    let mut command = program("/usr/bin/python3");
    let libraries = [preload(), built("libinstantsnap.so")];
    command.env("LD_PRELOAD", libraries.map(|library| library.display().to_string()).join(":"));
    command.arg("-c").arg(
        "import ctypes\n\
         class Error(ctypes.Structure):\n    \
             _fields_ = [('code', ctypes.c_int), ('domain', ctypes.c_int), ('message', ctypes.c_char_p)]\n\
         both = ctypes.CDLL(None)\n\
         both.instantsnap_last_error.restype = ctypes.POINTER(Error)\n\
         flag = ctypes.c_uint(0x500)\n\
         assert not both.qemuSnapshotCreateXML(None, None, b'<domainsnapshot/>', flag)\n\
         print(both.instantsnap_last_error().contents.message.decode())\n\
         assert both.qemuSnapshotDelete(ctypes.c_void_p(4711), None, ctypes.c_uint(0)) == -1\n\
         print(both.instantsnap_last_error().contents.message.decode())",
    );
    let said = Said::of(&mut command).quietly();
    let said: Vec<_> = said.lines().collect();
    assert_eq!(said.len(), 2, "{said:?}");
    assert_eq!(said[0], "domain must not be NULL");
    assert_eq!(said[1], "guest is not an open handle of this library");
}

/// The programs that the watchdog runs must not have the library preloaded.
#[test]
fn watchdog_undoes_the_snapshot_of_a_killed_virsh() {
    let binary = &Binary::under_libvirt()[0];
    // With this much memory the drain is long, and the guest writes into all of it.
    let machine =
        Machine::new(binary).disk(Format::Qcow2).memory(256).prealloc().append("dense=128");
    let subject = Subject { guest: machine.start_under(&Daemon::session()) };
    subject.guest.wait_ticks(2);
    let mut command = subject.create_as(preloaded("virsh"), "s", &["--live"]);
    let mut virsh = command.env(UPGRADE.0, UPGRADE.1).stdout(Stdio::null()).spawn().unwrap();
    let recorded = wait_for(DEADLINE, || (subject.snapshots() == ["s"]).then_some(()));
    assert!(recorded.is_some() && virsh.try_wait().unwrap().is_none());
    virsh.kill().unwrap();
    virsh.wait().unwrap();
    let undone = wait_for(DEADLINE, || {
        (subject.snapshots().is_empty() && !subject.memory("s").exists()).then_some(())
    });
    assert!(undone.is_some(), "{:?}", subject.snapshots());
    subject.guest.wait_ticks(3);
}
