// SPDX-License-Identifier: LGPL-2.1-or-later

//! Pseudo-random numbers for the tests: the same ones for the same seed.

/// A sequence of numbers, from a seed other than 0.
pub struct Random(pub u64);

impl Random {
    /// The next number, less than `limit`.
    pub fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}
