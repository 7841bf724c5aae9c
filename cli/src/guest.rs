// SPDX-License-Identifier: LGPL-2.1-or-later

//! The guest that a command is for: a domain of libvirt's, or a QEMU with a QMP socket.

use std::fs;
use std::sync::Arc;

use instantsnap_core::backend::{LibvirtConnector, SnapshotList};
use instantsnap_core::engine::{self, Handle};
use instantsnap_core::error::Code;
use instantsnap_core::libvirt::{self, Connect, Domain, Snapshot, xml};
use instantsnap_core::model::flags::{DeleteFlags, RevertFlags};
use instantsnap_core::model::{self, Memory, Store};

use crate::failure::{Failure, Result, answer, most_like};
use crate::snapshot::Known;
use crate::uri::{Qmp, Uri};

/// A guest.
pub enum Guest {
    /// A domain of libvirt's.
    Libvirt(Managed),
    /// A QEMU with a QMP socket.
    Qmp(Direct),
}

/// A domain of libvirt's.
pub struct Managed {
    domain: Domain,
    name: String,
}

/// A QEMU with a QMP socket. Its metadata can be read without it.
pub struct Direct {
    place: Qmp,
    name: String,
    domain_xml: Option<String>,
    store: Store,
}

impl Guest {
    /// Finds the guest of this name; for a domain of libvirt's, the id or the UUID will do.
    pub fn open(uri: Option<&Uri>, name: &str) -> Result<Guest> {
        match uri {
            Some(Uri::Qmp(place)) => Direct::open(place, name).map(Guest::Qmp),
            Some(Uri::Libvirt(uri)) => Managed::open(Some(uri), name).map(Guest::Libvirt),
            None => Managed::open(None, name).map(Guest::Libvirt),
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        match self {
            Guest::Libvirt(managed) => &managed.name,
            Guest::Qmp(direct) => &direct.name,
        }
    }

    /// Opens it for operations.
    pub fn handle(&self) -> Result<Handle> {
        Ok(match self {
            Guest::Libvirt(managed) => {
                let connector = LibvirtConnector::open(managed.domain.clone())?;
                Handle::open_libvirt(Arc::new(connector))
            }
            Guest::Qmp(Direct { place, domain_xml, .. }) => {
                Handle::open_qmp(&place.socket, domain_xml.as_deref(), &place.state)?
            }
        })
    }

    /// Its snapshots, each parent before its children.
    pub fn snapshots(&self) -> Result<Vec<Known>> {
        match self {
            Guest::Libvirt(managed) => {
                let step = format!("cannot list the snapshots of domain '{}'", managed.name);
                let snapshots = answer(managed.domain.snapshots(), &step)?;
                let known = |snapshot: &Snapshot| Known::parse(&answer(snapshot.xml(0), &step)?);
                snapshots.iter().map(known).collect()
            }
            Guest::Qmp(Direct { store, .. }) => {
                store.list()?.iter().map(|record| Known::parse(&record.to_xml())).collect()
            }
        }
    }

    /// The name of the current snapshot.
    pub fn current(&self) -> Result<Option<String>> {
        Ok(match self {
            Guest::Libvirt(managed) => {
                let step =
                    format!("cannot look for the current snapshot of domain '{}'", managed.name);
                answer(managed.domain.current_snapshot(), &step)?.as_ref().map(Snapshot::name)
            }
            Guest::Qmp(Direct { store, .. }) => store.current()?,
        })
    }

    /// The `<domainsnapshot>` of a snapshot that exists.
    pub fn snapshot_xml(&self, name: &str, with_secrets: bool) -> Result<String> {
        Ok(match self {
            Guest::Libvirt(managed) => {
                let flags = if with_secrets { xml::SECURE } else { 0 };
                answer(managed.snapshot(name)?.xml(flags), "cannot describe the snapshot")?
            }
            Guest::Qmp(Direct { store, .. }) => SnapshotList::xml(store, name)?,
        })
    }

    /// Reverts to a snapshot that exists. A QEMU with a QMP socket must wait for its memory, which
    /// comes back as `memory` says; that of a domain of libvirt's comes all first.
    pub fn revert(&self, name: &str, flags: RevertFlags, memory: Memory) -> Result<()> {
        match self {
            Guest::Libvirt(managed) => {
                engine::revert_managed(&managed.snapshot(name)?, flags)?;
            }
            Guest::Qmp(_) => {
                self.handle()?.load(name, flags, memory.into())?;
            }
        }
        Ok(())
    }

    /// Deletes a snapshot that exists.
    pub fn delete(&self, name: &str, flags: DeleteFlags) -> Result<()> {
        match self {
            Guest::Libvirt(managed) => {
                engine::delete_managed(&managed.snapshot(name)?, flags)?;
            }
            Guest::Qmp(_) => self.handle()?.delete(name, flags)?,
        }
        Ok(())
    }
}

/// Opens a connection to libvirt.
pub fn connect(uri: Option<&str>) -> Result<Connect> {
    // The command reports libvirt's errors itself, with what it was doing.
    libvirt::silence()?;
    let opened = match uri {
        Some(uri) => Connect::open(uri)?,
        None => Connect::open_default()?,
    };
    let at = uri.map(|uri| format!(" ({uri})")).unwrap_or_default();
    answer(opened, &format!("cannot connect to libvirt{at}"))
}

impl Managed {
    fn open(uri: Option<&str>, name: &str) -> Result<Managed> {
        let domains = answer(connect(uri)?.domains(), "cannot list the domains")?;
        let names: Vec<String> = domains.iter().filter_map(|domain| domain.name().ok()).collect();
        let is_meant = |domain: &Domain| {
            domain.name().is_ok_and(|known| known == name)
                || domain.id().is_some_and(|id| id.to_string() == name)
                || domain.uuid().is_ok_and(|uuid| uuid.eq_ignore_ascii_case(name))
        };
        let mut meant = domains.into_iter().filter(is_meant);
        match (meant.next(), meant.next()) {
            (Some(domain), None) => {
                Ok(Managed { name: answer(domain.name(), "cannot name the domain")?, domain })
            }
            (Some(_), Some(_)) => Err(Failure::Usage(format!(
                "'{name}' is the name of one domain and the id or UUID of another: give the \
                 domain's UUID (virsh list --all --uuid --name)"
            ))),
            (None, _) => Err(no_domain(name, &names)),
        }
    }

