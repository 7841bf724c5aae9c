// SPDX-License-Identifier: LGPL-2.1-or-later

//! Another client of the same QEMU resets, resumes or saves the guest during a snapshot, or an
//! earlier snapshot's process and watchdog were killed. The tests cover the snapshot and QEMU, by
//! QMP and by a driver.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{At, INSTANTLY, Opened, assert_error, assert_says, machine, named, through_proxy};
use instantsnap::engine::{EarlyStart, Event, EventKind, Observer, Phase};
use instantsnap::error::Code;
use instantsnap_testkit::{
    Binary, Client, DEADLINE, Gate, Guest, Machine, test, thorough, wait_for,
};
use serde_json::{Map, Value, json};

const LOCK: &str = "instantsnap: a snapshot of this guest is being taken";

fn run(guest: &Guest, command: &str, arguments: Value) -> Value {
    guest.control().execute(command, arguments).unwrap_or_else(|error| panic!("{command}: {error}"))
}

fn status(control: &mut Client) -> String {
    control.execute("query-status", json!({})).unwrap()["status"].as_str().unwrap().to_owned()
}

/// A machine whose QEMU does not end at a reset.
fn resettable(binary: &'static Binary, disks: usize) -> Machine {
    machine(binary, disks).arg("-action").arg("reboot=reset")
}

/// Resets the guest as another client. QEMU carries the reset out a moment after its reply.
fn reset(guest: &Guest) {
    let mut control = guest.control();
    control.execute("system_reset", json!({})).unwrap();
    let reset = || (status(&mut control) == "prelaunch").then_some(());
    wait_for(DEADLINE, reset).expect("a guest that is paused is reset");
}

/// Waits until the guest's migration has this status.
fn wait_migration(guest: &Guest, status: &str) {
    // QEMU serves one client a socket at a time.
    let mut control = guest.control();
    let is_so =
        || (control.execute("query-migrate", json!({})).unwrap()["status"] == status).then_some(());
    wait_for(DEADLINE, is_so).unwrap_or_else(|| panic!("it does not become {status}"));
}

/// The number of pipes that the guest's QEMU has open.
fn pipes(guest: &Guest) -> usize {
    guest.open_files().get("pipe").copied().unwrap_or_default()
}

/// Waits until the guest's migration has completed and QEMU has closed the pipe: QEMU 7.2 ends
/// where a `migrate` comes in between.
fn wait_until_closed(guest: &Guest, others: usize) {
    wait_migration(guest, "completed");
    let has_closed = || (pipes(guest) <= others).then_some(());
    wait_for(DEADLINE, has_closed).expect("QEMU closes the pipe");
}

fn wait_for_migration_setup(control: &mut Client) {
    let sets_up = || {
        (control.execute("query-migrate", json!({})).unwrap()["status"] == "setup").then_some(())
    };
    wait_for(DEADLINE, sets_up).expect("the migration is begun");
}

/// Makes the library stop the guest first, whatever it has measured of it.
fn stop_first(opened: &Opened) {
    opened.handle.set_early_start(EarlyStart { tries: 0, stop_after: None });
}

#[test]
fn reset_in_the_pause_leaves_the_guest_running() {
    for binary in Binary::some() {
        for (flags, at) in [(INSTANTLY, Phase::Switch), (INSTANTLY, Phase::Arm), (0, Phase::Arm)] {
            eprintln!("{} {flags} {at:?}", binary.name);
            let opened = Opened::start(&resettable(binary, 2));
            let mut observer = At(|phase| {
                if phase == at {
                    reset(&opened.guest);
                }
            });
            let parts = ["the guest was reset in the pause of its snapshot"];
            opened.assert_fails_observed(
                &named("s"),
                flags,
                &mut observer,
                Code::OperationFailed,
                &parts,
            );
            opened.assert_well();
        }
    }
}

