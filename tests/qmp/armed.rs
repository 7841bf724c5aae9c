// SPDX-License-Identifier: LGPL-2.1-or-later

//! The guest is resumed when write tracking is armed and not before, and the pause never exceeds
//! its limit.
//!
//! A preloaded shim holds QEMU's snapshot thread between the migration becoming active and the
//! arming of write tracking.

use std::path::{Path, PathBuf};
use std::time::Duration;

use common::{ALL_SECTORS, INSTANTLY, Opened, assert_untouched, machine, named, through_proxy};
use instantsnap::error::Code;
use instantsnap_testkit::by_hand::{Resume, begin, restore_clone};
use instantsnap_testkit::{Binary, DEADLINE, Fault, Machine, test, wait_for};
use serde_json::json;
use tempfile::TempDir;

/// A machine whose snapshots are held until the returned file exists, and the file's directory.
fn machine_with_held_arming(binary: &'static Binary) -> (Machine, PathBuf, TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let release = directory.path().join("release");
    (machine(binary, 2).restless().late_arm(&release), release, directory)
}

#[test]
fn guest_is_not_resumed_before_write_tracking_is_armed() {
    for binary in Binary::some() {
        let (machine, release, _directory) = machine_with_held_arming(binary);
        let (opened, proxy) = through_proxy(&machine);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // The library has polled several times since `migrate`, and QEMU has replied
                // "active".
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

/// The control experiment: under the same shim, a guest that is resumed at "active" is torn.
#[test]
fn resuming_at_active_before_arming_tears_the_snapshot() {
    for binary in Binary::some() {
        let (machine, release, _directory) = machine_with_held_arming(binary);
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
fn pause_limit_ends_the_pause_and_fails_the_snapshot() {
    for binary in Binary::some() {
        let (machine, release, _directory) = machine_with_held_arming(binary);
        let opened = Opened::start(&machine);
        let before = opened.trace();
        opened.handle.set_pause_limit(Duration::from_secs(2));
        let error = std::thread::scope(|scope| {
            let call = scope.spawn(|| {
                opened.handle.create(&named("s"), INSTANTLY, &mut ()).expect_err("too long")
            });
            // The guest runs again while the migration is still held: the library does not wait for
            // QEMU.
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

/// The test never creates the file: QEMU's thread goes on by itself after the limit has passed.
#[test]
fn pause_limit_undoes_the_snapshot_when_qemu_goes_on_later() {
    for binary in Binary::some() {
        let (machine, release, _directory) = machine_with_held_arming(binary);
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

/// QEMU 10.0 closes its descriptor 0 when a background snapshot is cancelled before it is armed.
/// The second time, descriptor 0 is an image that QEMU has opened since.
#[test]
fn giving_up_before_arming_closes_no_descriptor_of_qemu() {
    for binary in Binary::some() {
        // QEMU is still reading this much memory when the library gives up.
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
