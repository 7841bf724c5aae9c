// SPDX-License-Identifier: LGPL-2.1-or-later

//! How long a snapshot of a stock libvirt's domain pauses the domain, and how long it takes, in
//! four ways that are interleaved on one guest.
//!
//!     cargo bench --bench libvirt -- [--rounds N] [--memory MIB,MIB] [--load idle,tick] [--qemu 7.2]
//!         [--daemon session|system] [--json FILE]
//!
//! * `library`: this library.
//! * `by hand`: the shortest sequence of libvirt's functions with the same result, in
//!   `libvirt_by_hand.py`. Everything is prepared beforehand, and QEMU is polled continuously.
//! * `non-live`: libvirt's own full snapshot; the guest is paused until its memory is written.
//! * `live`: libvirt's own with LIVE; the guest runs while its memory is written, and the snapshot
//!   is of the moment at which that ends.
//!
//! The pause is measured by QEMU's own STOP and RESUME events, which a separate program receives by
//! libvirt. `total` is the whole call; for `by hand` QEMU's stream goes into `cat > file`, which
//! does not wait until the file is on disk. After each snapshot its overlay is merged, so that each
//! snapshot starts from the same state.

mod common;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use common::domain::OpenedDomain;
use common::{Figures, Guests, interleave, word};
use instantsnap::engine::Phase;
use instantsnap::model::flags::{CreateFlags, INSTANT, LIVE, NO_METADATA};
use instantsnap_testkit::compile::workspace;
use instantsnap_testkit::{Daemon, Guest, Machine};
use serde_json::{Value, json};

const WAYS: [&str; 4] = ["library", "by hand", "non-live", "live"];
/// Debian's Python, which has libvirt's module.
const PYTHON: &str = "/usr/bin/python3";

fn main() -> common::Result<()> {
    let mut system = false;
    let guests = Guests::parse(20, &[512], "bench-libvirt.json", |name, parser| {
        if name == "daemon" {
            system = match word(parser)?.as_str() {
                "session" => false,
                "system" => true,
                other => return Err(format!("unknown daemon {other}: session or system").into()),
            };
        }
        Ok(name == "daemon")
    })?;
    let daemon = match system {
        true => Daemon::system().expect("no daemon of the system's kind"),
        false => Daemon::session(),
    };
    let results = guests
        .measure(&WAYS, "by hand", |machine| measure(machine, &daemon, guests.options.rounds));
    let (major, minor, micro) = Daemon::version();
    guests
        .options
        .write(&json!({ "libvirt": format!("{major}.{minor}.{micro}"), "results": results }));
    println!(
        "\nlibvirt {major}.{minor}.{micro}, {:?}. Written to {}",
        daemon.mode(),
        guests.options.json.display()
    );
    Ok(())
}

#[derive(Default, serde::Serialize)]
struct Way {
    #[serde(flatten)]
    figures: Figures,
    /// The times of the steps within the pause, measured by the library or by the script.
    steps_us: BTreeMap<&'static str, Vec<u64>>,
}

impl AsRef<Figures> for Way {
    fn as_ref(&self) -> &Figures {
        &self.figures
    }
}

impl FromIterator<Measured> for Way {
    fn from_iter<I: IntoIterator<Item = Measured>>(all: I) -> Way {
        let mut way = Way::default();
        for measured in all {
            way.figures.pause_us.push(measured.pause);
            way.figures.total_us.push(measured.total);
            for (step, duration) in measured.steps {
                way.steps_us.entry(step).or_default().push(duration);
            }
        }
        way
    }
}

const STEPS: [&str; 4] = ["stop", "switch", "arm", "resume"];

fn measure(machine: &Machine, daemon: &Daemon, rounds: usize) -> BTreeMap<&'static str, Way> {
    let guest = machine.start_under(daemon);
    guest.wait_ticks(0);
    let mut bench = Bench::start(&guest);
    let taken = interleave(&WAYS, rounds, |way| bench.run(way));
    taken.into_iter().map(|(way, taken)| (way, taken.into_iter().collect())).collect()
}

/// The figures of one snapshot, in microseconds.
struct Measured {
    pause: u64,
    total: u64,
    steps: Vec<(&'static str, u64)>,
}

struct Bench<'a> {
    opened: OpenedDomain<'a>,
    by_hand: Script,
    input: ChildStdin,
    events: Receiver<(String, u64)>,
    _listener: Script,
}

