// SPDX-License-Identifier: LGPL-2.1-or-later

//! Both the caller and its watchdog are killed, and sometimes QEMU too. A recovery leaves a guest
//! that runs, disks that are whole, and nothing of the snapshot.

use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use common::backend::{by_socket_only, open};
use common::random_clients::{Random, seed};
use common::watchdog::watchdog_of;
use common::{INSTANTLY, Opened, assert_says, files_below, named, through_proxy};
use instantsnap::engine::{
    Action, Answer, Event, Observer, Phase, Recovered, StorageCall, StorageHook, What,
    recover_offline,
};
use instantsnap::error::Code;
use instantsnap_testkit::program::process;
use instantsnap_testkit::{
    Binary, DEADLINE, Fingerprint, Format, Machine, fingerprint, process, test, wait_for,
};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::killed::{Content, start_cold, stop};

const PHASES: [Phase; 5] = [Phase::Pause, Phase::Switch, Phase::Arm, Phase::Drain, Phase::Finish];

pub fn signal(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(pid as i32).unwrap(), signal).unwrap();
}

pub fn kill(pid: u32) {
    signal(pid, Signal::KILL);
}

/// Not a test of its own: a caller that kills its watchdog and itself in a phase.
#[process]
fn caller() {
    let variable = |name: &str| std::env::var(name).unwrap();
    let directory = variable("INSTANTSNAP_TEST_DIRECTORY");
    let (phase, socket) = (variable("INSTANTSNAP_TEST_PHASE"), variable("INSTANTSNAP_TEST_SOCKET"));
    let directory = Path::new(&directory);
    let handle = open(directory, &directory.join(socket), None, &directory.join("state")).unwrap();
    if std::env::var_os("INSTANTSNAP_TEST_HOOK").is_some() {
        handle.set_storage_hook(Some(Arc::new(Storage)));
    }
    let xml = std::env::var("INSTANTSNAP_TEST_XML").unwrap_or_else(|_| named("s"));
    handle.create(&xml, INSTANTLY, &mut KillsAt(phase)).unwrap();
}

/// Kills the process, and its watchdog unless that is to be stopped or left, in a phase or at an
/// event.
struct KillsAt(String);

impl Observer for KillsAt {
    fn phase(&mut self, phase: Phase) {
        if format!("{phase:?}") == self.0 {
            end();
        }
    }

    fn event(&mut self, event: &Event) {
        if format!("{:?}", event.kind) == self.0 {
            end();
        }
    }
}

fn end() {
    if let Some(go) = std::env::var_os("INSTANTSNAP_TEST_WAITS_FOR") {
        // The test kills QEMU, and the caller undoes the snapshot.
        wait_for(DEADLINE, || Path::new(&go).exists().then_some(())).expect("the test goes on");
        return;
    }
    let watchdog = watchdog_of(std::process::id()).expect("there is a watchdog");
    match std::env::var_os("INSTANTSNAP_TEST_STOPPED") {
        Some(file) if file.is_empty() => {}
        Some(file) => {
            signal(watchdog, Signal::STOP);
            std::fs::write(file, watchdog.to_string()).unwrap();
        }
        None => kill(watchdog),
    }
    kill(std::process::id());
}

/// A storage whose snapshots nobody sees.
struct Storage;

impl StorageHook for Storage {
    fn snapshot(&self, _: &StorageCall) -> Answer<()> {
        Ok(())
    }

    fn revert(&self, _: &StorageCall) -> Answer<Vec<PathBuf>> {
        Err("it has none".into())
    }
}

/// The command of that process.
pub fn caller_in(opened: &Opened, phase: &str, socket: &str) -> Command {
    let mut command = process(module_path!(), "caller");
    command
        .env("INSTANTSNAP_TEST_DIRECTORY", opened.guest.directory())
        .env("INSTANTSNAP_TEST_PHASE", phase)
        .env("INSTANTSNAP_TEST_SOCKET", socket)
        .stdout(Stdio::null());
    command
}

/// Takes a snapshot whose caller and watchdog are killed in the phase.
pub fn interrupt(opened: &Opened, phase: Phase) {
    let status = caller_in(opened, &format!("{phase:?}"), "qmp.sock").status().unwrap();
    assert_eq!(status.signal(), Some(9), "{status}");
}

fn machine(binary: &'static Binary) -> Machine {
    common::machine(binary, 2).memory(128).prealloc().append("dense=64")
}

