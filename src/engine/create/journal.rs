// SPDX-License-Identifier: LGPL-2.1-or-later

//! The journal of a snapshot: its steps so far, in order, each noted before it is tried.
//!
//! It is the one record of a snapshot's progress. Two values are functions of it, so that they
//! cannot disagree: the phase, which is reported to the observer and the statistics, and the stage,
//! which is reported to the watchdog. Only [`Journal::enter`] and [`Journal::pop`] report them.
//! When the snapshot fails, the entries are undone from the last to the first (`undo.rs`).
//!
//! | entry              | phase   | stage                   | undone by                           |
//! |--------------------|---------|-------------------------|-------------------------------------|
//! | `Phase`            | its own |                         |                                     |
//! | `Image`            |         |                         | removing the file                   |
//! | `Copy`             |         |                         | removing the file                   |
//! | `Overlays`         |         |                         | removing them, unless still in use  |
//! | `Stream`           |         |                         | dropping it, once QEMU is done      |
//! | `Settings`         |         |                         | closing the pipe; settings as found |
//! | `EarlyMigration`   | Prepare | Begun                   | giving it up, waiting for its end   |
//! | `EarlyPause`       | Pause   | Racing                  | resuming, once QEMU has armed       |
//! | `InTime`           |         | Migrating               | (the two before it)                 |
//! | `Pause`            | Pause   | Paused                  | resuming                            |
//! | `Switch`           |         | Switching, where Paused | merging the overlays                |
//! | `Storage`          |         |                         | the hook's own undo, last of all    |
//! | `Migration`        |         | Migrating, or Draining  | giving it up, waiting for its end   |
//! | `OtherMigration`   |         |                         | waiting for its end                 |
//! | `Resume`           |         | Draining                |                                     |
//! | `Record`           |         |                         | withdrawing the record              |
//! | `SettingsRestored` |         | Finishing               |                                     |
//! | `Commit`           |         | Committing              |                                     |

use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use crate::backend::{Guest, RecoveryChannel, Reserved};
use crate::cancel::Cancel;
use crate::engine::clock::{Clock, Phase};
use crate::engine::nvram;
use crate::engine::storage::Called;
use crate::engine::watchdog::{self, Stage, Watchdog};
use crate::error::{Code, Error, Result};
use crate::image::MemoryImage;
use crate::migration::{Mode, Settings, Stream};
use crate::model::journal::{JournalFile, Line, Planned};

/// A step of a snapshot.
#[derive(Debug)]
pub enum Entry {
    /// A phase begins whose first step changes nothing.
    Phase(Phase),
    /// The memory image was made.
    Image(MemoryImage),
    /// The guest's UEFI variables were copied.
    Copy(nvram::Copy),
    /// The overlays are being made.
    Overlays,
    /// The stream of memory to its image is open.
    Stream(Stream),
    /// QEMU's migration settings are being changed; this is how they were found.
    Settings(Settings),
    /// The migration is being begun while the guest runs. No disk is switched yet.
    EarlyMigration,
    /// The guest is being paused while that migration sets up.
    EarlyPause,
    /// That pause came in time.
    InTime,
    /// The guest is being paused.
    Pause,
    /// The disks are being switched to their overlays.
    Switch,
    /// The storage hook was called.
    Storage(Called),
    /// The migration is being begun.
    Migration,
    /// QEMU has refused our migration: another client's background snapshot may have begun instead.
    OtherMigration,
    /// The guest runs again.
    Resume,
    /// The snapshot is being recorded.
    Record,
    /// Our migration is over, and QEMU's settings are restored. From here on any migration that is
    /// under way, and any change of the settings, is another client's.
    SettingsRestored,
    /// Everything is done and on disk; the record is being completed.
    Commit,
}

impl Entry {
    /// The phase that the snapshot is in from this entry on.
    fn phase(&self) -> Option<Phase> {
        match self {
            Entry::Phase(phase) => Some(*phase),
            Entry::EarlyMigration => Some(Phase::Prepare),
            Entry::EarlyPause | Entry::Pause => Some(Phase::Pause),
            _ => None,
        }
    }

