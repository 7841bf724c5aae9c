// SPDX-License-Identifier: LGPL-2.1-or-later

//! A domain during its snapshot. Each step is a call of libvirt, or, where libvirt has none, a
//! command to QEMU through libvirt's monitor passthrough.

use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::Duration;

use super::call::{CallError, Retry};
use super::managed_domain::ManagedDomain;
use super::opened::Transport;
use super::overlays::Overlays;
use super::session::{Resumed, Session};
use super::snapshot_def::SnapshotDef;
use super::survey::{Survey, owner_of_new_files};
use super::{drives, forget, lease, recovery, volumes};
use crate::backend::guest::{
    Capabilities, DEFAULT_TIMEOUT, Guest, Liveness, Place, RecoveryChannel, Reserved, SnapshotList,
    Survey as Found,
};
use crate::backend::overlay_file::{self, Beforehand};
use crate::backend::{busy, open_images, shared_memory};
use crate::deadline::Deadline;
use crate::error::{Error, Result, fail};
use crate::image::Format;
use crate::libvirt::{Domain, RESTORES_SPARSE, RESTORES_ZSTD, Snapshot};
use crate::model::domain;
use crate::model::flags::{self, CreateFlags};
use crate::model::journal::{NotedDomain, NotedFile, NotedOverlay};
use crate::model::{DiskPlan, Drive, NotedMemory, Record, snapshot_writer};
use crate::monitor::commands::{self, Status};
use crate::monitor::json::Json;
use crate::monitor::{Command, Execute, Failure};
use crate::tool;

/// If libvirt has not resumed the domain after this time, QEMU is told directly.
const RESUME_SOON: Duration = Duration::from_secs(2);

/// How many seconds the watchdog waits for a daemon that is restarted.
const CALLER_KILLED: u32 = 10;
/// The same if the daemon itself was the caller: it may be being upgraded.
const DAEMON_KILLED: u32 = 300;

/// Switches only the disks, to overlays that exist.
const SWITCH_FLAGS: CreateFlags =
    CreateFlags::constant(flags::DISK_ONLY | flags::NO_METADATA | flags::ATOMIC | flags::REUSE_EXT);

/// A domain during its snapshot.
pub struct LibvirtGuest<'a> {
    pub(super) session: Session<'a>,
    /// The state of the domain when the snapshot was planned.
    pub(super) survey: Survey,
    pub(super) overlays: Overlays,
    lease: lease::Lease,
    /// The pause may have reached another QEMU, of a domain that was started again.
    pub(super) another_is_paused: bool,
    /// libvirt's object for the switch.
    switched: Option<Snapshot>,
    /// The overlays were made by another process, which has ended.
    pub(super) is_adopted: bool,
    /// The snapshot as libvirt has recorded it.
    pub(super) registered: Option<Registered>,
}

/// A snapshot as libvirt has recorded it.
pub(super) struct Registered {
    pub snapshot: Snapshot,
    pub parent: Option<String>,
}

