// SPDX-License-Identifier: LGPL-2.1-or-later

//! The direct backend: the caller has started QEMU, and gives the library its QMP socket.
//!
//! The library is the driver here: it keeps the metadata, creates the overlays and switches the
//! disks by QMP.

pub mod drives;
pub mod jobs;
mod monitored;
mod overlays;
mod process;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;

pub(super) use self::monitored::{Channel, MonitorGuest, Recovery};
pub use self::overlays::Switch;
pub(super) use self::overlays::{Overlay, switch};
pub(super) use self::process::hold_qemu;
use self::process::{guest_label, hold_socket};
use super::guest::{Connector, Guest, Liveness, Reserved, SnapshotList, check_version};
use crate::deadline::Deadline;
use crate::error::{Code, Result};
use crate::model::Store;
use crate::model::domain::Domain;
use crate::model::flags::{self, CreateFlags};
use crate::monitor::json::Json;
use crate::monitor::{Command, Event, Execute, Failure, Monitor};

/// The timeout for QEMU to accept a client and greet it.
const GREETING: Duration = Duration::from_secs(5);

/// The flags that are supported where the library makes the overlays and keeps the metadata.
pub(super) const SUPPORTED_FLAGS: CreateFlags = CreateFlags::constant(
    flags::NO_METADATA
        | flags::HALT
        | flags::REUSE_EXT
        | flags::ATOMIC
        | flags::LIVE
        | flags::INSTANT,
);

/// A QEMU with a QMP socket.
#[derive(Debug)]
pub struct QmpConnector {
    socket: PathBuf,
    domain: Option<Domain>,
    store: Store,
}

impl QmpConnector {
    /// Opens the guest, and checks that a QEMU answers on the socket.
    pub fn open(socket: &Path, domain_xml: Option<&str>, state_dir: &Path) -> Result<QmpConnector> {
        let domain = domain_xml.map(Domain::parse).transpose()?;
        let store = Store::open(state_dir)?;
        let connector = QmpConnector { socket: socket.into(), domain, store };
        let deadline = Deadline::after(GREETING);
        // If an operation of this library has the monitor, QEMU would greet us only after it. The
        // socket is QEMU's then, so no check is needed.
        match hold_socket(socket) {
            Err(error) if error.code == Code::OperationInvalid => return Ok(connector),
            held => drop(held?),
        }
        check_version(Monitor::connect(socket, deadline)?.version)?;
        Ok(connector)
    }
}

impl Connector for QmpConnector {
    fn supported_flags(&self) -> CreateFlags {
        SUPPORTED_FLAGS
    }

    fn snapshot_list(&self) -> &dyn SnapshotList {
        &self.store
    }

    fn store(&self) -> Option<&Store> {
        Some(&self.store)
    }

    fn reserve(&self, name: Option<&str>) -> Result<Reserved> {
        Reserved::in_store(&self.store, name)
    }

    fn begin(&self) -> Result<Box<dyn Guest + '_>> {
        hold(&self.socket, self.domain.clone(), Some(&self.store))
    }
}

/// Holds a guest by its socket for one operation. `store`: the state directory, if the operation
/// needs it.
pub fn hold<'a>(
    socket: &'a Path,
    domain: Option<Domain>,
    store: Option<&'a Store>,
) -> Result<Box<dyn Guest + 'a>> {
    let deadline = Deadline::after(GREETING);
    let mut exclusive = vec![hold_socket(socket)?];
    let monitor = Monitor::connect(socket, deadline)?;
    if let Some(qemu) = &monitor.qemu {
        exclusive.push(hold_qemu(&guest_label(socket), qemu)?);
    }
    check_version(monitor.version)?;
    let channel = Socket { path: socket, monitor };
    Ok(Box::new(MonitorGuest::new(channel, domain, store, exclusive)))
}

/// The monitor's socket during one operation.
struct Socket<'a> {
    path: &'a Path,
    monitor: Monitor,
}

impl Execute for Socket<'_> {
    fn execute(
        &mut self,
        command: Command,
        deadline: Deadline,
    ) -> std::result::Result<Json, Failure> {
        self.monitor.execute(command, deadline)
    }
}

impl Channel for Socket<'_> {
    fn version(&self) -> (u64, u64) {
        self.monitor.version
    }

    fn pid(&self) -> Option<u32> {
        self.monitor.qemu.as_ref().map(|qemu| qemu.pid)
    }

    fn identity(&self) -> String {
        format!("{} {:?}", self.path.display(), self.pid())
    }

    fn socket(&self) -> Option<PathBuf> {
        Some(self.path.canonicalize().unwrap_or_else(|_| self.path.into()))
    }

    fn take_events(&mut self) -> Vec<Event> {
        self.monitor.take_events()
    }

    fn recovery(&self) -> Recovery<'_> {
        Recovery { monitor: Some(self.monitor.socket()), merges: true }
    }

    fn free_socket(&self) -> Option<PathBuf> {
        Some(self.path.into())
    }

    fn leave(&mut self) {
        self.monitor.leave();
    }

    fn liveness(&mut self) -> Liveness {
        let deadline = Deadline::after(GREETING);
        match self.monitor.execute(Command::new("query-status", json!({})), deadline) {
            Ok(_) | Err(Failure::Refused(..)) => return Liveness::Alive,
            Err(Failure::Late) => return Liveness::Unresponsive,
            Err(Failure::Lost(_)) => {}
        }
        while deadline.left().is_some() {
            if self.monitor.qemu.as_ref().is_some_and(|qemu| qemu.has_ended()) {
                return Liveness::Exited;
            }
            if let Ok(monitor) = Monitor::connect(self.path, deadline) {
                // Another QEMU may have the socket now, which must not be touched. If one of the
                // two processes is unknown, only the socket identifies QEMU.
                let same = match (&monitor.qemu, &self.monitor.qemu) {
                    (Some(new), Some(old)) => new.pid == old.pid && !old.has_ended(),
                    _ => true,
                };
                if same {
                    self.monitor = monitor;
                    return Liveness::Alive;
                }
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Liveness::Unresponsive
    }
}
