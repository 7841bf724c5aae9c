// SPDX-License-Identifier: LGPL-2.1-or-later

//! The driver backend: the caller owns QEMU's monitor, its locks, its event loop and perhaps the
//! metadata, and the library uses them by callbacks.
//!
//! Everything else is the same as with the library's own monitor connection: it is
//! [`MonitorGuest`](super::qmp) with another channel.

use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;

use super::exclusive::Exclusive;
use super::guest::{Connector, Guest, Liveness, Reserved, SnapshotList, check_version};
use super::qmp::{
    Channel, MonitorGuest, Overlay, Recovery, SUPPORTED_FLAGS, Switch, hold_qemu, switch,
};
use crate::deadline::Deadline;
use crate::error::{Code, Error, Result, fail};
use crate::model::domain::Domain;
use crate::model::flags::CreateFlags;
use crate::model::{Record, Store, check_name, generated_names};
use crate::monitor::json::{Json, parse};
use crate::monitor::{Command, Event, Execute, Failure, Monitor, QemuProcess, read_reply};

/// The timeout of a query.
const QUERY_TIMEOUT: Duration = Duration::from_secs(5);

/// A failed callback's reason.
pub type Reason = String;

/// The result of a callback.
pub type Answer<T> = std::result::Result<T, Reason>;

/// The state of a driver's domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunState {
    /// Its vCPUs run.
    Running,
    /// Its vCPUs are stopped, and QEMU is running.
    Paused,
    /// No QEMU is running.
    Off,
}

/// The callbacks of a driver. During one operation they are called one at a time, while the library
/// holds no lock.
pub trait Driver: Send + Sync {
    /// Identifies the domain within this process.
    fn identity(&self) -> usize;

    /// Runs one command, JSON in, JSON out.
    fn run(&self, command: &str, fd: Option<BorrowedFd>, timeout: Duration) -> Answer<String>;

    /// The domain's state.
    fn state(&self) -> Answer<RunState>;

    /// The `<domain>` of the domain as it is now.
    fn domain_xml(&self) -> Answer<String>;

    /// The state directory for the snapshots; `None`: the driver records them itself.
    fn state_dir(&self) -> Answer<Option<PathBuf>>;

    /// A monitor socket for the watchdog, if QEMU has another one.
    fn watchdog_socket(&self) -> Option<PathBuf>;

    /// Stops the vCPUs. `None`: the driver leaves that to the library; the same holds for the next
    /// two.
    fn pause(&self, timeout: Duration) -> Option<Answer<()>>;

    /// Starts the vCPUs.
    fn resume(&self, timeout: Duration) -> Option<Answer<()>>;

    /// Switches all disks to their overlays, or none.
    fn switch_disks(&self, switches: &[Switch], timeout: Duration) -> Option<Answer<()>>;

    /// Reports that the disks' overlays were merged back.
    fn disks_merged(&self, switches: &[Switch]);

    /// Begins an operation on the domain. An error refuses the operation.
    fn begin_job(&self) -> Answer<()>;

    /// Ends the operation.
    fn end_job(&self);

    /// Records a complete snapshot.
    fn record(&self, name: &str, xml: &str) -> Answer<()>;

    /// Forgets a snapshot.
    fn forget(&self, name: &str) -> Answer<()>;

    /// The `<domainsnapshot>` of a snapshot; `None` where there is none.
    fn snapshot_xml(&self, name: &str) -> Answer<Option<String>>;

    /// The current snapshot.
    fn current(&self) -> Answer<Option<String>>;

    /// The events that the driver has passed on since the last call.
    fn take_events(&self) -> Vec<Event>;
}

fn failed(step: &str) -> impl Fn(Reason) -> Error + '_ {
    move |reason| {
        Error::new(Code::OperationFailed, format!("{step}: the driver's callback failed{reason}"))
    }
}

/// The domain of a driver.
pub struct DriverConnector {
    driver: Arc<dyn Driver>,
    store: Option<Store>,
}

impl DriverConnector {
    /// Opens the domain.
    pub fn open(driver: Arc<dyn Driver>) -> Result<DriverConnector> {
        let directory = driver.state_dir().map_err(failed("cannot ask for the state directory"))?;
        let store = directory.map(|directory| Store::open(&directory)).transpose()?;
        Ok(DriverConnector { driver, store })
    }
}

impl Connector for DriverConnector {
    fn supported_flags(&self) -> CreateFlags {
        SUPPORTED_FLAGS
    }

    fn snapshot_list(&self) -> &dyn SnapshotList {
        match &self.store {
            Some(store) => store,
            None => self,
        }
    }

    fn store(&self) -> Option<&Store> {
        self.store.as_ref()
    }

