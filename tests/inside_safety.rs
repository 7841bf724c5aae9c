//! What must not happen to a stock libvirtd with the library in it, and to its guests.

mod common;

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Child;
use std::sync::OnceLock;
use std::time::Duration;

use common::inside::{INSTANT, LIVE, Subject, answer, library, session};
use common::{files_below, machine};
use instantsnap_testkit::compile::{gcc, workspace};
use instantsnap_testkit::{Binary, Daemon, Fingerprint, Machine, Mode, domain_fingerprint, thorough, wait_for};
use rustix::process::{Pid, Signal, kill_process};

const INVALID_ARG: i64 = 8;
const OPERATION_FAILED: i64 = 9;
const NO_DOMAIN: i64 = 42;
const OPERATION_INVALID: i64 = 55;
const RESOURCE_BUSY: i64 = 87;
const FROM_QEMU: i64 = 10;

fn binary() -> &'static Binary {
    &Binary::under_libvirt()[0]
}

/// A guest whose drain is long enough to be slowed down, and which leaves the CPUs to others.
fn busy_machine() -> Machine {
    machine(binary(), 1).prealloc().append("dense=32 rest=20000")
}

/// A preloaded library that makes functions of libvirt missing, or old.
fn lacking() -> PathBuf {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| gcc(&workspace().join("tests/kit/shim/lacking.c"), "lacking.so", "-shared -fPIC")).clone()
}

/// What a failed snapshot must leave as it is.
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
    assert!(same.is_some(), "something is left:\n{}{:?}\n{:?}", before.0.differences(&after.0), before.1, after.1);
}

/// libvirt cancels what it takes for a migration of its own when it is started after it was killed in a snapshot job. QEMU 7.2
/// freezes its guest then.
fn wait_for_no_job(subject: &Subject) {
    subject.guest.virsh("dommemstat", &[]);
}

fn client_of(child: Child) -> Result<String, common::inside::Refused> {
    answer(child.wait_with_output().unwrap())
}

#[test]
fn where_libvirt_is_not_as_we_know_it_instant_is_off_and_everything_is_libvirts() {
    let stock = Subject::start(&machine(binary(), 1), &Daemon::session());
    let refused = stock.snapshot("s").unwrap_err();
    assert!(refused.code == INVALID_ARG && refused.message.contains("0x400"), "{refused:?}");
    let lacks = [
        ("INSTANTSNAP_TEST_LACKS", "virObjectUnlock", "this libvirt has no virObjectUnlock()"),
        ("INSTANTSNAP_TEST_LACKS", "virIdentityGetSystem", "this libvirt has no virIdentityGetSystem()"),
        ("INSTANTSNAP_TEST_LACKS", "virGetDomainSnapshot", "this libvirt has no virGetDomainSnapshot()"),
        ("INSTANTSNAP_TEST_VERSION", "13000000", "libvirt 13.0 is not one that this version of instantsnap knows"),
        ("INSTANTSNAP_TEST_VERSION", "8010000", "libvirt 8.10 is not one that this version of instantsnap knows"),
    ];
    let few = [0, 3];
    let chosen = lacks.into_iter().enumerate().filter(|(n, _)| thorough() || few.contains(n));
    for (_, (variable, value, reason)) in chosen {
        let daemon = Daemon::preloaded(Mode::Session, &[&library(), &lacking()], &[(variable, value)]).unwrap();
        let subject = Subject::start(&machine(binary(), 1), &daemon);
        for _ in 0..2 {
            assert_eq!(subject.snapshot("s").as_ref(), Err(&refused));
        }
        let log = daemon.log();
        assert_eq!(log.matches("instant snapshots are off: ").count(), 1, "{log}");
        assert!(log.contains(reason), "{log}");
        assert_eq!(answer(subject.create("live", LIVE).output().unwrap()), Ok("live".into()));
        assert_eq!(subject.on_snapshot("live", "delete(2)"), Ok("0".into()));
        assert!(!subject.was_instant());
        subject.guest.wait_ticks(3);
    }
    let any = [("INSTANTSNAP_TEST_VERSION", "13000000"), ("INSTANTSNAP_ANY_LIBVIRT", "1")];
    let daemon = Daemon::preloaded(Mode::Session, &[&library(), &lacking()], &any).unwrap();
    let subject = Subject::start(&machine(binary(), 1), &daemon);
    assert_eq!(subject.snapshot("s"), Ok("s".into()));
}