/// QEMU calls abort() where it has to capture a guest that is `prelaunch`.
#[test]
fn reset_during_migration_setup_leaves_qemu_and_its_guest() {
    for binary in Binary::some() {
        for runs in [true, false] {
            if !runs && binary.version < (10, 0, 0) {
                continue;
            }
            eprintln!("{} {runs}", binary.name);
            let opened =
                Opened::start(&resettable(binary, 1).long_setup(Duration::from_millis(500)));
            stop_first(&opened);
            if !runs {
                run(&opened.guest, "stop", json!({}));
            }
            let error = std::thread::scope(|scope| {
                scope.spawn(|| {
                    let mut control = opened.guest.control();
                    wait_for_migration_setup(&mut control);
                    control.execute("system_reset", json!({})).unwrap();
                });
                opened.snapshot("s").expect_err("it was reset")
            });
            assert_says(
                &error,
                Code::OperationFailed,
                &["the guest was reset in the pause of its snapshot"],
            );
            assert!(!error.message.contains(';'), "nothing is left: {error}");
            assert_eq!(
                status(&mut opened.guest.control()),
                if runs { "running" } else { "paused" }
            );
            if !runs {
                run(&opened.guest, "cont", json!({}));
            }
            opened.assert_well();
        }
    }
}

/// The migration has begun while the guest ran, so QEMU can capture the guest at any time.
#[test]
fn reset_after_the_stop_of_an_early_start_loses_one_try() {
    for binary in Binary::all().iter().filter(|binary| binary.version >= (10, 0, 0)) {
        let (opened, proxy) =
            through_proxy(&resettable(binary, 1).long_setup(Duration::from_millis(1000)));
        opened.handle.set_early_start(EarlyStart { tries: 1, stop_after: Some(Duration::ZERO) });
        std::thread::scope(|scope| {
            let stopped = proxy.hold_reply("stop", 1);
            let guest = &opened.guest;
            scope.spawn(move || {
                assert!(stopped.wait_arrived(DEADLINE));
                let _release = ReleaseOnDrop(&stopped);
                reset(guest);
            });
            opened.snapshot("s").unwrap();
        });
        let stats = opened.handle.stats().unwrap();
        assert_eq!((stats.lost, stats.started_early), (1, false));
        opened.restore_clone("s");
        // At a later reset the disks are on their overlays already.
        let mut observer = At(|phase| {
            if phase == Phase::Arm {
                reset(&opened.guest);
            }
        });
        let parts = ["the guest was reset in the pause of its snapshot"];
        opened.assert_fails_observed(
            &named("t"),
            INSTANTLY,
            &mut observer,
            Code::OperationFailed,
            &parts,
        );
        opened.assert_well();
    }
}

#[test]
fn guest_that_has_stopped_by_itself_is_not_captured() {
    for binary in Binary::some() {
        let panics = machine(binary, 1)
            .arg("-device")
            .arg("pvpanic,ioport=0x505")
            .arg("-action")
            .arg("panic=pause");
        let opened = Opened::start(&panics);
        stop_first(&opened);
        let mut panic = At(|phase| {
            if phase == Phase::Pause {
                run(
                    &opened.guest,
                    "human-monitor-command",
                    json!({ "command-line": "o/b 0x505 1" }),
                );
            }
        });
        let error =
            opened.handle.create(&named("s"), INSTANTLY, &mut panic).expect_err("it has panicked");
        assert_says(&error, Code::OperationFailed, &["its state is 'guest-panicked'"]);
        assert!(!error.message.contains(';'), "nothing is left: {error}");
        assert_eq!(status(&mut opened.guest.control()), "guest-panicked");
        run(&opened.guest, "cont", json!({}));
        opened.assert_well();
    }
}

/// Resumes the guest as another client, lets it write to its disks, and stops it again if `stop` is
/// set.
fn let_guest_write(guest: &Guest, stop: bool) {
    run(guest, "cont", json!({}));
    guest.wait_ticks(3);
    if stop {
        run(guest, "stop", json!({}));
    }
}