impl<'a> Bench<'a> {
    fn start(guest: &'a Guest) -> Bench<'a> {
        let opened = OpenedDomain::open(guest);
        let mut by_hand = Script::start(guest, "snapshot");
        let input = by_hand.child.stdin.take().expect("a pipe");
        let mut listener = Script::start(guest, "events");
        let events = listener.listen();
        Bench { opened, by_hand, input, events, _listener: listener }
    }

    /// Takes a snapshot in one way, and undoes it.
    fn run(&mut self, way: &str) -> Measured {
        let memory = self.opened.memory();
        let (name, xml) = self.opened.next();
        let mut steps = Vec::new();
        let started = Instant::now();
        match way {
            "library" => {
                let flags = CreateFlags::parse(LIVE | INSTANT | NO_METADATA);
                self.opened.handle.create(&xml, flags, None, &mut ()).unwrap();
                let stats = self.opened.handle.stats().unwrap();
                let phases = [Phase::Pause, Phase::Switch, Phase::Arm];
                steps.extend(
                    STEPS
                        .into_iter()
                        .zip(phases.map(|phase| stats.phase(phase).as_micros() as u64)),
                );
            }
            "by hand" => steps = self.by_hand(&memory, &name),
            "non-live" => drop(self.opened.domain.create_snapshot(&xml, NO_METADATA).unwrap()),
            "live" => drop(self.opened.domain.create_snapshot(&xml, NO_METADATA | LIVE).unwrap()),
            _ => unreachable!(),
        }
        let total = started.elapsed().as_micros() as u64;
        self.opened.flatten();
        Measured { pause: self.pause(), total, steps }
    }

    fn by_hand(&mut self, memory: &Path, name: &str) -> Vec<(&'static str, u64)> {
        let disk = &self.opened.guest.disks()[0].file;
        let overlay = disk.with_extension(name);
        let user = self.opened.guest.daemon().user();
        writeln!(
            self.input,
            "{} {} {} {user}",
            disk.display(),
            overlay.display(),
            memory.display()
        )
        .unwrap();
        let took: Value = serde_json::from_str(&self.by_hand.line()).expect("JSON");
        STEPS.into_iter().map(|step| (step, took[step].as_u64().expect("a number"))).collect()
    }

    /// How long the guest was paused since the last call.
    fn pause(&mut self) -> u64 {
        let next = || self.events.recv_timeout(Duration::from_secs(10)).ok();
        let (mut paused, mut resumed_at) = (0, None);
        let mut event = next();
        while let Some((what, stopped_at)) = event {
            assert_eq!(what, "STOP", "after {resumed_at:?}");
            let (what, time) = next().expect("a RESUME event");
            assert_eq!(what, "RESUME");
            paused += time - stopped_at;
            resumed_at = Some(time);
            // The earlier events have arrived before the reply about the merge.
            event = self.events.try_recv().ok();
        }
        assert!(resumed_at.is_some(), "no STOP event");
        paused
    }
}

/// A running `libvirt_by_hand.py`.
struct Script {
    child: Child,
    output: Option<BufReader<ChildStdout>>,
}

impl Script {
    fn start(guest: &Guest, what: &str) -> Script {
        let mut command = Command::new(PYTHON);
        command.arg(workspace().join("benches/libvirt_by_hand.py")).args([
            what,
            &guest.daemon().uri(),
            guest.name(),
        ]);
        command.env("HOME", guest.daemon().directory().join("client"));
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 cannot be run");
        let output = child.stdout.take().map(BufReader::new);
        let mut script = Script { child, output };
        assert_eq!(
            script.line(),
            "ready",
            "libvirt_by_hand.py does not start: is python3-libvirt installed?"
        );
        script
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.as_mut().expect("not listened to").read_line(&mut line).expect("UTF-8");
        line.trim_end().to_owned()
    }

    /// The events that it prints from now on, with their times.
    fn listen(&mut self) -> Receiver<(String, u64)> {
        let output = self.output.take().expect("listened to once");
        let (said, heard) = mpsc::channel();
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                let (event, time) = line.split_once(' ').expect("an event and its time");
                let _ = said.send((event.to_owned(), time.parse().expect("microseconds")));
            }
        });
        heard
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
