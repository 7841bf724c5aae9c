// SPDX-License-Identifier: LGPL-2.1-or-later

//! The drain: moves QEMU's stream from a pipe into a file.
//!
//! A thread of this process or of the watchdog does that. The watchdog goes on when this process is
//! stopped. The thread needs only its descriptors. Into a raw image it moves bytes. For a sparse
//! image it reads the records of the stream, and writes each page to its place.
//!
//! The pipe is always read to its end: if no process reads the stream any more, the guest freezes
//! at its next write to a page that is not saved yet. Data that cannot be written, or is not wanted
//! any more, is discarded.

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

use super::format::Format;
use super::page_writer::{Failure, PageWriter};
use super::pipe::{self, CHUNK};
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
    numbers: SharedNumbers<5>,
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
/// The index of a flag: 1 if the image is raw although it was to have another format.
const STAYS_RAW: usize = 4;

/// The outcome is not known yet. It can become known before the stream has ended.
const UNDER_WAY: u64 = 0;
/// All of the stream is in the file.
const WHOLE: u64 = 1;
const UNWANTED: u64 = 2;
/// The process that moved it has ended.
const LOST: u64 = 3;
/// The stream has ended too early, or has an unknown record after its first page.
const WRONG: u64 = 4;
/// This plus the number of an error of the system.
const ERRNO: u64 = 1 << 32;

impl Drain {
    /// The number of descriptors that another process needs besides the pipe.
    pub const DESCRIPTORS: usize = 5;

    /// Makes a drain from `pipe`, which does not block, to `file`, which has this path, from
    /// `offset` on, for an image of this format. Nothing is moved yet.
    pub fn open(
        pipe: OwnedFd,
        file: File,
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
        let shared = Shared { pipe, file, offset, format, numbers, stop, done, emptied };
        Ok(Drain { shared: Arc::new(shared), path: path.into(), process: None })
    }

    /// Makes the drain of a process that moves the stream for another process, which has opened it.
    pub fn inherited(
        pipe: OwnedFd,
        descriptors: [OwnedFd; Drain::DESCRIPTORS],
        offset: u64,
        format: Format,
    ) -> io::Result<Drain> {
        let [file, numbers, stop, done, emptied] = descriptors;
        let numbers = SharedNumbers::open(numbers)?;
        let file = file.into();
        let shared = Shared { pipe, file, offset, format, numbers, stop, done, emptied };
        Ok(Drain { shared: Arc::new(shared), path: PathBuf::new(), process: None })
    }

    /// The descriptors that another process needs, in the order of [`Drain::inherited`].
    pub fn descriptors(&self) -> [BorrowedFd<'_>; Drain::DESCRIPTORS] {
        let Shared { file, numbers, stop, done, emptied, .. } = &*self.shared;
        [file.as_fd(), numbers.as_fd(), stop.as_fd(), done.as_fd(), emptied.as_fd()]
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

    /// Starts a thread of this process that moves the stream.
    pub fn start(&self) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        // The thread is not joined: a file system that hangs must not hang a caller that gives up.
        sys::spawn_quiet("instantsnap", move || shared.run()).map(drop)
    }

    /// Leaves the moving of the stream to another process, which has the descriptors.
    pub fn leave_to(&mut self, process: OwnedFd) {
        self.process = Some(process);
    }

