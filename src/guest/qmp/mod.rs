//! The direct way in: the caller itself has started QEMU, and gives its QMP socket.
//!
//! The library is the driver here: it keeps the metadata, creates the overlays and switches the disks by QMP.

mod drives;
mod overlays;
mod process;

use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use self::overlays::Overlay;
use self::process::Exclusive;
use super::{Connector, Guest, PATIENCE, Presence};
use crate::error::{Code, Result, fail};
use crate::flags;
use crate::monitor::commands::{self, Status};
use crate::monitor::{Command, Deadline, Event, Execute, Failure, Monitor};
use crate::snapshot::domain::{Domain, Machine};
use crate::snapshot::{DiskPlan, Drive, Store};

/// For QEMU to accept a client and greet it.
const GREETING: Duration = Duration::from_secs(5);
/// The first QEMU with background snapshots.
const OLDEST: (u64, u64) = (6, 0);

/// The oldest of the newer ones whose behaviour was measured, where it differs from 7.2's.
const MEASURED: (u64, u64) = (10, 0);

/// A QEMU with a QMP socket.
#[derive(Debug)]
pub struct QmpConnector {
    socket: PathBuf,
    domain: Option<Domain>,
    store: Store,
}

impl QmpConnector {
    /// Opens it, and looks whether there really is a QEMU behind the socket.
    pub fn open(socket: &Path, domain_xml: Option<&str>, state_dir: &Path) -> Result<QmpConnector> {
        let domain = domain_xml.map(Domain::parse).transpose()?;
        let store = Store::open(state_dir)?;
        let connector = QmpConnector { socket: socket.into(), domain, store };
        let deadline = Deadline::after(GREETING);
        // Where one of our own operations has the monitor, it would greet us only after that; and it is QEMU's.
        match Exclusive::take_socket(socket) {
            Err(error) if error.code == Code::OperationInvalid => return Ok(connector),
            held => drop(held?),
        }
        check_version(&Monitor::connect(socket, deadline)?)?;
        Ok(connector)
    }
}

impl Connector for QmpConnector {
    fn built_flags(&self) -> u32 {
        flags::NO_METADATA | flags::HALT | flags::ATOMIC | flags::LIVE | flags::INSTANT
    }

    fn store(&self) -> &Store {
        &self.store
    }

    fn domain(&self) -> Option<&Domain> {
        self.domain.as_ref()
    }

    fn begin(&self) -> Result<Box<dyn Guest + '_>> {
        let deadline = Deadline::after(GREETING);
        let mut exclusive = vec![Exclusive::take_socket(&self.socket)?];
        let monitor = Monitor::connect(&self.socket, deadline)?;
        if let Some(qemu) = &monitor.qemu {
            exclusive.push(Exclusive::take_qemu(&self.socket, qemu)?);
        }
        check_version(&monitor)?;
        Ok(Box::new(QmpGuest {
            connector: self,
            monitor,
            _exclusive: exclusive,
            overlays: Vec::new(),
            events: Vec::new(),
        }))
    }
}

fn check_version(monitor: &Monitor) -> Result<()> {
    if monitor.version < OLDEST {
        let (major, minor) = monitor.version;
        fail!(ConfigUnsupported, "QEMU {major}.{minor} is too old: background snapshots need 6.0 or later");
    }
    Ok(())
}

/// A QEMU during one operation.
struct QmpGuest<'a> {
    connector: &'a QmpConnector,
    monitor: Monitor,
    _exclusive: Vec<Exclusive>,
    overlays: Vec<Overlay>,
    events: Vec<Event>,
}

impl Execute for QmpGuest<'_> {
    fn execute(&mut self, command: Command, deadline: Deadline) -> std::result::Result<Value, Failure> {
        self.monitor.execute(command, deadline)
    }
}

