//! The memory image: libvirt's save format around QEMU's migration stream, and the threads that move the stream.
//!
//! [`Drain`] moves it from QEMU's pipe to the file, [`Feed`] from the file to a QEMU that loads it. Neither needs anything
//! but its descriptors, so that a helper process can take their place.

mod drain;
mod feed;
mod file;
mod stream;

pub use drain::{Drain, throw_away};
pub use feed::Feed;
pub use file::{Image, MemoryImage, deleting, is_another};
pub use stream::is_other_machine;

use std::os::fd::OwnedFd;

use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};

use crate::error::{Error, Result};

/// Moved at once: the largest pipe that Linux gives to everybody.
const CHUNK: usize = 1 << 20;

/// A pipe to move a stream through: its reading and its writing end.
pub fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC).map_err(|error| Error::system("cannot create a pipe", error))?;
    // A user near the limit of pipe pages (pipe-user-pages-soft) gets less, which is slower, not wrong.
    let _ = fcntl_setpipe_size(&write, CHUNK);
    Ok((read, write))
}
