// SPDX-License-Identifier: LGPL-2.1-or-later

//! Through a stock libvirt: both the caller and its watchdog are killed, and sometimes the domain
//! ends too. A recovery leaves a domain that is as before, or says what it cannot prove.

use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;

use common::random_clients::{Random, seed};
use common::virt::{OpenedDomain, domain};
use common::watchdog::watchdog_of;
use common::{At, Handle, INSTANTLY, assert_says, files_below, machine};
use instantsnap::backend::LibvirtConnector;
use instantsnap::engine::{Action, Phase, Recovered, What, recover_offline};
use instantsnap::error::Code;
use instantsnap::libvirt::Connect;
use instantsnap_testkit::program::process;
use instantsnap_testkit::{
    Binary, DEADLINE, Daemon, Fingerprint, domain_fingerprint, only_when_thorough, process, skip,
    test, thorough, wait_for,
};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};
use serde_json::json;

const PHASES: [Phase; 5] = [Phase::Pause, Phase::Switch, Phase::Arm, Phase::Drain, Phase::Finish];

fn own_pid(pid: u32) -> Pid {
    Pid::from_raw(pid as i32).unwrap()
}

fn signal(pid: u32, signal: Signal) {
    kill_process(own_pid(pid), signal).unwrap();
}

/// Not a test of its own: a caller that kills its watchdog and itself in a phase.
#[process]
fn caller() {
    let variable = |name: &str| std::env::var(format!("INSTANTSNAP_TEST_{name}")).unwrap();
    let phase = variable("PHASE");
    let connect = Connect::open(&variable("URI")).unwrap().unwrap();
    let domain = connect.domain(&variable("UUID")).unwrap();
    let handle = Handle::open_libvirt(Arc::new(LibvirtConnector::open(domain).unwrap()));
    let mut observer = At(|now| {
        if format!("{now:?}") == phase {
            let watchdog = watchdog_of(std::process::id()).expect("there is a watchdog");
            signal(watchdog, Signal::KILL);
            signal(std::process::id(), Signal::KILL);
        }
    });
    handle.create(&variable("XML"), INSTANTLY, &mut observer).unwrap();
}

/// The command of that process.
fn caller_in(opened: &OpenedDomain, phase: &str) -> Command {
    let mut command = process(module_path!(), "caller");
    command
        .env("INSTANTSNAP_TEST_URI", opened.guest.daemon().uri())
        .env("INSTANTSNAP_TEST_UUID", uuid(opened))
        .env("INSTANTSNAP_TEST_XML", opened.xml("killed", ""))
        .env("INSTANTSNAP_TEST_PHASE", phase)
        .stdout(Stdio::null());
    command
}

fn uuid(opened: &OpenedDomain) -> String {
    opened.guest.virsh("domuuid", &[]).trim().to_owned()
}

/// Takes a snapshot whose caller and watchdog are killed in the phase.
fn interrupt(opened: &OpenedDomain, phase: Phase) {
    let status = caller_in(opened, &format!("{phase:?}")).status().unwrap();
    assert_eq!(status.signal(), Some(9), "{status}");
    assert!(journal(opened).exists());
}

/// The journal of the domain's snapshot.
fn journal(opened: &OpenedDomain) -> PathBuf {
    let state = PathBuf::from(std::env::var_os("INSTANTSNAP_STATE_DIRECTORY").unwrap());
    state.join("libvirt").join(format!(".{}.journal", uuid(opened)))
}

/// A QEMU that does not freeze its guest, where there is one.
fn binary() -> &'static Binary {
    let all = Binary::all();
    all.iter().find(|binary| !is_frozen(binary, Phase::Drain)).unwrap_or(&all[0])
}

/// A QEMU that does not freeze its guest.
fn unfrozen() -> &'static Binary {
    let binary = binary();
    if is_frozen(binary, Phase::Drain) {
        skip("QEMU before 9 freezes its guest if the reader of its stream is killed");
    }
    binary
}

