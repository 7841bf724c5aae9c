// SPDX-License-Identifier: LGPL-2.1-or-later

//! The progress of populate, QEMU's touching of all of the guest's memory, as seen from outside.
//!
//! QEMU does not report this progress. But populate is always the same work, done by one thread
//! that does nothing else. So the CPU time of that thread tells more than the clock, which goes on
//! while the thread waits for a CPU. The kernel reports it (`/proc/PID/task/TID/schedstat`) to a
//! process that may see QEMU's. Where it does not, the clock is used.

use std::fs;
use std::time::{Duration, Instant};

/// The kernel can be this far behind with counting the CPU time of a running thread. So the thread
/// is sampled at this interval.
const UNCOUNTED: Duration = Duration::from_millis(1);

/// The work of one migration's setup.
#[derive(Debug)]
pub struct PopulateProgress {
    process: Option<u32>,
    /// The threads that QEMU had before the migration: populate's is none of them.
    others: Vec<u32>,
    /// The threads that may be populate's.
    threads: Vec<u32>,
    begun: Instant,
    /// The changes of the thread's CPU time: when each was seen, and the CPU time from then on.
    samples: Vec<(Duration, Duration)>,
}

impl PopulateProgress {
    /// The progress of a migration that begins now. `process` is QEMU's; with `None` the clock is
    /// used.
    pub fn begin(process: Option<u32>) -> PopulateProgress {
        let others = process.map(threads).unwrap_or_default();
        PopulateProgress {
            process,
            others,
            threads: Vec::new(),
            begun: Instant::now(),
            samples: Vec::new(),
        }
    }

    /// The work that is done so far: rather too much than too little. The migration has begun.
    pub fn done(&mut self) -> Duration {
        let cpu = self.cpu_time();
        let now = self.begun.elapsed();
        match cpu {
            Some(cpu) => self.note(now, cpu),
            None => now,
        }
    }

    /// How long to wait before the next look at the thread, when `rest` of the work is left.
    pub fn interval(rest: Duration) -> Duration {
        if rest > 8 * UNCOUNTED { rest / 2 } else { rest.min(UNCOUNTED) }
    }

    /// How much work setup was in all, when it ended at `end`.
    pub fn total_at(&self, end: Duration) -> Duration {
        let Some(last) = self.samples.iter().rposition(|(at, _)| *at <= end) else { return end };
        let (at, done) = self.samples[last];
        let rest = end - at;
        // The thread was sampled until the guest was stopped. From then on it has had a CPU for
        // itself.
        let Some((next_at, next)) = self.samples.get(last + 1) else { return done + rest };
        done + (*next - done).mul_f64(rest.as_secs_f64() / (*next_at - at).as_secs_f64())
    }

    fn note(&mut self, now: Duration, cpu: Duration) -> Duration {
        let last = self.samples.last().copied();
        let (at, done) = match last.filter(|(_, done)| *done >= cpu) {
            Some(unchanged) => unchanged,
            None => {
                self.samples.push((now, cpu));
                (now, cpu)
            }
        };
        (done + (now - at)).min(now)
    }

    /// The CPU time of populate's thread. Other threads can begin at the same time: populate's is
    /// the one that has the most.
    fn cpu_time(&mut self) -> Option<Duration> {
        let process = self.process?;
        if self.threads.is_empty() {
            self.threads = threads(process);
            self.threads.retain(|thread| !self.others.contains(thread));
        }
        self.threads.iter().filter_map(|thread| cpu_time(process, *thread)).max()
    }
}

fn threads(process: u32) -> Vec<u32> {
    let Ok(entries) = fs::read_dir(format!("/proc/{process}/task")) else { return Vec::new() };
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect()
}

fn cpu_time(process: u32, thread: u32) -> Option<Duration> {
    let text = fs::read_to_string(format!("/proc/{process}/task/{thread}/schedstat")).ok()?;
    text.split_ascii_whitespace().next()?.parse().ok().map(Duration::from_nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn between_two_looks_the_thread_is_taken_to_run() {
        let mut progress = PopulateProgress::begin(None);
        assert_eq!(progress.note(10 * MS, 8 * MS), 8 * MS);
        assert_eq!(progress.note(13 * MS, 8 * MS), 11 * MS);
        assert_eq!(progress.note(14 * MS, 9 * MS), 9 * MS);
        // Never more than the time that has passed.
        assert_eq!(progress.note(15 * MS, 20 * MS), 15 * MS);
    }

    #[test]
    fn the_whole_is_what_was_done_by_the_end() {
        let mut progress = PopulateProgress::begin(None);
        assert_eq!(progress.total_at(50 * MS), 50 * MS);
        progress.note(10 * MS, 5 * MS);
        progress.note(30 * MS, 15 * MS);
        assert_eq!(progress.total_at(40 * MS), 25 * MS);
        assert_eq!(progress.total_at(20 * MS), 10 * MS);
        assert_eq!(progress.total_at(5 * MS), 5 * MS);
    }

    #[test]
    fn a_thread_of_this_process_is_seen_to_work() {
        let mut progress = PopulateProgress::begin(Some(std::process::id()));
        let worker = std::thread::spawn(|| {
            let begun = Instant::now();
            while begun.elapsed() < 50 * MS {}
        });
        while progress.done() < 5 * MS {
            std::thread::sleep(MS);
        }
        worker.join().unwrap();
        assert!(progress.done() <= progress.begun.elapsed());
    }
}