impl Guest for QmpGuest<'_> {
    fn status(&mut self) -> Result<Status> {
        commands::query_status(self, Deadline::after(PATIENCE))
    }

    fn drives(&mut self) -> Result<Vec<Drive>> {
        let domain = self.connector.domain.as_ref();
        let pid = self.monitor.qemu.as_ref().map(|qemu| qemu.pid);
        drives::drives(&mut self.monitor, domain, pid)
    }

    fn machine(&mut self) -> Result<Machine> {
        let emulator = self.monitor.qemu.as_ref().and_then(|qemu| process::executable(qemu.pid));
        drives::machine(&mut self.monitor, emulator)
    }

    fn check_memory_is_its_own(&mut self) -> Result<()> {
        drives::check_memory_is_its_own(&mut self.monitor)
    }

    fn background_keeps_paused(&self) -> bool {
        // Measured: 7.2 starts the guest by itself once tracking is armed, 10.0 restores the state it found. What those
        // in between do cannot be asked, and was not tried.
        self.monitor.version >= MEASURED
    }

    fn background_can_be_cancelled(&self) -> bool {
        // Measured likewise: 7.2 leaves it protected, 10.0 does not.
        self.monitor.version >= MEASURED
    }

    fn create_overlays(&mut self, disks: &[DiskPlan]) -> Result<()> {
        for (index, disk) in disks.iter().enumerate() {
            // Kept before it is made, so that whatever was made of it is undone.
            self.overlays.push(Overlay::new(disk, index));
            overlays::create(&mut self.monitor, self.overlays.last_mut().expect("just pushed"))?;
        }
        Ok(())
    }

    fn pause(&mut self, deadline: Deadline) -> Result<()> {
        self.monitor.take_events();
        self.events.clear();
        commands::stop(self, deadline)
    }

    fn switch_disks(&mut self, deadline: Deadline) -> Result<()> {
        overlays::switch(&mut self.monitor, &self.overlays, deadline)
    }

    fn resume(&mut self, deadline: Deadline) -> Result<()> {
        let status = commands::query_status(self, deadline)?;
        match status.status.as_str() {
            // On a running guest `cont` would be harmless, but tell everybody of a stop that never was.
            _ if status.running => Ok(()),
            "paused" | "postmigrate" | "finish-migrate" | "prelaunch" | "io-error" => commands::cont(self, deadline),
            other => fail!(OperationFailed, "cannot resume the guest: its state is now '{other}'"),
        }
    }

    fn last_pause(&mut self) -> Option<Duration> {
        self.events.extend(self.monitor.take_events());
        let stop = self.events.iter().position(|event| event.name == "STOP")?;
        let resume = self.events[stop..].iter().find(|event| event.name == "RESUME")?;
        resume.time.checked_sub(self.events[stop].time)
    }

    fn merge_disks(&mut self) -> Result<()> {
        overlays::merge(&mut self.monitor, &mut self.overlays)
    }

    fn discard_overlays(&mut self) -> Result<()> {
        overlays::discard(&mut self.monitor, &mut self.overlays)
    }

    fn merge_and_discard_offline(&mut self, switched: bool) -> Result<()> {
        overlays::merge_and_discard_offline(&mut self.overlays, switched)
    }

    fn monitor_socket(&self) -> Option<BorrowedFd<'_>> {
        Some(self.monitor.socket())
    }

    fn halt(&mut self) -> Result<()> {
        let command = Command::new("quit", json!({}));
        match self.monitor.execute(command, Deadline::after(PATIENCE)) {
            Ok(_) | Err(Failure::Lost(_)) => Ok(()),
            Err(failure) => Err(failure.into_error("cannot end the guest")),
        }
    }

    fn presence(&mut self) -> Presence {
        let deadline = Deadline::after(GREETING);
        match self.monitor.execute(Command::new("query-status", json!({})), deadline) {
            Ok(_) | Err(Failure::Refused(..)) => return Presence::Here,
            Err(Failure::Late) => return Presence::Silent,
            Err(Failure::Lost(_)) => {}
        }
        while deadline.left().is_some() {
            if self.monitor.qemu.as_ref().is_some_and(|qemu| qemu.has_ended()) {
                return Presence::Gone;
            }
            if let Ok(monitor) = Monitor::connect(&self.connector.socket, deadline) {
                // Another QEMU can have taken the socket over: that one is not ours to touch. Where one of them is not known,
                // the socket is all there is to go by.
                let same = match (&monitor.qemu, &self.monitor.qemu) {
                    (Some(new), Some(old)) => new.pid == old.pid && !old.has_ended(),
                    _ => true,
                };
                if same {
                    self.monitor = monitor;
                    return Presence::Here;
                }
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Presence::Silent
    }
}