#[test]
fn guest_writes_in_the_pause_fail_the_snapshot() {
    for binary in Binary::some() {
        let opened = Opened::start(&machine(binary, 2));
        for (flags, stop, part) in [
            (INSTANTLY, true, "was written to in the pause"),
            (INSTANTLY, false, "in the pause"),
            (0, false, "another client has resumed the guest"),
        ] {
            eprintln!("{} {flags} {stop}", binary.name);
            let mut observer = At(|phase| {
                if phase == Phase::Arm {
                    let_guest_write(&opened.guest, stop);
                }
            });
            opened.assert_fails_observed(
                &named("s"),
                flags,
                &mut observer,
                Code::OperationFailed,
                &[part],
            );
        }
        // It does no harm before the disks are switched.
        let mut early = At(|phase| {
            if phase == Phase::Switch {
                let_guest_write(&opened.guest, true);
            }
        });
        opened.handle.create(&named("early"), INSTANTLY, &mut early).unwrap();
        opened.restore_clone("early");
    }
}

/// Opens the gate when it is dropped, also where a test fails.
struct ReleaseOnDrop<'a>(&'a Gate);

impl Drop for ReleaseOnDrop<'_> {
    fn drop(&mut self) {
        self.0.release();
    }
}

/// The guest of a non-live snapshot is paused until its memory is saved.
#[test]
fn guest_writes_while_memory_is_saved_fail_the_non_live_snapshot() {
    for binary in Binary::some() {
        let (opened, proxy) = through_proxy(&machine(binary, 2));
        for stop in [true, false] {
            std::thread::scope(|scope| {
                let begun = proxy.hold_reply("migrate", 1);
                let guest = &opened.guest;
                scope.spawn(move || {
                    assert!(begun.wait_arrived(DEADLINE));
                    let _release = ReleaseOnDrop(&begun);
                    // QEMU stops a running guest when it has saved it, and may be about to do so.
                    let _ = guest.control().execute("cont", json!({}));
                    wait_migration(guest, "completed");
                    // QEMU refuses `cont` for a moment longer.
                    let mut control = guest.control();
                    let runs = || control.execute("cont", json!({})).ok();
                    wait_for(DEADLINE, runs).expect("it runs again");
                    drop(control);
                    let_guest_write(guest, stop);
                });
                opened.assert_fails(
                    &named("s"),
                    0,
                    Code::OperationFailed,
                    &["was written to in the pause"],
                );
            });
        }
        opened.create(&named("plain"), 0).unwrap();
        opened.restore_clone("plain");
    }
}

/// Another client that saves the guest at a moment of a snapshot, and the reply that it gets.
struct Save<'a> {
    guest: &'a Guest,
    at: EventKind,
    /// The pipes that QEMU has besides the snapshot's.
    pipes: usize,
    told: Option<String>,
}

impl Save<'_> {
    fn save(&self) -> String {
        let mut control = self.guest.control();
        if let Err(error) = control.execute("migrate", json!({ "uri": "exec:cat >/dev/null" })) {
            return error["desc"].as_str().unwrap().to_owned();
        }
        let mut migration = || control.execute("query-migrate", json!({})).unwrap();
        let ended = || {
            let migration = migration();
            let status = migration["status"].as_str().unwrap();
            ["completed", "failed"].contains(&status).then_some(migration)
        };
        wait_for(DEADLINE, ended).expect("it ends").to_string()
    }
}

impl Observer for Save<'_> {
    fn event(&mut self, event: &Event) {
        if event.kind != self.at || self.told.is_some() {
            return;
        }
        if self.at == EventKind::Instant {
            // The snapshot's migration has ended, and the library may not know it yet.
            wait_until_closed(self.guest, self.pipes);
        }
        self.told = Some(self.save());
    }

    fn phase(&mut self, phase: Phase) {
        if phase == Phase::Finish && self.at == EventKind::Complete {
            self.told = Some(self.save());
        }
    }
}