impl<'a> LibvirtGuest<'a> {
    /// The guest of a session that has just begun.
    pub fn new(session: Session<'a>) -> LibvirtGuest<'a> {
        LibvirtGuest {
            session,
            survey: Survey::default(),
            overlays: Overlays::default(),
            lease: lease::Lease::default(),
            another_is_paused: false,
            switched: None,
            is_adopted: false,
            registered: None,
        }
    }

    /// The backing chain of each disk now, from the top down.
    pub(super) fn chains(&mut self) -> Result<Vec<(String, Vec<String>)>> {
        Ok(drives::chains(&self.domain_with_paths()?))
    }

    /// The domain as it is now, with paths in place of volumes.
    pub(super) fn domain_with_paths(&mut self) -> Result<domain::Domain> {
        domain::Domain::parse(&volumes::with_paths(&self.session.xml(0)?, &self.survey.volumes)?)
    }

    /// Refuses existing overlays that are images of the domain's snapshots.
    fn check_not_of_snapshots(&mut self, disks: &[DiskPlan]) -> Result<()> {
        if !disks.iter().any(|disk| Path::new(&disk.overlay).exists()) {
            return Ok(());
        }
        let snapshots = self.session.snapshot_defs()?;
        let images = snapshots.iter().flat_map(|snapshot| {
            let files = snapshot.images.iter().filter_map(|image| image.file.as_deref());
            files.map(|file| (snapshot.name.as_str(), file))
        });
        overlay_file::check_not_of_snapshots(disks, images)
    }

    /// The targets of the disks that get no overlay.
    fn left_out(&self) -> Vec<String> {
        let disks = self.overlays.disks();
        self.survey.left_out(|target| disks.iter().any(|disk| disk.drive.name() == target))
    }

    fn pause_again_for_leases(&mut self) -> Result<()> {
        let step = "cannot take the disk leases of the domain back";
        let deadline = Deadline::after(DEFAULT_TIMEOUT);
        self.session
            .caller
            .call(deadline, Retry::Safe, Domain::suspend)
            .map_err(|error| error.into_error(step))?;
        self.session.resume(deadline).map_err(|error| error.into_error(step)).map(drop)
    }

    /// The parent of the snapshot that is recorded now: the current one. If another client has
    /// taken the current one after ours, its name is returned too: it becomes a child of ours, and
    /// the parent is the snapshot that was current before.
    fn parent_of(&mut self, record: &Record) -> Result<(Option<String>, Option<String>)> {
        let current = self.session.current_snapshot()?;
        if current == self.survey.current {
            return Ok((current, None));
        }
        let snapshot = match &current {
            Some(name) => self.session.snapshot_def(name)?,
            None => None,
        };
        // A snapshot whose images are our overlays is younger.
        let is_on_ours = |snapshot: &SnapshotDef| {
            let files = snapshot.images.iter().filter_map(|image| image.file.as_deref());
            files.into_iter().any(|file| record.disks.iter().any(|disk| disk.overlay == file))
        };
        Ok(match snapshot.filter(is_on_ours) {
            Some(younger) => (self.survey.current.clone(), Some(younger.name)),
            None => (current, None),
        })
    }
}

impl LibvirtGuest<'_> {
    /// Refuses a domain whose memory libvirt could not restore from a sparse image.
    fn check_restores_sparse(&mut self) -> Result<()> {
        let domain = self.session.connector.name.clone();
        if self.survey.live.has_persistent_memory {
            fail!(
                ConfigUnsupported,
                "domain '{domain}' has persistent memory (NVDIMM or virtio-pmem): its zero pages \
                 are not in a memory image of the format 'sparse', and a restore would leave there \
                 what was written since; take the snapshot with a raw image"
            );
        }
        let all = commands::query_migrate_capabilities(self, Deadline::after(DEFAULT_TIMEOUT))?;
        if !all.iter().any(|(capability, _)| capability == "mapped-ram") {
            fail!(
                ConfigUnsupported,
                "the QEMU of domain '{domain}' cannot restore a memory image of the format \
                 'sparse', which QEMU 9.0 and later can: take the snapshot with a raw image"
            );
        }
        Ok(())
    }
}

impl Execute for LibvirtGuest<'_> {
    fn execute(
        &mut self,
        command: Command,
        deadline: Deadline,
    ) -> std::result::Result<Json, Failure> {
        self.session.execute(command, deadline)
    }
}

