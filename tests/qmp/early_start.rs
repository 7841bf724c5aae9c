// SPDX-License-Identifier: LGPL-2.1-or-later

//! P1, P2: memory is touched while the guest runs, and whatever comes of the race for the guest's
//! stop, the snapshot is of one moment.

use std::os::unix::fs::FileExt;
use std::time::Duration;

use common::virt::OpenedDomain;
use common::{At, INSTANTLY, Opened, assert_untouched, machine, named, through_proxy};
use instantsnap::engine::{EarlyStart, Observer, Phase};
use instantsnap::error::Code;
use instantsnap_testkit::{
    Accel, Binary, Client, DEADLINE, Daemon, Fault, Machine, skip, test, thorough, wait_for,
    where_kvm_works,
};
use serde_json::json;

const MS: Duration = Duration::from_millis(1);

/// The QEMUs that leave a guest paused that they find paused.
fn binaries() -> impl Iterator<Item = &'static Binary> {
    let able: Vec<_> = Binary::all().iter().filter(|binary| binary.version >= (10, 0, 0)).collect();
    if able.is_empty() {
        skip("these QEMUs start their guest by themselves");
    }
    able.into_iter()
}

/// How long QEMU sets up here; with much memory it would.
const SETUP: Duration = Duration::from_millis(12);

/// Two CPUs that write their memory all the time, and two disks.
fn writing(binary: &'static Binary) -> Machine {
    machine(binary, 2).cpus(2).append("dense=16 cpus=2").long_setup(SETUP)
}

/// Takes a snapshot for which the guest is stopped so long after the migration's begin; brings it
/// back. Returns whether it was in time, and how many tries were lost.
fn race(original: &Opened, name: &str, stop_after: Duration, tries: u32) -> (bool, u32) {
    original.handle.set_early_start(EarlyStart { tries, stop_after: Some(stop_after) });
    original.handle.create(&named(name), INSTANTLY, &mut ()).unwrap();
    let stats = original.handle.stats().unwrap();
    assert_eq!(stats.started_early, stats.lost < tries);
    // By then one of its CPUs and its memory would be of two moments, if they were.
    original.restore_clone(name).0.guest.wait_ticks(3);
    (stats.started_early, stats.lost)
}

/// When the guest is stopped: from at once to 50 ms too late, the closer the nearer to the end of
/// the setup.
fn moments(steps: u32) -> impl Iterator<Item = Duration> {
    let early = (0..steps).map(move |n| SETUP * n / steps);
    let close = (0..4 * steps).map(move |n| SETUP - MS + 4 * MS * n / (4 * steps));
    let late = (0..steps).map(move |n| SETUP + 3 * MS + 47 * MS * n / steps);
    early.chain(close).chain(late)
}

fn race_in_every_way(binary: &'static Binary, accel: Accel, steps: u32) {
    let original = Opened::start(&writing(binary).accel(accel));
    let (mut number, mut won, mut lost) = (0, 0, 0);
    for stop_after in moments(steps) {
        // Where it is too late it is so again and again, at little cost: the guest is stopped first
        // in the end.
        let (in_time, missed) = race(&original, &format!("s{number}"), stop_after, 5);
        won += u32::from(in_time);
        lost += missed;
        number += 1;
    }
    original.guest.wait_ticks(3);
    eprintln!("{} {accel:?}: {number} snapshots, {won} in time, {lost} tries lost", binary.name);
    assert!(won > 0 && lost > 0, "{won} in time, {lost} lost: that was no race");
}

#[test]
fn whoever_wins_the_race_the_snapshot_is_of_one_moment_under_tcg() {
    for binary in binaries() {
        race_in_every_way(binary, Accel::Tcg, if thorough() { 25 } else { 1 });
    }
}

#[test]
fn whoever_wins_the_race_the_snapshot_is_of_one_moment_under_kvm() {
    for binary in where_kvm_works(binaries()) {
        race_in_every_way(binary, Accel::Kvm, if thorough() { 5 } else { 1 });
    }
}

