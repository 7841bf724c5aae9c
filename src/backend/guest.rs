// SPDX-License-Identifier: LGPL-2.1-or-later

//! The traits that a backend implements for the engine, and their types.

use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::deadline::Deadline;
use crate::error::{Result, fail};
use crate::image::Format;
use crate::libvirt::Snapshot;
use crate::model::flags::CreateFlags;
use crate::model::journal::{NotedDomain, NotedFile, NotedOverlay};
use crate::model::{DiskPlan, Drive, Journals, Record, Reservation, Store};
use crate::monitor::Execute;
use crate::monitor::commands::Status;
use crate::own_file::KnownFile;

/// The timeout of a command outside the pause: a QEMU that is only busy answers within it.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

/// The first QEMU whose behaviour was measured to differ from that of 7.2.
const FIRST_WITH_NEW_RUN_STATES: (u64, u64) = (10, 0);
/// The first QEMU with background snapshots.
const OLDEST: (u64, u64) = (6, 0);

/// A guest that was opened.
pub trait Connector: Send + Sync {
    /// The flags that this backend supports.
    fn supported_flags(&self) -> CreateFlags;

    /// The metadata of its snapshots.
    fn snapshot_list(&self) -> &dyn SnapshotList;

    /// The state directory, if the library records the guest's snapshots itself.
    fn store(&self) -> Option<&Store>;

    /// The durable journals of the guest's snapshots; `None` if there is no place for any.
    fn journals(&self) -> Result<Option<Journals>> {
        Ok(self.store().cloned().map(Journals::all))
    }

    /// Reserves the name of a snapshot to be made: `name`, or, if none is given, one made of the
    /// time.
    fn reserve(&self, name: Option<&str>) -> Result<Reserved>;

    /// Has libvirt take the snapshot, where libvirt can: one without INSTANT, or of a guest that
    /// does not run. Returns libvirt's object for it. `None`: the library must take it.
    fn delegate(&self, _xml: &str, _flags: CreateFlags) -> Option<Result<Snapshot>> {
        None
    }

    /// Holds the guest for one operation. Returns the error `OperationInvalid` while another
    /// operation holds it.
    fn begin(&self) -> Result<Box<dyn Guest + '_>>;

    /// Holds the guest for its recovery. Its QEMU may have ended, where the backend finds the guest
    /// all the same: see [`Guest::has_qemu`].
    fn begin_recovery(&self) -> Result<Box<dyn Guest + '_>> {
        self.begin()
    }

    /// libvirt's object for a snapshot, where libvirt keeps the snapshot definitions.
    fn managed(&self, _name: &str) -> Result<Option<Snapshot>> {
        Ok(None)
    }
}

/// The metadata of a guest's snapshots.
pub trait SnapshotList {
    /// The names of the snapshots, each parent before its children.
    fn names(&self) -> Result<Vec<String>>;

    /// The `<domainsnapshot>` of a snapshot.
    fn xml(&self, name: &str) -> Result<String>;

    /// The name of the current snapshot.
    fn current(&self) -> Result<Option<String>>;

    /// Forgets a snapshot; its files stay.
    fn forget(&self, name: &str) -> Result<()>;
}

impl SnapshotList for Store {
    fn names(&self) -> Result<Vec<String>> {
        Ok(self.list()?.into_iter().map(|record| record.name).collect())
    }

    fn xml(&self, name: &str) -> Result<String> {
        Ok(self.read(name)?.to_xml())
    }

    fn current(&self) -> Result<Option<String>> {
        Store::current(self)
    }

    fn forget(&self, name: &str) -> Result<()> {
        Store::forget(self, name)
    }
}

/// The reserved name of a snapshot to be made.
#[derive(Debug)]
pub struct Reserved {
    /// The name.
    pub name: String,
    /// The memory image, unless the caller names another file.
    pub memory_file: Option<PathBuf>,
    /// The reservation in a state directory, or of the guest's only journal.
    held: Option<Reservation>,
}

impl Reserved {
    /// The reservation in a state directory, or of the guest's only journal.
    pub fn held(&self) -> Option<&Reservation> {
        self.held.as_ref()
    }

    /// A name that the backend's owner reserves, with the reservation of the guest's journal.
    pub fn by_others(name: String, held: Option<Reservation>) -> Reserved {
        Reserved { name, memory_file: None, held }
    }

