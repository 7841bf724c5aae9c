// SPDX-License-Identifier: LGPL-2.1-or-later

//! A process that outlives the caller's: should that be killed, its guest runs on.
//!
//! A caller that dies inside the pause would leave its guest paused. One that dies while memory
//! drains would close the pipe, and QEMU 7.2, whose background snapshot then fails, leaves the
//! guest frozen. So a child of its own session holds the pipe and the monitor's socket, and a
//! lifeline on which it is told how far the snapshot has come. When the caller ends, it resumes the
//! guest, reads QEMU's stream to its end, and puts the migration settings back.
//!
//! It is a fork, not a program, so that there is nothing to install, and nothing to forbid. Between
//! fork and exit it makes system calls only, on memory that was there before. How it speaks to the
//! guest is the backend's affair ([`RecoveryChannel`]): by a QMP script on the monitor's socket, or
//! by recovery commands, which are programs that it runs. Either way it merges the overlays back,
//! unless they are a driver's, and removes what was made for the snapshot. What it cannot merge it
//! leaves, and says so in the machine's log.

mod child;
mod complaint;
mod files;
mod qmp_script;
mod recovery_command;
mod remaining;
mod reply;
mod stage;

use std::ffi::c_int;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::net::{
    AddressFamily, SendFlags, Shutdown, SocketFlags, SocketType, send, shutdown, socketpair,
};
use rustix::process::{PidfdFlags, getpid, pidfd_open};
use serde_json::Value;

use self::child::{Child, HELD, Recovery};
use self::files::Discard;
use self::qmp_script::QmpScript;
use self::recovery_command::RecoveryCommands;
pub use self::stage::Stage;
use self::stage::{DISMISSED, READY};
use crate::backend::RecoveryChannel;
use crate::model::Reservation;
use crate::own_file::KnownFile;
use crate::sys::{self, wait_ready};

/// For it to get there.
const READY_MS: c_int = 10_000;

/// What a watchdog is there for.
pub struct Task<'a> {
    /// What holds the guest for this operation.
    pub held: &'a [BorrowedFd<'a>],
    /// What holds the snapshot's name in a state directory.
    pub reservation: Option<&'a Reservation>,
    /// The file that there is once it is recorded, where that is known.
    pub record: Option<PathBuf>,
    /// QEMU's stream.
    pub pipe: BorrowedFd<'a>,
    /// QMP commands that put the settings back.
    pub restore: &'a [(&'a str, Value)],
    /// The snapshot's, to be removed.
    pub files: &'a [KnownFile],
}

/// Who takes over should this process end.
#[derive(Debug, Default)]
pub struct Watchdog {
    watchdog: Option<Started>,
}

impl Watchdog {
    /// Starts the watchdog. Where no process can be started there is none, and the caller must not
    /// be killed.
    pub fn start(&mut self, channel: RecoveryChannel, task: &Task) {
        let Task { restore, files, .. } = *task;
        let start = |monitor, recovery: &Recovery| Started::start(monitor, task, recovery);
        self.watchdog = match channel {
            RecoveryChannel::None => start(None, &Recovery::None),
            RecoveryChannel::Monitor(monitor, overlays) => {
                start(Some(monitor), &Recovery::Qmp(QmpScript::new(restore, &overlays, files)))
            }
            RecoveryChannel::Commands(make) => start(
                None,
                &Recovery::Commands(Box::new(RecoveryCommands::new(make(restore), files))),
            ),
        };
    }

    /// The watchdog's process, where there is one.
    pub fn process(&self) -> Option<u32> {
        self.watchdog.as_ref()?.process.as_ref().map(sys::Child::id)
    }

    /// Tells it the stage, which it takes for `Prepared` until then.
    pub fn report_stage(&self, stage: Stage) {
        if let Some(watchdog) = &self.watchdog {
            watchdog.send(stage as u8);
        }
    }

    /// The snapshot is complete, on disk and recorded: from here on nothing of it is undone,
    /// whatever becomes of this process.
    pub fn dismiss(&mut self) {
        self.watchdog = None;
    }

    /// Leaves the rest to the watchdog, as if this process had ended. False where there is none.
    pub fn hand_over(&mut self) -> bool {
        self.watchdog.take().map(Started::hand_over).is_some()
    }
}

/// The watchdog of one snapshot. Dropping it dismisses it, unless that is for a panic.
#[derive(Debug)]
struct Started {
    lifeline: Option<OwnedFd>,
    /// Its end is waited for only where it has been dismissed.
    process: Option<sys::Child>,
}

impl Started {
    fn start(monitor: Option<BorrowedFd>, task: &Task, recovery: &Recovery) -> Option<Started> {
        // A socket, not a pipe: writing to one whose reader was killed need not raise SIGPIPE.
        let (theirs, ours) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).ok()?;
        // The lifeline alone would not do: a child that the caller forks has it too.
        let caller = pidfd_open(getpid(), PidfdFlags::empty()).ok()?;
        let reserved = task.reservation.and_then(|reservation| reservation.known().ok());
        let reserved = reserved.as_ref().and_then(Discard::new);
        let record = task.record.as_deref().and_then(files::path);
        // Something must be in the place of what there is not.
        let nothing = task.pipe.as_raw_fd();
        let mut held = [nothing; HELD];
        held.iter_mut().zip(task.held).for_each(|(place, fd)| *place = fd.as_raw_fd());
        let child = Child {
            lifeline: theirs.as_raw_fd(),
            caller: caller.as_raw_fd(),
            monitor: monitor.map_or(nothing, |monitor| monitor.as_raw_fd()),
            pipe: task.pipe.as_raw_fd(),
            held,
            reservation: task
                .reservation
                .map_or(nothing, |reservation| reservation.held().as_raw_fd()),
            reserved: reserved.as_ref(),
            record: record.as_deref(),
            recovery,
        };
        // Until it has closed them it holds a copy of every descriptor of this process, locks and
        // marks of other snapshots among them.
        let (process, ready) = sys::while_forking(|| {
            // SAFETY: the child makes system calls only, on memory that exists already, and never
            // returns.
            let process = unsafe { sys::Child::fork(|| child.run()) }.ok()?;
            drop(theirs);
            Some((process, wait_ready([Some(&ours), None], READY_MS)))
        })?;
        let mut byte = [0];
        // What is not there by now is not waited for.
        let read = ready.then(|| rustix::io::retry_on_intr(|| rustix::io::read(&ours, &mut byte)));
        if read != Some(Ok(1)) || byte[0] != READY {
            process.kill();
            return None;
        }
        Some(Started { lifeline: Some(ours), process: Some(process) })
    }

    fn send(&self, what: u8) {
        if let Some(lifeline) = &self.lifeline {
            // A watchdog that is gone cannot be told, and the snapshot is none the worse for it.
            let _ = send(lifeline, &[what], SendFlags::NOSIGNAL);
        }
    }

    /// Ends the lifeline, which a child that the caller has forked may have too.
    fn cut(&mut self) {
        if let Some(lifeline) = self.lifeline.take() {
            let _ = shutdown(&lifeline, Shutdown::Both);
        }
    }

    fn hand_over(mut self) {
        self.cut();
        let process = ManuallyDrop::new(self.process.take());
        // It takes its time, and its end has to be taken note of; not by this thread, where there
        // can be no other.
        let _ = sys::spawn_quiet("instantsnap", move || {
            ManuallyDrop::into_inner(process).map(sys::Child::wait)
        });
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::mem::forget(self.process.take());
        } else {
            self.send(DISMISSED);
        }
        self.cut();
    }
}
