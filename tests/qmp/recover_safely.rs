// SPDX-License-Identifier: LGPL-2.1-or-later

//! A recovery changes only what it can prove to be the snapshot's, in an order in which it can be
//! interrupted anywhere, and leaves other guests, other hosts and other images alone.

use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Child;

use common::backend::{by_socket_only, domain_of};
use common::watchdog::watchdog_of;
use common::{
    At, INSTANTLY, Opened, QEMU_IMG, assert_says, files_below, machine, named, qemu_img_stand_in,
    run, through_proxy,
};
use instantsnap::engine::{Action, Phase, Recovered, What, prepare_revert, recover_offline};
use instantsnap::error::Code;
use instantsnap_testkit::program::process;
use instantsnap_testkit::{Binary, DEADLINE, Format, Machine, process, test, wait_for};
use rustix::fs::{FlockOperation, flock};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::killed::{Content, start_cold, stop};
use crate::recover::{caller_in, interrupt, is_frozen, kill, recovered, signal};

/// A QEMU whose guest runs on after its caller and its watchdog were killed in any phase.
fn lasting() -> Option<&'static Binary> {
    Binary::all().iter().find(|binary| !is_frozen(binary, Phase::Drain))
}

fn journal_of(opened: &Opened) -> PathBuf {
    opened.state_dir().join(".s.journal")
}

fn journal_says(opened: &Opened, word: &str) -> bool {
    std::fs::read_to_string(journal_of(opened)).unwrap_or_default().contains(word)
}

fn has_ended(opened: &Opened) -> Option<()> {
    (!journal_of(opened).exists()).then_some(())
}

/// The files that a recovery may change. It creates and removes the reservation of the name.
fn files(opened: &Opened) -> Vec<PathBuf> {
    let mut files = files_below(opened.guest.directory());
    files.retain(|file| !file.ends_with(".s.reserved"));
    files
}

fn offline(opened: &Opened) -> Vec<Recovered> {
    let found = recover_offline(&opened.state_dir()).unwrap();
    found.iter().for_each(|found| eprintln!("  {:?} {:?} {found}", found.what, found.action));
    found
}

#[track_caller]
fn assert_blocked(found: &[Recovered], parts: &[&str]) {
    let all = |found: &&Recovered| {
        found.blocks && parts.iter().all(|part| found.to_string().contains(part))
    };
    assert!(found.iter().any(|found| all(&found)), "{parts:?} in {found:?}");
}

/// The caller waits for the state directory just before it records its complete snapshot.
fn until_complete(opened: &Opened, socket: &str) -> (Child, File) {
    let caller = caller_in(opened, "", socket).spawn().unwrap();
    let says = |word| wait_for(DEADLINE, || journal_says(opened, word).then_some(()));
    says("Switching").expect("it begins");
    let lock = File::options().write(true).open(opened.state_dir().join(".lock")).unwrap();
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    says("Complete").expect("it is complete");
    let waits = || {
        let files = std::fs::read_dir(format!("/proc/{}/fd", caller.id())).unwrap().flatten();
        let mut files = files.filter_map(|file| file.path().read_link().ok());
        files.any(|file| file.ends_with(".lock")).then_some(())
    };
    wait_for(DEADLINE, waits).expect("it waits for the lock");
    (caller, lock)
}

fn end(mut caller: Child) {
    caller.kill().unwrap();
    caller.wait().unwrap();
}

fn kill_with_watchdog(caller: Child) {
    // A caller that runs would replace its watchdog.
    signal(caller.id(), Signal::STOP);
    watchdog_of(caller.id()).into_iter().for_each(kill);
    end(caller);
}

/// Interrupts a snapshot in its drain, and ends the guest some ticks later. Returns the last tick.
fn interrupt_and_end(opened: &Opened) -> u32 {
    interrupt(opened, Phase::Drain);
    opened.guest.wait_ticks(3);
    let last = stop(&opened.guest);
    opened.guest.kill();
    last
}

#[track_caller]
fn assert_merged(opened: &Opened, binary: &'static Binary, last: u32) {
    for (index, disk) in opened.guest.disks().iter().enumerate() {
        Content::read(disk, index as u32).assert_at(last);
    }
    start_cold(binary, &opened.guest);
}

