// SPDX-License-Identifier: LGPL-2.1-or-later

//! Waits between queries for states that QEMU does not announce by an event.

use std::thread::sleep;
use std::time::{Duration, Instant};

/// Sleeps between queries, each time for a fiftieth of the time since the first query. So the end
/// of a short wait is noticed soon, and QEMU is not queried too often during a long one.
#[derive(Debug)]
pub struct Backoff(Instant);

impl Default for Backoff {
    fn default() -> Backoff {
        Backoff(Instant::now())
    }
}

impl Backoff {
    pub fn wait(&self) {
        sleep((self.0.elapsed() / 50).clamp(Duration::from_micros(20), Duration::from_millis(10)));
    }
}