    fn reserve(&self, name: Option<&str>) -> Result<Reserved> {
        if let Some(store) = &self.store {
            return Reserved::in_store(store, name);
        }
        let is_known = |name: &str| {
            let known = self
                .driver
                .snapshot_xml(name)
                .map_err(failed("cannot look for a snapshot of this name"))?;
            Ok::<_, Error>(known.is_some())
        };
        let name = match name {
            Some(name) => {
                check_name(name)?;
                if is_known(name)? {
                    fail!(OperationInvalid, "domain snapshot '{name}' already exists");
                }
                name.to_owned()
            }
            None => {
                let mut names = generated_names();
                let free = names.find_map(|name| {
                    is_known(&name).map(|known| (!known).then_some(name)).transpose()
                });
                free.unwrap_or_else(|| {
                    fail!(OperationInvalid, "no name is free for the snapshot: give it one")
                })?
            }
        };
        Ok(Reserved::by_others(name, None))
    }

    fn begin(&self) -> Result<Box<dyn Guest + '_>> {
        let driver = &self.driver;
        let label = "the driver's domain";
        let mut exclusive = vec![Exclusive::take(
            label,
            format!("instantsnap/driver/{}/{:x}", std::process::id(), driver.identity()),
        )?];
        let mut channel = Callbacks::begin(driver)?;
        let state = driver.state().map_err(failed("cannot ask for the domain's state"))?;
        if state == RunState::Off {
            fail!(OperationInvalid, "the domain is not running");
        }
        let deadline = Deadline::after(QUERY_TIMEOUT);
        channel.qemu = QemuProcess::by_threads(&mut channel, deadline);
        if let Some(qemu) = &channel.qemu {
            // The same QEMU may be opened by another backend too.
            exclusive.push(hold_qemu(label, qemu)?);
        }
        channel.version = crate::monitor::commands::query_version(&mut channel, deadline)?;
        check_version(channel.version)?;
        let domain = driver.domain_xml().map_err(failed("cannot ask for the domain's XML"))?;
        let domain = Domain::parse(&domain)?;
        if let Some(socket) = driver.watchdog_socket() {
            channel.watchdog_monitor = Some(Monitor::connect(&socket, deadline)?);
        }
        driver.take_events();
        Ok(Box::new(MonitorGuest::new(channel, Some(domain), self.store.as_ref(), exclusive)))
    }
}

/// The snapshot list that the driver keeps.
impl SnapshotList for DriverConnector {
    fn names(&self) -> Result<Vec<String>> {
        fail!(OperationUnsupported, "the driver records its snapshots itself: ask it for them")
    }

    fn xml(&self, name: &str) -> Result<String> {
        let xml =
            self.driver.snapshot_xml(name).map_err(failed("cannot ask for the snapshot's XML"))?;
        xml.ok_or_else(|| {
            Error::new(
                Code::NoDomainSnapshot,
                format!("no domain snapshot with matching name '{name}'"),
            )
        })
    }

    fn current(&self) -> Result<Option<String>> {
        self.driver.current().map_err(failed("cannot ask for the current snapshot"))
    }

    fn forget(&self, name: &str) -> Result<()> {
        self.xml(name)?;
        self.driver.forget(name).map_err(failed(&format!("cannot forget snapshot '{name}'")))
    }
}

/// The driver's monitor during one operation.
struct Callbacks<'a> {
    driver: &'a dyn Driver,
    qemu: Option<QemuProcess>,
    version: (u64, u64),
    watchdog_monitor: Option<Monitor>,
}

impl<'a> Callbacks<'a> {
    fn begin(driver: &'a Arc<dyn Driver>) -> Result<Callbacks<'a>> {
        driver.begin_job().map_err(|reason| {
            Error::new(
                Code::OperationInvalid,
                format!("the driver does not let a snapshot operation begin{reason}"),
            )
        })?;
        Ok(Callbacks { driver: &**driver, qemu: None, version: (0, 0), watchdog_monitor: None })
    }
}

impl Drop for Callbacks<'_> {
    fn drop(&mut self) {
        self.driver.end_job();
    }
}

/// Returns an answer that came before the deadline. A later one is not used: the caller has to
/// query the state again.
fn in_time<T>(deadline: Deadline, answer: T) -> std::result::Result<T, Failure> {
    deadline.left().map(|_| answer).ok_or(Failure::Late)
}

impl Execute for Callbacks<'_> {
    fn execute(
        &mut self,
        command: Command,
        deadline: Deadline,
    ) -> std::result::Result<Json, Failure> {
        let text = json!({ "execute": command.name, "arguments": command.arguments }).to_string();
        let left = deadline.left().ok_or(Failure::Late)?;
        let reply = self.driver.run(&text, command.fd, left);
        let reply = in_time(deadline, reply)?;
        let reply = reply
            .map_err(|reason| Failure::Lost(format!("the driver's callback failed{reason}")))?;
        let reply = parse(reply.as_bytes()).map_err(|error| {
            Failure::Lost(format!("the driver's reply makes no sense: {error}"))
        })?;
        read_reply(reply)
    }
}

