//! Snapshots of a domain of a stock libvirt that are our affair too: where its own revert and delete are lacking, or do harm.

use super::recorded::Recorded;
use super::{LibvirtConnector, check_connection};
use crate::error::Result;
use crate::flags;
use crate::guest::exclusive::{Exclusive, Holder, busy};
use crate::libvirt::daemon::{Step, step};
use crate::libvirt::{Connect, Domain, Snapshot};

/// A snapshot of memory in a file and disks on overlays, whose files are in reach.
#[derive(Debug)]
pub struct Reach {
    pub(super) snapshot: Snapshot,
    pub(super) domain: Domain,
    pub(super) connect: Connect,
    connector: LibvirtConnector,
}

/// The same, and its domain is held for one operation.
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
    /// None where the snapshot is libvirt's alone. No file is looked at.
    pub fn of(snapshot: &Snapshot) -> Result<Option<Reach>> {
        let domain = snapshot.domain().map_err(|error| error.into_error("cannot find the domain of the snapshot"))?;
        let connect =
            domain.connect().map_err(|error| error.into_error("cannot find the connection of the snapshot"))?;
        // On another machine the files are out of reach.
        if check_connection(&connect).is_err() || !is_ours(&Recorded::read(snapshot.clone())?) {
            return Ok(None);
        }
        let connector = LibvirtConnector::open(domain.clone())?;
        Ok(Some(Reach { snapshot: snapshot.clone(), domain, connect, connector }))
    }

    /// Whose it is.
    pub fn domain(&self) -> &Domain {
        &self.domain
    }

    /// libvirt's version.
    pub(super) fn version(&self) -> Result<(u64, u64, u64)> {
        self.connect.version().map_err(|error| error.into_error("cannot ask libvirt for its version"))
    }

    /// What stands for the domain in this process.
    pub fn domain_uuid(&self) -> &str {
        &self.connector.uuid
    }

    /// Holds the domain. Another's operation on it is `OperationInvalid`.
    pub fn hold(self) -> Result<Held> {
        let exclusive = self.connector.hold()?;
        Ok(self.held(exclusive))
    }

    /// The same; None where another process holds it, and this can be a step of what that does: what libvirt does without harm.
    pub fn hold_unless_it_is_a_step(self, operation: Operation, flags: u32) -> Result<Option<Held>> {
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

/// Whether a snapshot is one of memory in a file and disks on overlays.
pub fn is_ours(snapshot: &Recorded) -> bool {
    snapshot.memory.is_some() && matches!(snapshot.state.as_str(), "running" | "paused") && !snapshot.is_internal()
}
