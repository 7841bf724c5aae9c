// SPDX-License-Identifier: LGPL-2.1-or-later

//! What the formats of the memory image cost: while memory drains, on disk, and at a restore.
//!
//!     cargo bench --bench image -- [--rounds N] [--memory MIB,MIB] [--fill half,all] [--qemu 10]
//!         [--json FILE]
//!
//! The guest writes all the time, to a word in each page of half of its memory or of all (at most
//! 3 GiB, which is as far as it reaches); its other pages are zero.
//!
//! Snapshots, interleaved on one guest: `raw` and `sparse`. `total` is the whole call, `drain` the
//! time from the instant until the snapshot is complete, `rounds` how many the guest counts
//! meanwhile, `peak` the largest resident memory of the watchdog, which moves the memory, and
//! `disk` the space that the image takes.
//!
//! Restores of one of these snapshots into a fresh QEMU, interleaved; the images are in the page
//! cache. `raw`: the stream as it is. `stream`: a stream that the library makes of the sparse
//! image.
//! `mapped N`: QEMU reads the sparse image itself by N threads (QEMU 9.0 and later). `restore` is
//! the time from the call until the guest runs, `peak` the largest resident memory of this process.

mod common;

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use ::common::watchdog::watchdog_of;
use common::monitor::Monitor;
use common::{Options, interleave, kib, list, median, spread, word};
use instantsnap::engine::{Handle, Returns, SparseReader, prepare_revert};
use instantsnap::image::Format;
use instantsnap::model::Memory;
use instantsnap::model::flags::{CreateFlags, INSTANT, LIVE, NO_METADATA, RevertFlags};
use instantsnap_testkit::{Binary, Format as DiskFormat, Guest, Machine};
use serde_json::json;

const FORMATS: [&str; 2] = ["raw", "sparse"];
/// A large guest boots slowly without KVM.
const BOOT: Duration = Duration::from_secs(600);
/// Where the tick guest's memory ends, in MiB.
const REACH: u32 = 3072;