    /// Reserves the name in a state directory. The memory image goes there too.
    pub fn in_store(store: &Store, name: Option<&str>) -> Result<Reserved> {
        let held = store.reserve(name)?;
        let memory_file = Some(store.path(&format!("{}.mem", held.name)));
        Ok(Reserved { name: held.name.clone(), memory_file, held: Some(held) })
    }
}

/// Whether QEMU still answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Liveness {
    /// QEMU answers.
    Alive,
    /// QEMU has ended.
    Exited,
    /// QEMU does not answer, and is not known to have ended.
    Unresponsive,
}

/// The description of the guest in a memory image.
#[derive(Clone, Debug)]
pub struct Description {
    /// The `<domain>`, on the images that the snapshot will hold.
    pub domain_xml: String,
    /// libvirt's `<cookie>`, if the image needs one.
    pub cookie: Option<String>,
    /// A file whose owner the memory image gets, if that is not the caller.
    pub owner: Option<PathBuf>,
}

/// The state of a guest when its snapshot is planned.
#[derive(Clone, Debug)]
pub struct Survey {
    /// The drives that have a medium and a device.
    pub drives: Vec<Drive>,
    /// The description for the memory image.
    pub description: Description,
}

/// How a process that outlives this one reaches the guest.
pub enum RecoveryChannel<'a> {
    /// It does not reach the guest.
    None,
    /// By the monitor's socket, which only this operation uses. The overlays are those that it
    /// undoes.
    Monitor(BorrowedFd<'a>, Vec<MonitorOverlay>),
    /// By recovery commands.
    Commands(MakeRecoveryCommands<'a>),
}

/// An overlay that the watchdog undoes by the monitor.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MonitorOverlay {
    /// The overlay's path, as the snapshot's journal has it.
    pub overlay: String,
    /// The node of the overlay's format.
    pub node: String,
    /// The node of the overlay's file.
    pub file_node: String,
    /// The node of the image below, if the overlay is to be merged into it. `None` if the guest's
    /// owner believes that the disk is on the overlay.
    pub image_node: Option<String>,
    /// The overlay's file.
    pub file: Option<KnownFile>,
    /// The message for the case that the overlay stays in use.
    pub complaint: String,
}

/// Makes the recovery commands, given the QMP commands that restore the migration settings.
pub type MakeRecoveryCommands<'a> = Box<dyn Fn(&[(&str, Value)]) -> RecoveryCommands + 'a>;

/// The recovery commands of a snapshot, for the case that its caller ends.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RecoveryCommands {
    /// Succeeds if the daemon that carries out the other commands answers.
    pub look: RecoveryCommand,
    /// How often `look` is tried, once a second.
    pub tries: u32,
    /// Resumes the guest.
    pub resume: RecoveryCommand,
    /// Resumes the guest where `resume` fails because the guest runs already, or because the daemon
    /// believes so.
    pub resume_all_the_same: RecoveryCommand,
    /// Queries the migration.
    pub query_migrate: RecoveryCommand,
    /// Queries the guest's state.
    pub query_status: RecoveryCommand,
    /// Restore QEMU's migration settings.
    pub restore: Vec<RecoveryCommand>,
    /// Removes the record of the snapshot.
    pub forget: RecoveryCommand,
    /// Merge the overlays, one each.
    pub merge: Vec<MergeCommands>,
}

/// The commands that merge an overlay.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MergeCommands {
    /// Merges the overlay. Fails if the overlay is not in use.
    pub merge: RecoveryCommand,
    /// Succeeds if the overlay is in use.
    pub is_in_use: RecoveryCommand,
    /// The message for the case that the overlay stays in use.
    pub complaint: String,
}

/// A recovery command: a program that the watchdog runs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RecoveryCommand {
    /// The program's absolute path, and its arguments.
    pub arguments: Vec<String>,
    /// A file that is discarded once the command has succeeded.
    pub then_discard: Option<KnownFile>,
}

/// What a guest's QEMU and its backend can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// A background snapshot leaves a paused guest paused.
    pub background_keeps_paused: bool,
    /// A background snapshot that is cancelled once it is armed leaves the guest's memory writable.
    pub background_can_be_cancelled: bool,
    /// The backend's owner never sets QEMU's migration capability `background-snapshot`. If it is
    /// set, it was left by a snapshot whose process was killed.
    pub never_sets_background_snapshot: bool,
    /// A snapshot keeps copies of UEFI variables, and does not only compare them.
    pub keeps_firmware_copies: bool,
    /// The record of a snapshot says what to do with disks that were left to a storage hook.
    pub records_manual_disks: bool,
    /// A more privileged process gives QEMU write access to images before QEMU opens them.
    pub gives_write_access: bool,
}

