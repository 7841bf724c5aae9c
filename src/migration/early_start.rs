// SPDX-License-Identifier: LGPL-2.1-or-later

//! The early start: QEMU touches the guest's memory while the guest still runs.
//!
//! Before QEMU arms a background snapshot it touches every page of guest memory once ("populate"),
//! which takes longer the more memory there is. If the guest is stopped first, all of that time is
//! pause. So the migration is begun while the guest runs, and the guest is stopped shortly before
//! QEMU is done. A stop that is too early makes the pause longer, and does no other harm. If the
//! stop is too late, QEMU has begun to capture a guest that ran, and memory would be of another
//! moment than the disks.
//!
//! Neither events nor the guest's state tell whether the stop was in time: QEMU calls the guest
//! paused before its vCPUs have stopped, and its snapshot thread can begin to capture just then.
//! The proof is a `query-migrate` that was sent *after* QEMU had answered `stop`, and whose reply
//! says `setup`: the capture begins after `setup` ends, and the vCPUs had stopped before. Only
//! then are the disks switched. `tests/models/early_start/` checks that rule exhaustively.
//!
//! The early start needs QEMU 9.0 or later, which leaves a guest paused that it found paused. The
//! time of the stop is learnt from how long `setup` took at this guest's earlier snapshots, and at
//! earlier tries.

use std::collections::{HashMap, VecDeque};
use std::sync::Mutex;
use std::time::Duration;

use once_cell::sync::Lazy;

use crate::sys::lock;

/// How many tries may be lost before the guest is stopped first, which is always right.
const TRIES: u32 = 3;
/// The shortest time that populate was seen to take for a page of 4 KiB.
const FASTEST_PAGE: Duration = Duration::from_nanos(10);
const PAGE: u64 = 4096;
/// How long it takes to stop a guest without samples, and to ask whether that was in time.
const USUAL_STOP: Duration = Duration::from_millis(2);
/// The guest may be stopped this much before its `stop_after`.
pub const TOLERANCE: Duration = Duration::from_micros(200);
/// An early start that would save less than this is not made.
const SHORTEST: Duration = Duration::from_millis(4);
/// How many samples of each kind are kept for a guest.
const KEPT_SAMPLES: usize = 5;
/// How many guests samples are kept for.
const MAX_GUESTS: usize = 1000;

/// The options of the early start, which keeps the pause independent of the size of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EarlyStart {
    /// How many tries may be lost; 0: there is no early start, and the guest is stopped first.
    pub tries: u32,
    /// When to stop the guest, counted from the migration's begin; `None`: an estimate from the
    /// guest's samples.
    pub stop_after: Option<Duration>,
}

impl Default for EarlyStart {
    fn default() -> EarlyStart {
        EarlyStart { tries: TRIES, stop_after: None }
    }
}

/// The samples of guests, by their identity.
static GUESTS: Lazy<Mutex<HashMap<String, Samples>>> = Lazy::new(Mutex::default);

/// The last few samples of each kind, the newest first.
#[derive(Default)]
struct Samples {
    /// How much work `setup` was while the guest ran. It is more work than with a stopped guest,
    /// so only these samples count where there are any.
    running: VecDeque<Duration>,
    stopped: VecDeque<Duration>,
    /// How long it took from the order to stop until it was known whether that was in time.
    stopping: VecDeque<Duration>,
}

/// One measurement of a guest.
#[derive(Clone, Copy, Debug)]
pub enum Sample {
    /// The work of a `setup` while the guest ran.
    Running(Duration),
    /// The work of a `setup` while it was stopped.
    Stopped(Duration),
    /// How long the stop took, together with the query whether it was in time.
    Stopping(Duration),
}

/// Adds a sample to those of a guest.
pub fn record(guest: &str, sample: Sample) {
    let mut guests = lock(&GUESTS);
    if guests.len() >= MAX_GUESTS && !guests.contains_key(guest) {
        guests.clear();
    }
    let samples = guests.entry(guest.into()).or_default();
    let (last, time) = match sample {
        Sample::Running(work) => (&mut samples.running, work),
        Sample::Stopped(work) => (&mut samples.stopped, work),
        Sample::Stopping(time) => (&mut samples.stopping, time),
    };
    last.truncate(KEPT_SAMPLES - 1);
    last.push_front(time);
}

