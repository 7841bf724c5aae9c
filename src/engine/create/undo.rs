// SPDX-License-Identifier: LGPL-2.1-or-later

//! Undoes a snapshot: puts back what its journal says was changed, from the last entry to the
//! first.
//!
//! Two steps are out of that order. The guest comes first: it runs again, and the migration ends,
//! before anything else is undone. And the storage hook comes last, because it may have to be
//! waited for.

use std::time::Duration;

use super::journal::{Entry, Journal, note as append, settings};
use crate::backend::{DEFAULT_TIMEOUT, Guest, Liveness};
use crate::deadline::Deadline;
use crate::engine::clock::Phase;
use crate::engine::nvram;
use crate::engine::storage::Called;
use crate::engine::watchdog::{LateResume, Stage};
use crate::error::{Code, Error, Result};
use crate::image::MemoryImage;
use crate::migration::{FD_NAME, reactivate_disks, wait_resumable};
use crate::model::journal::Line;
use crate::monitor::commands::{self, Progress};

/// For how long a QEMU that hangs is asked to resume its guest. It is long, because a guest that
/// stays paused is the worst result.
const RESUME_TIMEOUT: Duration = Duration::from_secs(300);

/// QEMU takes less time than this to stop a guest, save its devices and arm. A guest that is paused
/// for longer is resumed.
const CAPTURE: Duration = Duration::from_secs(1);

