// SPDX-License-Identifier: LGPL-2.1-or-later

//! What the watchdog's process does. The process is the program, or a fork of the caller. The
//! caller may have threads, so its fork makes system calls only.

use std::ffi::{CString, c_int};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{SendFlags, send};

use super::description::{Description, Means};
use super::descriptors::Common;
use super::files::{self, Discard};
use super::journal::DurableJournal;
use super::pause_limit::{PauseLimit, Tried};
use super::qmp_script::{QmpScript, execute};
use super::recovery_command::RecoveryCommands;
use super::remaining::Remaining;
use super::stage::{DISMISSED, NOT_RESUMED, READY, RESUMED, RESUMING, Stage, UNDOING};
use crate::image::Drain;
use crate::procfs::Stat;
use crate::sys::{self, wait_ready};

/// Before QEMU has armed write tracking, its stream has only a header and a list of memory blocks.
/// They are shorter than this.
const BEFORE_ARMED: u64 = 64 << 10;

/// The means by which the watchdog undoes a snapshot. They are made in advance, because a fork must
/// not allocate memory.
#[derive(Debug)]
pub enum Recovery {
    /// The watchdog can only read the stream.
    None,
    /// It sends QMP commands to QEMU.
    Qmp(QmpScript),
    /// It runs programs.
    Commands(Box<RecoveryCommands>),
}

/// If nothing comes from the stream for this time, the watchdog asks QEMU whether more will come.
const QUIET_MS: c_int = 1000;

/// What the watchdog's process needs, made in advance.
#[derive(Debug)]
pub struct Child {
    reserved: Option<Discard>,
    /// The durable journal. If something is left to do, it stays, for a recovery.
    journal: Option<DurableJournal>,
    /// Disks are left to a storage hook.
    has_manual: bool,
    /// The guest ran before the snapshot.
    running: bool,
    /// The file that exists once the snapshot is recorded; `None` if the watchdog cannot check
    /// that.
    record: Option<CString>,
    recovery: Recovery,
    /// How long the guest may be paused; `None` if that is not limited.
    pause_limit: Option<Duration>,
}