/// QEMU's state and the files, which a recovery must put back.
pub fn before(opened: &Opened) -> (Fingerprint, Vec<PathBuf>) {
    // The first snapshot that is recorded creates this file, which stays.
    let mut files = files_below(opened.guest.directory());
    files.retain(|file| !file.ends_with(".current"));
    (fingerprint(&mut opened.guest.control()), files)
}

pub fn is_frozen(binary: &Binary, phase: Phase) -> bool {
    // QEMU 7.2 freezes its guest if the reader of an armed background snapshot ends.
    binary.version < (9, 0, 0) && [Phase::Arm, Phase::Drain, Phase::Finish].contains(&phase)
}

pub fn recovered(opened: &Opened) -> Vec<Recovered> {
    let found = opened.handle.recover().unwrap_or_else(|error| opened.guest.fail(&error.message));
    found.iter().for_each(|found| eprintln!("  {:?} {:?} {found}", found.what, found.action));
    found
}

#[track_caller]
pub fn assert_recovered(opened: &Opened, before: &(Fingerprint, Vec<PathBuf>)) {
    let after = wait_for(DEADLINE, || {
        let after = self::before(opened);
        (after == *before).then_some(())
    });
    if after.is_none() {
        let after = self::before(opened);
        panic!("{}\n{:?}\n{:?}", before.0.differences(&after.0), before.1, after.1);
    }
}

#[test]
fn guest_whose_caller_and_watchdog_were_killed_is_as_before_after_a_recovery() {
    for binary in Binary::any() {
        for phase in PHASES {
            eprintln!("{}: killed in {phase:?}", binary.name);
            let opened = Opened::start(&machine(binary));
            let before = before(&opened);
            interrupt(&opened, phase);
            // A process that is killed while it writes a record leaves such a file.
            std::fs::write(opened.state_dir().join(".instantsnap-1.new"), "half").unwrap();
            let found = recovered(&opened);
            assert!(found.iter().all(|found| !found.blocks), "{found:?}");
            assert!(found.iter().any(|found| found.what == What::Overlay), "{found:?}");
            assert_recovered(&opened, &before);
            assert_eq!(opened.handle.recover().unwrap(), []);
            if !is_frozen(binary, phase) {
                opened.guest.wait_ticks(3);
                opened.assert_well();
            }
        }
    }
}

/// The next operation recovers the guest by itself.
#[test]
fn next_snapshot_recovers_the_guest_first() {
    for binary in Binary::any() {
        let phase = if is_frozen(binary, Phase::Arm) { Phase::Switch } else { Phase::Drain };
        let opened = Opened::start(&machine(binary));
        interrupt(&opened, phase);
        let next = opened.snapshot("s").unwrap_or_else(|error| opened.guest.fail(&error.message));
        assert_eq!(next, "s");
        opened.guest.wait_ticks(3);
        opened.restore_clone("s");
        opened.handle.delete("s", 0).unwrap();
        opened.assert_well();
    }
}

/// The host loses its power: QEMU ends too.
#[test]
fn images_of_a_qemu_that_was_killed_with_its_caller_are_whole_after_a_recovery() {
    by_socket_only();
    for binary in Binary::any() {
        for phase in PHASES {
            eprintln!("{}: killed in {phase:?}", binary.name);
            let opened = Opened::start(&machine(binary));
            let files = files_below(opened.guest.directory());
            interrupt(&opened, phase);
            let runs_on = [Phase::Drain, Phase::Finish].contains(&phase);
            let last = (runs_on && !is_frozen(binary, phase)).then(|| {
                opened.guest.wait_ticks(3);
                stop(&opened.guest)
            });
            if let Err(error) = recover_offline(&opened.state_dir()) {
                panic!("{error}");
            }
            let journal = opened.state_dir().join(".s.journal");
            assert!(journal.exists(), "nothing is done while QEMU runs");
            opened.guest.kill();
            let found = recover_offline(&opened.state_dir()).unwrap();
            found
                .iter()
                .for_each(|found| eprintln!("  {:?} {:?} {found}", found.what, found.action));
            assert!(found.iter().all(|found| found.action == Action::Undone), "{found:?}");
            assert_eq!(files_below(opened.guest.directory()), files);
            let content = Content::read(&opened.guest.disks()[0], 0);
            if !runs_on {
                content.assert_at(opened.guest.serial().tick.unwrap());
            }
            let second = Content::read(&opened.guest.disks()[1], 1);
            // QEMU had passed on all that the guest had written.
            if let Some(last) = last {
                content.assert_at(last);
                second.assert_at(last);
            }
            start_cold(binary, &opened.guest);
        }
    }
}

