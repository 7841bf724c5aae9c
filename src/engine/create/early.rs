// SPDX-License-Identifier: LGPL-2.1-or-later

//! The early start: begins the migration while the guest runs, and pauses the guest in time.
//! See [`early_start`].

use std::time::Instant;

use super::journal::Entry;
use super::prepare::open_stream;
use super::steps::{Begun, Steps};
use crate::backend::DEFAULT_TIMEOUT;
use crate::deadline::Deadline;
use crate::error::Result;
use crate::migration::early_start::{self, Sample};
use crate::migration::{Mode, PopulateProgress, run_state, wait_armed};
use crate::model::journal::Line;
use crate::monitor::commands;

impl Steps<'_, '_, '_> {
    /// Begins the migration while the guest runs, and pauses the guest in time, where that is worth
    /// it. `None` if no migration is under way: the guest has to be stopped first.
    pub fn start_early(&mut self) -> Result<Option<Begun>> {
        if self.task.mode != Mode::Background || !self.guest.capabilities().background_keeps_paused
        {
            return Ok(None);
        }
        let early_start = self.task.options.early_start;
        let identity = self.guest.identity();
        let memory = commands::query_memory_size(self.guest, Deadline::after(DEFAULT_TIMEOUT))?;
        while self.journal.clock.stats.lost < early_start.tries {
            let lost = self.journal.clock.stats.lost;
            let estimated = || early_start::estimate(&identity, memory, lost);
            let Some(stop_after) = early_start.stop_after.or_else(estimated) else {
                return Ok(None);
            };
            self.prepared.settings.unlock(self.guest, Deadline::after(DEFAULT_TIMEOUT))?;
            let process = if early_start.stop_after.is_none() { self.guest.pid() } else { None };
            let mut populate = PopulateProgress::begin(process);
            self.migrate(Entry::EarlyMigration, Deadline::after(DEFAULT_TIMEOUT))?;
            while let Some(rest) = stop_after
                .checked_sub(populate.done())
                .filter(|rest| *rest >= early_start::TOLERANCE)
            {
                self.cancel.wait(PopulateProgress::interval(rest))?;
            }

            // The deadline comes first: the watchdog's limit must not pass before it.
            let deadline = self.pause_deadline();
            self.journal.enter(Entry::EarlyPause);
            let ordered = Instant::now();
            self.guest.pause(deadline)?;
            // This check comes first: if the guest was reset, it must run again before QEMU begins
            // the capture.
            let is_stopped = run_state::is_stopped(self.guest, deadline)?;
            let migration = commands::query_migrate(self.guest, deadline)?;
            let stopping = ordered.elapsed();
            if is_stopped && migration.is_setting_up() {
                self.journal.enter(Entry::InTime);
                self.journal.clock.paused();
                self.cancel.check()?;
                return Ok(Some(Begun { deadline, populate, stopping }));
            }
            // The stop came too late; or the guest was reset, and runs again.
            let setup = wait_armed(self.guest, true, self.cancel, deadline)?.setup_time();
            self.guest.resume(Deadline::after(DEFAULT_TIMEOUT))?;
            self.journal.note(&Line::Resumed)?;
            self.journal.clock.lost();
            self.journal.pop();
            early_start::record(&identity, Sample::Running(populate.total_at(setup)));
            early_start::record(&identity, Sample::Stopping(stopping));
            self.prepare_again()?;
            self.cancel.check()?;
            self.journal.note(&Line::Switching)?;
        }
        Ok(None)
    }

    /// Discards the memory that was saved, and opens a new stream to the image.
    fn prepare_again(&mut self) -> Result<()> {
        let mode = self.task.mode;
        let stream = self.journal.stream()?;
        stream.give_up(self.guest, mode)?;
        stream.wait_given_up(self.guest, mode)?;
        stream.wait_discarded(self.cancel)?;
        self.journal.image()?.discard_stream()?;
        let settings = &self.prepared.settings;
        // That migration is over: the next watchdog begins where none has begun.
        self.journal.pop();
        open_stream(self.task, self.guest, settings, self.journal)?;
        settings.watch(self.guest, mode, self.journal.watchdog_process())?;
        self.journal.stream()?.pass(self.guest)
    }
}
