// SPDX-License-Identifier: LGPL-2.1-or-later

//! How long a program waits for the start of a job, and how far its guest slows down while memory
//! drains.
//!
//!     cargo bench --bench jobs -- [--rounds N] [--memory MIB,MIB] [--json FILE]
//!
//! * `at instant`: from the call of the asynchronous create to its return at the instant.
//! * `at once`: the same with a return before anything is done.
//!
//! The guest counts all the time, and writes 16 MiB in each round. Its rate is measured for a
//! second before the snapshot, from the instant until all memory is saved, and for a second after
//! that. Its longest gap is the longest time without a round. `fast`: memory goes to the disk.
//! `slow`: from the instant on QEMU sends at most 32 MiB a second, as to a slow disk.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::monitor::Monitor;
use common::{Options, interleave, median, spread};
use instantsnap::engine::{Handle, Returns};
use instantsnap::model::flags::{CreateFlags, INSTANT, LIVE, NO_METADATA};
use instantsnap_testkit::{Binary, Format, Guest, Machine};
use serde_json::{Value, json};

const WAYS: [&str; 3] = ["at instant", "at once", "slow"];
const SLOW: u64 = 32 << 20;
/// The time for the rates before and after the snapshot.
const WINDOW: Duration = Duration::from_secs(1);

fn main() -> common::Result<()> {
    let options = Options::parse(10, &[512], "bench-jobs.json", |_, _| Ok(false))?;
    let mut results = Vec::new();
    println!("| QEMU | guest | until it returns at the instant, ms | at once, ms |");
    println!("|------|-------|--------------------------------------|-------------|");
    let mut slowed = Vec::new();
    for binary in Binary::all() {
        for &memory in &options.memory {
            let taken = measure(binary, memory, options.rounds);
            let latency =
                |way| taken[way].iter().map(|round: &Round| round.latency_us).collect::<Vec<_>>();
            println!(
                "| {} | {memory} MiB | {} | {} |",
                binary.name,
                spread(&latency("at instant")),
                spread(&latency("at once"))
            );
            for (target, way) in [("fast", "at instant"), ("slow", "slow")] {
                slowed.push(row(&binary.name, memory, target, &taken[way]));
            }
            let ways: Value =
                taken.iter().map(|(way, rounds)| (way.to_string(), json!(rounds))).collect();
            results.push(json!({ "qemu": binary.name, "memory_mib": memory, "ways": ways }));
        }
    }
    println!(
        "\n| QEMU | guest | target | drain, s | rounds/s before | draining | after | longest gap, \
         ms: before | draining | after |"
    );
    println!(
        "|------|-------|--------|----------|-----------------|----------|-------|-------------------------|----------|-------|"
    );
    slowed.iter().for_each(|row| println!("{row}"));
    options.write(&json!({ "results": results }));
    println!("\nWritten to {}", options.json.display());
    Ok(())
}

fn row(qemu: &str, memory: u32, target: &str, rounds: &[Round]) -> String {
    let of = |figure: fn(&Round) -> u64| median(&rounds.iter().map(figure).collect::<Vec<_>>());
    let before = of(|round| round.before.per_second);
    let ratio = |rate: f64| format!("{rate:.0} ({:.2})", rate / before);
    let gap = |us: f64| format!("{:.1}", us / 1e3);
    format!(
        "| {qemu} | {memory} MiB | {target} | {:.1} | {before:.0} | {} | {} | {} | {} | {} |",
        of(|round| round.drain_us) / 1e6,
        ratio(of(|round| round.draining.per_second)),
        ratio(of(|round| round.after.per_second)),
        gap(of(|round| round.before.gap_us)),
        gap(of(|round| round.draining.gap_us)),
        gap(of(|round| round.after.gap_us)),
    )
}

#[derive(serde::Serialize)]
struct Round {
    latency_us: u64,
    drain_us: u64,
    before: Pace,
    draining: Pace,
    after: Pace,
}

/// The rate at which a guest counts.
#[derive(serde::Serialize)]
struct Pace {
    per_second: u64,
    /// The longest time without a round.
    gap_us: u64,
}

/// Measures a guest's rate while `meanwhile` runs.
fn watch<T>(guest: &Guest, meanwhile: impl FnOnce() -> T) -> (Pace, T) {
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let began = Instant::now();
            let (mut count, mut last, mut gap) = (guest.serial().tick, began, Duration::ZERO);
            let start = count;
            while !ended.load(Ordering::Relaxed) {
                let now_at = guest.serial().tick;
                if now_at != count {
                    let now = Instant::now();
                    gap = gap.max(now - last);
                    (count, last) = (now_at, now);
                }
                std::thread::sleep(Duration::from_micros(200));
            }
            gap = gap.max(last.elapsed());
            let rounds = u64::from(count.unwrap_or(0) - start.unwrap_or(0));
            let per_second = (rounds as f64 / began.elapsed().as_secs_f64()) as u64;
            Pace { per_second, gap_us: gap.as_micros() as u64 }
        });
        let result = meanwhile();
        ended.store(true, Ordering::Relaxed);
        (watcher.join().unwrap(), result)
    })
}

fn measure(
    binary: &'static Binary,
    memory: u32,
    rounds: usize,
) -> std::collections::BTreeMap<&'static str, Vec<Round>> {
    let machine =
        Machine::new(binary).memory(memory).prealloc().disk(Format::Raw).append("dense=16");
    let guest = machine.start();
    guest.wait_ticks(2);
    let state_dir = guest.directory().join("state");
    std::fs::create_dir(&state_dir).unwrap();
    let handle = Handle::open_qmp(&guest.qmp(), None, &state_dir).unwrap();
    let mut monitor = Monitor::new(guest.control(), guest.directory());
    interleave(&WAYS, rounds, |way| {
        let (before, ()) = watch(&guest, || std::thread::sleep(WINDOW));
        let returns = if way == "at once" { Returns::AtOnce } else { Returns::AtInstant };
        let started = Instant::now();
        let flags = CreateFlags::parse(LIVE | INSTANT | NO_METADATA);
        let job = handle.start("<domainsnapshot/>", flags, None, Box::new(()), returns).unwrap();
        let latency_us = started.elapsed().as_micros() as u64;
        let mut bandwidth = Value::Null;
        if way == "slow" {
            bandwidth =
                monitor.command("query-migrate-parameters", json!({}))["max-bandwidth"].take();
            monitor.command("migrate-set-parameters", json!({ "max-bandwidth": SLOW }));
        }
        while !job.info().instant {
            std::thread::sleep(Duration::from_micros(200));
        }
        let drained = Instant::now();
        let (draining, _) = watch(&guest, || job.wait(None));
        let drain_us = drained.elapsed().as_micros() as u64;
        let name = job.result().unwrap();
        let (after, ()) = watch(&guest, || std::thread::sleep(WINDOW));
        if way == "slow" {
            monitor.command("migrate-set-parameters", json!({ "max-bandwidth": bandwidth }));
        }
        std::fs::remove_file(state_dir.join(format!("{name}.mem"))).unwrap();
        monitor.flatten();
        Round { latency_us, drain_us, before, draining, after }
    })
}
