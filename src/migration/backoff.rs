// SPDX-License-Identifier: LGPL-2.1-or-later

//! Waiting for what QEMU does not announce.

use std::thread::sleep;
use std::time::{Duration, Instant};

/// Waits for what QEMU does not announce: for a fiftieth of what the waiting has taken so far, so
/// that the end is noticed soon after a short wait, and QEMU is not asked more than it takes to
/// answer in a long one.
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
