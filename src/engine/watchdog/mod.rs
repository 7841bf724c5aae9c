// SPDX-License-Identifier: LGPL-2.1-or-later

//! The watchdog: a process that outlives the caller. If the caller is killed, its guest runs on.
//!
//! A caller that is killed inside the pause would leave its guest paused. A caller that is killed
//! in the drain would close the pipe. Then the background snapshot fails, and QEMU 7.2 leaves the
//! guest frozen. So the watchdog, in a session of its own, holds the pipe and the monitor's socket
//! too. The caller tells it by another socket, the lifeline, how far the snapshot has come. When
//! the caller ends, the watchdog resumes the guest, reads QEMU's stream to its end, and puts the
//! migration settings back.
//!
//! The watchdog is a program, `instantsnap-watchdog`. It also moves the stream into the memory
//! image, so that a stopped caller does not stop its guest. The library starts the program by
//! vfork, which does not copy the caller's memory. The program uses nothing of the caller's stack,
//! working directory and environment. If the program cannot be started, a fork of the caller takes
//! its place, and a thread of the caller moves the stream. The fork makes system calls only, on
//! memory that existed before. A watchdog that another process kills is replaced by the next one.
//!
//! The backend decides how the watchdog reaches the guest ([`RecoveryChannel`]): by a QMP script on
//! the monitor's socket, or by recovery commands, which are programs that the watchdog runs. Either
//! way it merges the overlays into their images, except a driver's overlays, and removes what the
//! library made for the snapshot. An overlay that it cannot merge stays, and the watchdog reports
//! it to the machine's log.

mod child;
mod description;
mod descriptors;
mod files;
mod journal;
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
use self::stage::{DISMISSED, NOT_RESUMED, READY, RESUMED, RESUMING, UNDOING};
pub use self::task::Task;
use crate::backend::RecoveryChannel;
use crate::engine::program::{Role, cgroup, command_line};
use crate::error::{Error, Result};
use crate::sys::{self, wait_ready};

/// How long the library waits until a new watchdog is ready.
const READY_MS: c_int = 10_000;

/// The kind of a watchdog.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// There is no watchdog, because no process could be started.
    #[default]
    None,
    /// A fork of the caller, because the program could not be found or started.
    Fork,
    /// The program, which also moves the stream.
    Program,
}

/// What the watchdog did when the limit of the pause had passed and the caller did not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LateResume {
    /// It has resumed the guest, or is about to.
    Done,
    /// It could not resume the guest.
    Failed,
}

/// The process that takes over if this process ends.
#[derive(Debug, Default)]
pub struct Watchdog {
    watchdog: Option<Started>,
}

impl Watchdog {
    /// Starts the watchdog of a snapshot that is in this stage. It replaces an earlier one. If no
    /// process can be started, there is none, and the caller must not be killed.
    pub fn start(&mut self, channel: RecoveryChannel, task: &Task, stage: Stage) {
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
        let new = Started::start(monitor, task, Description::new(task, means));
        // The new one acts only after the first report, and the earlier one not after its
        // dismissal: two at once would disturb each other.
        if let Some(earlier) = &self.watchdog {
            earlier.send(DISMISSED);
        }
        if let Some(new) = &new {
            new.send(stage as u8);
        }
        self.watchdog = new;
    }

    /// The kind of this watchdog.
    pub fn kind(&self) -> Kind {
        self.watchdog.as_ref().map(|watchdog| watchdog.kind).unwrap_or_default()
    }

    /// Whether the watchdog's process has ended although this process has not dismissed it.
    pub fn is_lost(&self) -> bool {
        let process = self.watchdog.as_ref().and_then(|watchdog| watchdog.process.as_ref());
        process.is_some_and(sys::Child::has_ended)
    }

    /// Whether the watchdog is where the caller wants it: if the caller's environment names a
    /// cgroup, only the program enters it.
    pub fn is_placed(&self) -> bool {
        self.kind() == Kind::Program || cgroup::setting().is_none()
    }