/// Between the pause and the restoring of the settings the save would be a background snapshot,
/// which is torn with QEMU before 9.
#[test]
fn save_of_another_client_is_refused_until_settings_are_restored() {
    for binary in Binary::some() {
        let opened = Opened::start(&machine(binary, 2));
        // The last stands for the time after QEMU has reported the end of the snapshot's migration.
        for (n, at) in
            [EventKind::Paused, EventKind::Switched, EventKind::Instant, EventKind::Complete]
                .into_iter()
                .enumerate()
        {
            eprintln!("{} {at:?}", binary.name);
            let name = format!("s{n}");
            let pipes = pipes(&opened.guest);
            let mut save = Save { guest: &opened.guest, at, pipes, told: None };
            opened.handle.create(&named(&name), INSTANTLY, &mut save).unwrap();
            let told = save.told.expect("the moment came");
            assert!(told.contains(LOCK), "{} {at:?}: {told}", binary.name);
            if at == EventKind::Instant {
                opened.restore_clone(&name);
            }
        }
        opened.guest.wait_ticks(3);
        let told =
            Save { guest: &opened.guest, at: EventKind::Paused, pipes: 0, told: None }.save();
        assert!(told.contains("\"completed\""), "{told}");
    }
}

/// One of the saves comes when QEMU has saved memory and has not closed the pipe, which ends QEMU
/// 7.2.
#[test]
fn repeated_saves_of_another_client_do_not_harm_the_snapshot() {
    for binary in Binary::all().iter().filter(|binary| binary.version >= (10, 0, 0)) {
        let opened = Opened::start(&machine(binary, 2));
        for round in 0..if thorough() { 20 } else { 4 } {
            let name = format!("s{round}");
            let unlocked = AtomicBool::new(false);
            let told = std::thread::scope(|scope| {
                let save = || {
                    let mut control = opened.guest.control();
                    let mut told = BTreeSet::new();
                    while !unlocked.load(Ordering::Relaxed) {
                        let save =
                            control.execute("migrate", json!({ "uri": "exec:cat >/dev/null" }));
                        // QEMU reports some refusals only later.
                        told.extend(
                            save.err().map(|error| error["desc"].as_str().unwrap().to_owned()),
                        );
                    }
                    told
                };
                let (mut saves, mut told) = (None, BTreeSet::new());
                let mut observer = At(|phase| match phase {
                    Phase::Drain => saves = Some(scope.spawn(save)),
                    Phase::Finish => {
                        unlocked.store(true, Ordering::Relaxed);
                        told = saves.take().expect("memory has drained").join().unwrap();
                    }
                    _ => {}
                });
                let result = opened.handle.create(&named(&name), INSTANTLY, &mut observer);
                unlocked.store(true, Ordering::Relaxed);
                result.unwrap();
                told
            });
            eprintln!("{} {round}: {told:?}", binary.name);
            opened.guest.wait_ticks(1);
            opened.restore_clone(&name);
        }
        opened.assert_well();
    }
}

#[test]
fn migration_lock_is_lifted_after_the_capability_is_disabled() {
    for binary in Binary::any() {
        let (opened, proxy) = through_proxy(&machine(binary, 1));
        std::thread::scope(|scope| {
            // The lock is recorded, set, lifted and set again; after that the settings are
            // restored.
            let lifted = proxy.hold("migrate-set-parameters", 5);
            let guest = &opened.guest;
            scope.spawn(move || {
                assert!(lifted.wait_arrived(DEADLINE));
                let _release = ReleaseOnDrop(&lifted);
                let capabilities = run(guest, "query-migrate-capabilities", json!({}));
                let on =
                    |it: &Value| it["capability"] == "background-snapshot" && it["state"] == true;
                let is_on = capabilities.as_array().unwrap().iter().any(on);
                assert!(!is_on, "others would be let in while it is on");
            });
            opened.snapshot("s").unwrap();
        });
        // An undo that fails half way does not lift the lock.
        proxy.fail_every("migrate-set-capabilities", "not today");
        let mut fail = At(|_| ());
        assert_error(
            opened.handle.create(&named("t"), INSTANTLY, &mut fail),
            Code::ArgumentUnsupported,
            "not today",
        );
        proxy.mend("migrate-set-capabilities");
        opened.assert_well();
    }
}

