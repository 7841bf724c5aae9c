// SPDX-License-Identifier: LGPL-2.1-or-later

//! Random actions of other clients during a snapshot: what the tests by QMP and by libvirt share.
//!
//! `INSTANTSNAP_TEST_SEED` repeats the rounds of a seed; the timing can still differ.
//! `INSTANTSNAP_TEST_ROUNDS` sets the number of snapshots, for the short and the long run.

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use instantsnap::engine::Phase;
use instantsnap_testkit::{Binary, DEADLINE, Guest, thorough, wait_for};

/// SplitMix64.
pub struct Random(u64);

impl Random {
    /// Each round, or job, has its own generator, so that its numbers do not depend on the others.
    pub fn of_round(seed: u64, round: usize) -> Random {
        Random(seed.wrapping_add((round as u64).wrapping_mul(0xd1b5_4a32_d192_ed03)))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    pub fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }
}

/// The seed of this run.
pub fn seed() -> u64 {
    match std::env::var("INSTANTSNAP_TEST_SEED") {
        Ok(seed) => seed.parse().expect("INSTANTSNAP_TEST_SEED is a number"),
        Err(_) => SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros() as u64,
    }
}

/// When another client acts.
#[derive(Clone, Copy, Debug)]
pub enum When {
    /// When this phase begins; the phase waits for the action.
    In(Phase),
    /// This long after the start of this phase, in parallel to the snapshot.
    After(Phase, Duration),
}

impl When {
    pub fn random(random: &mut Random, phase: Phase, longest: Duration) -> When {
        match random.below(2) {
            0 => When::In(phase),
            _ => When::After(
                phase,
                Duration::from_micros(random.below(longest.as_micros() as usize) as u64),
            ),
        }
    }

    fn phase(self) -> Phase {
        match self {
            When::In(phase) | When::After(phase, _) => phase,
        }
    }
}

/// An action of another client, and its time.
#[derive(Clone, Copy, Debug)]
pub struct TimedAction<W> {
    pub what: W,
    pub when: When,
}

/// Runs `snapshot`, and the other clients' actions within or beside its phases.
pub fn run_with_actions<W: Copy + Send, T: Send>(
    actions: &[TimedAction<W>],
    mut act: impl FnMut(TimedAction<W>) + Send,
    snapshot: impl FnOnce(&mut dyn FnMut(Phase)) -> T,
) -> T {
    let (send, parallel_actions) = channel::<TimedAction<W>>();
    let act = Mutex::new(&mut act);
    std::thread::scope(|scope| {
        let act = &act;
        scope.spawn(move || {
            for action in parallel_actions {
                if let When::After(_, delay) = action.when {
                    std::thread::sleep(delay);
                }
                act.lock().unwrap()(action);
            }
        });
        let mut left = actions.to_vec();
        let mut at = |phase: Phase| {
            let now = |action: &mut TimedAction<W>| action.when.phase() == phase;
            for action in left.extract_if(.., now) {
                match action.when {
                    When::In(_) => act.lock().unwrap()(action),
                    When::After(..) => send.send(action).unwrap(),
                }
            }
        };
        let result = snapshot(&mut at);
        drop(send);
        result
    })
}

/// Asserts that the guest counts on. A reset starts it from the beginning.
#[track_caller]
pub fn assert_counts(guest: &Guest, what: &str) {
    let mut last = guest.serial().tick;
    for _ in 0..3 {
        let counted = wait_for(DEADLINE, || {
            let serial = guest.serial();
            if let Some(trouble) = serial.trouble {
                guest.fail(&format!("{what}: {trouble}"));
            }
            if !guest.alive() {
                guest.fail(&format!("{what}: QEMU has ended"));
            }
            (serial.tick.is_some() && serial.tick != last).then_some(serial.tick)
        });
        last = counted.unwrap_or_else(|| guest.fail(&format!("{what}: it does not count")));
    }
}

/// Asserts that no file of a failed snapshot is left below a directory, but those that its error
/// names.
#[track_caller]
pub fn assert_no_files(directory: &Path, name: &str, error: &str, what: &str) {
    let left = || {
        let mut files = super::files_below(directory);
        files.retain(|file| is_of(file, name) && !error.contains(&*file.to_string_lossy()));
        files
    };
    let gone = wait_for(Duration::from_secs(10), || left().is_empty().then_some(()));
    assert!(gone.is_some(), "{what}: left: {:?}", left());
}

fn is_of(file: &Path, name: &str) -> bool {
    let file = file.file_name().unwrap().to_string_lossy();
    file.ends_with(&format!(".{name}")) || file.starts_with(&format!("{name}."))
}

/// The number of rounds.
pub struct Extent {
    /// The number of snapshots in the long run.
    pub snapshots: usize,
    /// The time limit of the long run.
    pub time: Duration,
    /// Rounds of one guest, whose backing chain grows. In the short run there is one guest of each
    /// QEMU.
    pub rounds: usize,
    pub rounds_short: usize,
}

/// Runs rounds with all `binaries` in parallel until there are enough.
pub fn rounds(
    binaries: &'static [Binary],
    extent: &Extent,
    rounds_of_guest: impl Fn(&'static Binary, u64, std::ops::Range<usize>) + Sync,
) {
    let seed = seed();
    eprintln!("seed {seed}");
    let asked = std::env::var("INSTANTSNAP_TEST_ROUNDS").ok();
    let asked: Option<usize> =
        asked.map(|rounds| rounds.parse().expect("INSTANTSNAP_TEST_ROUNDS is a number"));
    let (long, begin, taken) = (thorough(), Instant::now(), AtomicUsize::new(0));
    let rounds = if long { extent.rounds } else { extent.rounds_short };
    let goal = asked.unwrap_or(if long { extent.snapshots } else { 1 });
    std::thread::scope(|scope| {
        for (number, binary) in binaries.iter().enumerate() {
            let (rounds_of_guest, taken) = (&rounds_of_guest, &taken);
            scope.spawn(move || {
                let seed = seed.wrapping_add(number as u64);
                for guest in 0.. {
                    // The short run has one guest of each QEMU, even if the other QEMU has finished
                    // before.
                    let first = guest == 0;
                    let enough =
                        taken.load(Ordering::Relaxed) >= goal || begin.elapsed() > extent.time;
                    if enough && !first {
                        break;
                    }
                    rounds_of_guest(binary, seed, guest * rounds..(guest + 1) * rounds);
                    taken.fetch_add(rounds, Ordering::Relaxed);
                }
            });
        }
    });
    eprintln!("seed {seed}: about {} snapshots in {:?}", taken.into_inner(), begin.elapsed());
}
