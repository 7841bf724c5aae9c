//! A revert or a delete of a snapshot that is in reach, for as long as its domain is held.

use super::reach::Reach;
use crate::backend::exclusive::{Exclusive, Holder, busy};
use crate::error::Result;
use crate::libvirt::Snapshot;
use crate::libvirt::daemon::{Step, step};
use crate::model::flags;

/// A snapshot in reach, whose domain is held for one operation.
#[derive(Debug)]
pub struct Held {
    reach: Reach,
    _exclusive: Exclusive,
    _step: Step,
}

/// What is done with a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// `qemuSnapshotRevert`.
    Revert,
    /// `qemuSnapshotDelete`.
    Delete,
}

/// `qemuSnapshotRevert` of a client of stock libvirt.
pub fn revert(snapshot: &Snapshot, flags: u32) -> Result<()> {
    flags::revert::check(flags)?;
    match Reach::of(snapshot)? {
        Some(reach) => reach.hold()?.run(Operation::Revert, flags),
        None => Ok(snapshot.revert(flags)?),
    }
}

/// `qemuSnapshotDelete` of a client of stock libvirt.
pub fn delete(snapshot: &Snapshot, flags: u32) -> Result<()> {
    flags::delete::check(flags)?;
    match Reach::of(snapshot)? {
        Some(reach) => reach.hold()?.run(Operation::Delete, flags),
        None => Ok(snapshot.delete(flags)?),
    }
}

impl Reach {
    /// Holds the domain. Another's operation on it is `OperationInvalid`.
    pub fn hold(self) -> Result<Held> {
        let exclusive = self.connector.hold()?;
        Ok(self.held(exclusive))
    }

    /// The same; None where another process holds it, and this can be a step of what that does:
    /// what libvirt does without harm.
    pub fn hold_unless_it_is_a_step(
        self,
        operation: Operation,
        flags: u32,
    ) -> Result<Option<Held>> {
        match Exclusive::try_take(self.connector.held_name())? {
            Ok(exclusive) => Ok(Some(self.held(exclusive))),
            Err(Holder::Another) if self.is_libvirts(operation, flags)? => Ok(None),
            Err(_) => Err(busy(&self.connector.whose())),
        }
    }

    fn is_libvirts(&self, operation: Operation, flags: u32) -> Result<bool> {
        match operation {
            Operation::Revert => super::revert::is_libvirts(self),
            Operation::Delete => super::delete::is_libvirts(self, flags),
        }
    }

    fn held(self, exclusive: Exclusive) -> Held {
        Held { reach: self, _exclusive: exclusive, _step: step() }
    }
}

impl Held {
    /// Does it: by libvirt where that works and does no harm.
    pub fn run(&self, operation: Operation, flags: u32) -> Result<()> {
        match operation {
            Operation::Revert => super::revert::run(&self.reach, flags),
            Operation::Delete => super::delete::run(&self.reach, flags),
        }
    }
}
