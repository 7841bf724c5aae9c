//! For how long a snapshot pauses the guest, and how long it takes: four ways of doing the same, interleaved on one guest.
//!
//!     cargo bench --bench pause -- [--rounds N] [--memory MIB,MIB] [--load idle,tick] [--qemu 7.2]
//!         [--json FILE]
//!
//! * `library`: this library.
//! * `floor`: the shortest sequence of QMP commands, with everything prepared beforehand, and QEMU asked every 20 µs.
//! * `patch`: the order of the libvirt patch that this project began with: overlays are created inside the pause.
//! * `plain`: a full snapshot without INSTANT; the guest is paused until its memory is written.
//!
//! The pause is that of QEMU's own STOP and RESUME events. `total` is the whole call of the library, and for `floor` the
//! same from its first command, with QEMU's stream going into `cat > file`. After each snapshot its overlays are merged
//! back, so that each finds the guest as the first did.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use instantsnap::engine::Handle;
use instantsnap::flags::{INSTANT, LIVE, NO_METADATA};
use instantsnap_testkit::{Binary, Client, Format, Guest, Machine, wait_for};
use serde_json::{Value, json};

const LONG: Duration = Duration::from_secs(600);

struct Options {
    rounds: usize,
    memory: Vec<u32>,
    loads: Vec<String>,
    qemu: Option<String>,
    json: PathBuf,
}

fn main() -> Result<(), lexopt::Error> {
    let options = options()?;
    let mut results = Vec::new();
    println!(
        "| QEMU | guest | load | way | pause ms, median (min to max) | ratio to floor | total ms, median | ratio |"
    );
    println!(
        "|------|-------|------|-----|-------------------------------|----------------|------------------|-------|"
    );
    for binary in Binary::all() {
        if options.qemu.as_ref().is_some_and(|wanted| !binary.name.starts_with(wanted.as_str())) {
            continue;
        }
        for &memory in &options.memory {
            for load in &options.loads {
                let measured = measure(binary, memory, load, &options);
                report(&binary.name, memory, load, &measured);
                results.push(json!({
                    "qemu": binary.name, "memory_mib": memory, "load": load, "rounds": options.rounds, "ways": measured,
                }));
            }
        }
    }
    let peak = peak_memory_kib();
    println!(
        "\nLargest resident memory of this process, library and benchmark together: {:.1} MiB",
        peak as f64 / 1024.0
    );
    let document = json!({ "results": results, "peak_rss_kib": peak });
    std::fs::write(&options.json, format!("{document:#}\n")).expect("the JSON file cannot be written");
    println!("Written to {}", options.json.display());
    Ok(())
}

fn options() -> Result<Options, lexopt::Error> {
    use lexopt::prelude::*;
    let mut options = Options {
        rounds: 20,
        memory: vec![512, 4096],
        loads: vec!["idle".into(), "tick".into()],
        qemu: None,
        json: instantsnap_testkit::compile::workspace().join("target/bench-pause.json"),
    };
    let mut parser = lexopt::Parser::from_env();
    while let Some(argument) = parser.next()? {
        match argument {
            Long("rounds") => options.rounds = parser.value()?.parse()?,
            Long("memory") => {
                let list = parser.value()?.string()?;
                options.memory = list
                    .split(',')
                    .map(|mib| mib.parse::<u32>().map_err(|error| error.to_string()))
                    .collect::<std::result::Result<_, String>>()?;
            }
            Long("load") => options.loads = parser.value()?.string()?.split(',').map(str::to_owned).collect(),
            Long("qemu") => options.qemu = Some(parser.value()?.string()?),
            Long("json") => options.json = parser.value()?.into(),
            // Of cargo bench.
            Long("bench") => {}
            Value(_) => {}
            _ => return Err(argument.unexpected()),
        }
    }
    Ok(options)
}

/// One figure a round: microseconds.
#[derive(Default, serde::Serialize)]
struct Way {
    pause_us: Vec<u64>,
    total_us: Vec<u64>,
}