fn main() -> common::Result<()> {
    let (mut fills, mut qemu) = (vec!["half".to_owned(), "all".to_owned()], None);
    let options = Options::parse(5, &[512], "bench-image.json", |name, parser| {
        match name {
            "fill" => fills = list(parser)?,
            "qemu" => qemu = Some(word(parser)?),
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    let (mut taken, mut restored, mut results) = (Vec::new(), Vec::new(), Vec::new());
    for binary in Binary::all() {
        if qemu.as_ref().is_some_and(|wanted: &String| !binary.name.starts_with(wanted.as_str())) {
            continue;
        }
        for &memory in &options.memory {
            for fill in &fills {
                let measured = measure(binary, memory, fill, options.rounds);
                let guest = format!("{} | {memory} MiB, {fill}", binary.name);
                taken.extend(rows(&guest, &measured.taken));
                restored.extend(restore_rows(&guest, &measured.restored));
                results.push(json!({
                    "qemu": binary.name, "memory_mib": memory, "fill": fill,
                    "rounds": options.rounds, "snapshots": measured.taken,
                    "restores": measured.restored,
                }));
            }
        }
    }
    println!(
        "| QEMU | guest | image | total ms, median (min to max) | ratio to raw | drain ms, median | \
         rounds | rounds/s | disk MiB | peak MiB |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|");
    taken.iter().for_each(|row| println!("{row}"));
    println!(
        "\n| QEMU | guest | way | restore ms, median (min to max) | ratio to raw | peak MiB |"
    );
    println!("|---|---|---|---|---|---|");
    restored.iter().for_each(|row| println!("{row}"));
    options.write(&json!({ "results": results }));
    println!("\nWritten to {}", options.json.display());
    Ok(())
}

#[derive(serde::Serialize)]
struct Taken {
    total_us: u64,
    drain_us: u64,
    /// The rounds of the guest during the drain.
    rounds: u64,
    disk_bytes: u64,
    peak_kib: u64,
}

#[derive(serde::Serialize)]
struct Restored {
    restore_us: u64,
    peak_kib: u64,
}

type Ways<T> = BTreeMap<&'static str, Vec<T>>;

struct Measured {
    taken: Ways<Taken>,
    restored: Ways<Restored>,
}

fn rows(guest: &str, taken: &Ways<Taken>) -> Vec<String> {
    let of = |way: &str, figure: fn(&Taken) -> u64| -> Vec<u64> {
        taken[way].iter().map(figure).collect()
    };
    let row = |way: &&str| {
        let total = of(way, |taken| taken.total_us);
        let (drain, rounds) =
            (median(&of(way, |taken| taken.drain_us)), median(&of(way, |taken| taken.rounds)));
        format!(
            "| {guest} | {way} | {} | {:.2} | {:.0} | {rounds:.0} | {:.1} | {:.0} | {:.1} |",
            spread(&total),
            median(&total) / median(&of("raw", |taken| taken.total_us)),
            drain / 1e3,
            rounds / drain * 1e6,
            median(&of(way, |taken| taken.disk_bytes >> 20)),
            median(&of(way, |taken| taken.peak_kib)) / 1024.0,
        )
    };
    FORMATS.iter().map(row).collect()
}

fn restore_rows(guest: &str, restored: &Ways<Restored>) -> Vec<String> {
    let times = |taken: &[Restored]| taken.iter().map(|taken| taken.restore_us).collect::<Vec<_>>();
    let row = |(way, taken): (&&str, &Vec<Restored>)| {
        let peaks: Vec<_> = taken.iter().map(|taken| taken.peak_kib).collect();
        format!(
            "| {guest} | {way} | {} | {:.2} | {:.1} |",
            spread(&times(taken)),
            median(&times(taken)) / median(&times(&restored["raw"])),
            median(&peaks) / 1024.0
        )
    };
    restored.iter().map(row).collect()
}

fn measure(binary: &'static Binary, memory: u32, fill: &str, rounds: usize) -> Measured {
    let dense = match fill {
        "half" => memory / 2,
        "all" => memory - 4,
        other => panic!("unknown fill {other}: half or all"),
    };
    let dense = dense.min(REACH - 4);
    let guest = Machine::new(binary)
        .memory(memory)
        .prealloc()
        .disk(DiskFormat::Raw)
        .append(&format!("dense={dense}"))
        .start();
    guest.try_ticks(2, BOOT).unwrap_or_else(|trouble| guest.fail(&trouble));
    let state_dir = guest.directory().join("state");
    std::fs::create_dir(&state_dir).unwrap();
    let handle = Handle::open_qmp(&guest.qmp(), None, &state_dir).unwrap();
    let mut monitor = Monitor::new(guest.control(), guest.directory());
    let taken = interleave(&FORMATS, rounds, |way| {
        let taken = take(&handle, &guest, &state_dir, Format::named(way).unwrap());
        monitor.flatten();
        taken
    });

    for format in FORMATS {
        let xml = format!("<domainsnapshot><name>as-{format}</name></domainsnapshot>");
        let flags = CreateFlags::parse(LIVE | INSTANT);
        handle.create(&xml, flags, Format::named(format), &mut ()).unwrap();
    }
    drop((handle, monitor));
    guest.kill();
    let mut ways = vec!["raw", "stream"];
    if binary.version >= (9, 0, 0) {
        ways.extend(["mapped 1", "mapped 2", "mapped 4"]);
    }
    let restored = interleave(&ways, rounds, |way| restore(binary, &state_dir, memory, way));
    Measured { taken, restored }
}

fn take(handle: &Handle, guest: &Guest, state_dir: &Path, format: Format) -> Taken {
    let flags = CreateFlags::parse(LIVE | INSTANT | NO_METADATA);
    let count = || u64::from(guest.serial().tick.expect("a number"));
    let begun = Instant::now();
    let job = handle
        .start("<domainsnapshot/>", flags, Some(format), Box::new(()), Returns::AtInstant)
        .unwrap();
    let (instant, first) = (Instant::now(), count());
    let mut peak_kib = 0;
    while !job.wait(Some(Duration::from_millis(20))) {
        peak_kib = peak_kib.max(watchdog_peak());
    }
    let (total, drain, last) = (begun.elapsed(), instant.elapsed(), count());
    let image = state_dir.join(format!("{}.mem", job.result().unwrap()));
    assert_eq!(handle.stats().unwrap().image_format, Some(format));
    let disk_bytes = image.metadata().unwrap().blocks() * 512;
    std::fs::remove_file(image).unwrap();
    Taken {
        total_us: total.as_micros() as u64,
        drain_us: drain.as_micros() as u64,
        rounds: last - first,
        disk_bytes,
        peak_kib,
    }
}

/// The largest resident memory of the watchdog, while there is one; 0 otherwise.
fn watchdog_peak() -> u64 {
    let watchdog = watchdog_of(std::process::id());
    let status = |pid| std::fs::read_to_string(format!("/proc/{pid}/status")).ok();
    let peak = |status: String| -> Option<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
        line.trim().trim_end_matches(" kB").parse().ok()
    };
    watchdog.and_then(status).and_then(peak).unwrap_or(0)
}

fn restore(binary: &'static Binary, state_dir: &Path, memory: u32, way: &str) -> Restored {
    let name = if way == "raw" { "as-raw" } else { "as-sparse" };
    let plan = prepare_revert(state_dir, name, None).unwrap();
    let disks: Vec<_> =
        plan.disks.iter().map(|disk| (disk.file.clone(), DiskFormat::Qcow2)).collect();
    // The same memory, which nothing has touched.
    let backend = format!("memory-backend-ram,id=ram0,size={memory}M");
    let clone = Machine::new(binary)
        .memory(memory)
        .disk(DiskFormat::Raw)
        .for_revert(&disks)
        .arg("-object")
        .arg(&backend)
        .arg("-machine")
        .arg("memory-backend=ram0")
        .start();
    let handle = Handle::open_qmp(&clone.qmp(), None, state_dir).unwrap();
    handle.set_sparse_reader(match way.strip_prefix("mapped ") {
        Some(channels) => SparseReader::Qemu { channels: channels.parse().unwrap() },
        None => SparseReader::Library,
    });
    // The peak of this process begins anew.
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let begun = Instant::now();
    handle.load(name, RevertFlags::parse(0).unwrap(), Memory::Full.into()).unwrap();
    let restored = begun.elapsed();
    let peak_kib = kib("/proc/self/status", "VmHWM");
    // It goes on from the snapshot.
    clone.try_ticks(1, BOOT).unwrap_or_else(|trouble| clone.fail(&trouble));
    plan.discard();
    Restored { restore_us: restored.as_micros() as u64, peak_kib }
}