impl Capabilities {
    /// The capabilities of a QEMU of this version, if the library records the snapshots itself.
    pub fn of_qemu(version: (u64, u64)) -> Capabilities {
        // Measured: 7.2 starts the guest by itself once write tracking is armed, and leaves its
        // memory protected when it is cancelled then; 10.0 does neither. The versions between were
        // not tried, and do not report it.
        let new_run_states = version >= FIRST_WITH_NEW_RUN_STATES;
        Capabilities {
            background_keeps_paused: new_run_states,
            background_can_be_cancelled: new_run_states,
            never_sets_background_snapshot: false,
            keeps_firmware_copies: true,
            records_manual_disks: true,
            gives_write_access: false,
        }
    }
}

/// Where a disk's overlay is in the disk's chain of images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The disk is on the overlay, which is directly on the image that it was made on.
    Active,
    /// Another image is on the overlay, which is directly on the image that it was made on.
    Covered,
    /// The chain has other images between, or others than before.
    Changed,
    /// The disk is on the image that the overlay was made on.
    OnImage,
    /// There is no such disk any more, or it is on something else.
    Elsewhere,
}

/// A guest during one operation.
pub trait Guest: Execute {
    /// Its run state.
    fn status(&mut self) -> Result<Status>;

    /// The drives that have a medium and a device.
    fn drives(&mut self) -> Result<Vec<Drive>>;

    /// Reads the guest's state once, to plan a snapshot of it.
    fn survey(&mut self) -> Result<Survey>;

    /// Refuses flags that this guest does not support.
    fn check_flags(&mut self, _flags: CreateFlags) -> Result<()> {
        Ok(())
    }

    /// The format of a memory image: the one that the caller wants, or the default. Refuses one
    /// that nobody could load into this guest.
    fn image_format(&mut self, wanted: Option<Format>) -> Result<Format> {
        Ok(wanted.unwrap_or(Format::Sparse))
    }

    /// Refuses a guest whose RAM another process writes: such pages would be saved as they are
    /// after the instant.
    fn check_memory_not_shared(&mut self) -> Result<()>;

    /// Refuses disks on images that have no valid name any more: a snapshot of them could never be
    /// reverted to.
    fn check_images_are_named(&mut self, disks: &[DiskPlan]) -> Result<()>;

    /// Refuses a guest with an active job that would make a step of the pause wait or fail.
    fn check_not_busy(&mut self, disks: &[DiskPlan]) -> Result<()>;

    /// Identifies this run of the guest within this process.
    fn identity(&self) -> String;

    /// QEMU's process, where it is known.
    fn pid(&self) -> Option<u32>;

    /// The QMP socket by which it was opened, for the snapshot's journal.
    fn socket(&self) -> Option<PathBuf> {
        None
    }

    /// Whether a driver has opened it, which has its own record of the disks.
    fn is_by_driver(&self) -> bool {
        false
    }

    /// What QEMU and the backend can do; the same during a whole operation.
    fn capabilities(&self) -> Capabilities;

    /// Whether the guest has a QEMU. Only a guest that is held for its recovery can have none.
    fn has_qemu(&self) -> bool {
        true
    }

    /// The domain of libvirt that the guest is, for the journal of the snapshot of this name.
    fn noted_domain(&self, _snapshot: &str) -> Option<NotedDomain> {
        None
    }

    /// Takes over the snapshot of a domain that another process has taken, which has ended: reads
    /// the domain, and finds the record with this memory image. Returns whether libvirt has it.
    fn adopt_domain(&mut self, _noted: &NotedDomain, _memory: &Path) -> Result<bool> {
        Ok(false)
    }

    /// Where the overlays that were taken over are now, by their paths.
    fn places(&mut self) -> Result<Vec<(String, Place)>> {
        Ok(Vec::new())
    }

    /// The images that the domain's snapshots other than this one need as they are.
    fn images_of_others(&mut self, _snapshot: &str) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    /// Names the overlays that are to be created, and their nodes, for the snapshot's journal.
    /// Empty if the backend keeps no journal.
    fn plan_overlays(&mut self, _disks: &[DiskPlan]) -> Vec<NotedOverlay> {
        Vec::new()
    }

    /// The files of the overlays that were created.
    fn overlay_files(&self) -> Vec<NotedFile> {
        Vec::new()
    }

