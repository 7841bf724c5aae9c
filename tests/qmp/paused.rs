// SPDX-License-Identifier: LGPL-2.1-or-later

//! Snapshots of a paused guest leave it paused, with disks that can be used, and record that it was
//! paused.

use std::path::Path;

use common::backend::by_driver;
use common::{
    ALL_SECTORS, At, INSTANTLY, Opened, assert_error, assert_untouched, machine, named,
    through_proxy,
};
use instantsnap::engine::Phase;
use instantsnap::error::Code;
use instantsnap::model::flags::{NO_METADATA, revert};
use instantsnap_testkit::{Binary, Client, DEADLINE, Fault, Guest, test, wait_for};
use serde_json::{Value, json};

fn run(guest: &Guest, command: &str, arguments: Value) -> Value {
    let mut control: Client = guest.control();
    control.execute(command, arguments).unwrap_or_else(|error| panic!("{command}: {error}"))
}

fn status(guest: &Guest) -> String {
    run(guest, "query-status", json!({}))["status"].as_str().unwrap().to_owned()
}

fn is_running(guest: &Guest) -> bool {
    run(guest, "query-status", json!({}))["running"] == true
}

/// A guest that has counted and was stopped, and the last number that it printed.
fn stopped(binary: &'static Binary) -> (Opened, u32) {
    let opened = Opened::start(&machine(binary, 2));
    let tick = stop(&opened.guest);
    (opened, tick)
}

fn stop(guest: &Guest) -> u32 {
    run(guest, "stop", json!({}));
    guest.serial().tick.unwrap()
}

fn resume(guest: &Guest) {
    run(guest, "cont", json!({}));
    guest.wait_ticks(ALL_SECTORS);
}

/// Asserts that the guest has not counted on, and does not.
#[track_caller]
fn assert_still(guest: &Guest, tick: Option<u32>) {
    assert!(!is_running(guest), "{}", status(guest));
    assert_eq!(guest.serial().tick, tick);
}

/// Asserts that a disk can be switched once more and its overlay merged: QEMU refuses both on disks
/// that it has inactivated.
fn assert_disks_are_active(opened: &Opened) {
    let node = common::block_of(&opened.guest, "vd0")["inserted"]["node-name"]
        .as_str()
        .unwrap()
        .to_owned();
    let before = opened.active_image("vd0");
    let overlay = opened.guest.directory().join("by-hand");
    let arguments = json!({
        "node-name": node, "snapshot-file": overlay, "snapshot-node-name": "by-hand", "format": "qcow2",
    });
    run(&opened.guest, "blockdev-snapshot-sync", arguments);
    assert_eq!(opened.active_image("vd0"), overlay.to_str().unwrap());
    commit(opened, "by-hand", &node);
    assert_eq!(opened.active_image("vd0"), before);
    std::fs::remove_file(&overlay).unwrap();
}

/// Merges an active image into the one below it.
fn commit(opened: &Opened, node: &str, base: &str) {
    run(
        &opened.guest,
        "block-commit",
        json!({ "job-id": "merge", "device": node, "base-node": base }),
    );
    let jobs = || run(&opened.guest, "query-block-jobs", json!({}));
    wait_for(DEADLINE, || (jobs()[0]["ready"] == true).then_some(()))
        .expect("the merge gets ready");
    run(&opened.guest, "job-complete", json!({ "id": "merge" }));
    wait_for(DEADLINE, || (jobs() == json!([])).then_some(())).expect("the merge ends");
}

/// Restores a snapshot of a paused guest: the clone is paused until it is resumed.
#[track_caller]
fn restore_paused(opened: &Opened, name: &str, tick: Option<u32>) {
    let clone = opened.start_clone(name);
    clone.handle.load(name, 0).unwrap_or_else(|error| clone.guest.fail(&error.message));
    assert_still(&clone.guest, None);
    // The clone's disks and settings are in order while it is paused, and when it runs.
    assert_disks_are_active(&clone);
    let of_clone = named(&format!("of-clone-{}", clone.guest.pid()));
    clone.handle.create(&of_clone, INSTANTLY | NO_METADATA, &mut ()).unwrap();
    assert_still(&clone.guest, None);
    run(&clone.guest, "cont", json!({}));
    clone.guest.wait_ticks(ALL_SECTORS);
    if let Some(tick) = tick {
        let first = common::first_tick(&clone.guest);
        assert!((tick..=tick + 2).contains(&first), "{first}, and the guest was paused at {tick}");
    }
}

