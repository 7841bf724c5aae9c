// SPDX-License-Identifier: LGPL-2.1-or-later

//! The backend for a stock libvirt: the domain is its daemon's, and we are a client.
//!
//! Everything that libvirt can do, it does, so that its own view of the domain stays true: it
//! pauses and resumes, switches the disks and merges them back, and records the snapshot. Only what
//! it has no function for goes past it, by its monitor passthrough: the background snapshot, and
//! what belongs to it.

mod block_commit;
mod call;
mod connector;
mod drives;
pub mod forget;
mod lease;
mod managed_domain;
mod managed_snapshot;
mod overlays;
mod recovery;
pub mod snapshot_def;
mod snapshot_tree;
pub mod volumes;
mod xml;

use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::json;

pub use self::block_commit::{BlockCommit, MergeFailure};
pub use self::call::CallError;
use self::call::{Caller, Retry};
pub use self::connector::LibvirtConnector;
use self::connector::Transport;
pub use self::managed_domain::{ManagedDomain, OtherDomain};
pub use self::managed_snapshot::ManagedSnapshot;
use self::overlays::Overlays;
pub use self::snapshot_tree::SnapshotTree;
use super::exclusive::Exclusive;
use super::guest::{
    Capabilities, Connector, DEFAULT_TIMEOUT, Description, Guest, Liveness, RecoveryChannel,
    Reserved, SnapshotList, check_version,
};
use super::overlay_file::{self, Beforehand};
use super::qmp::hold_qemu;
use super::{busy, open_images, shared_memory};
use crate::deadline::Deadline;
use crate::error::{Code, Error, Result, fail};
use crate::libvirt::{self, Domain, Snapshot, State};
use crate::model::flags::{self, CreateFlags};
use crate::model::{self, DiskPlan, Drive, Record, Role, Store, check_name, snapshot_writer};
use crate::monitor::commands::{self, Status};
use crate::monitor::json::{Json, parse};
use crate::monitor::{Command, Execute, Failure, QemuProcess, read_reply};

/// A resume that libvirt does not come to is tried past it.
const RESUME_SOON: Duration = Duration::from_secs(2);

/// A domain that is started and ended by others is looked at so often before it is given up.
const STARTS: u32 = 5;

/// For so many seconds a daemon that is restarted may be away: what it was taking a snapshot of
/// waits for it.
const CALLER_KILLED: u32 = 10;
/// The same where the daemon was the caller, which may be being upgraded.
const DAEMON_KILLED: u32 = 300;

/// What is not libvirt's own.
const SUPPORTED_FLAGS: CreateFlags = CreateFlags::constant(
    flags::NO_METADATA
        | flags::HALT
        | flags::REUSE_EXT
        | flags::ATOMIC
        | flags::LIVE
        | flags::VALIDATE
        | flags::INSTANT,
);
/// The disks alone, onto overlays that are there.
const SWITCH_FLAGS: CreateFlags =
    CreateFlags::constant(flags::DISK_ONLY | flags::NO_METADATA | flags::ATOMIC | flags::REUSE_EXT);

impl Connector for LibvirtConnector {
    fn supported_flags(&self) -> CreateFlags {
        SUPPORTED_FLAGS
    }

    fn snapshot_list(&self) -> &dyn SnapshotList {
        self
    }

    fn store(&self) -> Option<&Store> {
        None
    }

    fn reserve(&self, name: Option<&str>) -> Result<Reserved> {
        let known = self.names()?;
        let taken = |name: &str| known.iter().any(|known| known == name);
        let name = match name {
            Some(name) => name.to_owned(),
            None => {
                let seconds =
                    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
                (seconds..)
                    .map(|seconds| seconds.to_string())
                    .find(|name| !taken(name))
                    .unwrap_or_default()
            }
        };
        check_name(&name)?;
        if taken(&name) {
            fail!(
                OperationInvalid,
                "domain snapshot '{name}' of domain '{}' already exists",
                self.name
            );
        }
        Ok(Reserved::by_others(name))
    }