fn start(binary: &'static Binary, daemon: &Daemon) -> OpenedDomain {
    // With this much memory the drain is long, and the guest writes into all of it.
    let machine = machine(binary, 2).memory(64).prealloc().append("dense=32");
    OpenedDomain::start(&machine, daemon)
}

fn recovered(opened: &OpenedDomain) -> Vec<Recovered> {
    let found = opened.handle.recover().unwrap_or_else(|error| opened.guest.fail(&error.message));
    found.iter().for_each(|found| eprintln!("  {:?} {:?} {found}", found.what, found.action));
    found
}

/// The domain and the files, which a recovery must put back. QEMU's descriptors are not compared: a
/// QEMU that has frozen its guest keeps one, and QEMU 10.0 closes its descriptor 0 if the reader of
/// its stream is killed before it has armed.
fn state(opened: &OpenedDomain) -> (Fingerprint, Vec<PathBuf>) {
    (domain_fingerprint(&opened.guest), files_below(opened.guest.directory()))
}

#[track_caller]
fn assert_as_before(opened: &OpenedDomain, before: &(Fingerprint, Vec<PathBuf>)) {
    let same = wait_for(DEADLINE, || (state(opened) == *before).then_some(()));
    if same.is_none() {
        let after = state(opened);
        panic!("{}\n{:?}\n{:?}", before.0.differences(&after.0), before.1, after.1);
    }
}

/// Recovers the domain, and asserts that it is as before.
#[track_caller]
fn assert_recovered(opened: &OpenedDomain, before: &(Fingerprint, Vec<PathBuf>)) {
    let found = recovered(opened);
    assert!(found.iter().all(|found| !found.blocks), "{found:?}");
    assert!(found.iter().any(|found| found.what == What::Overlay), "{found:?}");
    assert_as_before(opened, before);
    assert!(!journal(opened).exists());
    assert_eq!(opened.handle.recover().unwrap(), []);
}

/// The phases in which QEMU 7.2 freezes its guest if the reader of its stream ends.
fn is_frozen(binary: &Binary, phase: Phase) -> bool {
    binary.version < (9, 0, 0) && [Phase::Arm, Phase::Drain, Phase::Finish].contains(&phase)
}

/// Kills the domain's QEMU, and waits until libvirt knows that.
fn end(opened: &OpenedDomain) {
    opened.guest.kill();
    let is_off = || (opened.guest.virsh("domstate", &[]).trim() == "shut off").then_some(());
    wait_for(DEADLINE, is_off).expect("libvirt notices it");
}

fn images(opened: &OpenedDomain, more: &[&str]) -> String {
    opened.guest.virsh("domblklist", more)
}

#[test]
fn domain_whose_caller_and_watchdog_were_killed_is_as_before_after_a_recovery() {
    let daemon = Daemon::session();
    let binary = binary();
    let opened = start(binary, &daemon);
    let few = [Phase::Switch, Phase::Drain];
    let chosen = |phase: &Phase| thorough() || few.contains(phase);
    let phases = PHASES.into_iter().filter(|phase| !is_frozen(binary, *phase));
    for phase in phases.filter(chosen) {
        eprintln!("{}: killed in {phase:?}", binary.name);
        let before = state(&opened);
        interrupt(&opened, phase);
        assert_recovered(&opened, &before);
        opened.guest.wait_ticks(5);
    }
    opened.snapshot("next").unwrap_or_else(|error| opened.guest.fail(&error.message));
    opened.restore_clone("next");
    opened.guest.wait_ticks(3);
}