fn measure(binary: &'static Binary, memory: u32, load: &str, options: &Options) -> BTreeMap<&'static str, Way> {
    // All memory is there from the start: a guest that has run for a while.
    let mut machine = Machine::new(binary).memory(memory).prealloc().disk(Format::Raw);
    machine = match load {
        "idle" => machine.append("halt=1"),
        "tick" => machine.append("dense=64"),
        other => panic!("unknown load {other}: idle or tick"),
    };
    let guest = machine.start();
    guest.wait_ticks(0);
    let state_dir = guest.directory().join("state");
    std::fs::create_dir(&state_dir).unwrap();
    let handle = Handle::open_qmp(&guest.qmp(), None, &state_dir).unwrap();
    let mut bench = Bench { guest: &guest, handle, client: guest.control() };
    let mut ways: BTreeMap<&'static str, Way> = BTreeMap::new();
    // The first round is for warming up.
    for round in 0..=options.rounds {
        let mut order = ["library", "floor", "patch", "plain"];
        order.rotate_left(round % 4);
        for way in order {
            let (pause, total) = bench.run(way);
            if round > 0 {
                let way = ways.entry(way).or_default();
                way.pause_us.push(pause);
                way.total_us.push(total);
            }
        }
    }
    ways
}

struct Bench<'a> {
    guest: &'a Guest,
    handle: Handle,
    client: Client,
}

