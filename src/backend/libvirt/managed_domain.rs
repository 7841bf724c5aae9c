// SPDX-License-Identifier: LGPL-2.1-or-later

//! A domain during a revert or a delete of its snapshots. Each call of libvirt has a deadline.

use std::sync::Mutex;
use std::time::Duration;

use super::block_commit::{BlockCommit, MergeFailure};
use super::call::{CallError, Caller, Retry};
use super::opened::LibvirtConnector;
use crate::deadline::Deadline;
use crate::error::{Code, Result};
use crate::libvirt::{Domain, Snapshot, VirError, VirResult, xml};
use crate::sys::lock;

/// The timeout of a call. libvirt itself lets it wait for another client's job for 30 seconds, and
/// then fails it.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);

/// The result of a call of libvirt.
pub type Answer<T> = std::result::Result<T, CallError>;

/// A domain during a revert or a delete.
#[derive(Debug)]
pub struct ManagedDomain {
    caller: Mutex<Caller>,
    /// Its name.
    pub name: String,
    uuid: String,
}

/// The snapshot definitions of a domain.
#[derive(Debug)]
pub struct SnapshotTexts {
    /// Names and XML, parents first. The XML has passwords, so that it can be written back.
    pub all: Vec<(String, String)>,
    /// The name of the current snapshot.
    pub current: Option<String>,
}

/// Another domain of the connection, as far as this client may read it.
#[derive(Debug)]
pub struct OtherDomain {
    /// Its name.
    pub name: String,
    /// Its XML: as it runs, and as it is defined.
    pub texts: Vec<String>,
}

impl ManagedDomain {
    pub(super) fn new(connector: &LibvirtConnector) -> ManagedDomain {
        ManagedDomain::called_by(connector, connector.caller())
    }

    /// The domain, called by `caller`.
    pub(super) fn called_by(connector: &LibvirtConnector, caller: Caller) -> ManagedDomain {
        ManagedDomain {
            caller: Mutex::new(caller),
            name: connector.name.clone(),
            uuid: connector.uuid.clone(),
        }
    }

    /// Its UUID.
    pub fn uuid(&self) -> &str {
        &self.uuid
    }

    /// libvirt's version.
    pub fn version(&self) -> Result<(u64, u64, u64)> {
        self.ask(|domain| domain.connect()?.version())
            .map_err(|error| error.into_error("cannot ask libvirt for its version"))
    }

    /// Whether the domain runs.
    pub fn is_active(&self) -> Answer<bool> {
        self.ask(Domain::is_active)
    }

    /// Whether the domain is defined, so that it stays when its QEMU ends.
    pub fn is_persistent(&self) -> Answer<bool> {
        self.ask(Domain::is_persistent)
    }

    /// Its XML.
    pub fn xml(&self, flags: u32) -> Answer<String> {
        self.ask(move |domain| domain.xml(flags))
    }

    /// Whether its next start resumes a managed save image.
    pub fn has_managed_save(&self) -> Answer<bool> {
        self.ask(Domain::has_managed_save)
    }

    /// Whether a disk has a block job.
    pub fn has_block_job(&self, target: &str) -> Answer<bool> {
        let target = target.to_owned();
        self.ask(move |domain| Ok(domain.block_job(&target)?.is_some()))
    }

    /// QEMU's reply to a command.
    pub fn monitor_command(&self, command: &'static str) -> Answer<String> {
        self.ask(move |domain| domain.monitor_command(command, None))
    }

    /// The domain XML in a memory image.
    pub fn saved_xml(&self, image: &str) -> Answer<String> {
        let image = image.to_owned();
        self.ask(move |domain| domain.connect()?.saved_xml(&image, 0))
    }

    /// The definitions of its snapshots.
    pub fn snapshots(&self) -> Answer<SnapshotTexts> {
        self.ask(|domain| {
            let text = |snapshot: Snapshot| Ok((snapshot.name(), snapshot.xml(xml::SECURE)?));
            let all = domain.snapshots()?.into_iter().map(text).collect::<VirResult<_>>()?;
            let current = domain.current_snapshot()?.map(|current| current.name());
            Ok(SnapshotTexts { all, current })
        })
    }

    /// The definition of one of its snapshots, with passwords; `None` if the snapshot does not
    /// exist any more.
    pub fn snapshot(&self, name: &str) -> Answer<Option<String>> {
        let name = name.to_owned();
        self.ask(move |domain| {
            domain.find(&name)?.map(|snapshot| snapshot.xml(xml::SECURE)).transpose()
        })
    }

