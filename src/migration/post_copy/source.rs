// SPDX-License-Identifier: LGPL-2.1-or-later

//! Serves a guest's pages from a memory image.
//!
//! A process that is killed in the middle must not make QEMU miss a page, or get one twice. So what
//! is sent goes through a pipe, which its spare process has too: pages are written to the pipe, and
//! moved from there to the socket. The numbers that both processes share say which pages were about
//! to be written, and how long their records are; the pipe, which is empty before, says whether all
//! of them were. A request is taken from the socket only after its pages were written.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use rustix::pipe::{SpliceFlags, fcntl_getpipe_size, splice};

use super::order::Order;
use super::protocol;
use super::return_path::{Message, ReturnPath};
use super::sent::Sent;
use crate::deadline::Deadline;
use crate::image::{PAGE, PageSource, open_pipe};
use crate::sys::SharedNumbers;

/// The numbers that the process that serves shares with its spare, and that others can read: first
/// the bytes of pages that are to be sent, then those that were sent.
pub type Numbers = SharedNumbers<11>;

const TOTAL: usize = 0;
const DONE: usize = 1;
/// [`GIVEN_UP`] or [`COMPLETE`] if nothing is left to do for a spare.
const OVER: usize = 2;
/// 1 if all else was sent, and the rest cannot be read from the image.
const UNREADABLE: usize = 3;
/// Whether pages are in the pipe, or about to be: one of the values below.
const STAGE: usize = 10;
/// The pages that are in the pipe, or about to be: the block, the first one, how many. 0 of them
/// stand for the end of the stream.
const BLOCK: usize = 4;
const FIRST: usize = 5;
const COUNT: usize = 6;
/// The block of the last request that was taken, plus 1.
const ASKED: usize = 7;
/// 1 if the end of the stream was sent.
const CLOSED: usize = 8;
/// The bytes that the pipe has when all of these pages are in it.
const LENGTH: usize = 9;

const GIVEN_UP: u64 = 1;
const COMPLETE: u64 = 2;

const EMPTY: u64 = 0;
const INTENDED: u64 = 1;
const STAGED: u64 = 2;

/// The pages that are sent together: a request that comes meanwhile waits for them.
const TOGETHER: u64 = 62;
/// The pages from a requested one on that are sent with it.
const AROUND: u64 = 8;
/// The pages that a limited bandwidth lets pass in this time are sent together.
const SLICE: Duration = Duration::from_millis(20);
/// How long QEMU may take to say which pages it has.
const RECEIVED_TIMEOUT: Duration = Duration::from_secs(60);
/// How often what fails for want of memory, or because of a disk, is tried, and the time between.
const ATTEMPTS: u32 = 20;
const BETWEEN: Duration = Duration::from_millis(100);
/// The time between later attempts.
const LATER: Duration = Duration::from_secs(1);

/// How the source begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// QEMU waits for a migration.
    Fresh,
    /// QEMU waits in a post-copy whose source was lost.
    Resumed,
}

/// Why a source stops serving.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// QEMU has loaded the devices, and the guest can run; or QEMU goes on.
    Loaded,
    /// All is in, and QEMU has ended the migration.
    Complete,
    /// QEMU has closed the connection.
    Lost,
    /// The process that was to be watched has ended.
    Watched,
}

/// How much of the memory is in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    pub bytes: u64,
    pub total: u64,
}

impl Progress {
    pub fn of(numbers: &Numbers) -> Progress {
        let number = |index: usize| numbers[index].load(Ordering::Relaxed);
        Progress { bytes: number(DONE).min(number(TOTAL)), total: number(TOTAL) }
    }
}

/// What another process sees of a source.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    pub progress: Progress,
    /// QEMU has said that all is in.
    pub is_complete: bool,
    /// All else was sent, and the rest cannot be read from the image.
    pub is_unreadable: bool,
}

impl Seen {
    /// The bytes at the beginning of the numbers' memory that are needed.
    pub const SIZE: usize = (UNREADABLE + 1) * size_of::<u64>();

