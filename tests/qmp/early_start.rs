// SPDX-License-Identifier: LGPL-2.1-or-later

//! The migration starts while the guest runs. Whether the guest is stopped in time or too late, the
//! snapshot is of one moment.

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

/// The QEMUs that do not resume a guest that they find paused.
fn early_start_binaries() -> impl Iterator<Item = &'static Binary> {
    let able: Vec<_> = Binary::all().iter().filter(|binary| binary.version >= (10, 0, 0)).collect();
    if able.is_empty() {
        skip("these QEMUs start their guest by themselves");
    }
    able.into_iter()
}

/// How long the setup of the migration takes here, as it would with much memory.
const SETUP: Duration = Duration::from_millis(12);

/// A machine with two disks, whose two CPUs write to their memory all the time.
fn writing_machine(binary: &'static Binary) -> Machine {
    machine(binary, 2).cpus(2).append("dense=16 cpus=2").long_setup(SETUP)
}

/// Takes a snapshot and stops the guest this long after the start of the migration, then restores a
/// clone. Returns whether the guest was stopped in time, and how many tries were lost.
fn snapshot_with_stop_after(
    original: &Opened,
    name: &str,
    stop_after: Duration,
    tries: u32,
) -> (bool, u32) {
    original.handle.set_early_start(EarlyStart { tries, stop_after: Some(stop_after) });
    original.handle.create(&named(name), INSTANTLY, &mut ()).unwrap();
    let stats = original.handle.stats().unwrap();
    assert_eq!(stats.started_early, stats.lost < tries);
    // If a CPU and its memory were of two stop_delays, the clone would have noticed by then.
    original.restore_clone(name).0.guest.wait_ticks(3);
    (stats.started_early, stats.lost)
}

/// The delays after which the guest is stopped, from none to 50 ms too late. They are denser near
/// the end of the setup.
fn stop_delays(steps: u32) -> impl Iterator<Item = Duration> {
    let early = (0..steps).map(move |n| SETUP * n / steps);
    let close = (0..4 * steps).map(move |n| SETUP - MS + 4 * MS * n / (4 * steps));
    let late = (0..steps).map(move |n| SETUP + 3 * MS + 47 * MS * n / steps);
    early.chain(close).chain(late)
}

fn snapshot_at_every_stop_delay(binary: &'static Binary, accel: Accel, steps: u32) {
    let original = Opened::start(&writing_machine(binary).accel(accel));
    let (mut number, mut won, mut lost) = (0, 0, 0);
    for stop_after in stop_delays(steps) {
        // Where the stop is too late, each of the tries is lost at little cost, and the library
        // stops the guest first in the end.
        let (in_time, missed) =
            snapshot_with_stop_after(&original, &format!("s{number}"), stop_after, 5);
        won += u32::from(in_time);
        lost += missed;
        number += 1;
    }
    original.guest.wait_ticks(3);
    eprintln!("{} {accel:?}: {number} snapshots, {won} in time, {lost} tries lost", binary.name);
    assert!(won > 0 && lost > 0, "{won} in time, {lost} lost: expected both");
}

#[test]
fn early_start_is_of_one_moment_whenever_the_guest_stops_under_tcg() {
    for binary in early_start_binaries() {
        snapshot_at_every_stop_delay(binary, Accel::Tcg, if thorough() { 25 } else { 1 });
    }
}

#[test]
fn early_start_is_of_one_moment_whenever_the_guest_stops_under_kvm() {
    for binary in where_kvm_works(early_start_binaries()) {
        snapshot_at_every_stop_delay(binary, Accel::Kvm, if thorough() { 5 } else { 1 });
    }
}

fn wait_for_migration_setup(control: &mut Client) {
    let sets_up = || {
        (control.execute("query-migrate", json!({})).unwrap()["status"] == "setup").then_some(())
    };
    wait_for(DEADLINE, sets_up).expect("the migration is begun");
}

#[test]
fn early_start_can_be_cancelled_while_the_guest_runs() {
    for binary in early_start_binaries() {
        let opened = Opened::start(&machine(binary, 2).long_setup(1000 * MS));
        let before = opened.trace();
        opened.handle.set_early_start(EarlyStart { tries: 3, stop_after: Some(60_000 * MS) });
        let error = std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut control = opened.guest.control();
                wait_for_migration_setup(&mut control);
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

/// The library does not learn whether the guest was stopped in time.
#[test]
fn early_start_with_an_unknown_outcome_leaves_a_running_guest() {
    for binary in early_start_binaries() {
        let (opened, proxy) = through_proxy(&writing_machine(binary));
        let stop_delays = [Duration::ZERO, SETUP - MS, SETUP, SETUP + MS, SETUP + 50 * MS];
        for stop_after in stop_delays.repeat(if thorough() { 50 } else { 1 }) {
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
fn snapshot_that_fails_after_lost_tries_leaves_nothing() {
    for binary in early_start_binaries() {
        let opened = Opened::start(&writing_machine(binary));
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
fn measured_setup_time_lets_the_next_snapshot_start_early() {
    for binary in early_start_binaries() {
        let opened = Opened::start(&machine(binary, 2).long_setup(1000 * MS));
        let overlapped = |name: &str| {
            opened.snapshot(name).unwrap();
            let stats = opened.handle.stats().unwrap();
            (stats.started_early, stats.lost)
        };
        // The library does not expect a gain with so little memory, before it has measured.
        assert_eq!(overlapped("first"), (false, 0));
        // On a busy machine one snapshot may not have enough tries.
        let in_time = (1..=40).map(|n| format!("known-{n}")).find(|name| overlapped(name).0);
        opened.restore_clone(&in_time.expect("one that was in time"));
    }
}

#[test]
fn early_start_of_a_libvirt_domain_is_in_time_or_retried() {
    let daemon = Daemon::session();
    for binary in early_start_binaries() {
        let setup = 1000 * MS;
        let domain = OpenedDomain::start(&writing_machine(binary).long_setup(setup), &daemon);
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
        // Another client saves the domain while the migration is under way and the guest still
        // runs.
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

/// How many pages of the process's largest mapping are present, and how many pages it has.
fn present_pages(pid: u32) -> (usize, usize) {
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
fn unused_memory_is_populated_before_the_pause() {
    for binary in Binary::some() {
        // The guest uses one page in each of many huge pages.
        let opened = Opened::start(&machine(binary, 1).memory(512).append("pages=16"));
        let pid = opened.guest.pid();
        let (there, all) = present_pages(pid);
        assert!(there < all / 2, "{there} of {all}");
        let mut at_pause = 0;
        let mut look = At(|phase| {
            if phase == Phase::Pause {
                at_pause = present_pages(pid).0;
            }
        });
        opened.handle.create(&named("s"), INSTANTLY, &mut look).unwrap();
        assert_eq!(at_pause, all);
        opened.restore_clone("s");
    }
}

#[test]
fn unplugged_virtio_mem_memory_is_not_populated() {
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
