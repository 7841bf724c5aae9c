// SPDX-License-Identifier: LGPL-2.1-or-later

//! Undoing a snapshot: what its journal says was changed is put back, from the last entry to the
//! first.
//!
//! Two things are out of that order. The guest comes first: it runs again, and the migration ends,
//! before anything else is undone. And a storage hook comes last: one that is late is waited for.

use std::time::Duration;

use super::journal::{Entry, Journal};
use crate::backend::{DEFAULT_TIMEOUT, Guest, Liveness};
use crate::deadline::Deadline;
use crate::engine::clock::Phase;
use crate::engine::nvram;
use crate::engine::watchdog::Stage;
use crate::error::{Code, Error, Result};
use crate::image::MemoryImage;
use crate::migration::{FD_NAME, reactivate_disks, wait_resumable};
use crate::monitor::commands::{self, Progress};

/// A QEMU that hangs is asked to resume its guest for so long. There is nothing worse to leave
/// behind than a guest that is paused.
const RESUME_TIMEOUT: Duration = Duration::from_secs(300);

/// QEMU takes less to stop a guest, save its devices and arm. A guest that stands for that long is
/// resumed.
const CAPTURE: Duration = Duration::from_secs(1);

impl Journal<'_, '_> {
    /// Puts everything back. `cause` is why; what cannot be put back is added to it.
    pub fn undo(mut self, guest: &mut dyn Guest, cause: Error) -> Error {
        self.enter(Entry::Phase(Phase::Undo));
        let mut left = Vec::new();
        let mut ended = false;
        let mut liveness = self.wait_responsive(guest);
        if liveness == Liveness::Alive && self.is_outrun() {
            liveness = wait_other_save(guest);
        }
        if liveness == Liveness::Alive {
            ended = self.undo_online(guest, &mut left);
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
                self.undo_offline(guest, &mut left);
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
            let stream = self.take_stream();
            if self.watchdog.hand_over() {
                guest.leave_held();
            } else {
                std::mem::forget(stream);
            }
        }
        left.extend(self.remove_files().err().map(|error| error.message));
        // Last: a hook that is late is waited for.
        left.extend(
            self.take_storage().and_then(|called| called.undo().err()).map(|error| error.message),
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
        let has_overlays = self.has(|entry| matches!(entry, Entry::Overlays));
        let mut liveness = guest.liveness();
        if liveness == Liveness::Unresponsive && self.stage().is_paused() {
            // The reply would come when it would, and is not needed: the state is looked at next.
            let _ = commands::cont(guest, Deadline::after(Duration::from_millis(100)));
        }
        while liveness == Liveness::Unresponsive && has_overlays && deadline.left().is_some() {
            liveness = guest.liveness();
        }
        liveness
    }

    /// Puts everything back with QEMU's help. Returns whether the migration has ended, as far as
    /// there was one.
    fn undo_online(&mut self, guest: &mut dyn Guest, left: &mut Vec<String>) -> bool {
        let ended = self.undo_pause(guest, left);
        let mut note = |result: Result<()>| {
            let done = result.is_ok();
            left.extend(result.err().map(|error| error.message));
            done
        };
        let settings = self.settings();
        if settings.is_some() {
            // Refused where it was never passed, and where a migration has taken it.
            let _ = commands::closefd(guest, FD_NAME, Deadline::after(DEFAULT_TIMEOUT));
        }
        let mut merged = true;
        for entry in self.entries.iter().rev() {
            match entry {
                Entry::Record => {
                    note(guest.withdraw());
                }
                Entry::Switch => {
                    // A guest that was saved while it was paused has handed its disks over, and
                    // does not take them back by itself.
                    if !self.running
                        && !self.stage().is_restored()
                        && guest.status().is_ok_and(|status| status.status == "postmigrate")
                    {
                        note(reactivate_disks(guest));
                    }
                    merged = note(guest.merge_disks());
                    // It can have come to the end of an overlay's file system, and stand since. Now
                    // there is room again.
                    if self.running
                        && guest.status().is_ok_and(|status| status.status == "io-error")
                    {
                        note(guest.resume(Deadline::after(DEFAULT_TIMEOUT)));
                    }
                }
                Entry::Settings(_) => {
                    let Some(settings) = settings else { continue };
                    note(settings.restore(guest, self.mode).map_err(|error| {
                        error.and(
                            "until the guest's next snapshot has put them back, it may be kept \
                             from being saved or migrated",
                        )
                    }));
                }
                Entry::Overlays if merged => {
                    note(guest.discard_overlays());
                }
                _ => {}
            }
        }
        ended
    }

    /// Ends the migration, and has the guest run again that was paused by us. Returns whether the
    /// migration has ended, as far as there was one.
    fn undo_pause(&mut self, guest: &mut dyn Guest, left: &mut Vec<String>) -> bool {
        let mut note = |result: Result<()>| {
            let done = result.is_ok();
            left.extend(result.err().map(|error| error.message));
            done
        };
        let (stage, mode) = (self.stage(), self.mode);
        let mut ended = true;
        if stage.is_migrating()
            && let Ok(stream) = self.stream()
        {
            note(stream.give_up(guest, mode));
            // A guest that was reset was resumed for QEMU's sake, which stops it by itself: then it
            // is no time for that.
            let moment =
                Deadline::after(if stage == Stage::Racing { DEFAULT_TIMEOUT } else { CAPTURE });
            let resumable = stage.is_paused() && wait_resumable(guest, moment);
            // QEMU refuses it while it finishes a migration; then it is done below.
            if resumable && guest.resume(Deadline::after(DEFAULT_TIMEOUT)).is_ok() {
                self.clock.resumed(guest.last_pause());
            }
            ended = self.stream().is_ok_and(|stream| note(stream.wait_given_up(guest, mode)));
        }
        // An ordinary migration, which it becomes where another client switches the capability off
        // in the pause, stops the guest at its end, and takes its disks away.
        let stopped = self.running
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
                self.clock.resumed(guest.last_pause());
            }
        }
        ended
    }

    /// Puts back what is left once QEMU has ended, which takes its settings, its nodes and its
    /// migration with it.
    fn undo_offline(&self, guest: &mut dyn Guest, left: &mut Vec<String>) {
        let mut note = |result: Result<()>| left.extend(result.err().map(|error| error.message));
        if let Some(settings) = self.settings().filter(|_| guest.is_started_again()) {
            // They can have been set in the one that was started since.
            note(settings.restore(guest, self.mode));
            let _ = commands::closefd(guest, FD_NAME, Deadline::after(DEFAULT_TIMEOUT));
        }
        let switched = self.has(|entry| matches!(entry, Entry::Switch));
        if self.has(|entry| matches!(entry, Entry::Record)) {
            note(guest.withdraw());
        }
        if self.is_outrun() && switched && !guest.capabilities().background_keeps_paused {
            // What the guest wrote since is no part of what the other client has saved.
            note(guest.empty_overlays());
        }
        if self.has(|entry| matches!(entry, Entry::Overlays)) {
            note(guest.merge_and_discard_offline(switched));
        }
    }

    fn is_outrun(&self) -> bool {
        self.has(|entry| matches!(entry, Entry::OtherMigration))
    }

    fn remove_files(&self) -> Result<()> {
        self.copies().try_for_each(nvram::Copy::remove)?;
        self.image().map_or(Ok(()), MemoryImage::remove)
    }
}

/// Another client may have begun to save the guest, which was paused by us: then it saves the
/// moment of our pause, and the guest must not write to its disks until that client is done with
/// it, which may end QEMU.
fn wait_other_save(guest: &mut dyn Guest) -> Liveness {
    let keeps_paused = guest.capabilities().background_keeps_paused;
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