    /// Reads those bytes.
    pub fn from_bytes(bytes: &[u8; Seen::SIZE]) -> Seen {
        let number = |index: usize| {
            let word = bytes[index * size_of::<u64>()..].first_chunk().copied();
            word.map(u64::from_ne_bytes).unwrap_or_default()
        };
        let total = number(TOTAL);
        Seen {
            progress: Progress { bytes: number(DONE).min(total), total },
            is_complete: number(OVER) == COMPLETE,
            is_unreadable: number(UNREADABLE) == 1,
        }
    }
}

/// Serves the pages of an image.
#[derive(Debug)]
pub struct Source {
    pages: PageSource,
    sent: Sent,
    numbers: Numbers,
    socket: OwnedFd,
    pipe: (OwnedFd, OwnedFd),
    /// The bytes that are in the pipe.
    staged: usize,
    /// What goes before the pages, and how much of it was sent.
    before: (Vec<u8>, usize),
    together: u64,
    /// Bytes in a second, for pages that nobody has asked for.
    bandwidth: Option<u64>,
    next_push: Instant,
    pushes: bool,
    order: Order,
    /// How often all that is left was tried, and whether this time something cannot be read.
    rounds: u32,
    has_skipped: bool,
    path: ReturnPath,
}

impl Source {
    /// A source that is connected to QEMU by this socket. `bandwidth`: the bytes in a second of
    /// pages that nobody has asked for; `first`: those of them that are sent first.
    pub fn new(
        pages: PageSource,
        socket: OwnedFd,
        numbers: Numbers,
        bandwidth: Option<u64>,
        first: impl IntoIterator<Item = (usize, u64)>,
    ) -> io::Result<Source> {
        fcntl_setfl(&socket, fcntl_getfl(&socket)? | OFlags::NONBLOCK)?;
        let pipe = open_pipe()?;
        // A record of one page can need two pages of the pipe.
        let room = (fcntl_getpipe_size(&pipe.1)? / PAGE).checked_sub(2);
        let together = room.ok_or(io::ErrorKind::OutOfMemory)?.max(1) as u64;
        let mut together = together.min(TOGETHER);
        if let Some(bandwidth) = bandwidth {
            let slice = bandwidth.saturating_mul(SLICE.as_millis() as u64) / 1000 / PAGE as u64;
            together = together.min(slice).max(1);
        }
        let sent = Sent::new(pages.blocks())?;
        let path = ReturnPath::new(pages.blocks());
        numbers[TOTAL].store(pages.count() * PAGE as u64, Ordering::Relaxed);
        Ok(Source {
            sent,
            numbers,
            socket,
            pipe,
            staged: 0,
            before: (Vec::new(), 0),
            together,
            bandwidth,
            next_push: Instant::now(),
            pushes: false,
            order: Order::new(first),
            rounds: 0,
            has_skipped: false,
            path,
            pages,
        })
    }

    /// Begins the stream, and serves requests until QEMU has loaded the devices or goes on.
    pub fn begin(&mut self, start: Start) -> Result<Outcome, String> {
        match start {
            Start::Fresh => {
                self.before = (protocol::opening(&self.pages), 0);
                self.serve(None)
            }
            Start::Resumed => {
                self.ask_received()?;
                self.before = (protocol::resumption(self.pages.head()), 0);
                self.serve(None)
            }
        }
    }

    /// Sends from now on also what nobody has asked for.
    pub fn push(&mut self) {
        self.pushes = true;
    }

    /// Goes on where another process, which has ended, has stopped.
    pub fn take_over(&mut self) -> io::Result<()> {
        let mut left = rustix::io::ioctl_fionread(&self.pipe.0)? as usize;
        if self.number(STAGE) == INTENDED && left > 0 {
            // It may have ended in the middle of a write. Nothing of that was sent.
            if left as u64 == self.number(LENGTH) {
                self.note_staged();
            } else {
                self.discard(left)?;
                left = 0;
            }
        }
        self.set(STAGE, if left > 0 { STAGED } else { EMPTY });
        self.staged = left;
        self.path.last = self.number(ASKED).checked_sub(1).map(|block| block as usize);
        self.order = Order::default();
        self.set(UNREADABLE, 0);
        self.pushes = true;
        self.count_sent();
        Ok(())
    }

    /// Whether nothing is left to do for a process that would take over.
    pub fn is_over(&self) -> bool {
        self.number(OVER) != 0
    }