    /// The connection's other domains. Those that this client may not read are left out.
    pub fn others(&self) -> Result<Vec<OtherDomain>> {
        let seen = |answer: Answer<OtherDomain>| match answer {
            Ok(other) => Ok(Some(other)),
            Err(CallError::Refused(error)) if !error.is(Code::Rpc) => Ok(None),
            Err(error) => Err(error.into_error("cannot look at the other domains")),
        };
        let uuid = self.uuid.clone();
        let others = self.ask(move |domain| {
            let all = domain.connect()?.domains()?.into_iter();
            Ok(all
                .filter(|other| other.uuid().is_ok_and(|other| other != uuid))
                .collect::<Vec<_>>())
        });
        let others = match others {
            Err(CallError::Refused(_)) => Vec::new(),
            others => {
                others.map_err(|error| error.into_error("cannot list the connection's domains"))?
            }
        };
        let mut found = Vec::new();
        for other in others {
            // One call each, so that each has its own timeout.
            found.extend(seen(self.ask(move |_| {
                let name = other.name().unwrap_or_default();
                let mut texts = Vec::new();
                for flags in [0, xml::INACTIVE] {
                    match other.xml(flags) {
                        Ok(text) => texts.push(text),
                        // If the connection was lost, the domain must not count as one that uses no
                        // image.
                        Err(VirError { message, .. }) if !other.connect()?.is_alive() => {
                            return Err(VirError { code: Code::Rpc as i32, message });
                        }
                        Err(_) => {}
                    }
                }
                Ok(OtherDomain { name, texts })
            }))?);
        }
        Ok(found)
    }

    /// Defines the domain, or changes its definition.
    pub fn define(&self, xml: &str) -> Answer<()> {
        let xml = xml.to_owned();
        self.change(move |domain| domain.connect()?.define(&xml, 0).map(drop))
    }

    /// Removes the definition.
    pub fn undefine(&self, flags: u32) -> Answer<()> {
        self.change(move |domain| domain.undefine(flags))
    }

    /// Changes a snapshot definition; makes the snapshot the current one, if `current`.
    pub fn redefine(&self, snapshot_xml: &str, current: bool) -> Answer<()> {
        let xml = snapshot_xml.to_owned();
        self.change(move |domain| domain.redefine_snapshot(&xml, current).map(drop))
    }

    /// Deletes a snapshot's metadata, with these flags.
    pub fn forget(&self, name: &str, flags: u32) -> Answer<()> {
        let name = name.to_owned();
        self.change(move |domain| match domain.find(&name)? {
            Some(snapshot) => snapshot.delete(flags),
            None => Err(VirError {
                code: Code::NoDomainSnapshot as i32,
                message: format!("no domain snapshot with matching name '{name}'"),
            }),
        })
    }

    /// Merges images that the domain's QEMU has open. `step` names the operation in errors.
    pub fn merge(&self, commit: &BlockCommit, step: &str) -> std::result::Result<(), MergeFailure> {
        commit.run(&mut lock(&self.caller), step)
    }

    /// Ends the domain's QEMU. That can take as long as libvirt's hooks take.
    pub fn destroy(&self) -> Answer<()> {
        self.run(Domain::destroy)
    }

    /// Starts the domain from a memory image. How long that takes depends on the image's size.
    pub fn restore(&self, image: &str, xml: &str, flags: u32) -> Answer<()> {
        let (image, xml) = (image.to_owned(), xml.to_owned());
        self.run(move |domain| domain.connect()?.restore(&image, Some(&xml), flags))
    }

    /// Makes a call that changes nothing, so that it can be made again.
    pub(super) fn ask<T: Send + 'static>(
        &self,
        call: impl Fn(&Domain) -> VirResult<T> + Clone + Send + 'static,
    ) -> Answer<T> {
        lock(&self.caller).call(Deadline::after(CALL_TIMEOUT), Retry::Safe, call)
    }

    /// Makes a call that changes something. It waits for changes that were given up: they must not
    /// be carried out after this one.
    fn change<T: Send + 'static>(
        &self,
        call: impl Fn(&Domain) -> VirResult<T> + Clone + Send + 'static,
    ) -> Answer<T> {
        let mut caller = lock(&self.caller);
        if !caller.settle(Deadline::after(CALL_TIMEOUT)) {
            return Err(CallError::Late);
        }
        caller.call(Deadline::after(CALL_TIMEOUT), Retry::Never, call)
    }

    /// Makes a change that can take long.
    pub(super) fn run<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Domain) -> VirResult<T> + Send + 'static,
    ) -> Answer<T> {
        let mut caller = lock(&self.caller);
        if !caller.settle(Deadline::after(CALL_TIMEOUT)) {
            return Err(CallError::Late);
        }
        caller.call_while_alive(CALL_TIMEOUT, call)
    }
}
