// SPDX-License-Identifier: LGPL-2.1-or-later

//! Moves QEMU's stream from a memory image into the pipe of a QEMU that loads it.

use std::fs::File;
use std::io::{self, BufReader};
use std::os::fd::OwnedFd;
use std::thread::JoinHandle;

use rustix::io::Errno;
use rustix::pipe::{SpliceFlags, splice};

use super::classic::{self, Zeros};
use super::file::Image;
use super::pipe::CHUNK;
use super::zstd_reader::whole_stream;
use crate::error::{Code, Error, Result};
use crate::sys;

/// A running restore stream. It ends at the end of the file, or when the reader of the pipe ends.
#[derive(Debug)]
pub struct RestoreStream {
    thread: JoinHandle<io::Result<()>>,
}

impl RestoreStream {
    /// Starts moving the stream of an image into `pipe`. `zeros` are the zero pages that are
    /// written of those that a sparse image does not have. `mapped` are the numbers of the blocks
    /// that QEMU has mapped, whose pages it does not need.
    pub fn start(
        image: Image,
        zeros: Zeros,
        mapped: Vec<usize>,
        pipe: OwnedFd,
    ) -> Result<RestoreStream> {
        let Image { file, stream_offset, sparse, zstd, .. } = image;
        let run = move || match (sparse, zstd) {
            (Some(sparse), _) => {
                classic::write(&file, &sparse, zeros, &mapped, &mut File::from(pipe))
            }
            (_, Some(_)) => {
                let mut stream =
                    BufReader::with_capacity(CHUNK, whole_stream(&file, stream_offset)?);
                io::copy(&mut stream, &mut File::from(pipe)).map(drop)
            }
            _ => splice_from(&file, stream_offset, &pipe),
        };
        let thread = sys::spawn_quiet("instantsnap", run)?;
        Ok(RestoreStream { thread })
    }

    /// Waits for its end. Call this only after QEMU has finished or the pipe's reader is closed:
    /// otherwise it can wait for ever.
    pub fn join(self) -> Result<()> {
        match self.thread.join() {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(Error::system("cannot write the memory image to QEMU", error)),
            Err(_) => Err(Error::new(
                Code::InternalError,
                "the thread that writes the restore stream panicked",
            )),
        }
    }
}

fn splice_from(file: &File, mut offset: u64, pipe: &OwnedFd) -> io::Result<()> {
    loop {
        match splice(file, Some(&mut offset), pipe, None, CHUNK, SpliceFlags::MOVE) {
            Ok(0) => return Ok(()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
