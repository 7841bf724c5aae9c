//! A process that outlives the caller's: should that be killed, its guest runs on.
//!
//! A caller that dies inside the pause would leave its guest paused. One that dies while memory drains would close the pipe,
//! and QEMU 7.2, whose background snapshot then fails, leaves the guest frozen. So a child of its own session holds the
//! pipe and the monitor's socket, and a lifeline on which it is told how far the snapshot has come. When the caller ends, it
//! resumes the guest, reads QEMU's stream to its end, and puts the migration settings back. What it does not do is merge
//! the overlays: the guest goes on with them.
//!
//! It is a fork, not a program, so that there is nothing to install, and nothing to forbid. Between fork and exit it makes
//! system calls only, on memory that was there before.

use std::ffi::c_int;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair};
use rustix::process::{PidfdFlags, getpid, pidfd_open};
use serde_json::{Value, json};

use crate::image::throw_away;
use crate::sys::{self, wait_ready};

/// How far a snapshot has come, as far as its guest is concerned. Entered before what it stands for is tried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Stage {
    /// Nothing has happened to the guest.
    #[default]
    Prepared = b'-',
    /// The guest, which ran, is paused.
    Paused = b'P',
    /// The same, and a migration has begun.
    Migrating = b'M',
    /// A migration has begun, and the guest runs again, or was paused by its user and stays so.
    Draining = b'D',
}

impl Stage {
    /// The guest is ours to resume.
    pub fn is_paused(self) -> bool {
        matches!(self, Stage::Paused | Stage::Migrating)
    }

    /// QEMU's stream must be read to its end.
    pub fn is_migrating(self) -> bool {
        matches!(self, Stage::Migrating | Stage::Draining)
    }
}

/// All is well: the guard is not needed any more.
const DISMISSED: u8 = b'Q';
/// The guard has its own descriptors only.
const READY: u8 = b'r';
/// For it to get there.
const READY_MS: c_int = 10_000;

/// The stage of a snapshot, and who takes over should this process end in it.
#[derive(Debug, Default)]
pub struct Guarded {
    stage: Stage,
    guard: Option<Guard>,
}

impl Guarded {
    /// Starts the guard. Where no process can be started there is none, and the caller must not be killed.
    pub fn start(&mut self, monitor: BorrowedFd, pipe: BorrowedFd, script: &Script) {
        self.guard = Guard::start(monitor, pipe, script);
    }

    /// The stage.
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// Enters a stage.
    pub fn enter(&mut self, stage: Stage) {
        self.stage = stage;
        if let Some(guard) = &self.guard {
            guard.tell(stage as u8);
        }
    }

    /// Leaves the rest to the guard, as if this process had ended. False where there is none.
    pub fn hand_over(&mut self) -> bool {
        self.guard.take().map(Guard::hand_over).is_some()
    }
}

/// The guard of one snapshot. Dropping it dismisses it, unless that is for a panic.
#[derive(Debug)]
struct Guard {
    lifeline: Option<OwnedFd>,
    pid: libc::pid_t,
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
    fn start(monitor: BorrowedFd, pipe: BorrowedFd, script: &Script) -> Option<Guard> {
        // A socket, not a pipe: writing to one whose reader was killed need not raise SIGPIPE.
        let (theirs, ours) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).ok()?;
        // The lifeline alone would not do: a child that the caller forks has it too.
        let caller = pidfd_open(getpid(), PidfdFlags::empty()).ok()?;
        let child = Child {
            lifeline: theirs.as_raw_fd(),
            caller: caller.as_raw_fd(),
            monitor: monitor.as_raw_fd(),
            pipe: pipe.as_raw_fd(),
            script,
        };
        // Until it has closed them it holds a copy of every descriptor of this process, locks and marks of other snapshots
        // among them.
        let pid = sys::while_forking(|| {
            // SAFETY: the child makes system calls only, on memory that exists already, and never returns.
            let pid = unsafe { sys::fork_quiet(|| child.run()) }.ok()?;
            drop(theirs);
            wait_ready([Some(&ours), None], READY_MS);
            Some(pid)
        })?;
        let guard = Guard { lifeline: Some(ours), pid };
        let mut byte = [0];
        match guard.lifeline.as_ref().map(|ours| rustix::io::read(ours, &mut byte)) {
            Some(Ok(1)) if byte[0] == READY => Some(guard),
            _ => None,
        }
    }

    fn tell(&self, what: u8) {
        if let Some(lifeline) = &self.lifeline {
            // A guard that is gone cannot be told, and the snapshot is none the worse for it.
            let _ = send(lifeline, &[what], SendFlags::NOSIGNAL);
        }
    }

    fn hand_over(mut self) {
        self.lifeline = None;
        let pid = self.pid;
        // It takes its time; somebody has to take note of its end.
        let _ = sys::spawn_quiet("instantsnap", move || sys::reap(pid));
        std::mem::forget(self);
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.tell(DISMISSED);
            self.lifeline = None;
            sys::reap(self.pid);
        }
    }
}

