// SPDX-License-Identifier: LGPL-2.1-or-later

//! How long a snapshot pauses guests that differ only in the size of their memory, and that write
//! all the time.
//!
//!     cargo bench --bench memory -- [--rounds N] [--memory MIB,MIB] [--ways direct,libvirt] [--json FILE]
//!
//! Directly, on a QEMU of its own:
//!
//! * `early start`: this library, which has QEMU populate the guest's memory while the guest runs.
//! * `stop first`: this library without early start.
//! * `floor`: the shortest sequence of QMP commands that stops the guest first, as in
//!   `benches/pause.rs`.
//!
//! On a domain of a private libvirtd:
//!
//! * `libvirt`, `libvirt stop first`: the first two through libvirt.
//! * `libvirt non-live`, `libvirt live`: libvirt's own full snapshots, as in `benches/libvirt.rs`.
//!
//! All ways are interleaved on one guest, and there is one guest at a time. All snapshots but
//! libvirt's own are cancelled right after the instant, because a large guest's memory drains for
//! minutes; that takes QEMU 10. The pause is measured by QEMU's own STOP and RESUME events. Where
//! tries were lost it is the last one's, and the cost of the lost tries is printed beside it. A size
//! is skipped where the machine does not have 2 GiB more than that available.

mod common;

use std::collections::BTreeMap;
use std::fs::File;
use std::time::Duration;

use common::domain::OpenedDomain;
use common::monitor::Monitor;
use common::{Options, interleave, kib, list, machine, median, spread};
use instantsnap::engine::{EarlyStart, Event, EventKind, Handle, Observer};
use instantsnap::error::Code;
use instantsnap::model::flags::{CreateFlags, INSTANT, LIVE, NO_METADATA};
use instantsnap_testkit::{Binary, Client, Daemon, Guest, Machine, wait_for};
use serde_json::{Value, json};

const STOP_FIRST: EarlyStart = EarlyStart { tries: 0, stop_after: None };
/// Memory that must be available beside the guest's.
const SPARE_MIB: u64 = 2048;
/// How long freed memory takes to become available.
const ROOM: Duration = Duration::from_secs(10);
/// A large guest boots slowly without KVM.
const BOOT: Duration = Duration::from_secs(600);

/// A backend, and the ways that are compared with it.
struct Backend {
    name: &'static str,
    ways: &'static [&'static str],
    /// The way that starts early.
    early_start: &'static str,
    /// The way that the others' pauses are compared with.
    stop_first: &'static str,
}

const BACKENDS: [Backend; 2] = [
    Backend {
        name: "direct",
        ways: &["early start", "stop first", "floor"],
        early_start: "early start",
        stop_first: "stop first",
    },
    Backend {
        name: "libvirt",
        ways: &["libvirt", "libvirt stop first", "libvirt non-live", "libvirt live"],
        early_start: "libvirt",
        stop_first: "libvirt stop first",
    },
];

/// The figures of one size, by way.
type Measured = BTreeMap<&'static str, Vec<Taken>>;

fn main() -> common::Result<()> {
    let mut wanted: Vec<String> = BACKENDS.iter().map(|backend| backend.name.to_owned()).collect();
    let sizes = [512, 2048, 4096, 8192, 12288];
    let options = Options::parse(7, &sizes, "bench-memory.json", |name, parser| {
        if name == "ways" {
            wanted = list(parser)?;
        }
        Ok(name == "ways")
    })?;
    let known = |name: &String| BACKENDS.iter().any(|backend| backend.name == name);
    if let Some(unknown) = wanted.iter().find(|name| !known(name)) {
        return Err(format!("unknown way {unknown}: direct or libvirt").into());
    }
    let able = Binary::all().iter().filter(|binary| binary.version >= (10, 0, 0));
    let Some(binary) = able.max_by_key(|binary| binary.version) else {
        println!(
            "Not measured: there is no QEMU 10 or later here, and an earlier one's snapshots \
             cannot be cancelled."
        );
        return Ok(());
    };
    let (major, minor, micro) = binary.version;
    println!("QEMU {major}.{minor}.{micro}, {} rounds", options.rounds);

    let mut document =
        json!({ "qemu": format!("{major}.{minor}.{micro}"), "rounds": options.rounds });
    let daemon = wanted.iter().any(|name| name == "libvirt").then(Daemon::session);
    if daemon.is_some() {
        let (major, minor, micro) = Daemon::version();
        document["libvirt"] = json!(format!("{major}.{minor}.{micro}"));
    }
    let mut all: Vec<(u32, Measured)> = Vec::new();
    for &memory in &options.memory {
        if let Err(available) = wait_for_room(memory) {
            println!(
                "\n{memory} MiB is skipped: the machine has {available} MiB available, and \
                 {SPARE_MIB} are to spare"
            );
            continue;
        }
        let mut measured = Measured::new();
        for backend in
            BACKENDS.iter().filter(|backend| wanted.iter().any(|name| name == backend.name))
        {
            let machine = machine(binary, memory, "tick");
            measured.extend(match &daemon {
                Some(daemon) if backend.name == "libvirt" => {
                    under_libvirt(&machine, daemon, backend, options.rounds)
                }
                _ => directly(&machine, backend, options.rounds),
            });
        }
        report(memory, &measured);
        all.push((memory, measured));
    }
    report_growth(&all);
    let results = all.iter().map(|(memory, ways)| json!({ "memory_mib": memory, "ways": ways }));
    document["results"] = results.collect::<Value>();
    options.write(&document);
    println!("\nWritten to {}", options.json.display());
    Ok(())
}

