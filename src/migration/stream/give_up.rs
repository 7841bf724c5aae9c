// SPDX-License-Identifier: LGPL-2.1-or-later

//! Giving memory up that is being saved.

use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::{Stream, wait_either};
use crate::backend::{DEFAULT_TIMEOUT, Guest};
use crate::cancel::{Cancel, timeout};
use crate::deadline::Deadline;
use crate::error::{Error, Result, fail};
use crate::image::discard;
use crate::migration::backoff::Backoff;
use crate::migration::names::FD_NAME;
use crate::migration::settings::Mode;
use crate::monitor::commands::{self, Progress};
use crate::sys;

/// How often it is looked whether QEMU has closed its end.
const LOOK: Duration = Duration::from_millis(20);

/// QEMU's own stop of the guest, before the capture, is over sooner by far.
const LOST_STOP: Duration = Duration::from_secs(1);

impl Stream {
    /// Memory is not wanted any more. The stream is read on, and thrown away.
    /// [`Stream::wait_given_up`] sees to the rest.
    pub fn give_up(&self, guest: &mut dyn Guest, mode: Mode) -> Result<()> {
        self.drain.discard();
        match mode {
            Mode::Background => Ok(()),
            // Ours is over: what could be cancelled now is another client's.
            Mode::Paused if self.is_closed() => Ok(()),
            Mode::Paused => commands::migrate_cancel(guest, Deadline::after(DEFAULT_TIMEOUT)),
        }
    }

    /// Returns when QEMU says that the migration has ended; before that, it may yet stop the guest
    /// to save its devices.
    ///
    /// A background snapshot is cancelled only where that is safe. QEMU 7.2 leaves the guest's
    /// memory write-protected when one is cancelled or fails, its pipe's end closed included: the
    /// guest freezes for good at its next write. QEMU 10.0 does not, but where it is cancelled
    /// before it has armed, QEMU closes its own descriptor 0, whatever that is by then. What cannot
    /// be cancelled is left to complete.
    pub fn wait_given_up(&self, guest: &mut dyn Guest, mode: Mode) -> Result<()> {
        let backoff = Backoff::default();
        let mut progress = Progressing::new(self.drain.bytes());
        let mut cancellable =
            mode == Mode::Background && guest.capabilities().background_can_be_cancelled;
        let mut stopping = None;
        loop {
            if self.is_closed() {
                return Ok(());
            }
            let migration = commands::query_migrate(guest, Deadline::after(DEFAULT_TIMEOUT))?;
            if migration.progress() != Progress::UnderWay {
                // Where it never began, QEMU keeps its end; refused where a migration has taken it.
                let _ = commands::closefd(guest, FD_NAME, Deadline::after(DEFAULT_TIMEOUT));
                return self.wait_closed(guest);
            }
            if cancellable && migration.has_pages() {
                commands::migrate_cancel(guest, Deadline::after(DEFAULT_TIMEOUT))?;
                cancellable = false;
            }
            if !migration.is_between_setup_and_armed() || mode != Mode::Background {
                stopping = None;
            } else if stopping.get_or_insert_with(Instant::now).elapsed() > LOST_STOP {
                repeat_stop(guest)?;
                stopping = None;
            }
            // While it sets up no byte can come, however long that takes.
            if migration.is_setting_up() {
                progress = Progressing::new(self.drain.bytes());
            }
            self.unblock(&mut progress)?;
            backoff.wait();
        }
    }

    /// Returns when nothing is written to the image any more, after [`Stream::wait_given_up`].
    pub fn wait_discarded(&self, cancel: &Cancel) -> Result<()> {
        self.drain.end_when_empty();
        while self.drain.outcome().is_none() {
            cancel.check()?;
            wait_either(&self.drain, cancel, None)?;
        }
        Ok(())
    }

    /// Returns when QEMU has closed the stream. Its thread is at its end then; the status says so
    /// before, and a migration begun in between would be one beside it.
    fn wait_closed(&self, guest: &dyn Guest) -> Result<()> {
        let deadline = Instant::now() + DEFAULT_TIMEOUT;
        // Asked for nothing, it tells of the other end's having gone.
        let mut fds = [PollFd::new(&self.spare, PollFlags::empty())];
        while !fds[0].revents().contains(PollFlags::HUP) {
            // Another process may have that end too.
            if guest.pid().and_then(|pid| sys::has_open(pid, &self.spare)) == Some(false) {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                fail!(
                    OperationTimeout,
                    "saving memory has ended, and QEMU does not close its stream"
                );
            }
            match poll(&mut fds, Some(&timeout(left.min(LOOK)))) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => {
                    return Err(Error::system("cannot wait for QEMU to close its stream", errno));
                }
            }
        }
        Ok(())
    }

    /// QEMU cannot look at anything while it waits for room in the pipe, and a drain whose file
    /// system hangs makes none.
    fn unblock(&self, progress: &mut Progressing) -> Result<()> {
        const HANGING: Duration = Duration::from_secs(1);
        let mut bytes = self.drain.bytes();
        if progress.standstill(bytes) > HANGING {
            while let Ok(got @ 1..) = discard(&self.spare) {
                progress.extra += got as u64;
            }
            bytes = self.drain.bytes();
        }
        if progress.standstill(bytes) > 2 * DEFAULT_TIMEOUT {
            fail!(OperationTimeout, "saving memory was given up, and does not come to its end");
        }
        Ok(())
    }
}

/// Since when no byte has come.
struct Progressing {
    seen: u64,
    extra: u64,
    since: Instant,
}

impl Progressing {
    fn new(bytes: u64) -> Progressing {
        Progressing { seen: bytes, extra: 0, since: Instant::now() }
    }

    fn standstill(&mut self, bytes: u64) -> Duration {
        if bytes + self.extra != self.seen {
            self.seen = bytes + self.extra;
            self.since = Instant::now();
        }
        self.since.elapsed()
    }
}

/// Frees a migration whose thread waits for the CPUs of a guest that runs. QEMU stops a guest that
/// it finds running before it captures it, and waits until all CPUs stand. Another client's `cont`,
/// or a reset, can have them run again before the thread has seen that: then the thread waits for
/// good, and the migration can be neither completed nor cancelled. When the guest is stopped once
/// more, the thread goes on. The guest runs again after that.
fn repeat_stop(guest: &mut dyn Guest) -> Result<()> {
    if !guest.status()?.running {
        return Ok(());
    }
    let deadline = Deadline::after(LOST_STOP);
    // Where it comes too late, the guest may be paused all the same.
    let paused = guest.pause(deadline);
    let backoff = Backoff::default();
    while deadline.left().is_some()
        && commands::query_migrate(guest, deadline)
            .is_ok_and(|migration| migration.is_between_setup_and_armed())
    {
        backoff.wait();
    }
    if !guest.status()?.running {
        guest.resume(Deadline::after(DEFAULT_TIMEOUT))?;
    }
    paused
}
