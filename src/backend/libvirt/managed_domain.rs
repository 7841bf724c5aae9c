// SPDX-License-Identifier: LGPL-2.1-or-later

//! A domain of a stock libvirt as a revert or a delete of its snapshots uses it: each call of
//! libvirt has a deadline.

use std::sync::Mutex;
use std::time::Duration;

use super::block_commit::{BlockCommit, MergeFailure};
use super::call::{CallError, Caller, Retry};
use super::opened::LibvirtConnector;
use crate::deadline::Deadline;
use crate::error::{Code, Result};
use crate::libvirt::{Domain, Snapshot, VirError, VirResult, xml};
use crate::sys::lock;

/// A call gets this long: libvirt itself makes it wait for another client's job for 30 seconds, and
/// says so then.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);

/// What libvirt answers.
pub type Answer<T> = std::result::Result<T, CallError>;

/// See the module.
#[derive(Debug)]
pub struct ManagedDomain {
    caller: Mutex<Caller>,
    /// What messages call it.
    pub name: String,
    uuid: String,
}

/// The definitions of a domain's snapshots, as libvirt has them.
#[derive(Debug)]
pub struct SnapshotTexts {
    /// Names and XML, passwords included, so that they can be written back; parents first.
    pub all: Vec<(String, String)>,
    /// The name of the current one.
    pub current: Option<String>,
}

/// Another domain of the connection, as far as the caller may see it.
#[derive(Debug)]
pub struct OtherDomain {
    /// Its name.
    pub name: String,
    /// Its XML, now and at its next start.
    pub texts: Vec<String>,
}

impl ManagedDomain {
    pub(super) fn new(connector: &LibvirtConnector) -> ManagedDomain {
        ManagedDomain::called_by(connector, connector.caller())
    }

    /// By this caller of its.
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
            .map_err(|trouble| trouble.into_error("cannot ask libvirt for its version"))
    }

    /// Whether a QEMU runs for it.
    pub fn is_active(&self) -> Answer<bool> {
        self.ask(Domain::is_active)
    }

    /// Whether it is defined, and stays when its QEMU ends.
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

    /// The definition of one of its snapshots, with passwords; `None` where it is gone.
    pub fn snapshot(&self, name: &str) -> Answer<Option<String>> {
        let name = name.to_owned();
        self.ask(move |domain| {
            domain.find(&name)?.map(|snapshot| snapshot.xml(xml::SECURE)).transpose()
        })
    }

    /// The connection's other domains. What the caller may not see of them is not known.
    pub fn others(&self) -> Result<Vec<OtherDomain>> {
        let seen = |answer: Answer<OtherDomain>| match answer {
            Ok(other) => Ok(Some(other)),
            Err(CallError::Refused(error)) if !error.is(Code::Rpc) => Ok(None),
            Err(trouble) => Err(trouble.into_error("cannot look at the other domains")),
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
            others => others
                .map_err(|trouble| trouble.into_error("cannot list the connection's domains"))?,
        };
        let mut found = Vec::new();
        for other in others {
            // One after another, so that each may take its time.
            found.extend(seen(self.ask(move |_| {
                let name = other.name().unwrap_or_default();
                let mut texts = Vec::new();
                for flags in [0, xml::INACTIVE] {
                    match other.xml(flags) {
                        Ok(text) => texts.push(text),
                        // A domain that cannot be asked must not pass for one that uses nothing.
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

    /// Defines it, or changes its definition.
    pub fn define(&self, xml: &str) -> Answer<()> {
        let xml = xml.to_owned();
        self.change(move |domain| domain.connect()?.define(&xml, 0).map(drop))
    }

    /// It is not defined any more.
    pub fn undefine(&self, flags: u32) -> Answer<()> {
        self.change(move |domain| domain.undefine(flags))
    }

    /// Changes the definition of a snapshot; makes it the current one, if `current`.
    pub fn redefine(&self, snapshot_xml: &str, current: bool) -> Answer<()> {
        let xml = snapshot_xml.to_owned();
        self.change(move |domain| domain.redefine_snapshot(&xml, current).map(drop))
    }

    /// Deletes a snapshot's metadata, as the flags say.
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

    /// Merges images that its QEMU has open. `step` says what for.
    pub fn merge(&self, commit: &BlockCommit, step: &str) -> std::result::Result<(), MergeFailure> {
        commit.run(&mut lock(&self.caller), step)
    }

    /// Ends its QEMU. That can take as long as libvirt's hooks take.
    pub fn destroy(&self) -> Answer<()> {
        self.run(Domain::destroy)
    }

    /// Starts it from a memory image, which takes as long as there is memory to read.
    pub fn restore(&self, image: &str, xml: &str, flags: u32) -> Answer<()> {
        let (image, xml) = (image.to_owned(), xml.to_owned());
        self.run(move |domain| domain.connect()?.restore(&image, Some(&xml), flags))
    }

    /// What changes nothing, and can be asked again.
    pub(super) fn ask<T: Send + 'static>(
        &self,
        call: impl Fn(&Domain) -> VirResult<T> + Clone + Send + 'static,
    ) -> Answer<T> {
        lock(&self.caller).call(Deadline::after(CALL_TIMEOUT), Retry::Safe, call)
    }

    /// One change after another: one that was given up must not be done after a later one.
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

    /// A change that takes its time.
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