impl Child {
    /// Makes the watchdog's side from its description.
    pub fn new(description: Description) -> Child {
        let Description { means, files, reserved, journal, record, pause_limit, .. } = description;
        let Description { has_manual, running, .. } = description;
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
            journal: journal.as_ref().and_then(DurableJournal::new),
            has_manual,
            running,
            record: record.and_then(|record| files::path(&record.0)),
            recovery,
            pause_limit,
        }
    }

    /// Waits until the caller ends or dismisses the watchdog. If the caller ends, undoes the
    /// snapshot, unless it is complete. `drain` moves the stream in this process, if this is the
    /// program.
    pub fn run(&self, own: Common, drain: Option<Drain>) -> ! {
        let _ = send(&own.lifeline, &[READY], SendFlags::NOSIGNAL);
        // Before the first report, the snapshot is another watchdog's: this one changes nothing,
        // and leaves the locks, which it shares with that one.
        let Some(stage) = self.watch(&own, drain.as_ref()) else { sys::exit_now() };
        let Common { monitor, pipe, reservation, held, .. } = own;
        // A snapshot that is recorded is complete. But it may not be the current one yet: a
        // recovery goes on by the journal.
        let recorded = self.record.as_deref().is_none_or(sys::exists);
        let mut done = false;
        if stage != Stage::Committing || !recorded {
            let taken = drain.as_ref().map_or(0, Drain::bytes);
            // This ends the thread that writes the stream to the image: from here on it is
            // discarded.
            drop(drain);
            let rest = Remaining::new(pipe, !stage.is_migrating(), taken);
            done = self.undo(stage, &monitor, rest);
        }
        if done {
            // The hook is called right after the switch, which is no stage of its own for a guest
            // that was paused before.
            let may_be_stored = self.has_manual && (stage.is_switched() || !self.running);
            self.journal.iter().for_each(|journal| journal.end(may_be_stored));
        }
        // The file is removed before the name is released: the next snapshot of this name makes a
        // file of its own.
        self.reserved.iter().for_each(Discard::run);
        sys::let_go(&reservation);
        // Processes that the caller has forked can have copies of these, so closing is not enough.
        sys::let_go(&monitor);
        held.iter().for_each(sys::let_go);
        sys::exit_now()
    }

    /// Undoes the snapshot. It resumes the guest first. Returns whether nothing is left to undo.
    fn undo(&self, stage: Stage, monitor: &OwnedFd, mut stream: Remaining) -> bool {
        let is_armed = |stream: &Remaining| stream.taken >= BEFORE_ARMED;
        if stage == Stage::Racing {
            self.read_until(&mut stream, monitor, is_armed);
        }
        if stage.is_paused() {
            // In the stage Migrating, QEMU may not have armed write tracking yet. That does no
            // harm. What the guest writes to its memory goes into an image that is removed. If QEMU
            // finds the guest running, QEMU stops, captures and starts it by itself. And no other
            // client can have begun to save or migrate the guest while the snapshot's own migration
            // is under way.
            self.resume(monitor, &mut stream);
        }
        if stage == Stage::Migrating {
            // A migration that was given up during its setup has stopped the guest once more.
            self.read_until(&mut stream, monitor, is_armed);
            self.resume(monitor, &mut stream);
        }
        self.read_until(&mut stream, monitor, |_| false);
        // A migration that is no background snapshot stops the guest at its end, which can be
        // minutes away. If the guest is paused for any other reason by then, another client has
        // paused it, and it stays paused.
        if stage.is_paused()
            && stage.is_migrating()
            && self.is_stopped_by_migration(monitor, &mut stream)
        {
            self.resume(monitor, &mut stream);
        }
        self.wait_other_migration(&mut stream, monitor);
        let journal = self.journal.as_ref();
        let undoing = || journal.is_some_and(DurableJournal::undoing);
        match &self.recovery {
            Recovery::None => false,
            Recovery::Qmp(script) => script.undo(monitor, stage, journal, undoing(), &mut stream),
            Recovery::Commands(commands) => commands.undo(stage, undoing(), &mut stream),
        }
    }

    /// Reads and discards the stream until `enough`, or to its end. A process that the caller has
    /// forked can have a copy of QEMU's end of the pipe. Then the pipe does not end, so the
    /// watchdog asks QEMU whether the migration has ended.
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
            // All that QEMU wrote before this reply is in the pipe, and is not needed.
            stream.ended |= self.is_migrating(monitor, stream) == Some(false);
        }
    }

    /// Waits for the end of another client's migration, which can have begun in the pause. QEMU
    /// changes no capability while a migration is under way, and the migration lock must not be
    /// lifted while the snapshot's capability is on.
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
        let resumed = match &self.recovery {
            Recovery::None => false,
            Recovery::Qmp(script) => {
                execute(monitor, &script.resume, stream).is_some_and(|reply| reply.done)
            }
            Recovery::Commands(commands) => commands.resume(stream),
        };
        if resumed {
            self.journal.iter().for_each(DurableJournal::resumed);
        }
    }

    /// Watches the caller. Returns the stage in which the caller has ended, or has left the rest to
    /// the watchdog; `None` if the caller has not reported a stage.
    fn watch(&self, own: &Common, drain: Option<&Drain>) -> Option<Stage> {
        let Common { lifeline, caller, .. } = own;
        let mut reported = None;
        // If the caller moves the stream itself, there is no limit: the guest of a stopped caller
        // would freeze soon after it was resumed.
        let mut limit = PauseLimit::new(self.pause_limit.filter(|_| drain.is_some()));
        loop {
            wait_ready([Some(lifeline), Some(caller)], limit.wait());
            // First read all that the caller has sent.
            while wait_ready([Some(lifeline)], 0) {
                let mut byte = [0];
                match rustix::io::read(lifeline, &mut byte) {
                    Ok(1) if byte[0] == DISMISSED => sys::exit_now(),
                    Ok(1) if byte[0] == UNDOING => limit.leave_to_caller(),
                    Ok(1) if byte[0] == RESUMED => limit.end_pause(),
                    Ok(1) => {
                        let before = reported.unwrap_or_default();
                        reported = Stage::from_byte(byte[0]).or(reported);
                        limit.report(before, reported.unwrap_or_default());
                    }
                    Err(Errno::INTR) => {}
                    Ok(_) | Err(_) => return reported,
                }
            }
            if wait_ready([Some(caller)], 0) {
                return reported;
            }
            if limit.has_passed() {
                let tried = match limit.is_left_to_caller() && !is_stopped(caller) {
                    true => Tried::LeftToCaller,
                    false => self.resume_in_time(reported.unwrap_or_default(), &limit, own, drain),
                };
                limit.tried(tried);
            }
        }
    }

    /// Tries to resume the guest of a stopped caller, unless QEMU would overlook that now.
    fn resume_in_time(
        &self,
        stage: Stage,
        limit: &PauseLimit,
        own: &Common,
        drain: Option<&Drain>,
    ) -> Tried {
        // A stream that has ended cannot be armed any more: QEMU's migration has failed, for
        // example.
        let is_armed =
            drain.is_some_and(|drain| drain.bytes() >= BEFORE_ARMED || drain.outcome().is_some());
        match stage {
            // See `Stage::Racing`.
            Stage::Racing if !is_armed => Tried::TooEarly,
            Stage::Migrating if !is_armed && limit.has_resumed() => Tried::TooEarly,
            _ => self.resume_late(stage, is_armed, own),
        }
    }

    /// Tries to resume the guest of a stopped caller.
    fn resume_late(&self, stage: Stage, is_armed: bool, own: &Common) -> Tried {
        // This is sent first, so that a caller that finds its guest running can report why.
        let report = |what| {
            let _ = send(&own.lifeline, &[what], SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
        };
        report(RESUMING);
        let resumed = match &self.recovery {
            Recovery::None => false,
            Recovery::Qmp(script) => script.resume_late(&own.monitor),
            Recovery::Commands(commands) => commands.resume_late([&own.lifeline, &own.caller]),
        };
        if !resumed {
            report(NOT_RESUMED);
            return Tried::Failed;
        }
        match stage == Stage::Migrating && !is_armed {
            true => Tried::UntilArmed,
            // On QEMU's socket, the caller's `stop` comes before this `cont`. But a daemon may
            // carry out the caller's suspend later than virsh's resume, unless it has answered the
            // caller already.
            false => match (&self.recovery, stage) {
                (Recovery::Commands(_), Stage::Paused | Stage::Racing) => Tried::ResumedForNow,
                _ => Tried::Resumed,
            },
        }
    }
}

/// Whether a process is stopped, by a signal or a debugger. False if that is not known. This is for
/// the program only, because it allocates memory.
fn is_stopped(process: &OwnedFd) -> bool {
    let state = || {
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", process.as_raw_fd()));
        let pid: u32 =
            info.ok()?.lines().find_map(|line| line.strip_prefix("Pid:"))?.trim().parse().ok()?;
        Stat::read(pid).map(|stat| stat.state)
    };
    matches!(state(), Some('T' | 't'))
}
