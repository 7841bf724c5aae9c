// SPDX-License-Identifier: LGPL-2.1-or-later

//! The drain: moves QEMU's stream from a pipe into a file.
//!
//! A thread of this process or of the watchdog does that. The watchdog goes on when this process is
//! stopped. The thread needs only its descriptors. Into a raw image it moves bytes. For a sparse
//! image it reads the records of the stream, and writes each page to its place. For a zstd image it
//! reads the stream into a buffer, and other threads compress it. While it has read the records, it
//! has noted what is known of the pages, and at the end it writes that to a file of its own.
//!
//! The pipe is always read to its end: if no process reads the stream any more, the guest freezes
//! at its next write to a page that is not saved yet. Data that cannot be written, or is not wanted
//! any more, is discarded.
//!
//! If the process that moves the stream into a raw image is killed, another process goes on where
//! it has stopped, and no byte is lost: see [`Shared::take_over`]. Only the process that writes a
//! sparse image knows which pages are in the file, and only the one that compresses knows what it
//! has not written yet. If it is killed, the snapshot fails.

use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use rustix::pipe::{SpliceFlags, splice, tee};

use super::chunk_queue::{ChunkQueue, Next, Taker};
use super::format::{Format, Level};
use super::incoming::Incoming;
use super::page_writer::{Failure, PageWriter};
use super::pages_file::{self, PageNotes};
use super::pipe::{self, CHUNK};
use super::zstd_writer::ZstdWriter;
use crate::error::{Code, Error, Result};
use crate::sys::{self, SharedNumbers};

/// Moves QEMU's stream into a file. Dropping it stops the thread that does so, in whichever process
/// it is.
#[derive(Debug)]
pub struct Drain {
    shared: Arc<Shared>,
    path: PathBuf,
    /// The process that moves the stream; `None` if it is this one.
    process: Option<OwnedFd>,
    /// Whether a thread of this process moves the stream, or has moved it.
    has_thread: AtomicBool,
}

/// The data that a drain and the thread that moves the stream share, even if they are in two
/// processes.
#[derive(Debug)]
struct Shared {
    /// The pipe of QEMU's stream, which does not block.
    pipe: OwnedFd,
    /// The file, and where the stream begins in it.
    file: File,
    offset: u64,
    /// The format that the image is to have.
    format: Format,
    /// The file of notes; a raw image has none.
    pages: Option<File>,
    /// The second pipe, on the way from the first one to the file: its reading and its writing end.
    /// It keeps what a process that is killed has taken and not written.
    second: [OwnedFd; 2],
    numbers: SharedNumbers<7>,
    /// Readable when the thread has to end.
    stop: OwnedFd,
    /// Readable when the outcome is known.
    done: OwnedFd,
    /// Readable when QEMU writes nothing more.
    emptied: OwnedFd,
}

/// The index of a shared number: the bytes taken from the pipe so far.
const BYTES: usize = 0;
/// The index of the outcome, which is one of the values below.
const OUTCOME: usize = 1;
/// The index of a flag: 1 if what still comes is not wanted.
const DISCARD: usize = 2;
/// The index of a flag: 1 if QEMU writes nothing more, so that the stream ends where the pipe is
/// empty.
const LAST: usize = 3;
/// The index of a number of bytes: so many were in the file when the second pipe was empty the last
/// time.
const EMPTIED: usize = 4;
/// The index of a flag: 1 if the image is raw although it was to have another format.
const STAYS_RAW: usize = 5;
/// The index of a flag: 1 if some of the stream was taken for an image that is not raw. Another
/// process cannot go on.
const IN_RECORDS: usize = 6;

/// The outcome is not known yet. It can become known before the stream has ended.
const UNDER_WAY: u64 = 0;
/// All of the stream is in the file.
const WHOLE: u64 = 1;
const UNWANTED: u64 = 2;
/// The process that wrote a sparse or a zstd image has ended.
const LOST: u64 = 3;
/// The stream has ended too early, or has an unknown record after its first page.
const WRONG: u64 = 4;
/// This plus the number of an error of the system.
const ERRNO: u64 = 1 << 32;

/// The bytes of the stream that wait to be compressed, at most. QEMU waits only when there are
/// more.
const BUFFER: usize = 64 << 20;
/// If nothing comes for this time, all that has come is written to the file.
const QUIET: Duration = Duration::from_millis(100);

impl Drain {
    /// The number of descriptors that another process needs besides the pipe.
    pub const DESCRIPTORS: usize = 8;

