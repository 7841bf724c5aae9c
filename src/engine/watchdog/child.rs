// SPDX-License-Identifier: LGPL-2.1-or-later

//! The watchdog's side: the program, or the child of a process with threads, which makes system
//! calls only.

use std::ffi::{CString, c_int};
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{SendFlags, send};

use super::description::{Description, Means};
use super::descriptors::Common;
use super::files::{self, Discard};
use super::pause_limit::{PauseLimit, Tried};
use super::qmp_script::{QmpScript, execute};
use super::recovery_command::RecoveryCommands;
use super::remaining::Remaining;
use super::stage::{DISMISSED, READY, RESUMING, Stage, UNDOING};
use crate::image::Drain;
use crate::sys::{self, wait_ready};

/// Before QEMU has armed, its stream has a header and a list of memory blocks: less than this.
const BEFORE_ARMED: u64 = 64 << 10;

/// How the watchdog acts for its caller, made before it is needed.
#[derive(Debug)]
pub enum Recovery {
    /// The watchdog can only read the stream.
    None,
    /// It sends QMP commands to QEMU.
    Qmp(QmpScript),
    /// It runs programs.
    Commands(Box<RecoveryCommands>),
}

/// For so long nothing comes of the stream before QEMU is asked whether anything more does.
const QUIET_MS: c_int = 1000;

/// The watchdog's side, made before it is needed.
#[derive(Debug)]
pub struct Child {
    reserved: Option<Discard>,
    /// The file that there is once the snapshot is recorded, where that is known.
    record: Option<CString>,
    recovery: Recovery,
    /// For how long the guest may be paused, where that is limited.
    pause_limit: Option<Duration>,
}

impl Child {
    /// Of a description.
    pub fn new(description: Description) -> Child {
        let Description { means, files, reserved, record, pause_limit, .. } = description;
        let recovery = match means {
            Means::None => Recovery::None,
            Means::Monitor { restore, overlays } => {
                Recovery::Qmp(QmpScript::new(&restore, &overlays, &files))
            }
            Means::Commands(commands) => {
                Recovery::Commands(Box::new(RecoveryCommands::new(*commands, &files)))
            }
        };
        Child {
            reserved: reserved.as_ref().and_then(Discard::new),
            record: record.and_then(|record| files::path(&record.0)),
            recovery,
            pause_limit,
        }
    }

    /// Waits until the caller ends, or dismisses it. `drain` is what moves the stream in this
    /// process.
    pub fn run(&self, own: Common, drain: Option<Drain>) -> ! {
        let _ = send(&own.lifeline, &[READY], SendFlags::NOSIGNAL);
        let stage = self.watch(&own, drain.as_ref());
        let Common { monitor, pipe, reservation, held, .. } = own;
        // A snapshot that is recorded is complete.
        let recorded = self.record.as_deref().is_none_or(sys::exists);
        if stage != Stage::Committing || !recorded {
            let taken = drain.as_ref().map_or(0, Drain::bytes);
            // Nothing of the stream is wanted any more.
            drop(drain);
            self.undo(stage, &monitor, Remaining::new(pipe, !stage.is_migrating(), taken));
        }
        // The file goes before the name: the next snapshot of this name makes a file of its own.
        self.reserved.iter().for_each(Discard::run);
        sys::let_go(&reservation);
        // Processes that the caller has forked can have them too.
        sys::let_go(&monitor);
        held.iter().for_each(sys::let_go);
        sys::exit_now()
    }

    /// Undoes the snapshot, the guest first.
    fn undo(&self, stage: Stage, monitor: &OwnedFd, mut stream: Remaining) {
        let is_armed = |stream: &Remaining| stream.taken >= BEFORE_ARMED;
        if stage == Stage::Racing {
            self.read_until(&mut stream, monitor, is_armed);
        }
        if stage.is_paused() {
            // In the stage Migrating QEMU may not have armed yet. What the guest then writes to its
            // memory is in an image that is thrown away; a guest that QEMU finds running it stops,
            // captures and starts by itself. No other client can have begun to save or migrate it,
            // as long as the snapshot's own migration is under way.
            self.resume(monitor, &mut stream);
        }
        if stage == Stage::Migrating {
            // A migration that was given up while it set up has stopped the guest once more.
            self.read_until(&mut stream, monitor, is_armed);
            self.resume(monitor, &mut stream);
        }
        self.read_until(&mut stream, monitor, |_| false);
        // One that is no background snapshot stops it at its end. It can take minutes until then: a
        // guest that stands for any other reason was paused by another client, and stays so.
        if stage.is_paused()
            && stage.is_migrating()
            && self.is_stopped_by_migration(monitor, &mut stream)
        {
            self.resume(monitor, &mut stream);
        }
        self.wait_other_migration(&mut stream, monitor);
        match &self.recovery {
            Recovery::None => {}
            Recovery::Qmp(script) => script.undo(monitor, stage, &mut stream),
            Recovery::Commands(commands) => commands.undo(stage, &mut stream),
        }
    }

