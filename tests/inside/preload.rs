//! The library for LD_PRELOAD, in unmodified programs: Debian's virsh and python3-libvirt, with a
//! libvirtd of the test's own.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use instantsnap::error::Code;
use instantsnap_testkit::compile::{gcc, workspace};
use instantsnap_testkit::{Binary, DEADLINE, Daemon, Format, Guest, Machine, test, wait_for};

/// What libvirt before 9.9 says of a revert.
const CANNOT_REVERT: &str = "revert to external snapshot not supported yet";
const FUNCTIONS: [&str; 3] =
    ["virDomainRevertToSnapshot", "virDomainSnapshotCreateXML", "virDomainSnapshotDelete"];
const UPGRADE: (&str, &str) = ("INSTANTSNAP_UPGRADE_LIVE", "1");
const DEBUG: (&str, &str) = ("INSTANTSNAP_DEBUG", "1");
const NOWHERE: (&str, &str) = ("INSTANTSNAP_LIBRARY", "/nowhere/libinstantsnap.so.0");

/// A library of this workspace: cargo has put it where it has put this program.
fn built(name: &str) -> PathBuf {
    let library = std::env::current_exe().unwrap().with_file_name(name);
    assert!(library.exists(), "{} is not there", library.display());
    library
}

fn preload() -> PathBuf {
    built("libinstantsnap_preload.so")
}

/// The stand-in for libinstantsnap.
fn instead() -> &'static PathBuf {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        gcc(&workspace().join("preload/tests/instead.c"), "libinstead.so", "-shared -fPIC")
    })
}

/// A program as it is without us, away from the user's own files and settings.
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

/// The same under the library, with libinstantsnap at hand.
fn preloaded(name: &str) -> Command {
    let mut command = program(name);
    command.env("LD_PRELOAD", preload()).env("INSTANTSNAP_LIBRARY", built("libinstantsnap.so"));
    command
}

