// SPDX-License-Identifier: LGPL-2.1-or-later

//! A guest with QEMU's monitor, over the library's connection or the driver's: overlays are
//! created, switched to and merged back by QMP.

use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::json;

use super::overlays::{self, Overlay};
use super::{drives, process};
use crate::backend::exclusive::Exclusive;
use crate::backend::guest::{
    Capabilities, DEFAULT_TIMEOUT, Description, Guest, Liveness, RecoveryChannel, Reserved, Survey,
};
use crate::backend::{busy, open_images, overlay_file, shared_memory};
use crate::deadline::Deadline;
use crate::error::{Code, Error, Result, fail};
use crate::model::domain::{Domain, Source, Storage};
use crate::model::journal::{NotedFile, NotedOverlay};
use crate::model::nbd::Export;
use crate::model::{DiskPlan, Drive, Record, Role, Store};
use crate::monitor::commands::{self, Status};
use crate::monitor::json::Json;
use crate::monitor::{Command, Event, Execute, Failure};

/// QEMU's monitor during one operation. The monitor's owner can replace some QMP commands.
pub trait Channel: Execute + Sized {
    /// QEMU's version.
    fn version(&self) -> (u64, u64);

    /// QEMU's process, where it is known.
    fn pid(&self) -> Option<u32>;

    /// Identifies this run of QEMU within this process.
    fn identity(&self) -> String;

    /// The monitor's socket, where the library itself has connected to it.
    fn socket(&self) -> Option<PathBuf> {
        None
    }

    /// The events that have come since the last call.
    fn take_events(&mut self) -> Vec<Event>;

    /// Stops the vCPUs.
    fn pause(&mut self, deadline: Deadline) -> Result<()> {
        commands::stop(self, deadline)
    }

    /// Starts the vCPUs.
    fn resume(&mut self, deadline: Deadline) -> Result<()> {
        commands::cont(self, deadline)
    }

    /// Switches all disks to their overlays, or none.
    fn switch(&mut self, overlays: &[Overlay], deadline: Deadline) -> Result<()> {
        overlays::switch(self, overlays, deadline)
    }

    /// Reports that the disks' overlays were merged back.
    fn merged(&mut self, _overlays: &[Overlay]) {}

    /// Records a snapshot, if the monitor's owner keeps the metadata.
    fn record(&mut self, record: Record) -> Result<Record> {
        fail!(InternalError, "there is nowhere to record snapshot '{}'", record.name)
    }

    /// How the watchdog reaches QEMU.
    fn recovery(&self) -> Recovery<'_>;

    /// A monitor socket for another process, once this operation has ended.
    fn free_socket(&self) -> Option<PathBuf>;

    /// Leaves the monitor to the watchdog.
    fn leave(&mut self);

    /// Ends the guest's QEMU.
    fn end(&mut self) -> Result<()> {
        match self.execute(Command::new("quit", json!({})), Deadline::after(DEFAULT_TIMEOUT)) {
            Ok(_) | Err(Failure::Lost(_)) => Ok(()),
            Err(failure) => Err(failure.into_error("cannot end the guest")),
        }
    }

    /// Whether QEMU answers or has ended. Reconnects if the connection was lost.
    fn liveness(&mut self) -> Liveness;
}

/// How the watchdog reaches QEMU.
pub struct Recovery<'a> {
    /// The monitor's socket, which only this operation uses, if there is one.
    pub monitor: Option<BorrowedFd<'a>>,
    /// Whether the watchdog merges the overlays back.
    pub merges: bool,
}

/// A QEMU during one operation.
pub struct MonitorGuest<'a, C> {
    channel: C,
    domain: Option<Domain>,
    store: Option<&'a Store>,
    exclusive: Vec<Exclusive>,
    overlays: Vec<Overlay>,
    events: Vec<Event>,
}

