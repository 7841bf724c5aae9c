// SPDX-License-Identifier: LGPL-2.1-or-later

//! Waits for a condition by polling it up to a generous deadline, and never by sleeping for a
//! guessed time.

use std::time::{Duration, Instant};

/// Long enough for anything that works at all, even on a busy machine.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// Polls until `look` returns a value, and returns it; `None` when the deadline has passed.
pub fn wait_for<T>(deadline: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return Some(found);
        }
        if start.elapsed() > deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}