#[test]
fn next_operation_recovers_the_domain_first() {
    let daemon = Daemon::session();
    let binary = binary();
    let phase = if is_frozen(binary, Phase::Drain) { Phase::Switch } else { Phase::Drain };
    let opened = start(binary, &daemon);
    interrupt(&opened, phase);
    let next = opened.snapshot("killed").unwrap_or_else(|error| opened.guest.fail(&error.message));
    assert_eq!(next, "killed");
    opened.guest.wait_ticks(3);
    // A delete, too.
    let mut caller = caller_in(&opened, &format!("{phase:?}"));
    caller.env("INSTANTSNAP_TEST_XML", opened.xml("again", ""));
    assert_eq!(caller.status().unwrap().signal(), Some(9));
    opened.delete("killed", 0).unwrap_or_else(|error| opened.guest.fail(&error.message));
    assert!(!images(&opened, &[]).contains(".killed"), "{}", images(&opened, &[]));
    assert!(!images(&opened, &[]).contains(".again"), "{}", images(&opened, &[]));
    assert!(!journal(&opened).exists() && opened.find("again").is_none());
    assert!(!opened.memory_file("again").exists());
    opened.guest.wait_ticks(3);
}

/// The guest ran again when the caller was killed.
#[test]
fn guest_that_another_client_has_paused_since_stays_paused() {
    only_when_thorough();
    let daemon = Daemon::session();
    let opened = start(unfrozen(), &daemon);
    interrupt(&opened, Phase::Drain);
    opened.guest.virsh("suspend", &[]);
    let found = recovered(&opened);
    let guest = found.iter().rfind(|found| found.what == What::Guest).unwrap();
    assert!(guest.action == Action::Left && guest.why.contains("another client"), "{found:?}");
    assert!(!journal(&opened).exists() && !images(&opened, &[]).contains(".killed"));
    assert_eq!(opened.guest.virsh("domstate", &[]).trim(), "paused");
    opened.guest.virsh("resume", &[]);
    opened.guest.wait_ticks(3);
}

/// The caller and the watchdog are killed when all is done, just before the journal is removed.
#[test]
fn snapshot_that_was_complete_stays() {
    let daemon = Daemon::session();
    let opened = OpenedDomain::start(&machine(binary(), 2), &daemon);
    let mut kept = None;
    let mut observer = At(|phase| {
        if phase == Phase::Finish {
            kept = Some(std::fs::read(journal(&opened)).unwrap());
            let connector = LibvirtConnector::open(domain(&opened.guest)).unwrap();
            let error =
                Handle::open_libvirt(Arc::new(connector)).recover().expect_err("it is under way");
            assert_says(&error, Code::OperationInvalid, &["under way"]);
        }
    });
    opened.handle.create(&opened.xml("s", ""), INSTANTLY, &mut observer).unwrap();
    assert!(!journal(&opened).exists());
    std::fs::write(journal(&opened), kept.unwrap()).unwrap();
    let before = state(&opened);
    let found = recovered(&opened);
    let actions: Vec<_> = found.iter().map(|found| (found.what, found.action)).collect();
    assert_eq!(actions, [(What::Snapshot, Action::Finished)], "{found:?}");
    assert!(!journal(&opened).exists());
    assert_as_before(&opened, &before);
    opened.restore_clone("s");
    opened.guest.wait_ticks(3);
    opened.delete("s", 0).unwrap();
}

/// The undo was killed too, while libvirt merged the overlays: nobody completes the merges.
#[test]
fn merges_that_were_left_are_begun_anew() {
    only_when_thorough();
    let Some(daemon) = Daemon::system().or_else(|| Some(Daemon::session())) else { return };
    let binary = binary();
    let opened = start(binary, &daemon);
    let before = state(&opened);
    interrupt(&opened, Phase::Drain);
    let begin = ["vda", "--shallow", "--active", "--wait", "--keep-overlay"];
    opened.guest.virsh("blockcommit", &begin);
    let is_frozen = is_frozen(binary, Phase::Drain);
    assert_recovered(&opened, &before);
    if !is_frozen {
        opened.guest.wait_ticks(3);
        opened.snapshot("next").unwrap_or_else(|error| opened.guest.fail(&error.message));
    }
}

