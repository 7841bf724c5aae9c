//! What a snapshot has changed so far, and putting it back.
//!
//! The guest comes first: it runs again before anything else is undone.

use std::time::Duration;

use crate::backend::{DEFAULT_TIMEOUT, Guest, Liveness};
use crate::cancel::Cancel;
use crate::deadline::Deadline;
use crate::engine::clock::Clock;
use crate::engine::nvram;
use crate::engine::storage::Called;
use crate::engine::watchdog::{Stage, Watchdog};
use crate::error::{Code, Error, Result};
use crate::image::MemoryImage;
use crate::migration::{FD_NAME, Mode, Settings, Stream, reactivate_disks, wait_resumable};
use crate::monitor::commands::{self, Progress};

/// A QEMU that hangs is asked to resume its guest for so long. There is nothing worse to leave
/// behind than a guest that is paused.
const RESUME_TIMEOUT: Duration = Duration::from_secs(300);

/// QEMU takes less to stop a guest, save its devices and arm. A guest that stands for that long is
/// resumed.
const CAPTURE: Duration = Duration::from_secs(1);

/// What a snapshot has changed, or may have: each is noted before it is tried.
#[derive(Debug, Default)]
pub struct Made {
    /// The memory image.
    pub image: Option<MemoryImage>,
    /// Copies of UEFI variables.
    pub copies: Vec<nvram::Copy>,
    /// Overlays.
    pub overlays: bool,
    /// Migration settings, and for which mode they were changed.
    pub settings: Option<(Settings, Mode)>,
    /// The pipe, passed to QEMU.
    pub stream: Option<Stream>,
    /// The guest ran, and is to run again.
    pub ran: bool,
    /// The snapshot may be recorded.
    pub registered: bool,
    /// The disks are on their overlays.
    pub switched: bool,
    /// Another client's migration may have begun in the place of ours: a background snapshot.
    pub outrun: bool,
    /// The storage hook was called.
    pub storage: Option<Called>,
    /// How far the guest's own part has come, and who takes over should this process be killed.
    pub watchdog: Watchdog,
}

impl Made {
    /// The memory image, which is made first.
    pub fn image(&self) -> Result<&MemoryImage> {
        self.image
            .as_ref()
            .ok_or_else(|| Error::new(Code::InternalError, "there is no memory image yet"))
    }

    /// The stream, which is opened before QEMU is changed.
    pub fn stream(&mut self) -> Result<&mut Stream> {
        self.stream
            .as_mut()
            .ok_or_else(|| Error::new(Code::InternalError, "there is no memory stream yet"))
    }

    /// Waits until all of memory is in the image. Returns the image's bytes.
    pub fn wait_saved(
        &self,
        guest: &mut dyn Guest,
        cancel: &Cancel,
        clock: &mut Clock,
    ) -> Result<u64> {
        match (&self.stream, &self.settings) {
            (Some(stream), Some((settings, _))) => {
                stream.wait_saved(guest, self.image()?, settings, cancel, clock)
            }
            _ => Err(Error::new(Code::InternalError, "there is no memory stream yet")),
        }
    }

    /// QEMU's settings were put back, and its migration is over: a migration that is under way from
    /// here on, and what the settings are by then, is another client's.
    pub fn settings_are_back(&mut self) {
        self.settings = None;
        self.watchdog.enter(Stage::Finishing);
    }

