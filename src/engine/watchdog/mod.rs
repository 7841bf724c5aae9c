// SPDX-License-Identifier: LGPL-2.1-or-later

//! A process that outlives the caller's: should that be killed, its guest runs on.
//!
//! A caller that dies inside the pause would leave its guest paused. One that dies while memory
//! drains would close the pipe, and QEMU 7.2, whose background snapshot then fails, leaves the
//! guest frozen. So a process of its own session holds the pipe and the monitor's socket, and a
//! lifeline on which it is told how far the snapshot has come. When the caller ends, it resumes the
//! guest, reads QEMU's stream to its end, and puts the migration settings back.
//!
//! It is a program, `instantsnap-watchdog`, which also moves the stream into the memory image: a
//! caller that is stopped does not stop its guest. The program is started by vfork: it costs no
//! copy of the caller's memory, and needs nothing of its stack, its working directory and its
//! environment. Where the program cannot be started, a fork of the caller takes its place, and a
//! thread of the caller moves the stream. Between fork and exit it makes system calls only, on
//! memory that was there before.
//!
//! How it speaks to the guest is the backend's affair ([`RecoveryChannel`]): by a QMP script on the
//! monitor's socket, or by recovery commands, which are programs that it runs. Either way it merges
//! the overlays back, unless they are a driver's, and removes what was made for the snapshot. What
//! it cannot merge it leaves, and says so in the machine's log.

mod child;
mod complaint;
mod description;
mod descriptors;
mod files;
mod pause_limit;
mod program;
mod qmp_script;
mod recovery_command;
mod remaining;
mod reply;
mod stage;
mod task;

use std::ffi::c_int;
use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, Mode, OFlags, memfd_create};
use rustix::net::{
    AddressFamily, SendFlags, Shutdown, SocketFlags, SocketType, send, shutdown, socketpair,
};
use rustix::process::{PidfdFlags, getpid, pidfd_open};

use self::child::Child;
use self::description::{Description, Means};
use self::descriptors::Common;
pub use self::program::run;
pub use self::stage::Stage;
use self::stage::{DISMISSED, READY, RESUMING, UNDOING};
pub use self::task::Task;
use crate::backend::RecoveryChannel;
use crate::error::{Error, Result};
use crate::image::Drain;
use crate::sys::{self, wait_ready};

/// For it to get there.
const READY_MS: c_int = 10_000;

/// What a watchdog is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// There is none: no process can be started.
    #[default]
    None,
    /// A fork of the caller: the program cannot be found, or started.
    Fork,
    /// The program. It moves the stream.
    Program,
}

/// The process that takes over if this process ends.
#[derive(Debug, Default)]
pub struct Watchdog {
    watchdog: Option<Started>,
}

impl Watchdog {
    /// Starts the watchdog. Where no process can be started there is none, and the caller must not
    /// be killed.
    pub fn start(&mut self, channel: RecoveryChannel, task: &Task) {
        let restore = || task.restore.iter().map(|(name, value)| ((*name).into(), value.clone()));
        let (monitor, means) = match channel {
            RecoveryChannel::None => (None, Means::None),
            RecoveryChannel::Monitor(monitor, overlays) => {
                (Some(monitor), Means::Monitor { restore: restore().collect(), overlays })
            }
            RecoveryChannel::Commands(make) => {
                (None, Means::Commands(Box::new(make(task.restore))))
            }
        };
        self.watchdog = Started::start(monitor, task, Description::new(task, means));
    }

    /// What the watchdog is.
    pub fn kind(&self) -> Kind {
        self.watchdog.as_ref().map(|watchdog| watchdog.kind).unwrap_or_default()
    }

    /// Whether the watchdog's process has ended although this process has not dismissed it.
    pub fn is_lost(&self) -> bool {
        let process = self.watchdog.as_ref().and_then(|watchdog| watchdog.process.as_ref());
        process.is_some_and(sys::Child::has_ended)
    }

    /// A descriptor that becomes readable when the watchdog's process ends; none if the watchdog is
    /// not the program, which is the one that moves the stream.
    pub fn drains(&self) -> Result<Option<OwnedFd>> {
        let program = self.watchdog.as_ref().filter(|watchdog| watchdog.kind == Kind::Program);
        program
            .and_then(|program| program.process.as_ref())
            .map(|process| process.ended().try_clone_to_owned())
            .transpose()
            .map_err(|error| Error::system("cannot duplicate a file descriptor", error))
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

    /// Tells the watchdog that this process undoes the snapshot, and resumes the guest. Returns
    /// whether the watchdog had to resume it before, because the limit of the pause has passed.
    pub fn report_undo(&self) -> bool {
        let Some(Started { lifeline: Some(lifeline), .. }) = &self.watchdog else { return false };
        let _ = send(lifeline, &[UNDOING], SendFlags::NOSIGNAL);
        let mut byte = [0];
        wait_ready([Some(lifeline), None], 0)
            && rustix::io::retry_on_intr(|| rustix::io::read(lifeline, &mut byte)) == Ok(1)
            && byte[0] == RESUMING
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
    kind: Kind,
    lifeline: Option<OwnedFd>,
    /// Its end is waited for only where it has been dismissed.
    process: Option<sys::Child>,
}

impl Started {
    fn start(
        monitor: Option<BorrowedFd>,
        task: &Task,
        description: Description,
    ) -> Option<Started> {
        // The lifeline alone would not do: a child that the caller forks has it too.
        let caller = pidfd_open(getpid(), PidfdFlags::empty()).ok()?;
        let numbers = |lifeline: &OwnedFd| descriptors::common(lifeline, &caller, monitor, task);
        Started::begin(Kind::Program, |lifeline| {
            start_program(numbers(lifeline), &description, task.drain)
        })
        .or_else(|| {
            let child = Child::new(description);
            Started::begin(Kind::Fork, |lifeline| fork(numbers(lifeline), &child))
        })
    }

    /// Starts a process that has the other end of a lifeline, and waits until it is ready.
    fn begin(
        kind: Kind,
        start: impl FnOnce(&OwnedFd) -> io::Result<sys::Child>,
    ) -> Option<Started> {
        // A socket, not a pipe: writing to one whose reader was killed need not raise SIGPIPE.
        let (theirs, ours) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).ok()?;
        // Until it has closed them it holds a copy of every descriptor of this process, locks and
        // marks of other snapshots among them.
        let (process, ready) = sys::while_forking(|| {
            let process = start(&theirs).ok()?;
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
        Some(Started { kind, lifeline: Some(ours), process: Some(process) })
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

fn start_program(
    common: [c_int; descriptors::COMMON],
    description: &Description,
    drain: &Drain,
) -> io::Result<sys::Child> {
    let command_line = program::command_line().ok_or(io::ErrorKind::NotFound)?;
    let words = serde_json::to_vec(description)?;
    let told = memfd_create(c"instantsnap", MemfdFlags::CLOEXEC)?;
    // The program shares the file's position: writing at an offset leaves it at the beginning.
    let told = File::from(told);
    told.write_all_at(&words, 0)?;
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    sys::Child::start(&command_line, descriptors::all(&null, common, &told.into(), drain))
}

fn fork(common: [c_int; descriptors::COMMON], child: &Child) -> io::Result<sys::Child> {
    let run = || match Common::keep(common) {
        Some(own) => child.run(own, None),
        None => sys::exit_now(),
    };
    // SAFETY: the child makes system calls only, on memory that exists already, and never returns.
    unsafe { sys::Child::fork(run) }
}