/// A loss of power in the undo must not leave a snapshot that looks complete on images that have
/// newer data.
#[test]
fn memory_image_is_gone_before_the_first_merge_of_a_watchdog() {
    by_socket_only();
    let (opened, proxy) = through_proxy(&machine(&Binary::any()[0], 1));
    let (caller, lock) = until_complete(&opened, "proxy.sock");
    let gate = proxy.hold("block-commit", 1);
    let memory = opened.state_dir().join("s.mem");
    assert!(memory.exists());
    end(caller);
    assert!(gate.wait_arrived(DEADLINE));
    assert!(!memory.exists() && journal_says(&opened, "Undoing"));
    gate.release();
    wait_for(DEADLINE, || has_ended(&opened)).expect("the watchdog ends");
    drop(lock);
    opened.guest.wait_ticks(2);
    opened.assert_well();
}

#[test]
fn memory_image_is_gone_before_the_first_merge_of_a_caller_that_fails_late() {
    by_socket_only();
    let (opened, proxy) = through_proxy(&machine(&Binary::any()[0], 1));
    let gate = proxy.hold("block-commit", 1);
    let state = opened.state_dir();
    let error = std::thread::scope(|scope| {
        let taken = scope.spawn(|| {
            // The snapshot cannot become the current one.
            let mut observer = At(|phase| {
                if phase == Phase::Finish {
                    std::fs::create_dir(state.join(".current")).unwrap();
                }
            });
            opened.handle.create(&named("s"), INSTANTLY, &mut observer)
        });
        assert!(gate.wait_arrived(DEADLINE));
        assert!(!state.join("s.mem").exists() && journal_says(&opened, "Undoing"));
        gate.release();
        taken.join().unwrap().unwrap_err()
    });
    assert!(error.message.contains(".current"), "{error}");
    std::fs::remove_dir(state.join(".current")).unwrap();
    assert!(!journal_of(&opened).exists());
    opened.guest.wait_ticks(2);
    opened.assert_well();
}

#[test]
fn journal_says_that_the_snapshot_is_undone_before_a_recovery_merges() {
    by_socket_only();
    let (opened, proxy) = through_proxy(&machine(&Binary::any()[0], 1));
    let status = caller_in(&opened, "Switch", "proxy.sock").status().unwrap();
    assert_eq!(status.signal(), Some(9), "{status}");
    // Half a line at the end was never written.
    let journal = journal_of(&opened);
    let whole = std::fs::read_to_string(&journal).unwrap();
    std::fs::write(&journal, format!("{whole}{{\"Pass")).unwrap();
    let gate = proxy.hold("blockdev-del", 1);
    std::thread::scope(|scope| {
        let found = scope.spawn(|| recovered(&opened));
        assert!(gate.wait_arrived(DEADLINE));
        let now = std::fs::read_to_string(&journal).unwrap();
        assert!(now.starts_with(&whole) && now.contains("\n\"Undoing\"\n"), "{now}");
        gate.release();
        assert!(found.join().unwrap().iter().all(|found| !found.blocks));
    });
    opened.guest.wait_ticks(2);
    opened.assert_well();
}

/// The record of a snapshot whose undo had begun came back after a loss of power.
#[test]
fn record_of_a_snapshot_that_is_being_undone_does_not_make_it_complete() {
    by_socket_only();
    let opened = Opened::start(&machine(&Binary::any()[0], 1));
    let (caller, lock) = until_complete(&opened, "qmp.sock");
    kill_with_watchdog(caller);
    drop(lock);
    let journal = std::fs::read_to_string(journal_of(&opened)).unwrap();
    std::fs::write(opened.state_dir().join("s.xml"), record_in(&journal)).unwrap();
    std::fs::write(journal_of(&opened), journal + "\"Undoing\"\n").unwrap();
    let found = recovered(&opened);
    assert!(found.iter().all(|found| found.action == Action::Undone), "{found:?}");
    assert!(!opened.state_dir().join("s.xml").exists());
    opened.guest.wait_ticks(2);
    opened.assert_well();
}

/// The record in the journal of a snapshot whose instant has passed.
fn record_in(journal: &str) -> String {
    let mut lines = journal.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let passed = lines.find_map(|line| line["Passed"]["record"].as_str().map(str::to_owned));
    passed.expect("the instant has passed")
}