/// The caller is killed while QEMU formats the first overlay: no inode is noted yet.
#[test]
fn half_made_overlays_are_removed() {
    by_socket_only();
    for binary in Binary::any() {
        for command in ["blockdev-create", "blockdev-add"] {
            let (opened, proxy) = through_proxy(&machine(binary));
            let before = before(&opened);
            let gate = proxy.hold_reply(command, 1);
            let mut caller = caller_in(&opened, "", "proxy.sock").spawn().unwrap();
            assert!(gate.wait_arrived(DEADLINE));
            caller.kill().unwrap();
            caller.wait().unwrap();
            gate.release();
            let found = recovered(&opened);
            assert!(found.iter().all(|found| found.action == Action::Undone), "{found:?}");
            assert_recovered(&opened, &before);
            opened.guest.wait_ticks(3);
        }
    }
}

/// The caller and the watchdog are killed just before the snapshot is recorded.
#[test]
fn snapshot_that_was_complete_is_recorded() {
    for binary in Binary::any() {
        for with_qemu in [false, true] {
            let opened = Opened::start(&machine(binary));
            // No record can be written while this is locked.
            let mut caller = caller_in(&opened, "", "qmp.sock").spawn().unwrap();
            let state = opened.state_dir();
            let journal = || std::fs::read_to_string(state.join(".s.journal")).unwrap_or_default();
            wait_for(DEADLINE, || journal().contains("Switching").then_some(())).expect("begun");
            let lock = File::options().write(true).open(state.join(".lock")).unwrap();
            flock(&lock, FlockOperation::LockExclusive).unwrap();
            wait_for(DEADLINE, || journal().contains("Complete").then_some(())).expect("complete");
            // A caller that runs would replace its watchdog.
            signal(caller.id(), Signal::STOP);
            if let Some(watchdog) = watchdog_of(caller.id()) {
                kill(watchdog);
            }
            caller.kill().unwrap();
            caller.wait().unwrap();
            drop(lock);
            let found = match with_qemu {
                true => {
                    opened.guest.kill();
                    recover_offline(&state).unwrap()
                }
                false => recovered(&opened),
            };
            let actions: Vec<_> = found.iter().map(|found| (found.what, found.action)).collect();
            assert_eq!(actions, [(What::Snapshot, Action::Finished)], "{found:?}");
            assert!(!state.join(".s.journal").exists());
            assert_eq!(opened.handle.store().unwrap().current().unwrap().as_deref(), Some("s"));
            opened.restore_clone("s");
            if !with_qemu {
                opened.guest.wait_ticks(3);
                opened.handle.delete("s", 0).unwrap();
                opened.assert_well();
            }
        }
    }
}

#[test]
fn live_snapshot_is_not_recovered() {
    by_socket_only();
    let (opened, proxy) = through_proxy(&machine(&Binary::any()[0]));
    let gate = proxy.hold_reply("getfd", 1);
    let mut caller = caller_in(&opened, "", "proxy.sock").spawn().unwrap();
    assert!(gate.wait_arrived(DEADLINE));
    let error = opened.handle.recover().unwrap_err();
    assert_says(&error, Code::OperationInvalid, &["under way"]);
    let error = recover_offline(&opened.state_dir()).unwrap_err();
    assert_says(&error, Code::OperationInvalid, &["'s'", "is alive"]);
    gate.release();
    assert!(caller.wait().unwrap().success());
    assert_eq!(opened.handle.recover().unwrap(), []);
    opened.restore_clone("s");
}