fn wait_until_it_sets_up(control: &mut Client) {
    let sets_up = || {
        (control.execute("query-migrate", json!({})).unwrap()["status"] == "setup").then_some(())
    };
    wait_for(DEADLINE, sets_up).expect("the migration is begun");
}

#[test]
fn a_snapshot_can_be_cancelled_while_memory_is_touched_and_the_guest_runs() {
    for binary in binaries() {
        let opened = Opened::start(&machine(binary, 2).long_setup(1000 * MS));
        let before = opened.trace();
        opened.handle.set_early_start(EarlyStart { tries: 3, stop_after: Some(60_000 * MS) });
        let error = std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut control = opened.guest.control();
                wait_until_it_sets_up(&mut control);
                assert_eq!(control.execute("query-status", json!({})).unwrap()["running"], true);
                opened.handle.cancel().unwrap();
            });
            opened.snapshot("s").expect_err("it was cancelled")
        });
        assert_eq!(error.code, Code::OperationAborted, "{error}");
        assert!(!error.message.contains(';'), "nothing is left: {error}");
        assert_untouched(&opened, &before);
        opened.handle.set_early_start(EarlyStart::default());
        opened.assert_well();
    }
}

/// It is not known then whether the guest was stopped in time.
#[test]
fn a_race_whose_outcome_is_not_told_leaves_a_guest_that_runs() {
    for binary in binaries() {
        let (opened, proxy) = through_proxy(&writing(binary));
        let moments = [Duration::ZERO, SETUP - MS, SETUP, SETUP + MS, SETUP + 50 * MS];
        for stop_after in moments.repeat(if thorough() { 50 } else { 1 }) {
            opened.handle.set_early_start(EarlyStart { tries: 3, stop_after: Some(stop_after) });
            for (command, place) in [("query-migrate", 2), ("stop", 1)] {
                proxy.rule(command, place, Fault::fail("not today"));
                opened.assert_fails(&named("s"), INSTANTLY, Code::OperationFailed, &["not today"]);
            }
        }
        opened.handle.set_early_start(EarlyStart::default());
        opened.assert_well();
    }
}

#[test]
fn a_snapshot_that_fails_after_tries_were_lost_leaves_nothing() {
    for binary in binaries() {
        let opened = Opened::start(&writing(binary));
        opened.handle.set_early_start(EarlyStart { tries: 2, stop_after: Some(SETUP + 200 * MS) });
        for fatal in [Phase::Switch, Phase::Arm, Phase::Drain] {
            let mut cancel = At(|phase| {
                if phase == fatal {
                    opened.handle.cancel().unwrap();
                }
            });
            opened.assert_fails_observed(
                &named("s"),
                INSTANTLY,
                &mut cancel,
                Code::OperationAborted,
                &[],
            );
            assert_eq!(opened.handle.stats().unwrap().lost, 2);
        }
        opened.assert_well();
    }
}

#[test]
fn what_is_learnt_of_a_guest_brings_the_next_snapshot_in_time() {
    for binary in binaries() {
        let opened = Opened::start(&machine(binary, 2).long_setup(1000 * MS));
        let overlapped = |name: &str| {
            opened.snapshot(name).unwrap();
            let stats = opened.handle.stats().unwrap();
            (stats.started_early, stats.lost)
        };
        // So little memory: it would not be worth it, as far as is known.
        assert_eq!(overlapped("first"), (false, 0));
        // On a busy machine it may take more tries than one snapshot has, or many.
        let in_time = (1..=40).map(|n| format!("known-{n}")).find(|name| overlapped(name).0);
        opened.restore_clone(&in_time.expect("one that was in time"));
    }
}

