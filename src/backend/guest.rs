// SPDX-License-Identifier: LGPL-2.1-or-later

//! What a backend is to the engine: the traits, and what passes through them.

use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::deadline::Deadline;
use crate::error::{Result, fail};
use crate::libvirt::Snapshot;
use crate::model::flags::CreateFlags;
use crate::model::{DiskPlan, Drive, Record, Reservation, Store};
use crate::monitor::Execute;
use crate::monitor::commands::Status;
use crate::own_file::KnownFile;

/// Commands outside the pause get this long: QEMU may be busy, but then it hangs.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

/// The oldest of the newer QEMUs whose behaviour was measured, where it differs from 7.2's.
const FIRST_WITH_NEW_RUN_STATES: (u64, u64) = (10, 0);
/// The first QEMU with background snapshots.
const OLDEST: (u64, u64) = (6, 0);

/// A guest that was opened.
pub trait Connector: Send + Sync {
    /// The flags that this backend supports.
    fn supported_flags(&self) -> CreateFlags;

    /// Its snapshots' metadata.
    fn snapshot_list(&self) -> &dyn SnapshotList;

    /// The state directory, where its snapshots are recorded by us.
    fn store(&self) -> Option<&Store>;

    /// Holds the name of a snapshot to be made: this one, or, if none is given, one made of the
    /// time.
    fn reserve(&self, name: Option<&str>) -> Result<Reserved>;

    /// Takes a snapshot without INSTANT, or of a guest that does not run, where libvirt does that
    /// itself; libvirt's object of it.
    fn delegate(&self, _xml: &str, _flags: CreateFlags) -> Option<Result<Snapshot>> {
        None
    }

    /// Takes the guest for one operation. Another's operation on it is `OperationInvalid`.
    fn begin(&self) -> Result<Box<dyn Guest + '_>>;

    /// libvirt's object of a snapshot, where libvirt has the snapshots' definitions.
    fn managed(&self, _name: &str) -> Result<Option<Snapshot>> {
        Ok(None)
    }
}

/// The metadata of a guest's snapshots.
pub trait SnapshotList {
    /// Their names, a parent before its children.
    fn names(&self) -> Result<Vec<String>>;

    /// `<domainsnapshot>` of one.
    fn xml(&self, name: &str) -> Result<String>;

    /// The current one.
    fn current(&self) -> Result<Option<String>>;

    /// Forgets one; its files stay.
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

/// A name that is held for a snapshot to be made.
#[derive(Debug)]
pub struct Reserved {
    /// The name.
    pub name: String,
    /// Where memory goes unless the caller says.
    pub memory_file: Option<PathBuf>,
    /// What holds it in a state directory.
    held: Option<Reservation>,
}

impl Reserved {
    /// What holds it in a state directory.
    pub fn held(&self) -> Option<&Reservation> {
        self.held.as_ref()
    }

    /// A name that somebody else holds.
    pub fn by_others(name: String) -> Reserved {
        Reserved { name, memory_file: None, held: None }
    }

    /// Holds it in a state directory, where memory goes too.
    pub fn in_store(store: &Store, name: Option<&str>) -> Result<Reserved> {
        let held = store.reserve(name)?;
        let memory_file = Some(store.path(&format!("{}.mem", held.name)));
        Ok(Reserved { name: held.name.clone(), memory_file, held: Some(held) })
    }
}

/// Whether QEMU can still be talked to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Liveness {
    /// QEMU answers.
    Alive,
    /// QEMU has ended.
    Exited,
    /// QEMU does not answer, and is not known to have ended.
    Unresponsive,
}

/// What a memory image says of the guest.
#[derive(Clone, Debug)]
pub struct Description {
    /// `<domain>`, with the images that the snapshot will hold.
    pub domain_xml: String,
    /// libvirt's `<cookie>`, where it needs one.
    pub cookie: Option<String>,
    /// A file whose owner the memory image is to have, where that is not the caller.
    pub owner: Option<PathBuf>,
}

/// What a guest is when a snapshot of it is planned.
#[derive(Clone, Debug)]
pub struct Survey {
    /// Its drives that have a medium and a device.
    pub drives: Vec<Drive>,
    /// What its memory image says of it.
    pub description: Description,
}