/// Once the settings are restored, another client may have saved the guest, or migrated it to
/// another host where it runs. A snapshot that fails after that must not resume it here, nor change
/// the settings again.
#[test]
fn guest_migrated_by_another_client_is_not_resumed_by_undo() {
    for binary in Binary::any() {
        let (opened, proxy) = through_proxy(&machine(binary, 1));
        let guest = &opened.guest;
        let error = std::thread::scope(|scope| {
            // The last of these commands restores the settings.
            let restored = proxy.hold_reply("migrate-set-parameters", 5);
            let handle = &opened.handle;
            scope.spawn(move || {
                assert!(restored.wait_arrived(DEADLINE));
                let _release = ReleaseOnDrop(&restored);
                let told = Save { guest, at: EventKind::Paused, pipes: 0, told: None }.save();
                assert!(told.contains("\"completed\""), "{told}");
                run(guest, "migrate-set-parameters", json!({ "tls-hostname": "theirs" }));
                handle.cancel().unwrap();
            });
            opened.snapshot("s").unwrap_err()
        });
        assert!(error.message.contains("cancelled"), "{}", error.message);
        assert_eq!(status(&mut guest.control()), "postmigrate", "{}", binary.name);
        let parameters = run(guest, "query-migrate-parameters", json!({}));
        assert_eq!(parameters["tls-hostname"], "theirs", "{}", binary.name);
    }
}

/// The settings that a snapshot changes in QEMU.
#[derive(Clone, Debug, Default, PartialEq)]
struct Settings {
    capabilities: Value,
    parameters: Map<String, Value>,
}

impl Settings {
    fn of(guest: &Guest) -> Settings {
        let parameters =
            run(guest, "query-migrate-parameters", json!({})).as_object().unwrap().clone();
        Settings { capabilities: run(guest, "query-migrate-capabilities", json!({})), parameters }
    }

    /// Sets the parameters and capabilities that differ.
    fn set(&self, guest: &Guest) {
        let now = Settings::of(guest);
        let changed =
            self.parameters.iter().filter(|(name, value)| now.parameters[*name] != **value);
        let parameters: Map<_, _> =
            changed.map(|(name, value)| (name.clone(), value.clone())).collect();
        run(guest, "migrate-set-capabilities", json!({ "capabilities": self.capabilities }));
        run(guest, "migrate-set-parameters", Value::Object(parameters));
    }
}

/// A snapshot whose process and watchdog were killed leaves its settings in QEMU, together with a
/// note of the previous ones. The next snapshot restores those previous settings, not the ones that
/// it finds.
#[test]
fn settings_left_by_a_killed_snapshot_are_not_taken_for_the_users() {
    for binary in Binary::some() {
        let opened = Opened::start(&machine(binary, 1));
        let guest = &opened.guest;
        let own = json!([{ "capability": "xbzrle", "state": true }, { "capability": "release-ram", "state": true }]);
        run(guest, "migrate-set-capabilities", json!({ "capabilities": own }));
        run(
            guest,
            "migrate-set-parameters",
            json!({ "tls-hostname": "theirs", "max-bandwidth": 1 << 26 }),
        );
        let before = Settings::of(guest);
        for (n, (flags, at)) in
            [(INSTANTLY, Phase::Pause), (INSTANTLY, Phase::Drain), (0, Phase::Switch)]
                .into_iter()
                .enumerate()
        {
            eprintln!("{} {flags} {at:?}", binary.name);
            let mut left = Settings::default();
            let mut look = At(|phase| {
                if phase == at {
                    left = Settings::of(guest);
                }
            });
            opened.handle.create(&named(&format!("first-{n}")), flags, &mut look).unwrap();
            assert_eq!(Settings::of(guest), before);
            assert_ne!(left, before);
            left.set(guest);
            assert_eq!(Settings::of(guest), left);
            // The same where the next snapshot fails.
            if n == 0 {
                let mut cancel = At(|phase| {
                    if phase == Phase::Plan {
                        opened.handle.cancel().unwrap();
                    }
                });
                let result = opened.handle.create(&named("s"), INSTANTLY, &mut cancel);
                assert_error(result, Code::OperationAborted, "cancelled");
            } else {
                opened.snapshot(&format!("next-{n}")).unwrap();
                opened.restore_clone(&format!("next-{n}"));
            }
            assert_eq!(Settings::of(guest), before);
        }
        // A user may have enabled the capability by QMP, and it stays enabled.
        run(
            guest,
            "migrate-set-capabilities",
            json!({ "capabilities": [{ "capability": "xbzrle", "state": false },
                { "capability": "release-ram", "state": false }, { "capability": "background-snapshot", "state": true }] }),
        );
        let before = Settings::of(guest);
        opened.snapshot("theirs").unwrap();
        assert_eq!(Settings::of(guest), before);
    }
}

