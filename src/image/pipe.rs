// SPDX-License-Identifier: LGPL-2.1-or-later

//! The pipe that carries the stream.

use std::os::fd::OwnedFd;

use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};

use crate::error::{Error, Result};

/// The size of one move: the largest pipe that Linux gives to every user.
pub const CHUNK: usize = 1 << 20;

/// Makes a pipe for a stream. Returns its reading and its writing end.
pub fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    open().map_err(|error| Error::system("cannot create a pipe", error))
}

/// Makes the same pipe, with the system call's own error.
pub fn open() -> rustix::io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
    // A user near the limit of pipe pages (pipe-user-pages-soft) gets a smaller pipe, which is
    // slower but works.
    let _ = fcntl_setpipe_size(&write, CHUNK);
    Ok((read, write))
}
