// SPDX-License-Identifier: LGPL-2.1-or-later

//! Waits until all of memory is in its image, and QEMU says that the migration has completed.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

use super::{Stream, wait_either};
use crate::backend::{DEFAULT_TIMEOUT, Guest, Liveness};
use crate::cancel::{Cancel, timeout};
use crate::deadline::Deadline;
use crate::error::{Code, Result, fail};
use crate::image::MemoryImage;
use crate::migration::backoff::Backoff;
use crate::migration::flow::{Flow, FlowObserver};
use crate::migration::names::{LOCK, TLS};
use crate::migration::settings::Settings;
use crate::monitor::commands::{self, MigrationRam, Progress};
use crate::sys::now;

/// If nothing comes for this time, the library asks QEMU whether more will come.
const QUIET: Duration = Duration::from_secs(1);

impl Stream {
    /// Waits until all of memory is in the file, and QEMU says that the migration has completed.
    /// Returns the size of the image. Returns `None` if `watchdog`, which becomes readable when the
    /// watchdog ends, is readable first: the watchdog may have moved the stream.
    pub fn wait_saved(
        &self,
        guest: &mut dyn Guest,
        image: &MemoryImage,
        settings: &Settings,
        watchdog: Option<BorrowedFd>,
        cancel: &Cancel,
        observer: &mut dyn FlowObserver,
    ) -> Result<Option<u64>> {
        let so_far = Flow { done: self.flow(None).done, ..observer.flow() };
        let mut meter = observer.interval().map(|interval| Meter::new(interval, so_far));
        let mut quiet = Quiet::new(self.drain.bytes());
        let mut muddled = false;
        let bytes = loop {
            // This comes before a cancel, whose undo needs QEMU's answers: without a process that
            // moves the stream, QEMU may not give them.
            if watchdog.is_some_and(is_readable) && self.drain.outcome().is_none() {
                return Ok(None);
            }
            cancel.check()?;
            if let Some(outcome) = self.drain.outcome() {
                break match outcome {
                    // A stream that QEMU has given up ends too early: then its reason counts.
                    Err(error) => match query_ended(guest) {
                        Ok(Some(Ended::Failed(reason))) if !reason.is_empty() => {
                            fail!(OperationFailed, "cannot save memory: {reason}")
                        }
                        Err(gone) if guest.liveness() == Liveness::Exited => return Err(gone),
                        _ => return Err(error),
                    },
                    Ok(bytes) => bytes,
                };
            }
            if quiet.is_long(self.drain.bytes()) {
                muddled |= self.look_for_end(guest, image, settings)?;
                quiet = Quiet::new(self.drain.bytes());
            }
            if let Some(meter) = meter.as_mut().filter(|meter| meter.left().is_zero()) {
                observer.progress(meter.read(self, guest));
                continue;
            }
            let at_most = meter.as_ref().map_or(QUIET, |meter| meter.left().min(QUIET));
            wait_either(&self.drain, cancel, watchdog, Some(at_most))?;
        };
        // The stream ends a moment before QEMU says that the migration has ended.
        match wait_ended(guest, settings, Deadline::after(DEFAULT_TIMEOUT))? {
            Ended::Completed => Ok(Some(self.offset + bytes)),
            // The failure is that of another client's migration, which came after the snapshot's.
            // Then the stream itself shows whether it is whole.
            Ended::Failed(reason)
                if (muddled || reason.contains(LOCK)) && image.has_whole_stream()? =>
            {
                Ok(Some(self.offset + bytes))
            }
            Ended::Failed(reason) => fail!(OperationFailed, "cannot save memory: {reason}"),
        }
    }

