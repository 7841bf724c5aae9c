// SPDX-License-Identifier: LGPL-2.1-or-later

//! At random under libvirt: while a snapshot is taken, other clients of the daemon use virsh on the
//! domain, as administrators, management programs and backup jobs do. Whether the snapshot succeeds
//! or not, the guest counts on; a snapshot that succeeded can be restored, and one that failed
//! leaves nothing.
//!
//! `INSTANTSNAP_TEST_LONG` takes 1,000 snapshots, or as many as there is time for.
//! `common/src/random_clients.rs` says how to repeat a run.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use common::random_clients::{
    Extent, Random, TimedAction, When, assert_counts, assert_no_files, rounds, run_with_actions,
};
use common::virt::OpenedDomain;
use common::{At, PHASES, machine};
use instantsnap::engine::Phase;
use instantsnap::error::Error;
use instantsnap_testkit::{Binary, DEADLINE, Daemon, test, thorough, wait_for};
use serde_json::{Value, json};

const EXTENT: Extent =
    Extent { snapshots: 1000, time: Duration::from_secs(15 * 60), rounds: 10, rounds_short: 5 };

/// What another client does.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Action {
    Reset,
    Suspend,
    Resume,
    SuspendAndResume,
    SaveAndRestore,
    Resize,
    Attach,
    Detach,
    /// Takes a disk snapshot that libvirt does not record.
    Overlay,
    /// Merges the active image of a disk into the one below, or into the lowest.
    Commit,
    CommitAll,
    AbortJob,
    DestroyAndStart,
}

const FREQUENT_ACTIONS: [Action; 12] = [
    Action::Reset,
    Action::Suspend,
    Action::Resume,
    Action::SuspendAndResume,
    Action::SaveAndRestore,
    Action::Resize,
    Action::Attach,
    Action::Detach,
    Action::Overlay,
    Action::Commit,
    Action::CommitAll,
    Action::AbortJob,
];

fn random_action(random: &mut Random) -> TimedAction<Action> {
    let what = match random.below(30) {
        0 => Action::DestroyAndStart,
        _ => random.one_of(&FREQUENT_ACTIONS),
    };
    let phase = random.one_of(&PHASES);
    let when = match what {
        // In the last moment before QEMU captures the guest a reset would end QEMU
        // (docs/how-it-works.md).
        Action::Reset => When::In(phase),
        _ => When::random(random, phase, Duration::from_millis(50)),
    };
    TimedAction { what, when }
}

/// What the other clients have done in a round.
#[derive(Debug, Default)]
struct Done {
    suspended: bool,
    /// A merge can have destroyed the images of a snapshot that was already complete.
    merged: bool,
    size: Option<u64>,
    /// The other client's error where it could not restore the guest.
    lost: Option<String>,
}

/// A domain, and another client of its daemon.
struct DisturbedDomain {
    domain: OpenedDomain,
    /// Another daemon, in which snapshots are restored.
    clones: Daemon,
    others: AtomicUsize,
    size: u64,
    /// Set when the snapshot checks, or is about to check, its images for the last time.
    ends: AtomicBool,
}

impl DisturbedDomain {
    fn start(binary: &'static Binary, daemon: &Daemon, random: &mut Random) -> DisturbedDomain {
        let mut machine = machine(binary, 2).edit_xml(|xml| {
            xml.replace("<on_reboot>destroy<", "<on_reboot>restart<").replace(
                "<controller type='usb' model='none'/>",
                "<controller type='usb' model='piix3-uhci'/>",
            )
        });
        if random.below(2) == 0 {
            machine = machine.restless();
        }
        let domain = OpenedDomain::start(&machine, daemon);
        let size = size_of(&domain);
        DisturbedDomain {
            domain,
            clones: daemon.another(),
            others: AtomicUsize::new(0),
            size,
            ends: AtomicBool::new(false),
        }
    }