/// The guard's side. Descriptors are by number: the child has them all, until it keeps only these.
struct Child<'a> {
    lifeline: c_int,
    caller: c_int,
    monitor: c_int,
    pipe: c_int,
    script: &'a Script,
}

impl Child<'_> {
    fn run(&self) -> ! {
        let Some(kept) = sys::keep_only([self.lifeline, self.caller, self.monitor, self.pipe]) else { sys::exit_now() };
        // SAFETY: the four were just made, and are nobody else's in this process.
        let [lifeline, caller, monitor, pipe] = kept.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
        let _ = send(&lifeline, &[READY], SendFlags::NOSIGNAL);
        let stage = Self::watch(&lifeline, &caller);
        let is = |other: Stage| stage == other as u8;
        let mut stream = Remaining { pipe, ended: !(is(Stage::Migrating) || is(Stage::Draining)) };
        if is(Stage::Paused) || is(Stage::Migrating) {
            say(&monitor, &self.script.resume, &mut stream);
        }
        while !stream.ended && wait_ready([Some(&stream.pipe), None], -1) {
            stream.throw_away();
        }
        // A migration that was still setting up has stopped the guest once more.
        if is(Stage::Migrating) {
            say(&monitor, &self.script.resume, &mut stream);
        }
        say(&monitor, &self.script.restore, &mut stream);
        sys::exit_now()
    }

    /// Returns the stage in which the caller has ended, or handed over.
    fn watch(lifeline: &OwnedFd, caller: &OwnedFd) -> u8 {
        let mut stage = Stage::Prepared as u8;
        loop {
            wait_ready([Some(lifeline), Some(caller)], -1);
            // What it has said last is read first.
            while wait_ready([Some(lifeline), None], 0) {
                let mut byte = [0];
                match rustix::io::read(lifeline, &mut byte) {
                    Ok(1) if byte[0] == DISMISSED => sys::exit_now(),
                    Ok(1) => stage = byte[0],
                    Err(Errno::INTR) => {}
                    Ok(_) | Err(_) => return stage,
                }
            }
            if wait_ready([Some(caller), None], 0) {
                return stage;
            }
        }
    }
}

/// QEMU's stream, of which nothing is wanted.
struct Remaining {
    pipe: OwnedFd,
    ended: bool,
}

impl Remaining {
    fn throw_away(&mut self) {
        self.ended = !matches!(throw_away(&self.pipe), Ok(1..) | Err(Errno::AGAIN | Errno::INTR));
    }
}

/// Says something to QEMU, and waits for the reply, however long: what is still unread when the connection ends, QEMU
/// forgets. Meanwhile the stream is read, for which QEMU may be waiting in its turn.
fn say(monitor: &OwnedFd, words: &str, stream: &mut Remaining) {
    let mut left = words.as_bytes();
    while !left.is_empty() {
        match send(monitor, left, SendFlags::NOSIGNAL) {
            Ok(sent) => left = left.get(sent..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            // A reader that is that far behind; there is no hurry.
            Err(Errno::AGAIN) => {
                wait_ready([(!stream.ended).then_some(&stream.pipe), None], 10);
                stream.ended = stream.ended || {
                    stream.throw_away();
                    stream.ended
                };
            }
            Err(_) => return,
        }
    }
    let mark = MARK.as_bytes();
    // How much of the mark has been seen: it can come in two pieces.
    let mut seen = 0;
    loop {
        wait_ready([Some(monitor), (!stream.ended).then_some(&stream.pipe)], -1);
        if !stream.ended {
            stream.throw_away();
        }
        if !wait_ready([Some(monitor), None], 0) {
            continue;
        }
        let mut buffer = [0; 4096];
        let got = match rustix::io::read(monitor, &mut buffer) {
            Ok(0) => return,
            Ok(got) => got,
            Err(Errno::AGAIN | Errno::INTR) => continue,
            Err(_) => return,
        };
        for byte in buffer.iter().take(got) {
            let expected = mark.get(seen);
            seen = if expected == Some(byte) { seen + 1 } else { usize::from(mark.first() == Some(byte)) };
            if seen == mark.len() {
                return;
            }
        }
    }
}
