//! A revert or a delete of a snapshot that is in reach, for as long as its domain is held.

use super::managed_snapshot::ManagedSnapshot;
use crate::backend::exclusive::{Exclusive, Holder, busy};
use crate::error::Result;
use crate::libvirt::Snapshot;
use crate::libvirt::daemon::{Step, step};
use crate::model::flags::{DeleteFlags, RevertFlags};

/// A snapshot in reach, whose domain is held for one operation.
#[derive(Debug)]
pub struct Held {
    snapshot: ManagedSnapshot,
    _exclusive: Exclusive,
    _step: Step,
}

/// What is done with a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// `qemuSnapshotRevert`.
    Revert(RevertFlags),
    /// `qemuSnapshotDelete`.
    Delete(DeleteFlags),
}

/// `qemuSnapshotRevert` of a client of stock libvirt.
pub fn revert(snapshot: &Snapshot, flags: RevertFlags) -> Result<()> {
    match ManagedSnapshot::of(snapshot)? {
        Some(snapshot) => snapshot.hold()?.run(Operation::Revert(flags)),
        None => Ok(snapshot.revert(flags.bits())?),
    }
}

/// `qemuSnapshotDelete` of a client of stock libvirt.
pub fn delete(snapshot: &Snapshot, flags: DeleteFlags) -> Result<()> {
    match ManagedSnapshot::of(snapshot)? {
        Some(snapshot) => snapshot.hold()?.run(Operation::Delete(flags)),
        None => Ok(snapshot.delete(flags.bits())?),
    }
}

impl ManagedSnapshot {
    /// Holds the domain. Another's operation on it is `OperationInvalid`.
    pub fn hold(self) -> Result<Held> {
        let exclusive = self.connector.hold()?;
        Ok(self.held(exclusive))
    }

    /// The same; None where another process holds it, and this can be a step of what that does:
    /// what libvirt does without harm.
    pub fn hold_unless_it_is_a_step(self, operation: Operation) -> Result<Option<Held>> {
        match Exclusive::try_take(self.connector.held_name())? {
            Ok(exclusive) => Ok(Some(self.held(exclusive))),
            Err(Holder::Another) if self.is_libvirts(operation)? => Ok(None),
            Err(_) => Err(busy(&self.connector.whose())),
        }
    }

    fn is_libvirts(&self, operation: Operation) -> Result<bool> {
        match operation {
            Operation::Revert(_) => super::revert::is_libvirts(self),
            Operation::Delete(flags) => super::delete::is_libvirts(self, flags),
        }
    }

    fn held(self, exclusive: Exclusive) -> Held {
        Held { snapshot: self, _exclusive: exclusive, _step: step() }
    }
}

impl Held {
    /// Does it: by libvirt where that works and does no harm.
    pub fn run(&self, operation: Operation) -> Result<()> {
        match operation {
            Operation::Revert(flags) => super::revert::run(&self.snapshot, flags),
            Operation::Delete(flags) => super::delete::run(&self.snapshot, flags),
        }
    }
}