/// A snapshot and its effect on the guest.
#[derive(serde::Serialize)]
struct Taken {
    pause_us: u64,
    /// The library's statistics.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    library: Option<ByLibrary>,
}

#[derive(serde::Serialize)]
struct ByLibrary {
    /// The time of the migration's setup, in which memory is populated.
    setup_us: u64,
    /// Whether the guest was running during the setup.
    started_early: bool,
    /// The number of lost tries.
    lost: u32,
    /// The total pause of the lost tries.
    lost_pause_us: u64,
}

fn directly(machine: &Machine, backend: &Backend, rounds: usize) -> Measured {
    let guest = machine.start();
    wait_until_it_writes(&guest);
    let state_dir = guest.directory().join("state");
    std::fs::create_dir(&state_dir).unwrap();
    let handle = Handle::open_qmp(&guest.qmp(), None, &state_dir).unwrap();
    let mut monitor = Monitor::new(guest.control(), guest.directory());
    interleave(backend.ways, rounds, |way| {
        guest.wait_ticks(3);
        match way {
            "early start" => {
                by_library(&handle, EarlyStart::default(), "<domainsnapshot/>", &mut monitor)
            }
            "stop first" => by_library(&handle, STOP_FIRST, "<domainsnapshot/>", &mut monitor),
            "floor" => {
                let cat =
                    monitor.begin(true, File::options().write(true).open("/dev/null").unwrap());
                monitor.cancel(cat);
                monitor.flatten();
                Taken { pause_us: monitor.pauses().iter().sum(), library: None }
            }
            _ => unreachable!(),
        }
    })
}

fn under_libvirt(machine: &Machine, daemon: &Daemon, backend: &Backend, rounds: usize) -> Measured {
    // libvirt uses QEMU's first monitor exclusively.
    let socket = daemon.directory().join("guests/monitor.sock");
    let second = format!("unix:{},server=on,wait=off", socket.display());
    let guest = machine.clone().arg("-qmp").arg(&second).start_under(daemon);
    wait_until_it_writes(&guest);
    let mut monitor = Monitor::new(Client::connect(&socket).unwrap(), guest.directory());
    let mut opened = OpenedDomain::open(&guest);
    interleave(backend.ways, rounds, |way| {
        guest.wait_ticks(3);
        let (_, xml) = opened.next();
        let taken = match way {
            "libvirt" => by_library(&opened.handle, EarlyStart::default(), &xml, &mut monitor),
            "libvirt stop first" => by_library(&opened.handle, STOP_FIRST, &xml, &mut monitor),
            "libvirt non-live" => by_libvirt(&opened, NO_METADATA, &xml, &mut monitor),
            "libvirt live" => by_libvirt(&opened, NO_METADATA | LIVE, &xml, &mut monitor),
            _ => unreachable!(),
        };
        assert_eq!(opened.left(), [""; 0], "{way} leaves something");
        taken
    })
}

/// Memory of a killed QEMU is available only some time later. The error is the available amount.
fn wait_for_room(memory: u32) -> Result<(), u64> {
    let available = || kib("/proc/meminfo", "MemAvailable") / 1024;
    let wanted = u64::from(memory) + SPARE_MIB;
    wait_for(ROOM, || (available() >= wanted).then_some(())).ok_or_else(available)
}

fn wait_until_it_writes(guest: &Guest) {
    guest.try_ticks(1, BOOT).unwrap_or_else(|trouble| guest.fail(&trouble));
}

