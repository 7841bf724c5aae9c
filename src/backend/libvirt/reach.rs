//! Snapshots of a domain of a stock libvirt that are our affair too: where its own revert and
//! delete are lacking, or do harm.

use std::sync::Mutex;

use super::call::Caller;
use super::connector::{LibvirtConnector, check_connection};
use super::recorded::Recorded;
use crate::error::Result;
use crate::libvirt::{Connect, Domain, Snapshot};

/// A snapshot of memory in a file and disks on overlays, whose files are in reach.
#[derive(Debug)]
pub struct Reach {
    pub(super) snapshot: Snapshot,
    pub(super) domain: Domain,
    pub(super) connect: Connect,
    pub(super) connector: LibvirtConnector,
    /// Makes calls that have an end.
    pub(super) caller: Mutex<Caller>,
}

impl Reach {
    /// None where the snapshot is libvirt's alone. No file is looked at.
    pub fn of(snapshot: &Snapshot) -> Result<Option<Reach>> {
        let domain = snapshot
            .domain()
            .map_err(|error| error.into_error("cannot find the domain of the snapshot"))?;
        let connect = domain
            .connect()
            .map_err(|error| error.into_error("cannot find the connection of the snapshot"))?;
        // On another machine the files are out of reach.
        if check_connection(&connect).is_err() || !is_ours(&Recorded::read(snapshot.clone())?) {
            return Ok(None);
        }
        let connector = LibvirtConnector::open(domain.clone())?;
        let caller = Mutex::new(connector.caller());
        Ok(Some(Reach { snapshot: snapshot.clone(), domain, connect, connector, caller }))
    }

    /// Whose it is.
    pub fn domain(&self) -> &Domain {
        &self.domain
    }

    /// libvirt's version.
    pub(super) fn version(&self) -> Result<(u64, u64, u64)> {
        self.connect
            .version()
            .map_err(|error| error.into_error("cannot ask libvirt for its version"))
    }

    /// What stands for the domain in this process.
    pub fn domain_uuid(&self) -> &str {
        &self.connector.uuid
    }
}

/// Whether a snapshot is one of memory in a file and disks on overlays.
pub fn is_ours(snapshot: &Recorded) -> bool {
    snapshot.memory.is_some()
        && matches!(snapshot.state.as_str(), "running" | "paused")
        && !snapshot.is_internal()
}