impl Guest for LibvirtGuest<'_> {
    fn status(&mut self) -> Result<Status> {
        commands::query_status(self, Deadline::after(DEFAULT_TIMEOUT))
    }

    fn drives(&mut self) -> Result<Vec<Drive>> {
        Ok(self.survey()?.drives)
    }

    fn survey(&mut self) -> Result<Found> {
        self.survey = Survey::read(&mut self.session)?;
        let (drives, description) = (self.survey.drives.clone(), self.survey.description());
        Ok(Found { drives, description })
    }

    fn check_flags(&mut self, flags: CreateFlags) -> Result<()> {
        if flags.halts() && !self.session.is_persistent()? {
            fail!(
                OperationInvalid,
                "cannot halt transient domain '{}' after its snapshot",
                self.session.connector.name
            );
        }
        Ok(())
    }

    /// The default is raw, because libvirt's own revert cannot read a sparse image.
    fn image_format(&mut self, wanted: Option<Format>) -> Result<Format> {
        let wanted = wanted.unwrap_or(Format::Raw);
        let (first, text) = match wanted {
            Format::Raw => return Ok(wanted),
            Format::Zstd(_) => (RESTORES_ZSTD, "10.4"),
            Format::Sparse => (RESTORES_SPARSE, "11.2"),
        };
        let (domain, format) = (&self.session.connector.name, wanted.name());
        if self.session.libvirt_version()? < first {
            fail!(
                ConfigUnsupported,
                "the libvirt of domain '{domain}' cannot restore a memory image of the format \
                 '{format}', which libvirt {text} and later can: take the snapshot with a raw image"
            );
        }
        if first == RESTORES_ZSTD && !tool::is_installed("zstd") {
            fail!(
                ConfigUnsupported,
                "libvirt cannot restore a memory image of the format 'zstd' of domain '{domain}': \
                 the program zstd, by which it does so, is not installed; install it, or take the \
                 snapshot with a raw image"
            );
        }
        if wanted == Format::Sparse {
            self.check_restores_sparse()?;
        }
        Ok(wanted)
    }

    fn check_memory_not_shared(&mut self) -> Result<()> {
        shared_memory::check_memory_not_shared(self)
    }

    fn check_images_are_named(&mut self, disks: &[DiskPlan]) -> Result<()> {
        open_images::check_named(self.pid(), disks)
    }

    fn check_not_busy(&mut self, disks: &[DiskPlan]) -> Result<()> {
        self.session.check_not_started_anew(Deadline::after(DEFAULT_TIMEOUT))?;
        let name = &self.session.connector.name;
        let step = format!("cannot ask for the jobs of domain '{name}'");
        let targets: Vec<_> = disks.iter().map(|disk| disk.drive.name().to_owned()).collect();
        let (job, on_disk) = self.session.call_with_timeout(&step, Retry::Safe, move |domain| {
            let mut on_disk = None;
            for target in &targets {
                if domain.block_job(target)?.is_some() {
                    on_disk = Some(target.clone());
                    break;
                }
            }
            Ok((domain.has_job()?, on_disk))
        })?;
        if let Some(target) = on_disk {
            fail!(
                OperationInvalid,
                "disk '{target}' has an active block job: wait for it to end, or abort it (virsh \
                 blockjob)"
            );
        }
        if job {
            fail!(
                OperationInvalid,
                "domain '{}' has a job under way (a backup, a dump or the like), for which libvirt \
                 would make the snapshot wait: wait for it to end, or abort it (virsh domjobabort)",
                self.session.connector.name
            );
        }
        busy::check_no_block_jobs(self, disks)
    }

    fn identity(&self) -> String {
        format!(
            "{} {} {:?}",
            self.session.connector.uri, self.session.connector.uuid, self.session.id
        )
    }

    fn pid(&self) -> Option<u32> {
        self.session.qemu.as_ref().map(|qemu| qemu.pid)
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            // libvirt does not use this capability.
            never_sets_background_snapshot: true,
            // libvirt's snapshots have no place for copies of UEFI variables. QEMU loads those of
            // the instant with memory, and writes them back to the file.
            keeps_firmware_copies: false,
            // libvirt's own revert would load the memory, and leave these disks as they are then.
            records_manual_disks: false,
            // The system daemon makes QEMU's user the owner of images.
            gives_write_access: !self.session.connector.uri.contains("/session"),
            ..Capabilities::of_qemu(self.session.version)
        }
    }

    fn has_qemu(&self) -> bool {
        self.session.id.is_some()
    }

    fn noted_domain(&self, snapshot: &str) -> Option<NotedDomain> {
        Some(NotedDomain {
            uri: self.session.connector.uri.clone(),
            name: self.session.connector.name.clone(),
            snapshot: snapshot.into(),
            definition: self.survey.inactive_xml.clone(),
        })
    }

    fn adopt_domain(&mut self, noted: &NotedDomain, memory: &Path) -> Result<bool> {
        self.adopt(noted, memory)
    }

    fn places(&mut self) -> Result<Vec<(String, Place)>> {
        self.places_now()
    }

    fn images_of_others(&mut self, snapshot: &str) -> Result<Vec<String>> {
        self.images_of_all_but(snapshot)
    }

    fn plan_overlays(&mut self, disks: &[DiskPlan]) -> Vec<NotedOverlay> {
        let noted = |disk: &DiskPlan| NotedOverlay {
            disk: disk.drive.name().into(),
            overlay: disk.overlay.clone(),
            // libvirt names the nodes when it opens them.
            node: String::new(),
            file_node: String::new(),
            image_node: String::new(),
            image: disk.drive.file.clone(),
            format: disk.drive.format.clone(),
            is_reused: disk.reuse,
        };
        disks.iter().map(noted).collect()
    }

    fn overlay_files(&self) -> Vec<NotedFile> {
        self.overlays.noted_files()
    }

    fn adopt_overlays(
        &mut self,
        overlays: &[(NotedOverlay, Option<NotedFile>)],
        merged: &[String],
    ) -> Result<()> {
        self.adopt_files(overlays, merged)
    }

    fn create_overlays(&mut self, disks: &[DiskPlan]) -> Result<()> {
        self.lease = lease::Lease::read(&self.survey.live, disks);
        let beforehand = match self.session.connector.transport {
            Transport::Client => Beforehand::Taken,
            // The library writes with the daemon's rights, for a client that may have fewer.
            Transport::InProcess(_) => Beforehand::Refused,
        };
        self.check_not_of_snapshots(disks)?;
        let owner = owner_of_new_files(&self.session, None);
        self.overlays.create(disks, beforehand, owner.as_deref())
    }

    fn pause(&mut self, deadline: Deadline) -> Result<()> {
        let paused = self.session.caller.call(deadline, Retry::Safe, Domain::suspend);
        // If the call is late, it may pause a QEMU that was started meanwhile.
        self.another_is_paused = paused == Err(CallError::Late);
        paused.map_err(|error| error.into_error("cannot pause the domain"))?;
        self.session.check_not_started_anew(deadline).inspect_err(|_| self.another_is_paused = true)
    }

    fn switch_disks(&mut self, snapshot: &str, deadline: Deadline) -> Result<()> {
        if self.overlays.disks().is_empty() {
            return Ok(());
        }
        let xml = snapshot_writer::switch_order(snapshot, self.overlays.disks(), &self.left_out());
        let switched = self.session.caller.call(deadline, Retry::Never, move |domain| {
            domain.create_snapshot(&xml, SWITCH_FLAGS.bits())
        });
        self.switched = Some(switched.map_err(|error| {
            error.into_error("cannot switch the domain's disks to their overlays")
        })?);
        self.session.check_not_started_anew(deadline)
    }

    fn resize_overlay(&mut self, disk: &DiskPlan, size: u64, deadline: Deadline) -> Result<()> {
        let target = disk.drive.name().to_owned();
        let step = format!("cannot give disk '{target}' its new size back");
        let resized = self
            .session
            .caller
            .call(deadline, Retry::Safe, move |domain| domain.resize_disk(&target, size));
        resized.map_err(|error| error.into_error(&step))
    }

    fn resume(&mut self, deadline: Deadline) -> Result<()> {
        let step = "cannot resume the domain";
        let soon = Deadline::after(RESUME_SOON.min(deadline.left().unwrap_or_default()));
        // A call that was given up may still pause the domain.
        let mut resumed = match self.session.caller.settle(soon) {
            true => self.session.resume(soon),
            false => Err(CallError::Late),
        };
        if resumed == Err(CallError::Late) {
            // libvirt waits for another client's job. The monitor passthrough need not wait for it.
            let _ = commands::cont(self, Deadline::after(RESUME_SOON));
            self.session.caller.settle(deadline);
            resumed = self.session.resume(deadline);
        }
        let resumed = resumed.map_err(|error| error.into_error(step))?;
        if resumed == Resumed::ByItself {
            // A QEMU 10 that was resumed at the moment of arming can report its guest as paused
            // afterwards, while libvirt reports it as running.
            if self.capabilities().background_keeps_paused && !self.status()?.running {
                commands::cont(self, deadline)?;
            }
            if self.lease.is_lost() {
                self.pause_again_for_leases()?;
            }
        }
        Ok(())
    }

    fn register(&mut self, record: &Record, format: Format) -> Result<()> {
        let (parent, younger) = self.parent_of(record)?;
        let inactive = self
            .survey
            .inactive_xml
            .as_deref()
            .map(|xml| volumes::with_paths(xml, &self.survey.volumes))
            .transpose()?;
        let xml = snapshot_writer::definition(
            record,
            NotedMemory::of(Path::new(&record.memory_file), format.name()),
            parent.as_deref(),
            &self.left_out(),
            inactive.as_deref(),
        );
        let step = format!("cannot record snapshot '{}' in libvirt", record.name);
        let snapshot = self.session.call_with_timeout(&step, Retry::Safe, move |domain| {
            domain.redefine_snapshot(&xml, true)
        })?;
        self.registered = Some(Registered { snapshot, parent });
        // Read again: another client may have changed or deleted it meanwhile.
        let younger = match younger {
            Some(younger) => self.session.snapshot_def(&younger)?,
            None => None,
        };
        if let Some(younger) = younger {
            let parent = &record.name;
            let step = format!("cannot make snapshot '{}' a child of '{parent}'", younger.name);
            let xml = younger.with_parent(parent);
            self.session.call_with_timeout(&step, Retry::Safe, move |domain| {
                domain.redefine_snapshot(&xml, true).map(drop)
            })?;
        }
        Ok(())
    }

    fn confirm(&mut self) -> Result<()> {
        let domain = self.domain_with_paths()?;
        self.overlays.check_chains(&drives::chains(&domain))?;
        self.overlays.check_not_merging(&domain)?;
        let Some(Registered { snapshot, parent }) = &self.registered else { return Ok(()) };
        let (name, parent) = (snapshot.name(), parent.clone());
        let Some(now) = self.session.snapshot_def(&name)? else {
            fail!(
                OperationFailed,
                "another client has deleted snapshot '{name}' while its memory was being saved"
            );
        };
        // If the parent was deleted meanwhile, the grandparent is the new parent.
        if now.parent != parent
            && parent.is_some_and(|parent| {
                self.session.connector.names().is_ok_and(|all| all.contains(&parent))
            })
        {
            fail!(
                OperationFailed,
                "another client has moved snapshot '{name}' while its memory was being saved"
            );
        }
        Ok(())
    }

    fn commit(&mut self, _reserved: &Reserved, mut record: Record) -> Result<Record> {
        if let Some(Registered { parent, .. }) = &self.registered {
            record.parent.clone_from(parent);
        }
        Ok(record)
    }

    fn withdraw(&mut self) -> Result<()> {
        let Some(Registered { snapshot, .. }) = self.registered.take() else { return Ok(()) };
        let name = snapshot.name();
        let forget = || {
            let domain =
                ManagedDomain::called_by(self.session.connector, self.session.caller.another());
            forget::forget(&domain, &name)
        };
        // The second try uses a new connection: the daemon may have been restarted meanwhile. A
        // snapshot that does not exist any more counts as forgotten.
        forget().or_else(|_| forget()).map_err(|error| {
            let message = format!("cannot forget snapshot '{name}': {}", error.message);
            Error::of_libvirt(error.number(), message)
        })
    }

    fn merge_disks(&mut self) -> Result<()> {
        // A switch that was given up must have ended first.
        if !self.session.caller.settle(Deadline::after(2 * DEFAULT_TIMEOUT)) {
            fail!(
                OperationTimeout,
                "libvirt has not carried out the switch of the disks yet: when it does, the domain \
                 goes on with the overlays {}, which must not be removed",
                self.overlays.paths()
            );
        }
        if self.is_adopted {
            self.end_merges_left()?;
        }
        let domain = self.domain_with_paths()?;
        self.overlays.merge(&mut self.session.caller, &drives::chains(&domain))?;
        if self.overlays.merge_detached(&domain)? {
            self.put_definition_back()?;
        }
        Ok(())
    }

    fn discard_overlays(&mut self) -> Result<()> {
        self.overlays.discard()
    }

    fn empty_overlays(&mut self) -> Result<()> {
        match self.session.is_active()? {
            // The domain was started again, and uses their content.
            true => Ok(()),
            false => self.overlays.empty(),
        }
    }

    fn merge_and_discard_offline(&mut self, switched: bool) -> Result<()> {
        self.session.caller.settle(Deadline::after(2 * DEFAULT_TIMEOUT));
        self.resume_another()?;
        if switched {
            self.merge_ended()?;
        }
        self.overlays.discard()
    }

    fn recovery_channel<'a>(&'a self, snapshot: &'a str) -> RecoveryChannel<'a> {
        let virsh = match &self.session.connector.transport {
            Transport::Client => recovery::virsh(&self.session.connector.uri, CALLER_KILLED),
            Transport::InProcess(address) => recovery::virsh(address, DAEMON_KILLED),
        };
        match virsh {
            Some(virsh) => RecoveryChannel::Commands(Box::new(move |restore| {
                recovery::commands(
                    &virsh,
                    &self.session.connector.uuid,
                    restore,
                    &self.overlays,
                    snapshot,
                )
            })),
            None => RecoveryChannel::None,
        }
    }

    fn held(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.session.exclusive.as_fd()]
    }

    fn leave_held(&mut self) {
        self.session.exclusive.leave();
    }

    fn halt(&mut self) -> Result<()> {
        self.session.call_with_timeout("cannot end the guest", Retry::Safe, |domain| {
            match domain.is_active()? {
                true => domain.destroy(),
                false => Ok(()),
            }
        })
    }

    fn is_started_again(&mut self) -> bool {
        self.session.is_active() == Ok(true)
    }

    fn liveness(&mut self) -> Liveness {
        self.session.liveness()
    }

    fn take_object(&mut self) -> Option<Snapshot> {
        self.registered.take().map(|registered| registered.snapshot).or(self.switched.take())
    }
}
