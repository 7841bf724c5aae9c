// SPDX-License-Identifier: LGPL-2.1-or-later

//! Takes a snapshot.
//!
//! A request is planned (`plan.rs`). Then the snapshot is made by steps (`prepare.rs`, `early.rs`,
//! `steps.rs`), in one of three orders (`make.rs`). Each step is noted in the journal
//! (`journal.rs`), which tells the undo (`undo.rs`) what to put back.

mod devices;
mod early;
mod journal;
mod make;
mod plan;
mod prepare;
mod sizes;
mod steps;
mod undo;

use std::panic::{AssertUnwindSafe, catch_unwind};

use self::journal::Journal;
pub use self::plan::check_state;
use self::plan::{GuestState, Task, check_memory_request};
use crate::backend::{Connector, SnapshotList};
use crate::cancel::Cancel;
use crate::engine::clock::{Clock, Phase};
use crate::engine::options::Options;
use crate::engine::page_server::arrival::when_arrived;
use crate::engine::recover::{self, Next};
use crate::error::{Result, fail};
use crate::libvirt::Snapshot;
use crate::migration::{Mode, Settings};
use crate::model::flags::CreateFlags;
use crate::model::{Record, Request, validate};

/// A snapshot that is complete.
#[derive(Debug)]
pub struct Created {
    /// Its name.
    pub name: String,
    /// Its record, also where it was not recorded; none where the connector has delegated the
    /// snapshot.
    record: Option<Record>,
    /// The snapshot was recorded.
    recorded: bool,
    /// libvirt's object for the snapshot, if libvirt was involved in it.
    pub object: Option<Snapshot>,
}

impl Created {
    /// Its `<domainsnapshot>`: that of the snapshot list, if the snapshot is recorded there.
    pub fn xml(&self, snapshot_list: &dyn SnapshotList) -> Result<String> {
        match (&self.record, self.recorded) {
            (Some(record), false) => Ok(record.to_xml()),
            // Another client may have deleted it by now, or the daemon may be unavailable.
            (Some(record), true) => {
                Ok(snapshot_list.xml(&self.name).unwrap_or_else(|_| record.to_xml()))
            }
            (None, _) => snapshot_list.xml(&self.name),
        }
    }

    fn by_libvirt(object: Snapshot) -> Created {
        Created { name: object.name(), record: None, recorded: true, object: Some(object) }
    }
}

/// Takes a snapshot.
pub fn create(
    connector: &dyn Connector,
    xml: &str,
    flags: CreateFlags,
    options: Options,
    cancel: &Cancel,
    clock: &mut Clock,
) -> Result<Created> {
    cancel.check()?;
    if !flags.is_instant()
        && let Some(delegated) = connector.delegate(xml, flags)
    {
        return delegated.map(Created::by_libvirt);
    }
    flags.require_supported(connector.supported_flags())?;
    if flags.validates() {
        validate(xml)?;
    }
    let request = Request::parse(xml)?;
    check_memory_request(flags, &request)?;
    recover::before_operation(connector, Next::Create)?;
    let reserved = connector.reserve(request.name.as_deref())?;
    let mut guest = connector.begin()?;
    let guest = &mut *guest;
    let state = when_arrived(guest, check_state)?;
    let running = state == GuestState::Running;
    if !running && let Some(delegated) = connector.delegate(xml, flags) {
        return delegated.map(Created::by_libvirt);
    }
    guest.check_flags(flags)?;
    let mode = match (flags.is_instant(), state) {
        (true, GuestState::Running) => Mode::Background,
        // The guest must stay paused, and not every QEMU leaves it paused.
        (true, GuestState::Paused) if guest.capabilities().background_keeps_paused => {
            Mode::Background
        }
        // QEMU 10.0 ends on a background snapshot of a guest that was never started.
        _ => Mode::Paused,
    };
    let settings = when_arrived(guest, Settings::read)?;
    if flags.is_instant() {
        settings.require_background()?;
    }
    if mode == Mode::Background && running {
        guest.check_memory_not_shared()?;
    }
    cancel.check()?;

    clock.enter(Phase::Plan);
    let task = Task::plan(guest, request, flags, &reserved, options, state, mode)?;
    cancel.check()?;
    clock.stats.disks = task.plan.disks.len();

    let mut journal = Journal::new(clock, running, mode);
    let make = AssertUnwindSafe(|| make::make(&task, guest, settings, cancel, &mut journal));
    // Even after a panic of ours the guest must not stay paused.
    let record = match catch_unwind(make)
        .unwrap_or_else(|_| fail!(InternalError, "a defect of instantsnap, please report it"))
    {
        Ok(record) => record,
        Err(error) => return Err(journal.undo(guest, error)),
    };
    if flags.halts() {
        guest
            .halt()
            .map_err(|error| error.and(format!("the snapshot '{}' is complete", record.name)))?;
    }
    Ok(Created {
        name: record.name.clone(),
        record: Some(record),
        recorded: flags.keeps_metadata(),
        object: guest.take_object(),
    })
}
