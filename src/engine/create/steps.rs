// SPDX-License-Identifier: LGPL-2.1-or-later

//! The steps of a snapshot, which its three orders share (`make.rs`).

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::journal::{Entry, Journal};
use super::plan::Task;
use super::prepare::{Prepared, start_watchdog};
use crate::backend::{DEFAULT_TIMEOUT, Guest};
use crate::cancel::Cancel;
use crate::deadline::Deadline;
use crate::engine::clock::Phase;
use crate::engine::durable::{Unflushed, sync_images};
use crate::engine::nvram;
use crate::engine::storage::{Called, StorageCall};
use crate::error::{Error, Result, fail};
use crate::image::Format;
use crate::migration::early_start::{self, Sample};
use crate::migration::{FD_NAME, Flow, Mode, PopulateProgress, run_state, wait_armed};
use crate::model::journal::Line;
use crate::model::{Frozen, ManualDisk, Record, RecordedDisk, State};
use crate::monitor::Failure;
use crate::monitor::commands;

/// A snapshot that is being made.
pub struct Steps<'a, 'c, 'o> {
    pub task: &'a Task<'a>,
    pub guest: &'a mut dyn Guest,
    pub cancel: &'a Cancel,
    pub journal: &'a mut Journal<'c, 'o>,
    pub prepared: Prepared<'a>,
    /// How often the watchdog was replaced.
    pub replaced: u32,
}

/// Memory and disks that are captured at one instant.
pub struct Captured {
    /// The progress of saving memory.
    flow: Flow,
    /// The size of the image, where all of memory is saved already.
    saved: Option<u64>,
    /// The early start, where there was one.
    begun: Option<Begun>,
}

/// A successful early start: the migration has begun while the guest ran, and the guest is paused
/// now.
pub struct Begun {
    /// When the pause must end.
    pub deadline: Deadline,
    pub populate: PopulateProgress,
    pub stopping: Duration,
}

