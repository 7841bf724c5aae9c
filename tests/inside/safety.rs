// SPDX-License-Identifier: LGPL-2.1-or-later

//! Harm that the library must not do to a stock libvirtd and its guests.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::OnceLock;
use std::time::Duration;

use common::inside::{INSTANT, LIVE, Subject, answer, has_mapped, library, session};
use common::watchdog::{kill_watchdog_of, program_of, watchdog_of};
use common::{ALL_SECTORS, files_below, machine};
use instantsnap_testkit::compile::{gcc, workspace};
use instantsnap_testkit::{
    Binary, Daemon, Fingerprint, Machine, Mode, domain_fingerprint, test, thorough, wait_for,
};
use rustix::process::{Pid, Signal, kill_process};

const INVALID_ARG: i64 = 8;
const OPERATION_FAILED: i64 = 9;
const NO_DOMAIN: i64 = 42;
const OPERATION_INVALID: i64 = 55;
const OPERATION_UNSUPPORTED: i64 = 84;
const RESOURCE_BUSY: i64 = 87;
const FROM_QEMU: i64 = 10;

fn binary() -> &'static Binary {
    &Binary::under_libvirt()[0]
}

/// A guest whose drain is long enough to be slowed down, and which leaves CPU time to others.
fn busy_machine() -> Machine {
    machine(binary(), 1).prealloc().append("dense=32 rest=20000")
}

/// A preloaded library that hides functions of libvirt or reports another version.
fn lacking() -> PathBuf {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY
        .get_or_init(|| {
            gcc(&workspace().join("tests/kit/shim/lacking.c"), "lacking.so", "-shared -fPIC")
        })
        .clone()
}

/// The state that a failed snapshot must not change.
#[derive(Debug, PartialEq)]
struct Trace(Fingerprint, Vec<PathBuf>);

fn trace(subject: &Subject) -> Trace {
    Trace(domain_fingerprint(&subject.guest), files_below(subject.guest.directory()))
}

#[track_caller]
fn assert_untouched(subject: &Subject, before: &Trace) {
    let mut after = trace(subject);
    let same = wait_for(Duration::from_secs(90), || {
        after = trace(subject);
        (after == *before).then_some(())
    });
    assert!(
        same.is_some(),
        "something is left:\n{}{:?}\n{:?}",
        before.0.differences(&after.0),
        before.1,
        after.1
    );
}

/// Waits until the domain has no job. A libvirtd that was killed during a snapshot job cancels, at
/// its next start, what it considers its own migration, and QEMU 7.2 then freezes its guest.
fn wait_for_no_job(subject: &Subject) {
    subject.guest.virsh("dommemstat", &[]);
}

fn client_of(child: Child) -> Result<String, common::inside::Refused> {
    answer(child.wait_with_output().unwrap())
}

/// Asks twice for an instant snapshot in a daemon that refuses them. Asserts that the client gets
/// the reason each time, and the log once.
#[track_caller]
fn assert_off(subject: &Subject, reason: &str) {
    for _ in 0..2 {
        let refused = subject.snapshot("s").unwrap_err();
        assert_eq!((refused.code, refused.domain), (INVALID_ARG, FROM_QEMU), "{refused:?}");
        let parts = ["instant snapshots are off in this daemon", reason, "0x400"];
        assert!(parts.iter().all(|part| refused.message.contains(part)), "{refused:?}");
    }
    let log = subject.guest.daemon().log();
    assert_eq!(log.matches("instant snapshots are off: ").count(), 1, "{log}");
    assert!(log.contains(reason), "{log}");
    assert_eq!(answer(subject.create("live", LIVE).output().unwrap()), Ok("live".into()));
    assert_eq!(subject.on_snapshot("live", "delete(2)"), Ok("0".into()));
    assert!(!subject.was_instant());
    subject.guest.wait_ticks(3);
}

