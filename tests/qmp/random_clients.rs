// SPDX-License-Identifier: LGPL-2.1-or-later

//! At random: while a snapshot is taken, other clients of the same QEMU do what administrators,
//! management programs and backup jobs do. Whether the snapshot succeeds or not, the guest counts
//! on; a snapshot that succeeded can be restored, and one that failed leaves nothing.
//!
//! `INSTANTSNAP_TEST_LONG` takes 1,000 snapshots, or as many as there is time for.
//! `common/src/random_clients.rs` says how to repeat a run.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use common::random_clients::{
    Extent, Random, TimedAction, When, assert_counts, assert_no_files, rounds, run_with_actions,
};
use common::{At, INSTANTLY, Opened, backend, block_of, machine, named};
use instantsnap::engine::{EarlyStart, Phase, prepare_revert};
use instantsnap::error::Error;
use instantsnap::model::flags::revert;
use instantsnap_testkit::{Binary, Client, DEADLINE, Format, Guest, test, thorough, wait_for};
use serde_json::{Value, json};

const EXTENT: Extent =
    Extent { snapshots: 1000, time: Duration::from_secs(30 * 60), rounds: 10, rounds_short: 4 };

/// What another client does.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Action {
    Reset,
    Cont,
    Stop,
    StopAndCont,
    /// Saves the guest into a file, as `virsh save` does.
    Save,
    Resize,
    Plug,
    Unplug,
    /// Takes a disk snapshot of its own.
    Overlay,
    Cancel,
    Capability,
    Kill,
}

const FREQUENT_ACTIONS: [Action; 9] = [
    Action::Cont,
    Action::Stop,
    Action::StopAndCont,
    Action::Save,
    Action::Resize,
    Action::Plug,
    Action::Unplug,
    Action::Overlay,
    Action::Capability,
];

const PHASES: [Phase; 7] = [
    Phase::Validate,
    Phase::Plan,
    Phase::Prepare,
    Phase::Pause,
    Phase::Switch,
    Phase::Arm,
    Phase::Drain,
];

fn random_action(random: &mut Random, can_cancel: bool, long: bool) -> TimedAction<Action> {
    let what = match random.below(40) {
        0 => Action::Kill,
        // QEMU 10.0 sometimes does not finish a reset, too seldom for the short run.
        3..7 if long => Action::Reset,
        // QEMU 7.2 itself freezes a guest whose background snapshot is cancelled, and QEMU 10.0
        // closes an unrelated descriptor where write tracking is not armed yet.
        1..3 if can_cancel => Action::Cancel,
        _ => random.one_of(&FREQUENT_ACTIONS),
    };
    let phase = if what == Action::Cancel { Phase::Drain } else { random.one_of(&PHASES) };
    TimedAction { what, when: When::random(random, phase, Duration::from_millis(20)) }
}

/// What the other clients have done in a round.
#[derive(Debug, Default)]
struct Done {
    stopped: bool,
    saved: bool,
    plugged: bool,
    killed: bool,
    size: Option<u64>,
}

/// A guest that is opened by its socket, and another client of its QEMU.
struct DisturbedGuest {
    opened: Opened,
    others: AtomicUsize,
    size: u64,
}

impl DisturbedGuest {
    fn start(binary: &'static Binary, random: &mut Random) -> DisturbedGuest {
        let mut machine = machine(binary, 2).arg("-device").arg("piix3-usb-uhci,id=usb");
        // A reset must not end QEMU. SeaBIOS makes two resets of one, and the second can come after
        // the instant.
        machine = machine.arg("-action").arg("reboot=reset");
        if random.below(2) == 0 {
            machine = machine.restless();
        }
        let opened = Opened::start(&machine);
        let size = size_of(&opened.guest);
        DisturbedGuest { opened, others: AtomicUsize::new(0), size }
    }