    /// Notes that nothing is left to do: all is in, or this source has given up.
    pub fn set_over(&self, is_complete: bool) {
        self.set(OVER, if is_complete { COMPLETE } else { GIVEN_UP });
    }

    /// Serves until something happens. `watched`: a descriptor that becomes readable when the spare
    /// ends. The error is what is wrong with QEMU's messages or with the image.
    pub fn serve(&mut self, watched: Option<BorrowedFd>) -> Result<Outcome, String> {
        loop {
            match self.turn(watched) {
                Ok(None) => {}
                Ok(Some(outcome)) => return Ok(outcome),
                Err(Stop::Lost) => return Ok(Outcome::Lost),
                Err(Stop::Wrong(what)) => return Err(what),
            }
        }
    }

    fn turn(&mut self, watched: Option<BorrowedFd>) -> Result<Option<Outcome>, Stop> {
        if self.flush()? {
            let peeked = self.peek()?;
            if let Some((message, length)) = peeked {
                return self.answer(message, length);
            }
            if self.pushes && self.push_next()? {
                return Ok(None);
            }
        }
        self.wait(watched)
    }

    /// Sends what is to be sent. Returns whether all of it was.
    fn flush(&mut self) -> Result<bool, Stop> {
        while self.before.1 < self.before.0.len() {
            match send(&self.socket, &self.before.0[self.before.1..], SendFlags::NOSIGNAL) {
                Ok(sent) => self.before.1 += sent,
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(lost(errno)),
            }
        }
        while self.staged > 0 {
            let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
            match splice(&self.pipe.0, None, &self.socket, None, self.staged, flags) {
                Ok(0) => return Err(Stop::Lost),
                Ok(moved) => self.staged = self.staged.saturating_sub(moved),
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(lost(errno)),
            }
        }
        self.set(STAGE, EMPTY);
        Ok(true)
    }