    /// Makes a drain from `pipe`, which does not block, to `file`, which has this path, from
    /// `offset` on, for an image of this format. `pages` is the file of notes, if the image has
    /// one. Nothing is moved yet.
    pub fn open(
        pipe: OwnedFd,
        file: File,
        pages: Option<File>,
        path: &Path,
        offset: u64,
        format: Format,
    ) -> Result<Drain> {
        let event = || {
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
                .map_err(|error| Error::system("cannot create an eventfd", error))
        };
        let numbers = SharedNumbers::new()
            .map_err(|error| Error::system("cannot create shared memory", error))?;
        let (stop, done, emptied) = (event()?, event()?, event()?);
        let second = pipe::pipe()?.into();
        let shared =
            Shared { pipe, file, offset, format, pages, second, numbers, stop, done, emptied };
        Ok(Drain::new(shared, path))
    }

    /// Makes the drain of a process that moves the stream for another process, which has opened it.
    pub fn inherited(
        pipe: OwnedFd,
        descriptors: [OwnedFd; Drain::DESCRIPTORS],
        offset: u64,
        format: Format,
    ) -> io::Result<Drain> {
        let [file, pages, numbers, stop, done, emptied, second @ ..] = descriptors;
        let (file, numbers) = (File::from(file), SharedNumbers::open(numbers)?);
        // An image without a file of notes has its own descriptor in that place.
        let pages = Some(File::from(pages)).filter(pages_file::is_begun);
        let shared =
            Shared { pipe, file, offset, format, pages, second, numbers, stop, done, emptied };
        Ok(Drain::new(shared, Path::new("")))
    }

    fn new(shared: Shared, path: &Path) -> Drain {
        let (shared, path) = (Arc::new(shared), path.into());
        Drain { shared, path, process: None, has_thread: AtomicBool::new(false) }
    }

    /// The descriptors that another process needs, in the order of [`Drain::inherited`]; `None` if
    /// no other process can move the stream.
    pub fn descriptors(&self) -> Option<[BorrowedFd<'_>; Drain::DESCRIPTORS]> {
        let Shared { file, pages, second: [read, write], numbers, stop, done, emptied, .. } =
            &*self.shared;
        let pages = pages.as_ref().unwrap_or(file);
        let numbers = numbers.memory().filter(|_| !self.has_thread.load(Ordering::Relaxed))?;
        let own = [stop, done, emptied, read, write].map(AsFd::as_fd);
        let [stop, done, emptied, read, write] = own;
        Some([file.as_fd(), pages.as_fd(), numbers, stop, done, emptied, read, write])
    }

