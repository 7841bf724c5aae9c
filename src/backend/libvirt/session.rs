// SPDX-License-Identifier: LGPL-2.1-or-later

//! A domain during one operation: calls of libvirt, and commands to its QEMU.
//!
//! The domain and its QEMU process are looked up once, when the operation begins.

use std::time::Duration;

use serde_json::json;

use super::call::{CallError, Caller, Retry};
use super::opened::LibvirtConnector;
use super::snapshot_def::SnapshotDef;
use crate::backend::exclusive::Exclusive;
use crate::backend::guest::{DEFAULT_TIMEOUT, Liveness, check_version};
use crate::backend::qmp::hold_qemu;
use crate::deadline::Deadline;
use crate::error::{Code, Result, fail};
use crate::libvirt::xml::SECURE;
use crate::libvirt::{Domain, Snapshot, State, VirResult};
use crate::monitor::json::{Json, parse};
use crate::monitor::{Command, Execute, Failure, QemuProcess, read_reply};

/// The timeout of a query of QEMU's state.
const QUERY_TIMEOUT: Duration = Duration::from_secs(2);

/// A domain during one operation.
pub struct Session<'a> {
    pub connector: &'a LibvirtConnector,
    pub caller: Caller,
    pub exclusive: Exclusive,
    /// QEMU's version.
    pub version: (u64, u64),
    /// libvirt's id of the running domain, which changes at each start.
    pub id: Option<u32>,
    /// QEMU's process, if it can be seen from this process.
    pub qemu: Option<QemuProcess>,
    /// Holds that process too, because another client can open the guest by a QMP socket.
    _process: Option<Exclusive>,
}

/// How the vCPUs were started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resumed {
    ByLibvirt,
    ByItself,
}

impl Execute for Session<'_> {
    fn execute(
        &mut self,
        command: Command,
        deadline: Deadline,
    ) -> std::result::Result<Json, Failure> {
        let retry = match command.name {
            "migrate" | "migrate_cancel" => Retry::Never,
            _ => Retry::Safe,
        };
        let text = json!({ "execute": command.name, "arguments": command.arguments }).to_string();
        let fd = match command.fd.map(|fd| rustix::io::fcntl_dupfd_cloexec(fd, 0)).transpose() {
            Ok(fd) => fd.map(std::sync::Arc::new),
            Err(error) => {
                return Err(Failure::Lost(format!("cannot duplicate a descriptor: {error}")));
            }
        };
        let reply = self.caller.call(deadline, retry, move |domain| {
            let fd = fd.as_deref().map(std::os::fd::AsFd::as_fd);
            domain.monitor_command(&text, fd)
        });
        let reply = match reply {
            Ok(reply) => reply,
            Err(CallError::Late) => return Err(Failure::Late),
            Err(CallError::Refused(error)) if error.is(Code::OperationTimeout) => {
                return Err(Failure::Late);
            }
            Err(CallError::Refused(error)) => return Err(Failure::Lost(error.message)),
            Err(CallError::Lost(reason)) => return Err(Failure::Lost(reason)),
        };
        let reply = parse(reply.as_bytes())
            .map_err(|error| Failure::Lost(format!("the reply makes no sense: {error}")))?;
        read_reply(reply)
    }
}