/// Whether there is a sample of the guest's setup.
pub fn has_samples(guest: &str) -> bool {
    lock(&GUESTS)
        .get(guest)
        .is_some_and(|samples| !samples.running.is_empty() || !samples.stopped.is_empty())
}

/// The sample at an index, which is computed from their number, when they are sorted with the
/// quickest first.
fn nth_quickest(
    samples: &VecDeque<Duration>,
    index: impl FnOnce(usize) -> usize,
) -> Option<Duration> {
    let mut sorted: Vec<_> = samples.iter().copied().collect();
    sorted.sort_unstable();
    sorted.get(index(sorted.len())).copied()
}

/// When to stop a guest with `memory` bytes of memory, as the work that setup has done by then: the
/// earlier the more tries were `lost`. `None` where an early start is not worth it.
///
/// The estimate assumes that the next setup is as much work as the second quickest was, and that
/// the stop takes half as long again as it usually does. It may be late, because a lost try costs
/// the guest little, while a stop that is much too early costs a pause of all that time.
pub fn estimate(guest: &str, memory: u64, lost: u32) -> Option<Duration> {
    let guests = lock(&GUESTS);
    let samples = guests.get(guest);
    let quick = |samples| nth_quickest(samples, |count| usize::from(count > 2));
    let work =
        samples.and_then(|samples| quick(&samples.running).or_else(|| quick(&samples.stopped)));
    let work =
        work.unwrap_or_else(|| FASTEST_PAGE * u32::try_from(memory / PAGE).unwrap_or(u32::MAX));
    let usual = samples.and_then(|samples| nth_quickest(&samples.stopping, |count| count / 2));
    let stopping = usual.map_or(USUAL_STOP, |stopping| stopping * 3 / 2);
    let stop_after = (work * 95u32.saturating_sub(10 * lost) / 100).checked_sub(stopping)?;
    // The longer a stop takes, the more a lost try costs.
    (stop_after >= SHORTEST.max(2 * stopping)).then_some(stop_after)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const GIB: u64 = 1 << 30;

    #[test]
    fn a_small_guest_is_stopped_first_and_a_large_one_early() {
        assert_eq!(estimate("unknown", GIB, 0), None);
        let large = estimate("unknown", 64 * GIB, 0).unwrap();
        assert!(large < 64 * 4 * 65536 * FASTEST_PAGE);
    }

    #[test]
    fn the_second_quickest_of_the_last_setups_counts() {
        for setup in [5, 300, 200, 100, 250, 400] {
            record("guest", Sample::Stopped(setup * MS));
        }
        // The first is forgotten.
        assert_eq!(estimate("guest", GIB, 0), Some(188 * MS));
        assert_eq!(estimate("guest", GIB, 2), Some(148 * MS));
        // Samples of the running guest take precedence.
        record("guest", Sample::Running(100 * MS));
        assert_eq!(estimate("guest", GIB, 0), Some(93 * MS));
        assert!(has_samples("guest"));
        assert!(!has_samples("another"));
        assert_eq!(estimate("another", GIB, 0), None);
    }

    #[test]
    fn a_stop_takes_what_it_usually_does_and_half_as_long_again() {
        record("slow to stop", Sample::Stopping(3 * MS));
        assert!(!has_samples("slow to stop"));
        for stopping in [50, 10, 7, 20] {
            record("slow to stop", Sample::Stopping(stopping * MS));
        }
        record("slow to stop", Sample::Running(100 * MS));
        assert_eq!(estimate("slow to stop", GIB, 0), Some(80 * MS));
        // The early start has to be worth it.
        record("slow to stop, quick to set up", Sample::Stopping(10 * MS));
        record("slow to stop, quick to set up", Sample::Running(30 * MS));
        assert_eq!(estimate("slow to stop, quick to set up", GIB, 0), None);
    }

    #[test]
    fn a_guest_whose_setup_is_quick_is_stopped_first() {
        record("quick", Sample::Stopped(2 * MS));
        assert_eq!(estimate("quick", 64 * GIB, 0), None);
    }
}