    /// Without INSTANT, and of a domain that is paused, it is libvirt's own.
    fn delegate(&self, xml: &str, flags: CreateFlags) -> Option<Result<String>> {
        let plain = if flags.is_instant() {
            if let Err(error) = self.check_no_hook_is_due(xml) {
                return Some(Err(error));
            }
            flags.without_instant()
        } else {
            flags
        };
        let step = format!("cannot take libvirt's own snapshot of domain '{}'", self.name);
        // As long as it takes.
        let taken = self.domain.create_snapshot(xml, plain.bits());
        let taken = taken.map_err(|error| error.into_error(&step));
        Some(taken.map(|snapshot| {
            let name = snapshot.name();
            self.keep(snapshot);
            name
        }))
    }

    fn begin(&self) -> Result<Box<dyn Guest + '_>> {
        let exclusive = self.hold()?;
        let step = format!("cannot look at domain '{}'", self.name);
        if !self.domain.is_active().map_err(|error| error.into_error(&step))? {
            fail!(
                OperationInvalid,
                "domain '{}' is not running: an instant snapshot is of a running guest; without \
                 INSTANT its disks can be snapshotted",
                self.name
            );
        }
        if self.domain.is_persistent().is_err() {
            fail!(NoDomain, "domain '{}' is gone", self.name);
        }
        let mut guest = LibvirtGuest {
            connector: self,
            caller: self.caller(),
            exclusive,
            version: (0, 0),
            id: None,
            qemu: None,
            another_is_paused: false,
            volumes: Vec::new(),
            _process: None,
            snapshot: String::new(),
            live: model::Domain::default(),
            inactive_xml: None,
            left_out: Vec::new(),
            overlays: Overlays::default(),
            lease: lease::Lease::default(),
            current_before: None,
            switched: None,
            registered: None,
        };
        guest.version = guest.query_version()?;
        check_version(guest.version)?;
        guest.id = guest.look_up_id()?;
        guest.qemu = guest.look_up_process();
        if let Some(qemu) = &guest.qemu {
            guest._process = Some(hold_qemu(&self.whose(), qemu)?);
        }
        Ok(Box::new(guest))
    }

    fn managed(&self, name: &str) -> Result<Option<Snapshot>> {
        self.find(name).map(Some)
    }
}

impl SnapshotList for LibvirtConnector {
    fn names(&self) -> Result<Vec<String>> {
        let step = format!("cannot list the snapshots of domain '{}'", self.name);
        let snapshots = self.domain.snapshots().map_err(|error| error.into_error(&step))?;
        Ok(snapshots.iter().map(Snapshot::name).collect())
    }

    fn xml(&self, name: &str) -> Result<String> {
        self.find(name)?
            .xml(0)
            .map_err(|error| error.into_error(&format!("cannot describe snapshot '{name}'")))
    }

    fn current(&self) -> Result<Option<String>> {
        let step = format!("cannot look for the current snapshot of domain '{}'", self.name);
        let current = self.domain.current_snapshot().map_err(|error| error.into_error(&step))?;
        Ok(current.as_ref().map(Snapshot::name))
    }

    fn forget(&self, name: &str) -> Result<()> {
        self.find(name).and_then(|_| forget::forget(&ManagedDomain::new(self), name))
    }
}

/// A domain during one operation.
struct LibvirtGuest<'a> {
    connector: &'a LibvirtConnector,
    caller: Caller,
    exclusive: Exclusive,
    version: (u64, u64),
    /// It changes when the domain is started anew.
    id: Option<u32>,
    /// QEMU's process, where it can be seen from here.
    qemu: Option<QemuProcess>,
    /// Another QEMU may have been paused in its place.
    another_is_paused: bool,
    /// Holds that process: it can be opened by a socket of its own too.
    _process: Option<Exclusive>,
    /// The volumes that its disks are on.
    volumes: Vec<volumes::Volume>,
    /// The name of the snapshot that is being taken.
    snapshot: String,
    /// As it was when the snapshot was planned.
    live: model::Domain,
    inactive_xml: Option<String>,
    /// The targets of disks that are left out.
    left_out: Vec<String>,
    overlays: Overlays,
    lease: lease::Lease,
    /// The snapshot that was current before.
    current_before: Option<String>,
    /// libvirt's object of the switch.
    switched: Option<Snapshot>,
    /// The snapshot as libvirt has recorded it, and its parent.
    registered: Option<Registered>,
}

