//! A process that outlives the caller's: should that be killed, its guest runs on.
//!
//! A caller that dies inside the pause would leave its guest paused. One that dies while memory drains would close the pipe,
//! and QEMU 7.2, whose background snapshot then fails, leaves the guest frozen. So a child of its own session holds the
//! pipe and the monitor's socket, and a lifeline on which it is told what has been done. When the lifeline breaks, it
//! resumes the guest, reads QEMU's stream to its end, and puts the migration settings back. What it does not do is merge
//! the overlays: the guest goes on with them.
//!
//! It is a fork, not a program, so that there is nothing to install, and nothing to forbid. Between fork and exit it makes
//! system calls only, on memory that was there before.

use std::ffi::c_int;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair};

use serde_json::{Value, json};

use crate::sys;

/// What has been done, or is about to be: noted before it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    /// The guest is being paused.
    Paused = b'P' as isize,
    /// A migration is being started, the guest being paused, or having been paused by its user.
    Migrating = b'M' as isize,
    /// The same, and the guest has been resumed, or is not ours to resume.
    Resumed = b'R' as isize,
    /// Everything.
    All = b'Q' as isize,
}

/// For the guard to come up.
const READY_MS: c_int = 10_000;

/// The guard of one snapshot. Dropping it ends it.
#[derive(Debug)]
pub struct Guard {
    lifeline: OwnedFd,
}

/// What the guard says to QEMU, made before it is needed.
#[derive(Debug)]
pub struct Script {
    resume: String,
    restore: String,
}

/// In QEMU's reply to the last command of a script, and nowhere else.
const MARK: &str = "instantsnap-guard-done";

impl Script {
    /// Commands, by name and arguments, that put everything but the guest's state back.
    pub fn new(restore: &[(&str, Value)]) -> Script {
        Script { resume: lines(&[("cont", json!({}))]), restore: lines(restore) }
    }
}

fn lines(commands: &[(&str, Value)]) -> String {
    let last = commands.len().saturating_sub(1);
    let line = |(n, (name, arguments)): (usize, &(&str, Value))| {
        let id = if n == last { MARK } else { "instantsnap-guard" };
        json!({ "execute": name, "arguments": arguments, "id": id }).to_string() + "\n"
    };
    commands.iter().enumerate().map(line).collect()
}

impl Guard {
    /// Starts it. Where no process can be started, there is none, and the caller must not be killed.
    pub fn start(monitor: BorrowedFd, pipe: BorrowedFd, script: &Script) -> Option<Guard> {
        // A socket, not a pipe: writing to one whose reader was killed need not raise SIGPIPE.
        let (theirs, ours) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).ok()?;
        let child =
            Child { lifeline: theirs.as_raw_fd(), monitor: monitor.as_raw_fd(), pipe: pipe.as_raw_fd(), script };
        // SAFETY: the child makes system calls only, on memory that exists already, and never returns.
        let ready =
            || unsafe { sys::fork_orphan(|| child.run()) }.is_ok() && sys::wait_ready(&ours, libc::POLLIN, READY_MS);
        // Until it has closed them it holds a copy of every descriptor of this process, locks and marks of other snapshots
        // among them.
        sys::while_forking(ready).then_some(Guard { lifeline: ours })
    }

    /// Notes what is about to be done.
    pub fn note(&self, done: Done) {
        // A guard that is gone cannot be told, and the snapshot is none the worse for it.
        let _ = send(&self.lifeline, &[done as u8], SendFlags::NOSIGNAL);
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.note(Done::All);
    }
}

/// The guard's side. Descriptors are by number: the child has them all, until it keeps only these.
struct Child<'a> {
    lifeline: c_int,
    monitor: c_int,
    pipe: c_int,
    script: &'a Script,
}

impl Child<'_> {
    fn run(&self) -> ! {
        let [lifeline, monitor, pipe] = match sys::keep_only([self.lifeline, self.monitor, self.pipe]) {
            // SAFETY: the three were just made, and are nobody else's in this process.
            Some(kept) => kept.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
            None => sys::exit_now(),
        };
        let _ = send(&lifeline, b"r", SendFlags::NOSIGNAL);
        let mut done = None;
        loop {
            let mut byte = [0];
            match rustix::io::read(&lifeline, &mut byte) {
                Ok(1) if byte[0] == Done::All as u8 => sys::exit_now(),
                Ok(1) => done = Some(byte[0]),
                Err(rustix::io::Errno::INTR) => {}
                Ok(_) | Err(_) => break,
            }
        }
        let is = |what: Done| done == Some(what as u8);
        if is(Done::Paused) || is(Done::Migrating) {
            self.say(&monitor, &self.script.resume);
        }
        if is(Done::Migrating) || is(Done::Resumed) {
            read_to_end(&pipe);
        }
        // A migration that was still setting up has stopped the guest once more.
        if is(Done::Migrating) {
            self.say(&monitor, &self.script.resume);
        }
        self.say(&monitor, &self.script.restore);
        sys::exit_now()
    }

    /// Says something to QEMU, and waits for the reply: what is still unread when the connection ends, QEMU forgets.
    fn say(&self, monitor: &OwnedFd, words: &str) {
        const PATIENCE_MS: c_int = 30_000;
        let mut left = words.as_bytes();
        while !left.is_empty() {
            match send(monitor, left, SendFlags::NOSIGNAL) {
                Ok(written) => left = &left[written..],
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {
                    if !sys::wait_ready(monitor, libc::POLLOUT, PATIENCE_MS) {
                        return;
                    }
                }
                Err(_) => return,
            }
        }
        // The mark can come in two pieces.
        let mark = MARK.as_bytes();
        let mut seen = 0;
        while sys::wait_ready(monitor, libc::POLLIN, PATIENCE_MS) {
            let mut buffer = [0; 4096];
            let got = match rustix::io::read(monitor, &mut buffer) {
                Ok(0) => return,
                Ok(got) => got,
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => continue,
                Err(_) => return,
            };
            for &byte in &buffer[..got] {
                seen = if byte == mark[seen] { seen + 1 } else { usize::from(byte == mark[0]) };
                if seen == mark.len() {
                    return;
                }
            }
        }
    }
}

fn read_to_end(pipe: &OwnedFd) {
    while sys::wait_ready(pipe, libc::POLLIN, -1) {
        match crate::image::throw_away(pipe) {
            Ok(0) => return,
            Ok(_) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            Err(_) => return,
        }
    }
}