    /// The stage that the guest is in from this entry on, given the one before.
    fn stage(&self, before: Stage) -> Stage {
        match self {
            Entry::EarlyMigration => Stage::Begun,
            Entry::EarlyPause => Stage::Racing,
            Entry::InTime => Stage::Migrating,
            Entry::Pause => Stage::Paused,
            // A guest that was paused before the snapshot must not be resumed.
            Entry::Switch if before == Stage::Paused => Stage::Switching,
            Entry::Migration if before == Stage::Switching => Stage::Migrating,
            Entry::Migration | Entry::Resume => Stage::Draining,
            Entry::SettingsRestored => Stage::Finishing,
            Entry::Commit => Stage::Committing,
            _ => before,
        }
    }
}

/// The journal, with the watchdog and the observer that it reports to. (The entries are dropped
/// before the watchdog, which is dismissed when it is dropped.)
pub struct Journal<'c, 'o> {
    pub(super) entries: Vec<Entry>,
    pub(super) watchdog: Watchdog,
    /// The durable journal, with which a later process recovers the guest if this process and the
    /// watchdog are both killed. `None` before the snapshot makes anything, and if the backend
    /// keeps none.
    pub(super) durable: Option<JournalFile>,
    /// The overlays in the durable journal.
    pub(super) overlays: Vec<String>,
    /// Disks are left to a storage hook.
    has_manual: bool,
    /// Reports to the observer, and keeps the statistics.
    pub clock: &'c mut Clock<'o>,
    /// The guest ran, and is to run again.
    pub running: bool,
    pub mode: Mode,
}

impl<'c, 'o> Journal<'c, 'o> {
    /// The journal of a snapshot that has changed nothing yet.
    pub fn new(clock: &'c mut Clock<'o>, running: bool, mode: Mode) -> Journal<'c, 'o> {
        Journal {
            entries: Vec::new(),
            watchdog: Watchdog::default(),
            durable: None,
            overlays: Vec::new(),
            has_manual: false,
            clock,
            running,
            mode,
        }
    }

    /// Notes a step.
    pub fn enter(&mut self, entry: Entry) {
        let before = self.stage();
        self.entries.push(entry);
        self.report_progress(before);
    }

    /// Begins the durable journal, before anything is made.
    pub fn begin_durable(&mut self, reserved: &Reserved, planned: Planned) -> Result<()> {
        let overlays = planned.overlays.iter();
        self.overlays = overlays.map(|overlay| overlay.overlay.clone()).collect();
        self.has_manual = !planned.manual.is_empty();
        self.durable = reserved.held().map(|held| held.begin_journal(planned)).transpose()?;
        Ok(())
    }

    /// Notes in the durable journal how far the snapshot is. Not called while the guest is paused
    /// by the snapshot, because it waits for the disk.
    pub fn note(&mut self, line: &Line) -> Result<()> {
        note(&mut self.durable, line)
    }

    /// Removes the durable journal: nothing is under way any more. A journal that cannot be removed
    /// does no harm, because a recovery finds that all is done.
    pub(super) fn end_durable(&mut self) {
        self.durable.take().map(|durable| durable.remove());
    }

    /// Removes the last entry: its step was undone, or never done.
    pub fn pop(&mut self) {
        let before = self.stage();
        self.entries.pop();
        self.report_progress(before);
    }

    fn report_progress(&mut self, before: Stage) {
        let phase = self.entries.iter().rev().find_map(Entry::phase);
        if let Some(phase) = phase.filter(|phase| *phase != self.clock.phase()) {
            self.clock.enter(phase);
        }
        let stage = self.stage();
        if stage != before {
            self.watchdog.report_stage(stage);
        }
    }

    /// The stage that the guest is in.
    pub fn stage(&self) -> Stage {
        self.entries.iter().fold(Stage::Prepared, |stage, entry| entry.stage(stage))
    }

    /// Whether the journal has an entry that matches.
    pub(super) fn has(&self, matches: impl Fn(&Entry) -> bool) -> bool {
        self.entries.iter().any(matches)
    }

    /// The memory image, which is made first.
    pub fn image(&self) -> Result<&MemoryImage> {
        image(&self.entries)
    }

    /// The copies of UEFI variables.
    pub fn copies(&self) -> impl Iterator<Item = &nvram::Copy> {
        copies(&self.entries)
    }

    /// The stream, which is opened before QEMU is changed.
    pub fn stream(&mut self) -> Result<&mut Stream> {
        self.entries
            .iter_mut()
            .find_map(|entry| if let Entry::Stream(stream) = entry { Some(stream) } else { None })
            .ok_or_else(|| missing("stream"))
    }

