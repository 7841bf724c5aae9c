// SPDX-License-Identifier: LGPL-2.1-or-later

//! Reverts to or deletes a snapshot whose definition a stock libvirt keeps. The domain is held
//! meanwhile.

use super::delete::managed as delete;
use super::recover::{self, Next};
use super::revert::managed as revert;
use crate::backend::exclusive::{Exclusive, Holder, busy};
use crate::backend::libvirt::ManagedSnapshot;
use crate::error::Result;
use crate::libvirt::Snapshot;
use crate::libvirt::daemon::{Step, step};
use crate::model::flags::{DeleteFlags, RevertFlags};

/// A snapshot whose domain is held for one operation.
#[derive(Debug)]
pub struct Held {
    snapshot: ManagedSnapshot,
    _exclusive: Exclusive,
    _step: Step,
}

/// The operation on a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// `qemuSnapshotRevert`.
    Revert(RevertFlags),
    /// `qemuSnapshotDelete`.
    Delete(DeleteFlags),
}

/// `qemuSnapshotRevert` of a client of stock libvirt.
pub fn revert_managed(snapshot: &Snapshot, flags: RevertFlags) -> Result<()> {
    match ManagedSnapshot::of(snapshot)? {
        Some(snapshot) => hold(snapshot)?.run(Operation::Revert(flags)),
        None => Ok(snapshot.revert(flags.bits())?),
    }
}

/// `qemuSnapshotDelete` of a client of stock libvirt.
pub fn delete_managed(snapshot: &Snapshot, flags: DeleteFlags) -> Result<()> {
    match ManagedSnapshot::of(snapshot)? {
        Some(snapshot) => hold(snapshot)?.run(Operation::Delete(flags)),
        None => Ok(snapshot.delete(flags.bits())?),
    }
}

/// Recovers and holds the domain. Returns the error `OperationInvalid` while another operation
/// holds it.
fn hold(snapshot: ManagedSnapshot) -> Result<Held> {
    recover_first(&snapshot)?;
    let exclusive = snapshot.hold()?;
    Ok(Held { snapshot, _exclusive: exclusive, _step: step() })
}

/// Recovers the domain, if a snapshot of it was interrupted.
fn recover_first(snapshot: &ManagedSnapshot) -> Result<()> {
    // It does not matter which snapshot it is: the journal is the domain's only one.
    recover::before_operation(snapshot.connector(), Next::Delete(&snapshot.name))
}

/// Recovers and holds the domain. `None` if another process holds it and this operation may be a
/// step of that process's operation: one that libvirt itself carries out without harm.
pub fn hold_unless_it_is_a_step(
    snapshot: ManagedSnapshot,
    operation: Operation,
) -> Result<Option<Held>> {
    // If the domain is held, a snapshot of it is under way, or its recovery.
    if let Ok(free) = snapshot.try_hold()? {
        drop(free);
        recover_first(&snapshot)?;
    }
    match snapshot.try_hold()? {
        Ok(exclusive) => Ok(Some(Held { snapshot, _exclusive: exclusive, _step: step() })),
        Err(Holder::Another) if is_libvirts(&snapshot, operation)? => Ok(None),
        Err(_) => Err(busy(&snapshot.label())),
    }
}

fn is_libvirts(snapshot: &ManagedSnapshot, operation: Operation) -> Result<bool> {
    match operation {
        Operation::Revert(_) => revert::is_libvirts(snapshot),
        Operation::Delete(flags) => delete::is_libvirts(snapshot, flags),
    }
}

impl Held {
    /// Runs the operation: by libvirt if that works and does no harm.
    pub fn run(&self, operation: Operation) -> Result<()> {
        match operation {
            Operation::Revert(flags) => revert::run(&self.snapshot, flags),
            Operation::Delete(flags) => delete::run(&self.snapshot, flags),
        }
    }
}
