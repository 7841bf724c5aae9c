// SPDX-License-Identifier: LGPL-2.1-or-later

//! Moves QEMU's stream from a pipe into a file.
//!
//! A thread does it, of this process or of the watchdog's, which goes on when this process is
//! stopped. It needs nothing but its descriptors. It sees bytes; whoever wants to see page records
//! reads them here, between the pipe and the file.
//!
//! The pipe is read to its end whatever happens: a stream that nobody reads any more freezes the
//! guest at its next write to a page not yet saved. What cannot be written, or is not wanted any
//! more, is thrown away.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::pipe::{SpliceFlags, splice};

use super::pipe::{self, CHUNK};
use crate::error::{Code, Error, Result};
use crate::sys::{self, SharedNumbers};

/// A way of QEMU's stream into a file. Dropping it stops what moves the stream where it is.
#[derive(Debug)]
pub struct Drain {
    shared: Arc<Shared>,
    path: PathBuf,
    /// The process that moves the stream, where it is another.
    process: Option<OwnedFd>,
}

/// What a drain and the thread that moves the stream share, of whatever process each is.
#[derive(Debug)]
struct Shared {
    /// QEMU's stream, which does not block, and where it goes.
    pipe: OwnedFd,
    file: File,
    offset: u64,
    numbers: SharedNumbers<4>,
    /// Readable when the thread is to end.
    stop: OwnedFd,
    /// Readable when the outcome is known.
    done: OwnedFd,
    /// Readable when nothing more comes.
    emptied: OwnedFd,
}

/// Of the numbers: taken from the pipe so far.
const BYTES: usize = 0;
/// What has become of it: one of those below.
const OUTCOME: usize = 1;
/// 1: what still comes is not wanted.
const DISCARD: usize = 2;
/// 1: nothing more comes, and the stream ends where the pipe is empty.
const LAST: usize = 3;

/// The outcome is not known yet. It can become known before the stream has ended.
const UNDER_WAY: u64 = 0;
/// All of the stream is in the file.
const WHOLE: u64 = 1;
const UNWANTED: u64 = 2;
/// The process that moved it has ended.
const LOST: u64 = 3;
/// More than that: the number of an error.
const ERRNO: u64 = 1 << 32;

impl Drain {
    /// So many descriptors another process needs, besides the pipe.
    pub const DESCRIPTORS: usize = 5;

    /// Opens the way of what comes out of `pipe`, which does not block, to `file`, which is `path`,
    /// from `offset` on. Nothing is moved yet.
    pub fn open(pipe: OwnedFd, file: File, path: &Path, offset: u64) -> Result<Drain> {
        let event = || {
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
                .map_err(|error| Error::system("cannot create an eventfd", error))
        };
        let numbers = SharedNumbers::new()
            .map_err(|error| Error::system("cannot create shared memory", error))?;
        let (stop, done, emptied) = (event()?, event()?, event()?);
        let shared = Shared { pipe, file, offset, numbers, stop, done, emptied };
        Ok(Drain { shared: Arc::new(shared), path: path.into(), process: None })
    }

    /// A drain that another process has opened, for the process that moves the stream.
    pub fn inherited(
        pipe: OwnedFd,
        descriptors: [OwnedFd; Drain::DESCRIPTORS],
        offset: u64,
    ) -> io::Result<Drain> {
        let [file, numbers, stop, done, emptied] = descriptors;
        let numbers = SharedNumbers::open(numbers)?;
        let shared = Shared { pipe, file: file.into(), offset, numbers, stop, done, emptied };
        Ok(Drain { shared: Arc::new(shared), path: PathBuf::new(), process: None })
    }

    /// What another process needs, in the order of [`Drain::inherited`].
    pub fn descriptors(&self) -> [BorrowedFd<'_>; Drain::DESCRIPTORS] {
        let Shared { file, numbers, stop, done, emptied, .. } = &*self.shared;
        [file.as_fd(), numbers.as_fd(), stop.as_fd(), done.as_fd(), emptied.as_fd()]
    }