/// Somebody has made an image on the one that the overlay would be merged into: through another
/// image, in another directory.
#[test]
fn image_that_others_have_made_on_the_disks_image_keeps_it_from_being_merged_into() {
    by_socket_only();
    let Some(binary) = lasting() else { return };
    let opened = Opened::start(&machine(binary, 2));
    interrupt(&opened, Phase::Drain);
    let disk = &opened.guest.disks()[0].file;
    let elsewhere = tempfile::tempdir().unwrap();
    let (between, theirs) = (elsewhere.path().join("between"), disk.with_file_name("theirs.qcow2"));
    for (image, below, format) in [(&between, disk, "raw"), (&theirs, &between, "qcow2")] {
        let [image, below] = [image, below].map(|path| path.to_str().unwrap());
        let options =
            ["create", "-q", "-u", "-f", "qcow2", "-F", format, "-b", below, image, "64M"];
        run("qemu-img", &options);
    }
    let before = files(&opened);
    let theirs = theirs.to_str().unwrap();
    assert_blocked(&recovered(&opened), &["disk-0.s", theirs]);
    assert!(opened.active_image("vd0").ends_with("disk-0.s"));
    opened.guest.wait_ticks(3);
    let last = stop(&opened.guest);
    opened.guest.kill();
    assert_blocked(&offline(&opened), &["disk-0.s", theirs]);
    assert_eq!(files(&opened), before);
    std::fs::remove_file(theirs).unwrap();
    let found = offline(&opened);
    assert!(found.iter().all(|found| found.action == Action::Undone), "{found:?}");
    assert_merged(&opened, binary, last);
}

/// While the overlay of one disk is merged, another process opens the image of the other disk.
#[test]
fn image_that_is_opened_during_the_merge_of_another_disk_is_not_merged_into() {
    by_socket_only();
    let Some(binary) = lasting() else { return };
    let opened = Opened::start(&machine(binary, 2));
    let last = interrupt_and_end(&opened);
    let stand_in = tempfile::tempdir().unwrap();
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = commit ] || exec /usr/bin/qemu-img \"$@\"\necho commit >>{0}/log\n\
         /usr/bin/qemu-img \"$@\" || exit\n[ -e {0}/pid ] || qemu-nbd -f qcow2 -t -k {0}/nbd \
         --fork --pid-file={0}/pid {1} </dev/null >{0}/said 2>&1\n",
        stand_in.path().display(),
        opened.guest.disks()[1].file.display()
    );
    let qemu_img = qemu_img_stand_in(stand_in.path(), &script);
    // SAFETY: this process runs this test only. The harness's threads wait, and the library's
    // threads do not read the environment.
    unsafe { std::env::set_var(QEMU_IMG, &qemu_img) };
    let found = offline(&opened);
    // SAFETY: as above.
    unsafe { std::env::remove_var(QEMU_IMG) };
    let server = std::fs::read_to_string(stand_in.path().join("pid")).expect("the other process");
    run("kill", &[server.trim()]);
    assert_blocked(&found, &["disk-1.s", "is open in a QEMU"]);
    assert_eq!(std::fs::read_to_string(stand_in.path().join("log")).unwrap(), "commit\n");
    let ended = wait_for(DEADLINE, || {
        let found = offline(&opened);
        found.iter().all(|found| found.action == Action::Undone).then_some(())
    });
    ended.expect("the other process ends");
    assert_merged(&opened, binary, last);
}

/// A driver's configuration names the overlays, and nobody can tell the driver.
#[test]
fn overlays_of_a_drivers_guest_are_named_and_left_off_line() {
    by_socket_only();
    let Some(binary) = lasting() else { return };
    let opened = Opened::start(&machine(binary, 2));
    std::fs::write(opened.guest.directory().join("domain.xml"), domain_of(opened.guest.disks()))
        .unwrap();
    let status = caller_in(&opened, "Drain", "qmp.sock")
        .env("INSTANTSNAP_TEST_BACKEND", "driver")
        .status()
        .unwrap();
    assert_eq!(status.signal(), Some(9), "{status}");
    opened.guest.wait_ticks(3);
    stop(&opened.guest);
    opened.guest.kill();
    let before = files(&opened);
    let found = offline(&opened);
    for disk in opened.guest.disks() {
        let overlay = disk.file.with_extension("s");
        let commit = format!("qemu-img commit {}", overlay.display());
        assert_blocked(&found, &["driver", &commit, disk.file.to_str().unwrap(), ".s.journal"]);
    }
    assert!(found.iter().all(|found| found.action == Action::Left), "{found:?}");
    assert_eq!(files(&opened), before);
}

