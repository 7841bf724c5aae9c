// SPDX-License-Identifier: LGPL-2.1-or-later

//! Reads a file from a place on, without its position.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

/// A file from a place on.
#[derive(Debug)]
pub struct FromOffset<'a> {
    pub file: &'a File,
    pub at: u64,
}

impl Read for FromOffset<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(buffer, self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}