    /// Finds out why nothing has come for a while. For two reasons nothing more ever comes, not
    /// even the end of the pipe:
    ///
    /// * A process that the caller has forked before QEMU had its end of the pipe has a copy of
    ///   that end, until it executes a program. Then the pipe does not end, although QEMU has
    ///   closed it. All that a migration has written is in the pipe before QEMU says that it has
    ///   completed.
    /// * QEMU stays in the setup of a migration for ever. It had saved memory, and had said so, but
    ///   had not closed its end of the pipe when another client's `migrate` came. QEMU refused that
    ///   because of the lock, and has forgotten the pipe (seen with QEMU 10.0; QEMU 7.2 ends
    ///   there). This is certain if the stream is whole and the lock is still set: under the lock
    ///   no migration can be another client's, and the stream is not whole before the snapshot's
    ///   own has set up. The library cancels the migration, because otherwise QEMU would refuse all
    ///   other migrations and new settings for good.
    ///
    /// Returns whether it was the second reason.
    fn look_for_end(
        &self,
        guest: &mut dyn Guest,
        image: &MemoryImage,
        settings: &Settings,
    ) -> Result<bool> {
        let migration = match commands::query_migrate(guest, Deadline::after(QUIET)) {
            Ok(migration) => migration,
            // QEMU may be too busy to answer, or the daemon may be restarting.
            Err(error) if error.code == Code::OperationTimeout => return Ok(false),
            Err(error) if guest.liveness() == Liveness::Exited => return Err(error),
            Err(_) => return Ok(false),
        };
        let muddled = migration.is_setting_up()
            && image.has_whole_stream()?
            && settings.is_still_locked(guest)?;
        match migration.progress() {
            _ if muddled => commands::migrate_cancel(guest, Deadline::after(DEFAULT_TIMEOUT))?,
            Progress::UnderWay => return Ok(false),
            Progress::Completed => {
                let waiting = rustix::io::ioctl_fionread(&self.spare).unwrap_or_default();
                let came = self.drain.bytes() + waiting;
                let sent = migration.ram.as_ref().map_or(0, MigrationRam::least);
                if came < sent {
                    fail!(
                        OperationFailed,
                        "QEMU has saved {sent} bytes of memory, and {came} have come here: another \
                         client has saved the guest meanwhile"
                    );
                }
            }
            Progress::None | Progress::Failed => {}
        }
        self.drain.end_when_empty();
        Ok(muddled)
    }
}

fn is_readable(fd: BorrowedFd) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    poll(&mut fds, Some(&timeout(Duration::ZERO))).is_ok_and(|ready| ready > 0)
}

/// The number of bytes that have come, and since when no more have come.
struct Quiet {
    bytes: u64,
    since: Instant,
}

impl Quiet {
    fn new(bytes: u64) -> Quiet {
        Quiet { bytes, since: Instant::now() }
    }

    fn is_long(&mut self, bytes: u64) -> bool {
        if bytes != self.bytes {
            *self = Quiet::new(bytes);
        }
        self.since.elapsed() >= QUIET
    }
}

/// Measures at intervals how far memory has come.
struct Meter {
    interval: Duration,
    looked: Duration,
    last: Flow,
    /// If QEMU did not answer, it is not asked again before this time.
    ask: Duration,
}

impl Meter {
    fn new(interval: Duration, so_far: Flow) -> Meter {
        Meter { interval, looked: now(), last: so_far, ask: Duration::ZERO }
    }

    /// The time until the next measurement.
    fn left(&self) -> Duration {
        (self.looked + self.interval).saturating_sub(now())
    }

    fn read(&mut self, stream: &Stream, guest: &mut dyn Guest) -> Flow {
        /// The timeout of a query that nothing depends on. A cancel has to wait for its end.
        const SOON: Duration = Duration::from_secs(1);
        // An error is ignored here: the next step that needs QEMU reports it.
        let asked = now() >= self.ask;
        let migration =
            asked.then(|| commands::query_migrate(guest, Deadline::after(SOON)).ok()).flatten();
        if asked && migration.is_none() {
            self.ask = now() + DEFAULT_TIMEOUT;
        }
        let (now, mut flow) = (now(), stream.flow(migration.as_ref()));
        if flow.total == 0 {
            // QEMU has not said how much is left: keep the last numbers.
            flow.pages_left = self.last.pages_left;
            flow.total = if self.last.total == 0 { 0 } else { self.last.total.max(flow.done) };
        }
        let micros = (now - self.looked).as_micros().max(1);
        flow.per_second = (u128::from(flow.done - self.last.done) * 1_000_000 / micros) as u64;
        (self.looked, self.last) = (now, flow);
        flow
    }
}

/// How a migration has ended.
enum Ended {
    Completed,
    Failed(String),
}

fn query_ended(guest: &mut dyn Guest) -> Result<Option<Ended>> {
    let migration = commands::query_migrate(guest, Deadline::after(DEFAULT_TIMEOUT))?;
    Ok(match migration.progress() {
        Progress::UnderWay => None,
        Progress::Completed => Some(Ended::Completed),
        // `Progress::None`: the migration never began.
        Progress::None | Progress::Failed => Some(Ended::Failed(migration.reason().into())),
    })
}

/// Waits for the end of a migration whose stream has come to its end.
fn wait_ended(guest: &mut dyn Guest, settings: &Settings, deadline: Deadline) -> Result<Ended> {
    let backoff = Backoff::default();
    loop {
        if let Some(ended) = query_ended(guest)? {
            return Ok(ended);
        }
        if !settings.is_still_locked(guest)? {
            fail!(
                OperationFailed,
                "another client has changed QEMU's migration parameter '{TLS}', and begun a \
                 migration of the guest, before QEMU could be asked whether memory was saved: take \
                 the snapshot again"
            );
        }
        if deadline.left().is_none() {
            fail!(OperationTimeout, "memory is saved, and QEMU does not say so");
        }
        backoff.wait();
    }
}
