//! Waiting for a block job for as long as it makes progress.

use std::thread::sleep;
use std::time::Duration;

use crate::deadline::Deadline;

/// See the module.
#[derive(Debug)]
pub struct Progress<T> {
    limit: Duration,
    seen: Option<T>,
    deadline: Deadline,
    nap: Duration,
}

impl<T: PartialEq> Progress<T> {
    /// `limit`: no progress for so long is none.
    pub fn new(limit: Duration) -> Progress<T> {
        Progress {
            limit,
            seen: None,
            deadline: Deadline::after(limit),
            nap: Duration::from_millis(1),
        }
    }

    /// Waits a moment before the next look; false where what was seen has been the same for too
    /// long.
    pub fn wait(&mut self, seen: T) -> bool {
        if self.seen.as_ref() != Some(&seen) {
            self.seen = Some(seen);
            self.deadline = Deadline::after(self.limit);
        }
        let Some(left) = self.deadline.left() else { return false };
        sleep(self.nap.min(left));
        self.nap = (self.nap * 2).min(Duration::from_millis(200));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_waited_for_and_a_standstill_is_not() {
        let mut progress = Progress::new(Duration::from_millis(20));
        assert!((0..50).all(|done| progress.wait(done)));
        assert!((0..10_000).any(|_| !progress.wait(50)));
        assert!(progress.wait(51));
    }
}