#[test]
fn journal_that_makes_no_sense_is_named_and_nothing_is_changed() {
    by_socket_only();
    let opened = Opened::start(&machine(&Binary::any()[0]));
    let path = opened.state_dir().join(".s.journal");
    interrupt(&opened, Phase::Switch);
    let whole = std::fs::read_to_string(&path).unwrap();
    let newer = whole.replacen("\"instantsnap_journal\":1", "\"instantsnap_journal\":2", 1);
    let other = whole.replacen("\"snapshot\":\"s\"", "\"snapshot\":\"t\"", 1);
    assert!(newer != whole && other != whole);
    let garbage = format!("{whole}{{\"Made\":7}}\n");
    let broken = whole.replacen("\"Switching\"", "\"Swit", 1);
    assert_ne!(broken, whole);
    let files = || {
        let mut files = files_below(opened.guest.directory());
        files.retain(|file| !file.ends_with(".s.reserved"));
        files
    };
    let before = files();
    let cases = [
        (&newer, "later version"),
        (&other, "'t'"),
        (&garbage, "damaged"),
        (&broken, "damaged"),
        (&String::new(), "damaged"),
        (&whole[..whole.len() / 4].to_owned(), "damaged"),
        (&"\0\n".repeat(1000), "damaged"),
    ];
    for (content, why) in cases {
        std::fs::write(&path, content).unwrap();
        let found = opened.handle.recover().unwrap();
        let named = found.iter().filter(|found| found.blocks).collect::<Vec<_>>();
        assert!(named.len() == 1 && named[0].why.contains(why), "{found:?}");
        assert!(named[0].why.contains(".s.journal"), "{found:?}");
        let error = opened.snapshot("next").unwrap_err();
        assert_says(&error, Code::OperationInvalid, &[why, "instantsnap_recover()"]);
        assert_eq!(files(), before);
    }
    // Half a line at the end was never written.
    std::fs::write(&path, format!("{whole}{{\"Pass")).unwrap();
    recovered(&opened);
    opened.guest.wait_ticks(3);
    opened.assert_well();
}

/// Another file has taken the place of the memory image: it stays.
#[test]
fn file_that_has_taken_the_place_of_the_snapshots_stays() {
    by_socket_only();
    let opened = Opened::start(&machine(&Binary::any()[0]));
    interrupt(&opened, Phase::Switch);
    let memory = opened.state_dir().join("s.mem");
    std::fs::remove_file(&memory).unwrap();
    std::fs::write(&memory, "another").unwrap();
    let found = recovered(&opened);
    let left: Vec<_> = found.iter().filter(|found| found.action == Action::Left).collect();
    assert!(left.len() == 1 && left[0].what == What::Memory, "{found:?}");
    assert_eq!(std::fs::read_to_string(&memory).unwrap(), "another");
    assert!(!opened.state_dir().join(".s.journal").exists());
    opened.guest.wait_ticks(3);
}

/// The guest was started again on its image after its QEMU was killed: what is in the overlay must
/// not be merged into what it has written since.
#[test]
fn overlay_is_kept_if_its_image_was_used_since() {
    by_socket_only();
    let binary = Binary::any().iter().find(|binary| !is_frozen(binary, Phase::Drain));
    let Some(binary) = binary else { return };
    let opened =
        Opened::start(&common::machine(binary, 1).memory(128).prealloc().append("dense=64"));
    interrupt(&opened, Phase::Drain);
    opened.guest.wait_ticks(3);
    opened.guest.kill();
    start_cold(binary, &opened.guest);
    let found = recover_offline(&opened.state_dir()).unwrap();
    let overlay = found.iter().find(|found| found.what == What::Overlay).unwrap();
    assert_eq!((overlay.action, overlay.blocks), (Action::Left, true), "{found:?}");
    assert!(overlay.why.contains("later than the overlay"), "{found:?}");
    assert!(Path::new(&overlay.object).exists());
    assert_eq!(opened.guest.disks()[0].format, Format::Raw);
}

/// A user has paused the guest before the snapshot was about to: it stays paused.
#[test]
fn guest_that_another_client_has_paused_stays_paused() {
    by_socket_only();
    for binary in Binary::any() {
        let (opened, proxy) = through_proxy(&machine(binary));
        let gate = proxy.hold_reply("getfd", 1);
        let mut caller = caller_in(&opened, "", "proxy.sock").spawn().unwrap();
        assert!(gate.wait_arrived(DEADLINE));
        signal(caller.id(), Signal::STOP);
        kill(watchdog_of(caller.id()).unwrap());
        caller.kill().unwrap();
        caller.wait().unwrap();
        gate.release();
        opened.guest.control().execute("stop", json!({})).unwrap();
        let found = recovered(&opened);
        assert!(
            found.iter().any(|found| (found.what, found.action) == (What::Guest, Action::Left))
        );
        let status = opened.guest.control().execute("query-status", json!({})).unwrap();
        assert_eq!(status["status"], "paused");
        opened.guest.control().execute("cont", json!({})).unwrap();
        opened.guest.wait_ticks(3);
        opened.assert_well();
    }
}

