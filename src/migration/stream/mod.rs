// SPDX-License-Identifier: LGPL-2.1-or-later

//! The path of memory from QEMU to its image: a pipe, and the drain that empties it.

mod drain;
mod give_up;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;

use super::flow::Flow;
use super::names::FD_NAME;
use crate::backend::{DEFAULT_TIMEOUT, Guest};
use crate::cancel::{Cancel, timeout};
use crate::deadline::Deadline;
use crate::error::{Error, Result};
use crate::image::{self, Drain, MemoryImage};
use crate::monitor::commands::{self, Migration};

/// The open path of memory from QEMU to its image.
#[derive(Debug)]
pub struct Stream {
    drain: Drain,
    /// Where the stream begins in the image.
    offset: u64,
    /// A duplicate of the pipe's reading end, to empty the pipe if the drain hangs.
    spare: OwnedFd,
    /// The pipe's writing end, until QEMU has it.
    write: Option<OwnedFd>,
}

impl Stream {
    /// Opens the pipe and the drain. Nothing is moved yet.
    pub fn open(image: &MemoryImage) -> Result<Stream> {
        let (read, write) = image::pipe()?;
        let duplicate = || {
            fcntl_setfl(&read, fcntl_getfl(&read)? | OFlags::NONBLOCK)?;
            rustix::io::fcntl_dupfd_cloexec(&read, 0)
        };
        let spare =
            duplicate().map_err(|error| Error::system("cannot set up the memory pipe", error))?;
        let (offset, format) = (image.stream_offset(), image.format());
        let (file, pages) = (image.file()?, image.pages_file()?);
        let drain = Drain::open(read, file, pages, image.path(), offset, format)?;
        Ok(Stream { drain, offset, spare, write: Some(write) })
    }

    /// Leaves the stream to `process`, which moves it already. If none is given, a thread of this
    /// process moves it. Either goes on where an earlier process was killed.
    pub fn start(&mut self, process: Option<OwnedFd>) -> Result<()> {
        match process {
            Some(process) => self.drain.leave_to(process),
            None => self.drain.start()?,
        }
        Ok(())
    }

    /// Passes the writing end to QEMU, as [`FD_NAME`].
    pub fn pass(&mut self, guest: &mut dyn Guest) -> Result<()> {
        match self.write.take() {
            Some(write) => {
                commands::getfd(guest, FD_NAME, write.as_fd(), Deadline::after(DEFAULT_TIMEOUT))
            }
            None => Ok(()),
        }
    }

    /// The drain that moves the stream.
    pub fn drain(&self) -> &Drain {
        &self.drain
    }

    /// How far memory has come. QEMU's status of the migration, if it is given, adds how much is
    /// left.
    pub fn flow(&self, migration: Option<&Migration>) -> Flow {
        /// The size of the header of each page in the stream.
        const HEADER: u64 = 8;
        let bytes = self.drain.bytes();
        let mut flow = Flow { done: self.offset + bytes, ..Flow::default() };
        if let Some(ram) =
            migration.and_then(|migration| migration.ram.as_ref()).filter(|ram| ram.page_size > 0)
        {
            flow.pages_left = ram.remaining / ram.page_size;
            // Some of what QEMU has sent is still in the pipe.
            flow.total = self.offset
                + ram.transferred.max(bytes)
                + flow.pages_left * (ram.page_size + HEADER);
        }
        flow
    }

    /// Whether QEMU has closed the stream. Then the snapshot's migration is over, and one that is
    /// under way is another client's.
    fn is_closed(&self) -> bool {
        let mut fds = [PollFd::new(&self.spare, PollFlags::empty())];
        poll(&mut fds, Some(&timeout(Duration::ZERO))).is_ok()
            && fds[0].revents().contains(PollFlags::HUP)
    }
}

/// Waits until the drain has ended, the snapshot is cancelled, or `other` is readable, at most for
/// this time.
fn wait_either(
    drain: &Drain,
    cancel: &Cancel,
    other: Option<BorrowedFd>,
    at_most: Option<Duration>,
) -> Result<()> {
    let done = drain.done();
    let mut fds = [done, other.unwrap_or(done), cancel.event()]
        .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
    match poll(&mut fds, at_most.map(timeout).as_ref()) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(Error::system("cannot wait for memory to be saved", errno)),
    }
}