#[test]
fn journal_of_another_host_is_named_and_left_alone() {
    by_socket_only();
    let opened = Opened::start(&machine(&Binary::any()[0], 1));
    interrupt(&opened, Phase::Switch);
    let here = std::fs::read_to_string(journal_of(&opened)).unwrap();
    let mut lines = here.splitn(2, '\n');
    let mut intent: Value = serde_json::from_str(lines.next().unwrap()).unwrap();
    assert!(intent["machine"].as_str().is_some_and(|machine| !machine.is_empty()), "{intent}");
    (intent["machine"], intent["boot"]) = (json!("elsewhere"), json!("then"));
    std::fs::write(journal_of(&opened), format!("{intent}\n{}", lines.next().unwrap())).unwrap();
    let before = files(&opened);
    assert_blocked(&recovered(&opened), &["another host ('elsewhere')"]);
    let error = opened.snapshot("next").unwrap_err();
    assert_says(&error, Code::OperationInvalid, &["another host ('elsewhere')"]);
    assert_blocked(&offline(&opened), &["another host ('elsewhere')"]);
    assert_eq!(files(&opened), before);
    // An earlier boot of this host is known: QEMU has ended, and here its images are in use.
    std::fs::write(journal_of(&opened), &here).unwrap();
    recovered(&opened);
    opened.guest.wait_ticks(2);
    opened.assert_well();
}

/// Not a test of its own: recovers a state directory, and is killed by the stand-in for qemu-img.
#[process]
fn recoverer() {
    std::fs::write(std::env::var("INSTANTSNAP_TEST_PID").unwrap(), std::process::id().to_string())
        .unwrap();
    let found = recover_offline(Path::new(&std::env::var("INSTANTSNAP_TEST_DIRECTORY").unwrap()));
    panic!("it was to be killed: {found:?}");
}

/// A stand-in that merges, and kills the process whose number is in `pid` before it can go on.
fn killing_qemu_img(directory: &Path) -> PathBuf {
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = commit ] || exec /usr/bin/qemu-img \"$@\"\n\
         /usr/bin/qemu-img \"$@\"\nkill -9 $(cat {}/pid)\n",
        directory.display()
    );
    qemu_img_stand_in(directory, &script)
}

#[test]
fn merge_off_line_that_was_interrupted_is_repeated() {
    by_socket_only();
    let Some(binary) = lasting() else { return };
    let opened = Opened::start(&machine(binary, 2));
    let last = interrupt_and_end(&opened);
    let stand_in = tempfile::tempdir().unwrap();
    let status = process(module_path!(), "recoverer")
        .env("INSTANTSNAP_TEST_PID", stand_in.path().join("pid"))
        .env("INSTANTSNAP_TEST_DIRECTORY", opened.state_dir())
        .env(QEMU_IMG, killing_qemu_img(stand_in.path()))
        .status()
        .unwrap();
    assert_eq!(status.signal(), Some(9), "{status}");
    let journal = std::fs::read_to_string(journal_of(&opened)).unwrap();
    assert!(journal.contains("Merging") && !journal.contains("Merged"), "{journal}");
    // If the host was started anew since, nobody may have started a guest on the half.
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let at = journal.find("{\"Merging\"").unwrap();
    let later = journal[..at].to_owned() + &journal[at..].replace(boot.trim(), "then");
    std::fs::write(journal_of(&opened), later).unwrap();
    assert_blocked(&offline(&opened), &["disk-0", "half merged, and written since the host"]);
    std::fs::write(journal_of(&opened), journal).unwrap();
    let found = offline(&opened);
    assert!(found.iter().all(|found| found.action == Action::Undone), "{found:?}");
    assert!(!journal_of(&opened).exists());
    assert_merged(&opened, binary, last);
}

