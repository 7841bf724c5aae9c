//! Moves QEMU's stream from a pipe into a file, by a thread that needs nothing but its descriptors.
//!
//! It sees bytes; whoever wants to see page records reads them here, between the pipe and the file.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use rustix::pipe::{SpliceFlags, splice};

use super::CHUNK;
use crate::error::{Code, Error, Result};
use crate::sys;

/// A drain at work. Dropping it stops it, and closes its end of the pipe.
#[derive(Debug)]
pub struct Drain {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

#[derive(Debug)]
struct Shared {
    /// Readable when the drain is to stop.
    stop: OwnedFd,
    /// Readable when it has ended.
    done: OwnedFd,
    bytes: AtomicU64,
}

impl Drain {
    /// Starts moving what comes out of `pipe` to `file`, from `offset` on.
    pub fn start(pipe: OwnedFd, file: File, offset: u64) -> Result<Drain> {
        let event = || {
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
                .map_err(|error| Error::system("cannot create an eventfd", error))
        };
        let shared = Arc::new(Shared { stop: event()?, done: event()?, bytes: AtomicU64::new(0) });
        let theirs = Arc::clone(&shared);
        let thread = sys::spawn_quiet("instantsnap", move || {
            let result = run(pipe, &file, offset, &theirs);
            signal(&theirs.done);
            result
        })?;
        Ok(Drain { shared, thread: Some(thread) })
    }

    /// Becomes readable when the drain has ended.
    pub fn done(&self) -> BorrowedFd<'_> {
        self.shared.done.as_fd()
    }

    /// Bytes written so far.
    pub fn bytes(&self) -> u64 {
        self.shared.bytes.load(Ordering::Relaxed)
    }

    /// Tells the drain to end where it is. QEMU, whose pipe has no reader then, fails its migration.
    pub fn stop(&self) {
        signal(&self.shared.stop);
    }

    /// Waits for its end: Ok when the stream ended and all of it is in the file.
    pub fn join(mut self) -> Result<u64> {
        let result = self.thread.take().map_or(Ok(Ok(())), JoinHandle::join);
        match result {
            Ok(Ok(())) => Ok(self.bytes()),
            Ok(Err(error)) => Err(Error::system("cannot write the memory snapshot file", error)),
            Err(_) => Err(Error::new(Code::InternalError, "the thread that writes memory panicked")),
        }
    }
}

impl Drop for Drain {
    fn drop(&mut self) {
        // Not joined: a file system that hangs must not hang whoever gives up on it.
        self.stop();
    }
}

fn signal(event: &OwnedFd) {
    // An eventfd refuses only when it is at its highest count: then it is readable, which is all that is wanted.
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}

fn run(pipe: OwnedFd, file: &File, mut offset: u64, shared: &Shared) -> io::Result<()> {
    let mut spliced = true;
    loop {
        let mut fds = [PollFd::new(&pipe, PollFlags::IN), PollFd::new(&shared.stop, PollFlags::IN)];
        rustix::io::retry_on_intr(|| poll(&mut fds, None))?;
        if !fds[1].revents().is_empty() {
            return Err(io::Error::new(io::ErrorKind::Interrupted, "stopped"));
        }
        let moved = if spliced { splice_chunk(&pipe, file, offset) } else { copy_chunk(&pipe, file, offset) };
        match moved {
            Ok(0) => return Ok(()),
            Ok(moved) => {
                offset += moved as u64;
                shared.bytes.fetch_add(moved as u64, Ordering::Relaxed);
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            // A file system that cannot take pages from a pipe.
            Err(Errno::INVAL) if spliced => spliced = false,
            Err(error) => return Err(error.into()),
        }
    }
}

fn splice_chunk(pipe: &OwnedFd, file: &File, offset: u64) -> rustix::io::Result<usize> {
    let mut offset = offset;
    splice(pipe, None, file, Some(&mut offset), CHUNK, SpliceFlags::MOVE | SpliceFlags::NONBLOCK)
}

fn copy_chunk(pipe: &OwnedFd, file: &File, offset: u64) -> rustix::io::Result<usize> {
    let mut buffer = vec![0; CHUNK / 4];
    let read = rustix::io::read(pipe, &mut buffer)?;
    file.write_all_at(&buffer[..read], offset).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    Ok(read)
}