#[test]
fn unknown_libvirt_disables_instant_snapshots_only() {
    let lacks = [
        ("INSTANTSNAP_TEST_LACKS", "virObjectUnlock", "this libvirt has no virObjectUnlock()"),
        (
            "INSTANTSNAP_TEST_LACKS",
            "virIdentityGetSystem",
            "this libvirt has no virIdentityGetSystem()",
        ),
        (
            "INSTANTSNAP_TEST_LACKS",
            "virGetDomainSnapshot",
            "this libvirt has no virGetDomainSnapshot()",
        ),
        (
            "INSTANTSNAP_TEST_VERSION",
            "13000000",
            "libvirt 13.0 is not one that this version of instantsnap knows",
        ),
        (
            "INSTANTSNAP_TEST_VERSION",
            "8010000",
            "libvirt 8.10 is not one that this version of instantsnap knows",
        ),
    ];
    let few = [0, 3];
    let chosen = lacks.into_iter().enumerate().filter(|(n, _)| thorough() || few.contains(n));
    for (_, (variable, value, reason)) in chosen {
        let daemon =
            Daemon::preloaded(Mode::Session, &[&library(), &lacking()], &[(variable, value)])
                .unwrap();
        assert_off(&Subject::start(&machine(binary(), 1), &daemon), reason);
    }
    let any = [("INSTANTSNAP_TEST_VERSION", "13000000"), ("INSTANTSNAP_ANY_LIBVIRT", "1")];
    let daemon = Daemon::preloaded(Mode::Session, &[&library(), &lacking()], &any).unwrap();
    let subject = Subject::start(&machine(binary(), 1), &daemon);
    assert_eq!(subject.snapshot("s"), Ok("s".into()));
}

#[test]
fn unknown_libvirt_with_closed_stderr_keeps_running() {
    let variables = [("INSTANTSNAP_TEST_VERSION", "13000000"), ("INSTANTSNAP_TEST_NO_STDERR", "1")];
    let daemon = Daemon::preloaded(Mode::Session, &[&library(), &lacking()], &variables).unwrap();
    let subject = Subject::start(&machine(binary(), 1), &daemon);
    for _ in 0..2 {
        let refused = subject.snapshot("s").unwrap_err();
        assert!(refused.message.contains("libvirt 13.0 is not one that"), "{refused:?}");
    }
    assert!(UnixStream::connect(daemon.socket()).is_ok());
    subject.guest.wait_ticks(3);
}

#[test]
fn driver_that_does_not_call_the_library_is_noticed() {
    let elsewhere = |name, how| {
        gcc(&workspace().join("tests/kit/shim/elsewhere.c"), name, &format!("-shared -fPIC {how}"))
    };
    let start = |libraries: [PathBuf; 2]| {
        let libraries = [libraries[0].as_path(), &libraries[1]];
        let daemon = Daemon::preloaded(Mode::Session, &libraries, &[]).unwrap();
        Subject::start(&machine(binary(), 1), &daemon)
    };
    // The library notices it in advance.
    let subject = start([elsewhere("by-itself.so", "-DBY_ITSELF"), library()]);
    assert_off(&subject, "another library that is preloaded, or none, has qemuSnapshotCreateXML()");
    // The library notices it only after libvirt has taken the snapshot.
    let subject = start([library(), elsewhere("by-a-thread.so", "-pthread")]);
    let refused = subject.snapshot("ordinary").unwrap_err();
    assert_eq!((refused.code, refused.domain), (OPERATION_FAILED, FROM_QEMU), "{refused:?}");
    let says = "this libvirt has taken snapshot 'ordinary' in its ordinary way";
    assert!(refused.message.contains(says), "{refused:?}");
    assert!(subject.guest.daemon().log().contains(says));
    assert_eq!(subject.snapshots(), ["ordinary"]);
    let refused = subject.snapshot("next").unwrap_err();
    assert_eq!(refused.code, INVALID_ARG, "{refused:?}");
    assert!(
        refused.message.contains("takes snapshots without its qemuSnapshotCreateXML()"),
        "{refused:?}"
    );
    assert_eq!(subject.snapshots(), ["ordinary"]);
    subject.guest.wait_ticks(3);
}

#[test]
fn ld_preload_is_removed_from_the_environment_of_daemons_only() {
    let directory = tempfile::tempdir().unwrap();
    let own = library();
    let preload = format!("{}:{}", own.display(), lacking().display());
    for (name, left) in [
        ("libvirtd", lacking().display().to_string()),
        ("virtqemud", lacking().display().to_string()),
        ("client", preload.clone()),
    ] {
        let named = directory.path().join(name);
        std::fs::copy("/usr/bin/env", &named).unwrap();
        let output = Command::new(&named).env_clear().env("LD_PRELOAD", &preload).output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        assert_eq!(String::from_utf8(output.stdout).unwrap(), format!("LD_PRELOAD={left}\n"));
    }
}