impl Callbacks<'_> {
    /// Whether QEMU has ended. The driver's answer counts only if QEMU's process cannot be seen:
    /// the images of a running QEMU must not be merged.
    fn has_ended(&self) -> bool {
        match &self.qemu {
            Some(qemu) => qemu.has_ended(),
            None => self.driver.state() == Ok(RunState::Off),
        }
    }

    /// Calls the driver's callback, or `otherwise` if the driver has none.
    fn by_driver_or(
        &mut self,
        step: &str,
        deadline: Deadline,
        by_driver: impl FnOnce(&dyn Driver, Duration) -> Option<Answer<()>>,
        otherwise: impl FnOnce(&mut dyn Execute) -> Result<()>,
    ) -> Result<()> {
        let left = deadline.left().ok_or_else(|| Failure::Late.into_error(step))?;
        match by_driver(self.driver, left) {
            None => otherwise(self),
            Some(done) => match in_time(deadline, done) {
                Ok(done) => done.map_err(failed(step)),
                Err(late) => Err(late.into_error(step)),
            },
        }
    }
}

impl Channel for Callbacks<'_> {
    fn version(&self) -> (u64, u64) {
        self.version
    }

    fn pid(&self) -> Option<u32> {
        self.qemu.as_ref().map(|qemu| qemu.pid)
    }

    fn identity(&self) -> String {
        format!("driver {:x} {:?}", self.driver.identity(), self.pid())
    }

    fn take_events(&mut self) -> Vec<Event> {
        self.driver.take_events()
    }

    fn pause(&mut self, deadline: Deadline) -> Result<()> {
        let stop = |qemu: &mut dyn Execute| crate::monitor::commands::stop(qemu, deadline);
        self.by_driver_or(
            "cannot pause the guest",
            deadline,
            |driver, left| driver.pause(left),
            stop,
        )
    }

    fn resume(&mut self, deadline: Deadline) -> Result<()> {
        let cont = |qemu: &mut dyn Execute| crate::monitor::commands::cont(qemu, deadline);
        self.by_driver_or(
            "cannot resume the guest",
            deadline,
            |driver, left| driver.resume(left),
            cont,
        )
    }

    fn switch(&mut self, overlays: &[Overlay], deadline: Deadline) -> Result<()> {
        let switches: Vec<_> = overlays.iter().map(Switch::from).collect();
        let step = "cannot switch the disks to their overlays";
        let transaction = |qemu: &mut dyn Execute| switch(qemu, overlays, deadline);
        self.by_driver_or(
            step,
            deadline,
            |driver, left| driver.switch_disks(&switches, left),
            transaction,
        )
    }

    fn merged(&mut self, overlays: &[Overlay]) {
        let switches: Vec<_> = overlays.iter().map(Switch::from).collect();
        self.driver.disks_merged(&switches);
    }

    fn record(&mut self, mut record: Record) -> Result<Record> {
        record.parent =
            self.driver.current().map_err(failed("cannot ask for the current snapshot"))?;
        let step = format!("cannot record snapshot '{}'", record.name);
        self.driver.record(&record.name, &record.to_xml()).map_err(failed(&step))?;
        Ok(record)
    }

    /// The watchdog must not merge: the driver believes that the disks are switched until it is
    /// told otherwise, and after its end no process can tell it.
    fn recovery(&self) -> Recovery<'_> {
        Recovery { monitor: self.watchdog_monitor.as_ref().map(Monitor::socket), merges: false }
    }

    fn free_socket(&self) -> Option<PathBuf> {
        self.driver.watchdog_socket()
    }

    fn leave(&mut self) {
        if let Some(watchdog_monitor) = &mut self.watchdog_monitor {
            watchdog_monitor.leave();
        }
    }

    fn liveness(&mut self) -> Liveness {
        if self.qemu.as_ref().is_some_and(QemuProcess::has_ended) {
            return Liveness::Exited;
        }
        // A QEMU that answers is running, whatever state the driver reports.
        match self.execute(Command::new("query-status", json!({})), Deadline::after(QUERY_TIMEOUT))
        {
            Ok(_) | Err(Failure::Refused(..)) => Liveness::Alive,
            Err(Failure::Late | Failure::Lost(_)) => {
                // A QEMU that ends closes its monitor before it exits.
                std::thread::sleep(Duration::from_millis(20));
                if self.has_ended() { Liveness::Exited } else { Liveness::Unresponsive }
            }
        }
    }
}