    fn act(&self, what: Action, done: &mut Done) {
        let guest = &self.opened.guest;
        if what == Action::Kill {
            done.killed = true;
            return guest.kill();
        }
        if !guest.alive() {
            return;
        }
        let Ok(mut control) = Client::connect(&guest.directory().join("control.sock")) else {
            return;
        };
        let mut say = |command: &str, arguments: Value| control.execute(command, arguments);
        match what {
            Action::Reset => drop(say("system_reset", json!({}))),
            Action::Cont => drop(say("cont", json!({}))),
            Action::Stop => done.stopped |= say("stop", json!({})).is_ok(),
            Action::StopAndCont => {
                let _ = say("stop", json!({}));
                let _ = say("cont", json!({}));
            }
            Action::Save => {
                let file = guest.directory().join("saved");
                let uri = format!("exec:cat > {}", file.display());
                if say("migrate", json!({ "uri": uri })).is_ok() {
                    done.saved = true;
                    let ended = || match say("query-migrate", json!({})) {
                        Ok(migration) => {
                            let status = migration["status"].as_str().unwrap_or_default();
                            ["completed", "failed", "cancelled"].contains(&status).then_some(())
                        }
                        Err(_) => Some(()),
                    };
                    let _ = wait_for(DEADLINE, ended);
                    let _ = say("cont", json!({}));
                }
            }
            Action::Resize => {
                let size = done.size.unwrap_or(self.size) + (1 << 20);
                if say("block_resize", json!({ "device": "drive-0", "size": size })).is_ok() {
                    done.size = Some(size);
                }
            }
            Action::Plug => {
                let device =
                    json!({ "driver": "usb-tablet", "bus": "usb.0", "port": "1", "id": "others" });
                done.plugged |= say("device_add", device).is_ok();
            }
            Action::Unplug => drop(say("device_del", json!({ "id": "others" }))),
            Action::Overlay => {
                let number = self.others.fetch_add(1, Ordering::Relaxed);
                let file = guest.directory().join(format!("others-{number}.qcow2"));
                let _ = say(
                    "blockdev-snapshot-sync",
                    json!({ "device": "drive-1", "snapshot-file": file }),
                );
            }
            Action::Cancel => drop(say("migrate_cancel", json!({}))),
            Action::Capability => {
                let capabilities = json!([{ "capability": "background-snapshot", "state": false }]);
                let _ = say("migrate-set-capabilities", json!({ "capabilities": capabilities }));
            }
            Action::Kill => unreachable!("done above"),
        }
    }

    /// Takes one snapshot. Returns whether the guest can take another.
    fn round(&mut self, name: &str, actions: &[TimedAction<Action>], what: &str) -> bool {
        let mut done = Done::default();
        let opened = &self.opened;
        let begun = run_with_actions(
            actions,
            |action| self.act(action.what, &mut done),
            |at| opened.handle.create(&named(name), INSTANTLY, &mut At(at)),
        );
        eprintln!("{what}: {}", begun.as_ref().map_or_else(ToString::to_string, |_| "good".into()));
        let guest = &opened.guest;
        if actions.iter().any(|action| action.what == Action::Reset) && ended_by_reset(guest) {
            // The reset came in the last moment before QEMU captured the guest:
            // docs/how-it-works.md.
            eprintln!("  QEMU was ended by the reset");
            done.killed = true;
        }
        if !done.killed {
            self.assert_guest_is_well(&done, what);
            self.size = done.size.unwrap_or(self.size);
        }
        match begun {
            Ok(_) => assert_whole(opened, name, &done, what),
            Err(error) => assert_no_trace(opened, name, &error, what),
        }
        guest.alive()
    }

    fn assert_guest_is_well(&self, done: &Done, what: &str) {
        let guest = &self.opened.guest;
        if !guest.alive() {
            guest.fail(&format!("{what}: the guest is lost"));
        }
        let mut control = guest.control();
        let mut ask = |command: &str| control.execute(command, json!({})).unwrap();
        let status = ask("query-status");
        if status["running"] == false {
            if !done.stopped && !done.saved {
                guest.fail(&format!("{what}: the guest is left paused"));
            }
            ask("cont");
        }
        let capabilities = ask("query-migrate-capabilities");
        let on = |capability: &&Value| capability["state"] == true;
        assert_eq!(capabilities.as_array().unwrap().iter().find(on), None, "{what}");
        assert_eq!(ask("query-migrate-parameters")["tls-creds"], "", "{what}");
        assert_eq!(ask("query-block-jobs"), json!([]), "{what}");
        let _ = control.execute("device_del", json!({ "id": "others" }));
        drop(control);
        assert_counts(guest, what);
        if let Some(size) = done.size {
            assert_eq!(size_of(guest), size, "{what}: what others have resized has another size");
        }
    }
}

/// QEMU aborts when it has to capture a guest in the state that a reset leaves it in.
fn ended_by_reset(guest: &Guest) -> bool {
    let said = std::fs::read_to_string(guest.directory().join("stderr.log")).unwrap_or_default();
    !guest.alive() && said.contains("invalid runstate transition: 'prelaunch' -> 'paused'")
}

fn size_of(guest: &Guest) -> u64 {
    block_of(guest, "vd0")["inserted"]["image"]["virtual-size"].as_u64().unwrap()
}

/// Restores a snapshot on a machine that has the devices which other clients have plugged in.
fn assert_whole(opened: &Opened, name: &str, done: &Done, what: &str) {
    let plain = opened.guest.machine().clone();
    let plugged = plain.clone().arg("-device").arg("usb-tablet,bus=usb.0,port=1,id=others");
    let machines = if done.plugged { vec![plain, plugged] } else { vec![plain] };
    let mut refused = Vec::new();
    for machine in machines {
        let plan = prepare_revert(&opened.state_dir(), name, None)
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        let disks: Vec<_> =
            plan.disks.iter().map(|disk| (disk.file.clone(), Format::Qcow2)).collect();
        let clone = machine.for_revert(&disks).start();
        let handle = backend::open_guest(&clone, &clone.qmp(), None, &opened.state_dir()).unwrap();
        let loaded = handle.load(name, revert::RUNNING);
        if loaded.is_ok() {
            assert_counts(&clone, &format!("{what}: brought back"));
        }
        drop((handle, clone));
        plan.discard();
        match loaded {
            Ok(()) => return,
            Err(error) => refused.push(error.message),
        }
    }
    panic!("{what}: it is reported as good, and cannot be brought back: {refused:?}");
}