impl Journal<'_, '_> {
    /// Puts everything back. Returns `cause`, the reason of the undo, with what cannot be put back
    /// added to it.
    pub fn undo(mut self, guest: &mut dyn Guest, cause: Error) -> Error {
        self.enter(Entry::Phase(Phase::Undo));
        // Only then can a recovery take the snapshot for complete. The guest runs by then.
        let may_look_complete = self.has(|entry| matches!(entry, Entry::SettingsRestored));
        let is_noted =
            !may_look_complete || self.durable.is_some() && self.note(&Line::Undoing).is_ok();
        let cause = match self.watchdog.report_undo() {
            Some(late) => {
                let what = match late {
                    LateResume::Done => "had to resume the guest",
                    LateResume::Failed => "tried in vain to resume the guest",
                };
                let why = "this process was stopped, or did not get the CPU";
                let late = format!("the watchdog {what} after the limit of its pause: {why}");
                // What failed after that, such as the write check, failed because of it.
                Error::new(Code::OperationTimeout, cause.and(late).message)
            }
            None => cause,
        };
        let mut left = Vec::new();
        let mut ended = false;
        self.keep_stream_moving();
        let mut liveness = self.wait_responsive(guest);
        if liveness == Liveness::Alive && self.has_other_migration() {
            liveness = wait_other_save(guest);
        }
        if liveness == Liveness::Alive {
            ended = self.undo_online(guest, is_noted, &mut left);
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
                self.undo_offline(guest, is_noted, &mut left);
            }
            Liveness::Unresponsive => left.push(
                "QEMU does not answer any more: what was changed in it could not be put back. When \
                 it answers again its guest is resumed; do not remove the overlays"
                    .into(),
            ),
        }
        if !ended || liveness == Liveness::Unresponsive {
            // QEMU may continue later. Then the stream must be read to its end, and a paused guest
            // resumed.
            self.keep_stream_moving();
            let stream = self.take_stream();
            if self.watchdog.hand_over() {
                guest.leave_held();
            } else {
                std::mem::forget(stream);
            }
            // The watchdog removes it, or a recovery.
            self.durable = None;
        }
        left.extend(self.remove_files().err().map(|error| error.message));
        // The hook comes last, because it may have to be waited for. If this process is killed
        // meanwhile, a recovery names what the hook may have left.
        let storage = self.take_storage();
        if storage.is_some() && left.is_empty() {
            let _ = self.note(&Line::Undone);
        }
        match storage.map_or(Ok(()), Called::undo) {
            // The caller is told what is left.
            Ok(()) => self.end_durable(),
            Err(error) => left.push(error.message),
        }
        // A caller that is told that its snapshot was cancelled assumes that all is undone.
        let cause = match cause.code == Code::OperationAborted && !left.is_empty() {
            true => Error::new(Code::OperationFailed, cause.message),
            false => cause,
        };
        left.into_iter().fold(cause, |cause, left| cause.and(left))
    }

    /// If the watchdog that moved the stream was killed, a thread of this process moves it on. A
    /// QEMU that waits for room in the pipe may not answer.
    fn keep_stream_moving(&mut self) {
        if let Ok(stream) = self.stream() {
            stream.drain().go_on_if_lost();
        }
    }

    /// QEMU's liveness. A QEMU that does not answer is given time if it was changed already; if its
    /// guest is paused, `cont` is queued, which QEMU carries out when it answers again.
    fn wait_responsive(&mut self, guest: &mut dyn Guest) -> Liveness {
        let deadline = Deadline::after(RESUME_TIMEOUT);
        let has_overlays = self.has(|entry| matches!(entry, Entry::Overlays));
        let mut liveness = guest.liveness();
        if liveness == Liveness::Unresponsive && self.stage().is_paused() {
            // The reply is not needed: the guest's state is queried later.
            let _ = commands::cont(guest, Deadline::after(Duration::from_millis(100)));
        }
        while liveness == Liveness::Unresponsive && has_overlays && deadline.left().is_some() {
            self.keep_stream_moving();
            liveness = guest.liveness();
        }
        liveness
    }

    /// Puts everything back with QEMU's help. Returns whether no migration of ours is under way any
    /// more.
    fn undo_online(
        &mut self,
        guest: &mut dyn Guest,
        is_noted: bool,
        left: &mut Vec<String>,
    ) -> bool {
        let ended = self.undo_pause(guest, left);
        let may_merge = self.spoil(is_noted, left);
        let is_restored = self.stage().is_restored();
        let Journal { entries, durable, overlays, running, mode, .. } = self;
        let (running, mode) = (*running, *mode);
        let mut note = |result: Result<()>| {
            let done = result.is_ok();
            left.extend(result.err().map(|error| error.message));
            done
        };
        let settings = settings(entries);
        if settings.is_some() {
            // QEMU refuses it if the pipe was never passed, or a migration has taken it.
            let _ = commands::closefd(guest, FD_NAME, Deadline::after(DEFAULT_TIMEOUT));
        }
        let mut merged = true;
        for entry in entries.iter().rev() {
            match entry {
                Entry::Record => {
                    note(guest.withdraw());
                }
                Entry::Switch => {
                    // QEMU deactivated the disks of a guest that was saved while it was paused, and
                    // does not activate them by itself.
                    if !running
                        && !is_restored
                        && guest.status().is_ok_and(|status| status.status == "postmigrate")
                    {
                        note(reactivate_disks(guest));
                    }
                    merged = may_merge && note(guest.merge_disks());
                    if merged {
                        // From here on an overlay that is missing is none that is missed.
                        let _ = append(durable, &Line::Merged { overlays: overlays.clone() });
                    }
                    // The guest can be stopped because an overlay's file system was full. Now there
                    // is room again.
                    if running && guest.status().is_ok_and(|status| status.status == "io-error") {
                        note(guest.resume(Deadline::after(DEFAULT_TIMEOUT)));
                    }
                }
                Entry::Settings(_) => {
                    let Some(settings) = settings else { continue };
                    note(settings.restore(guest, mode).map_err(|error| {
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

    /// Ends the migration, and resumes the guest if we have paused it. Returns whether no migration
    /// of ours is under way any more.
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
            // A guest that was reset runs already, because it was resumed to save QEMU from an
            // abort. QEMU stops it by itself, and must not be disturbed then.
            let deadline =
                Deadline::after(if stage == Stage::Racing { DEFAULT_TIMEOUT } else { CAPTURE });
            let resumable = stage.is_paused() && wait_resumable(guest, deadline);
            // QEMU refuses it while it finishes a migration; then the guest is resumed below.
            if resumable && guest.resume(Deadline::after(DEFAULT_TIMEOUT)).is_ok() {
                self.clock.resumed(guest.last_pause());
            }
            ended = self.stream().is_ok_and(|stream| note(stream.wait_given_up(guest, mode)));
        }
        // If another client switched the capability off in the pause, this was a non-live
        // migration, at whose end QEMU stops the guest and deactivates its disks.
        let stopped = self.running
            && stage == Stage::Draining
            && guest.status().is_ok_and(|status| status.status == "postmigrate");
        // This may be the second resume: a migration that was given up while it set up has stopped
        // the guest once more.
        if stage.is_paused() || stopped {
            let resumed = guest.resume(Deadline::after(DEFAULT_TIMEOUT));
            // If another client has begun a save or dump in the pause, the guest cannot be resumed
            // meanwhile, and QEMU stops it at the end of that.
            let again = ended && wait_other_migration(guest) || resumed.is_err();
            if note(if again { ensure_running(guest) } else { resumed }) {
                let _ = self.note(&Line::Resumed);
                self.clock.resumed(guest.last_pause());
                self.watchdog.report_resumed();
            }
        }
        ended
    }

    /// Puts back what is left once QEMU has ended. Its settings, its nodes and its migration have
    /// ended with it.
    fn undo_offline(&mut self, guest: &mut dyn Guest, is_noted: bool, left: &mut Vec<String>) {
        let may_merge = self.spoil(is_noted, left);
        let mut note = |result: Result<()>| left.extend(result.err().map(|error| error.message));
        if let Some(settings) = self.settings().filter(|_| guest.is_started_again()) {
            // The settings can have been changed in the QEMU that was started since.
            note(settings.restore(guest, self.mode));
            let _ = commands::closefd(guest, FD_NAME, Deadline::after(DEFAULT_TIMEOUT));
        }
        let switched = self.has(|entry| matches!(entry, Entry::Switch));
        if self.has(|entry| matches!(entry, Entry::Record)) {
            note(guest.withdraw());
        }
        if self.has_other_migration() && switched && !guest.capabilities().background_keeps_paused {
            // What the guest wrote after the pause does not belong to what the other client has
            // saved.
            note(guest.empty_overlays());
        }
        if may_merge && self.has(|entry| matches!(entry, Entry::Overlays)) {
            let merged = if switched { self.merge_offline(guest) } else { Ok(()) };
            note(merged.and_then(|()| guest.merge_and_discard_offline(switched)));
        }
    }

    /// Merges the overlays of a QEMU that has ended. If this process is killed meanwhile, a
    /// recovery repeats it.
    fn merge_offline(&mut self, guest: &mut dyn Guest) -> Result<()> {
        let overlays = self.overlays.clone();
        let _ = self.note(&Line::merging(overlays.clone()));
        if guest.merge_offline()? {
            let _ = self.note(&Line::Merged { overlays });
        }
        Ok(())
    }

    /// Removes a memory image that may be complete, before the first merge changes an image of the
    /// snapshot: from then on the snapshot must not look complete, not even after a loss of power.
    /// Returns whether the overlays may be merged. `is_noted`: the journal on disk says so.
    fn spoil(&mut self, is_noted: bool, left: &mut Vec<String>) -> bool {
        if !self.has(|entry| matches!(entry, Entry::SettingsRestored)) {
            return true;
        }
        let removed = self.image().map_or(Ok(()), MemoryImage::remove_for_good);
        let may_merge = is_noted || removed.is_ok();
        if !may_merge {
            // A recovery does it once that is possible.
            self.durable = None;
            left.push(
                "the guest goes on with the snapshot's overlays, which must not be removed: they \
                 cannot be merged as long as the memory image can neither be removed nor be noted \
                 as undone"
                    .into(),
            );
        }
        left.extend(removed.err().map(|error| error.message));
        may_merge
    }

    /// Whether QEMU refused our migration, so that another client's may have begun instead.
    fn has_other_migration(&self) -> bool {
        self.has(|entry| matches!(entry, Entry::OtherMigration))
    }

    fn remove_files(&self) -> Result<()> {
        self.copies().try_for_each(nvram::Copy::remove)?;
        self.image().map_or(Ok(()), MemoryImage::remove)
    }
}

/// Waits for the end of another client's save, which may have begun while we had paused the guest.
/// That client saves the moment of our pause, so the guest must not write to its disks until it is
/// done; it may end QEMU then. Returns QEMU's liveness.
fn wait_other_save(guest: &mut dyn Guest) -> Liveness {
    let keeps_paused = guest.capabilities().background_keeps_paused;
    let deadline = Deadline::after(RESUME_TIMEOUT);
    let mut seen = false;
    loop {
        let migrating = commands::query_migrate(guest, Deadline::after(DEFAULT_TIMEOUT))
            .is_ok_and(|migration| migration.progress() == Progress::UnderWay);
        seen |= migrating;
        // QEMU before 9.0 starts the vCPUs once it has armed.
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

/// Waits until no migration is under way any more. Returns whether there was one.
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
