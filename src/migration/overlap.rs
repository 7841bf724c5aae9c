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
const QUICKEST_PAGE: Duration = Duration::from_nanos(10);
const PAGE: u64 = 4096;
/// Stopping the guest, and asking whether it was in time, of a guest of which nothing is known.
const STOPPING: Duration = Duration::from_millis(2);
/// The aim is met this near.
pub const NEAR: Duration = Duration::from_micros(200);
/// Less than this is not worth it.
const WORTH: Duration = Duration::from_millis(4);
/// So many of a guest's setups, and of its stops, are remembered.
const REMEMBERED: usize = 5;
/// Of so many guests.
const MOST: usize = 1000;

/// How far a snapshot goes to make the pause independent of the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overlap {
    /// How many tries may be lost; 0: none is made, and the guest is stopped first.
    pub tries: u32,
    /// When to stop the guest, counted from the migration's begin; `None`: by what is known of the
    /// guest.
    pub aim: Option<Duration>,
}

impl Default for Overlap {
    fn default() -> Overlap {
        Overlap { tries: TRIES, aim: None }
    }
}

/// What was learnt of guests.
static GUESTS: Lazy<Mutex<HashMap<String, Learnt>>> = Lazy::new(Mutex::default);

/// The last few of each, the newest first.
#[derive(Default)]
struct Learnt {
    /// How much work `setup` was while the guest ran: more than else, and these count where there
    /// are any.
    running: VecDeque<Duration>,
    stopped: VecDeque<Duration>,
    /// How long it took from the order to stop until it was known whether that was in time.
    stopping: VecDeque<Duration>,
}

/// What can be learnt.
#[derive(Clone, Copy, Debug)]
pub enum Lesson {
    /// The work of a `setup` while the guest ran.
    Running(Duration),
    /// The work of a `setup` while it was stopped.
    Stopped(Duration),
    /// How long the stop took, with the question whether it was in time.
    Stopping(Duration),
}

/// Notes it.
pub fn learn(guest: &str, lesson: Lesson) {
    let mut guests = lock(&GUESTS);
    if guests.len() >= MOST && !guests.contains_key(guest) {
        guests.clear();
    }
    let learnt = guests.entry(guest.into()).or_default();
    let (last, time) = match lesson {
        Lesson::Running(work) => (&mut learnt.running, work),
        Lesson::Stopped(work) => (&mut learnt.stopped, work),
        Lesson::Stopping(time) => (&mut learnt.stopping, time),
    };
    last.truncate(REMEMBERED - 1);
    last.push_front(time);
}

/// Whether the setup of a guest is known.
pub fn knows(guest: &str) -> bool {
    lock(&GUESTS)
        .get(guest)
        .is_some_and(|learnt| !learnt.running.is_empty() || !learnt.stopped.is_empty())
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
pub fn aim(guest: &str, memory: u64, lost: u32) -> Option<Duration> {
    let guests = lock(&GUESTS);
    let learnt = guests.get(guest);
    let quick = |last| sorted(last, |count| usize::from(count > 2));
    let work = learnt.and_then(|learnt| quick(&learnt.running).or_else(|| quick(&learnt.stopped)));
    let work =
        work.unwrap_or_else(|| QUICKEST_PAGE * u32::try_from(memory / PAGE).unwrap_or(u32::MAX));
    let usual = learnt.and_then(|learnt| sorted(&learnt.stopping, |count| count / 2));
    let stopping = usual.map_or(STOPPING, |stopping| stopping * 3 / 2);
    let aim = (work * 95u32.saturating_sub(10 * lost) / 100).checked_sub(stopping)?;
    // What a try that is lost costs grows with what it takes to stop.
    (aim >= WORTH.max(2 * stopping)).then_some(aim)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const GIB: u64 = 1 << 30;

    #[test]
    fn a_small_guest_is_stopped_first_and_a_large_one_early() {
        assert_eq!(aim("unknown", GIB, 0), None);
        let large = aim("unknown", 64 * GIB, 0).unwrap();
        assert!(large < 64 * 4 * 65536 * QUICKEST_PAGE);
    }

    #[test]
    fn the_second_quickest_of_the_last_setups_counts() {
        for setup in [5, 300, 200, 100, 250, 400] {
            learn("guest", Lesson::Stopped(setup * MS));
        }
        // The first is forgotten.
        assert_eq!(aim("guest", GIB, 0), Some(188 * MS));
        assert_eq!(aim("guest", GIB, 2), Some(148 * MS));
        // Of those while the guest ran, where there are any.
        learn("guest", Lesson::Running(100 * MS));
        assert_eq!(aim("guest", GIB, 0), Some(93 * MS));
        assert!(knows("guest"));
        assert!(!knows("another"));
        assert_eq!(aim("another", GIB, 0), None);
    }

    #[test]
    fn a_stop_takes_what_it_usually_does_and_half_as_long_again() {
        learn("slow to stop", Lesson::Stopping(3 * MS));
        assert!(!knows("slow to stop"));
        for stopping in [50, 10, 7, 20] {
            learn("slow to stop", Lesson::Stopping(stopping * MS));
        }
        learn("slow to stop", Lesson::Running(100 * MS));
        assert_eq!(aim("slow to stop", GIB, 0), Some(80 * MS));
        // It has to be worth it.
        learn("slow to stop, quick to set up", Lesson::Stopping(10 * MS));
        learn("slow to stop, quick to set up", Lesson::Running(30 * MS));
        assert_eq!(aim("slow to stop, quick to set up", GIB, 0), None);
    }

    #[test]
    fn a_guest_whose_setup_is_quick_is_stopped_first() {
        learn("quick", Lesson::Stopped(2 * MS));
        assert_eq!(aim("quick", 64 * GIB, 0), None);
    }
}