/// Takes a snapshot with the library, which undoes it when it is cancelled.
fn by_library(handle: &Handle, early_start: EarlyStart, xml: &str, monitor: &mut Monitor) -> Taken {
    handle.set_early_start(early_start);
    let flags = CreateFlags::parse(LIVE | INSTANT | NO_METADATA);
    let error = handle
        .create(xml, flags, None, &mut CancelAtInstant(handle))
        .expect_err("cancelled at the instant");
    assert_eq!(error.code, Code::OperationAborted, "{error}");
    assert!(!error.message.contains(';'), "something is left: {error}");
    let stats = handle.stats().unwrap();
    let mut pauses = monitor.pauses();
    let pause_us = pauses.pop().expect("a pause");
    // A QEMU that was not stopped in time can have stopped and resumed the guest by itself before.
    assert_eq!(pauses.is_empty(), stats.lost == 0, "{pauses:?} and {pause_us} µs: {stats:?}");
    let library = ByLibrary {
        setup_us: stats.setup.as_micros() as u64,
        started_early: stats.started_early,
        lost: stats.lost,
        lost_pause_us: pauses.iter().sum(),
    };
    Taken { pause_us, library: Some(library) }
}

struct CancelAtInstant<'a>(&'a Handle);

impl Observer for CancelAtInstant<'_> {
    fn event(&mut self, event: &Event) {
        if event.kind == EventKind::Instant {
            self.0.cancel().unwrap();
        }
    }
}

fn by_libvirt(opened: &OpenedDomain, flags: u32, xml: &str, monitor: &mut Monitor) -> Taken {
    drop(opened.domain.create_snapshot(xml, flags).unwrap());
    opened.flatten();
    Taken { pause_us: monitor.pauses().iter().sum(), library: None }
}

fn pauses(taken: &[Taken]) -> Vec<u64> {
    taken.iter().map(|taken| taken.pause_us).collect()
}

fn report(memory: u32, measured: &Measured) {
    println!("\n{memory} MiB:\n");
    println!(
        "| way | pause ms, median (min to max) | ratio to stop first | populate ms | started early | \
         tries lost | a lost try's pause ms |"
    );
    println!(
        "|-----|-------------------------------|---------------------|-------------|---------------|------------|-----------------------|"
    );
    for backend in &BACKENDS {
        let Some(stop_first) = measured.get(backend.stop_first) else { continue };
        let setups: Vec<u64> =
            stop_first.iter().filter_map(|taken| Some(taken.library.as_ref()?.setup_us)).collect();
        for way in backend.ways {
            let taken = &measured[way];
            let own = pauses(taken);
            println!(
                "| {way} | {} | {:.2} | {} | {} |",
                spread(&own),
                median(&own) / median(&pauses(stop_first)),
                if *way == backend.stop_first {
                    format!("{:.0}", median(&setups) / 1e3)
                } else {
                    "-".into()
                },
                if *way == backend.early_start { tries(taken) } else { "- | - | -".into() }
            );
        }
    }
}

/// The results of the early starts, for the last three cells of a row.
fn tries(taken: &[Taken]) -> String {
    let library: Vec<_> = taken.iter().filter_map(|taken| taken.library.as_ref()).collect();
    let won = library.iter().filter(|library| library.started_early).count();
    let lost: u32 = library.iter().map(|library| library.lost).sum();
    let tried = won + lost as usize;
    let share = if tried == 0 {
        String::new()
    } else {
        format!(" ({:.0} %)", 100.0 * f64::from(lost) / tried as f64)
    };
    // Several lost tries of one snapshot are added up.
    let with_lost = library.iter().filter(|library| library.lost > 0);
    let costs: Vec<u64> =
        with_lost.map(|library| library.lost_pause_us / u64::from(library.lost)).collect();
    let cost = if costs.is_empty() { "-".into() } else { format!("{:.1}", median(&costs) / 1e3) };
    format!("{won} of {} | {lost} of {tried}{share} | {cost}", library.len())
}

/// How much the median pause grows with each GiB.
fn report_growth(all: &[(u32, Measured)]) {
    if all.len() < 2 {
        return;
    }
    println!("\n| way | pause grows by, ms for each GiB |");
    println!("|-----|---------------------------------|");
    for way in BACKENDS.iter().flat_map(|backend| backend.ways) {
        let points: Vec<(f64, f64)> = all
            .iter()
            .filter_map(|(memory, measured)| {
                Some((f64::from(*memory) / 1024.0, median(&pauses(measured.get(way)?)) / 1e3))
            })
            .collect();
        if !points.is_empty() {
            println!("| {way} | {:.2} |", slope(&points));
        }
    }
}

/// The slope of the regression line by least squares.
fn slope(points: &[(f64, f64)]) -> f64 {
    let count = points.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
    let (x_mean, y_mean) = (mean(|point| point.0), mean(|point| point.1));
    let product: f64 = points.iter().map(|(x, y)| (x - x_mean) * (y - y_mean)).sum();
    let square: f64 = points.iter().map(|(x, _)| (x - x_mean).powi(2)).sum();
    product / square
}
