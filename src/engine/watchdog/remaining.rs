// SPDX-License-Identifier: LGPL-2.1-or-later

//! What is left of QEMU's stream.

use std::os::fd::OwnedFd;

use rustix::io::Errno;

use crate::image::throw_away;

/// QEMU's stream, of which nothing is wanted.
pub struct Remaining {
    pub pipe: OwnedFd,
    pub ended: bool,
    pub thrown_away: usize,
}

impl Remaining {
    pub fn throw_away(&mut self) {
        match throw_away(&self.pipe) {
            Ok(0) => self.ended = true,
            Ok(bytes) => self.thrown_away += bytes,
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => self.ended = true,
        }
    }
}
