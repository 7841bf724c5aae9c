// SPDX-License-Identifier: LGPL-2.1-or-later

//! How soon a guest runs again after a revert, and how soon all of its memory is in.
//!
//!     cargo bench --bench revert -- [--rounds N] [--memory MIB,MIB] [--json FILE]
//!
//! * `full`: all of the memory is loaded before the guest runs.
//! * `lazy`: the guest runs at once, and its memory follows.
//!
//! Three quarters of the guest's memory have data in them, and the guest writes to all of these
//! pages in each round. QEMU is started before the time begins. The times are those from the call
//! of the load on: until it returns, when the guest runs; until the guest has ended the round that
//! the instant has interrupted, for which it needs the pages that this round has not come to; until
//! all is in, and the settings are back. The image is in the host's page cache. Both ways are
//! interleaved, with QEMU by QMP, on one snapshot.

mod common;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use common::{Options, interleave, spread};
use instantsnap::engine::{Handle, LoadOptions, prepare_revert};
use instantsnap::image::Format as ImageFormat;
use instantsnap::model::Memory;
use instantsnap::model::flags::{CreateFlags, INSTANT, LIVE, RevertFlags};
use instantsnap_testkit::{Binary, Format, Guest, Machine, wait_for};
use serde_json::{Value, json};

/// A guest that writes to all of its memory is slow without KVM.
const LONG: Duration = Duration::from_secs(600);

/// The times of one load, in microseconds.
#[derive(Clone, Copy, serde::Serialize)]
struct Took {
    returned_us: u64,
    round_us: u64,
    all_us: u64,
}

fn main() -> common::Result<()> {
    // As a test program, it is in another directory than the program of the page server.
    let _run = instantsnap_testkit::run::begin();
    let options = Options::parse(5, &[512, 2048], "bench-revert.json", |_, _| Ok(false))?;
    let mut results = Vec::new();
    println!("| QEMU | memory | way | runs after ms | round after ms | all in after ms |");
    println!("|------|--------|-----|---------------|----------------|-----------------|");
    for binary in Binary::all() {
        for &memory in &options.memory {
            let measured = measure(binary, memory, options.rounds);
            for (way, took) in &measured {
                let column =
                    |of: fn(&Took) -> u64| spread(&took.iter().map(of).collect::<Vec<_>>());
                println!(
                    "| {} | {memory} MiB | {way} | {} | {} | {} |",
                    binary.name,
                    column(|took| took.returned_us),
                    column(|took| took.round_us),
                    column(|took| took.all_us)
                );
            }
            results.push(json!({ "qemu": binary.name, "memory_mib": memory, "ways": measured }));
        }
    }
    options.write(&json!({ "rounds": options.rounds, "results": Value::Array(results) }));
    println!("\nWritten to {}", options.json.display());
    Ok(())
}

fn measure(
    binary: &'static Binary,
    memory: u32,
    rounds: usize,
) -> BTreeMap<&'static str, Vec<Took>> {
    let machine = Machine::new(binary).memory(memory).disk(Format::Raw);
    let guest = machine.append(&format!("dense={}", memory / 4 * 3)).start();
    guest.try_ticks(1, LONG).unwrap();
    let state = guest.directory().join("state");
    std::fs::create_dir(&state).unwrap();
    let handle = Handle::open_qmp(&guest.qmp(), None, &state).unwrap();
    let xml = "<domainsnapshot><name>s</name></domainsnapshot>";
    handle
        .create(xml, CreateFlags::parse(LIVE | INSTANT), Some(ImageFormat::Sparse), &mut ())
        .unwrap();
    // Its own rounds would take the processors from the clones.
    guest.control().execute("stop", json!({})).unwrap();
    interleave(&["full", "lazy"], rounds, |way| {
        let plan = prepare_revert(&state, "s", None).unwrap();
        let disks: Vec<_> =
            plan.disks.iter().map(|disk| (disk.file.clone(), Format::Qcow2)).collect();
        let clone = guest.machine().for_revert(&disks).start();
        let took = load(&clone, &state, way);
        clone.kill();
        disks.iter().for_each(|(disk, _)| std::fs::remove_file(disk).unwrap());
        took
    })
}

fn load(clone: &Guest, state: &std::path::Path, way: &str) -> Took {
    let handle = Handle::open_qmp(&clone.qmp(), None, state).unwrap();
    let memory = if way == "lazy" { Memory::Lazy } else { Memory::Full };
    let begun = Instant::now();
    let since = || begun.elapsed().as_micros() as u64;
    handle.load("s", RevertFlags::parse(0).unwrap(), LoadOptions::from(memory)).unwrap();
    let returned_us = since();
    let (mut round_us, mut all_us) = (None, (way == "full").then_some(returned_us));
    wait_for(LONG, || {
        if round_us.is_none() && clone.serial().tick.is_some() {
            round_us = Some(since());
        }
        if all_us.is_none() && handle.wait_memory(Some(Duration::from_millis(1))).unwrap() {
            all_us = Some(since());
        }
        (round_us.is_some() && all_us.is_some()).then_some(())
    })
    .expect("it comes");
    Took { returned_us, round_us: round_us.unwrap(), all_us: all_us.unwrap() }
}
