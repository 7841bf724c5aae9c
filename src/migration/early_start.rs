// SPDX-License-Identifier: LGPL-2.1-or-later

//! Having QEMU touch the guest's memory while the guest still runs.
//!
//! Before a background snapshot is armed QEMU touches every page of guest memory once ("populate"),
//! which takes longer the more memory there is. With the guest stopped first all of that is pause.
//! So the migration is begun while the guest runs, and the guest stopped shortly before QEMU is
//! done. Stopped too early it is paused for longer, and no harm is done. Stopped too late, QEMU has
//! begun to capture a guest that ran, and memory is of another moment than the disks would be.
//!
//! Whether it was too late is not told by events, nor by the guest's being paused: QEMU calls the
//! guest paused before its vCPUs have stopped, and its snapshot thread can begin to capture just
//! then. What does tell: `stop` has been answered, and a `query-migrate` sent *after* that answer
//! says `setup`. For the capture begins after `setup` ends, and the vCPUs had stopped before. Only
//! then are the disks switched. `tests/overlap_model/` checks that rule exhaustively.
//!
//! It takes a QEMU that leaves a guest paused that it found paused (9.0). When to stop is learnt
//! from how long `setup` took at this guest's earlier snapshots, and tries.

use std::collections::{HashMap, VecDeque};
use std::sync::Mutex;
use std::time::Duration;

use once_cell::sync::Lazy;

use crate::sys::lock;

/// How many tries may be lost before the guest is stopped first, which is always right.
const TRIES: u32 = 3;
/// The quickest that populate was seen to be, for a page of 4 KiB.
const FASTEST_PAGE: Duration = Duration::from_nanos(10);
const PAGE: u64 = 4096;
/// Stopping the guest, and asking whether it was in time, of a guest of which nothing is known.
const USUAL_STOP: Duration = Duration::from_millis(2);
/// The stop_after is met this near.
pub const TOLERANCE: Duration = Duration::from_micros(200);
/// Less than this is not worth it.
const SHORTEST: Duration = Duration::from_millis(4);
/// So many of a guest's setups, and of its stops, are remembered.
const KEPT_SAMPLES: usize = 5;
/// Of so many guests.
const MAX_GUESTS: usize = 1000;

/// How far a snapshot goes to make the pause independent of the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EarlyStart {
    /// How many tries may be lost; 0: none is made, and the guest is stopped first.
    pub tries: u32,
    /// When to stop the guest, counted from the migration's begin; `None`: by what is known of the
    /// guest.
    pub stop_after: Option<Duration>,
}

impl Default for EarlyStart {
    fn default() -> EarlyStart {
        EarlyStart { tries: TRIES, stop_after: None }
    }
}

/// The samples of guests, by their identity.
static GUESTS: Lazy<Mutex<HashMap<String, Samples>>> = Lazy::new(Mutex::default);

/// The last few of each, the newest first.
#[derive(Default)]
struct Samples {
    /// How much work `setup` was while the guest ran: more than else, and these count where there
    /// are any.
    running: VecDeque<Duration>,
    stopped: VecDeque<Duration>,
    /// How long it took from the order to stop until it was known whether that was in time.
    stopping: VecDeque<Duration>,
}

/// A sample: what one try has shown of a guest.
#[derive(Clone, Copy, Debug)]
pub enum Sample {
    /// The work of a `setup` while the guest ran.
    Running(Duration),
    /// The work of a `setup` while it was stopped.
    Stopped(Duration),
    /// How long the stop took, with the question whether it was in time.
    Stopping(Duration),
}

/// Notes it.
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

/// Whether the setup of a guest is known.
pub fn has_samples(guest: &str) -> bool {
    lock(&GUESTS)
        .get(guest)
        .is_some_and(|samples| !samples.running.is_empty() || !samples.stopped.is_empty())
}

/// The one at a place when sorted, the quickest first.
fn sorted(last: &VecDeque<Duration>, place: impl FnOnce(usize) -> usize) -> Option<Duration> {
    let mut sorted: Vec<_> = last.iter().copied().collect();
    sorted.sort_unstable();
    sorted.get(place(sorted.len())).copied()
}

/// When to stop a guest that has so many bytes of memory, in work done by then, the earlier the
/// more tries were `lost`; `None` where that would come to nothing.
///
/// The next setup will be as much work as the second quickest was, and the stop take half as long
/// again as it usually does. A try that is lost costs the guest little, and a stop that is early by
/// far costs all of that.
pub fn estimate(guest: &str, memory: u64, lost: u32) -> Option<Duration> {
    let guests = lock(&GUESTS);
    let samples = guests.get(guest);
    let quick = |last| sorted(last, |count| usize::from(count > 2));
    let work =
        samples.and_then(|samples| quick(&samples.running).or_else(|| quick(&samples.stopped)));
    let work =
        work.unwrap_or_else(|| FASTEST_PAGE * u32::try_from(memory / PAGE).unwrap_or(u32::MAX));
    let usual = samples.and_then(|samples| sorted(&samples.stopping, |count| count / 2));
    let stopping = usual.map_or(USUAL_STOP, |stopping| stopping * 3 / 2);
    let stop_after = (work * 95u32.saturating_sub(10 * lost) / 100).checked_sub(stopping)?;
    // What a try that is lost costs grows with what it takes to stop.
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
        // Of those while the guest ran, where there are any.
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
        // It has to be worth it.
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