    /// A descriptor that becomes readable when the watchdog ends; `None` if there is no watchdog.
    pub fn ended(&self) -> Option<BorrowedFd<'_>> {
        self.watchdog.as_ref()?.process.as_ref().map(sys::Child::ended)
    }

    /// A descriptor that becomes readable when the process that moves the stream ends. `None` if
    /// the watchdog is not the program, and so does not move the stream.
    pub fn drains(&self) -> Result<Option<OwnedFd>> {
        let program = self.watchdog.as_ref().filter(|watchdog| watchdog.kind == Kind::Program);
        program
            .and_then(|program| program.process.as_ref())
            .map(|process| process.ended().try_clone_to_owned())
            .transpose()
            .map_err(|error| Error::system("cannot duplicate a file descriptor", error))
    }

    /// The process id of the watchdog; `None` if there is no watchdog.
    pub fn process(&self) -> Option<u32> {
        self.watchdog.as_ref()?.process.as_ref().map(sys::Child::id)
    }

    /// Tells the watchdog the stage.
    pub fn report_stage(&self, stage: Stage) {
        if let Some(watchdog) = &self.watchdog {
            watchdog.send(stage as u8);
        }
    }

    /// Tells the watchdog that this process undoes the snapshot, and resumes the guest. Returns
    /// what the watchdog did before, if the limit of the pause had passed.
    pub fn report_undo(&self) -> Option<LateResume> {
        let Started { lifeline, .. } = self.watchdog.as_ref()?;
        let lifeline = lifeline.as_ref()?;
        let _ = send(lifeline, &[UNDOING], SendFlags::NOSIGNAL);
        let mut last = None;
        let mut byte = [0];
        while wait_ready([Some(lifeline)], 0)
            && rustix::io::retry_on_intr(|| rustix::io::read(lifeline, &mut byte)) == Ok(1)
        {
            last = match byte[0] {
                RESUMING => Some(LateResume::Done),
                NOT_RESUMED => Some(LateResume::Failed),
                _ => last,
            };
        }
        last
    }

    /// Tells the watchdog that this process has resumed the guest in its undo.
    pub fn report_resumed(&self) {
        if let Some(watchdog) = &self.watchdog {
            watchdog.send(RESUMED);
        }
    }

    /// Dismisses the watchdog of a snapshot that is complete, on disk and recorded. From here on it
    /// is not undone, even if this process is killed.
    pub fn dismiss(&mut self) {
        self.watchdog = None;
    }

    /// Leaves the rest to the watchdog, as if this process had ended. Returns false if there is no
    /// watchdog, or if it was killed.
    pub fn hand_over(&mut self) -> bool {
        !self.is_lost() && self.watchdog.take().map(Started::hand_over).is_some()
    }
}

/// The running watchdog of one snapshot. Dropping this dismisses the watchdog, unless the thread
/// panics.
#[derive(Debug)]
struct Started {
    kind: Kind,
    lifeline: Option<OwnedFd>,
    /// Dropping this waits for the end of the watchdog, so that happens only after it was
    /// dismissed.
    process: Option<sys::Child>,
}

impl Started {
    fn start(
        monitor: Option<BorrowedFd>,
        task: &Task,
        description: Description,
    ) -> Option<Started> {
        // The lifeline alone does not show that the caller has ended: a child that the caller forks
        // has a copy of it.
        let caller = pidfd_open(getpid(), PidfdFlags::empty()).ok()?;
        let numbers = |lifeline: &OwnedFd| descriptors::common(lifeline, &caller, monitor, task);
        Started::begin(Kind::Program, |lifeline| {
            start_program(numbers(lifeline), &description, task)
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
        // This is a socket and not a pipe, because a write to a socket whose reader was killed need
        // not raise SIGPIPE.
        let (theirs, ours) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).ok()?;
        // The new process has copies of all descriptors of this process until it closes them. Among
        // them are locks and marks of other snapshots.
        let (process, ready) = sys::while_forking(|| {
            let process = start(&theirs).ok()?;
            drop(theirs);
            Some((process, wait_ready([Some(&ours), None], READY_MS)))
        })?;
        let mut byte = [0];
        // If nothing has arrived by now, a read would wait.
        let read = ready.then(|| rustix::io::retry_on_intr(|| rustix::io::read(&ours, &mut byte)));
        if read != Some(Ok(1)) || byte[0] != READY {
            process.kill();
            return None;
        }
        Some(Started { kind, lifeline: Some(ours), process: Some(process) })
    }

    fn send(&self, what: u8) {
        if let Some(lifeline) = &self.lifeline {
            // If the watchdog has ended, it cannot be told. That alone does not harm the snapshot.
            let _ = send(lifeline, &[what], SendFlags::NOSIGNAL);
        }
    }

    /// Shuts the lifeline down. Closing it is not enough, because a child that the caller has
    /// forked may have a copy of it.
    fn cut(&mut self) {
        if let Some(lifeline) = self.lifeline.take() {
            let _ = shutdown(&lifeline, Shutdown::Both);
        }
    }

    fn hand_over(mut self) {
        self.cut();
        let process = ManuallyDrop::new(self.process.take());
        // The undo takes time, and afterwards the watchdog's process has to be reaped. Another
        // thread waits for that. If no thread can be started, this one does not wait.
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
    task: &Task,
) -> io::Result<sys::Child> {
    let drain = task.drain.descriptors().ok_or(io::ErrorKind::Unsupported)?;
    let program = command_line(Role::Watchdog, None).ok_or(io::ErrorKind::NotFound)?;
    let words = serde_json::to_vec(description)?;
    let told = memfd_create(c"instantsnap", MemfdFlags::CLOEXEC)?;
    // The program shares the file's position. A write at an offset leaves the position at the
    // beginning.
    let told = File::from(told);
    told.write_all_at(&words, 0)?;
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    sys::Child::start(&program, descriptors::all(&null, common, &told.into(), drain))
}

fn fork(common: [c_int; descriptors::COMMON], child: &Child) -> io::Result<sys::Child> {
    let run = || match Common::keep(common) {
        Some(own) => child.run(own, None),
        None => sys::exit_now(),
    };
    // SAFETY: the child makes system calls only, on memory that exists already, and never returns.
    unsafe { sys::Child::fork(run) }
}
