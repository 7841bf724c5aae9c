// SPDX-License-Identifier: LGPL-2.1-or-later

//! The driver backend gives the guarantees of the other backends: one moment, a complete undo,
//! cancelling at any time, and one operation at a time across all backends.

use std::sync::Arc;

use common::driver::{DriverFault, TestDriver};
use common::{
    ALL_SECTORS, At, Handle, INSTANTLY, Opened, PHASES, assert_error, assert_untouched, machine,
    named,
};
use instantsnap::engine::{PauseSource, Phase, prepare_revert};
use instantsnap::error::Code;
use instantsnap_testkit::{Binary, Format, test};

#[test]
fn snapshots_by_a_driver_are_of_one_moment() {
    for binary in Binary::some() {
        for pauses in [false, true] {
            let (original, _) = Opened::start_by_driver(&machine(binary, 2), pauses);
            for (name, flags) in [("instant", INSTANTLY), ("plain", 0)] {
                let before = original.guest.wait_ticks(1);
                original.create(&named(name), flags).unwrap();
                let stats = original.handle.stats().unwrap();
                let after = original.guest.wait_ticks(1);
                assert_eq!(stats.disks, 2);
                // The driver has passed on STOP and RESUME.
                assert!(matches!(stats.paused, Some((_, PauseSource::Events))), "{stats:?}");
                let (clone, first) = original.restore_clone(name);
                assert!(
                    (before..=after + 2).contains(&first),
                    "{first} is not from {before} to {after}"
                );
                drop(clone);
            }
            assert_eq!(original.handle.snapshot_list().names().unwrap(), ["instant", "plain"]);
            let xml = original.handle.snapshot_list().xml("plain").unwrap();
            assert!(xml.contains("<parent>") && xml.contains("disk name=\"vd1\""), "{xml}");
            original.guest.wait_ticks(ALL_SECTORS);
        }
    }
}

#[test]
fn driver_can_load_a_snapshot() {
    for binary in Binary::some() {
        let (original, _) = Opened::start_by_driver(&machine(binary, 1), false);
        original.snapshot("s").unwrap();
        assert_error(
            original.handle.load("s", 0),
            Code::OperationInvalid,
            "does not wait for a snapshot",
        );
        let plan = prepare_revert(&original.state_dir(), "s", None).unwrap();
        let disks: Vec<_> =
            plan.disks.iter().map(|disk| (disk.file.clone(), Format::Qcow2)).collect();
        let guest = original.guest.machine().for_revert(&disks).start();
        let driver = Arc::new(TestDriver::new(&guest, original.state_dir(), true));
        let clone = Opened { handle: Handle::open_driver(driver).unwrap(), guest };
        clone.handle.load("s", 0).unwrap();
        clone.guest.wait_ticks(ALL_SECTORS);
    }
}

#[test]
fn callback_failure_in_any_phase_leaves_everything_as_it_was() {
    for binary in Binary::some() {
        let (opened, driver) = Opened::start_by_driver(&machine(binary, 2), false);
        for flags in [INSTANTLY, 0] {
            for fault in [DriverFault::Fails, DriverFault::FailsAfterExecution] {
                // The first callbacks are dispensable, and a non-live snapshot has no drain.
                let has = |phase: &Phase| {
                    *phase != Phase::Validate && (flags != 0 || *phase != Phase::Drain)
                };
                for phase in PHASES.into_iter().filter(has) {
                    let mut observer = At(|now| {
                        if now == phase {
                            driver.inject(fault);
                        }
                    });
                    let before = opened.trace();
                    let result = opened.handle.create(&named("s"), flags, &mut observer);
                    eprintln!("{} {fault:?} {phase:?}: {result:?}", binary.name);
                    assert_error(
                        result.clone(),
                        Code::OperationFailed,
                        "the driver's callback failed: not today",
                    );
                    assert!(!result.unwrap_err().message.contains(';'));
                    assert_untouched(&opened, &before);
                    opened.guest.wait_ticks(1);
                }
            }
        }
        opened.assert_well();
    }
}

#[test]
fn snapshot_by_a_driver_can_be_cancelled_in_any_phase() {
    for binary in Binary::some() {
        let (opened, _) = Opened::start_by_driver(&machine(binary, 1), true);
        for phase in PHASES {
            let mut observer = At(|now| {
                if now == phase {
                    opened.handle.cancel().unwrap();
                }
            });
            let parts = ["the snapshot was cancelled"];
            let error = opened.assert_fails_observed(
                &named("s"),
                INSTANTLY,
                &mut observer,
                Code::OperationAborted,
                &parts,
            );
            assert!(!error.message.contains(';'), "{error}");
        }
        opened.assert_well();
    }
}

/// The driver's domain and the QMP socket belong to one QEMU.
#[test]
fn operations_of_other_backends_are_refused_during_a_snapshot() {
    for binary in Binary::any() {
        let (opened, _) = Opened::start_by_driver(&machine(binary, 1), false);
        let other_dir = opened.guest.directory().join("other");
        std::fs::create_dir(&other_dir).unwrap();
        let other =
            Handle::open_qmp(&opened.guest.directory().join("control.sock"), None, &other_dir)
                .unwrap();
        let busy = |handle: &Handle| {
            assert_error(
                handle.create(&named("t"), INSTANTLY, &mut ()),
                Code::OperationInvalid,
                "is under way",
            );
        };
        let mut refused = 0;
        let mut observer = At(|phase| {
            if [Phase::Prepare, Phase::Switch, Phase::Drain].contains(&phase) {
                busy(&other);
                refused += 1;
            }
        });
        opened.handle.create(&named("by-driver"), INSTANTLY, &mut observer).unwrap();
        let mut observer = At(|phase| {
            if [Phase::Prepare, Phase::Switch, Phase::Drain].contains(&phase) {
                busy(&opened.handle);
                refused += 1;
            }
        });
        other.create(&named("by-socket"), INSTANTLY, &mut observer).unwrap();
        assert_eq!(refused, 6);
        opened.guest.wait_ticks(ALL_SECTORS);
        opened.restore_clone("by-driver");
    }
}
