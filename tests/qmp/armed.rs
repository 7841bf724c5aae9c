// SPDX-License-Identifier: LGPL-2.1-or-later

//! P1, P2: the guest runs again when write tracking is armed, not before; and never later than the
//! limit of the pause.
//!
//! A shim holds QEMU's snapshot thread in the gap between "the migration is active" and "tracking
//! is armed".

use std::path::{Path, PathBuf};
use std::time::Duration;

use common::{ALL_SECTORS, INSTANTLY, Opened, assert_untouched, machine, named, through_proxy};
use instantsnap::error::Code;
use instantsnap_testkit::by_hand::{Resume, begin, restore_clone};
use instantsnap_testkit::{Binary, DEADLINE, Fault, Machine, test, wait_for};
use serde_json::json;
use tempfile::TempDir;

/// A machine whose snapshots wait until the file is there; and its directory.
fn late(binary: &'static Binary) -> (Machine, PathBuf, TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let release = directory.path().join("release");
    (machine(binary, 2).restless().late_arm(&release), release, directory)
}

#[test]
fn a_snapshot_that_is_active_but_not_armed_is_waited_for() {
    for binary in Binary::some() {
        let (machine, release, _directory) = late(binary);
        let (opened, proxy) = through_proxy(&machine);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // The library has asked several times since `migrate`, and been told: active.
                let asked = || {
                    let commands = proxy.commands();
                    let migrate = commands.iter().position(|command| command == "migrate")?;
                    let asked = commands[migrate..]
                        .iter()
                        .filter(|command| *command == "query-migrate")
                        .count();
                    (asked > 5).then_some(())
                };
                wait_for(DEADLINE, asked).expect("the library asks");
                let mut control = opened.guest.control();
                let mut ask = |command: &str| control.execute(command, json!({})).unwrap();
                let (migration, status) = (ask("query-migrate"), ask("query-status"));
                let before = proxy.commands().len();
                wait_for(DEADLINE, || (proxy.commands().len() > before + 5).then_some(()))
                    .expect("it goes on asking");
                std::fs::write(&release, "").unwrap();
                assert_eq!(migration["status"], "active");
                assert_eq!(
                    status["running"], false,
                    "the guest must not run before tracking is armed"
                );
            });
            opened.snapshot("late").unwrap();
        });
        opened.guest.wait_ticks(ALL_SECTORS);
        opened.restore_clone("late");
    }
}

/// The control experiment: under the same shim, who resumes at "active" gets a torn snapshot.
#[test]
fn a_guest_resumed_when_active_is_torn() {
    for binary in Binary::some() {
        let (machine, release, _directory) = late(binary);
        let guest = machine.start();
        guest.wait_ticks(10);
        let draining = begin(&guest, "wrong", Resume::Active);
        guest.wait_ticks(5);
        std::fs::write(&release, "").unwrap();
        let snapshot = draining.finish(&guest);
        let line =
            restore_clone(&guest, &snapshot).try_ticks(5, DEADLINE).expect_err("not noticed");
        assert!(line.starts_with("TORN disk "), "{line}");
    }
}

#[test]
fn a_pause_that_reaches_its_limit_is_ended() {
    for binary in Binary::some() {
        let (machine, release, _directory) = late(binary);
        let opened = Opened::start(&machine);
        let before = opened.trace();
        opened.handle.set_pause_limit(Duration::from_secs(2));
        let error = std::thread::scope(|scope| {
            let call = scope.spawn(|| {
                opened.handle.create(&named("s"), INSTANTLY, &mut ()).expect_err("too long")
            });
            // The guest runs again while the migration is still held: it does not wait for QEMU to
            // give in.
            let mut control = opened.guest.control();
            let mut running = |wanted: bool| {
                let status = |control: &mut instantsnap_testkit::Client| {
                    control.execute("query-status", json!({})).unwrap()["running"] == wanted
                };
                wait_for(DEADLINE, || status(&mut control).then_some(()))
                    .expect("the guest is paused, and runs again");
            };
            running(false);
            running(true);
            opened.guest.wait_ticks(5);
            assert!(!release.exists());
            std::fs::write(&release, "").unwrap();
            call.join().unwrap()
        });
        assert_eq!(error.code, Code::OperationTimeout, "{error}");
        assert!(error.message.contains("not armed within the limit of the pause"), "{error}");
        assert!(!error.message.contains(';'), "nothing is left: {error}");
        assert_untouched(&opened, &before);
        opened.handle.set_pause_limit(Duration::from_secs(30));
        opened.assert_well();
    }
}

/// Nobody opens the gate: QEMU comes to its senses by itself, after the limit.
#[test]
fn a_pause_that_reaches_its_limit_is_undone_when_qemu_comes_to_its_senses() {
    for binary in Binary::some() {
        let (machine, release, _directory) = late(binary);
        let opened = Opened::start(&machine);
        opened.handle.set_pause_limit(Duration::from_secs(2));
        opened.assert_fails(
            &named("s"),
            INSTANTLY,
            Code::OperationTimeout,
            &["limit of the pause"],
        );
        assert!(!release.exists());
        std::fs::write(&release, "").unwrap();
        opened.handle.set_pause_limit(Duration::from_secs(30));
        opened.assert_well();
    }
}

/// QEMU 10.0 closes its descriptor 0 when a background snapshot is cancelled before it is armed. At
/// the second time that is an image that it has opened meanwhile.
#[test]
fn a_snapshot_given_up_before_it_is_armed_closes_nothing_of_qemus() {
    for binary in Binary::some() {
        // So much memory that QEMU is still touching it when the library gives up.
        let (opened, proxy) = through_proxy(&machine(binary, 2).memory(512).prealloc());
        for _ in 0..3 {
            proxy.rule("query-migrate", 2, Fault::fail("not today"));
            opened.assert_fails(&named("s"), INSTANTLY, Code::OperationFailed, &["not today"]);
            let stdin = format!("/proc/{}/fd/0", opened.guest.pid());
            assert_eq!(std::fs::read_link(stdin).unwrap(), Path::new("/dev/null"));
        }
        opened.assert_well();
    }
}