    /// The domain's XML as it runs.
    pub fn xml(&self) -> Result<String> {
        let step = format!("cannot read the XML of domain '{}'", self.name);
        answer(self.domain.xml(0), &step)
    }

    /// Whether it runs or is paused.
    pub fn is_active(&self) -> Result<bool> {
        let step = format!("cannot look at domain '{}'", self.name);
        answer(self.domain.is_active(), &step)
    }

    fn snapshot(&self, name: &str) -> Result<Snapshot> {
        answer(self.domain.snapshot(name), &format!("cannot find snapshot '{name}'"))
    }
}

fn no_domain(name: &str, names: &[String]) -> Failure {
    let advice = match most_like(name, names.iter().map(String::as_str)) {
        Some(like) => format!("did you mean '{like}'?"),
        None if names.is_empty() => {
            "this connection has no domain at all: name another one by --connect".to_owned()
        }
        None => "virsh list --all shows them".to_owned(),
    };
    Failure::not_found(Code::NoDomain, format!("there is no domain '{name}': {advice}"))
}

impl Direct {
    fn open(place: &Qmp, name: &str) -> Result<Direct> {
        let read = |file: &std::path::PathBuf| {
            fs::read_to_string(file).map_err(|error| {
                Failure::Other(format!(
                    "cannot read the domain's XML from '{}': {error}",
                    file.display()
                ))
            })
        };
        let domain_xml = place.domain.as_ref().map(read).transpose()?;
        // Without XML, the URI alone says which guest is meant.
        if let (Some(text), Some(file)) = (&domain_xml, &place.domain) {
            let known = model::Domain::parse(text)?.name;
            if known != name {
                return Err(Failure::not_found(
                    Code::NoDomain,
                    format!(
                        "the domain of '{}' is '{known}' and not '{name}': give that name, or the \
                         URI of the other guest",
                        file.display()
                    ),
                ));
            }
        }
        Ok(Direct {
            place: place.clone(),
            name: name.to_owned(),
            domain_xml,
            store: Store::open(&place.state)?,
        })
    }

    /// The directory with its metadata.
    pub fn store(&self) -> &Store {
        &self.store
    }
}