/// Another client has begun a migration after the end of the snapshot's. The library must not wait
/// for it or cancel it.
#[test]
fn migration_of_another_client_is_not_taken_for_the_snapshots() {
    for binary in Binary::some() {
        let (opened, proxy) = through_proxy(&machine(binary, 1));
        let guest = &opened.guest;
        let mut begin = At(|phase| {
            if phase == Phase::Drain {
                wait_migration(guest, "completed");
                // The other client ignores the lock.
                run(
                    guest,
                    "migrate-set-parameters",
                    json!({ "tls-creds": "", "max-bandwidth": 1 << 12 }),
                );
                let off = json!([{ "capability": "background-snapshot", "state": false }]);
                run(guest, "migrate-set-capabilities", json!({ "capabilities": off }));
                run(guest, "migrate", json!({ "uri": "exec:cat >/dev/null" }));
            }
        });
        let error = opened
            .handle
            .create(&named("s"), INSTANTLY, &mut begin)
            .expect_err("not known to be saved");
        assert_says(&error, Code::OperationFailed, &["another client", "begun a migration"]);
        let migration = run(guest, "query-migrate", json!({}));
        assert!(
            ["setup", "active"].contains(&migration["status"].as_str().unwrap()),
            "{migration}"
        );
        run(guest, "migrate_cancel", json!({}));
        wait_migration(guest, "cancelled");
        run(guest, "migrate-set-parameters", json!({ "max-bandwidth": 1 << 27 }));
        assert!(!proxy.commands().iter().any(|command| command == "migrate_cancel"));
        opened.assert_well();
    }
}

/// At the moment at which the lock is lifted for the snapshot's migration, another client can begin
/// to save the guest. Its save is a background snapshot, and QEMU before 9 resumes the guest as
/// soon as write tracking is armed. What the guest writes after that is not in the save.
#[test]
fn guest_stays_paused_while_another_clients_save_runs_in_place_of_ours() {
    for binary in Binary::some() {
        let (opened, proxy) = through_proxy(&machine(binary, 2).append("dense=16"));
        let guest = &opened.guest;
        stop_first(&opened);
        let saved = guest.directory().join("saved");
        let ours = proxy.hold("migrate", 1);
        let slow =
            |bytes: u64| run(guest, "migrate-set-parameters", json!({ "max-bandwidth": bytes }));
        let error = std::thread::scope(|scope| {
            let snapshot = scope.spawn(|| opened.handle.create(&named("s"), INSTANTLY, &mut ()));
            assert!(ours.wait_arrived(DEADLINE));
            run(guest, "migrate", json!({ "uri": format!("exec:cat > {}", saved.display()) }));
            slow(1 << 20);
            wait_migration(guest, "active");
            ours.release();
            let looks = || {
                (proxy.commands().iter().filter(|said| *said == "query-migrate").count() > 5)
                    .then_some(())
            };
            wait_for(DEADLINE, looks).expect("the undo waits for the other client");
            assert_eq!(status(&mut guest.control()), "paused", "{}", binary.name);
            slow(1 << 27);
            snapshot.join().unwrap().expect_err("the guest is saved by another client")
        });
        assert_says(&error, Code::OperationFailed, &["cannot start saving memory"]);
        wait_migration(guest, "completed");
        opened.assert_well();
        guest.wait_ticks(3);
    }
}