/// How a process that outlives this one reaches the guest.
pub enum RecoveryChannel<'a> {
    /// Not at all.
    None,
    /// By the monitor's socket, which only this operation uses; with the overlays, which it undoes.
    Monitor(BorrowedFd<'a>, Vec<MonitorOverlay>),
    /// By recovery commands.
    Commands(MakeRecoveryCommands<'a>),
}

/// An overlay that a process which outlives this one undoes by the monitor.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MonitorOverlay {
    /// The node of its format.
    pub node: String,
    /// The node of its file.
    pub file_node: String,
    /// The node below, where it is to be merged into that: not where its owner believes the disk to
    /// be on the overlay.
    pub image_node: Option<String>,
    /// Its file.
    pub file: Option<KnownFile>,
    /// What is to be said where it stays in use.
    pub complaint: String,
}

/// Makes the programs, given the QMP commands that put the migration settings back.
pub type MakeRecoveryCommands<'a> = Box<dyn Fn(&[(&str, Value)]) -> RecoveryCommands + 'a>;

/// The recovery commands of a snapshot, for a process that has ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RecoveryCommands {
    /// Succeeds where the daemon that does the others is there.
    pub look: RecoveryCommand,
    /// So often that is tried, once a second.
    pub tries: u32,
    /// Resumes the guest.
    pub resume: RecoveryCommand,
    /// The same where that fails, because the guest runs already, or the daemon takes it for one
    /// that does.
    pub resume_all_the_same: RecoveryCommand,
    /// Says how its migration is.
    pub query_migrate: RecoveryCommand,
    /// Says what state the guest is in.
    pub query_status: RecoveryCommand,
    /// Put QEMU's migration settings back.
    pub restore: Vec<RecoveryCommand>,
    /// Removes the record of the snapshot.
    pub forget: RecoveryCommand,
    /// Merge one overlay each.
    pub merge: Vec<MergeCommands>,
}

/// Merges an overlay.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MergeCommands {
    /// Fails if it is not in use.
    pub merge: RecoveryCommand,
    /// Succeeds if it is in use.
    pub is_in_use: RecoveryCommand,
    /// What is to be said where it stays in use.
    pub complaint: String,
}

/// A recovery command: a program that the watchdog runs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RecoveryCommand {
    /// Its absolute path, and its arguments.
    pub arguments: Vec<String>,
    /// A file that is discarded once it has succeeded.
    pub then_discard: Option<KnownFile>,
}

/// What a guest's QEMU and its backend can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// A background snapshot leaves a paused guest paused.
    pub background_keeps_paused: bool,
    /// A background snapshot that is cancelled once it is armed leaves the guest's memory writable.
    pub background_can_be_cancelled: bool,
    /// The backend's owner never sets QEMU's migration capability `background-snapshot`: where it is
    /// set, a snapshot whose process was killed has left it.
    pub never_sets_background_snapshot: bool,
    /// A snapshot holds copies of UEFI variables, and does not only compare them.
    pub keeps_firmware_copies: bool,
    /// The record of a snapshot says what to do with disks that were left to a storage hook.
    pub records_manual_disks: bool,
    /// A more privileged process gives QEMU write access to images before QEMU opens them.
    pub gives_write_access: bool,
}

