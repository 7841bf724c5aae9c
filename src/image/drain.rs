// SPDX-License-Identifier: LGPL-2.1-or-later

//! Moves QEMU's stream from a pipe into a file, by a thread that needs nothing but its descriptors.
//!
//! It sees bytes; whoever wants to see page records reads them here, between the pipe and the file.
//!
//! The pipe is read to its end whatever happens: a stream that nobody reads any more freezes the
//! guest at its next write to a page not yet saved. What cannot be written, or is not wanted any
//! more, is thrown away.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use rustix::pipe::{SpliceFlags, splice};

use super::pipe::{self, CHUNK};
use crate::error::{Code, Error, Result};
use crate::sys;

/// A drain at work. Dropping it stops it where it is, and closes its end of the pipe.
#[derive(Debug)]
pub struct Drain {
    shared: Arc<Shared>,
    path: PathBuf,
}

#[derive(Debug)]
struct Shared {
    /// Readable when the drain is to end.
    stop: OwnedFd,
    /// Readable when `outcome` is known.
    done: OwnedFd,
    /// All of the stream is in the file; or why not, known before the stream has ended.
    outcome: OnceLock<io::Result<()>>,
    /// What still comes is not wanted.
    discard: AtomicBool,
    /// Nothing more comes: the stream ends where the pipe is empty. Readable with it.
    last: AtomicBool,
    emptied: OwnedFd,
    /// Taken from the pipe so far.
    bytes: AtomicU64,
}

impl Drain {
    /// Starts moving what comes out of `pipe`, which does not block, to `file`, which is `path`,
    /// from `offset` on.
    pub fn start(pipe: OwnedFd, file: File, path: &Path, offset: u64) -> Result<Drain> {
        let event = || {
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
                .map_err(|error| Error::system("cannot create an eventfd", error))
        };
        let shared = Arc::new(Shared {
            stop: event()?,
            done: event()?,
            outcome: OnceLock::new(),
            discard: AtomicBool::new(false),
            last: AtomicBool::new(false),
            emptied: event()?,
            bytes: AtomicU64::new(0),
        });
        let theirs = Arc::clone(&shared);
        // Not joined: a file system that hangs must not hang whoever gives up on it.
        sys::spawn_quiet("instantsnap", move || theirs.run(&pipe, &file, offset))?;
        Ok(Drain { shared, path: path.into() })
    }

    /// Becomes readable when [`Drain::outcome`] is there.
    pub fn done(&self) -> BorrowedFd<'_> {
        self.shared.done.as_fd()
    }

    /// Bytes taken from the pipe so far.
    pub fn bytes(&self) -> u64 {
        self.shared.bytes.load(Ordering::Relaxed)
    }

    /// From now on nothing is written any more.
    pub fn discard(&self) {
        self.shared.discard.store(true, Ordering::Relaxed);
    }

    /// QEMU has written all that it will: the stream ends where the pipe is empty. A process that
    /// the caller has forked, and that has QEMU's end of the pipe too, would keep it from ending
    /// otherwise.
    pub fn end_when_empty(&self) {
        self.shared.last.store(true, Ordering::Release);
        signal(&self.shared.emptied);
    }

    /// Once it is known: the stream's bytes, all of them in the file; or why they are not.
    pub fn outcome(&self) -> Option<Result<u64>> {
        self.shared.outcome.get().map(|outcome| match outcome {
            Ok(()) => Ok(self.bytes()),
            Err(error) => Err(Error::new(
                Code::SystemError,
                format!("cannot write memory snapshot file '{}': {error}", self.path.display()),
            )),
        })
    }
}

impl Drop for Drain {
    fn drop(&mut self) {
        signal(&self.shared.stop);
    }
}

fn signal(event: &OwnedFd) {
    // An eventfd refuses only when it is at its highest count: then it is readable, which is all
    // that is wanted.
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}

