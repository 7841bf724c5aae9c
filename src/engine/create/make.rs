// SPDX-License-Identifier: LGPL-2.1-or-later

//! Makes a snapshot that was planned, by its steps in one of three orders.

use super::journal::{Entry, Journal};
use super::plan::Task;
use super::prepare::prepare;
use super::steps::{Begun, Captured, Steps};
use crate::backend::Guest;
use crate::cancel::Cancel;
use crate::engine::clock::Phase;
use crate::error::Result;
use crate::migration::{Mode, Settings, reactivate_disks};
use crate::model::Record;
use crate::model::journal::Line;

/// Makes the snapshot that was planned.
pub fn make(
    task: &Task,
    guest: &mut dyn Guest,
    settings: Settings,
    cancel: &Cancel,
    journal: &mut Journal,
) -> Result<Record> {
    let prepared = prepare(task, guest, settings, cancel, journal)?;
    let mut steps = Steps { task, guest, cancel, journal, prepared, replaced: 0 };
    steps.replace_lost_watchdog()?;
    steps.journal.note(&Line::Switching)?;
    let captured = if !task.running {
        steps.capture_paused_domain()?
    } else if let Some(begun) = steps.start_early()? {
        steps.capture_started_early(begun)?
    } else {
        steps.capture_stopped_first()?
    };
    let record = steps.pass_instant(&captured)?;
    let format = steps.drain(&captured)?;
    steps.finish(record, format)
}

impl Steps<'_, '_, '_> {
    /// Captures a domain that was paused before the snapshot. It stays paused.
    fn capture_paused_domain(&mut self) -> Result<Captured> {
        let deadline = self.pause_deadline();
        self.switch_disks(deadline)?;
        self.snapshot_storage(deadline)?;
        self.start_migration(deadline)?;
        let captured = self.capture(None, deadline)?;
        if self.task.mode == Mode::Paused {
            reactivate_disks(self.guest)?;
        }
        Ok(captured)
    }

    /// Stops the guest, and then begins the migration.
    fn capture_stopped_first(&mut self) -> Result<Captured> {
        let deadline = self.pause_deadline();
        self.pause(deadline)?;
        self.switch_disks(deadline)?;
        self.snapshot_storage(deadline)?;
        self.start_migration(deadline)?;
        let captured = self.capture(None, deadline)?;
        self.resume()?;
        Ok(captured)
    }

    /// Captures a guest that was stopped in time after an early start of the migration.
    fn capture_started_early(&mut self, begun: Begun) -> Result<Captured> {
        let deadline = begun.deadline;
        self.switch_disks(deadline)?;
        self.snapshot_storage(deadline)?;
        self.replace_lost_watchdog()?;
        self.journal.enter(Entry::Phase(Phase::Arm));
        let captured = self.capture(Some(begun), deadline)?;
        self.resume()?;
        Ok(captured)
    }
}