    /// The pipe of QEMU's stream.
    pub fn pipe(&self) -> BorrowedFd<'_> {
        self.shared.pipe.as_fd()
    }

    /// Where the stream begins in the file.
    pub fn offset(&self) -> u64 {
        self.shared.offset
    }

    /// The format of the image: that which it was to have, or raw if the stream is of a kind that
    /// this does not know. Final once the outcome is known.
    pub fn format(&self) -> Format {
        match self.shared.is(STAYS_RAW) {
            true => Format::Raw,
            false => self.shared.format,
        }
    }

    /// Starts a thread of this process that moves the stream, unless there is one. No other process
    /// may move the stream any more.
    pub fn start(&self) -> Result<()> {
        if self.has_thread.swap(true, Ordering::Relaxed) {
            return Ok(());
        }
        let shared = Arc::clone(&self.shared);
        // The thread is not joined: a file system that hangs must not hang a caller that gives up.
        let started = sys::spawn_quiet("instantsnap", move || shared.run()).map(drop);
        if started.is_err() {
            self.has_thread.store(false, Ordering::Relaxed);
        }
        started
    }

    /// Leaves the moving of the stream to another process, which has the descriptors.
    pub fn leave_to(&mut self, process: OwnedFd) {
        self.process = Some(process);
    }

    /// Becomes readable when [`Drain::outcome`] is known.
    pub fn done(&self) -> BorrowedFd<'_> {
        self.shared.done.as_fd()
    }

    /// The number of bytes taken from the pipe so far.
    pub fn bytes(&self) -> u64 {
        self.shared.numbers[BYTES].load(Ordering::Relaxed)
    }

    /// Discards the rest of the stream: nothing more is written to the file.
    pub fn discard(&self) {
        self.shared.numbers[DISCARD].store(1, Ordering::Relaxed);
    }

    /// Ends the stream where the pipe is empty, because QEMU writes nothing more. Otherwise it
    /// might not end: a process that the caller has forked can have a copy of QEMU's end of the
    /// pipe.
    pub fn end_when_empty(&self) {
        self.shared.numbers[LAST].store(1, Ordering::Release);
        signal(&self.shared.emptied);
    }

    /// The outcome, once it is known: the number of the stream's bytes, which are all in the file,
    /// or why they are not there.
    pub fn outcome(&self) -> Option<Result<u64>> {
        let reason = match self.shared.numbers[OUTCOME].load(Ordering::Acquire) {
            UNDER_WAY => return None,
            WHOLE => return Some(Ok(self.bytes())),
            UNWANTED => "it is not wanted any more".into(),
            WRONG => {
                "QEMU's stream has ended too early, or has a record that this version does not \
                 know: take the snapshot with a raw image"
                    .into()
            }
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

    /// If another process has moved the stream, and has ended, a thread of this process goes on.
    /// Without that, the guest would freeze.
    pub fn go_on_if_lost(&self) {
        let Some(process) = &self.process else { return };
        // The descriptor is readable only when all threads of the process have ended.
        if sys::wait_ready([Some(process)], 0) {
            // If no thread can be started, the undo empties the pipe when QEMU waits for room in
            // it.
            let _ = self.start();
        }
    }
}

impl Drop for Drain {
    fn drop(&mut self) {
        signal(&self.shared.stop);
    }
}

fn signal(event: &OwnedFd) {
    // An eventfd refuses a write only at its highest count. Then it is readable already, as it
    // should be.
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}

impl Shared {
    fn run(&self) {
        // Another process may have moved the stream before.
        let known = self.numbers[OUTCOME].load(Ordering::Acquire);
        let outcome = if known == UNDER_WAY { self.outcome_of_fill() } else { known };
        self.numbers[OUTCOME].store(outcome, Ordering::Release);
        signal(&self.done);
        if outcome != WHOLE {
            self.discard_rest();
        }
    }

    fn outcome_of_fill(&self) -> u64 {
        let filled = match self.format {
            Format::Raw => self.go_on(),
            _ if self.is(STAYS_RAW) => self.go_on(),
            _ if self.is(IN_RECORDS) => Err(Stopped::Lost),
            Format::Sparse => self.fill_sparse(),
            Format::Zstd(level) => self.fill_zstd(level),
        };
        match filled {
            Ok(()) => WHOLE,
            Err(Stopped::Unwanted) => UNWANTED,
            Err(Stopped::Wrong) => WRONG,
            Err(Stopped::Lost) => LOST,
            Err(Stopped::By(errno)) => ERRNO + errno.raw_os_error() as u64,
        }
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

    /// Moves the stream as it comes, from where a process before this one has stopped.
    fn go_on(&self) -> std::result::Result<(), Stopped> {
        self.take_over().and_then(|written| self.fill(written))
    }

    /// Reads the records of the stream, and writes the pages to their places.
    fn fill_sparse(&self) -> std::result::Result<(), Stopped> {
        let file = &self.file;
        let mut incoming = Incoming::new();
        let begun = match incoming.head(|space| self.read(space))? {
            Ok(head) => PageWriter::begin(file, &head, self.offset),
            Err(what) => Err(Failure::Stream(what)),
        };
        let mut writer = match begun {
            Ok(writer) => writer,
            Err(Failure::File(error)) => return Err(error.into()),
            // Nothing is in the file yet.
            Err(Failure::Stream(_)) => return self.stay_raw(&incoming),
        };
        let write = |bytes: &[u8]| Ok(ControlFlow::Continue(writer.write(file, bytes)?));
        match incoming.each(|space| self.read(space), write)? {
            true => {
                self.note(&writer.finish(file)?);
                Ok(())
            }
            false => Err(Stopped::Wrong),
        }
    }

    /// Compresses the stream, and reads its records.
    fn fill_zstd(&self, level: Level) -> std::result::Result<(), Stopped> {
        let writer = ZstdWriter::begin(&self.file, self.offset, level)?;
        let queue = ChunkQueue::new(BUFFER);
        let notes = std::thread::scope(|scope| {
            let taker = queue.taker();
            let thread = std::thread::Builder::new().name("instantsnap".into());
            let compress = thread.spawn_scoped(scope, || compress(writer, taker))?;
            let read = self.read_into(&queue);
            match &read {
                Ok(()) => queue.end(),
                Err(_) => queue.give_up(),
            }
            let compressed = compress.join().unwrap_or(Err(Stopped::By(Errno::IO)));
            // An error of the compression is the reason why nothing more could be added.
            match compressed {
                Err(Stopped::Unwanted) | Ok(_) if read.is_err() => read.map(|()| None),
                compressed => compressed,
            }
        })?;
        if let Some(notes) = notes {
            self.note(&notes);
        }
        Ok(())
    }

    /// Reads the stream to its end, or until it is not wanted any more.
    fn read_into(&self, queue: &ChunkQueue) -> std::result::Result<(), Stopped> {
        let mut buffer = vec![0; CHUNK];
        loop {
            let read = self.read(&mut buffer)?;
            if read == 0 || !queue.add(&buffer[..read]) {
                return Ok(());
            }
        }
    }

    /// Reads the next bytes of the stream for this process only. Returns their number; 0 at the
    /// stream's end.
    fn read(&self, buffer: &mut [u8]) -> std::result::Result<usize, Stopped> {
        loop {
            if !self.wait() || self.is(DISCARD) {
                return Err(Stopped::Unwanted);
            }
            // This is read before the pipe, so that data that comes in between is not missed.
            let last = self.is(LAST);
            self.numbers[IN_RECORDS].store(1, Ordering::Release);
            match rustix::io::read(&self.pipe, &mut *buffer) {
                Ok(read) => {
                    self.count(read);
                    return Ok(read);
                }
                Err(Errno::AGAIN) if last => return Ok(0),
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Writes the notes of the pages. The image is whole without them, so an error does no harm:
    /// the caller that completes the image checks the file.
    fn note(&self, notes: &PageNotes) {
        if let Some(pages) = &self.pages {
            let _ = notes.write(pages, &self.file, self.offset);
        }
    }

    /// Moves a stream as it comes, whose first bytes have come.
    fn stay_raw(&self, incoming: &Incoming) -> std::result::Result<(), Stopped> {
        let bytes = incoming.bytes();
        self.file.write_all_at(bytes, self.offset)?;
        self.numbers[EMPTIED].store(bytes.len() as u64, Ordering::Release);
        self.numbers[STAYS_RAW].store(1, Ordering::Release);
        if incoming.has_ended() { Ok(()) } else { self.fill(bytes.len() as u64) }
    }

    /// The number of bytes that are in the file. Corrects the number of bytes that were taken: a
    /// process that moved the stream before may have been killed at any moment.
    ///
    /// [`Shared::fill`] repeats these steps:
    ///
    /// 1. It moves bytes from QEMU's pipe to the second pipe, which is empty.
    /// 2. It adds their number to `BYTES`.
    /// 3. It moves them to the file, in parts. The kernel removes a part from the pipe only after
    ///    it has written that part to the file.
    /// 4. When the second pipe is empty, it sets `EMPTIED` to `BYTES`.
    ///
    /// Before step 2, `BYTES` is equal to `EMPTIED`, and nothing of what the second pipe has is in
    /// the file. From step 2 to step 4 `BYTES` is greater, and counts all that was taken: all but
    /// what the second pipe still has is in the file. So the numbers are exact, although the
    /// process may have been killed between a move and the step that notes it. (If it was killed
    /// inside step 3, a part may be in the file and in the pipe. It is written again, to the same
    /// place.)
    fn take_over(&self) -> std::result::Result<u64, Stopped> {
        let [taken, emptied] =
            [BYTES, EMPTIED].map(|number| self.numbers[number].load(Ordering::Acquire));
        let waiting = rustix::io::ioctl_fionread(&self.second[0])?;
        let written = if taken == emptied { emptied } else { taken - waiting };
        self.numbers[BYTES].store(written + waiting, Ordering::Release);
        Ok(written)
    }

    /// Moves the stream. So many of its bytes are in the file already.
    fn fill(&self, mut written: u64) -> std::result::Result<(), Stopped> {
        let Shared { pipe, second: [read, write], file, .. } = self;
        let mut spliced = true;
        loop {
            let taken = self.numbers[BYTES].load(Ordering::Acquire);
            while written < taken {
                let (offset, left) = (self.offset + written, (taken - written) as usize);
                let moved = match spliced {
                    true => splice_chunk(read, file, offset, left),
                    false => copy_chunk(read, file, offset, left),
                };
                match moved {
                    Ok(moved) => written += moved as u64,
                    Err(Errno::INTR) => {}
                    // This file system cannot take pages from a pipe.
                    Err(Errno::INVAL) if spliced => spliced = false,
                    Err(error) => return Err(error.into()),
                }
            }
            self.numbers[EMPTIED].store(written, Ordering::Release);
            if !self.wait() || self.is(DISCARD) {
                return Err(Stopped::Unwanted);
            }
            // This is read before the pipe, so that data that comes in between is not missed.
            let last = self.is(LAST);
            // The kernel locks a pipe while it is spliced into a file, however long the file system
            // takes. Meanwhile no process can write to the pipe or empty it. So QEMU's pipe is
            // locked only while pages move to the second one.
            let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
            match splice(pipe, None, write, None, CHUNK, flags) {
                Ok(0) => return Ok(()),
                Ok(moved) => self.count(moved),
                Err(Errno::AGAIN) if last => return Ok(()),
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Waits until the pipe has data or has ended, or QEMU writes nothing more. Returns false if
    /// the thread has to end.
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
        self.numbers[BYTES].fetch_add(bytes as u64, Ordering::AcqRel);
    }
}

/// Compresses what comes out of a queue. Returns the notes of the pages.
fn compress(
    mut writer: ZstdWriter,
    taker: Taker,
) -> std::result::Result<Option<PageNotes>, Stopped> {
    loop {
        match taker.next(QUIET) {
            Next::Bytes(bytes) => writer.write(&bytes)?,
            Next::Quiet => writer.flush()?,
            Next::End => return Ok(writer.finish()?),
            Next::GivenUp => return Err(Stopped::Unwanted),
        }
    }
}

/// Why the stream is not in the file.
enum Stopped {
    Unwanted,
    Wrong,
    Lost,
    By(Errno),
}

impl From<Failure> for Stopped {
    fn from(failure: Failure) -> Stopped {
        match failure {
            Failure::Stream(_) => Stopped::Wrong,
            Failure::File(error) => error.into(),
        }
    }
}

impl From<io::Error> for Stopped {
    fn from(error: io::Error) -> Stopped {
        Stopped::By(Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }
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

/// Does the same by a copy. Like the kernel, it removes bytes from the pipe only after it has
/// written them to the file.
fn copy_chunk(
    pipe: &OwnedFd,
    file: &File,
    offset: u64,
    length: usize,
) -> rustix::io::Result<usize> {
    let (copy, write) = pipe::open()?;
    let copied = tee(pipe, &write, length.min(CHUNK / 4), SpliceFlags::empty())?;
    let mut buffer = vec![0; copied];
    let read = rustix::io::read(copy, &mut buffer)?;
    file.write_all_at(&buffer[..read], offset)
        .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    let mut left = read;
    while left > 0 {
        left -= rustix::io::retry_on_intr(|| rustix::io::read(pipe, &mut buffer[..left]))?;
    }
    Ok(read)
}

/// Reads from a pipe that does not block, and discards what it has read. Returns the number of
/// bytes; 0 at the pipe's end.
pub fn discard(pipe: &OwnedFd) -> rustix::io::Result<usize> {
    /// The thread's stack may be small: in a forked watchdog it is the caller's.
    const AT_ONCE: usize = 16 << 10;
    rustix::io::read(pipe, &mut [0; AT_ONCE])
}

#[cfg(test)]
mod tests {
    use super::super::sample;
    use super::*;
    use crate::random::Random;
    use std::io::Write;

    /// A drain of a pipe to a file, with the writing end of the pipe.
    fn drain(path: &Path) -> (Drain, File) {
        let (read, write) = pipe::pipe().unwrap();
        rustix::io::ioctl_fionbio(&read, true).unwrap();
        let file = File::create(path).unwrap();
        (Drain::open(read, file, None, path, 0, Format::Raw).unwrap(), write.into())
    }

    /// Waits until the stream is in the file, and returns the number of its bytes.
    fn wait_whole(drain: &Drain) -> u64 {
        poll(&mut [PollFd::from_borrowed_fd(drain.done(), PollFlags::IN)], None).unwrap();
        drain.outcome().unwrap().unwrap()
    }

    /// The numbers from 0 on, as bytes.
    fn numbers(numbers: std::ops::Range<u64>) -> Vec<u8> {
        numbers.flat_map(u64::to_le_bytes).collect()
    }

    /// The processes that move the stream are killed at random moments, inside of system calls too.
    #[test]
    fn stream_is_whole_however_often_the_process_that_moves_it_is_killed() {
        const KILLS: u32 = 400;
        const AT_ONCE: u64 = 2048;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        let (mut drain, mut write) = drain(&path);
        let (finish, finished) = std::sync::mpsc::channel::<()>();
        let writer = std::thread::spawn(move || {
            let mut next = 0;
            while finished.try_recv().is_err() {
                write.write_all(&numbers(next..next + AT_ONCE)).unwrap();
                next += AT_ONCE;
            }
            next
        });
        let mut random = Random(1);
        for _ in 0..KILLS {
            let shared = &drain.shared;
            let run = || {
                shared.run();
                sys::exit_now()
            };
            // SAFETY: it makes only system calls, on memory that exists already.
            let child = unsafe { sys::Child::fork(run) }.unwrap();
            std::thread::sleep(std::time::Duration::from_micros(random.below(400) as u64));
            child.kill();
        }
        finish.send(()).unwrap();
        // A thread goes on for the last process.
        // SAFETY: it only ends.
        let ended = unsafe { sys::Child::fork(|| sys::exit_now()) }.unwrap();
        drain.leave_to(ended.ended().try_clone_to_owned().unwrap());
        drop(ended);
        drain.go_on_if_lost();
        let count = writer.join().unwrap();
        assert_eq!(wait_whole(&drain), count * 8);
        let file = std::fs::read(&path).unwrap();
        assert_eq!(file.len() as u64, count * 8);
        let wrong = (0..count)
            .zip(file.chunks_exact(8))
            .find(|(number, bytes)| u64::from_le_bytes((*bytes).try_into().unwrap()) != *number);
        assert_eq!(wrong, None);
    }

    /// What a process that is killed between two steps leaves: see [`Shared::take_over`].
    #[test]
    fn stream_goes_on_where_it_was_between_any_two_steps() {
        let stream = numbers(0..4096);
        let (before, taken) = stream.split_at(8192);
        for (bytes, emptied, in_file) in [
            // Before the bytes that were taken were counted.
            (before.len(), before.len(), 0),
            // Before any of them was written.
            (before.len() + 20_000, before.len(), 0),
            // When some of them were written, or all.
            (before.len() + 20_000, before.len(), 12_345),
            (before.len() + 20_000, before.len(), 20_000),
            // When all of them were written, and that was noted.
            (before.len() + 20_000, before.len() + 20_000, 20_000),
        ] {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("image");
            let (drain, mut write) = drain(&path);
            let Shared { second, numbers, file, .. } = &*drain.shared;
            numbers[BYTES].store(bytes as u64, Ordering::Relaxed);
            numbers[EMPTIED].store(emptied as u64, Ordering::Relaxed);
            file.write_all_at(&stream[..before.len() + in_file], 0).unwrap();
            rustix::io::write(&second[1], &taken[in_file..20_000]).unwrap();
            write.write_all(&taken[20_000..]).unwrap();
            drop(write);
            drain.start().unwrap();
            assert_eq!(wait_whole(&drain), stream.len() as u64);
            assert!(std::fs::read(&path).unwrap() == stream, "{bytes} {emptied} {in_file}");
        }
    }

    #[test]
    fn copy_takes_from_the_pipe_what_it_has_written() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        let file = File::create(&path).unwrap();
        let (read, write) = pipe::pipe().unwrap();
        let stream = numbers(0..8192);
        rustix::io::write(&write, &stream).unwrap();
        let mut written = 0;
        while written < stream.len() {
            written += copy_chunk(&read, &file, written as u64, 30_000).unwrap();
            let waiting = rustix::io::ioctl_fionread(&read).unwrap() as usize;
            assert_eq!(written + waiting, stream.len());
        }
        assert!(std::fs::read(&path).unwrap() == stream);
    }

    /// Drains a stream that comes in pieces. Returns the outcome, the format and the file.
    fn drained(stream: &[u8], piece: usize) -> (Result<u64>, Format, Vec<u8>) {
        drained_as(Format::Sparse, stream, piece)
    }

    fn drained_as(wanted: Format, stream: &[u8], piece: usize) -> (Result<u64>, Format, Vec<u8>) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        let (read, write) = pipe::pipe().unwrap();
        rustix::io::ioctl_fionbio(&read, true).unwrap();
        let file = File::create_new(&path).unwrap();
        let drain = Drain::open(read, file, None, &path, 100, wanted).unwrap();
        drain.start().unwrap();
        let mut write = File::from(write);
        stream.chunks(piece).for_each(|piece| write.write_all(piece).unwrap());
        drop(write);
        poll(&mut [PollFd::from_borrowed_fd(drain.done(), PollFlags::IN)], None).unwrap();
        (drain.outcome().unwrap(), drain.format(), std::fs::read(&path).unwrap())
    }

    /// What the zstd library makes of an image.
    fn decompressed(image: &[u8]) -> Vec<u8> {
        zstd::decode_all(&image[100..]).unwrap()
    }

    #[test]
    fn a_compressed_stream_is_the_stream_however_it_comes_and_of_whichever_kind_it_is() {
        let mut random = Random(9);
        let mut pages = vec![sample::named_page(b"pc.ram", 0, 1)];
        pages.extend((1..512).map(|page| sample::page(page * 4096, random.below(256) as u8)));
        let known = sample::stream(&pages, &[sample::named_page(b"rom", 4096, 4)]);
        let unknown = [&sample::head()[..], &[0xff; 3 << 20]].concat();
        let zstd = Format::named("zstd").unwrap();
        for stream in [&known[..], &unknown, b"QEVM\0\0\0\x03\x01an old machine", b"short", b""] {
            for piece in [4096, 5000, 1 << 20] {
                let (outcome, format, image) = drained_as(zstd, stream, piece);
                assert_eq!(outcome.unwrap(), stream.len() as u64);
                assert_eq!(format, zstd);
                assert!(decompressed(&image) == stream);
            }
        }
        for piece in [1, 13] {
            let short = sample::stream(&pages[..2], &[]);
            assert!(decompressed(&drained_as(zstd, &short, piece).2) == short);
        }
        let cut = known.len() - sample::TAIL.len() - 20;
        let error = drained_as(zstd, &known[..cut], 4096).0.unwrap_err();
        assert!(error.message.contains("ended too early"), "{}", error.message);
    }

    /// A stream that is given up before its end shows whether it is whole.
    #[test]
    fn what_has_come_can_be_decompressed_once_nothing_more_comes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        let zstd = Format::named("zstd").unwrap();
        let image = super::super::file::MemoryImage::create(&path, "<domain/>", None, true, zstd);
        let image = image.unwrap();
        let (read, write) = pipe::pipe().unwrap();
        rustix::io::ioctl_fionbio(&read, true).unwrap();
        let (file, pages) = (image.file().unwrap(), image.pages_file().unwrap());
        assert!(pages.is_some());
        let drain = Drain::open(read, file, pages, &path, image.stream_offset(), zstd).unwrap();
        drain.start().unwrap();
        let mut write = File::from(write);
        let state = b"\x0bglobalstate\0\0\0\0\0\0\0\x01\0\0\0\x08running\0";
        let stream = sample::stream(&[sample::named_page(b"rom", 0, 1)], &[]);
        let (before, tail) = stream.split_at(stream.len() - sample::TAIL.len());
        let (devices, rest) = tail.split_at(13);
        write.write_all(before).unwrap();
        write.write_all(&[devices, state].concat()).unwrap();
        let wait = |until: &dyn Fn() -> bool| {
            let deadline = std::time::Instant::now() + Duration::from_secs(60);
            while !until() {
                assert!(std::time::Instant::now() < deadline);
                std::thread::sleep(Duration::from_millis(5));
            }
        };
        wait(&|| image.state_at_instant().unwrap().as_deref() == Some("running"));
        assert!(!image.has_whole_stream().unwrap());
        write.write_all(rest).unwrap();
        wait(&|| image.has_whole_stream().unwrap());
        // The pipe stays open.
        drain.end_when_empty();
        assert_eq!(wait_whole(&drain), (stream.len() + state.len()) as u64);
        image.complete(zstd).unwrap();
        super::super::verify::verify(&path).unwrap();
        assert!(pages_file::path_of(&path).exists());
        image.remove().unwrap();
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn pages_go_to_their_places_however_the_stream_comes() {
        let pages = [
            sample::named_page(b"pc.ram", 4096, 1),
            sample::page(8192, 2),
            sample::page(0, 3),
            sample::fill(12288, 0),
            sample::fill(16384, 9),
            sample::named_page(b"rom", 4096, 4),
        ];
        // The second section replaces pages of the first one.
        let again = [
            sample::named_page(b"pc.ram", 8192, 5),
            sample::fill(0, 0),
            sample::page((2 << 20) - 4096, 6),
        ];
        let stream = sample::stream(&pages, &again);
        for piece in [1, 13, 4096, 5000, 1 << 20] {
            let (outcome, format, image) = drained(&stream, piece);
            assert_eq!(outcome.unwrap(), stream.len() as u64);
            assert_eq!(format, Format::Sparse);
            // pc.ram begins at the first MiB, and the entry of rom follows its pages.
            let ram = &image[1 << 20..3 << 20];
            let expected = |page: usize| match page {
                1 => 1,
                2 => 5,
                4 => 9,
                511 => 6,
                _ => 0,
            };
            for (page, content) in ram.chunks(4096).enumerate() {
                assert_eq!(content, [expected(page); 4096], "page {page} by pieces of {piece}");
            }
            let entry = &image[3 << 20..];
            assert_eq!(&entry[..4], b"\x03rom");
            assert_eq!(&entry[12..24], b"\0\0\0\x01\0\0\0\0\0\0\x10\0");
            // The bitmap of rom, then its pages at the next MiB.
            assert_eq!(&entry[24..32], &((3u64 << 20) + 40).to_be_bytes());
            assert_eq!(&entry[40..48], [3, 0, 0, 0, 0, 0, 0, 0]);
            assert_eq!(&image[4 << 20..][..4096], [0; 4096]);
            assert_eq!(&image[(4 << 20) + 4096..][..4096], [4; 4096]);
            let middle = b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02";
            let tail = [&middle[..], b"\x02\0\0\0\x02", middle, sample::TAIL].concat();
            assert_eq!(image[(4 << 20) + 8192..], tail);
        }
    }

    #[test]
    fn a_stream_that_is_not_known_before_its_first_page_stays_raw() {
        let early = [&sample::head()[..], b"\x02\0\0\0\x63the pages of another device"].concat();
        let devices_first = [&sample::head()[..], sample::TAIL].concat();
        // A guest with more memory than a sparse image can have: its first block is too large.
        let mut large = sample::stream(&[sample::named_page(b"pc.ram", 0, 1)], &[]);
        for (size, new) in [((2 << 20) + 8192 + 4, (1 << 46) + 8192 + 4), (2u64 << 20, 1u64 << 46)]
        {
            let size = size.to_be_bytes();
            let at = large.windows(8).position(|bytes| bytes == size).unwrap();
            large[at..at + 8].copy_from_slice(&new.to_be_bytes());
        }
        let old_machine = &b"QEVM\0\0\0\x03\x01an old machine"[..];
        for stream in [old_machine, b"short", b"", &early, &devices_first, &large] {
            let (outcome, format, image) = drained(stream, 7);
            assert_eq!(outcome.unwrap(), stream.len() as u64);
            assert_eq!(format, Format::Raw);
            assert_eq!(image.get(100..).unwrap_or_default(), stream);
        }
    }

    #[test]
    fn a_stream_that_is_cut_off_or_becomes_unknown_is_an_error() {
        let first = sample::named_page(b"rom", 0, 1);
        let stream = sample::stream(std::slice::from_ref(&first), &[sample::page(4096, 2)]);
        let begin = sample::head().len() + 5 + first.len();
        let end = stream.len() - sample::TAIL.len();
        for cut in (begin..end).step_by(997).chain([begin, end - 1, end]) {
            let (outcome, format, _) = drained(&stream[..cut], 1 << 20);
            let error = outcome.unwrap_err();
            assert!(error.message.contains("ended too early"), "{cut}: {}", error.message);
            assert_eq!(format, Format::Sparse);
        }
        let with_command = |command: &[u8]| {
            let (before, after) = stream.split_at(begin + 13);
            drained(&[before, command, after].concat(), 1 << 20)
        };
        let (outcome, format, _) = with_command(b"\x08\0\x0b\0\0");
        assert!(outcome.is_ok() && format == Format::Sparse, "{outcome:?}");
        assert!(with_command(b"\x08\0\x02\0\x04\0\0\0\x01").0.is_err());
        let unknown = sample::stream(&[first, vec![0xff; 8], b"\x03rom".to_vec()], &[]);
        assert!(drained(&unknown, 1 << 20).0.is_err());
    }

    /// What of an image that is not raw is in the file, only the process knows that writes it.
    #[test]
    fn an_image_that_is_not_raw_whose_writer_was_killed_is_an_error_and_the_stream_is_read_to_its_end()
     {
        for format in ["sparse", "zstd"] {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("image");
            let (read, write) = pipe::pipe().unwrap();
            rustix::io::ioctl_fionbio(&read, true).unwrap();
            let (file, format) = (File::create(&path).unwrap(), Format::named(format).unwrap());
            let drain = Drain::open(read, file, None, &path, 100, format).unwrap();
            drain.shared.numbers[IN_RECORDS].store(1, Ordering::Release);
            drain.start().unwrap();
            // The writes would wait if the pipe was not read.
            File::from(write).write_all(&[7; 3 << 20]).unwrap();
            poll(&mut [PollFd::from_borrowed_fd(drain.done(), PollFlags::IN)], None).unwrap();
            let error = drain.outcome().unwrap().unwrap_err();
            assert!(error.message.contains("was killed"), "{}", error.message);
        }
    }

    #[test]
    fn a_stream_whose_other_end_is_still_held_ends_where_the_pipe_is_empty_when_nothing_more_comes()
    {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        let (drain, mut write) = drain(&path);
        drain.start().unwrap();
        write.write_all(&[7; 300_000]).unwrap();
        // The other end stays open.
        drain.end_when_empty();
        assert_eq!(wait_whole(&drain), 300_000);
        assert_eq!(std::fs::read(&path).unwrap(), [7; 300_000]);
    }
}
