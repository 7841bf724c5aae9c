// SPDX-License-Identifier: LGPL-2.1-or-later

//! At random: many jobs at once on many guests, each cancelled at some moment or not at all.
//! Afterwards the guests run as before, and the complete snapshots can be restored.
//!
//! `INSTANTSNAP_TEST_SEED` repeats the jobs of a seed; the timing can still differ.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::jobs::Listener;
use common::random_clients::{Random, seed};
use common::{ALL_SECTORS, INSTANTLY, Opened, PHASES, assert_untouched, machine, named};
use instantsnap::engine::{Phase, Returns};
use instantsnap::error::{Code, Error};
use instantsnap_testkit::{Binary, DEADLINE, Gate, only_when_thorough, test, wait_for};

/// When a job is cancelled.
#[derive(Clone, Copy, Debug)]
enum Cancelled {
    Never,
    /// In this phase, which waits for the cancel.
    In(Phase),
    /// Around the start of this phase.
    About(Phase),
    After(Duration),
}

#[derive(Clone, Copy, Debug)]
struct Plan {
    flags: u32,
    returns: Returns,
    cancelled: Cancelled,
}

impl Plan {
    fn new(random: &mut Random) -> Plan {
        let phase = PHASES[random.below(PHASES.len())];
        let cancelled = match random.below(4) {
            0 => Cancelled::Never,
            1 => Cancelled::In(phase),
            2 => Cancelled::About(phase),
            _ => Cancelled::After(Duration::from_micros(random.below(150_000) as u64)),
        };
        Plan {
            flags: if random.below(8) == 0 { 0 } else { INSTANTLY },
            returns: if random.below(2) == 0 { Returns::AtOnce } else { Returns::AtInstant },
            cancelled,
        }
    }

    /// Runs the job to its end.
    fn run(self, opened: &Opened, name: &str) -> Result<String, Error> {
        let (gate, ended) = (Gate::default(), AtomicBool::new(false));
        let listener = match self.cancelled {
            Cancelled::In(phase) => Listener::default().hold(phase, &gate),
            Cancelled::About(phase) => {
                gate.release();
                Listener::default().hold(phase, &gate)
            }
            Cancelled::Never | Cancelled::After(_) => Listener::default(),
        };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                match self.cancelled {
                    Cancelled::Never => return,
                    Cancelled::After(delay) => std::thread::sleep(delay),
                    Cancelled::In(_) | Cancelled::About(_) => {
                        // A job can end before it comes to that phase.
                        let come = || {
                            let arrived = gate.wait_arrived(Duration::ZERO);
                            (arrived || ended.load(Ordering::Relaxed)).then_some(())
                        };
                        wait_for(DEADLINE, come).expect("the phase begins, or the job ends");
                    }
                }
                // The job can have ended already.
                let _ = opened.handle.cancel();
                gate.release();
            });
            let result = opened
                .start_job(&named(name), self.flags, listener, self.returns)
                .and_then(|job| {
                    assert!(job.wait(None));
                    job.result()
                });
            ended.store(true, Ordering::Relaxed);
            result
        })
    }
}

/// Runs jobs one after the other on one guest. Returns the names of the complete snapshots.
fn run_jobs(opened: &Opened, seed: u64, numbers: impl Iterator<Item = usize>) -> Vec<String> {
    let mut complete = Vec::new();
    for number in numbers {
        let plan = Plan::new(&mut Random::of_round(seed, number));
        let name = format!("job-{number}");
        let before = opened.trace();
        let result = plan.run(opened, &name);
        eprintln!("{name} {}: {plan:?}: {result:?}", opened.guest.directory().display());
        match result {
            Ok(name) => {
                complete.push(name);
                let after = opened.trace();
                for part in ["status", "capabilities", "parameters", "jobs", "block jobs", "fdsets"]
                {
                    assert_eq!(before.qemu.0[part], after.qemu.0[part], "{plan:?}");
                }
            }
            Err(error) => {
                assert_eq!(error.code, Code::OperationAborted, "{plan:?}: {error}");
                assert_eq!(error.message, "the snapshot was cancelled", "{plan:?}");
                assert_untouched(opened, &before);
            }
        }
        match plan.cancelled {
            Cancelled::Never => assert_eq!(complete.last(), Some(&name)),
            // A non-live snapshot has nothing left to drain once it is saved.
            Cancelled::In(phase) if plan.flags != 0 || phase != Phase::Drain => {
                assert_ne!(complete.last(), Some(&name), "{plan:?}");
            }
            _ => {}
        }
        opened.guest.wait_ticks(1);
    }
    complete
}

/// The open descriptors of this process, counted by kind.
fn own_files() -> BTreeMap<String, usize> {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir("/proc/self/fd").unwrap().flatten() {
        if let Ok(target) = std::fs::read_link(entry.path()) {
            let kind = target.to_string_lossy().split(":[").next().unwrap_or_default().to_owned();
            *files.entry(kind).or_default() += 1;
        }
    }
    files
}

fn jobs_at_random(guests: usize, jobs: usize, restored: usize) {
    let seed = seed();
    println!("INSTANTSNAP_TEST_SEED={seed}");
    let binaries = Binary::all().iter().cycle();
    let opened: Vec<_> =
        binaries.take(guests).map(|binary| Opened::start(&machine(binary, 2).memory(32))).collect();
    let files = own_files();
    let complete: Vec<(&Opened, String)> = std::thread::scope(|scope| {
        let threads = opened.iter().enumerate().map(|(first, opened)| {
            scope.spawn(move || run_jobs(opened, seed, (first..jobs).step_by(guests)))
        });
        let threads: Vec<_> = threads.collect();
        let all = threads
            .into_iter()
            .zip(&opened)
            .map(|(thread, opened)| (opened, thread.join().unwrap()));
        all.flat_map(|(opened, names)| names.into_iter().map(move |name| (opened, name))).collect()
    });
    println!("{} of {jobs} are complete", complete.len());
    // Detached threads end a moment later.
    let closed = wait_for(DEADLINE, || (own_files() == files).then_some(()));
    assert!(closed.is_some(), "{files:?} before, {:?} after", own_files());
    for opened in &opened {
        opened.guest.wait_ticks(ALL_SECTORS);
    }
    let mut random = Random::of_round(seed, 0);
    let mut left = complete;
    for _ in 0..restored.min(left.len()) {
        let (opened, name) = left.swap_remove(random.below(left.len()));
        opened.restore_clone(&name);
    }
}

#[test]
fn randomly_cancelled_jobs_do_not_harm_guests() {
    jobs_at_random(4, 40, 6);
}

#[test]
fn two_hundred_random_jobs_do_not_harm_eight_guests() {
    only_when_thorough();
    jobs_at_random(8, 200, usize::MAX);
}