#[test]
fn domain_whose_disks_another_client_has_changed_since_is_named_and_left() {
    let daemon = Daemon::session();
    let binary = binary();
    let phase = Phase::Drain;
    let opened = start(binary, &daemon);
    let before = state(&opened);
    interrupt(&opened, phase);
    opened.guest.virsh("snapshot-create-as", &["above", "--disk-only", "--no-metadata"]);
    let (now, files) = (images(&opened, &[]), files_below(opened.guest.directory()));
    for _ in 0..2 {
        let found = recovered(&opened);
        let named: Vec<_> = found.iter().filter(|found| found.blocks).collect();
        assert_eq!(named.len(), 2, "{found:?}");
        assert!(named.iter().all(|found| found.why.contains("on top of it")), "{found:?}");
        assert_eq!(
            (images(&opened, &[]), files_below(opened.guest.directory())),
            (now.clone(), files.clone())
        );
    }
    let error = opened.snapshot("next").unwrap_err();
    let parts = ["'killed'", "on top of it", "instantsnap_recover()", ".journal"];
    assert_says(&error, Code::OperationInvalid, &parts);
    assert_eq!(images(&opened, &[]), now);
    // When that is settled, the recovery goes on.
    for disk in opened.guest.disks() {
        let commit = [&*disk.device, "--shallow", "--active", "--pivot", "--wait"];
        opened.guest.virsh("blockcommit", &commit);
        std::fs::remove_file(disk.file.with_extension("above")).unwrap();
    }
    let is_frozen = is_frozen(binary, phase);
    assert_recovered(&opened, &before);
    if !is_frozen {
        opened.guest.wait_ticks(3);
    }
}

#[test]
fn domain_that_has_ended_is_on_its_images_again_after_a_recovery() {
    let daemon = Daemon::session();
    let binary = binary();
    let opened = start(binary, &daemon);
    let before = (images(&opened, &["--inactive"]), files_below(opened.guest.directory()));
    for starts_again in [true, false] {
        eprintln!("{}: {starts_again}", binary.name);
        interrupt(&opened, Phase::Drain);
        if !is_frozen(binary, Phase::Drain) {
            opened.guest.wait_ticks(3);
        }
        end(&opened);
        assert_ne!(images(&opened, &["--inactive"]), before.0);
        // Only libvirt knows the domain.
        let elsewhere = tempfile::tempdir().unwrap();
        let journal_file = journal(&opened);
        let copy = elsewhere.path().join(journal_file.file_name().unwrap());
        std::fs::copy(&journal_file, &copy).unwrap();
        let found = recover_offline(elsewhere.path()).unwrap();
        assert!(found.len() == 1 && found[0].blocks && copy.exists(), "{found:?}");
        assert!(found[0].why.contains(opened.guest.name()), "{found:?}");
        if starts_again {
            opened.guest.start_domain();
        }
        let found = recovered(&opened);
        assert!(found.iter().all(|found| found.action == Action::Undone), "{found:?}");
        let is = (images(&opened, &["--inactive"]), files_below(opened.guest.directory()));
        assert_eq!(is, before);
        assert!(opened.find("killed").is_none() && !journal(&opened).exists());
        if !starts_again {
            opened.guest.start_domain();
        }
        assert_eq!(images(&opened, &[]), before.0);
        opened.guest.wait_ticks(3);
    }
    opened.snapshot("next").unwrap_or_else(|error| opened.guest.fail(&error.message));
}

/// Its saved memory goes on with the overlays.
#[test]
fn overlays_of_a_domain_that_was_saved_on_them_stay_until_it_runs_again() {
    only_when_thorough();
    let daemon = Daemon::session();
    let binary = unfrozen();
    let opened = start(binary, &daemon);
    let before = (images(&opened, &[]), files_below(opened.guest.directory()));
    interrupt(&opened, Phase::Drain);
    let lock = json!({ "tls-creds": "", "tls-hostname": "" });
    let off = json!({ "capabilities": [{ "capability": "background-snapshot", "state": false }] });
    for (command, arguments) in
        [("migrate-set-capabilities", off), ("migrate-set-parameters", lock)]
    {
        let command = json!({ "execute": command, "arguments": arguments }).to_string();
        opened.guest.virsh("qemu-monitor-command", &[&command]);
    }
    opened.guest.virsh("managedsave", &[]);
    // From now on libvirt does not know why the domain is off.
    daemon.kill();
    daemon.start_again();
    let files = files_below(opened.guest.directory());
    let found = recovered(&opened);
    assert!(found.iter().any(|found| found.blocks && found.why.contains("has saved")), "{found:?}");
    assert_eq!(files_below(opened.guest.directory()), files);
    opened.guest.start_domain();
    let found = recovered(&opened);
    assert!(found.iter().all(|found| found.action == Action::Undone), "{found:?}");
    assert_eq!((images(&opened, &[]), files_below(opened.guest.directory())), before);
    opened.guest.wait_ticks(3);
}