    /// Notes the stream. It replaces an earlier one.
    pub fn set_stream(&mut self, stream: Stream) {
        match self.stream() {
            Ok(old) => *old = stream,
            Err(_) => self.enter(Entry::Stream(stream)),
        }
    }

    /// QEMU's settings as they were found, until they are restored.
    pub fn settings(&self) -> Option<&Settings> {
        settings(&self.entries)
    }

    /// Waits until all of memory is in the image. Returns the image's size; `None` if the watchdog
    /// has ended before.
    pub fn wait_saved(&mut self, guest: &mut dyn Guest, cancel: &Cancel) -> Result<Option<u64>> {
        let Journal { entries, watchdog, clock, .. } = self;
        let stream = stream(entries).ok_or_else(|| missing("stream"))?;
        let settings = settings(entries).ok_or_else(|| missing("stream"))?;
        let (image, watchdog) = (image(entries)?, watchdog.ended());
        stream.wait_saved(guest, image, settings, watchdog, cancel, &mut **clock)
    }

    /// Waits for the storage hook that was called.
    pub fn wait_storage(&mut self, cancel: &Cancel) -> Result<()> {
        match self.entries.last_mut() {
            Some(Entry::Storage(called)) => called.wait(cancel),
            _ => Ok(()),
        }
    }

    /// Takes the stream out of the journal.
    pub(super) fn take_stream(&mut self) -> Option<Stream> {
        let at = self.entries.iter().position(|entry| matches!(entry, Entry::Stream(_)))?;
        if let Entry::Stream(stream) = self.entries.remove(at) { Some(stream) } else { None }
    }

    /// Takes the call of the storage hook out of the journal.
    pub(super) fn take_storage(&mut self) -> Option<Called> {
        let at = self.entries.iter().position(|entry| matches!(entry, Entry::Storage(_)))?;
        if let Entry::Storage(called) = self.entries.remove(at) { Some(called) } else { None }
    }

    /// Starts a watchdog for the time that the stream is open. It replaces an earlier one.
    /// `restore` are QMP commands that put the settings back; `record` is the file that exists once
    /// the snapshot is recorded; `pause_limit` is for how long the guest may be paused.
    pub fn start_watchdog(
        &mut self,
        channel: RecoveryChannel,
        held: &[BorrowedFd],
        reserved: &Reserved,
        record: Option<PathBuf>,
        pause_limit: Option<Duration>,
        restore: &[(&str, Value)],
    ) -> Result<()> {
        let stage = self.stage();
        let Journal { entries, watchdog, durable, has_manual, running, .. } = self;
        let files: Vec<_> =
            copies(entries).map(nvram::Copy::known).chain(image(entries)?.known()).collect();
        let task = watchdog::Task {
            held,
            reservation: reserved.held(),
            journal: durable.as_ref().and_then(|durable| durable.known().ok()),
            has_manual: *has_manual,
            running: *running,
            record,
            pause_limit,
            drain: stream(entries).ok_or_else(|| missing("stream"))?.drain(),
            restore,
            files: &files,
        };
        watchdog.start(channel, &task, stage);
        self.clock.stats.watchdog = self.watchdog.kind();
        let process = self.watchdog.drains()?;
        self.stream()?.start(process)
    }

    /// Whether the watchdog has ended, though it was not dismissed.
    pub fn has_lost_watchdog(&self) -> bool {
        self.watchdog.is_lost()
    }

    /// The watchdog's process, where there is one.
    pub fn watchdog_process(&self) -> Option<u32> {
        self.watchdog.process()
    }

    /// The snapshot is complete, on disk and recorded. From here on it is not undone any more.
    pub fn complete(&mut self) {
        self.watchdog.dismiss();
        self.end_durable();
    }
}

/// Appends to the durable journal, where there is one.
pub(super) fn note(durable: &mut Option<JournalFile>, line: &Line) -> Result<()> {
    durable
        .as_mut()
        .map_or(Ok(()), |durable| durable.append(line))
        .map_err(|error| Error::system("cannot write the snapshot's journal", error))
}

fn image(entries: &[Entry]) -> Result<&MemoryImage> {
    entries
        .iter()
        .find_map(|entry| if let Entry::Image(image) = entry { Some(image) } else { None })
        .ok_or_else(|| missing("image"))
}