impl Steps<'_, '_, '_> {
    /// When the pause must end. The pauses of lost tries count too.
    pub fn pause_deadline(&self) -> Deadline {
        let lost = self.journal.clock.stats.lost_pause;
        Deadline::after(self.task.options.pause_limit.saturating_sub(lost))
    }

    /// Looks whether the watchdog is still there. If another process has killed it, another takes
    /// its place, and goes on with the stream. That takes some milliseconds, and even in the pause
    /// they are worth it: if this process were killed next, the guest would stay paused.
    pub fn replace_lost_watchdog(&mut self) -> Result<()> {
        /// An administrator's tool or a policy may kill each of them.
        const MOST: u32 = 100;
        if !self.journal.has_lost_watchdog() {
            return Ok(());
        }
        self.replaced += 1;
        if self.replaced > MOST {
            fail!(SystemError, "the watchdog process was killed {MOST} times");
        }
        let settings = &self.prepared.settings;
        start_watchdog(self.task, self.guest, settings, self.journal)?;
        // Without that, the record of the settings names this process, and a process that has
        // ended.
        let _ = settings.watch(self.guest, self.task.mode, self.journal.watchdog_process());
        Ok(())
    }

    /// Looks whether the limit of the pause has passed: from then on the watchdog may resume the
    /// guest.
    fn check_limit(&self, deadline: Deadline) -> Result<()> {
        if self.task.running && deadline.left().is_none() {
            fail!(OperationTimeout, "the limit of the guest's pause has passed");
        }
        Ok(())
    }

    pub fn pause(&mut self, deadline: Deadline) -> Result<()> {
        self.journal.enter(Entry::Pause);
        self.guest.pause(deadline)?;
        self.journal.clock.paused();
        self.cancel.check()
    }

    pub fn switch_disks(&mut self, deadline: Deadline) -> Result<()> {
        self.replace_lost_watchdog()?;
        self.journal.enter(Entry::Phase(Phase::Switch));
        self.prepared.sizes.check_planned(self.guest, deadline)?;
        self.journal.enter(Entry::Switch);
        self.guest.switch_disks(&self.task.reserved.name, deadline)?;
        self.prepared.sizes.check_switched(self.guest, deadline)?;
        self.journal.clock.switched();
        self.cancel.check()
    }

    /// Calls the storage hook, which snapshots the disks that QEMU does not.
    pub fn snapshot_storage(&mut self, deadline: Deadline) -> Result<()> {
        let Task { plan, options, reserved, .. } = self.task;
        let Some(hook) = options.storage.clone().filter(|_| !plan.manual.is_empty()) else {
            return Ok(());
        };
        let left = deadline.left().unwrap_or_default();
        let call = StorageCall {
            snapshot: reserved.name.clone(),
            disks: plan.manual.iter().map(Into::into).collect(),
            paused: self.journal.clock.pause_so_far(),
            left: hook.deadline().map_or(left, |own| own.min(left)),
        };
        let unflushed: Unflushed = std::mem::take(&mut self.prepared.unflushed);
        self.journal.enter(Entry::Storage(Called::begin(hook, call, unflushed)?));
        self.journal.wait_storage(self.cancel)?;
        // The hook can take long.
        self.replace_lost_watchdog()
    }

    /// Begins the migration of a paused guest.
    pub fn start_migration(&mut self, deadline: Deadline) -> Result<()> {
        self.replace_lost_watchdog()?;
        self.journal.enter(Entry::Phase(Phase::Arm));
        self.check_limit(deadline)?;
        if self.task.mode == Mode::Background && !self.guest.capabilities().background_keeps_paused
        {
            // This QEMU has resumed the guest by the time of the arming, and the guest writes.
            self.prepared.write_check.check(self.guest, deadline)?;
        }
        self.cancel.check()?;
        // Unlocked as late as possible: from here until `migrate` another client's save would be a
        // background snapshot ([`Entry::OtherMigration`]).
        self.prepared.settings.unlock(self.guest, deadline)?;
        // Checked last, because QEMU cannot capture the guest in another state.
        run_state::check(self.guest, self.task.expected_state, deadline)?;
        self.migrate(Entry::Migration, deadline)
    }

    /// Begins the migration, and notes it as `entry`. Locks other clients out again while it sets
    /// up: a migration that they begin after its end must not be a background snapshot.
    pub fn migrate(&mut self, entry: Entry, deadline: Deadline) -> Result<()> {
        self.journal.enter(entry);
        commands::migrate(self.guest, FD_NAME, deadline).map_err(|failure| {
            if matches!(failure, Failure::Refused(..)) {
                // If a migration is under way, it is another client's.
                self.journal.pop();
                if self.task.mode == Mode::Background {
                    self.journal.enter(Entry::OtherMigration);
                }
            }
            failure.into_error("cannot start saving memory")
        })?;
        self.prepared.settings.lock(self.guest, deadline)
    }

    /// Waits until the memory of this instant is safe: write tracking is armed, or all is saved.
    pub fn capture(&mut self, begun: Option<Begun>, deadline: Deadline) -> Result<Captured> {
        match self.task.mode {
            Mode::Background => {
                let running = self.task.running;
                let migration = wait_armed(self.guest, running, self.cancel, deadline)?;
                self.journal.clock.stats.setup = migration.setup_time();
                self.journal.clock.stats.started_early = begun.is_some();
                if self.guest.capabilities().background_keeps_paused {
                    self.prepared.write_check.check(self.guest, deadline)?;
                }
                // Armed before that, the guest may run.
                self.check_limit(deadline)?;
                let flow = self.journal.stream()?.flow(Some(&migration));
                Ok(Captured { flow, saved: None, begun })
            }
            Mode::Paused => {
                let bytes = self.wait_saved()?;
                // If the guest ran meanwhile, QEMU has saved its newer memory, while its writes to
                // disks are on the overlays.
                let deadline = Deadline::after(DEFAULT_TIMEOUT);
                self.prepared.write_check.check(self.guest, deadline)?;
                let flow = Flow { done: bytes, total: bytes, ..Flow::default() };
                Ok(Captured { flow, saved: Some(bytes), begun })
            }
        }
    }

    pub fn resume(&mut self) -> Result<()> {
        self.guest.resume(Deadline::after(DEFAULT_TIMEOUT))?;
        self.journal.enter(Entry::Resume);
        // From here on a pause is another client's. The observer comes later.
        let noted = self.journal.note(&Line::Resumed);
        self.journal.clock.resumed(self.guest.last_pause());
        noted
    }

    /// Reports that the instant has passed, and records the snapshot.
    pub fn pass_instant(&mut self, captured: &Captured) -> Result<Record> {
        let instant = SystemTime::now();
        // The guest runs, and its memory flows: without a process that moves it, QEMU stops soon.
        self.replace_lost_watchdog()?;
        // Checked before the event: after it the caller may resize disks and change devices.
        self.prepared.sizes.check_captured(self.guest)?;
        self.task.devices.check(self.guest)?;
        self.journal.clock.instant(captured.flow);
        if self.task.mode == Mode::Background {
            self.record_samples(captured.begun.as_ref());
        }
        let record = self.record(instant)?;
        self.journal.note(&Line::Passed { record: record.to_xml() })?;
        if self.task.flags.keeps_metadata() {
            self.journal.enter(Entry::Record);
            self.guest.register(&record, self.task.image_format)?;
        }
        Ok(record)
    }

    /// Records the samples that the guest's next early start is estimated from.
    fn record_samples(&self, begun: Option<&Begun>) {
        let identity = &self.guest.identity();
        let stats = &self.journal.clock.stats;
        match begun {
            Some(Begun { populate, stopping, .. }) => {
                let work = populate.total_at(stats.setup);
                early_start::record(identity, Sample::Running(work));
                early_start::record(identity, Sample::Stopping(*stopping));
            }
            None => {
                early_start::record(identity, Sample::Stopped(stats.setup));
                if self.task.running {
                    // Here the query after the stop is missing.
                    let stopping = stats.phase(Phase::Pause) * 3 / 2;
                    early_start::record(identity, Sample::Stopping(stopping));
                }
            }
        }
    }

    /// Waits until all of memory is in the image. Returns the image's size.
    fn wait_saved(&mut self) -> Result<u64> {
        loop {
            match self.journal.wait_saved(self.guest, self.cancel)? {
                Some(bytes) => return Ok(bytes),
                None => self.replace_lost_watchdog()?,
            }
        }
    }

    /// Waits until all of memory is in the image. Returns the format that the image has.
    pub fn drain(&mut self, captured: &Captured) -> Result<Format> {
        let bytes = match captured.saved {
            Some(bytes) => bytes,
            None => {
                self.journal.enter(Entry::Phase(Phase::Drain));
                self.wait_saved()?
            }
        };
        let format = self.journal.stream()?.drain().format();
        self.journal.clock.saved(bytes, format);
        self.cancel.check()?;
        Ok(format)
    }

    /// Puts QEMU's settings back, writes the snapshot to stable storage, and records it. `format`:
    /// see [`Steps::drain`].
    pub fn finish(mut self, record: Record, format: Format) -> Result<Record> {
        self.replace_lost_watchdog()?;
        let Steps { task, guest, cancel, journal, prepared, .. } = self;
        journal.enter(Entry::Phase(Phase::Finish));
        if task.running {
            // Checked while other clients are locked out: if the guest is stopped now, their
            // migration was not the cause.
            check_runs_on(guest)?;
        }
        prepared.settings.restore(guest, task.mode)?;
        journal.enter(Entry::SettingsRestored);
        let image = journal.image()?;
        if let Some(state) = image.state_at_instant()? {
            run_state::check_text(&state, task.expected_state)?;
        }
        cancel.check()?;
        sync_images(&task.plan.disks, guest.pid())?;
        // libvirt keeps a domain's image with the permissions that it expects.
        if task.reserved.memory_file.is_some() {
            image.protect()?;
        }
        image.complete(format)?;
        if format != Format::Raw {
            journal.clock.stats.memory_image_bytes = image.occupied()?;
        }
        journal.copies().try_for_each(nvram::Copy::check_unchanged)?;
        cancel.check()?;
        guest.confirm()?;
        if !guest.capabilities().keeps_firmware_copies {
            journal.copies().try_for_each(nvram::Copy::remove)?;
        }
        journal.note(&Line::Complete)?;
        journal.enter(Entry::Commit);
        let record = match task.flags.keeps_metadata() {
            true => guest.commit(task.reserved, record).inspect_err(|_| journal.pop())?,
            false => record,
        };
        journal.complete();
        Ok(record)
    }

    fn record(&self, instant: SystemTime) -> Result<Record> {
        let task = self.task;
        let since_epoch = instant.duration_since(UNIX_EPOCH);
        let disks = task.plan.disks.iter().map(|disk| RecordedDisk {
            name: disk.drive.name().into(),
            overlay: disk.overlay.clone(),
            image: disk.drive.file.clone(),
            format: disk.drive.format.clone(),
            frozen: Frozen::of_all(std::iter::once(&disk.drive.file).chain(&disk.drive.backing)),
        });
        let manual = task.plan.manual.iter().map(ManualDisk::from);
        let Some(memory_file) = task.memory_file.to_str() else {
            return Err(Error::system(
                "the memory image's path",
                std::io::Error::other("is not UTF-8"),
            ));
        };
        Ok(Record {
            name: task.reserved.name.clone(),
            description: task.description.clone(),
            parent: None,
            creation_time: since_epoch.unwrap_or_default().as_secs(),
            state: if task.running { State::Running } else { State::Paused },
            memory_file: memory_file.into(),
            disks: disks.collect(),
            manual: manual.collect(),
            nvram: self.journal.copies().map(|copy| copy.recorded.clone()).collect(),
            domain_xml: task.about.domain_xml.clone(),
        })
    }
}

/// Returns an error if the guest was stopped because of the snapshot. Called when its memory is
/// saved.
fn check_runs_on(guest: &mut dyn Guest) -> Result<()> {
    match guest.status()?.status.as_str() {
        "io-error" => fail!(
            OperationFailed,
            "the guest was stopped by an I/O error (its state is 'io-error') while its memory was \
             being saved: the file system of an overlay is full, or fails"
        ),
        "postmigrate" => fail!(
            OperationFailed,
            "the guest was stopped when its memory was saved, because another client has switched \
             QEMU's migration capability 'background-snapshot' off: take the snapshot again"
        ),
        _ => Ok(()),
    }
}