#[test]
fn a_domain_of_libvirt_is_stopped_in_time_or_tried_again() {
    let daemon = Daemon::session();
    for binary in binaries() {
        let setup = 1000 * MS;
        let domain = OpenedDomain::start(&writing(binary).long_setup(setup), &daemon);
        let take = |name: &str, stop_after, observer: &mut dyn Observer| {
            domain.handle.set_early_start(EarlyStart { tries: 1, stop_after: Some(stop_after) });
            domain.snapshot_observed(name, observer).unwrap();
            domain.restore_clone(name);
            domain.guest.wait_ticks(3);
            let stats = domain.handle.stats().unwrap();
            (stats.started_early, stats.lost)
        };
        assert_eq!(take("early", Duration::ZERO, &mut ()), (true, 0));
        assert_eq!(take("late", 2 * setup, &mut ()), (false, 1));
        // Another client's save while the migration is under way, and the guest still runs.
        let file = domain.guest.directory().join("theirs");
        let mut said = None;
        let mut save = At(|phase| {
            if phase == Phase::Pause && said.is_none() {
                said = Some(domain.guest.daemon().try_virsh(&[
                    "save",
                    domain.guest.name(),
                    file.to_str().unwrap(),
                ]));
            }
        });
        take("saved", Duration::ZERO, &mut save);
        let refused = said.unwrap().expect_err("a save while ours sets up");
        assert!(refused.contains("There's a migration process in progress"), "{refused}");
    }
}

/// How many pages of its largest mapping a process has, and of how many.
fn pages_there(pid: u32) -> (usize, usize) {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let mappings = maps.lines().filter(|line| line.contains(" rw-p ")).map(|line| {
        let (begin, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
        [begin, end].map(|address| u64::from_str_radix(address, 16).unwrap())
    });
    let [begin, end] = mappings.max_by_key(|[begin, end]| end - begin).unwrap();
    let mut entries = vec![0; ((end - begin) / 4096 * 8) as usize];
    let pagemap = std::fs::File::open(format!("/proc/{pid}/pagemap")).unwrap();
    pagemap.read_exact_at(&mut entries, begin / 4096 * 8).unwrap();
    let there = entries.chunks(8).filter(|entry| entry[7] & 0x80 != 0).count();
    (there, entries.len() / 8)
}

#[test]
fn memory_that_was_never_used_is_there_before_the_pause() {
    for binary in Binary::some() {
        // A page of it in many huge ones.
        let opened = Opened::start(&machine(binary, 1).memory(512).append("pages=16"));
        let pid = opened.guest.pid();
        let (there, all) = pages_there(pid);
        assert!(there < all / 2, "{there} of {all}");
        let mut at_pause = 0;
        let mut look = At(|phase| {
            if phase == Phase::Pause {
                at_pause = pages_there(pid).0;
            }
        });
        opened.handle.create(&named("s"), INSTANTLY, &mut look).unwrap();
        assert_eq!(at_pause, all);
        opened.restore_clone("s");
    }
}

#[test]
fn memory_that_is_not_plugged_in_is_not_populated() {
    for binary in Binary::some() {
        for kind in ["memory-backend-memfd,share=on", "memory-backend-ram"] {
            let backend = format!("{kind},id=plug,size=256M");
            let args = [
                "-m",
                "64,maxmem=512M",
                "-object",
                &backend,
                "-device",
                "virtio-mem-pci,id=vm0,memdev=plug",
            ];
            let opened = Opened::start(
                &args.into_iter().fold(machine(binary, 1), |machine, arg| machine.arg(arg)),
            );
            let resident = || {
                let maps =
                    std::fs::read_to_string(format!("/proc/{}/smaps", opened.guest.pid())).unwrap();
                let kilobytes = |name: &'static str| {
                    let values = maps
                        .lines()
                        .filter_map(move |line| line.strip_prefix(name)?.strip_suffix("kB"));
                    values.map(|value| value.trim().parse::<u64>().unwrap())
                };
                let mut sizes = kilobytes("Size:").zip(kilobytes("Rss:"));
                sizes.find(|(size, _)| *size == 256 << 10).expect("the device's memory").1
            };
            assert_eq!(resident(), 0, "{kind}");
            opened.snapshot("s").unwrap();
            assert_eq!(resident(), 0, "{kind}");
            opened.guest.wait_ticks(2);
        }
    }
}
