// SPDX-License-Identifier: LGPL-2.1-or-later

//! Waits for a block job as long as it makes progress, which may take hours.

use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::deadline::Deadline;

/// A block job that makes no progress for this long is given up.
pub const STALLED: Duration = Duration::from_secs(60);

/// The shortest and the longest time between two queries of a job.
const INTERVALS: [Duration; 2] = [Duration::from_micros(500), Duration::from_millis(200)];

/// The progress of one block job.
#[derive(Debug)]
pub struct Progress<T> {
    limit: Duration,
    seen: Option<T>,
    deadline: Deadline,
    begun: Instant,
}

impl<T: PartialEq> Progress<T> {
    /// `limit` is the longest time without progress.
    pub fn new(limit: Duration) -> Progress<T> {
        Progress { limit, seen: None, deadline: Deadline::after(limit), begun: Instant::now() }
    }

    /// Waits before the next query of the job, so short that its end is noticed at most a tenth
    /// late. `seen` is the result of the last query, if it had one. Returns false if there was no
    /// progress for too long.
    pub fn wait(&mut self, seen: Option<T>) -> bool {
        if seen.is_some() && self.seen != seen {
            self.seen = seen;
            self.deadline = Deadline::after(self.limit);
        }
        let Some(left) = self.deadline.left() else { return false };
        let [least, most] = INTERVALS;
        sleep((self.begun.elapsed() / 10).clamp(least, most).min(left));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_waited_for_and_a_standstill_or_no_answer_is_not() {
        let mut progress = Progress::new(Duration::from_millis(20));
        assert!((0..50).all(|done| progress.wait(Some(done))));
        assert!((0..10_000).any(|_| !progress.wait(Some(50))));
        assert!(progress.wait(Some(51)));
        assert!((0..10_000).any(|_| !progress.wait(None)));
    }
}