/// Asserts that nothing is left of a failed snapshot but what the error names.
fn assert_no_trace(opened: &Opened, name: &str, error: &Error, what: &str) {
    let names = opened.handle.snapshot_list().names().unwrap();
    assert!(!names.iter().any(|other| other == name), "{what}: it is recorded");
    assert_no_files(opened.guest.directory(), name, &error.message, what);
}

/// QEMU then saves memory by an ordinary migration, during which the guest runs, and stops the
/// guest at its end.
#[test(long)]
fn capability_disabled_by_another_client_leaves_no_guest_paused() {
    for binary in Binary::some() {
        for restless in [false, true] {
            let machine = machine(binary, 2);
            let opened = Opened::start(&if restless { machine.restless() } else { machine });
            let before = opened.trace();
            let result = opened.handle.create(
                &named("s"),
                INSTANTLY,
                &mut At(|phase| {
                    if phase == Phase::Switch {
                        let off = json!({ "capabilities": [{ "capability": "background-snapshot", "state": false }] });
                        opened.guest.control().execute("migrate-set-capabilities", off).unwrap();
                    }
                }),
            );
            // All of memory can be saved before the guest is resumed, and then the snapshot is
            // good.
            match result {
                Ok(_) => drop(opened.restore_clone("s")),
                Err(error) => {
                    eprintln!("{}: {error}", binary.name);
                    common::assert_untouched(&opened, &before);
                }
            }
            opened.guest.wait_ticks(3);
        }
    }
}

/// QEMU stops a running guest before it captures it, and waits until its CPUs have stopped. It
/// waits forever where another client's `cont` resumes them before QEMU's thread has seen the stop.
#[test(long)]
fn cont_of_another_client_at_the_capture_leaves_no_hanging_migration() {
    let rounds = if thorough() { 60 } else { 3 };
    for binary in Binary::all().iter().filter(|binary| binary.version >= (9, 0, 0)) {
        let opened = Opened::start(&machine(binary, 2).cpus(2).append("dense=16 cpus=2"));
        // The stop is too late each time: QEMU begins to capture a running guest.
        opened
            .handle
            .set_early_start(EarlyStart { tries: 3, stop_after: Some(Duration::from_millis(100)) });
        opened.handle.set_pause_limit(Duration::from_secs(2));
        let settings =
            || opened.guest.control().execute("query-migrate-capabilities", json!({})).unwrap();
        let before = settings();
        for round in 0..rounds {
            let over = AtomicBool::new(false);
            let name = format!("s{round}");
            let result = std::thread::scope(|scope| {
                scope.spawn(|| {
                    let mut control = opened.guest.control();
                    while !over.load(Ordering::Relaxed) {
                        let status =
                            &control.execute("query-migrate", json!({})).unwrap()["status"];
                        if status == "active" || status == "setup" {
                            control.execute("cont", json!({})).unwrap();
                        }
                    }
                });
                let mut until_undone = At(|phase| {
                    if phase == Phase::Undo {
                        over.store(true, Ordering::Relaxed);
                    }
                });
                let result = opened.handle.create(&named(&name), INSTANTLY, &mut until_undone);
                over.store(true, Ordering::Relaxed);
                result
            });
            let what = format!("{}, round {round}", binary.name);
            eprintln!("{what}: {:?}", result.as_ref().map_err(ToString::to_string).map(drop));
            assert_counts(&opened.guest, &what);
            match result {
                Ok(_) => assert_whole(&opened, &name, &Done::default(), &what),
                Err(error) => {
                    assert!(!error.message.contains("does not come to its end"), "{what}: {error}");
                    assert_no_trace(&opened, &name, &error, &what);
                }
            }
            assert_eq!(settings(), before, "{what}");
        }
        opened.handle.set_early_start(EarlyStart::default());
        opened.assert_well();
    }
}

#[test(long)]
fn random_actions_of_other_qemu_clients_tear_nothing_and_lose_no_guest() {
    rounds(Binary::all(), &EXTENT, |binary, seed, rounds| {
        let long = thorough();
        let can_cancel = binary.name != Binary::all()[0].name;
        let mut disturbed =
            DisturbedGuest::start(binary, &mut Random::of_round(seed, rounds.start));
        for round in rounds {
            let mut random = Random::of_round(seed, round);
            let actions: Vec<_> = (0..1 + random.below(2))
                .map(|_| random_action(&mut random, can_cancel, long))
                .collect();
            let what = format!("{}, seed {seed}, round {round}, {actions:?}", binary.name);
            if !disturbed.round(&format!("s{round}"), &actions, &what) {
                break;
            }
        }
    });
}