/// As in a drop-in of an earlier version.
#[test]
fn libinstantsnap_in_a_daemon_changes_nothing_and_names_the_preload_library() {
    let own = library().with_file_name("libinstantsnap.so");
    let daemon = Daemon::preloaded(Mode::Session, &[&own], &[]).unwrap();
    assert!(has_mapped(daemon.pid(), &own));
    let subject = Subject::start(&machine(binary(), 1), &daemon);
    let refused = subject.snapshot("s").unwrap_err();
    assert_eq!((refused.code, refused.domain), (INVALID_ARG, FROM_QEMU), "{refused:?}");
    assert!(refused.message.contains("0x400"), "{refused:?}");
    // A libvirt that checks the flags early never calls the library.
    if Daemon::version() < (12, 0, 0) {
        assert!(refused.message.contains("libinstantsnap-preload.so"), "{refused:?}");
    }
    assert_eq!(answer(subject.create("live", LIVE).output().unwrap()), Ok("live".into()));
    assert_eq!(subject.on_snapshot("live", "delete(2)"), Ok("0".into()));
    assert!(!subject.was_instant() && subject.snapshots().is_empty());
    subject.guest.wait_ticks(3);
}

#[test]
fn refusal_reaches_the_client_and_the_log() {
    let daemon = session(&[]);
    let subject = Subject::start(&machine(binary(), 1), &daemon);
    let before = trace(&subject);
    let refusals = [
        ("a", 0x400, INVALID_ARG, "VIR_DOMAIN_SNAPSHOT_CREATE_LIVE"),
        ("b", 0x510, INVALID_ARG, "mutually exclusive"),
        ("r", 0x520, OPERATION_UNSUPPORTED, "VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT"),
        ("c/d", INSTANT, 35, "name can't contain '/'"),
    ];
    for (name, flags, code, part) in refusals {
        let refused = answer(subject.create(name, flags).output().unwrap()).unwrap_err();
        assert!(refused.message.contains(part), "{refused:?}");
        assert_eq!((refused.code, refused.domain), (code, FROM_QEMU), "{refused:?}");
        assert!(
            daemon.log().contains(&format!("instantsnap:0 : {}", refused.message)),
            "{}",
            daemon.log()
        );
    }
    assert_untouched(&subject, &before);
    subject.guest.virsh("destroy", &[]);
    let refused = subject.snapshot("off").unwrap_err();
    assert_eq!(refused.code, OPERATION_INVALID, "{refused:?}");
    assert!(refused.message.contains("is not running"), "{refused:?}");
}

#[test]
fn eight_concurrent_snapshots_leave_workers_for_other_clients() {
    const DOMAINS: usize = 8;
    let daemon = session(&[]);
    let clones = Daemon::session();
    let subjects: Vec<_> = (0..DOMAINS).map(|_| Subject::start(&busy_machine(), &daemon)).collect();
    let (children, slowed): (Vec<_>, Vec<Result<_, String>>) = std::thread::scope(|scope| {
        let begin = |subject: &'_ Subject| (subject.spawn("side"), subject.try_slow_down("side"));
        let threads: Vec<_> =
            subjects.iter().map(|subject| scope.spawn(move || begin(subject))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).unzip()
    });
    // All domains but a few whose memory was saved too soon are in the drain. Other clients get
    // replies, even for calls that need a domain's job.
    let missed: Vec<_> = slowed.iter().filter_map(|slowed| slowed.as_ref().err()).collect();
    assert!(missed.len() <= DOMAINS / 4, "{missed:?}");
    for subject in &subjects {
        subject.guest.virsh("dommemstat", &[]);
        assert_eq!(subject.guest.virsh("domstate", &[]).trim(), "running");
    }
    drop(slowed);
    for (n, (subject, child)) in subjects.iter().zip(children).enumerate() {
        assert_eq!(client_of(child), Ok("side".into()));
        subject.guest.wait_ticks(3);
        if thorough() || n < 2 {
            subject.restore_clone("side", &clones);
        }
    }
}