impl<'a> Session<'a> {
    /// Holds a running domain, and looks up its QEMU process.
    pub fn begin(connector: &'a LibvirtConnector) -> Result<Session<'a>> {
        let session = Session::begin_recovery(connector)?;
        if session.id.is_none() {
            fail!(
                OperationInvalid,
                "domain '{}' is not running: an instant snapshot is of a running guest; without \
                 INSTANT its disks can be snapshotted",
                connector.name
            );
        }
        Ok(session)
    }

    /// Holds a domain. If it runs, looks up its QEMU process.
    pub fn begin_recovery(connector: &'a LibvirtConnector) -> Result<Session<'a>> {
        let exclusive = connector.hold()?;
        let mut session = Session {
            connector,
            caller: connector.caller(),
            exclusive,
            version: (0, 0),
            id: None,
            qemu: None,
            _process: None,
        };
        let step = format!("cannot look at domain '{}'", connector.name);
        if !session.call_with_timeout(&step, Retry::Safe, Domain::is_active)? {
            return Ok(session);
        }
        session.version = session.query_version()?;
        check_version(session.version)?;
        session.id = session.look_up_id(Deadline::after(DEFAULT_TIMEOUT))?;
        session.qemu = session.look_up_process();
        if let Some(qemu) = &session.qemu {
            session._process = Some(hold_qemu(&connector.label(), qemu)?);
        }
        Ok(session)
    }

    /// Makes a call outside the pause.
    pub fn call_with_timeout<T: Send + 'static>(
        &mut self,
        step: &str,
        retry: Retry,
        call: impl Fn(&Domain) -> VirResult<T> + Clone + Send + 'static,
    ) -> Result<T> {
        self.caller
            .call(Deadline::after(DEFAULT_TIMEOUT), retry, call)
            .map_err(|error| error.into_error(step))
    }

    fn query_version(&mut self) -> Result<(u64, u64)> {
        let command = Command::new("query-version", json!({}));
        let reply =
            self.run("cannot ask for QEMU's version", command, Deadline::after(DEFAULT_TIMEOUT))?;
        let number = |what: &str| reply["qemu"][what].as_u64().unwrap_or_default();
        Ok((number("major"), number("minor")))
    }

    fn look_up_id(&mut self, deadline: Deadline) -> Result<Option<u32>> {
        let uuid = self.connector.uuid.clone();
        let query = move |domain: &Domain| Ok(domain.connect()?.domain(&uuid)?.id());
        let id = self.caller.call(deadline, Retry::Safe, query);
        id.map_err(|error| error.into_error("cannot look the domain up"))
    }

    /// QEMU's process. libvirt does not report it, but QEMU reports its threads. The process is the
    /// domain's if its command line has the domain's UUID, which libvirt puts there.
    fn look_up_process(&mut self) -> Option<QemuProcess> {
        let option = format!("-uuid\0{}\0", self.connector.uuid);
        let is_it = |qemu: &QemuProcess| {
            let command_line =
                std::fs::read(format!("/proc/{}/cmdline", qemu.pid)).unwrap_or_default();
            command_line.windows(option.len()).any(|window| window == option.as_bytes())
        };
        QemuProcess::by_threads(self, Deadline::after(DEFAULT_TIMEOUT)).filter(is_it)
    }

    /// The domain's XML.
    pub fn xml(&mut self, flags: u32) -> Result<String> {
        self.call_with_timeout("cannot read the domain's XML", Retry::Safe, move |domain| {
            domain.xml(flags)
        })
    }

    /// The name of the domain's current snapshot.
    pub fn current_snapshot(&mut self) -> Result<Option<String>> {
        self.call_with_timeout("cannot look for the current snapshot", Retry::Safe, |domain| {
            Ok(domain.current_snapshot()?.as_ref().map(Snapshot::name))
        })
    }

    /// The definition of the snapshot of this name; `None` if there is none.
    pub fn snapshot_def(&mut self, name: &str) -> Result<Option<SnapshotDef>> {
        let (step, wanted) = (format!("cannot describe snapshot '{name}'"), name.to_owned());
        let found = self.call_with_timeout(&step, Retry::Safe, move |domain| {
            domain.find(&wanted)?.map(|snapshot| snapshot.xml(SECURE)).transpose()
        })?;
        found.map(|xml| SnapshotDef::parse(name.to_owned(), &xml)).transpose()
    }

    /// The definitions of all snapshots.
    pub fn snapshot_defs(&mut self) -> Result<Vec<SnapshotDef>> {
        let step = "cannot read the domain's snapshots";
        let found = self.call_with_timeout(step, Retry::Safe, |domain| {
            let read = |snapshot: &Snapshot| Ok((snapshot.name(), snapshot.xml(0)?));
            domain.snapshots()?.iter().map(read).collect::<VirResult<Vec<_>>>()
        })?;
        found.into_iter().map(|(name, xml)| SnapshotDef::parse(name, &xml)).collect()
    }

    /// The version of the domain's libvirt.
    pub fn libvirt_version(&mut self) -> Result<(u64, u64, u64)> {
        self.call_with_timeout("cannot ask libvirt for its version", Retry::Safe, |domain| {
            domain.connect()?.version()
        })
    }

    /// Whether the domain runs, with the same QEMU or a new one.
    pub fn is_active(&mut self) -> Result<bool> {
        self.call_with_timeout("cannot look at the domain", Retry::Safe, Domain::is_active)
    }

    /// Whether the domain is persistent.
    pub fn is_persistent(&mut self) -> Result<bool> {
        self.call_with_timeout("cannot look at the domain", Retry::Safe, Domain::is_persistent)
    }

    fn state(&mut self, deadline: Deadline) -> std::result::Result<State, CallError> {
        self.caller.call(deadline, Retry::Safe, Domain::state)
    }

    /// Resumes the domain, unless it runs already.
    pub fn resume(&mut self, deadline: Deadline) -> std::result::Result<Resumed, CallError> {
        if self.state(deadline)? == State::Running {
            return Ok(Resumed::ByItself);
        }
        match self.caller.call(deadline, Retry::Safe, Domain::resume) {
            Ok(()) => Ok(Resumed::ByLibvirt),
            // QEMU before 9 has started its guest by itself, and libvirt has noticed that only
            // after the query above.
            Err(CallError::Refused(error)) if error.is(Code::OperationInvalid) => {
                match self.state(deadline)? {
                    State::Running => Ok(Resumed::ByItself),
                    _ => Err(CallError::Refused(error)),
                }
            }
            Err(error) => Err(error),
        }
    }

    /// Refuses a domain that has ended since the operation began. libvirt finds a domain by its
    /// UUID, so a domain that was started again is another QEMU.
    pub fn check_not_started_anew(&mut self, deadline: Deadline) -> Result<()> {
        let has_ended = match &self.qemu {
            // This makes no call of libvirt, because it runs in the pause.
            Some(qemu) => qemu.has_ended(),
            None => self.look_up_id(deadline)? != self.id,
        };
        if has_ended {
            fail!(
                OperationFailed,
                "domain '{}' has ended while its snapshot was being taken; where another client \
                 has started it again, take the snapshot again",
                self.connector.name
            );
        }
        Ok(())
    }

    /// Whether the QEMU of this operation answers or has ended.
    pub fn liveness(&mut self) -> Liveness {
        let deadline = Deadline::after(DEFAULT_TIMEOUT);
        let uuid = self.connector.uuid.clone();
        let query = move |domain: &Domain| match domain.connect()?.domain(&uuid) {
            Ok(domain) => domain.is_active().map(|active| active.then(|| domain.id()).flatten()),
            Err(error) if error.is(Code::NoDomain) => Ok(None),
            Err(error) => Err(error),
        };
        // If libvirt has refused a call, QEMU may have ended without libvirt having noticed it yet.
        let mut in_doubt = self.caller.take_refused();
        loop {
            match self.caller.call(deadline, Retry::Safe, query.clone()) {
                Ok(Some(id)) if Some(id) == self.id => {}
                Ok(_) => return Liveness::Exited,
                Err(_) => return Liveness::Unresponsive,
            }
            let status = Command::new("query-status", json!({}));
            in_doubt = in_doubt
                && matches!(
                    self.execute(status, Deadline::after(QUERY_TIMEOUT)),
                    Err(Failure::Lost(_))
                );
            if !in_doubt {
                return Liveness::Alive;
            }
            if deadline.left().is_none() {
                return Liveness::Unresponsive;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