#[track_caller]
fn assert_recorded_as_paused(opened: &Opened, name: &str) {
    let xml = std::fs::read_to_string(opened.state_dir().join(format!("{name}.xml"))).unwrap();
    assert!(xml.contains("<state>paused</state>"), "{xml}");
}

#[test]
fn snapshot_of_a_paused_guest_leaves_it_paused() {
    for binary in Binary::any() {
        for (name, flags) in [("instant", INSTANTLY), ("plain", 0)] {
            eprintln!("{} {name}", binary.name);
            let (opened, tick) = stopped(binary);
            let before = opened.trace();
            opened.create(&named(name), flags).unwrap();
            assert_still(&opened.guest, Some(tick));
            let after = opened.trace();
            for part in ["capabilities", "parameters", "jobs", "block jobs", "fdsets"] {
                assert_eq!(before.qemu.0[part], after.qemu.0[part], "{part}");
            }
            assert_eq!(opened.handle.stats().unwrap().paused, None);
            assert_recorded_as_paused(&opened, name);
            assert_disks_are_active(&opened);
            restore_paused(&opened, name, Some(tick));
            assert_still(&opened.guest, Some(tick));
            resume(&opened.guest);
            opened.assert_well();
            restore_paused(&opened, name, Some(tick));
        }
    }
}

#[test]
fn guest_that_was_never_started_can_be_snapshotted() {
    for binary in Binary::any() {
        for (name, flags) in [("instant", INSTANTLY), ("plain", 0)] {
            eprintln!("{} {name}", binary.name);
            let opened = Opened::open(machine(binary, 2).paused().start());
            assert_eq!(status(&opened.guest), "prelaunch");
            // Later QEMU may have saved the guest's memory already, and does not return from the
            // status that follows.
            let mut observer = At(|phase| {
                if phase == Phase::Switch {
                    opened.handle.cancel().unwrap();
                }
            });
            opened.assert_fails_observed(
                &named("s"),
                flags,
                &mut observer,
                Code::OperationAborted,
                &["cancelled"],
            );
            opened.create(&named(name), flags).unwrap();
            assert_still(&opened.guest, None);
            assert_recorded_as_paused(&opened, name);
            assert_disks_are_active(&opened);
            // The clone boots from its first instruction on.
            restore_paused(&opened, name, Some(0));
            run(&opened.guest, "cont", json!({}));
            opened.assert_well();
        }
    }
}

#[test]
fn clone_runs_as_its_original_unless_flags_differ() {
    for binary in Binary::any() {
        let opened = Opened::start(&machine(binary, 2));
        opened.snapshot("running").unwrap();
        stop(&opened.guest);
        opened.snapshot("paused").unwrap();
        for (name, flags, runs) in [
            ("running", 0, true),
            ("running", revert::PAUSED, false),
            ("running", revert::RUNNING, true),
            ("paused", 0, false),
            ("paused", revert::RUNNING, true),
            ("paused", revert::PAUSED, false),
        ] {
            let clone = opened.start_clone(name);
            clone.handle.load(name, flags).unwrap_or_else(|error| clone.guest.fail(&error.message));
            assert_eq!(is_running(&clone.guest), runs, "{name} {flags}");
            if !runs {
                run(&clone.guest, "cont", json!({}));
            }
            clone.guest.wait_ticks(5);
        }
        let both = revert::RUNNING | revert::PAUSED;
        assert_error(opened.handle.load("paused", both), Code::InvalidArg, "mutually exclusive");
    }
}

#[test]
fn failed_snapshot_of_a_paused_guest_leaves_it_as_it_was() {
    for binary in Binary::any() {
        let (opened, proxy) = through_proxy(&machine(binary, 2));
        let tick = stop(&opened.guest);
        for flags in [INSTANTLY, 0] {
            for command in ["blockdev-create", "getfd", "transaction", "migrate"] {
                // A driver can reconnect or not, by its own choice.
                let hangup = (!by_driver()).then_some(Fault::Hangup);
                for fault in [Fault::fail("not today")].into_iter().chain(hangup) {
                    eprintln!("{} {flags} {fault:?} at {command}", binary.name);
                    let part = if matches!(fault, Fault::Hangup) {
                        "lost the connection"
                    } else {
                        "not today"
                    };
                    proxy.rule(command, 1, fault);
                    let error =
                        opened.assert_fails(&named("s"), flags, Code::OperationFailed, &[part]);
                    assert_eq!(proxy.rules_left(), 0);
                    assert!(!error.message.contains(';'), "{error}");
                }
            }
            let missing = Path::new("/no-such-directory/memory");
            let xml = format!(
                "<domainsnapshot><name>s</name><memory snapshot='external' \
                 file='{}'/></domainsnapshot>",
                missing.display()
            );
            opened.assert_fails(&xml, flags, Code::SystemError, &[missing.to_str().unwrap()]);
            assert_still(&opened.guest, Some(tick));
        }
        assert_disks_are_active(&opened);
        resume(&opened.guest);
        opened.assert_well();
    }
}

