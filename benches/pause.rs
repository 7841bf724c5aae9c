// SPDX-License-Identifier: LGPL-2.1-or-later

//! How long a snapshot pauses the guest, and how long it takes, in five ways that are interleaved
//! on one guest.
//!
//!     cargo bench --bench pause -- [--rounds N] [--memory MIB,MIB] [--load idle,tick] [--qemu 7.2]
//!         [--json FILE]
//!
//! * `library`: this library, by QEMU's QMP socket.
//! * `driver`: the same by a driver's callbacks, whose monitor is a client of that socket.
//! * `floor`: the shortest sequence of QMP commands. Everything is prepared beforehand, and QEMU is
//!   polled every 20 µs.
//! * `patch`: the order of the libvirt patch that this project began with: overlays are created
//!   inside the pause.
//! * `non-live`: a full snapshot without INSTANT; the guest is paused until its memory is written.
//!
//! The pause is measured by QEMU's own STOP and RESUME events. `total` is the whole call of the
//! library, and for `floor` the same from its first command, with QEMU's stream going into `cat >
//! file`. After each snapshot its overlays are merged, so that each snapshot starts from the same
//! state.

mod common;

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;
use std::time::Instant;

use ::common::driver::TestDriver;
use common::monitor::Monitor;
use common::{Figures, Guests, interleave, kib};
use instantsnap::engine::Handle;
use instantsnap::model::flags::{CreateFlags, INSTANT, LIVE, NO_METADATA};
use instantsnap_testkit::{Guest, Machine};
use serde_json::json;

const WAYS: [&str; 5] = ["library", "driver", "floor", "patch", "non-live"];

fn main() -> common::Result<()> {
    let guests = Guests::parse(20, &[512, 4096], "bench-pause.json", |_, _| Ok(false))?;
    let results = guests.measure(&WAYS, "floor", |machine| measure(machine, guests.options.rounds));
    let peak = kib("/proc/self/status", "VmHWM");
    println!(
        "\nLargest resident memory of this process, library and benchmark together: {:.1} MiB",
        peak as f64 / 1024.0
    );
    guests.options.write(&json!({ "results": results, "peak_rss_kib": peak }));
    println!("Written to {}", guests.options.json.display());
    Ok(())
}

fn measure(machine: &Machine, rounds: usize) -> BTreeMap<&'static str, Figures> {
    let guest = machine.start();
    guest.wait_ticks(0);
    let state_dir = guest.directory().join("state");
    std::fs::create_dir(&state_dir).unwrap();
    let handle = Handle::open_qmp(&guest.qmp(), None, &state_dir).unwrap();
    let monitor = Monitor::new(guest.control(), guest.directory());
    let driven = Handle::open_driver(Arc::new(TestDriver::new(&guest, state_dir, false))).unwrap();
    let mut bench = Bench { guest: &guest, handle, driven, monitor };
    let taken = interleave(&WAYS, rounds, |way| bench.run(way));
    taken
        .into_iter()
        .map(|(way, taken)| {
            let (pause_us, total_us) = taken.into_iter().unzip();
            (way, Figures { pause_us, total_us })
        })
        .collect()
}

struct Bench<'a> {
    guest: &'a Guest,
    handle: Handle,
    driven: Handle,
    monitor: Monitor,
}

impl Bench<'_> {
    /// Takes a snapshot in one way, and undoes it. Returns the pause and the total time in
    /// microseconds.
    fn run(&mut self, way: &str) -> (u64, u64) {
        let started = Instant::now();
        match way {
            "library" => self.library(&self.handle, LIVE | INSTANT | NO_METADATA),
            "driver" => self.library(&self.driven, LIVE | INSTANT | NO_METADATA),
            "non-live" => self.library(&self.handle, NO_METADATA),
            "floor" => self.by_hand(true),
            "patch" => self.by_hand(false),
            _ => unreachable!(),
        }
        let total = started.elapsed();
        // The sum includes lost tries.
        let pause = self.monitor.pauses().iter().sum();
        self.monitor.flatten();
        (pause, total.as_micros() as u64)
    }

    fn library(&self, handle: &Handle, flags: u32) {
        let name = handle
            .create("<domainsnapshot/>", CreateFlags::parse(flags), None, &mut ())
            .unwrap()
            .name;
        std::fs::remove_file(self.guest.directory().join(format!("state/{name}.mem"))).unwrap();
    }

    fn by_hand(&mut self, prepared: bool) {
        let memory = self.guest.directory().join("by-hand.mem");
        let cat = self.monitor.begin(prepared, File::create(&memory).unwrap());
        self.monitor.finish(cat);
        std::fs::remove_file(memory).unwrap();
    }
}
