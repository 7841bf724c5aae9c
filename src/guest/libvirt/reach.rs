//! Snapshots of a domain of a stock libvirt that are our affair too: where its own revert and delete are lacking, or do harm.

use super::recorded::Recorded;
use super::{LibvirtConnector, check_connection};
use crate::error::Result;
use crate::flags;
use crate::guest::exclusive::{Exclusive, Holder};
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

/// `qemuSnapshotRevert` of a client of stock libvirt.
pub fn revert(snapshot: &Snapshot, flags: u32) -> Result<()> {
    flags::revert::check(flags)?;
    match Reach::of(snapshot)? {
        Some(reach) => reach.hold()?.revert(flags),
        None => Ok(snapshot.revert(flags)?),
    }
}

/// `qemuSnapshotDelete` of a client of stock libvirt.
pub fn delete(snapshot: &Snapshot, flags: u32) -> Result<()> {
    flags::delete::check(flags)?;
    match Reach::of(snapshot)? {
        Some(reach) => reach.hold()?.delete(flags),
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

    /// What stands for the domain in this process.
    pub fn domain_uuid(&self) -> &str {
        &self.connector.uuid
    }

    /// Holds the domain. Another's operation on it is `OperationInvalid`.
    pub fn hold(self) -> Result<Held> {
        let exclusive = self.connector.hold()?;
        Ok(self.held(exclusive))
    }

    /// The same; None where another process holds it.
    pub fn hold_unless_another(self) -> Result<Option<Held>> {
        match Exclusive::try_take(self.connector.held_name())? {
            Ok(exclusive) => Ok(Some(self.held(exclusive))),
            Err(Holder::Another) => Ok(None),
            Err(Holder::Us) => self.hold().map(Some),
        }
    }

    fn held(self, exclusive: Exclusive) -> Held {
        Held { reach: self, _exclusive: exclusive, _step: step() }
    }
}

impl Held {
    /// Reverts to it: by libvirt where that works and does no harm.
    pub fn revert(&self, flags: u32) -> Result<()> {
        super::revert::run(&self.reach, flags)
    }

    /// Deletes it, likewise.
    pub fn delete(&self, flags: u32) -> Result<()> {
        super::delete::run(&self.reach, flags)
    }
}

/// Whether a snapshot is one of memory in a file and disks on overlays.
pub fn is_ours(snapshot: &Recorded) -> bool {
    snapshot.memory.is_some() && matches!(snapshot.state.as_str(), "running" | "paused") && !snapshot.is_internal()
}