/// The first reply after QEMU has saved a paused guest's memory is lost. QEMU has inactivated the
/// disks by then.
#[test]
fn late_failure_on_a_paused_guest_reactivates_its_disks() {
    for binary in Binary::any() {
        let (opened, proxy) = through_proxy(&machine(binary, 2));
        let tick = stop(&opened.guest);
        let before = opened.trace();
        proxy.rule("query-migrate", 2, Fault::fail("not today"));
        let error = opened.create(&named("s"), 0).expect_err("it cannot know");
        assert_eq!(error.code, Code::OperationFailed, "{error}");
        assert!(error.message.contains("not today") && !error.message.contains(';'), "{error}");
        assert_eq!(proxy.rules_left(), 0);
        assert_still(&opened.guest, Some(tick));
        let after = opened.trace();
        for part in ["capabilities", "parameters", "devices", "nodes", "jobs", "block jobs"] {
            assert_eq!(before.qemu.0[part], after.qemu.0[part], "{part}");
        }
        assert_disks_are_active(&opened);
        resume(&opened.guest);
        opened.assert_well();
    }
}

/// In each phase. Once a paused guest's memory is saved, QEMU changes its status from `paused` to
/// `postmigrate`, and cannot change it back.
#[test]
fn cancelled_snapshot_of_a_paused_guest_leaves_it_paused() {
    for binary in Binary::any() {
        for flags in [INSTANTLY, 0] {
            let (opened, tick) = stopped(binary);
            for phase in [Phase::Plan, Phase::Prepare, Phase::Switch, Phase::Arm, Phase::Finish] {
                eprintln!("{} {flags} {phase:?}", binary.name);
                let before = opened.trace();
                let mut observer = At(|now| {
                    if now == phase {
                        opened.handle.cancel().unwrap();
                    }
                });
                let result = opened.handle.create(&named("s"), flags, &mut observer);
                let error = result.expect_err("it was cancelled");
                assert_eq!(error.code, Code::OperationAborted, "{error}");
                assert!(!error.message.contains(';'), "{error}");
                assert_still(&opened.guest, Some(tick));
                let after = opened.trace();
                for part in ["capabilities", "parameters", "devices", "nodes", "jobs", "block jobs"]
                {
                    assert_eq!(before.qemu.0[part], after.qemu.0[part], "{part}");
                }
                assert_disks_are_active(&opened);
                if phase != Phase::Finish {
                    assert_untouched(&opened, &before);
                }
            }
            resume(&opened.guest);
            opened.assert_well();
        }
    }
}

/// QEMU saves a paused guest's memory once, and not again before the guest has run.
#[test]
fn paused_guest_must_run_before_a_second_non_live_snapshot() {
    for binary in Binary::any() {
        let (opened, tick) = stopped(binary);
        opened.create(&named("first"), 0).unwrap();
        for flags in [INSTANTLY, 0] {
            opened.assert_fails(
                &named("second"),
                flags,
                Code::OperationInvalid,
                &["saved while it was paused", "resume"],
            );
        }
        assert_still(&opened.guest, Some(tick));
        resume(&opened.guest);
        let tick = stop(&opened.guest);
        opened.create(&named("second"), 0).unwrap();
        restore_paused(&opened, "second", Some(tick));
        resume(&opened.guest);
    }
}

#[test]
fn instant_snapshots_of_a_paused_guest_can_be_repeated_with_qemu_10() {
    for binary in Binary::all().iter().filter(|binary| binary.version >= (10, 0, 0)) {
        let (opened, tick) = stopped(binary);
        for name in ["first", "second", "third"] {
            opened.snapshot(name).unwrap();
            assert_eq!(status(&opened.guest), "paused");
            assert_still(&opened.guest, Some(tick));
        }
        // A non-live snapshot works after that, too.
        opened.create(&named("plain"), 0).unwrap();
        for name in ["first", "third", "plain"] {
            restore_paused(&opened, name, Some(tick));
        }
        resume(&opened.guest);
        opened.assert_well();
    }
}