    /// The next message and its length, which stays in the socket.
    fn peek(&mut self) -> Result<Option<(Message, usize)>, Stop> {
        let mut buffer = [0; 1024];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let bytes = match recv(&self.socket, &mut buffer[..], flags) {
            Ok((_, 0)) => return Err(Stop::Lost),
            Ok((read, _)) => &buffer[..read],
            Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
            Err(errno) => return Err(lost(errno)),
        };
        let message = self.path.next(bytes).map_err(Stop::Wrong)?;
        if message.is_none() {
            // The rest of it is on its way; the socket is readable until then.
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(message)
    }

    /// Takes a message from the socket.
    fn take(&mut self, mut length: usize) -> Result<(), Stop> {
        self.set(ASKED, self.path.last.map_or(0, |block| block as u64 + 1));
        let mut buffer = [0; 1024];
        while length > 0 {
            match recv(&self.socket, &mut buffer[..length], RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return Err(Stop::Lost),
                Ok((read, _)) => length -= read,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(lost(errno)),
            }
        }
        Ok(())
    }

    fn answer(&mut self, message: Message, length: usize) -> Result<Option<Outcome>, Stop> {
        let outcome = match message {
            Message::Pages(block, range) => {
                // After the end QEMU needs no page any more.
                let is_missing = |page: &u64| !self.sent.has(block, *page);
                let missing = range.clone().find(is_missing).filter(|_| self.number(CLOSED) == 0);
                if let Some(first) = missing {
                    let most = self.together.min(AROUND.max(range.end - first));
                    let run = self.sent.run(block, self.pages.in_file(block), first, most);
                    let sent_to = self.stage_asked(block, run)?;
                    if sent_to < range.end {
                        return Ok(None);
                    }
                }
                None
            }
            Message::Pong(protocol::DEVICES_LOADED) | Message::Resumed => Some(Outcome::Loaded),
            Message::Pong(_) => None,
            Message::Shut { failed: false } if self.number(CLOSED) == 1 => Some(Outcome::Complete),
            Message::Shut { .. } => {
                return Err(Stop::Wrong("QEMU has given the migration up".into()));
            }
            Message::Received(_) => {
                return Err(Stop::Wrong("QEMU says which pages it has, unasked".into()));
            }
        };
        self.take(length)?;
        Ok(outcome)
    }

    /// Sends the next pages that nobody has asked for, or the end. Returns whether there was
    /// something to send.
    fn push_next(&mut self) -> Result<bool, Stop> {
        if self.number(CLOSED) == 1 || self.next_push > Instant::now() {
            return Ok(false);
        }
        // Only pages that cannot be read are to be left.
        let most = if self.rounds == 0 { self.together } else { 1 };
        let Some((block, run)) = self.order.next(&self.pages, &self.sent, most) else {
            if std::mem::take(&mut self.has_skipped) {
                self.try_rest_later();
                return Ok(false);
            }
            let closing = protocol::closing(self.pages.head());
            self.write(0, 0..0, &closing)?;
            return Ok(true);
        };
        let Ok(records) = self.pages.records(block, run.clone()) else {
            self.has_skipped = true;
            return Ok(true);
        };
        if let Some(bandwidth) = self.bandwidth {
            let bytes = (run.end - run.start) * PAGE as u64;
            let time = Duration::from_secs_f64(bytes as f64 / bandwidth.max(1) as f64);
            self.next_push = self.next_push.max(Instant::now() - SLICE) + time;
        }
        self.stage(block, run, &records)?;
        Ok(true)
    }

    /// Prepares another round over what could not be read. The guest runs on unless it needs that.
    fn try_rest_later(&mut self) {
        self.rounds = self.rounds.saturating_add(1);
        self.order = Order::default();
        let is_lasting = self.rounds >= ATTEMPTS;
        if is_lasting {
            self.set(UNREADABLE, 1);
        }
        self.next_push = Instant::now() + if is_lasting { LATER } else { BETWEEN };
    }

    /// Sends pages that QEMU has asked for, or the first of them. Returns where they end.
    fn stage_asked(&mut self, block: usize, mut run: Range<u64>) -> Result<u64, Stop> {
        let mut attempts = 0;
        loop {
            match self.pages.records(block, run.clone()) {
                Ok(records) => {
                    let end = run.end;
                    return self.stage(block, run, &records).map(|()| end);
                }
                Err(error) if attempts == ATTEMPTS => {
                    return Err(Stop::Wrong(format!("the memory image cannot be read: {error}")));
                }
                Err(_) => {
                    run.end = run.start + 1;
                    attempts += 1;
                    std::thread::sleep(BETWEEN);
                }
            }
        }
    }

    fn stage(&mut self, block: usize, run: Range<u64>, records: &[u8]) -> Result<(), Stop> {
        let is_data = self.pages.in_file(block).has(run.start);
        let bytes = if is_data { (run.end - run.start) * PAGE as u64 } else { 0 };
        self.write(block, run, records)?;
        self.numbers[DONE].fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }

    /// Writes to the pipe, which is empty and has room for it.
    fn write(&mut self, block: usize, run: Range<u64>, records: &[u8]) -> Result<(), Stop> {
        self.set(BLOCK, block as u64);
        self.set(FIRST, run.start);
        self.set(COUNT, run.end - run.start);
        self.set(LENGTH, records.len() as u64);
        self.set(STAGE, INTENDED);
        for _ in 0..ATTEMPTS {
            let written = rustix::io::retry_on_intr(|| rustix::io::write(&self.pipe.1, records));
            if written == Ok(records.len()) {
                self.note_staged();
                self.set(STAGE, STAGED);
                self.staged = records.len();
                return Ok(());
            }
            // The kernel is short of memory.
            let discarded = self.discard(written.unwrap_or(0));
            discarded.map_err(|error| Stop::Wrong(error.to_string()))?;
            std::thread::sleep(BETWEEN);
        }
        Err(Stop::Wrong("a pipe has no room".into()))
    }

    /// Takes so many bytes from the pipe, which are not to be sent.
    fn discard(&self, mut bytes: usize) -> io::Result<()> {
        let mut buffer = [0; PAGE];
        while bytes > 0 {
            let most = bytes.min(PAGE);
            let read = || rustix::io::read(&self.pipe.0, &mut buffer[..most]);
            match rustix::io::retry_on_intr(read)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => bytes -= read,
            }
        }
        Ok(())
    }

    /// Notes what is in the pipe as sent.
    fn note_staged(&self) {
        let [block, first, count] = [BLOCK, FIRST, COUNT].map(|index| self.number(index));
        match count {
            0 => self.set(CLOSED, 1),
            count => self.sent.add(block as usize, first..first + count),
        }
    }