/// Who has started the vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Resumed {
    ByLibvirt,
    ByItself,
}

struct Registered {
    snapshot: Snapshot,
    parent: Option<String>,
}

impl Execute for LibvirtGuest<'_> {
    fn execute(
        &mut self,
        command: Command,
        deadline: Deadline,
    ) -> std::result::Result<Json, Failure> {
        let again = match command.name {
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
        let reply = self.caller.call(deadline, again, move |domain| {
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

impl LibvirtGuest<'_> {
    /// A call outside the pause.
    fn call_with_timeout<T: Send + 'static>(
        &mut self,
        step: &str,
        again: Retry,
        call: impl Fn(&Domain) -> libvirt::VirResult<T> + Clone + Send + 'static,
    ) -> Result<T> {
        self.caller
            .call(Deadline::after(DEFAULT_TIMEOUT), again, call)
            .map_err(|trouble| trouble.into_error(step))
    }

    fn query_version(&mut self) -> Result<(u64, u64)> {
        let command = Command::new("query-version", json!({}));
        let reply =
            self.run("cannot ask for QEMU's version", command, Deadline::after(DEFAULT_TIMEOUT))?;
        let number = |what: &str| reply["qemu"][what].as_u64().unwrap_or_default();
        Ok((number("major"), number("minor")))
    }

    fn look_up_id(&mut self) -> Result<Option<u32>> {
        let uuid = self.connector.uuid.clone();
        self.call_with_timeout("cannot look the domain up", Retry::Safe, move |domain| {
            Ok(domain.connect()?.domain(&uuid)?.id())
        })
    }

    /// libvirt does not tell, but QEMU by its threads; and libvirt gives it the UUID on its command
    /// line.
    fn look_up_process(&mut self) -> Option<QemuProcess> {
        let option = format!("-uuid\0{}\0", self.connector.uuid);
        let is_it = |qemu: &QemuProcess| {
            let command_line =
                std::fs::read(format!("/proc/{}/cmdline", qemu.pid)).unwrap_or_default();
            command_line.windows(option.len()).any(|window| window == option.as_bytes())
        };
        QemuProcess::by_threads(self, Deadline::after(DEFAULT_TIMEOUT)).filter(is_it)
    }

    fn xml(&mut self, flags: u32) -> Result<String> {
        self.call_with_timeout("cannot read the domain's XML", Retry::Safe, move |domain| {
            domain.xml(flags)
        })
    }

    fn current_snapshot(&mut self) -> Result<Option<String>> {
        self.call_with_timeout("cannot look for the current snapshot", Retry::Safe, |domain| {
            Ok(domain.current_snapshot()?.as_ref().map(Snapshot::name))
        })
    }

    fn libvirt_state(&mut self, deadline: Deadline) -> std::result::Result<State, CallError> {
        self.caller.call(deadline, Retry::Safe, Domain::state)
    }

    fn resume_by_libvirt(&mut self, deadline: Deadline) -> std::result::Result<Resumed, CallError> {
        if self.libvirt_state(deadline)? == State::Running {
            return Ok(Resumed::ByItself);
        }
        match self.caller.call(deadline, Retry::Safe, Domain::resume) {
            Ok(()) => Ok(Resumed::ByLibvirt),
            // QEMU before 9 has started its guest by itself, and libvirt has come to know of it
            // since it was asked.
            Err(CallError::Refused(error)) if error.is(Code::OperationInvalid) => {
                match self.libvirt_state(deadline)? {
                    State::Running => Ok(Resumed::ByItself),
                    _ => Err(CallError::Refused(error)),
                }
            }
            Err(trouble) => Err(trouble),
        }
    }

    /// The images that each disk is on now, from the top down.
    fn chains(&mut self) -> Result<Vec<(String, Vec<String>)>> {
        Ok(drives::chains(&self.domain_with_paths()?))
    }

    /// Whose new files are, as the owner of this image, or of QEMU's process: a session's are its
    /// user's, also where root acts on it. None where libvirt gives them to QEMU's user itself.
    fn owner(&self, image: Option<&str>) -> Option<PathBuf> {
        let session_of_another_user =
            self.connector.uri.contains("/session") && rustix::process::geteuid().is_root();
        let process =
            || self.qemu.as_ref().map(|qemu| PathBuf::from(format!("/proc/{}", qemu.pid)));
        if session_of_another_user { image.map(PathBuf::from).or_else(process) } else { None }
    }

    /// The domain as it is now, where volumes are called by their paths.
    fn domain_with_paths(&mut self) -> Result<model::Domain> {
        model::Domain::parse(&self.xml_with_paths(0)?)
    }

    /// Its XML, where volumes are called by their paths.
    fn xml_with_paths(&mut self, flags: u32) -> Result<String> {
        let xml = self.xml(flags)?;
        volumes::with_paths(&xml, &self.volumes)
    }

    /// Overlays that are there beforehand must be no images of the domain's snapshots.
    fn check_not_of_snapshots(&mut self, disks: &[DiskPlan]) -> Result<()> {
        if !disks.iter().any(|disk| Path::new(&disk.overlay).exists()) {
            return Ok(());
        }
        let records =
            self.call_with_timeout("cannot read the domain's snapshots", Retry::Safe, |domain| {
                let read = |snapshot: &Snapshot| Ok((snapshot.name(), snapshot.xml(0)?));
                domain.snapshots()?.iter().map(read).collect::<libvirt::VirResult<Vec<_>>>()
            })?;
        let files: Vec<_> =
            records.iter().map(|(name, record)| (name, xml::domain_files(record))).collect();
        let images = files
            .iter()
            .flat_map(|(name, files)| files.iter().map(|file| (name.as_str(), file.as_str())));
        overlay_file::check_not_of_snapshots(disks, images)
    }

    fn pause_again_for_leases(&mut self) -> Result<()> {
        let step = "cannot take the disk leases of the domain back";
        let deadline = Deadline::after(DEFAULT_TIMEOUT);
        self.caller
            .call(deadline, Retry::Safe, Domain::suspend)
            .map_err(|trouble| trouble.into_error(step))?;
        self.resume_by_libvirt(deadline).map_err(|trouble| trouble.into_error(step)).map(drop)
    }

    /// The parent of a snapshot that is recorded now: the current one, unless that was taken after
    /// ours.
    fn parent_of(&mut self, record: &Record) -> Result<(Option<String>, Option<String>)> {
        let current = self.current_snapshot()?;
        let Some(name) = current.clone().filter(|_| current != self.current_before) else {
            return Ok((current, None));
        };
        let overlays: Vec<_> = record.disks.iter().map(|disk| disk.overlay.clone()).collect();
        let xml = self.call_with_timeout("cannot describe the current snapshot", Retry::Safe, {
            let name = name.clone();
            move |domain| domain.find(&name)?.map(|snapshot| snapshot.xml(0)).transpose()
        })?;
        // Its disks' images are our overlays: it is younger.
        let on_ours = xml
            .is_some_and(|xml| xml::domain_files(&xml).iter().any(|file| overlays.contains(file)));
        Ok(if on_ours { (self.current_before.clone(), Some(name)) } else { (current, None) })
    }
}

impl Guest for LibvirtGuest<'_> {
    fn status(&mut self) -> Result<Status> {
        commands::query_status(self, Deadline::after(DEFAULT_TIMEOUT))
    }

    fn drives(&mut self) -> Result<Vec<Drive>> {
        let live_xml = self.xml(libvirt::xml::SECURE)?;
        if volumes::are_in(&live_xml) {
            // libvirt does not pass it on where a disk is on hundreds of images: then those on
            // volumes have no overlay.
            let blocks = self
                .execute(Command::new("query-block", json!({})), Deadline::after(DEFAULT_TIMEOUT));
            self.volumes = volumes::of_domain(&live_xml, &blocks.unwrap_or_default())?;
        }
        self.live = model::Domain::parse(&volumes::with_paths(&live_xml, &self.volumes)?)?;
        let mut drives = drives::drives(&self.live)?;
        for drive in drives
            .iter_mut()
            .filter(|drive| drive.role == Role::Disk && drive.unsupported_reason.is_none())
        {
            let target = drive.name().to_owned();
            let step = format!("cannot ask for the size of disk '{target}'");
            drive.size = self
                .call_with_timeout(&step, Retry::Safe, move |domain| domain.disk_size(&target))?;
        }
        Ok(drives)
    }

    fn describe(&mut self, drives: &[Drive]) -> Result<Description> {
        let domain_xml = self.xml_with_paths(libvirt::xml::SECURE | libvirt::xml::MIGRATABLE)?;
        let persistent =
            self.call_with_timeout("cannot look at the domain", Retry::Safe, |domain| {
                domain.is_persistent()
            })?;
        if persistent {
            self.inactive_xml = Some(self.xml(libvirt::xml::SECURE | libvirt::xml::INACTIVE)?);
        }
        self.current_before = self.current_snapshot()?;
        let first =
            drives.iter().find(|drive| drive.role == Role::Disk && drive.file.starts_with('/'));
        let owner = self.owner(first.map(|drive| drive.file.as_str()));
        Ok(Description { domain_xml, cookie: drives::cookie(&self.live), owner })
    }

    fn accept(&mut self, name: &str, flags: CreateFlags) -> Result<()> {
        if flags.halts()
            && !self.call_with_timeout(
                "cannot look at the domain",
                Retry::Safe,
                Domain::is_persistent,
            )?
        {
            fail!(
                OperationInvalid,
                "cannot halt transient domain '{}' after its snapshot",
                self.connector.name
            );
        }
        self.snapshot = name.into();
        Ok(())
    }

    fn check_memory_not_shared(&mut self) -> Result<()> {
        shared_memory::check_memory_not_shared(self)
    }

    fn check_images_are_named(&mut self, disks: &[DiskPlan]) -> Result<()> {
        open_images::check_named(self.pid(), disks)
    }

    fn check_not_busy(&mut self, disks: &[DiskPlan]) -> Result<()> {
        self.check_not_started_anew(Deadline::after(DEFAULT_TIMEOUT))?;
        let name = &self.connector.name;
        let step = format!("cannot ask for the jobs of domain '{name}'");
        let targets: Vec<_> = disks.iter().map(|disk| disk.drive.name().to_owned()).collect();
        let (job, on_disk) = self.call_with_timeout(&step, Retry::Safe, move |domain| {
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
                self.connector.name
            );
        }
        busy::check_no_block_jobs(self, disks)
    }

    fn identity(&self) -> String {
        format!("{} {} {:?}", self.connector.uri, self.connector.uuid, self.id)
    }

    fn pid(&self) -> Option<u32> {
        self.qemu.as_ref().map(|qemu| qemu.pid)
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            // libvirt does not know this capability.
            never_sets_background_snapshot: true,
            // libvirt's snapshots have no place for copies of UEFI variables; and QEMU loads those
            // of the instant with memory, and writes them back to the file.
            keeps_firmware_copies: false,
            // libvirt's own revert would load memory beside these disks as they are by then.
            records_manual_disks: false,
            // The system daemon makes QEMU's user the owner of images.
            gives_write_access: !self.connector.uri.contains("/session"),
            ..Capabilities::of_qemu(self.version)
        }
    }

    fn create_overlays(&mut self, disks: &[DiskPlan]) -> Result<()> {
        let targets = self.live.disks.iter().map(|disk| &disk.target);
        let planned = |target: &&String| disks.iter().any(|disk| disk.drive.name() == *target);
        self.left_out = targets.filter(|target| !planned(target)).cloned().collect();
        self.lease = lease::Lease::look(&self.live, disks);
        let beforehand = match self.connector.way {
            Transport::Client => Beforehand::Taken,
            // It writes with the daemon's rights, for a client that need not have them.
            Transport::InProcess(_) => Beforehand::Refused,
        };
        self.check_not_of_snapshots(disks)?;
        let owner = self.owner(None);
        self.overlays.create(disks, beforehand, owner.as_deref())
    }

    fn pause(&mut self, deadline: Deadline) -> Result<()> {
        let paused = self.caller.call(deadline, Retry::Safe, Domain::suspend);
        // Which QEMU a late one pauses is not known.
        self.another_is_paused = paused == Err(CallError::Late);
        paused.map_err(|trouble| trouble.into_error("cannot pause the domain"))?;
        self.check_not_started_anew(deadline).inspect_err(|_| self.another_is_paused = true)
    }

    fn switch_disks(&mut self, deadline: Deadline) -> Result<()> {
        if self.overlays.disks().is_empty() {
            return Ok(());
        }
        let xml =
            snapshot_writer::switch_order(&self.snapshot, self.overlays.disks(), &self.left_out);
        let switched = self.caller.call(deadline, Retry::Never, move |domain| {
            domain.create_snapshot(&xml, SWITCH_FLAGS.bits())
        });
        self.switched = Some(switched.map_err(|trouble| {
            trouble.into_error("cannot switch the domain's disks to their overlays")
        })?);
        self.check_not_started_anew(deadline)
    }

    fn resize_overlay(&mut self, disk: &DiskPlan, size: u64, deadline: Deadline) -> Result<()> {
        let target = disk.drive.name().to_owned();
        let step = format!("cannot give disk '{target}' its new size back");
        let resized = self
            .caller
            .call(deadline, Retry::Safe, move |domain| domain.resize_disk(&target, size));
        resized.map_err(|trouble| trouble.into_error(&step))
    }

    fn resume(&mut self, deadline: Deadline) -> Result<()> {
        let step = "cannot resume the domain";
        let soon = Deadline::after(RESUME_SOON.min(deadline.left().unwrap_or_default()));
        // What was given up may yet pause it.
        let mut resumed = match self.caller.settle(soon) {
            true => self.resume_by_libvirt(soon),
            false => Err(CallError::Late),
        };
        if resumed == Err(CallError::Late) {
            // It waits for another client's job, which the monitor's passthrough need not.
            let _ = commands::cont(self, Deadline::after(RESUME_SOON));
            self.caller.settle(deadline);
            resumed = self.resume_by_libvirt(deadline);
        }
        let resumed = resumed.map_err(|trouble| trouble.into_error(step))?;
        if resumed == Resumed::ByItself {
            // QEMU 10 that was resumed in the very moment of arming can take its guest for paused
            // afterwards, and libvirt not.
            if self.capabilities().background_keeps_paused && !self.status()?.running {
                commands::cont(self, deadline)?;
            }
            if self.lease.is_lost() {
                self.pause_again_for_leases()?;
            }
        }
        Ok(())
    }

    fn register(&mut self, record: &Record) -> Result<()> {
        let (parent, younger) = self.parent_of(record)?;
        let inactive = self
            .inactive_xml
            .as_deref()
            .map(|xml| volumes::with_paths(xml, &self.volumes))
            .transpose()?;
        let xml = snapshot_writer::definition(
            record,
            parent.as_deref(),
            &self.left_out,
            inactive.as_deref(),
        );
        let step = format!("cannot record snapshot '{}' in libvirt", record.name);
        let snapshot = self.call_with_timeout(&step, Retry::Safe, move |domain| {
            domain.redefine_snapshot(&xml, true)
        })?;
        self.registered = Some(Registered { snapshot, parent });
        if let Some(younger) = younger {
            let parent = record.name.clone();
            let step = format!("cannot make snapshot '{younger}' a child of '{parent}'");
            self.call_with_timeout(&step, Retry::Safe, move |domain| {
                let Some(child) = domain.find(&younger)? else { return Ok(()) };
                let xml = xml::with_parent(&child.xml(libvirt::xml::SECURE)?, &parent);
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
        let lookup = name.clone();
        let found =
            self.call_with_timeout("cannot look the snapshot up", Retry::Safe, move |domain| {
                domain.find(&lookup)?.map(|snapshot| snapshot.xml(0)).transpose()
            })?;
        let Some(xml) = found else {
            fail!(
                OperationFailed,
                "somebody has deleted snapshot '{name}' while its memory was being saved"
            );
        };
        let now = xml::parent(&xml);
        // Its parent can have been deleted meanwhile; then the grandparent is it.
        if now != parent
            && parent
                .is_some_and(|parent| self.connector.names().is_ok_and(|all| all.contains(&parent)))
        {
            fail!(
                OperationFailed,
                "somebody has moved snapshot '{name}' while its memory was being saved"
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
            let domain = ManagedDomain::called_by(self.connector, self.caller.another());
            forget::forget(&domain, &name)
        };
        // Once more, by a new connection: the daemon may have been restarted meanwhile. A snapshot
        // that is not there any more counts as forgotten.
        forget().or_else(|_| forget()).map_err(|error| {
            let message = format!("cannot forget snapshot '{name}': {}", error.message);
            Error::of_libvirt(error.number(), message)
        })
    }

    fn merge_disks(&mut self) -> Result<()> {
        // A switch that was given up must have come to its end.
        if !self.caller.settle(Deadline::after(2 * DEFAULT_TIMEOUT)) {
            fail!(
                OperationTimeout,
                "libvirt does not come to the switch of the disks: when it does, the domain goes \
                 on with the overlays {}, which must not be removed",
                self.overlays.paths()
            );
        }
        let domain = self.domain_with_paths()?;
        self.overlays.merge(&mut self.caller, &drives::chains(&domain))?;
        if self.overlays.merge_detached(&domain)? {
            self.put_definition_back()?;
        }
        Ok(())
    }

    fn discard_overlays(&mut self) -> Result<()> {
        self.overlays.discard()
    }

    fn empty_overlays(&mut self) -> Result<()> {
        match self.call_with_timeout("cannot look at the domain", Retry::Safe, Domain::is_active)? {
            // It was started again, and goes on with what is in them.
            true => Ok(()),
            false => self.overlays.empty(),
        }
    }

    fn merge_and_discard_offline(&mut self, switched: bool) -> Result<()> {
        self.caller.settle(Deadline::after(2 * DEFAULT_TIMEOUT));
        self.resume_another()?;
        if switched {
            self.merge_ended()?;
        }
        self.overlays.discard()
    }

    fn recovery_channel<'a>(&'a self, snapshot: &'a str) -> RecoveryChannel<'a> {
        let virsh = match &self.connector.way {
            Transport::Client => recovery::virsh(&self.connector.uri, CALLER_KILLED),
            Transport::InProcess(address) => recovery::virsh(address, DAEMON_KILLED),
        };
        match virsh {
            Some(virsh) => RecoveryChannel::Commands(Box::new(move |restore| {
                recovery::commands(&virsh, &self.connector.uuid, restore, &self.overlays, snapshot)
            })),
            None => RecoveryChannel::None,
        }
    }

    fn held(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.exclusive.as_fd()]
    }

    fn leave_held(&mut self) {
        self.exclusive.leave();
    }

    fn halt(&mut self) -> Result<()> {
        self.call_with_timeout("cannot end the guest", Retry::Safe, |domain| {
            match domain.is_active()? {
                true => domain.destroy(),
                false => Ok(()),
            }
        })
    }

    fn is_started_again(&mut self) -> bool {
        self.call_with_timeout("cannot look at the domain", Retry::Safe, Domain::is_active)
            == Ok(true)
    }

    fn liveness(&mut self) -> Liveness {
        let deadline = Deadline::after(DEFAULT_TIMEOUT);
        let uuid = self.connector.uuid.clone();
        let look = move |domain: &Domain| match domain.connect()?.domain(&uuid) {
            Ok(domain) => domain.is_active().map(|active| active.then(|| domain.id()).flatten()),
            Err(error) if error.is(Code::NoDomain) => Ok(None),
            Err(error) => Err(error),
        };
        // QEMU may have ended, and libvirt not have come to that yet.
        let mut in_doubt = self.caller.take_refused();
        loop {
            match self.caller.call(deadline, Retry::Safe, look.clone()) {
                Ok(Some(id)) if Some(id) == self.id => {}
                Ok(_) => return Liveness::Exited,
                Err(_) => return Liveness::Unresponsive,
            }
            let status = Command::new("query-status", json!({}));
            in_doubt = in_doubt
                && matches!(
                    self.execute(status, Deadline::after(RESUME_SOON)),
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

impl LibvirtGuest<'_> {
    /// libvirt knows a domain by its UUID: one that another client has ended and started again
    /// since is another QEMU.
    fn check_not_started_anew(&mut self, deadline: Deadline) -> Result<()> {
        let has_ended = match &self.qemu {
            // Without a question, for this is in the pause.
            Some(qemu) => qemu.has_ended(),
            None => {
                let uuid = self.connector.uuid.clone();
                let look = move |domain: &Domain| Ok(domain.connect()?.domain(&uuid)?.id());
                let id = self.caller.call(deadline, Retry::Safe, look);
                id.map_err(|trouble| trouble.into_error("cannot look the domain up"))? != self.id
            }
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

    /// Resumes the QEMU that was paused in the place of the one that is gone.
    fn resume_another(&mut self) -> Result<()> {
        if !std::mem::take(&mut self.another_is_paused) {
            return Ok(());
        }
        let resumed = self.caller.call(Deadline::after(DEFAULT_TIMEOUT), Retry::Safe, |domain| {
            let paused = domain.is_active()? && domain.state()? == State::Paused;
            if paused { domain.resume() } else { Ok(()) }
        });
        resumed.map_err(|trouble| {
            trouble.into_error("cannot resume the domain, which was paused as another client had just started it again")
        })
    }

    /// Merges the overlays of a domain that has ended. Another client may start it at any time, on
    /// the overlays as long as its definition names them; until it is seen that it was not, they
    /// must not be removed.
    fn merge_ended(&mut self) -> Result<()> {
        let mut active = self.is_started_again();
        for _ in 0..STARTS {
            let merged = if active { self.merge_started() } else { self.merge_offline() };
            let now = self.is_started_again();
            if now == active || active && merged.is_ok() {
                return merged;
            }
            active = now;
        }
        fail!(
            OperationFailed,
            "domain '{}' is started and ended again and again: the overlays {} may be in use, and \
             must not be removed",
            self.connector.name,
            self.overlays.paths()
        )
    }

    fn merge_started(&mut self) -> Result<()> {
        let chains = self.chains()?;
        self.overlays.merge(&mut self.caller, &chains)
    }

    fn merge_offline(&mut self) -> Result<()> {
        self.check_not_saved()?;
        self.overlays.merge_offline()?;
        self.put_definition_back()
    }

    /// A domain that was saved, or migrated, goes on from there: with its overlays, where it had
    /// them by then.
    fn check_not_saved(&mut self) -> Result<()> {
        // A transient one is gone, and nobody knows how it ended.
        if self.inactive_xml.is_none()
            || !self.call_with_timeout(
                "cannot look at the domain",
                Retry::Safe,
                Domain::is_saved_or_gone,
            )?
        {
            return Ok(());
        }
        if self.definition_without_overlays()?.is_some() {
            fail!(
                OperationFailed,
                "somebody has saved the domain, or migrated it, meanwhile: what was saved may go \
                 on with the overlays {}, as the domain's definition does, and they must not be \
                 removed",
                self.overlays.paths()
            );
        }
        Ok(())
    }

    /// The definition of a persistent domain with the images that it had before the overlays;
    /// `None` where it names none of them.
    fn definition_without_overlays(&mut self) -> Result<Option<String>> {
        let Some(before) = self.inactive_xml.clone() else { return Ok(None) };
        let now = self.xml(libvirt::xml::SECURE | libvirt::xml::INACTIVE)?;
        self.overlays.without(&now, &before)
    }

    /// libvirt has put the overlays into the definition of a persistent domain too.
    fn put_definition_back(&mut self) -> Result<()> {
        let Some(mended) = self.definition_without_overlays()? else { return Ok(()) };
        self.call_with_timeout(
            "cannot put the domain's definition back",
            Retry::Safe,
            move |domain| domain.connect()?.define(&mended, 0).map(drop),
        )
    }
}

impl Drop for LibvirtGuest<'_> {
    fn drop(&mut self) {
        // Whoever has asked for the snapshot gets the object that stands for it in libvirt.
        let object =
            self.registered.take().map(|registered| registered.snapshot).or(self.switched.take());
        if let Some(object) = object {
            self.connector.keep(object);
        }
    }
}