#[test]
fn max_snapshots_limits_concurrent_snapshots() {
    let daemon = session(&[("INSTANTSNAP_MAX_SNAPSHOTS", "1")]);
    let [first, second] = [0; 2].map(|_| Subject::start(&busy_machine(), &daemon));
    let before = trace(&second);
    let child = first.spawn("first");
    let slowed = first.slow_down("first");
    let refused = second.snapshot("second").unwrap_err();
    assert_eq!((refused.code, refused.domain), (RESOURCE_BUSY, FROM_QEMU), "{refused:?}");
    assert!(refused.message.contains("INSTANTSNAP_MAX_SNAPSHOTS"), "{refused:?}");
    assert_untouched(&second, &before);
    drop(slowed);
    assert_eq!(client_of(child), Ok("first".into()));
    assert_eq!(second.snapshot("second"), Ok("second".into()));
}

#[test]
fn killed_client_or_domjobabort_does_not_end_the_snapshot() {
    let daemon = session(&[]);
    let subject = Subject::start(&busy_machine(), &daemon);
    let mut child = subject.spawn("s");
    let slowed = subject.slow_down("s");
    let error = daemon.try_virsh(&["domjobabort", subject.guest.name()]).unwrap_err();
    assert!(error.contains("no job is active"), "{error}");
    let other = subject.snapshot("other").unwrap_err();
    assert!(other.code == OPERATION_INVALID && other.message.contains("under way"), "{other:?}");
    child.kill().unwrap();
    child.wait().unwrap();
    drop(slowed);
    subject.wait_complete("s");
    assert_eq!(subject.snapshots(), ["s"]);
    subject.guest.wait_ticks(3);
    subject.restore_clone("s", &Daemon::session());
    // The limit admits another snapshot as soon as the call has ended.
    wait_for(Duration::from_secs(60), || subject.snapshot("next").ok())
        .expect("no snapshot any more");
}

#[test(long)]
fn domain_may_end_or_be_redefined_or_undefined_during_a_snapshot() {
    let daemon = session(&[]);
    let subject = Subject::start(&busy_machine(), &daemon);
    let child = subject.spawn("defined");
    let slowed = subject.slow_down("defined");
    let xml = subject.guest.virsh("dumpxml", &["--inactive"]);
    let file = subject.guest.directory().join("defined.xml");
    std::fs::write(&file, xml.replace("<on_crash>destroy<", "<on_crash>restart<")).unwrap();
    daemon.virsh(&["define", file.to_str().unwrap()]);
    drop(slowed);
    assert_eq!(client_of(child), Ok("defined".into()));
    assert!(subject.guest.virsh("dumpxml", &["--inactive"]).contains("<on_crash>restart<"));

    // The undefined domain is transient until it is defined again.
    let child = subject.spawn("undefined");
    let slowed = subject.slow_down("undefined");
    subject.guest.virsh("undefine", &["--snapshots-metadata"]);
    drop(slowed);
    assert_eq!(client_of(child), Ok("undefined".into()));
    assert!(subject.guest.virsh("dominfo", &[]).contains("Persistent:     no"));
    subject.guest.wait_ticks(3);
    daemon.virsh(&["define", file.to_str().unwrap()]);

    let child = subject.spawn("ended");
    let slowed = subject.slow_down("ended");
    subject.guest.virsh("destroy", &[]);
    std::mem::forget(slowed);
    let refused = client_of(child).unwrap_err();
    assert_eq!(refused.code, OPERATION_FAILED, "{refused:?}");
    assert_eq!(subject.snapshots(), ["defined", "undefined"]);
    assert!(!subject.memory("ended").exists());
    subject.guest.start_domain();
    subject.guest.wait_ticks(3);

    // A transient domain is gone when it ends.
    let subject = Subject::start(&busy_machine().transient(), &daemon);
    let child = subject.spawn("gone");
    let slowed = subject.slow_down("gone");
    subject.guest.virsh("destroy", &[]);
    std::mem::forget(slowed);
    let refused = client_of(child).unwrap_err();
    assert!([OPERATION_FAILED, NO_DOMAIN].contains(&refused.code), "{refused:?}");
    assert!(!subject.memory("gone").exists());
    daemon.virsh(&["list", "--all"]);
}

