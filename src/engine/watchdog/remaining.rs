// SPDX-License-Identifier: LGPL-2.1-or-later

//! What is left of QEMU's stream.

use std::os::fd::OwnedFd;

use rustix::io::Errno;

use crate::image::discard;

/// QEMU's stream, of which nothing is wanted.
pub struct Remaining {
    pub pipe: OwnedFd,
    pub ended: bool,
    pub thrown_away: usize,
}

impl Remaining {
    pub fn discard(&mut self) {
        match discard(&self.pipe) {
            Ok(0) => self.ended = true,
            Ok(bytes) => self.thrown_away += bytes,
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => self.ended = true,
        }
    }
}
