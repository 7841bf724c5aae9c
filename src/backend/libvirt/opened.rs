// SPDX-License-Identifier: LGPL-2.1-or-later

//! A domain that was opened, and its connection.

use super::call::{Caller, Retry};
use super::drives;
use crate::backend::exclusive::Exclusive;
use crate::backend::guest::DEFAULT_TIMEOUT;
use crate::deadline::Deadline;
use crate::error::{Code, Error, Result, fail};
use crate::libvirt::daemon::Daemon;
use crate::libvirt::{self, Domain, Snapshot, VirResult};
use crate::model::{self, Request, manual};

/// How the daemon is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Transport {
    /// Through a connection, as its client.
    Client,
    /// The daemon is this process, and its driver is called directly. Other processes connect to
    /// this address.
    InProcess(String),
}

/// A domain of a stock libvirt.
#[derive(Debug)]
pub struct LibvirtConnector {
    pub(super) domain: Domain,
    pub(super) transport: Transport,
    pub(super) uri: String,
    pub(super) name: String,
    pub(super) uuid: String,
}

impl LibvirtConnector {
    /// Opens the domain. A connection to another machine, or to another driver, is an error.
    pub fn open(domain: Domain) -> Result<LibvirtConnector> {
        LibvirtConnector::new(domain, |_| Transport::Client)
    }

    /// Opens a domain in the daemon's own process, by a connection to its driver.
    pub fn inside(domain: Domain) -> Result<LibvirtConnector> {
        LibvirtConnector::new(domain, |uri| Transport::InProcess(libvirt::daemon::address(uri)))
    }

    fn new(domain: Domain, transport: impl FnOnce(&str) -> Transport) -> Result<LibvirtConnector> {
        let step = "cannot open the domain";
        let connect = domain.connect().map_err(|error| error.into_error(step))?;
        check_connection(&domain)?;
        let text =
            |result: libvirt::VirResult<String>| result.map_err(|error| error.into_error(step));
        let (uri, name, uuid) = (text(connect.uri())?, text(domain.name())?, text(domain.uuid())?);
        Ok(LibvirtConnector { domain, transport: transport(&uri), uri, name, uuid })
    }

    /// Holds the domain for one operation.
    pub(super) fn hold(&self) -> Result<Exclusive> {
        Exclusive::take(&self.label(), self.held_name())
    }

    /// A caller that makes calls on the domain with deadlines.
    pub(super) fn caller(&self) -> Caller {
        // In a daemon's process, all domains belong to its own driver.
        let is_inside = matches!(self.transport, Transport::InProcess(_))
            || Daemon::of_this_process().is_some();
        match is_inside {
            true => Caller::inside(self.domain.clone()),
            false => Caller::new(self.domain.clone(), self.uri.clone(), self.uuid.clone()),
        }
    }

    /// Makes one call on the domain, with a deadline.
    pub(super) fn call<T: Send + 'static>(
        &self,
        step: &str,
        call: impl Fn(&Domain) -> VirResult<T> + Clone + Send + 'static,
    ) -> Result<T> {
        let called = self.caller().call(Deadline::after(DEFAULT_TIMEOUT), Retry::Safe, call);
        called.map_err(|error| error.into_error(step))
    }

    /// The domain, as messages name it.
    pub(super) fn label(&self) -> String {
        format!("domain '{}'", self.name)
    }

    /// The name of the domain's lock. It has only the UUID, because a daemon can be reached by
    /// several URIs.
    pub(super) fn held_name(&self) -> String {
        format!("instantsnap/{}", self.uuid)
    }

    /// Refuses a request with a storage hook: libvirt's own snapshot calls no hook.
    pub(super) fn check_no_hook_is_due(&self, snapshot_xml: &str) -> Result<()> {
        let step = format!("cannot read the XML of domain '{}'", self.name);
        let xml = self.call(&step, |domain| domain.xml(0))?;
        let disks = drives::disks(&model::Domain::parse(&xml)?);
        if let Some(disk) = manual(&disks, &Request::parse(snapshot_xml)?).first() {
            fail!(
                OperationUnsupported,
                "snapshot='manual' of disk '{}' is supported for a running domain only, and '{}' \
                 is paused: resume it, or use snapshot='external', or 'no' to leave the disk out",
                disk.name(),
                self.name
            );
        }
        Ok(())
    }

    pub(super) fn find(&self, name: &str) -> Result<Snapshot> {
        let wanted = name.to_owned();
        let step = "cannot list the domain's snapshots";
        let found = self.call(step, move |domain| domain.find(&wanted))?;
        found.ok_or_else(|| {
            let message = format!("domain '{}' has no snapshot '{name}'", self.name);
            Error::new(Code::NoDomainSnapshot, message)
        })
    }
}

/// Refuses a connection to another machine: memory and disks are files of the daemon's machine, and
/// descriptors are passed to it.
pub fn check_connection(domain: &Domain) -> Result<()> {
    let step = "cannot look at the connection to libvirt";
    let look = |domain: &Domain| {
        let connect = domain.connect()?;
        Ok((connect.driver()?, connect.uri()?))
    };
    // The driver's name is the daemon's answer.
    let found = Caller::without_address(domain.clone()).call(
        Deadline::after(DEFAULT_TIMEOUT),
        Retry::Never,
        look,
    );
    let (driver, uri) = found.map_err(|error| error.into_error(step))?;
    if driver != "QEMU" {
        fail!(
            OperationUnsupported,
            "the domain is run by libvirt's {driver} driver ('{uri}'): only QEMU's is supported"
        );
    }
    if !is_local(&uri) {
        fail!(
            OperationUnsupported,
            "the connection '{uri}' is to a remote machine: memory and disks are written where the \
             guest runs, so the snapshot has to be taken there, by a connection like \
             qemu:///system"
        );
    }
    Ok(())
}

/// Whether the URI is `qemu:///...` or `qemu+unix:///...`.
fn is_local(uri: &str) -> bool {
    uri.split_once("://").is_some_and(|(scheme, rest)| {
        matches!(scheme, "qemu" | "qemu+unix") && (rest.is_empty() || rest.starts_with(['/', '?']))
    })
}