/// `virsh migrate` to another daemon on this machine, with other paths for the serial log and the
/// monitor socket.
fn try_migrate(subject: &Subject, to: &Daemon) -> Result<String, String> {
    let (guest, file) = (&subject.guest, subject.guest.directory().join("there.xml"));
    let xml = guest.virsh("dumpxml", &["--migratable"]);
    std::fs::write(&file, xml.replace("serial.log", "there.log").replace("m.sock", "there.sock"))
        .unwrap();
    let there = ["--migrateuri", "tcp://127.0.0.1", "--xml", file.to_str().unwrap()];
    let migrate = ["migrate", "--live", "--unsafe", guest.name(), &to.uri()];
    let said = guest.daemon().try_virsh(&[&migrate[..], &there].concat());
    // The other daemon can still be cleaning up.
    let is_empty = || to.virsh(&["list", "--all", "--name"]).trim().is_empty().then_some(());
    assert!(wait_for(Duration::from_secs(30), is_empty).is_some(), "it is there: {said:?}");
    for left in ["there.xml", "there.log", "there.sock"] {
        let _ = std::fs::remove_file(guest.directory().join(left));
    }
    said
}

/// libvirt does not know that QEMU saves memory. QEMU itself refuses other saves.
#[test]
fn save_or_migrate_during_a_snapshot_fails_and_the_snapshot_completes() {
    const NO_METADATA: u32 = 1 << 2;
    const BUSY: &str = "There's a migration process in progress";
    let daemon = session(&[]);
    let elsewhere = Daemon::session();
    let subject = Subject::start(&busy_machine(), &daemon);
    let guest = &subject.guest;
    let file = guest.directory().join("theirs");
    // libvirt refuses to migrate a domain with snapshots. It begins to migrate one without.
    for (name, flags, says) in
        [("recorded", INSTANT, "snapshots"), ("s", INSTANT | NO_METADATA, BUSY)]
    {
        for recorded in subject.snapshots() {
            subject.on_snapshot(&recorded, "delete(2)").unwrap();
        }
        let child = subject.create(name, flags).spawn().unwrap();
        let slowed = subject.slow_down(name);
        // The record follows the instant, and the first pages of the memory image can precede it.
        let is_recorded =
            || (flags & NO_METADATA != 0 || subject.snapshots() == [name]).then_some(());
        assert!(wait_for(Duration::from_secs(30), is_recorded).is_some(), "{}", daemon.log());
        let said = [
            ("save", daemon.try_virsh(&["save", guest.name(), file.to_str().unwrap()]), BUSY),
            ("managedsave", daemon.try_virsh(&["managedsave", guest.name()]), BUSY),
            (
                "dump",
                daemon.try_virsh(&["dump", "--live", guest.name(), file.to_str().unwrap()]),
                BUSY,
            ),
            // This comes last: when the migration fails, libvirt raises the bandwidth limit that
            // slows the drain down.
            ("migrate", try_migrate(&subject, &elsewhere), says),
        ];
        for (what, said, part) in said {
            eprintln!("{what}: {said:?}");
            // libvirt 12.8 does not support a live dump any more.
            let is_no_more = said.as_ref().is_err_and(|error| error.contains("unsupported flags"));
            if what == "dump" && is_no_more {
                continue;
            }
            assert!(said.as_ref().is_err_and(|error| error.contains(part)), "{what}: {said:?}");
        }
        assert_eq!(guest.virsh("domstate", &[]).trim(), "running");
        drop(slowed);
        assert_eq!(client_of(child), Ok(name.into()), "{}", daemon.log());
        assert!(!file.exists());
        guest.wait_ticks(3);
    }
    // The domain can be saved after the snapshot.
    guest.virsh("save", &[file.to_str().unwrap()]);
    for name in ["recorded", "s"] {
        subject.restore_clone(name, &Daemon::session());
    }
}