    /// QEMU's stream.
    pub fn pipe(&self) -> BorrowedFd<'_> {
        self.shared.pipe.as_fd()
    }

    /// Where it begins in the file.
    pub fn offset(&self) -> u64 {
        self.shared.offset
    }

    /// Starts a thread of this process that moves the stream.
    pub fn start(&self) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        // Not joined: a file system that hangs must not hang whoever gives up on it.
        sys::spawn_quiet("instantsnap", move || shared.run()).map(drop)
    }

    /// Leaves that to another process, which has the descriptors.
    pub fn leave_to(&mut self, process: OwnedFd) {
        self.process = Some(process);
    }

    /// One of these becomes readable when [`Drain::outcome`] is known.
    pub fn ends(&self) -> [BorrowedFd<'_>; 2] {
        let done = self.shared.done.as_fd();
        [done, self.process.as_ref().map_or(done, AsFd::as_fd)]
    }

    /// Bytes taken from the pipe so far.
    pub fn bytes(&self) -> u64 {
        self.shared.numbers[BYTES].load(Ordering::Relaxed)
    }

    /// From now on nothing is written any more.
    pub fn discard(&self) {
        self.shared.numbers[DISCARD].store(1, Ordering::Relaxed);
    }

    /// QEMU has written all that it will: the stream ends where the pipe is empty. A process that
    /// the caller has forked, and that has QEMU's end of the pipe too, would keep it from ending
    /// otherwise.
    pub fn end_when_empty(&self) {
        self.shared.numbers[LAST].store(1, Ordering::Release);
        signal(&self.shared.emptied);
    }

    /// Once it is known: the stream's bytes, all of them in the file; or why they are not.
    pub fn outcome(&self) -> Option<Result<u64>> {
        self.notice_lost_process();
        let reason = match self.shared.numbers[OUTCOME].load(Ordering::Acquire) {
            UNDER_WAY => return None,
            WHOLE => return Some(Ok(self.bytes())),
            UNWANTED => "it is not wanted any more".into(),
            LOST => {
                "the watchdog process, which wrote it, was killed: take the snapshot again".into()
            }
            error => io::Error::from_raw_os_error((error - ERRNO) as i32).to_string(),
        };
        let path = self.path.display();
        Some(Err(Error::new(
            Code::SystemError,
            format!("cannot write memory snapshot file '{path}': {reason}"),
        )))
    }

    /// If the process that moves the stream has ended, the bytes that it had taken are lost, and so
    /// is the snapshot. The guest must not freeze: a thread of this process reads the rest.
    fn notice_lost_process(&self) {
        let Some(process) = &self.process else { return };
        let mut fds = [PollFd::new(process, PollFlags::IN)];
        let has_ended = poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0);
        if has_ended && self.shared.conclude(LOST) {
            let shared = Arc::clone(&self.shared);
            // If no thread can be started, the undo reads what keeps QEMU from going on.
            let _ = sys::spawn_quiet("instantsnap", move || shared.discard_rest());
        }
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
    fn run(&self) {
        let outcome = match self.fill() {
            Ok(()) => WHOLE,
            Err(Stopped::Unwanted) => UNWANTED,
            Err(Stopped::By(errno)) => ERRNO + errno.raw_os_error() as u64,
        };
        self.conclude(outcome);
        if outcome != WHOLE {
            self.discard_rest();
        }
    }

    /// Says what has become of it. False where that has been said.
    fn conclude(&self, outcome: u64) -> bool {
        let number = &self.numbers[OUTCOME];
        let first = number
            .compare_exchange(UNDER_WAY, outcome, Ordering::AcqRel, Ordering::Acquire)
            .is_ok();
        signal(&self.done);
        first
    }

    fn discard_rest(&self) {
        while self.wait() {
            let last = self.is(LAST);
            match discard(&self.pipe) {
                Ok(0) => return,
                Ok(got) => self.count(got),
                Err(Errno::AGAIN) if last => return,
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }

    fn fill(&self) -> std::result::Result<(), Stopped> {
        let Shared { pipe, file, .. } = self;
        let mut offset = self.offset;
        // A pipe is locked while it is spliced into a file, however long the file system takes;
        // nobody could write to it or empty it meanwhile. So that is a pipe of our own, and QEMU's
        // is locked for no longer than it takes to move pages.
        let (own_read, own_write) = pipe::open()?;
        let mut spliced = true;
        loop {
            if !self.wait() || self.is(DISCARD) {
                return Err(Stopped::Unwanted);
            }
            let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
            // Known before it is looked whether there is something.
            let last = self.is(LAST);
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

    /// Waits for something in the pipe, its end included; false when the thread is to end.
    fn wait(&self) -> bool {
        let mut fds =
            [&self.pipe, &self.stop, &self.emptied].map(|fd| PollFd::new(fd, PollFlags::IN));
        match rustix::io::retry_on_intr(|| poll(&mut fds, None)) {
            Ok(_) => fds[1].revents().is_empty(),
            Err(_) => false,
        }
    }

    fn is(&self, number: usize) -> bool {
        self.numbers[number].load(Ordering::Acquire) != 0
    }

    fn count(&self, bytes: usize) {
        self.numbers[BYTES].fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// Why the stream is not in the file.
enum Stopped {
    Unwanted,
    By(Errno),
}

impl From<Errno> for Stopped {
    fn from(errno: Errno) -> Stopped {
        Stopped::By(errno)
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
    /// The thread's stack, which is the caller's in a forked watchdog, may be small.
    const AT_ONCE: usize = 16 << 10;
    rustix::io::read(pipe, &mut [0; AT_ONCE])
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
        let drain = Drain::open(read, file, &path, 0).unwrap();
        drain.start().unwrap();
        write.write_all(&[7; 300_000]).unwrap();
        // The other end stays open.
        drain.end_when_empty();
        let [done, _] = drain.ends();
        poll(&mut [PollFd::new(&done, PollFlags::IN)], None).unwrap();
        assert_eq!(drain.outcome().unwrap().unwrap(), 300_000);
        assert_eq!(std::fs::read(&path).unwrap(), [7; 300_000]);
    }
}
