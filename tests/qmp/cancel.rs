// SPDX-License-Identifier: LGPL-2.1-or-later

//! A snapshot can be cancelled in every phase, and a second snapshot of the same guest is refused
//! at once.

use std::sync::mpsc::channel;

use common::backend::by_driver;
use common::{
    ALL_SECTORS, At, Handle, INSTANTLY, Opened, PHASES, assert_error, assert_untouched, machine,
    named,
};
use instantsnap::engine::Phase;
use instantsnap::error::Code;
use instantsnap_testkit::{Binary, Client, DEADLINE, Guest, test, wait_for};
use serde_json::{Value, json};

fn cancelled_in_each_phase(flags: u32) {
    for binary in Binary::some() {
        let opened = Opened::start(&machine(binary, 2));
        // A non-live snapshot has nothing left to drain once it is saved.
        for phase in PHASES.into_iter().filter(|phase| flags != 0 || *phase != Phase::Drain) {
            let mut observer = At(|now| {
                if now == phase {
                    std::thread::scope(|scope| {
                        scope.spawn(|| opened.handle.cancel().unwrap());
                    });
                }
            });
            eprintln!("{} {phase:?}", binary.name);
            let error = opened.assert_fails_observed(
                &named("s"),
                flags,
                &mut observer,
                Code::OperationAborted,
                &["the snapshot was cancelled"],
            );
            assert!(!error.message.contains(';'), "{error}");
        }
        opened.assert_well();
    }
}

#[test]
fn snapshot_can_be_cancelled_in_each_phase() {
    cancelled_in_each_phase(INSTANTLY);
}

#[test]
fn non_live_snapshot_can_be_cancelled_in_each_phase() {
    cancelled_in_each_phase(0);
}

fn run(client: &mut Client, command: &str, arguments: Value) -> Value {
    client.execute(command, arguments).unwrap_or_else(|error| panic!("{command}: {error}"))
}

fn set_bandwidth(client: &mut Client, bandwidth: &Value) {
    run(client, "migrate-set-parameters", json!({ "max-bandwidth": bandwidth }));
}

/// The library waits for memory to drain, and memory drains slowly.
#[test]
fn snapshot_can_be_cancelled_in_the_middle_of_its_drain() {
    for binary in Binary::some() {
        let opened = Opened::start(&machine(binary, 2).memory(128).append("dense=64"));
        let before = opened.trace();
        let bandwidth = before.qemu.0["parameters"]["max-bandwidth"].clone();
        let (drains, drain) = channel();
        let (slowed, slow) = channel();
        let error = std::thread::scope(|scope| {
            let (opened, bandwidth) = (&opened, &bandwidth);
            let canceller = scope.spawn(move || {
                drain.recv().unwrap();
                let mut control = opened.guest.control();
                set_bandwidth(&mut control, &json!(1 << 20));
                slowed.send(()).unwrap();
                let transferred = |control: &mut Client| {
                    let migration = run(control, "query-migrate", json!({}));
                    assert_eq!(migration["status"], "active");
                    migration["ram"]["transferred"].as_u64().unwrap()
                };
                let first = transferred(&mut control);
                wait_for(DEADLINE, || (transferred(&mut control) > first).then_some(()))
                    .expect("memory drains");
                opened.handle.cancel().unwrap();
                // Where QEMU cannot be told to end the migration, the bandwidth is restored to keep
                // the wait short.
                set_bandwidth(&mut control, bandwidth);
            });
            let mut observer = At(|phase| {
                if phase == Phase::Drain {
                    drains.send(()).unwrap();
                    slow.recv().unwrap();
                }
            });
            let error = opened
                .handle
                .create(&named("s"), INSTANTLY, &mut observer)
                .expect_err("it was cancelled");
            canceller.join().unwrap();
            error
        });
        assert_eq!(error.code, Code::OperationAborted, "{error}");
        assert!(!error.message.contains(';'), "{error}");
        assert_untouched(&opened, &before);
        opened.assert_well();
    }
}

#[test]
fn cancel_is_refused_without_a_running_snapshot() {
    let binary = &Binary::all()[0];
    let opened = Opened::start(&machine(binary, 1));
    let nothing = "no snapshot of this guest is being taken";
    assert_error(opened.handle.cancel(), Code::OperationInvalid, nothing);
    opened.snapshot("s").unwrap();
    assert_error(opened.handle.cancel(), Code::OperationInvalid, nothing);
    // The next snapshot is not cancelled by the earlier call.
    opened.assert_well();
}

/// Another handle of the same guest, by this socket, with a state directory of its own.
fn another_handle(guest: &Guest, socket: &str) -> Handle {
    let state = guest.directory().join(format!("state-of-{socket}"));
    std::fs::create_dir_all(&state).unwrap();
    Handle::open_qmp(&guest.directory().join(socket), None, &state).unwrap()
}

#[test]
fn second_snapshot_of_the_same_guest_is_refused_at_once() {
    for binary in Binary::some() {
        let opened = Opened::start(&machine(binary, 2));
        // Only the driver may connect to a driver's socket.
        let sockets =
            if by_driver() { &["control.sock"][..] } else { &["qmp.sock", "control.sock"] };
        let others: Vec<_> =
            sockets.iter().map(|socket| another_handle(&opened.guest, socket)).collect();
        let beside = opened.guest.directory();
        let mut tried = 0;
        let mut observer = At(|phase| {
            if phase == Phase::Validate {
                return; // The guest is not locked yet.
            }
            let own = (&opened.handle, "another snapshot of this guest is being taken");
            let others =
                others.iter().map(|handle| (handle, "another snapshot operation on the guest"));
            for (handle, busy) in others.chain([own]) {
                for flags in [INSTANTLY, 0] {
                    assert_error(
                        handle.create(&named("second"), flags, &mut ()),
                        Code::OperationInvalid,
                        busy,
                    );
                    tried += 1;
                }
            }
            // Opening the guest does not disturb the snapshot, and does not wait for it.
            drop(another_handle(&opened.guest, sockets[0]));
            assert!(!beside.join("disk-0.second").exists());
        });
        opened.handle.create(&named("first"), INSTANTLY, &mut observer).unwrap();
        assert_eq!(tried, 7 * 2 * (others.len() + 1));
        opened.guest.wait_ticks(ALL_SECTORS);
        opened.restore_clone("first");
        // The other handles can take their snapshots now.
        for handle in &others {
            assert_eq!(handle.store().unwrap().list().unwrap(), []);
            handle.create(&named(&format!("{:p}", handle)), INSTANTLY, &mut ()).unwrap();
        }
        opened.guest.wait_ticks(ALL_SECTORS);
    }
}

/// Cancelling by one handle does not cancel the snapshot of another handle.
#[test]
fn name_of_a_cancelled_snapshot_can_be_used_again() {
    let binary = &Binary::all()[0];
    let opened = Opened::start(&machine(binary, 1));
    let other = another_handle(&opened.guest, "qmp.sock");
    let mut observer = At(|phase| {
        if phase == Phase::Drain {
            assert_error(other.cancel(), Code::OperationInvalid, "no snapshot");
            opened.handle.cancel().unwrap();
        }
    });
    let result = opened.handle.create(&named("s"), INSTANTLY, &mut observer);
    assert_error(result, Code::OperationAborted, "cancelled");
    opened.snapshot("s").unwrap();
    opened.restore_clone("s");
}
