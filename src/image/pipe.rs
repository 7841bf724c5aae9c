// SPDX-License-Identifier: LGPL-2.1-or-later

//! The pipe that the stream comes through.

use std::os::fd::OwnedFd;

use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};

use crate::error::{Error, Result};

/// Moved at once: the largest pipe that Linux gives to everybody.
pub const CHUNK: usize = 1 << 20;

/// A pipe to move a stream through: its reading and its writing end.
pub fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    open().map_err(|error| Error::system("cannot create a pipe", error))
}

/// The same, where an error is only a number.
pub fn open() -> rustix::io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
    // A user near the limit of pipe pages (pipe-user-pages-soft) gets less, which is slower, not
    // wrong.
    let _ = fcntl_setpipe_size(&write, CHUNK);
    Ok((read, write))
}