/// The caller merges off line when QEMU was killed, and is killed itself meanwhile.
#[test]
fn merge_off_line_of_a_caller_that_was_killed_is_repeated() {
    by_socket_only();
    let binary = &Binary::any()[0];
    let opened = Opened::start(&machine(binary, 2));
    let stand_in = tempfile::tempdir().unwrap();
    let mut caller = caller_in(&opened, "Drain", "qmp.sock")
        .env("INSTANTSNAP_TEST_WAITS_FOR", stand_in.path().join("pid"))
        .env(QEMU_IMG, killing_qemu_img(stand_in.path()))
        .spawn()
        .unwrap();
    wait_for(DEADLINE, || journal_says(&opened, "Passed").then_some(())).expect("it drains");
    opened.guest.wait_ticks(3);
    let last = stop(&opened.guest);
    opened.guest.kill();
    std::fs::write(stand_in.path().join("pid"), caller.id().to_string()).unwrap();
    let status = caller.wait().unwrap();
    assert_eq!(status.signal(), Some(9), "{status}");
    let recovered = wait_for(DEADLINE, || recover_offline(&opened.state_dir()).ok());
    let found = recovered.expect("the watchdog ends");
    assert!(found.iter().any(|found| found.what == What::Overlay), "{found:?}");
    assert!(found.iter().all(|found| found.action == Action::Undone), "{found:?}");
    assert!(!journal_of(&opened).exists());
    assert_merged(&opened, binary, last);
}

/// The caller is told of the instant, and pauses the guest; then it is killed.
#[test]
fn guest_that_was_paused_right_after_the_instant_stays_paused() {
    by_socket_only();
    let Some(binary) = lasting() else { return };
    let opened = Opened::start(&machine(binary, 1));
    let status = caller_in(&opened, "Instant", "qmp.sock").status().unwrap();
    assert_eq!(status.signal(), Some(9), "{status}");
    assert!(!journal_says(&opened, "Passed"));
    opened.guest.control().execute("stop", json!({})).unwrap();
    let found = recovered(&opened);
    let is_left = |found: &Recovered| (found.what, found.action) == (What::Guest, Action::Left);
    assert!(found.iter().any(is_left), "{found:?}");
    let status = opened.guest.control().execute("query-status", json!({})).unwrap();
    assert_eq!(status["status"], "paused");
    opened.guest.control().execute("cont", json!({})).unwrap();
    opened.guest.wait_ticks(3);
    opened.assert_well();
}

/// The caller is killed when its snapshot is recorded, and is not the current one yet.
#[test]
fn snapshot_whose_caller_was_killed_while_it_was_recorded_becomes_the_current_one() {
    by_socket_only();
    for before_revert in [false, true] {
        let opened = Opened::start(&machine(&Binary::any()[0], 1));
        let (caller, lock) = until_complete(&opened, "qmp.sock");
        let record = record_in(&std::fs::read_to_string(journal_of(&opened)).unwrap());
        std::fs::write(opened.state_dir().join("s.xml"), record).unwrap();
        let watchdog = watchdog_of(caller.id()).unwrap();
        end(caller);
        drop(lock);
        let gone = || (!Path::new(&format!("/proc/{watchdog}")).exists()).then_some(());
        wait_for(DEADLINE, gone).expect("the watchdog ends");
        assert!(opened.state_dir().join("s.mem").exists() && journal_of(&opened).exists());
        match before_revert {
            false => {
                let found = recovered(&opened);
                assert!(found.iter().all(|found| found.action == Action::Finished), "{found:?}");
            }
            true => drop(prepare_revert(&opened.state_dir(), "s", None).unwrap()),
        }
        assert!(!journal_of(&opened).exists());
        assert_eq!(opened.handle.store().unwrap().current().unwrap().as_deref(), Some("s"));
        opened.restore_clone("s");
    }
}

/// A preparation of a revert does not use a snapshot whose journal it cannot read.
#[test]
fn revert_is_not_prepared_to_a_snapshot_that_is_not_settled() {
    by_socket_only();
    let opened = Opened::start(&machine(&Binary::any()[0], 1));
    opened.snapshot("s").unwrap();
    std::fs::write(journal_of(&opened), "{}\n").unwrap();
    let before = files(&opened);
    let error = prepare_revert(&opened.state_dir(), "s", None).unwrap_err();
    assert_says(&error, Code::OperationInvalid, &["'s'", ".s.journal", "damaged"]);
    assert_eq!(files(&opened), before);
    std::fs::remove_file(journal_of(&opened)).unwrap();
    opened.restore_clone("s");
}