impl Capabilities {
    /// Those of a QEMU of this version whose snapshots the library records itself.
    pub fn of_qemu(version: (u64, u64)) -> Capabilities {
        // Measured: 7.2 starts the guest by itself once write tracking is armed, and leaves its
        // memory protected when it is cancelled then; 10.0 does neither. Those in between were not
        // tried, and cannot be asked.
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

/// A guest during one operation.
pub trait Guest: Execute {
    /// Its state.
    fn status(&mut self) -> Result<Status>;

    /// Its drives that have a medium and a device.
    fn drives(&mut self) -> Result<Vec<Drive>>;

    /// What the guest is, as a snapshot of it is planned: read once.
    fn survey(&mut self) -> Result<Survey>;

    /// Refuses flags that this guest cannot have.
    fn check_flags(&mut self, _flags: CreateFlags) -> Result<()> {
        Ok(())
    }

    /// Refuses a guest whose RAM another process writes: its pages would be saved younger than the
    /// instant.
    fn check_memory_not_shared(&mut self) -> Result<()>;

    /// Refuses disks of which a snapshot could never be brought back: those on images that QEMU
    /// alone knows.
    fn check_images_are_named(&mut self, disks: &[DiskPlan]) -> Result<()>;

    /// Refuses a guest with a job under way that would make a step of the pause wait or fail.
    fn check_not_busy(&mut self, disks: &[DiskPlan]) -> Result<()>;

    /// What stands for this run of it, in this process.
    fn identity(&self) -> String;

    /// QEMU's process, where it is known.
    fn pid(&self) -> Option<u32>;

    /// What QEMU and the backend can do; the same during a whole operation.
    fn capabilities(&self) -> Capabilities;

    /// Creates the overlays, ready to be switched to. Files that exist are an error, and not
    /// touched, unless the plan is to use them.
    fn create_overlays(&mut self, disks: &[DiskPlan]) -> Result<()>;

    /// Stops the vCPUs.
    fn pause(&mut self, deadline: Deadline) -> Result<()>;

    /// Switches all disks to their overlays, or none, for the snapshot of this name.
    fn switch_disks(&mut self, snapshot: &str, deadline: Deadline) -> Result<()>;

    /// Gives an overlay that its disk is on this size, which the image below has got since the
    /// plan.
    fn resize_overlay(&mut self, disk: &DiskPlan, size: u64, deadline: Deadline) -> Result<()>;

    /// Starts the vCPUs, unless they run.
    fn resume(&mut self, deadline: Deadline) -> Result<()>;

    /// The last pause as the guest had it, by QEMU's own time stamps.
    fn last_pause(&mut self) -> Option<Duration> {
        None
    }

    /// Records the snapshot the moment it is taken, where its record has to be there before it is
    /// complete.
    fn register(&mut self, _record: &Record) -> Result<()> {
        Ok(())
    }

    /// Looks whether what was recorded, and the disks' chains, still are what they should be; the
    /// snapshot is complete.
    fn confirm(&mut self) -> Result<()> {
        Ok(())
    }

    /// Records a complete snapshot; what was recorded is returned.
    fn commit(&mut self, _reserved: &Reserved, record: Record) -> Result<Record> {
        Ok(record)
    }

    /// The file that there is once a snapshot of this name is recorded, where it is one.
    fn record_file(&self, _name: &str) -> Option<PathBuf> {
        None
    }

    /// Undoes the record.
    fn withdraw(&mut self) -> Result<()> {
        Ok(())
    }

    /// Undoes the switch: what the guest wrote since is merged into the images, which are active
    /// again. Does nothing where nothing was switched, as far as QEMU knows.
    fn merge_disks(&mut self) -> Result<()>;

    /// Undoes the creation of overlays that are not in use.
    fn discard_overlays(&mut self) -> Result<()>;

    /// Takes out of the overlays what the guest has written since the switch. QEMU has ended.
    fn empty_overlays(&mut self) -> Result<()> {
        Ok(())
    }

    /// The same as the last two for a QEMU that has ended. `switched`: the disks may be on their
    /// overlays.
    fn merge_and_discard_offline(&mut self, switched: bool) -> Result<()>;

    /// How the watchdog reaches the guest once this process has ended, while it takes the snapshot
    /// of this name.
    fn recovery_channel<'a>(&'a self, snapshot: &'a str) -> RecoveryChannel<'a>;

    /// What holds it for this operation, which a watchdog holds too.
    fn held(&self) -> Vec<BorrowedFd<'_>>;

    /// Leaves it to the watchdog, which has that, and what it acts by.
    fn leave_held(&mut self);

    /// Ends the guest.
    fn halt(&mut self) -> Result<()>;

    /// Whether there is another QEMU by now in the place of one that is gone, which has got what
    /// was said since.
    fn is_started_again(&mut self) -> bool {
        false
    }

    /// Whether QEMU is there; reconnects if the connection was lost.
    fn liveness(&mut self) -> Liveness;

    /// libvirt's object of the snapshot that was taken, where libvirt has had a part in it; once.
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