fn copies(entries: &[Entry]) -> impl Iterator<Item = &nvram::Copy> {
    entries.iter().filter_map(|entry| if let Entry::Copy(copy) = entry { Some(copy) } else { None })
}

fn stream(entries: &[Entry]) -> Option<&Stream> {
    entries
        .iter()
        .find_map(|entry| if let Entry::Stream(stream) = entry { Some(stream) } else { None })
}

/// QEMU's settings as they were found, until they are restored.
pub(super) fn settings(entries: &[Entry]) -> Option<&Settings> {
    entries.iter().rev().find_map(|entry| match entry {
        Entry::SettingsRestored => Some(None),
        Entry::Settings(settings) => Some(Some(settings)),
        _ => None,
    })?
}

fn missing(what: &str) -> Error {
    Error::new(Code::InternalError, format!("there is no memory {what} yet"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::clock::Observer;

    /// The phases that are reported to an observer.
    #[derive(Default)]
    struct Phases(Vec<Phase>);

    impl Observer for Phases {
        fn phase(&mut self, phase: Phase) {
            self.0.push(phase);
        }
    }

    /// The stage after each of the entries, and the phases that were reported.
    fn reported(
        running: bool,
        entries: impl IntoIterator<Item = Option<Entry>>,
    ) -> (String, Vec<Phase>) {
        let mut phases = Phases::default();
        let mut clock = Clock::start(&mut phases);
        let mut journal = Journal::new(&mut clock, running, Mode::Background);
        let mut stages = String::new();
        for entry in entries {
            match entry {
                Some(entry) => journal.enter(entry),
                None => journal.pop(),
            }
            stages.push(journal.stage() as u8 as char);
        }
        drop(journal);
        phases.0.remove(0);
        (stages, phases.0)
    }

    #[test]
    fn a_guest_that_is_stopped_first_goes_through_each_stage_and_phase_once() {
        use Entry::{Commit, Migration, Overlays, Pause, Record, Resume, SettingsRestored, Switch};
        let (stages, phases) = reported(
            true,
            [
                Entry::Phase(Phase::Prepare),
                Overlays,
                Pause,
                Entry::Phase(Phase::Switch),
                Switch,
                Entry::Phase(Phase::Arm),
                Migration,
                Resume,
                Record,
                Entry::Phase(Phase::Drain),
                Entry::Phase(Phase::Finish),
                SettingsRestored,
                Commit,
            ]
            .map(Some),
        );
        assert_eq!(stages, "--PPSSMDDDDFC");
        use Phase::{Arm, Drain, Finish, Prepare};
        assert_eq!(phases, [Prepare, Phase::Pause, Phase::Switch, Arm, Drain, Finish]);
    }

    #[test]
    fn a_paused_domain_is_never_ours_to_resume() {
        let entries =
            [Entry::Overlays, Entry::Switch, Entry::Migration, Entry::Phase(Phase::Drain)];
        assert_eq!(reported(false, entries.map(Some)).0, "--DD");
    }

    #[test]
    fn an_early_start_that_was_lost_is_taken_back_and_the_next_stays_migrating() {
        use Entry::{EarlyMigration, EarlyPause, InTime, Resume, Switch};
        let entries = [
            Some(Entry::Phase(Phase::Prepare)),
            Some(EarlyMigration),
            Some(EarlyPause),
            None,
            None,
            Some(EarlyMigration),
            Some(EarlyPause),
            Some(InTime),
            Some(Switch),
            Some(Resume),
        ];
        let (stages, phases) = reported(true, entries);
        assert_eq!(stages, "-BRB-BRMMD");
        assert_eq!(phases, [Phase::Prepare, Phase::Pause, Phase::Prepare, Phase::Pause]);
    }

    #[test]
    fn a_migration_that_qemu_refuses_and_a_record_that_fails_leave_the_stage_before() {
        let entries = [
            Some(Entry::Pause),
            Some(Entry::Switch),
            Some(Entry::Migration),
            None,
            Some(Entry::OtherMigration),
            Some(Entry::SettingsRestored),
            Some(Entry::Commit),
            None,
            Some(Entry::Phase(Phase::Undo)),
        ];
        let (stages, phases) = reported(true, entries);
        assert_eq!(stages, "PSMSSFCFF");
        assert_eq!(phases, [Phase::Pause, Phase::Undo]);
    }
}