/// Only the storage knows whether it has made a snapshot.
#[test]
fn snapshot_that_a_storage_hook_may_have_made_is_named_until_someone_has_looked() {
    by_socket_only();
    let binary = &Binary::any()[0];
    let xml = "<domainsnapshot><name>s</name><disks><disk name='vd1' \
               snapshot='manual'/></disks></domainsnapshot>";
    let is_named = |found: &[Recovered]| {
        found.iter().any(|found| {
            (found.what, found.action, &*found.object, found.blocks)
                == (What::Storage, Action::Left, "vd1", false)
                && found.why.contains(".s.journal")
        })
    };
    for with_watchdog in [false, true] {
        let opened = Opened::start(&Machine::new(binary).disk(Format::Qcow2).disk(Format::Raw));
        let mut caller = caller_in(&opened, "Arm", "qmp.sock");
        caller.env("INSTANTSNAP_TEST_XML", xml).env("INSTANTSNAP_TEST_HOOK", "1");
        if with_watchdog {
            caller.env("INSTANTSNAP_TEST_STOPPED", "");
        }
        let status = caller.status().unwrap();
        assert_eq!(status.signal(), Some(9), "{status}");
        if with_watchdog {
            let undone = || journal_says(&opened, "Undone").then_some(());
            wait_for(DEADLINE, undone).expect("the watchdog undoes the snapshot");
        }
        let found = wait_for(DEADLINE, || opened.handle.recover().ok()).expect("it recovers");
        assert!(is_named(&found), "{found:?}");
        assert!(is_named(&opened.handle.recover().unwrap()));
        assert!(!opened.state_dir().join("s.mem").exists());
        opened.snapshot("next").unwrap_or_else(|error| opened.guest.fail(&error.message));
        assert_eq!(opened.handle.delete("next", 0), Ok(()));
        assert!(is_named(&opened.handle.recover().unwrap()));
        opened.guest.kill();
        assert!(is_named(&offline(&opened)));
        std::fs::remove_file(journal_of(&opened)).unwrap();
        assert_eq!(offline(&opened), []);
        start_cold(binary, &opened.guest);
    }
}

/// A clone and its original have one state directory.
#[test]
fn interrupted_snapshot_of_another_guest_blocks_only_what_uses_its_files() {
    by_socket_only();
    let Some(binary) = lasting() else { return };
    let original = Opened::start(&machine(binary, 1));
    original.snapshot("first").unwrap();
    original.guest.wait_ticks(2);
    interrupt(&original, Phase::Drain);
    let before = files(&original);
    // The original's QEMU runs, and nobody has recovered it.
    let (clone, _) = original.restore_clone("first");
    let found = recovered(&clone);
    assert!(found.iter().all(|found| found.action == Action::Left && !found.blocks), "{found:?}");
    assert!(found.iter().any(|found| found.why.contains("another guest")), "{found:?}");
    clone.snapshot("of the clone").unwrap();
    clone.handle.delete("of the clone", 0).unwrap();
    assert!(before.iter().all(|file| file.exists()));
    // The interrupted snapshot stands on the overlay of this one.
    let error = clone.handle.delete("first", 0).unwrap_err();
    assert_says(&error, Code::OperationInvalid, &["'s'", "was interrupted", "is not the one"]);
    assert!(before.iter().all(|file| file.exists()));
    drop(clone);
    recovered(&original);
    original.guest.wait_ticks(2);
    original.assert_well();
}

#[test]
fn record_that_cannot_be_read_keeps_the_snapshots_files() {
    by_socket_only();
    let opened = Opened::start(&machine(&Binary::any()[0], 1));
    interrupt(&opened, Phase::Switch);
    let record = opened.state_dir().join("s.xml");
    std::fs::write(&record, "<domainsnapshot><name>s").unwrap();
    let before = files(&opened);
    assert!(before.contains(&opened.state_dir().join("s.mem")));
    assert_blocked(&recovered(&opened), &["s.xml", "cannot be read"]);
    let error = opened.snapshot("next").unwrap_err();
    assert_says(&error, Code::OperationInvalid, &["s.xml", "cannot be read"]);
    opened.guest.kill();
    assert_blocked(&offline(&opened), &["s.xml", "cannot be read"]);
    assert_eq!(files(&opened), before);
    std::fs::remove_file(&record).unwrap();
    let found = offline(&opened);
    assert!(found.iter().all(|found| found.action == Action::Undone), "{found:?}");
}