    fn act(&self, action: TimedAction<Action>, done: &mut Done) {
        let guest = &self.domain.guest;
        let directory = guest.directory();
        let run = |command: &str, args: &[&str]| {
            let said = guest.daemon().try_virsh(&[&[command, guest.name()], args].concat());
            eprintln!(
                "  {command} {args:?}: {:?}",
                said.as_ref().map(|said| said.trim()).map_err(|said| said.trim())
            );
            said.is_ok()
        };
        // Operations that other clients start during an undo have to wait for its merge.
        let retry = |args: &[&str]| {
            let mut said = Err(String::new());
            wait_for(DEADLINE, || {
                said = guest.daemon().try_virsh(args);
                said.is_ok().then_some(())
            });
            eprintln!("  {args:?}: {said:?}");
            said.err().map(|error| format!("virsh {args:?}: {error}"))
        };
        match action.what {
            Action::Reset => drop(run("reset", &[])),
            Action::Suspend => done.suspended |= run("suspend", &[]),
            Action::Resume => drop(run("resume", &[])),
            Action::SuspendAndResume => {
                if run("suspend", &[]) {
                    done.suspended |= !run("resume", &[]);
                }
            }
            Action::SaveAndRestore => {
                let file = directory.join("saved");
                let file = file.to_str().unwrap();
                if run("save", &[file]) {
                    done.lost = retry(&["restore", file, "--running"]);
                }
            }
            Action::Resize => {
                let size = done.size.unwrap_or(self.size) + (1 << 20);
                if run("blockresize", &["vda", &format!("{size}B")]) {
                    done.size = Some(size);
                }
            }
            Action::Attach | Action::Detach => {
                let file = directory.join("others.xml");
                std::fs::write(&file, "<input type='tablet' bus='usb'/>").unwrap();
                let command =
                    if action.what == Action::Attach { "attach-device" } else { "detach-device" };
                run(command, &[file.to_str().unwrap()]);
            }
            Action::Overlay => {
                let name = format!("others-{}", self.others.fetch_add(1, Ordering::Relaxed));
                run("snapshot-create-as", &[&name, "--disk-only", "--no-metadata"]);
            }
            Action::Commit | Action::CommitAll => {
                let mut args = vec!["vda", "--active", "--pivot", "--wait"];
                args.extend((action.what == Action::Commit).then_some("--shallow"));
                let merged = run("blockcommit", &args);
                let beside = matches!(action.when, When::After(..));
                done.merged |= merged && beside && self.ends.load(Ordering::Relaxed);
            }
            Action::AbortJob => drop(run("domjobabort", &[])),
            Action::DestroyAndStart => {
                if run("destroy", &[]) {
                    done.lost = retry(&["start", guest.name()]);
                }
            }
        }
    }

    /// Takes one snapshot.
    fn round(&mut self, name: &str, actions: &[TimedAction<Action>], what: &str) {
        eprintln!("{what}");
        let mut done = Done::default();
        self.ends.store(false, Ordering::Relaxed);
        let begun = run_with_actions(
            actions,
            |action| self.act(action, &mut done),
            |at| {
                let mut observer = At(|phase| {
                    self.ends.fetch_or(phase == Phase::Finish, Ordering::Relaxed);
                    at(phase);
                });
                let begun = self.domain.snapshot_observed(name, &mut observer);
                self.ends.store(true, Ordering::Relaxed);
                begun
            },
        );
        eprintln!("  {}", begun.as_ref().map_or_else(ToString::to_string, |_| "good".into()));
        self.assert_guest_is_well(&done, what);
        self.size = done.size.unwrap_or(self.size);
        match begun {
            Ok(_) => self.assert_whole(name, &done, what),
            Err(error) => self.assert_no_trace(name, &error, what),
        }
    }