/// The operations also work beside a client's snapshot: `tests/libvirt/virsh_table.rs` has more of
/// them.
#[test]
fn operations_of_other_clients_during_a_snapshot_harm_no_image() {
    let daemon = session(&[]);
    let clones = Daemon::session();
    let subject = Subject::start(&busy_machine(), &daemon);
    let guest = &subject.guest;
    let during = |name: &str, command: &str, args: &[&str]| {
        let child = subject.spawn(name);
        let slowed = subject.slow_down(name);
        // The record follows the resume. QEMU 7.2 resumes its guest itself, and the daemon would
        // take a suspend before it checks for the snapshot's own pause.
        wait_for(Duration::from_secs(60), || {
            subject.snapshots().iter().any(|recorded| recorded == name).then_some(())
        })
        .expect("it is not recorded");
        guest.virsh(command, args);
        drop(slowed);
        client_of(child)
    };
    assert_eq!(during("paused", "suspend", &[]), Ok("paused".into()));
    assert_eq!(guest.virsh("domstate", &[]).trim(), "paused");
    guest.virsh("resume", &[]);

    assert_eq!(
        during("parent", "snapshot-create-as", &["theirs", "--disk-only"]),
        Ok("parent".into())
    );
    assert_eq!(subject.snapshots(), ["paused", "parent", "theirs"]);

    // The merge into the lowest image destroys the images of all snapshots.
    let refused =
        during("merged", "blockcommit", &["vda", "--active", "--pivot", "--wait"]).unwrap_err();
    assert_eq!(refused.code, OPERATION_FAILED, "{refused:?}");
    assert!(
        refused.message.contains("another client has changed the images of disk 'vda'"),
        "{refused:?}"
    );
    assert!(!subject.memory("merged").exists());
    assert_eq!(subject.snapshots(), ["paused", "parent", "theirs"]);
    guest.wait_ticks(ALL_SECTORS);
    assert_eq!(subject.snapshot("after"), Ok("after".into()));
    guest.wait_ticks(3);
    subject.restore_clone("after", &clones);
}

#[test]
fn killed_daemon_leaves_a_running_guest_and_nothing_else() {
    let daemon = session(&[]);
    let release = daemon.directory().join("guests/release");
    // In the pause: QEMU has not armed write tracking yet.
    let subject = Subject::start(&machine(binary(), 2).late_arm(&release), &daemon);
    let before = trace(&subject);
    let child = subject.spawn("pause");
    // libvirt has recorded the switch of the disks: if it were killed before, it would forget a
    // switch of its own too.
    let paused = wait_for(Duration::from_secs(60), || {
        let paused = subject.guest.virsh("domstate", &[]).trim() == "paused";
        (paused && subject.guest.virsh("domblklist", &[]).contains(".pause")).then_some(())
    });
    assert!(paused.is_some(), "{:?}", client_of(child));
    wait_for_no_job(&subject);
    daemon.kill();
    std::fs::write(&release, "").unwrap();
    assert!(!child.wait_with_output().unwrap().status.success());
    daemon.start_again();
    assert_untouched(&subject, &before);
    subject.guest.wait_ticks(3);

    // In the drain.
    let subject = Subject::start(&busy_machine(), &daemon);
    let before = trace(&subject);
    let child = subject.spawn("drain");
    let slowed = subject.slow_down("drain");
    wait_for(Duration::from_secs(60), || (subject.snapshots() == ["drain"]).then_some(()))
        .expect("it is not recorded");
    wait_for_no_job(&subject);
    daemon.kill();
    assert!(!child.wait_with_output().unwrap().status.success());
    daemon.start_again();
    // The next snapshot is refused until the undo has ended.
    let is_refused = |why: &common::inside::Refused| {
        why.code == OPERATION_INVALID && why.message.contains("is under way")
    };
    let why = subject.snapshot("next").unwrap_err();
    assert!(is_refused(&why), "{why:?}");
    drop(slowed);
    let next = wait_for(Duration::from_secs(60), || match subject.snapshot("next") {
        Ok(name) => Some(name),
        Err(why) => {
            assert!(is_refused(&why), "{why:?}");
            None
        }
    });
    assert_eq!(next.as_deref(), Some("next"));
    assert_eq!(subject.on_snapshot("next", "delete(0)"), Ok("0".into()));
    assert_untouched(&subject, &before);
    subject.guest.wait_ticks(3);
    assert_eq!(subject.snapshot("next"), Ok("next".into()));
    subject.restore_clone("next", &Daemon::session());
}

#[test]
fn stopped_daemon_completes_its_snapshot_first() {
    let daemon = session(&[]);
    let subject = Subject::start(&busy_machine(), &daemon);
    let child = subject.spawn("s");
    let slowed = subject.slow_down("s");
    let pid = daemon.pid();
    kill_process(Pid::from_raw(pid as i32).unwrap(), Signal::TERM).unwrap();
    wait_for(Duration::from_secs(30), || {
        UnixStream::connect(daemon.socket()).is_err().then_some(())
    })
    .expect("it still takes connections");
    drop(slowed);
    // The client of a stopped daemon gets no reply.
    child.wait_with_output().unwrap();
    wait_for(Duration::from_secs(60), || {
        (!std::path::Path::new(&format!("/proc/{pid}")).exists()).then_some(())
    })
    .expect("it does not end");
    daemon.start_again();
    subject.wait_complete("s");
    assert_eq!(subject.snapshots(), ["s"]);
    subject.guest.wait_ticks(3);
    subject.restore_clone("s", &Daemon::session());
}