/// The disk's directory is reached by a link, and so is the file of the other disk's overlay.
#[test]
fn overlays_behind_symbolic_links_are_found_and_merged() {
    by_socket_only();
    let Some(binary) = lasting() else { return };
    for with_qemu in [false, true] {
        let storage = tempfile::tempdir().unwrap();
        let (real, link) = (storage.path().join("real"), storage.path().join("link"));
        std::fs::create_dir(&real).unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        let image = link.join("image");
        instantsnap_testkit::machine::make_image(&image, Format::Raw, None);
        let opened =
            Opened::start(&Machine::new(binary).disk_on(&image, Format::Raw).disk(Format::Qcow2));
        let (target, overlay) = (real.join("taken"), link.join("overlay"));
        File::create(&target).unwrap();
        std::os::unix::fs::symlink(&target, &overlay).unwrap();
        let xml = format!(
            "<domainsnapshot><name>s</name><disks><disk name='vd1' snapshot='external'><source \
             file='{}'/></disk></disks></domainsnapshot>",
            overlay.display()
        );
        let status = caller_in(&opened, "Drain", "qmp.sock")
            .env("INSTANTSNAP_TEST_XML", xml)
            .status()
            .unwrap();
        assert_eq!(status.signal(), Some(9), "{status}");
        assert!(real.join("image.s").exists());
        opened.guest.wait_ticks(3);
        let found = match with_qemu {
            true => recovered(&opened),
            false => {
                let last = stop(&opened.guest);
                opened.guest.kill();
                let found = offline(&opened);
                assert_merged(&opened, binary, last);
                found
            }
        };
        let merged = |found: &&Recovered| found.what == What::Overlay;
        assert_eq!(found.iter().filter(merged).count(), 2, "{found:?}");
        assert!(found.iter().all(|found| found.action == Action::Undone), "{found:?}");
        assert!(!real.join("image.s").exists() && !journal_of(&opened).exists());
        // It existed before.
        assert_eq!(target.metadata().unwrap().len(), 0);
        assert!(overlay.is_symlink());
    }
}

/// A disk that was detached since has its newest data only in its overlay.
#[test]
fn overlay_of_a_disk_that_was_detached_is_named_and_left_until_the_disk_is_attached_again() {
    by_socket_only();
    let binary = &Binary::all()[0];
    let machine = common::machine(binary, 1).arg("-device").arg("virtio-scsi-pci,id=scsi");
    let opened = Opened::start(&machine);
    let image = opened.guest.directory().join("plugged.raw");
    File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let execute = |command: &str, arguments: serde_json::Value| {
        opened.guest.control().execute(command, arguments)
    };
    let file = json!({ "driver": "file", "filename": image });
    let node = json!({ "driver": "raw", "node-name": "plugged", "file": file });
    execute("blockdev-add", node).unwrap();
    let attach = |node: &str| {
        let device =
            json!({ "driver": "scsi-hd", "id": "plugged", "bus": "scsi.0", "drive": node });
        execute("device_add", device).unwrap();
    };
    attach("plugged");
    interrupt(&opened, Phase::Arm);
    let node = || {
        let blocks = execute("query-block", json!({})).unwrap();
        let blocks = blocks.as_array().unwrap();
        let block = blocks
            .iter()
            .find(|block| block["qdev"].as_str().is_some_and(|qdev| qdev.contains("plugged")));
        block.map(|block| block["inserted"]["node-name"].as_str().unwrap().to_owned())
    };
    let overlay = node().unwrap();
    assert_ne!(overlay, "plugged");
    let write = json!({ "command-line": "qemu-io -d plugged \"write -P 7 0 64k\"" });
    execute("human-monitor-command", write).unwrap();
    // QEMU refuses it until the migration has ended, whose reader was killed.
    let detach = || execute("device_del", json!({ "id": "plugged" })).ok();
    wait_for(DEADLINE, detach).expect("the disk can be detached");
    wait_for(DEADLINE, || node().is_none().then_some(())).expect("the disk is detached");

    let vd0 = opened.active_image("vd0");
    for _ in 0..2 {
        let found = recovered(&opened);
        assert_blocked(&found, &["neither on its overlay", "plugged"]);
        assert!(journal_of(&opened).exists());
        assert_eq!(opened.active_image("vd0"), vd0);
    }
    attach(&overlay);
    let found = recovered(&opened);
    assert!(found.iter().all(|found| !found.blocks), "{found:?}");
    assert!(!journal_of(&opened).exists());
    assert_eq!(node().as_deref(), Some("plugged"));
    assert_ne!(opened.active_image("vd0"), vd0);
    assert!(std::fs::read(&image).unwrap()[..1 << 16].iter().all(|byte| *byte == 7));
}