impl Shared {
    fn run(&self, pipe: &OwnedFd, file: &File, offset: u64) {
        let outcome = self.fill(pipe, file, offset);
        let unread = outcome.is_err();
        let _ = self.outcome.set(outcome);
        signal(&self.done);
        if unread {
            while self.wait(pipe) {
                let last = self.last.load(Ordering::Acquire);
                match discard(pipe) {
                    Ok(0) => return,
                    Ok(got) => self.count(got),
                    Err(Errno::AGAIN) if last => return,
                    Err(Errno::AGAIN | Errno::INTR) => {}
                    Err(_) => return,
                }
            }
        }
    }

    fn fill(&self, pipe: &OwnedFd, file: &File, mut offset: u64) -> io::Result<()> {
        // A pipe is locked while it is spliced into a file, however long the file system takes;
        // nobody could write to it or empty it meanwhile. So that is a pipe of our own, and QEMU's
        // is locked for no longer than it takes to move pages.
        let (own_read, own_write) =
            pipe::pipe().map_err(|error| io::Error::other(error.message))?;
        let mut spliced = true;
        loop {
            if !self.wait(pipe) || self.discard.load(Ordering::Relaxed) {
                return Err(io::Error::other("it is not wanted any more"));
            }
            let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
            // Known before it is looked whether there is something.
            let last = self.last.load(Ordering::Acquire);
            let moved = match splice(pipe, None, &own_write, None, CHUNK, flags) {
                Ok(0) => return Ok(()),
                Ok(moved) => moved,
                Err(Errno::AGAIN) if last => return Ok(()),
                Err(Errno::AGAIN | Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            self.count(moved);
            let mut left = moved;
            while left > 0 {
                let written = match spliced {
                    true => splice_chunk(&own_read, file, offset, left),
                    false => copy_chunk(&own_read, file, offset, left),
                };
                match written {
                    Ok(written) => {
                        offset += written as u64;
                        left -= written;
                    }
                    Err(Errno::INTR) => {}
                    // A file system that cannot take pages from a pipe.
                    Err(Errno::INVAL) if spliced => spliced = false,
                    Err(error) => return Err(error.into()),
                }
            }
        }
    }

    /// Waits for something in the pipe, its end included; false when the drain is to end.
    fn wait(&self, pipe: &OwnedFd) -> bool {
        let mut fds = [pipe, &self.stop, &self.emptied].map(|fd| PollFd::new(fd, PollFlags::IN));
        match rustix::io::retry_on_intr(|| poll(&mut fds, None)) {
            Ok(_) => fds[1].revents().is_empty(),
            Err(_) => false,
        }
    }

    fn count(&self, bytes: usize) {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

fn splice_chunk(
    pipe: &OwnedFd,
    file: &File,
    mut offset: u64,
    length: usize,
) -> rustix::io::Result<usize> {
    splice(pipe, None, file, Some(&mut offset), length, SpliceFlags::MOVE)
}

fn copy_chunk(
    pipe: &OwnedFd,
    file: &File,
    offset: u64,
    length: usize,
) -> rustix::io::Result<usize> {
    let mut buffer = vec![0; length.min(CHUNK / 4)];
    let read = rustix::io::read(pipe, &mut buffer)?;
    file.write_all_at(&buffer[..read], offset)
        .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    Ok(read)
}

/// Takes what is in a pipe that does not block, and forgets it; 0 at its end.
pub fn discard(pipe: &OwnedFd) -> rustix::io::Result<usize> {
    rustix::io::read(pipe, &mut [0; 64 << 10])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_stream_whose_other_end_is_still_held_ends_where_the_pipe_is_empty_when_nothing_more_comes()
    {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        let (read, write) = pipe::pipe().unwrap();
        rustix::io::ioctl_fionbio(&read, true).unwrap();
        let file = File::create(&path).unwrap();
        let mut write = File::from(write);
        let drain = Drain::start(read, file, &path, 0).unwrap();
        write.write_all(&[7; 300_000]).unwrap();
        // The other end stays open.
        drain.end_when_empty();
        let done = drain.done();
        poll(&mut [PollFd::new(&done, PollFlags::IN)], None).unwrap();
        assert_eq!(drain.outcome().unwrap().unwrap(), 300_000);
        assert_eq!(std::fs::read(&path).unwrap(), [7; 300_000]);
    }
}
