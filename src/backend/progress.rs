// SPDX-License-Identifier: LGPL-2.1-or-later

//! Waiting for a block job for as long as it makes progress, which may be hours.

use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::deadline::Deadline;

/// A block job that makes no progress for so long is given up.
pub const STALLED: Duration = Duration::from_secs(60);

/// Between two looks at a job at least so long, and at most.
const NAPS: [Duration; 2] = [Duration::from_micros(500), Duration::from_millis(200)];

/// See the module.
#[derive(Debug)]
pub struct Progress<T> {
    limit: Duration,
    seen: Option<T>,
    deadline: Deadline,
    begun: Instant,
}

impl<T: PartialEq> Progress<T> {
    /// `limit`: no progress for so long is none.
    pub fn new(limit: Duration) -> Progress<T> {
        Progress { limit, seen: None, deadline: Deadline::after(limit), begun: Instant::now() }
    }

    /// Waits a moment before the next look, by which the end is seen at most a tenth late. `seen`
    /// is what the last look has shown, where it has shown something. False where there was
    /// nothing new for too long.
    pub fn wait(&mut self, seen: Option<T>) -> bool {
        if seen.is_some() && self.seen != seen {
            self.seen = seen;
            self.deadline = Deadline::after(self.limit);
        }
        let Some(left) = self.deadline.left() else { return false };
        let [least, most] = NAPS;
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