/// What a program said, and whether it was content.
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

    /// It succeeded, and nothing is on stderr.
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

    /// python3-libvirt with `domain`, and a flag and XML for a snapshot.
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

    /// Whether an instant snapshot of it was taken, or tried: libvirt marks a domain whose QEMU is
    /// told things past it, and nothing else here does that. When memory is saved says nothing: so
    /// little of it can be there before the guest runs again.
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
fn three_functions_are_exported_and_no_library_is_needed_for_them() {
    let output = |program: &str, args: &[&str]| {
        let output = Command::new(program).args(args).arg(preload()).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let symbols = output("nm", &["-D", "--defined-only"]);
    let mut symbols: Vec<_> =
        symbols.lines().filter_map(|line| line.split_whitespace().last()).collect();
    symbols.sort();
    assert_eq!(symbols, FUNCTIONS);
    assert!(!output("readelf", &["-d"]).contains("libvirt"));
}

/// virsh and Python's module ask for `virDomainSnapshotCreateXML@LIBVIRT_0.8.0`, and ours has no
/// version.
#[test]
fn versioned_references_are_bound_to_it() {
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

/// libvirt's test driver, which needs no daemon, has snapshots, and none of them is for us.
#[test]
fn another_driver_is_as_it_was() {
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
fn a_live_snapshot_is_libvirts_own_without_the_variable() {
    for binary in Binary::under_libvirt() {
        let subject = Subject::start(binary);
        for (name, value) in [("zero", Some("0")), ("unset", None)] {
            let mut command = preloaded("virsh");
            command.env(NOWHERE.0, NOWHERE.1);
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
fn a_live_snapshot_of_virsh_is_instant_with_the_variable() {
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

/// Whatever is not a LIVE snapshot of disks and memory in files is not ours to make better.
#[test]
fn other_snapshots_are_not_upgraded() {
    let subject = Subject::start(&Binary::all()[0]);
    let virsh = |words: &[&str]| {
        let mut command = preloaded("virsh");
        command.envs([UPGRADE, DEBUG]).env("INSTANTSNAP_LIBRARY", instead());
        let said = Said::of(
            &mut subject.virsh(command, &[&["snapshot-create-as", "--name", "s"], words].concat()),
        );
        assert!(!said.err.contains("instead:"), "{said:?}");
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
    // XML that cannot be read is for libvirt to complain of.
    let mut command = preloaded("/usr/bin/python3");
    command.envs([UPGRADE, DEBUG]).env("INSTANTSNAP_LIBRARY", instead());
    let script = "domain.snapshotCreateXML('<domainsnapshot><memory file=\"/x\"', 0x100)";
    let said = Said::of(&mut subject.python(command, "s", script));
    said.fails_with("XML");
    assert!(!said.err.contains("instead:"), "{said:?}");
    subject.guest.virsh("destroy", &[]);
    virsh(&["--live", "--memspec", &memory])
        .fails_with("memory state cannot be saved with offline");
    assert!(subject.snapshots().is_empty());
}

/// Whoever did not ask for INSTANT gets what there is; and the reason, where it is asked for.
#[test]
fn where_instantsnap_refuses_an_upgraded_snapshot_is_libvirts_own() {
    let subject = Subject::start(&Binary::all()[0]);
    for code in [
        Code::ArgumentUnsupported,
        Code::OperationUnsupported,
        Code::ConfigUnsupported,
        Code::InvalidArg,
    ] {
        let create = |name: &str, debug: bool| {
            let mut command = preloaded("virsh");
            command
                .envs([UPGRADE])
                .env("INSTANTSNAP_LIBRARY", instead())
                .env("INSTEAD_CODE", (code as i32).to_string());
            if debug {
                command.envs([DEBUG]);
            }
            Said::of(&mut subject.create_as(command, name, &["--live"]))
        };
        let name = format!("s{}", code as i32);
        let said = create(&name, false);
        assert_eq!((said.ok, said.err.as_str()), (true, "instead: create 0x500"));
        let said = create(&format!("{name}d"), true);
        let reason =
            "instantsnap-preload: a LIVE snapshot stays libvirt's own: instead of a snapshot";
        assert_eq!((said.ok, said.err), (true, format!("instead: create 0x500\n{reason}")));
        assert!(!subject.was_instant());
    }
    // The library is not there.
    let mut command = preloaded("virsh");
    command.envs([UPGRADE, NOWHERE]);
    Said::of(&mut subject.create_as(command, "missing", &["--live"])).quietly();
    assert!(!subject.was_instant());
    // Something was tried and failed: that is no reason to try something else.
    let mut command = preloaded("virsh");
    command.envs([UPGRADE]).env("INSTANTSNAP_LIBRARY", instead());
    command.env("INSTEAD_CODE", (Code::OperationFailed as i32).to_string());
    Said::of(&mut subject.create_as(command, "failed", &["--live"]))
        .fails_with("error: instead of a snapshot");
    assert!(!subject.snapshots().contains(&"failed".to_owned()));
    subject.guest.wait_ticks(3);
}

#[test]
fn what_libvirt_refuses_has_libvirts_words() {
    let subject = Subject::start(&Binary::all()[0]);
    let quiesce = |mut command: Command| {
        command.envs([UPGRADE]);
        Said::of(&mut subject.create_as(command, "s", &["--live", "--quiesce"]))
    };
    let without = quiesce(program("virsh"));
    without.fails_with("VIR_DOMAIN_SNAPSHOT_CREATE_QUIESCE");
    assert_eq!(quiesce(preloaded("virsh")), without);
}

/// The stand-in calls the preloaded function, from the preloaded function, with the flag that
/// brought it there.
#[test]
fn a_call_from_inside_goes_to_libvirt() {
    let subject = Subject::start(&Binary::all()[0]);
    let mut command = preloaded("/usr/bin/python3");
    command.env("INSTANTSNAP_LIBRARY", instead());
    let said = Said::of(&mut subject.python(command, "s", "domain.snapshotCreateXML(xml, 0x500)"));
    said.fails_with("unsupported flags (0x400)");
    assert_eq!(said.err.matches("instead:").count(), 1, "{said:?}");
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

/// Without the library, bit 10 is what it always was; the error comes by exception, by the
/// connection, and by the handler.
#[test]
fn python_is_told_what_is_wrong() {
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
    // INSTANT without LIVE, with DISK_ONLY, with REDEFINE.
    for (flags, named) in [(0x400, "LIVE"), (0x510, "DISK_ONLY"), (0x501, "REDEFINE")] {
        let said = attempt(preloaded("/usr/bin/python3"), flags);
        assert!(said.starts_with("8 10 ") && said.contains(named), "{flags:x}: {said}");
    }
    let mut command = preloaded("/usr/bin/python3");
    command.envs([NOWHERE]);
    let said = attempt(command, 0x500);
    assert!(
        said.starts_with("84 10 ")
            && said.contains("INSTANTSNAP_LIBRARY")
            && said.contains(NOWHERE.1),
        "{said}"
    );
    assert!(subject.snapshots().is_empty());
    subject.guest.wait_ticks(3);
}

/// An older libvirt refuses to bring an external snapshot back.
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
            let mut command = preloaded("virsh");
            command.envs([NOWHERE]);
            Said::of(&mut subject.virsh(command, &["snapshot-revert", "s"]))
                .fails_with(CANNOT_REVERT);
        }
        let mut command = preloaded("virsh");
        command.envs([DEBUG]);
        Said::of(&mut subject.virsh(command, &["snapshot-revert", "s"])).quietly();
        let tick = subject.guest.wait_ticks(5);
        eprintln!("{}: left at {later}, back at {tick}", binary.name);
        assert_eq!(subject.snapshots(), ["s"]);
        // The default error handler would say on stderr what libvirt has refused.
        let script = "assert domain.revertToSnapshot(domain.snapshotLookupByName('s')) == 0";
        Said::of(&mut subject.python(preloaded("/usr/bin/python3"), "s", script)).quietly();
        subject.guest.wait_ticks(5);
    }
}

/// Its result is the call's, and its error; by default, an error is on stderr once.
#[test]
fn revert_and_delete_of_a_snapshot_with_memory_are_instantsnaps() {
    let subject = Subject::start(&Binary::all()[0]);
    Said::of(&mut subject.create_as(program("virsh"), "s", &["--live"])).quietly();
    let under = |program: &str, code: i32| {
        let mut command = preloaded(program);
        command.env("INSTANTSNAP_LIBRARY", instead()).env("INSTEAD_CODE", code.to_string());
        command
    };
    for (command, method) in
        [("revert", "domain.revertToSnapshot(snapshot)"), ("delete", "snapshot.delete()")]
    {
        let script = format!(
            "snapshot = domain.snapshotLookupByName('s')\n\
             try:\n    {method}\n    assert libvirt.virGetLastError() is None\n\
             except libvirt.libvirtError as error:\n    print(error.get_error_code(), error)\n"
        );
        let called = format!("instead: {command} 0x0");
        let said = Said::of(&mut subject.python(under("/usr/bin/python3", 0), "s", &script));
        assert_eq!(said, Said { ok: true, out: String::new(), err: called.clone() });
        for code in [Code::OperationUnsupported as i32, Code::OperationFailed as i32] {
            let said = Said::of(&mut subject.python(under("/usr/bin/python3", code), "s", &script));
            assert_eq!(said.out, format!("{code} instead of a snapshot"));
            assert_eq!(
                said.err,
                format!("{called}\nlibvirt: QEMU Driver error : instead of a snapshot")
            );
            let words = [&format!("snapshot-{command}"), "s"];
            let said = Said::of(&mut subject.virsh(under("virsh", code), &words));
            said.fails_with(&format!(
                "{called}\nerror: Failed to {command} snapshot s\nerror: instead of a snapshot"
            ));
        }
    }
    assert_eq!(subject.snapshots(), ["s"]);
    subject.guest.wait_ticks(3);
}

/// Snapshots without memory, or with it in a disk, are libvirt's to bring back or to refuse.
#[test]
fn revert_and_delete_of_other_snapshots_are_libvirts() {
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
        let mut command = preloaded("virsh");
        command.env("INSTANTSNAP_LIBRARY", instead());
        let said = Said::of(&mut subject.virsh(command, words));
        assert!(!said.err.contains("instead:"), "{said:?}");
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

/// Not every delete is one that libvirt knows how to do: with children, for one.
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

/// As it is installed: side by side, and by those names.
#[test]
fn the_library_beside_it_is_found() {
    let directory = tempfile::tempdir().unwrap();
    let preload = directory.path().join("libinstantsnap-preload.so");
    std::fs::copy(self::preload(), &preload).unwrap();
    let attempt = || {
        let mut command = program("/usr/bin/python3");
        command.env("LD_PRELOAD", &preload).env_remove("INSTANTSNAP_LIBRARY").arg("-c").arg(
            "import \
             libvirt\nlibvirt.open('test:///default').lookupByName('test').snapshotCreateXML('<x/>', \
             0x500)",
        );
        Said::of(&mut command)
    };
    attempt().fails_with("instant snapshots need libinstantsnap.so.0: ");
    std::fs::copy(built("libinstantsnap.so"), directory.path().join("libinstantsnap.so.0"))
        .unwrap();
    attempt().fails_with("libvirtError: the domain is run by libvirt's TEST driver");
}

/// What it runs in virsh's place must not be what it was itself: preloaded.
#[test]
fn the_watchdog_of_a_killed_virsh_takes_its_snapshot_back() {
    let binary = &Binary::under_libvirt()[0];
    // Memory enough for the drain to be long, and a guest that writes into all of it.
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