    /// Puts everything back. `cause` is why; what cannot be put back is added to it.
    pub fn undo(mut self, guest: &mut dyn Guest, cause: Error, clock: &mut Clock) -> Error {
        let mut left = Vec::new();
        let mut ended = false;
        let mut liveness = self.wait_responsive(guest);
        if liveness == Liveness::Alive && self.outrun {
            liveness = wait_other_save(guest);
        }
        if liveness == Liveness::Alive {
            ended = self.undo_online(guest, &mut left, clock);
            if !left.is_empty() {
                liveness = guest.liveness();
            }
        }
        match liveness {
            Liveness::Alive => {}
            Liveness::Exited => {
                // A QEMU that has ended takes its settings, its nodes and its migration with it.
                left.clear();
                left.push("the guest's QEMU has ended meanwhile".into());
                ended = true;
                if let Some((settings, mode)) = self.settings.as_ref().filter(|_| guest.is_started_again()) {
                    // They can have been set in the one that was started since.
                    left.extend(settings.restore(guest, *mode).err().map(|error| error.message));
                    let _ = commands::closefd(guest, FD_NAME, Deadline::after(DEFAULT_TIMEOUT));
                }
                if self.registered {
                    left.extend(guest.withdraw().err().map(|error| error.message));
                }
                if self.outrun && self.switched && !guest.background_keeps_paused() {
                    // What the guest wrote since is no part of what the other client has saved.
                    left.extend(guest.empty_overlays().err().map(|error| error.message));
                }
                if self.overlays {
                    left.extend(guest.merge_and_discard_offline(self.switched).err().map(|error| error.message));
                }
            }
            Liveness::Unresponsive => left.push(
                "QEMU does not answer any more: what was changed in it could not be put back. When \
                 it answers again its guest is resumed; do not remove the overlays"
                    .into(),
            ),
        }
        if !ended || liveness == Liveness::Unresponsive {
            // The stream must be read to its end, and a guest that is paused resumed, whenever QEMU
            // comes to it.
            let stream = self.stream.take();
            if self.watchdog.hand_over() {
                guest.leave_held();
            } else {
                std::mem::forget(stream);
            }
        }
        left.extend(self.remove_files().err().map(|error| error.message));
        // Last: a hook that is late is waited for.
        left.extend(
            self.storage.take().and_then(|called| called.undo().err()).map(|error| error.message),
        );
        // A caller that is told that its snapshot was cancelled takes all for undone.
        let cause = match cause.code == Code::OperationAborted && !left.is_empty() {
            true => Error::new(Code::OperationFailed, cause.message),
            false => cause,
        };
        left.into_iter().fold(cause, |cause, left| cause.and(left))
    }

    /// Whether QEMU is there. One that does not answer is given time, after all that was changed in
    /// it; for a guest that is paused `cont` is queued, for QEMU to find when it comes to.
    fn wait_responsive(&self, guest: &mut dyn Guest) -> Liveness {
        let deadline = Deadline::after(RESUME_TIMEOUT);
        let mut liveness = guest.liveness();
        if liveness == Liveness::Unresponsive && self.watchdog.stage().is_paused() {
            // The reply would come when it would, and is not needed: the state is looked at next.
            let _ = commands::cont(guest, Deadline::after(Duration::from_millis(100)));
        }
        while liveness == Liveness::Unresponsive && self.overlays && deadline.left().is_some() {
            liveness = guest.liveness();
        }
        liveness
    }