impl Bench<'_> {
    /// Takes a snapshot one way, and undoes it; pause and total time in microseconds.
    fn run(&mut self, way: &str) -> (u64, u64) {
        self.client.events();
        let started = Instant::now();
        match way {
            "library" => self.library(LIVE | INSTANT | NO_METADATA),
            "plain" => self.library(NO_METADATA),
            "floor" => self.by_hand(true),
            "patch" => self.by_hand(false),
            _ => unreachable!(),
        }
        let total = started.elapsed();
        let events = self.client.events();
        let stop = events.iter().find(|event| event.name == "STOP").expect("a STOP event");
        let resume = events.iter().find(|event| event.name == "RESUME").expect("a RESUME event");
        self.flatten();
        (resume.timestamp_us - stop.timestamp_us, total.as_micros() as u64)
    }

    fn library(&mut self, flags: u32) {
        let record = self.handle.create("<domainsnapshot/>", flags, &mut ()).unwrap();
        std::fs::remove_file(record.memory_file).unwrap();
    }

    fn by_hand(&mut self, prepared: bool) {
        let memory = self.guest.directory().join("by-hand.mem");
        let overlay = self.guest.directory().join("by-hand.overlay");
        let top = self.top();
        let create = |bench: &mut Self| bench.create_overlay(&overlay, &top);
        if prepared {
            create(self);
        }
        let mut cat = self.send_pipe_to_cat(&memory);
        self.set_background(true);

        self.command("stop", json!({}));
        if !prepared {
            create(self);
        }
        let switch = json!({ "node": top["node-name"], "overlay": "by-hand" });
        let actions = json!([{ "type": "blockdev-snapshot", "data": switch }]);
        self.command("transaction", json!({ "actions": actions }));
        self.command("migrate", json!({ "uri": "fd:by-hand" }));
        while !self.saves_pages() {
            std::thread::sleep(Duration::from_micros(20));
        }
        if self.command("query-status", json!({}))["running"] != true {
            self.command("cont", json!({}));
        }

        assert!(cat.wait().unwrap().success());
        wait_for(LONG, || {
            let migration = self.command("query-migrate", json!({}));
            let status = migration["status"].as_str().unwrap();
            assert_ne!(status, "failed");
            (status == "completed").then_some(())
        })
        .expect("the migration does not end");
        self.set_background(false);
        std::fs::remove_file(memory).unwrap();
    }

    fn saves_pages(&mut self) -> bool {
        let migration = self.command("query-migrate", json!({}));
        let pages = |kind: &str| migration["ram"][kind].as_u64().unwrap_or(0);
        assert_ne!(migration["status"], "failed");
        pages("normal") + pages("duplicate") > 0
    }

    /// By QEMU, as libvirt does it.
    fn create_overlay(&mut self, path: &Path, top: &Value) {
        File::create(path).unwrap();
        let file = json!({ "driver": "file", "node-name": "by-hand-file", "filename": path });
        self.command("blockdev-add", file);
        let options = json!({
            "driver": "qcow2", "file": "by-hand-file", "size": top["image"]["virtual-size"],
            "backing-file": top["file"], "backing-fmt": top["drv"],
        });
        self.command("blockdev-create", json!({ "job-id": "by-hand", "options": options }));
        while self.command("query-jobs", json!({}))[0]["status"] != "concluded" {}
        self.command("job-dismiss", json!({ "id": "by-hand" }));
        let overlay = json!({ "driver": "qcow2", "node-name": "by-hand", "file": "by-hand-file", "backing": null });
        self.command("blockdev-add", overlay);
    }

    fn send_pipe_to_cat(&mut self, memory: &Path) -> Child {
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let cat = Command::new("cat").stdin(Stdio::from(read)).stdout(File::create(memory).unwrap()).spawn().unwrap();
        self.client.execute_with_fd("getfd", json!({ "fdname": "by-hand" }), write.as_fd()).unwrap();
        cat
    }

    fn set_background(&mut self, state: bool) {
        let set = json!([{ "capability": "background-snapshot", "state": state }]);
        self.command("migrate-set-capabilities", json!({ "capabilities": set }));
    }

    /// Merges everything back into the base image, and removes all overlays.
    fn flatten(&mut self) {
        let top = self.top();
        if top["image"]["backing-image"].is_object() {
            self.command("block-commit", json!({ "job-id": "flatten", "device": top["node-name"] }));
        }
        wait_for(LONG, || {
            let jobs = self.command("query-block-jobs", json!({}));
            if jobs[0]["ready"] == true && jobs[0]["status"] == "ready" {
                let _ = self.client.execute("block-job-complete", json!({ "device": "flatten" }));
            }
            jobs.as_array().is_some_and(Vec::is_empty).then_some(())
        })
        .expect("the overlays cannot be merged");
        let nodes = self.command("query-named-block-nodes", json!({ "flat": true }));
        let mut ours: Vec<(&str, &str)> = Vec::new();
        for node in nodes.as_array().unwrap() {
            let (name, file) = (node["node-name"].as_str().unwrap(), node["file"].as_str().unwrap());
            if name.starts_with("by-hand") || name.starts_with("instantsnap-") {
                ours.push((name, file));
            }
        }
        // A format node goes before its file.
        for (name, file) in ours.iter().chain(&ours) {
            let _ = self.client.execute("blockdev-del", json!({ "node-name": name }));
            let _ = std::fs::remove_file(file);
        }
    }

    fn top(&mut self) -> Value {
        let blocks = self.command("query-block", json!({}));
        let block = blocks.as_array().unwrap().iter().find(|block| block["inserted"].is_object());
        block.expect("a disk")["inserted"].clone()
    }

    fn command(&mut self, command: &str, arguments: Value) -> Value {
        self.client.execute(command, arguments).unwrap_or_else(|error| panic!("{command}: {error}"))
    }
}

fn median(figures: &[u64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_unstable();
    let middle = sorted.len() / 2;
    match sorted.len() % 2 {
        0 => (sorted[middle - 1] + sorted[middle]) as f64 / 2.0,
        _ => sorted[middle] as f64,
    }
}

fn report(qemu: &str, memory: u32, load: &str, ways: &BTreeMap<&'static str, Way>) {
    let floor = &ways["floor"];
    for name in ["library", "floor", "patch", "plain"] {
        let way = &ways[name];
        let pause = median(&way.pause_us);
        let total = median(&way.total_us);
        println!(
            "| {qemu} | {memory} MiB | {load} | {name} | {:.1} ({:.1} to {:.1}) | {:.2} | {:.0} | {:.2} |",
            pause / 1e3,
            *way.pause_us.iter().min().unwrap() as f64 / 1e3,
            *way.pause_us.iter().max().unwrap() as f64 / 1e3,
            pause / median(&floor.pause_us),
            total / 1e3,
            total / median(&floor.total_us),
        );
    }
}

fn peak_memory_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}