/// The watchdog lives, and finds that QEMU has been killed too: it cannot merge the overlays.
#[test]
fn overlays_that_the_watchdog_could_not_merge_are_merged_by_a_recovery() {
    by_socket_only();
    for binary in Binary::any() {
        let opened = Opened::start(&machine(binary));
        let files = files_below(opened.guest.directory());
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("watchdog");
        let status = caller_in(&opened, "Drain", "qmp.sock")
            .env("INSTANTSNAP_TEST_STOPPED", &file)
            .status()
            .unwrap();
        assert_eq!(status.signal(), Some(9), "{status}");
        opened.guest.kill();
        let watchdog = std::fs::read_to_string(&file).unwrap().parse().unwrap();
        let error = recover_offline(&opened.state_dir()).unwrap_err();
        assert_says(&error, Code::OperationInvalid, &["is alive"]);
        signal(watchdog, Signal::CONT);
        let found = wait_for(DEADLINE, || recover_offline(&opened.state_dir()).ok());
        let found = found.expect("the watchdog ends");
        assert!(found.iter().any(|found| found.what == What::Overlay), "{found:?}");
        assert!(found.iter().all(|found| found.action == Action::Undone), "{found:?}");
        assert_eq!(files_below(opened.guest.directory()), files);
        start_cold(binary, &opened.guest);
    }
}

/// The storage of an overlay that the guest has written to can come later than the host.
#[test]
fn missing_overlay_is_waited_for_and_nothing_is_changed() {
    by_socket_only();
    for binary in Binary::any().iter().filter(|binary| !is_frozen(binary, Phase::Drain)) {
        let opened = Opened::start(&machine(binary));
        let files = files_below(opened.guest.directory());
        interrupt(&opened, Phase::Drain);
        opened.guest.wait_ticks(3);
        opened.guest.kill();
        let overlay = files_below(opened.guest.directory())
            .into_iter()
            .find(|file| !files.contains(file) && file.extension().is_some_and(|end| end == "s"))
            .expect("there is an overlay");
        let elsewhere = opened.guest.directory().join("elsewhere");
        std::fs::rename(&overlay, &elsewhere).unwrap();
        let kept = || {
            // The recovery releases the snapshot's name.
            let mut files = files_below(opened.guest.directory());
            files.retain(|file| !file.ends_with(".s.reserved"));
            files
        };
        let before = kept();
        let found = recover_offline(&opened.state_dir()).unwrap();
        assert!(found.iter().any(|found| found.blocks), "{found:?}");
        assert!(found.iter().all(|found| found.action == Action::Left), "{found:?}");
        assert_eq!(kept(), before);
        std::fs::rename(&elsewhere, &overlay).unwrap();
        let found = recover_offline(&opened.state_dir()).unwrap();
        assert!(found.iter().all(|found| found.action == Action::Undone), "{found:?}");
        assert!(!overlay.exists() && !opened.state_dir().join(".s.journal").exists());
    }
}

/// The caller and its watchdog, the program or a fork, are killed at any moment.
#[test]
fn guest_is_recovered_whenever_caller_and_watchdog_were_killed() {
    const ROUNDS: usize = 8;
    by_socket_only();
    let seed = seed();
    eprintln!("seed {seed}");
    // QEMU 7.2 freezes its guest once it has armed.
    for binary in Binary::all().iter().filter(|binary| binary.version >= (10, 0, 0)) {
        let opened = Opened::start(&machine(binary));
        let before = before(&opened);
        for round in 0..ROUNDS {
            let mut caller = caller_in(&opened, "", "qmp.sock");
            if round % 2 == 1 {
                caller.env("INSTANTSNAP_WATCHDOG", "");
            }
            let mut caller = caller.spawn().unwrap();
            let journal = opened.state_dir().join(".s.journal");
            wait_for(DEADLINE, || journal.exists().then_some(())).expect("it begins");
            let wait = Random::of_round(seed, round).below(600);
            std::thread::sleep(Duration::from_millis(wait as u64));
            if caller.try_wait().unwrap().is_none() {
                signal(caller.id(), Signal::STOP);
                let watchdog = watchdog_of(caller.id());
                watchdog.into_iter().for_each(kill);
                caller.kill().unwrap();
            }
            caller.wait().unwrap();
            // A watchdog that was being started lives, and undoes the snapshot itself.
            let found = wait_for(DEADLINE, || opened.handle.recover().ok()).expect("it recovers");
            eprintln!("{round}: {found:?}");
            assert!(found.iter().all(|found| found.action != Action::Left));
            if !opened.handle.store().unwrap().list().unwrap().is_empty() {
                opened.handle.delete("s", 0).unwrap();
            }
            assert_recovered(&opened, &before);
            opened.guest.wait_ticks(2);
        }
        opened.assert_well();
    }
}