    /// Returns whether the migration has ended, as far as there was one.
    fn undo_online(
        &mut self,
        guest: &mut dyn Guest,
        left: &mut Vec<String>,
        clock: &mut Clock,
    ) -> bool {
        let mut note = |result: Result<()>| {
            let done = result.is_ok();
            left.extend(result.err().map(|error| error.message));
            done
        };
        let stage = self.watchdog.stage();
        let mode = self.settings.as_ref().map_or(Mode::Paused, |(_, mode)| *mode);
        let mut ended = true;
        if let Some(stream) = self.stream.as_ref().filter(|_| stage.is_migrating()) {
            note(stream.give_up(guest, mode));
            // A guest that was reset was resumed for QEMU's sake, which stops it by itself: then it
            // is no time for that.
            let moment =
                Deadline::after(if stage == Stage::Racing { DEFAULT_TIMEOUT } else { CAPTURE });
            let resumable = stage.is_paused() && wait_resumable(guest, moment);
            if resumable {
                // QEMU refuses it while it finishes a migration; then it is done below.
                if guest.resume(Deadline::after(DEFAULT_TIMEOUT)).is_ok() {
                    clock.resumed(guest.last_pause());
                }
            }
            ended = note(stream.wait_given_up(guest, mode));
        }
        // An ordinary migration, which it becomes where another client switches the capability off
        // in the pause, stops the guest at its end, and takes its disks away.
        let stopped = self.ran
            && stage == Stage::Draining
            && guest.status().is_ok_and(|status| status.status == "postmigrate");
        // Again, where there was a migration: one that was given up while it set up has stopped the
        // guest once more.
        if stage.is_paused() || stopped {
            let resumed = guest.resume(Deadline::after(DEFAULT_TIMEOUT));
            // Another client's save or dump, begun in the pause, lets nobody near the guest, and
            // stops it at its end.
            let again = ended && wait_other_migration(guest) || resumed.is_err();
            if note(if again { ensure_running(guest) } else { resumed }) {
                clock.resumed(guest.last_pause());
            }
        }
        if self.settings.is_some() {
            // Refused where it was never passed, and where a migration has taken it.
            let _ = commands::closefd(guest, FD_NAME, Deadline::after(DEFAULT_TIMEOUT));
        }
        if self.registered {
            note(guest.withdraw());
        }
        let mut merged = true;
        if self.switched {
            // A guest that was saved while it was paused has handed its disks over, and does not
            // take them back by itself.
            if !self.ran
                && !stage.is_restored()
                && guest.status().is_ok_and(|status| status.status == "postmigrate")
            {
                note(reactivate_disks(guest));
            }
            merged = note(guest.merge_disks());
            // It can have come to the end of an overlay's file system, and stand since. Now there
            // is room again.
            if self.ran && guest.status().is_ok_and(|status| status.status == "io-error") {
                note(guest.resume(Deadline::after(DEFAULT_TIMEOUT)));
            }
        }
        if let Some((settings, mode)) = &self.settings {
            note(settings.restore(guest, *mode).map_err(|error| {
                error.and(
                    "until the guest's next snapshot has put them back, it may be kept from being \
                     saved or migrated",
                )
            }));
        }
        if self.overlays && merged {
            note(guest.discard_overlays());
        }
        ended
    }

    fn remove_files(&self) -> Result<()> {
        self.copies.iter().try_for_each(nvram::Copy::remove)?;
        self.image.as_ref().map_or(Ok(()), MemoryImage::remove)
    }
}

/// Another client may have begun to save the guest, which was paused by us: then it saves the
/// moment of our pause, and the guest must not write to its disks until that client is done with
/// it, which may end QEMU.
fn wait_other_save(guest: &mut dyn Guest) -> Liveness {
    let keeps_paused = guest.background_keeps_paused();
    let deadline = Deadline::after(RESUME_TIMEOUT);
    let mut seen = false;
    loop {
        let migrating = commands::query_migrate(guest, Deadline::after(DEFAULT_TIMEOUT))
            .is_ok_and(|migration| migration.progress() == Progress::UnderWay);
        seen |= migrating;
        // An old QEMU starts the vCPUs once it has armed.
        if migrating && !keeps_paused && guest.status().is_ok_and(|status| status.running) {
            let _ = commands::stop(guest, Deadline::after(DEFAULT_TIMEOUT));
        }
        let liveness = guest.liveness();
        let done = !seen || !migrating && guest.check_not_busy(&[]).is_ok();
        if done || liveness != Liveness::Alive || deadline.left().is_none() {
            return liveness;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits until there is no migration any more; whether there was one.
fn wait_other_migration(guest: &mut dyn Guest) -> bool {
    let deadline = Deadline::after(RESUME_TIMEOUT);
    let mut seen = false;
    while deadline.left().is_some()
        && commands::query_migrate(guest, Deadline::after(DEFAULT_TIMEOUT))
            .is_ok_and(|migration| migration.progress() == Progress::UnderWay)
    {
        seen = true;
        std::thread::sleep(Duration::from_millis(20));
    }
    seen
}

fn ensure_running(guest: &mut dyn Guest) -> Result<()> {
    if guest.status()?.running { Ok(()) } else { guest.resume(Deadline::after(RESUME_TIMEOUT)) }
}