impl<'a, C> MonitorGuest<'a, C> {
    /// A guest that is held for this operation. `store`: the state directory, unless the monitor's
    /// owner records the snapshots.
    pub fn new(
        channel: C,
        domain: Option<Domain>,
        store: Option<&'a Store>,
        exclusive: Vec<Exclusive>,
    ) -> MonitorGuest<'a, C> {
        MonitorGuest { channel, domain, store, exclusive, overlays: Vec::new(), events: Vec::new() }
    }
}

impl<C: Channel> Execute for MonitorGuest<'_, C> {
    fn execute(
        &mut self,
        command: Command,
        deadline: Deadline,
    ) -> std::result::Result<Json, Failure> {
        self.channel.execute(command, deadline)
    }
}

impl<C: Channel> Guest for MonitorGuest<'_, C> {
    fn status(&mut self) -> Result<Status> {
        commands::query_status(self, Deadline::after(DEFAULT_TIMEOUT))
    }

    fn drives(&mut self) -> Result<Vec<Drive>> {
        let pid = self.pid();
        drives::drives(&mut self.channel, self.domain.as_ref(), pid)
    }

    fn survey(&mut self) -> Result<Survey> {
        let drives = self.drives()?;
        let source = |drive| {
            let Drive { file, format, .. }: &Drive = drive;
            Source { target: drive.name(), storage: Storage::at(file), format }
        };
        let known = self.domain.as_ref();
        // QEMU and libvirt name network storage differently.
        let is_remote = |drive: &Drive| {
            let storage = known.and_then(|domain| domain.storage(drive.name()));
            let is_unknown =
                |storage: Storage| storage.name().is_none() || Export::named(&drive.file).is_none();
            !drive.file.starts_with('/') && storage.is_some_and(is_unknown)
        };
        let disks: Vec<_> = drives
            .iter()
            .filter(|drive| {
                !matches!(drive.role, Role::Firmware | Role::Empty) && !is_remote(drive)
            })
            .map(source)
            .collect();
        let domain_xml = match &self.domain {
            Some(domain) => domain.with_sources(&disks)?,
            None => {
                let emulator = self.pid().and_then(process::executable);
                Domain::minimal(&drives::machine(&mut self.channel, emulator)?, &disks)
            }
        };
        let description = Description { domain_xml, cookie: None, owner: None };
        Ok(Survey { drives, description })
    }

    fn check_memory_not_shared(&mut self) -> Result<()> {
        shared_memory::check_memory_not_shared(self)
    }

    fn check_images_are_named(&mut self, disks: &[DiskPlan]) -> Result<()> {
        open_images::check_named(self.pid(), disks)
    }

    fn check_not_busy(&mut self, disks: &[DiskPlan]) -> Result<()> {
        busy::check_no_block_jobs(self, disks)
    }

    fn identity(&self) -> String {
        self.channel.identity()
    }

    fn pid(&self) -> Option<u32> {
        self.channel.pid()
    }

    fn socket(&self) -> Option<PathBuf> {
        self.channel.socket()
    }

    fn is_by_driver(&self) -> bool {
        self.channel.socket().is_none()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::of_qemu(self.channel.version())
    }

    fn create_overlays(&mut self, disks: &[DiskPlan]) -> Result<()> {
        let records = self.store.map(Store::list).transpose()?.unwrap_or_default();
        let images = records
            .iter()
            .flat_map(|record| record.disks.iter().map(|disk| (&*record.name, &*disk.image)));
        overlay_file::check_not_of_snapshots(disks, images)?;
        // The overlays were noted before they are made, so that a partly made one is undone too.
        let MonitorGuest { overlays, channel, .. } = self;
        overlays.iter_mut().try_for_each(|overlay| overlays::create(channel, overlay))
    }

    fn plan_overlays(&mut self, disks: &[DiskPlan]) -> Vec<NotedOverlay> {
        self.overlays =
            disks.iter().enumerate().map(|(index, disk)| Overlay::new(disk, index)).collect();
        self.overlays.iter().map(Overlay::noted).collect()
    }

    fn overlay_files(&self) -> Vec<NotedFile> {
        self.overlays.iter().filter_map(Overlay::noted_file).collect()
    }

    fn adopt_overlays(
        &mut self,
        overlays: &[(NotedOverlay, Option<NotedFile>)],
        merged: &[String],
    ) -> Result<()> {
        self.overlays = overlays::adopt(&mut self.channel, overlays, merged)?;
        Ok(())
    }

    fn pause(&mut self, deadline: Deadline) -> Result<()> {
        self.channel.take_events();
        self.events.clear();
        self.channel.pause(deadline)
    }

    fn switch_disks(&mut self, _snapshot: &str, deadline: Deadline) -> Result<()> {
        match self.overlays.is_empty() {
            true => Ok(()),
            false => self.channel.switch(&self.overlays, deadline),
        }
    }

    fn resize_overlay(&mut self, disk: &DiskPlan, size: u64, deadline: Deadline) -> Result<()> {
        overlays::resize(&mut self.channel, &self.overlays, disk, size, deadline)
    }

    fn resume(&mut self, deadline: Deadline) -> Result<()> {
        let status = commands::query_status(self, deadline)?;
        match status.status.as_str() {
            // On a running guest `cont` would do no harm, but QEMU would report a stop that never
            // was.
            _ if status.running => Ok(()),
            "paused" | "postmigrate" | "finish-migrate" | "prelaunch" | "io-error" => {
                self.channel.resume(deadline)
            }
            // The guest has stopped by itself, not because of the snapshot.
            "suspended" | "shutdown" | "guest-panicked" | "internal-error" | "watchdog" => Ok(()),
            other => fail!(OperationFailed, "cannot resume the guest: its state is now '{other}'"),
        }
    }

    fn last_pause(&mut self) -> Option<Duration> {
        self.events.extend(self.channel.take_events());
        let stop = self.events.iter().position(|event| event.name == "STOP")?;
        let resume = self.events[stop..].iter().find(|event| event.name == "RESUME")?;
        resume.time.checked_sub(self.events[stop].time)
    }

    fn commit(&mut self, reserved: &Reserved, record: Record) -> Result<Record> {
        match (self.store, reserved.held()) {
            (Some(store), Some(held)) => store.commit(held, record),
            (Some(_), None) => {
                Err(Error::new(Code::InternalError, "the snapshot's name is not held"))
            }
            (None, _) => self.channel.record(record),
        }
    }

    fn record_file(&self, name: &str) -> Option<PathBuf> {
        self.store.map(|store| store.record_path(name))
    }

    fn merge_disks(&mut self) -> Result<()> {
        if !self.overlays.is_empty() {
            overlays::merge(&mut self.channel, &mut self.overlays)?;
            self.channel.merged(&self.overlays);
        }
        Ok(())
    }

    fn discard_overlays(&mut self) -> Result<()> {
        overlays::discard(&mut self.channel, &mut self.overlays)
    }

    fn merge_offline(&mut self) -> Result<bool> {
        overlays::merge_offline(&mut self.overlays).map(|()| true)
    }

    fn merge_and_discard_offline(&mut self, switched: bool) -> Result<()> {
        overlays::merge_and_discard_offline(&mut self.overlays, switched)
    }

    fn recovery_channel<'a>(&'a self, _snapshot: &'a str) -> RecoveryChannel<'a> {
        let Recovery { monitor, merges } = self.channel.recovery();
        let overlays = self.overlays.iter().map(|overlay| overlay.for_recovery(merges)).collect();
        monitor.map_or(RecoveryChannel::None, |monitor| RecoveryChannel::Monitor(monitor, overlays))
    }

    fn monitor_socket(&self) -> Option<PathBuf> {
        self.channel.free_socket()
    }

    fn held(&self) -> Vec<BorrowedFd<'_>> {
        self.exclusive.iter().map(Exclusive::as_fd).collect()
    }

    fn leave_held(&mut self) {
        self.exclusive.iter_mut().for_each(Exclusive::leave);
        self.channel.leave();
    }

    fn halt(&mut self) -> Result<()> {
        self.channel.end()
    }

    fn liveness(&mut self) -> Liveness {
        self.channel.liveness()
    }
}
