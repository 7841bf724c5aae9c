// SPDX-License-Identifier: LGPL-2.1-or-later

//! Snapshots of libvirt's list that the library reverts to and deletes itself, because libvirt's
//! own revert or delete does not support them, or does harm.

use super::managed_domain::{Answer, ManagedDomain};
use super::opened::{LibvirtConnector, check_connection};
use super::snapshot_def::SnapshotDef;
use crate::backend::exclusive::{Exclusive, Holder};
use crate::error::{Code, Result};
use crate::libvirt::{Domain, Snapshot, xml};
use crate::model::flags::{DeleteFlags, RevertFlags};

/// A snapshot with memory in a file and disks on overlays, whose files can be accessed from here.
#[derive(Debug)]
pub struct ManagedSnapshot {
    /// Its domain.
    pub domain: ManagedDomain,
    /// Its name.
    pub name: String,
    snapshot: Snapshot,
    own_domain: Domain,
    connector: LibvirtConnector,
}

impl ManagedSnapshot {
    /// `None` if only libvirt can revert to or delete the snapshot. No file is read.
    pub fn of(snapshot: &Snapshot) -> Result<Option<ManagedSnapshot>> {
        let own_domain = snapshot
            .domain()
            .map_err(|error| error.into_error("cannot find the domain of the snapshot"))?;
        match check_connection(&own_domain) {
            Ok(()) => {}
            Err(error) if error.code == Code::OperationTimeout => return Err(error),
            // Files on another machine cannot be accessed.
            Err(_) => return Ok(None),
        }
        let connector = LibvirtConnector::open(own_domain.clone())?;
        let domain = ManagedDomain::new(&connector);
        let name = snapshot.name();
        let read = {
            let snapshot = snapshot.clone();
            domain.ask(move |_| snapshot.xml(xml::SECURE))
        };
        let step = || format!("cannot read the record of snapshot '{name}'");
        let text = read.map_err(|error| error.into_error(&step()))?;
        if !SnapshotDef::parse(name.clone(), &text)?.is_ours() {
            return Ok(None);
        }
        let snapshot = snapshot.clone();
        Ok(Some(ManagedSnapshot { domain, name, snapshot, own_domain, connector }))
    }

    /// The domain, opened.
    pub fn connector(&self) -> &LibvirtConnector {
        &self.connector
    }

    /// Holds the domain for one operation.
    pub fn hold(&self) -> Result<Exclusive> {
        self.connector.hold()
    }

    /// Holds the domain, unless it is held already.
    pub fn try_hold(&self) -> Result<std::result::Result<Exclusive, Holder>> {
        Exclusive::try_take(self.connector.held_name())
    }

    /// The domain, as messages name it.
    pub fn label(&self) -> String {
        self.connector.label()
    }

    /// The caller's object of the domain.
    pub fn callers_domain(&self) -> &Domain {
        &self.own_domain
    }

    /// libvirt's own revert.
    pub fn revert_by_libvirt(&self, flags: RevertFlags) -> Answer<()> {
        let snapshot = self.snapshot.clone();
        self.domain.run(move |_| snapshot.revert(flags.bits()))
    }

    /// libvirt's own delete.
    pub fn delete_by_libvirt(&self, flags: DeleteFlags) -> Answer<()> {
        let snapshot = self.snapshot.clone();
        self.domain.run(move |_| snapshot.delete(flags.bits()))
    }
}