    fn count_sent(&self) {
        let blocks = 0..self.pages.blocks().len();
        let count = |block: usize| {
            let pages = self.pages.in_file(block).runs().flatten();
            pages.filter(|page| self.sent.has(block, *page)).count() as u64
        };
        self.set(DONE, blocks.map(count).sum::<u64>() * PAGE as u64);
    }

    fn wait(&mut self, watched: Option<BorrowedFd>) -> Result<Option<Outcome>, Stop> {
        let is_flushed = self.staged == 0 && self.before.1 == self.before.0.len();
        let readiness = if is_flushed { PollFlags::IN } else { PollFlags::OUT };
        let pause = self.next_push.saturating_duration_since(Instant::now());
        let waits = is_flushed && self.pushes && self.number(CLOSED) == 0;
        let timeout =
            Timespec { tv_sec: pause.as_secs() as i64, tv_nsec: i64::from(pause.subsec_nanos()) };
        let socket = self.socket.as_fd();
        let mut fds = [
            PollFd::from_borrowed_fd(socket, readiness),
            PollFd::from_borrowed_fd(watched.unwrap_or(socket), PollFlags::IN),
        ];
        let count = if watched.is_some() { 2 } else { 1 };
        match poll(&mut fds[..count], waits.then_some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(Stop::Wrong(errno.to_string())),
        }
        let has_ended = count == 2 && fds[1].revents().contains(PollFlags::IN);
        Ok(has_ended.then_some(Outcome::Watched))
    }

    /// Asks QEMU which pages it has.
    fn ask_received(&mut self) -> Result<(), String> {
        let deadline = Deadline::after(RECEIVED_TIMEOUT);
        let mut bytes = Vec::new();
        for block in 0..self.pages.blocks().len() {
            self.before = (protocol::ask_received(&self.pages.blocks()[block].name), 0);
            while !self.flush().map_err(Stop::into_text)? {
                self.wait_until(PollFlags::OUT, deadline)?;
            }
            let map = loop {
                // While it waits for its source, QEMU asks for no pages.
                if let Some((message, length)) = self.path.next(&bytes)? {
                    bytes.drain(..length);
                    if message == Message::Received(block) {
                        break self.read_bitmap(block, &mut bytes, deadline)?;
                    }
                    continue;
                }
                self.read_more(&mut bytes, deadline)?;
            };
            self.sent.add_map(block, &map);
        }
        self.count_sent();
        Ok(())
    }

    fn read_bitmap(
        &self,
        block: usize,
        bytes: &mut Vec<u8>,
        deadline: Deadline,
    ) -> Result<crate::image::PageMap, String> {
        loop {
            if let Some((map, length)) = self.path.bitmap(block, bytes)? {
                bytes.drain(..length);
                return Ok(map);
            }
            self.read_more(bytes, deadline)?;
        }
    }

    fn read_more(&self, bytes: &mut Vec<u8>, deadline: Deadline) -> Result<(), String> {
        let mut buffer = [0; 64 << 10];
        loop {
            self.wait_until(PollFlags::IN, deadline)?;
            match recv(&self.socket, &mut buffer[..], RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return Err(Stop::Lost.into_text()),
                Ok((read, _)) => {
                    bytes.extend_from_slice(&buffer[..read]);
                    return Ok(());
                }
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(errno) => return Err(errno.to_string()),
            }
        }
    }

    fn wait_until(&self, readiness: PollFlags, deadline: Deadline) -> Result<(), String> {
        let left = deadline.left().ok_or("QEMU does not say in time which pages it has")?;
        let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(&self.socket, readiness)], Some(&left)) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.to_string()),
        }
    }

    fn number(&self, index: usize) -> u64 {
        self.numbers[index].load(Ordering::Acquire)
    }

    fn set(&self, index: usize, value: u64) {
        self.numbers[index].store(value, Ordering::Release);
    }
}

enum Stop {
    Lost,
    Wrong(String),
}

impl Stop {
    fn into_text(self) -> String {
        match self {
            Stop::Lost => "QEMU has closed the connection".into(),
            Stop::Wrong(what) => what,
        }
    }
}

fn lost(errno: Errno) -> Stop {
    match errno {
        Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN => Stop::Lost,
        errno => Stop::Wrong(errno.to_string()),
    }
}