/// The watchdog moves the memory: a daemon that is stopped by SIGSTOP does not freeze its guest.
#[test]
fn daemon_stopped_by_a_signal_does_not_freeze_its_guest_in_the_drain() {
    let daemon = session(&[]);
    let subject = Subject::start(&busy_machine(), &daemon);
    let child = subject.spawn("s");
    let slowed = subject.slow_down("s");
    let pid = Pid::from_raw(daemon.pid() as i32).unwrap();
    kill_process(pid, Signal::STOP).unwrap();
    drop(slowed);
    subject.guest.wait_ticks(3);
    kill_process(pid, Signal::CONT).unwrap();
    assert_eq!(answer(child.wait_with_output().unwrap()).as_deref(), Ok("s"));
    subject.restore_clone("s", &Daemon::session());
}

/// The client is stopped meanwhile. The image has every byte, as the clone shows.
#[test]
fn watchdog_of_a_daemon_that_is_killed_is_a_program_and_is_replaced_by_another() {
    let daemon = session(&[]);
    let subject = Subject::start(&busy_machine(), &daemon);
    let child = subject.spawn("s");
    let slowed = subject.slow_down("s");
    let client = Pid::from_raw(child.id() as i32).unwrap();
    kill_process(client, Signal::STOP).unwrap();
    let first = kill_watchdog_of(daemon.pid());
    let next = wait_for(Duration::from_secs(60), || {
        watchdog_of(daemon.pid()).filter(|next| program_of(*next) == "instantsnap-watchdog")
    });
    assert!(next.expect("it is replaced") != first);
    drop(slowed);
    subject.guest.wait_ticks(3);
    kill_process(client, Signal::CONT).unwrap();
    assert_eq!(answer(child.wait_with_output().unwrap()).as_deref(), Ok("s"));
    subject.restore_clone("s", &Daemon::session());
}

/// A guest with the snapshots a, b and c.
fn start_with_three_snapshots(daemon: &Daemon) -> Subject {
    let subject = Subject::start(&machine(binary(), 2), daemon);
    for name in ["a", "b", "c"] {
        assert_eq!(subject.snapshot(name).as_deref(), Ok(name));
        subject.guest.wait_ticks(3);
    }
    subject
}

/// Runs both at the same time.
fn at_once<A: Send, B: Send>(
    one: impl FnOnce() -> A + Send,
    other: impl FnOnce() -> B + Send,
) -> (A, B) {
    std::thread::scope(|scope| {
        let one = scope.spawn(one);
        let other = other();
        (one.join().unwrap(), other)
    })
}

#[test]
fn two_snapshots_of_a_domain_can_be_deleted_concurrently() {
    let subject = start_with_three_snapshots(&session(&[]));
    let delete = |name| subject.on_snapshot(name, "delete(0)");
    let done = at_once(|| delete("a"), || delete("b"));
    assert_eq!(done, (Ok("0".into()), Ok("0".into())));
    assert_eq!(subject.snapshots(), ["c"]);
    assert!(!subject.memory("a").exists() && !subject.memory("b").exists());
    subject.guest.wait_ticks(ALL_SECTORS);
    assert_eq!(subject.revert("c"), Ok("0".into()));
    subject.guest.wait_ticks(ALL_SECTORS);
}

#[test]
fn snapshot_can_be_deleted_during_a_revert_to_another() {
    let subject = start_with_three_snapshots(&session(&[]));
    let done = at_once(|| subject.revert("a"), || subject.on_snapshot("b", "delete(0)"));
    assert_eq!(done, (Ok("0".into()), Ok("0".into())));
    assert_eq!(subject.snapshots(), ["a", "c"]);
    assert_eq!(subject.guest.virsh("snapshot-current", &["--name"]).trim(), "a");
    subject.guest.wait_ticks(ALL_SECTORS);
    for name in ["c", "a"] {
        assert_eq!(subject.revert(name), Ok("0".into()));
        subject.guest.wait_ticks(3);
    }
}
