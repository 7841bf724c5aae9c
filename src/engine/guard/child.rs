//! The guard's side: the child of a process with threads, which makes system calls only.

use std::ffi::c_int;
use std::os::fd::{FromRawFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{SendFlags, send};

use super::errand::Errands;
use super::words::{Words, say};
use super::{DISMISSED, READY, Stage};
use crate::image::throw_away;
use crate::sys::{self, wait_ready};

/// Before QEMU has armed, its stream has a header and a list of memory blocks: less than this.
const BEFORE_ARMED: usize = 64 << 10;

/// What it does for its caller, made before it is needed.
#[derive(Debug)]
pub enum Script {
    /// It can only read the stream.
    Silence,
    /// It speaks to QEMU.
    Words(Words),
    /// It runs programs.
    Errands(Box<Errands>),
}

/// The guard's side. Descriptors are by number: the child has them all, until it keeps only these.
pub struct Child<'a> {
    pub lifeline: c_int,
    pub caller: c_int,
    pub monitor: c_int,
    pub pipe: c_int,
    /// The name by which the guest is held: nobody else begins an operation on it while the guard is at work.
    pub held: c_int,
    pub script: &'a Script,
}

impl Child<'_> {
    pub fn run(&self) -> ! {
        let kept = sys::keep_only([self.lifeline, self.caller, self.monitor, self.pipe, self.held]);
        let Some(kept) = kept else { sys::exit_now() };
        // SAFETY: they were just made, and are nobody else's in this process.
        let [lifeline, caller, monitor, pipe, _held] = kept.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
        let _ = send(&lifeline, &[READY], SendFlags::NOSIGNAL);
        let stage = Self::watch(&lifeline, &caller);
        let mut stream = Remaining { pipe, ended: !stage.is_migrating(), thrown_away: 0 };
        if stage == Stage::Racing {
            while !stream.ended && stream.thrown_away < BEFORE_ARMED && wait_ready([Some(&stream.pipe), None], -1) {
                stream.throw_away();
            }
        }
        if stage.is_paused() {
            self.resume(&monitor, &mut stream);
        }
        while !stream.ended && wait_ready([Some(&stream.pipe), None], -1) {
            stream.throw_away();
        }
        // A migration that was still setting up has stopped the guest once more.
        if stage.is_paused() && stage.is_migrating() {
            self.resume(&monitor, &mut stream);
        }
        match self.script {
            Script::Silence => {}
            Script::Words(words) => say(&monitor, &words.restore, &mut stream),
            Script::Errands(errands) => errands.undo(stage.is_switched(), &mut stream),
        }
        sys::exit_now()
    }

    fn resume(&self, monitor: &OwnedFd, stream: &mut Remaining) {
        match self.script {
            Script::Silence => {}
            Script::Words(words) => say(monitor, &words.resume, stream),
            Script::Errands(errands) => errands.resume(stream),
        }
    }

    /// Returns the stage in which the caller has ended, or handed over.
    fn watch(lifeline: &OwnedFd, caller: &OwnedFd) -> Stage {
        let mut stage = Stage::Prepared;
        loop {
            wait_ready([Some(lifeline), Some(caller)], -1);
            // What it has said last is read first.
            while wait_ready([Some(lifeline), None], 0) {
                let mut byte = [0];
                match rustix::io::read(lifeline, &mut byte) {
                    Ok(1) if byte[0] == DISMISSED => sys::exit_now(),
                    Ok(1) => stage = Stage::from_byte(byte[0]).unwrap_or(stage),
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
pub struct Remaining {
    pub pipe: OwnedFd,
    pub ended: bool,
    thrown_away: usize,
}

impl Remaining {
    pub fn throw_away(&mut self) {
        match throw_away(&self.pipe) {
            Ok(0) => self.ended = true,
            Ok(bytes) => self.thrown_away += bytes,
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => self.ended = true,
        }
    }
}
