// SPDX-License-Identifier: LGPL-2.1-or-later

//! A snapshot by single commands is right in the right order and torn in the wrong one: the control
//! experiment without which "the guest counts on" would prove nothing.

use instantsnap_testkit::by_hand::{Resume, begin, restore_clone};
use instantsnap_testkit::{
    Accel, Attach, Binary, DEADLINE, Format, Machine, fingerprint, kvm_works, test, wait_for,
};
use serde_json::json;

/// Takes a snapshot and restores a clone, twice from one guest.
fn round_trip(what: &str, machine: Machine) {
    let guest = machine.start();
    guest.wait_ticks(20);
    for name in ["first", "second"] {
        let snapshot = begin(&guest, name, Resume::Armed).finish(&guest);
        guest.wait_ticks(20);
        let clone = restore_clone(&guest, &snapshot);
        let clone_at = clone.wait_ticks(20);
        eprintln!(
            "{what}: stopped at {}, paused for {} us, the clone has come to {clone_at}",
            snapshot.tick, snapshot.pause_us
        );
        assert!(clone_at > snapshot.tick);
        guest.wait_ticks(20);
    }
}

#[test]
fn snapshot_in_the_right_order_is_of_one_moment() {
    for binary in Binary::any() {
        for attach in [Attach::Drive, Attach::Blockdev] {
            let machine = Machine::new(binary)
                .restless()
                .attach(attach)
                .disk(Format::Raw)
                .disk(Format::Qcow2);
            round_trip(&format!("{} tcg {attach:?}", binary.name), machine.clone());
            if kvm_works(binary) {
                round_trip(&format!("{} kvm {attach:?}", binary.name), machine.accel(Accel::Kvm));
            }
        }
    }
}

#[test]
fn resuming_before_arming_tears_the_snapshot() {
    for binary in Binary::any() {
        let directory = tempfile::tempdir().expect("a directory");
        let release = directory.path().join("release");
        let machine = Machine::new(binary).restless().disk(Format::Qcow2).late_arm(&release);
        let guest = machine.start();
        guest.wait_ticks(20);
        let draining = begin(&guest, "wrong", Resume::Active);
        guest.wait_ticks(5);
        std::fs::write(&release, "").expect("release");
        let snapshot = draining.finish(&guest);
        let clone = restore_clone(&guest, &snapshot);
        let line = clone.try_ticks(5, DEADLINE).expect_err("not noticed");
        eprintln!("{}: {line}", binary.name);
        assert!(line.starts_with("TORN disk 0 has "), "{line}");
    }
}

#[test]
fn snapshot_in_the_right_order_is_of_one_moment_with_late_arming() {
    for binary in Binary::any() {
        let directory = tempfile::tempdir().expect("a directory");
        let release = directory.path().join("release");
        let guest = Machine::new(binary).restless().disk(Format::Qcow2).late_arm(&release).start();
        guest.wait_ticks(20);
        let snapshot = std::thread::scope(|scope| {
            scope.spawn(|| {
                // A guest that has not counted for this long is paused.
                let tick = || guest.serial().tick;
                let mut last = tick();
                let still = || {
                    std::thread::sleep(std::time::Duration::from_millis(150));
                    (std::mem::replace(&mut last, tick()) == last).then_some(())
                };
                wait_for(DEADLINE, still).expect("the guest is paused");
                std::fs::write(&release, "").expect("release");
            });
            begin(&guest, "right", Resume::Armed).finish(&guest)
        });
        assert!(snapshot.pause_us > 100_000, "held for {} us only", snapshot.pause_us);
        restore_clone(&guest, &snapshot).wait_ticks(20);
        drop(directory);
    }
}

#[test]
fn fingerprint_shows_exactly_what_a_snapshot_changes() {
    for binary in Binary::any() {
        for attach in [Attach::Drive, Attach::Blockdev] {
            let guest = Machine::new(binary).attach(attach).disk(Format::Qcow2).start();
            guest.wait_ticks(5);
            let before = fingerprint(&mut guest.control());
            guest.wait_ticks(5);
            let idle = fingerprint(&mut guest.control());
            assert_eq!(before, idle, "{}", before.differences(&idle));
            drop(begin(&guest, "one", Resume::Armed).finish(&guest));
            let after = fingerprint(&mut guest.control());
            let differences = before.differences(&after);
            let changed: Vec<_> =
                before.0.keys().filter(|key| before.0.get(*key) != after.0.get(*key)).collect();
            assert_eq!(changed, [&"devices", &"nodes"], "{differences}");
        }
    }
}

#[test]
fn fingerprint_is_equal_after_a_switch_and_its_undo() {
    for binary in Binary::any() {
        for attach in [Attach::Drive, Attach::Blockdev] {
            let guest = Machine::new(binary).attach(attach).disk(Format::Qcow2).start();
            guest.wait_ticks(5);
            let (before, files) = (fingerprint(&mut guest.control()), guest.open_files());
            drop(begin(&guest, "one", Resume::Armed).finish(&guest));
            let mut client = guest.control();
            let mut run = |command: &str, arguments| {
                client.execute(command, arguments).unwrap_or_else(|e| panic!("{command}: {e}"))
            };
            run("block-commit", json!({"job-id": "back", "device": "overlay-0-one"}));
            wait_for(DEADLINE, || {
                let jobs = run("query-block-jobs", json!({}));
                (jobs[0]["ready"] == true).then_some(())
            })
            .expect("the commit is ready");
            run("job-complete", json!({"id": "back"}));
            wait_for(DEADLINE, || (run("query-jobs", json!({})) == json!([])).then_some(()))
                .expect("the commit ends");
            run("blockdev-del", json!({"node-name": "overlay-0-one"}));
            let after = fingerprint(&mut client);
            assert_eq!(before, after, "{}", before.differences(&after));
            drop(client);
            guest.wait_ticks(100);
            assert_eq!(files, guest.open_files());
        }
    }
}