    /// Throws the stream away until `enough`, or to its end. A process that the caller has forked
    /// can have QEMU's end of the pipe too, so that it does not end: then QEMU knows.
    fn read_until(
        &self,
        stream: &mut Remaining,
        monitor: &OwnedFd,
        enough: impl Fn(&Remaining) -> bool,
    ) {
        while !stream.ended && !enough(stream) {
            if wait_ready([Some(&stream.pipe), None], QUIET_MS) {
                stream.discard();
                continue;
            }
            // What QEMU had written until it said so is in the pipe, and not wanted.
            stream.ended |= self.is_migrating(monitor, stream) == Some(false);
        }
    }

    /// Another client's migration can have begun in the pause. QEMU puts no capability back while
    /// it is under way, and the lock must not be lifted while ours is on.
    fn wait_other_migration(&self, stream: &mut Remaining, monitor: &OwnedFd) {
        while self.is_migrating(monitor, stream) == Some(true) {
            wait_ready([None, None], QUIET_MS);
        }
    }

    fn is_migrating(&self, monitor: &OwnedFd, stream: &mut Remaining) -> Option<bool> {
        match &self.recovery {
            Recovery::None => None,
            Recovery::Qmp(script) => script.is_migrating(monitor, stream),
            Recovery::Commands(commands) => commands.is_migrating(stream),
        }
    }

    fn is_stopped_by_migration(&self, monitor: &OwnedFd, stream: &mut Remaining) -> bool {
        match &self.recovery {
            Recovery::None => false,
            Recovery::Qmp(script) => script.is_stopped_by_migration(monitor, stream),
            Recovery::Commands(commands) => commands.is_stopped_by_migration(stream),
        }
    }

    fn resume(&self, monitor: &OwnedFd, stream: &mut Remaining) {
        match &self.recovery {
            Recovery::None => {}
            Recovery::Qmp(script) => drop(execute(monitor, &script.resume, stream)),
            Recovery::Commands(commands) => commands.resume(stream),
        }
    }

    /// Returns the stage in which the caller has ended, or handed over.
    fn watch(&self, own: &Common, drain: Option<&Drain>) -> Stage {
        let Common { lifeline, caller, .. } = own;
        let mut stage = Stage::Prepared;
        // Where the caller moves the stream itself, a guest that runs would freeze all the same.
        let mut limit = PauseLimit::new(self.pause_limit.filter(|_| drain.is_some()));
        loop {
            wait_ready([Some(lifeline), Some(caller)], limit.wait());
            // What it has said last is read first.
            while wait_ready([Some(lifeline), None], 0) {
                let mut byte = [0];
                match rustix::io::read(lifeline, &mut byte) {
                    Ok(1) if byte[0] == DISMISSED => sys::exit_now(),
                    Ok(1) if byte[0] == UNDOING => limit.leave_to_caller(),
                    Ok(1) => {
                        let before = stage;
                        stage = Stage::from_byte(byte[0]).unwrap_or(stage);
                        limit.report(before, stage);
                    }
                    Err(Errno::INTR) => {}
                    Ok(_) | Err(_) => return stage,
                }
            }
            if wait_ready([Some(caller), None], 0) {
                return stage;
            }
            if limit.has_passed() {
                let is_armed = drain.is_some_and(|drain| drain.bytes() >= BEFORE_ARMED);
                let too_early = match stage {
                    // QEMU would overlook it: see `undo`.
                    Stage::Racing => !is_armed,
                    Stage::Migrating => !is_armed && limit.has_resumed(),
                    _ => false,
                };
                limit.tried(match too_early {
                    true => Tried::TooEarly,
                    false => self.resume_late(stage, is_armed, own),
                });
            }
        }
    }

    /// Resumes the guest of a caller that is stopped.
    fn resume_late(&self, stage: Stage, is_armed: bool, own: &Common) -> Tried {
        // First: a caller that finds its guest running can then say why.
        let _ = send(&own.lifeline, &[RESUMING], SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
        let resumed = match &self.recovery {
            Recovery::None => false,
            Recovery::Qmp(script) => script.resume_late(&own.monitor),
            Recovery::Commands(commands) => commands.resume_late(&own.lifeline),
        };
        if !resumed {
            return Tried::Failed;
        }
        match stage == Stage::Migrating && !is_armed {
            true => Tried::UntilArmed,
            false => Tried::Resumed,
        }
    }
}
