// SPDX-License-Identifier: LGPL-2.1-or-later

//! The rest of QEMU's stream, which an undo discards.

use std::os::fd::OwnedFd;

use rustix::io::Errno;

use crate::image::discard;

/// QEMU's stream, whose rest is read and discarded.
pub struct Remaining {
    pub pipe: OwnedFd,
    pub ended: bool,
    /// The number of bytes that have come, as far as that is known.
    pub taken: u64,
}

impl Remaining {
    pub fn new(pipe: OwnedFd, ended: bool, taken: u64) -> Remaining {
        Remaining { pipe, ended, taken }
    }

    pub fn discard(&mut self) {
        match discard(&self.pipe) {
            Ok(0) => self.ended = true,
            Ok(bytes) => self.taken += bytes as u64,
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => self.ended = true,
        }
    }
}
