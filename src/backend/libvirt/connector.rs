// SPDX-License-Identifier: LGPL-2.1-or-later

//! Implements [`Connector`] for an opened domain of libvirt.

use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::guest::LibvirtGuest;
use super::managed_domain::ManagedDomain;
use super::opened::LibvirtConnector;
use super::session::Session;
use super::{forget, journals};
use crate::backend::exclusive::{EXIT_TIMEOUT, busy};
use crate::backend::guest::{Connector, Guest, Reserved, SnapshotList};
use crate::deadline::Deadline;
use crate::error::{Result, fail};
use crate::libvirt::Snapshot;
use crate::model::flags::{self, CreateFlags};
use crate::model::{Journals, Reservation, Store, check_name};

/// The flags of snapshots that the library takes itself.
const SUPPORTED_FLAGS: CreateFlags = CreateFlags::constant(
    flags::NO_METADATA
        | flags::HALT
        | flags::REUSE_EXT
        | flags::ATOMIC
        | flags::LIVE
        | flags::VALIDATE
        | flags::INSTANT,
);

impl Connector for LibvirtConnector {
    fn supported_flags(&self) -> CreateFlags {
        SUPPORTED_FLAGS
    }

    fn snapshot_list(&self) -> &dyn SnapshotList {
        self
    }

    fn store(&self) -> Option<&Store> {
        None
    }

    fn journals(&self) -> Result<Option<Journals>> {
        journals::journals(&self.uuid)
    }

    fn reserve(&self, name: Option<&str>) -> Result<Reserved> {
        let known = self.names()?;
        let taken = |name: &str| known.iter().any(|known| known == name);
        let name = match name {
            Some(name) => name.to_owned(),
            None => {
                let seconds =
                    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
                (seconds..)
                    .map(|seconds| seconds.to_string())
                    .find(|name| !taken(name))
                    .unwrap_or_default()
            }
        };
        check_name(&name)?;
        if taken(&name) {
            fail!(
                OperationInvalid,
                "domain snapshot '{name}' of domain '{}' already exists",
                self.name
            );
        }
        Ok(Reserved::by_others(name, self.reserve_journal()?))
    }

    /// Without INSTANT, or of a domain that does not run, libvirt takes its own snapshot.
    fn delegate(&self, xml: &str, flags: CreateFlags) -> Option<Result<Snapshot>> {
        let own_flags = if flags.is_instant() {
            if let Err(error) = self.check_no_hook_is_due(xml) {
                return Some(Err(error));
            }
            flags.without_instant()
        } else {
            flags
        };
        let step = format!("cannot take libvirt's own snapshot of domain '{}'", self.name);
        // No deadline: libvirt's snapshot can take any time.
        let taken = self.domain.create_snapshot(xml, own_flags.bits());
        Some(taken.map_err(|error| error.into_error(&step)))
    }

    fn begin(&self) -> Result<Box<dyn Guest + '_>> {
        Ok(Box::new(LibvirtGuest::new(Session::begin(self)?)))
    }

    fn begin_recovery(&self) -> Result<Box<dyn Guest + '_>> {
        Ok(Box::new(LibvirtGuest::new(Session::begin_recovery(self)?)))
    }

    fn managed(&self, name: &str) -> Result<Option<Snapshot>> {
        self.find(name).map(Some)
    }
}

impl LibvirtConnector {
    /// Reserves the domain's journal, if one can be kept.
    fn reserve_journal(&self) -> Result<Option<Reservation>> {
        let deadline = Deadline::after(EXIT_TIMEOUT);
        loop {
            match journals::reserve(&self.uuid)? {
                Ok(reserved) => return Ok(reserved),
                // The holder may be a watchdog that has finished its work and is about to exit.
                Err(()) if deadline.left().is_some() => sleep(Duration::from_millis(20)),
                Err(()) => return Err(busy(&self.label())),
            }
        }
    }
}

impl SnapshotList for LibvirtConnector {
    fn names(&self) -> Result<Vec<String>> {
        let step = format!("cannot list the snapshots of domain '{}'", self.name);
        self.call(&step, |domain| Ok(domain.snapshots()?.iter().map(Snapshot::name).collect()))
    }

    fn xml(&self, name: &str) -> Result<String> {
        let snapshot = Arc::new(self.find(name)?);
        self.call(&format!("cannot describe snapshot '{name}'"), move |_| snapshot.xml(0))
    }

    fn current(&self) -> Result<Option<String>> {
        let step = format!("cannot look for the current snapshot of domain '{}'", self.name);
        self.call(&step, |domain| Ok(domain.current_snapshot()?.as_ref().map(Snapshot::name)))
    }

    fn forget(&self, name: &str) -> Result<()> {
        self.find(name).and_then(|_| forget::forget(&ManagedDomain::new(self), name))
    }
}