    fn assert_guest_is_well(&self, done: &Done, what: &str) {
        let guest = &self.domain.guest;
        if let Some(error) = &done.lost {
            guest.fail(&format!("{what}: the guest is lost: {error}"));
        }
        let state = guest.virsh("domstate", &[]).trim().to_owned();
        match &*state {
            "running" => {}
            "paused" if done.suspended => drop(guest.virsh("resume", &[])),
            _ => guest.fail(&format!("{what}: the guest is left {state}")),
        }
        let mut control = guest.control();
        let mut ask = |command: &str| control.execute(command, json!({})).unwrap();
        // libvirt's state of the domain and QEMU's must agree.
        assert_eq!(ask("query-status")["running"], true, "{what}");
        let capabilities = ask("query-migrate-capabilities");
        let background = |capability: &&Value| capability["capability"] == "background-snapshot";
        let background = capabilities.as_array().unwrap().iter().find(background).unwrap();
        assert_eq!(background["state"], false, "{what}");
        let parameters = ask("query-migrate-parameters");
        assert_eq!(
            (&parameters["tls-creds"], &parameters["tls-hostname"]),
            (&json!(""), &json!("")),
            "{what}"
        );
        assert_eq!(ask("query-block-jobs"), json!([]), "{what}");
        drop(control);
        assert_counts(guest, what);
        if let Some(size) = done.size {
            assert_eq!(
                size_of(&self.domain),
                size,
                "{what}: what others have resized has another size"
            );
        }
    }

    /// Restores a snapshot in the other daemon, and waits until that daemon has dropped the domain.
    fn assert_whole(&self, name: &str, done: &Done, what: &str) {
        assert!(
            self.domain.find(name).is_some(),
            "{what}: it is reported as good, and not recorded"
        );
        if done.merged {
            return eprintln!("  others have merged its images since");
        }
        let clone = self.clones.restore(&self.domain.guest, &self.domain.memory_file(name));
        if clone.virsh("domstate", &[]).trim() == "paused" {
            clone.virsh("resume", &[]);
        }
        assert_counts(&clone, &format!("{what}: brought back"));
        drop(clone);
        let forgotten = || self.clones.virsh(&["list", "--name"]).trim().is_empty().then_some(());
        wait_for(DEADLINE, forgotten).expect("the clone is gone");
    }

    /// Asserts that nothing is left of a failed snapshot but what the error names.
    fn assert_no_trace(&self, name: &str, error: &Error, what: &str) {
        assert!(self.domain.find(name).is_none(), "{what}: it is recorded");
        let directory = self.domain.guest.directory();
        assert_no_files(directory, name, &error.message, what);
        let overlay = format!(".{name}");
        let named =
            |line: &&str| line.ends_with(&overlay) && !error.message.contains(last_word(line));
        let disks = self.domain.guest.virsh("domblklist", &["--inactive"]);
        assert_eq!(disks.lines().find(named), None, "{what}: it starts from an overlay");
    }
}

fn last_word(line: &str) -> &str {
    line.split_whitespace().next_back().unwrap_or_default()
}

fn size_of(domain: &OpenedDomain) -> u64 {
    let info = domain.guest.virsh("domblkinfo", &["vda"]);
    let capacity =
        info.lines().find_map(|line| line.strip_prefix("Capacity:")).expect("a capacity");
    capacity.trim().parse().expect("a number")
}

#[test]
fn random_actions_of_other_libvirt_clients_tear_nothing_and_lose_no_guest() {
    let long = thorough();
    rounds(Binary::under_libvirt(), &EXTENT, |binary, seed, rounds| {
        let daemons = if long { Daemon::all() } else { vec![Daemon::session()] };
        // The daemons take turns.
        let daemon = &daemons[rounds.start / EXTENT.rounds % daemons.len()];
        let mut disturbed =
            DisturbedDomain::start(binary, daemon, &mut Random::of_round(seed, rounds.start));
        for round in rounds {
            let mut random = Random::of_round(seed, round);
            let actions: Vec<_> =
                (0..1 + random.below(2)).map(|_| random_action(&mut random)).collect();
            let mode = daemon.mode();
            let what =
                format!("{}, {mode:?}, seed {seed}, round {round}, {actions:?}", binary.name);
            disturbed.round(&format!("s{round}"), &actions, &what);
        }
    });
}