/// The domain was started on its images after it had ended: what is in the overlays must not be
/// merged into what it has written since.
#[test]
fn overlays_are_kept_if_the_domain_was_started_without_them() {
    let daemon = Daemon::session();
    let binary = unfrozen();
    let opened = start(binary, &daemon);
    let definition = opened.guest.directory().join("before.xml");
    std::fs::write(&definition, opened.guest.virsh("dumpxml", &["--inactive"])).unwrap();
    interrupt(&opened, Phase::Drain);
    opened.guest.wait_ticks(3);
    end(&opened);
    daemon.virsh(&["define", definition.to_str().unwrap()]);
    opened.guest.start_domain();
    opened.guest.wait_ticks(3);
    for runs in [true, false] {
        if !runs {
            end(&opened);
        }
        let before = files_below(opened.guest.directory());
        let found = recovered(&opened);
        let overlays: Vec<_> = found.iter().filter(|found| found.what == What::Overlay).collect();
        assert_eq!(overlays.len(), 2, "{found:?}");
        assert!(overlays.iter().all(|found| found.blocks), "{found:?}");
        assert!(overlays.iter().all(|found| found.why.contains("wrote last")), "{found:?}");
        assert_eq!(files_below(opened.guest.directory()), before);
    }
    opened.guest.start_domain();
    opened.guest.wait_ticks(3);
}

/// The caller and its watchdog are killed at any moment, and the watchdog in its undo too.
#[test(long)]
fn domain_is_recovered_whenever_caller_and_watchdog_were_killed() {
    const ROUNDS: usize = 40;
    only_when_thorough();
    let seed = seed();
    eprintln!("seed {seed}");
    let daemon = Daemon::session();
    let binary = unfrozen();
    let opened = start(binary, &daemon);
    let before = state(&opened);
    for round in 0..ROUNDS {
        let mut caller = caller_in(&opened, "").spawn().unwrap();
        let begun = || journal(&opened).exists().then_some(());
        wait_for(DEADLINE, begun).expect("it begins");
        let mut random = Random::of_round(seed, round);
        let mut pause = |most| {
            let wait = random.below(most) as u64;
            std::thread::sleep(std::time::Duration::from_millis(wait));
        };
        pause(600);
        if caller.try_wait().unwrap().is_none() {
            signal(caller.id(), Signal::STOP);
            let open = |pid| pidfd_open(own_pid(pid), PidfdFlags::empty()).ok();
            let watchdog = watchdog_of(caller.id()).and_then(open);
            let kill = || watchdog.as_ref().map(|fd| pidfd_send_signal(fd, Signal::KILL));
            if round % 3 > 0 {
                kill();
                caller.kill().unwrap();
            } else {
                caller.kill().unwrap();
                pause(400);
                // It may have ended.
                kill();
            }
        }
        caller.wait().unwrap();
        // A watchdog that was being started lives, and undoes the snapshot itself.
        let found = wait_for(DEADLINE, || opened.handle.recover().ok()).expect("it recovers");
        eprintln!("{round}: {found:?}");
        assert!(found.iter().all(|found| found.action != Action::Left));
        if opened.find("killed").is_some() {
            opened.delete("killed", 0).unwrap();
        }
        assert_as_before(&opened, &before);
        opened.guest.wait_ticks(2);
    }
}