    /// One of these becomes readable when [`Drain::outcome`] is known.
    pub fn ends(&self) -> [BorrowedFd<'_>; 2] {
        let done = self.shared.done.as_fd();
        [done, self.process.as_ref().map_or(done, AsFd::as_fd)]
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
        self.notice_lost_process();
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

    /// Checks whether the process that moves the stream has ended. If so, the bytes that it had
    /// taken are lost, and the snapshot fails. A thread of this process reads the rest, so that the
    /// guest does not freeze.
    fn notice_lost_process(&self) {
        let Some(process) = &self.process else { return };
        let mut fds = [PollFd::new(process, PollFlags::IN)];
        let has_ended = poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0);
        if has_ended && self.shared.conclude(LOST) {
            let shared = Arc::clone(&self.shared);
            // If no thread can be started, the undo empties the pipe when QEMU waits for room in
            // it.
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
    // An eventfd refuses a write only at its highest count. Then it is readable already, as it
    // should be.
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}

impl Shared {
    fn run(&self) {
        let outcome = match self.fill() {
            Ok(()) => WHOLE,
            Err(Stopped::Unwanted) => UNWANTED,
            Err(Stopped::Wrong) => WRONG,
            Err(Stopped::By(errno)) => ERRNO + errno.raw_os_error() as u64,
        };
        self.conclude(outcome);
        if outcome != WHOLE {
            self.discard_rest();
        }
    }

    /// Sets the outcome. Returns false if it was set before.
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
        match self.format {
            Format::Raw => self.fill_raw(self.offset),
            Format::Sparse => self.fill_sparse(),
        }
    }

    /// Reads the records of the stream, and writes the pages to their places.
    fn fill_sparse(&self) -> std::result::Result<(), Stopped> {
        let mut buffer = vec![0; CHUNK];
        let mut filled = 0;
        let mut writer = None;
        loop {
            if !self.wait() || self.is(DISCARD) {
                return Err(Stopped::Unwanted);
            }
            let last = self.is(LAST);
            let ended = match rustix::io::read(&self.pipe, &mut buffer[filled..]) {
                Ok(0) => true,
                Ok(read) => {
                    self.count(read);
                    filled += read;
                    false
                }
                Err(Errno::AGAIN) if last => true,
                Err(Errno::AGAIN | Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            if writer.is_none() {
                match PageWriter::begin(&self.file, &buffer[..filled], self.offset) {
                    Ok(Some(begun)) => writer = Some(begun),
                    Ok(None) if !ended => continue,
                    // Nothing is in the file yet.
                    Ok(None) | Err(Failure::Stream(_)) => {
                        self.numbers[STAYS_RAW].store(1, Ordering::Release);
                        self.file.write_all_at(&buffer[..filled], self.offset)?;
                        return if ended {
                            Ok(())
                        } else {
                            self.fill_raw(self.offset + filled as u64)
                        };
                    }
                    Err(Failure::File(error)) => return Err(error.into()),
                }
            }
            let Some(writer) = &mut writer else { continue };
            let used = writer.write(&self.file, &buffer[..filled])?;
            buffer.copy_within(used..filled, 0);
            filled -= used;
            if ended && filled > 0 {
                return Err(Stopped::Wrong);
            }
            if ended {
                return Ok(writer.finish(&self.file)?);
            }
        }
    }

    /// Moves the stream as it comes into the file, from this offset on.
    fn fill_raw(&self, mut offset: u64) -> std::result::Result<(), Stopped> {
        let Shared { pipe, file, .. } = self;
        // The kernel locks a pipe while it is spliced into a file, however long the file system
        // takes. Meanwhile no process can write to the pipe or empty it. So the thread splices into
        // the file from a pipe of its own, and QEMU's pipe is locked only while pages move to that
        // one.
        let (own_read, own_write) = pipe::open()?;
        let mut spliced = true;
        loop {
            if !self.wait() || self.is(DISCARD) {
                return Err(Stopped::Unwanted);
            }
            let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
            // This is read before the pipe, so that data that comes in between is not missed.
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
                    // This file system cannot take pages from a pipe.
                    Err(Errno::INVAL) if spliced => spliced = false,
                    Err(error) => return Err(error.into()),
                }
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
        self.numbers[BYTES].fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// Why the stream is not in the file.
enum Stopped {
    Unwanted,
    Wrong,
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
    use std::io::Write;

    /// Drains a stream that comes in pieces. Returns the outcome, the format and the file.
    fn drained(stream: &[u8], piece: usize) -> (Result<u64>, Format, Vec<u8>) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        let (read, write) = pipe::pipe().unwrap();
        rustix::io::ioctl_fionbio(&read, true).unwrap();
        let file = File::create(&path).unwrap();
        let drain = Drain::open(read, file, &path, 100, Format::Sparse).unwrap();
        drain.start().unwrap();
        let mut write = File::from(write);
        stream.chunks(piece).for_each(|piece| write.write_all(piece).unwrap());
        drop(write);
        let [done, _] = drain.ends();
        poll(&mut [PollFd::new(&done, PollFlags::IN)], None).unwrap();
        (drain.outcome().unwrap(), drain.format(), std::fs::read(&path).unwrap())
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
            assert_eq!(&entry[40..48], [2, 0, 0, 0, 0, 0, 0, 0]);
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
        for stream in
            [&b"QEVM\0\0\0\x03\x01an old machine"[..], b"short", b"", &early, &devices_first]
        {
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

    #[test]
    fn a_stream_whose_other_end_is_still_held_ends_where_the_pipe_is_empty_when_nothing_more_comes()
    {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        let (read, write) = pipe::pipe().unwrap();
        rustix::io::ioctl_fionbio(&read, true).unwrap();
        let file = File::create(&path).unwrap();
        let mut write = File::from(write);
        let drain = Drain::open(read, file, &path, 0, Format::Raw).unwrap();
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