#[test]
fn a_client_sees_code_domain_and_message_of_what_is_refused_and_so_does_the_log() {
    let daemon = session(&[]);
    let subject = Subject::start(&machine(binary(), 1), &daemon);
    let before = trace(&subject);
    let refusals = [
        ("a", 0x400, INVALID_ARG, "VIR_DOMAIN_SNAPSHOT_CREATE_LIVE"),
        ("b", 0x510, INVALID_ARG, "mutually exclusive"),
        ("c/d", INSTANT, 35, "name can't contain '/'"),
    ];
    for (name, flags, code, part) in refusals {
        let refused = answer(subject.create(name, flags).output().unwrap()).unwrap_err();
        assert!(refused.message.contains(part), "{refused:?}");
        assert_eq!((refused.code, refused.domain), (code, FROM_QEMU), "{refused:?}");
        assert!(daemon.log().contains(&format!("instantsnap:0 : {}", refused.message)), "{}", daemon.log());
    }
    assert_untouched(&subject, &before);
    subject.guest.virsh("destroy", &[]);
    let refused = subject.snapshot("off").unwrap_err();
    assert_eq!(refused.code, OPERATION_INVALID, "{refused:?}");
    assert!(refused.message.contains("is not running"), "{refused:?}");
}

#[test]
fn eight_domains_at_once_leave_workers_for_everybody_else() {
    const DOMAINS: usize = 8;
    let daemon = session(&[]);
    let clones = Daemon::session();
    let subjects: Vec<_> = (0..DOMAINS).map(|_| Subject::start(&busy_machine(), &daemon)).collect();
    let (children, slowed): (Vec<_>, Vec<_>) = std::thread::scope(|scope| {
        let begin = |subject: &'_ Subject| (subject.spawn("side"), subject.slow_down("side"));
        let threads: Vec<_> = subjects.iter().map(|subject| scope.spawn(move || begin(subject))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).unzip()
    });
    // All are in the drain, and whoever asks is answered, what needs a domain's job included.
    for subject in &subjects {
        subject.guest.virsh("dommemstat", &[]);
        assert_eq!(subject.guest.virsh("domstate", &[]).trim(), "running");
    }
    drop(slowed);
    for (n, (subject, child)) in subjects.iter().zip(children).enumerate() {
        assert_eq!(client_of(child), Ok("side".into()));
        subject.guest.wait_ticks(3);
        if thorough() || n < 2 {
            subject.bring_back("side", &clones);
        }
    }
}

#[test]
fn no_more_than_the_bound_are_taken_at_once() {
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
fn a_client_that_is_killed_or_wants_the_job_aborted_does_not_end_the_snapshot() {
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
    subject.bring_back("s", &Daemon::session());
    // Its place is free again as soon as the call is over.
    wait_for(Duration::from_secs(60), || subject.snapshot("next").ok()).expect("no snapshot any more");
}

#[test]
fn a_domain_that_ends_is_redefined_or_undefined_meanwhile_is_no_harm() {
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

    let child = subject.spawn("ended");
    let slowed = subject.slow_down("ended");
    subject.guest.virsh("destroy", &[]);
    std::mem::forget(slowed);
    let refused = client_of(child).unwrap_err();
    assert_eq!(refused.code, OPERATION_FAILED, "{refused:?}");
    assert_eq!(subject.snapshots(), ["defined"]);
    assert!(!subject.memory("ended").exists());
    subject.guest.start_domain();
    subject.guest.wait_ticks(3);

    // A transient one is gone altogether when it ends.
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

#[test]
fn a_daemon_that_is_killed_leaves_a_guest_that_runs_and_nothing_else() {
    let daemon = session(&[]);
    let release = daemon.directory().join("guests/release");
    // In the pause: the guest waits for QEMU's write tracking.
    let subject = Subject::start(&machine(binary(), 2).late_arm(&release), &daemon);
    let before = trace(&subject);
    let child = subject.spawn("pause");
    // And libvirt has recorded the switch of the disks: killed before that, it would forget one of its own too.
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
    wait_for(Duration::from_secs(60), || (subject.snapshots() == ["drain"]).then_some(())).expect("it is not recorded");
    wait_for_no_job(&subject);
    daemon.kill();
    assert!(!child.wait_with_output().unwrap().status.success());
    drop(slowed);
    daemon.start_again();
    assert_untouched(&subject, &before);
    subject.guest.wait_ticks(3);
    assert_eq!(subject.snapshot("next"), Ok("next".into()));
    subject.bring_back("next", &Daemon::session());
}

#[test]
fn a_daemon_that_is_stopped_completes_the_snapshot_first() {
    let daemon = session(&[]);
    let subject = Subject::start(&busy_machine(), &daemon);
    let child = subject.spawn("s");
    let slowed = subject.slow_down("s");
    let pid = daemon.pid();
    kill_process(Pid::from_raw(pid as i32).unwrap(), Signal::TERM).unwrap();
    wait_for(Duration::from_secs(30), || UnixStream::connect(daemon.socket()).is_err().then_some(()))
        .expect("it still takes connections");
    drop(slowed);
    // As from any daemon that is stopped, its client gets no answer.
    child.wait_with_output().unwrap();
    wait_for(Duration::from_secs(60), || (!std::path::Path::new(&format!("/proc/{pid}")).exists()).then_some(()))
        .expect("it does not end");
    daemon.start_again();
    subject.wait_complete("s");
    assert_eq!(subject.snapshots(), ["s"]);
    subject.guest.wait_ticks(3);
    subject.bring_back("s", &Daemon::session());
}