    /// Takes over overlays that another process has made, which has ended, with their files. Ends
    /// that process's jobs on them. Then they can be merged and discarded. Those at the paths
    /// `merged` are merged already.
    fn adopt_overlays(
        &mut self,
        _overlays: &[(NotedOverlay, Option<NotedFile>)],
        _merged: &[String],
    ) -> Result<()> {
        Ok(())
    }

    /// Creates the overlays, ready to be switched to. An existing file is an error, and is not
    /// changed, unless the plan is to use it.
    fn create_overlays(&mut self, disks: &[DiskPlan]) -> Result<()>;

    /// Stops the vCPUs.
    fn pause(&mut self, deadline: Deadline) -> Result<()>;

    /// Switches all disks to their overlays, or none, for the snapshot of this name.
    fn switch_disks(&mut self, snapshot: &str, deadline: Deadline) -> Result<()>;

    /// Resizes the overlay that a disk is on. The image below got this size after the plan.
    fn resize_overlay(&mut self, disk: &DiskPlan, size: u64, deadline: Deadline) -> Result<()>;

    /// Starts the vCPUs, unless they run already.
    fn resume(&mut self, deadline: Deadline) -> Result<()>;

    /// The length of the guest's last pause, by QEMU's own time stamps.
    fn last_pause(&mut self) -> Option<Duration> {
        None
    }

    /// Records the snapshot at the instant, if its record must exist before it is complete.
    fn register(&mut self, _record: &Record, _format: Format) -> Result<()> {
        Ok(())
    }

    /// Checks that the record and the disks' backing chains are still as they were made. Called
    /// when the snapshot is complete.
    fn confirm(&mut self) -> Result<()> {
        Ok(())
    }

    /// Records a complete snapshot. Returns the record as it was written.
    fn commit(&mut self, _reserved: &Reserved, record: Record) -> Result<Record> {
        Ok(record)
    }

    /// The file that exists once a snapshot of this name is recorded, if there is one.
    fn record_file(&self, _name: &str) -> Option<PathBuf> {
        None
    }

    /// Removes the record.
    fn withdraw(&mut self) -> Result<()> {
        Ok(())
    }

    /// Undoes the switch: merges the guest's writes into the images, which are active again then.
    /// Does nothing if QEMU has not switched any disk.
    fn merge_disks(&mut self) -> Result<()>;

    /// Discards overlays that are not in use.
    fn discard_overlays(&mut self) -> Result<()>;

    /// Removes the guest's writes since the switch from the overlays. Called when QEMU has ended.
    fn empty_overlays(&mut self) -> Result<()> {
        Ok(())
    }

    /// Merges the overlays of a QEMU that has ended, and discards none. Returns false if the
    /// backend does both in one step, which follows.
    fn merge_offline(&mut self) -> Result<bool> {
        Ok(false)
    }

    /// Merges and discards the overlays of a QEMU that has ended. `switched`: the disks may be on
    /// their overlays.
    fn merge_and_discard_offline(&mut self, switched: bool) -> Result<()>;

    /// How the watchdog reaches the guest if this process ends while it takes the snapshot of this
    /// name.
    fn recovery_channel<'a>(&'a self, snapshot: &'a str) -> RecoveryChannel<'a>;

    /// A monitor socket by which another process can reach QEMU once this operation has ended, if
    /// there is one.
    fn monitor_socket(&self) -> Option<PathBuf> {
        None
    }

    /// The descriptors that hold the guest for this operation. A watchdog holds copies of them.
    fn held(&self) -> Vec<BorrowedFd<'_>>;

    /// Leaves the guest held for the watchdog, together with its recovery channel.
    fn leave_held(&mut self);

    /// Ends the guest's QEMU.
    fn halt(&mut self) -> Result<()>;

    /// Whether another QEMU runs now in place of one that has ended. Commands since then went to
    /// the new one.
    fn is_started_again(&mut self) -> bool {
        false
    }

    /// Whether QEMU answers or has ended. Reconnects if the connection was lost.
    fn liveness(&mut self) -> Liveness;

    /// Takes libvirt's object for the snapshot, if libvirt was involved in it. `None` on the second
    /// call.
    fn take_object(&mut self) -> Option<Snapshot> {
        None
    }
}

/// Refuses a QEMU that is too old.
pub fn check_version(version: (u64, u64)) -> Result<()> {
    if version < OLDEST {
        let (major, minor) = version;
        fail!(
            ConfigUnsupported,
            "QEMU {major}.{minor} is too old: background snapshots need 6.0 or later"
        );
    }
    Ok(())
}
