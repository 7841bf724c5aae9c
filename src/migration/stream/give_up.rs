// SPDX-License-Identifier: LGPL-2.1-or-later

//! Gives up a migration that is saving memory.

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

/// The time between two checks whether QEMU has closed its end of the pipe.
const LOOK: Duration = Duration::from_millis(20);

/// QEMU's own stop of the guest, before the capture, takes far less time than this.
const LOST_STOP: Duration = Duration::from_secs(1);

impl Stream {
    /// Gives memory up: from here on the stream is read and discarded. [`Stream::wait_given_up`]
    /// does the rest.
    pub fn give_up(&self, guest: &mut dyn Guest, mode: Mode) -> Result<()> {
        self.drain.discard();
        match mode {
            Mode::Background => Ok(()),
            // The snapshot's migration is over. This could only cancel another client's.
            Mode::Paused if self.is_closed() => Ok(()),
            Mode::Paused => commands::migrate_cancel(guest, Deadline::after(DEFAULT_TIMEOUT)),
        }
    }

    /// Waits until QEMU says that the migration has ended. Before that, QEMU may still stop the
    /// guest to save its devices.
    ///
    /// A background snapshot is cancelled only if that is safe. If it is cancelled or fails, which
    /// includes a closed pipe, QEMU 7.2 leaves the guest's memory write-protected, and the guest
    /// freezes for good at its next write. QEMU 10.0 does not do that. But if the snapshot is
    /// cancelled before QEMU has armed write tracking, QEMU 10.0 closes its own descriptor 0,
    /// whatever that is by then. A snapshot that cannot be cancelled is left to complete.
    pub fn wait_given_up(&self, guest: &mut dyn Guest, mode: Mode) -> Result<()> {
        let backoff = Backoff::default();
        let mut progress = Progressing::new(self.drain.bytes());
        let mut cancellable =
            mode == Mode::Background && guest.capabilities().background_can_be_cancelled;
        let mut stopping = None;
        loop {
            self.drain.go_on_if_lost();
            if self.is_closed() {
                return Ok(());
            }
            let migration = commands::query_migrate(guest, Deadline::after(DEFAULT_TIMEOUT))?;
            if migration.progress() != Progress::UnderWay {
                // If the migration never began, QEMU still has its end of the pipe. QEMU refuses
                // this command if a migration has taken that end.
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
            // No byte can come during the setup, however long that takes.
            if migration.is_setting_up() {
                progress = Progressing::new(self.drain.bytes());
            }
            self.unblock(&mut progress)?;
            backoff.wait();
        }
    }

    /// Waits until nothing is written to the image any more, after [`Stream::wait_given_up`].
    pub fn wait_discarded(&self, cancel: &Cancel) -> Result<()> {
        self.drain.end_when_empty();
        while self.drain.outcome().is_none() {
            self.drain.go_on_if_lost();
            cancel.check()?;
            wait_either(&self.drain, cancel, None, Some(LOOK))?;
        }
        Ok(())
    }

    /// Waits until QEMU has closed the stream. Then QEMU's migration thread is at its end. The
    /// status reports the end earlier, and a migration that began in between would run beside that
    /// thread.
    fn wait_closed(&self, guest: &dyn Guest) -> Result<()> {
        let deadline = Instant::now() + DEFAULT_TIMEOUT;
        // A poll for no events still reports that the other end is closed.
        let mut fds = [PollFd::new(&self.spare, PollFlags::empty())];
        while !fds[0].revents().contains(PollFlags::HUP) {
            // Another process may have a copy of that end: then only QEMU's own descriptors show
            // it.
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

    /// Empties the pipe if the drain stands still. While QEMU waits for room in the pipe, it can do
    /// nothing else, and a drain whose file system hangs makes no room.
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

/// The number of bytes that have come, and since when no more have come.
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

/// Frees a migration whose thread waits for the CPUs of a running guest to stop. If QEMU finds a
/// guest running, it stops the guest before the capture, and waits until all CPUs have stopped.
/// Another client's `cont`, or a reset, can start them again before the thread has seen that. Then
/// the thread waits for ever, and the migration can be neither completed nor cancelled. This stops
/// the guest once more, so that the thread goes on, and then resumes the guest.
fn repeat_stop(guest: &mut dyn Guest) -> Result<()> {
    if !guest.status()?.running {
        return Ok(());
    }
    let deadline = Deadline::after(LOST_STOP);
    // If the reply comes too late, the guest may be paused all the same.
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
