// SPDX-License-Identifier: LGPL-2.1-or-later

//! Plans a snapshot: decides and checks everything, and changes nothing.

use std::path::{Path, PathBuf};

use super::devices::Devices;
use crate::backend::{DEFAULT_TIMEOUT, Description, Guest, Reserved, Survey};
use crate::deadline::Deadline;
use crate::engine::nvram;
use crate::engine::options::Options;
use crate::error::{Result, fail};
use crate::image::Format;
use crate::migration::{Mode, run_state};
use crate::model::flags::CreateFlags;
use crate::model::{MemoryRequest, Plan, RecordedNvram, Request, plan};
use crate::monitor::commands::{self, Progress};

/// A snapshot that was planned, and is to be made.
pub struct Task<'a> {
    pub reserved: &'a Reserved,
    pub description: Option<String>,
    pub flags: CreateFlags,
    /// The guest runs, and is to run again.
    pub running: bool,
    /// QEMU's name of the state that the guest has when it is saved.
    pub expected_state: &'static str,
    pub mode: Mode,
    pub options: Options,
    pub plan: Plan,
    pub nvram: Vec<RecordedNvram>,
    pub memory_file: PathBuf,
    pub image_format: Format,
    pub about: Description,
    /// The guest's devices at the time of the plan.
    pub devices: Devices,
}

impl<'a> Task<'a> {
    /// Plans a snapshot by a request, of a guest in this state.
    pub fn plan(
        guest: &mut dyn Guest,
        request: Request,
        flags: CreateFlags,
        reserved: &'a Reserved,
        options: Options,
        state: GuestState,
        mode: Mode,
    ) -> Result<Task<'a>> {
        // The devices are read before the domain's XML, so that a change in between is noticed.
        let devices = Devices::read(guest)?;
        let Survey { drives, description: about } = guest.survey()?;
        let plan = plan(drives, &request, &reserved.name, flags.reuses_overlays())?;
        let image_format = guest.image_format(options.image_format)?;
        guest.check_images_are_named(&plan.disks)?;
        guest.check_not_busy(&plan.disks)?;
        let memory_file = match (request.memory, &reserved.memory_file) {
            (MemoryRequest::External(file), _) => file.into(),
            (_, Some(file)) => file.clone(),
            (_, None) => fail!(
                OperationUnsupported,
                "an instant snapshot is supported only with external memory: name the file, \
                 <memory snapshot='external' file='...'/>"
            ),
        };
        let nvram =
            plan.firmware.iter().map(|drive| nvram::Copy::plan(drive, &memory_file)).collect();
        check_paths_distinct(&plan, &memory_file)?;
        check_storage_hook(guest, &plan, flags, &options)?;
        Ok(Task {
            reserved,
            description: request.description,
            flags,
            running: state == GuestState::Running,
            expected_state: if state == GuestState::NotStarted {
                run_state::PRELAUNCH
            } else {
                run_state::PAUSED
            },
            mode,
            options,
            plan,
            nvram,
            memory_file,
            image_format,
            about,
            devices,
        })
    }
}

pub fn check_memory_request(flags: CreateFlags, request: &Request) -> Result<()> {
    if request.memory != MemoryRequest::No {
        return Ok(());
    }
    if flags.is_live() {
        fail!(
            OperationUnsupported,
            "live snapshot creation is supported only with external memory: use <memory \
             snapshot='external'/>"
        );
    }
    fail!(
        OperationUnsupported,
        "a snapshot without memory is not supported for this guest yet: use <memory \
         snapshot='external'/>"
    );
}

/// The states of a guest in which a snapshot can be taken of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestState {
    Running,
    Paused,
    NotStarted,
}

impl GuestState {
    /// The state in words.
    pub fn description(self) -> &'static str {
        match self {
            GuestState::Running => "running",
            GuestState::Paused => "paused: its snapshot leaves it paused",
            GuestState::NotStarted => "not started: it is snapshotted without INSTANT",
        }
    }
}

/// The guest's state; an error where no snapshot can be taken.
pub fn check_state(guest: &mut dyn Guest) -> Result<GuestState> {
    let status = guest.status()?;
    let migration = commands::query_migrate(guest, Deadline::after(DEFAULT_TIMEOUT))?;
    if status.status == "inmigrate" {
        fail!(
            OperationInvalid,
            "the guest waits for an incoming migration: load a snapshot, or resume it, first"
        );
    }
    if migration.progress() == Progress::UnderWay {
        fail!(
            OperationInvalid,
            "a migration of the guest is in progress (it is saved, migrated or snapshotted already)"
        );
    }
    if !migration.blocked_reasons.is_empty() {
        fail!(
            ConfigUnsupported,
            "the guest's memory cannot be saved: {}",
            migration.blocked_reasons.join("; ")
        );
    }
    match status.status.as_str() {
        "running" => Ok(GuestState::Running),
        "paused" => Ok(GuestState::Paused),
        "prelaunch" => Ok(GuestState::NotStarted),
        "postmigrate" => fail!(
            OperationInvalid,
            "the guest was saved while it was paused, and QEMU saves it once only until it has run \
             again: resume it first"
        ),
        other => {
            fail!(OperationInvalid, "no snapshot can be taken of a guest in the state '{other}'")
        }
    }
}

/// Refuses disks with snapshot='manual' where there is no storage hook that snapshots them, or
/// where the snapshot's revert would not know of them.
fn check_storage_hook(
    guest: &dyn Guest,
    plan: &Plan,
    flags: CreateFlags,
    options: &Options,
) -> Result<()> {
    let Some(disk) = plan.manual.first() else { return Ok(()) };
    let name = disk.name();
    if options.storage.is_none() {
        fail!(
            OperationUnsupported,
            "snapshot='manual' of disk '{name}' needs a storage hook, which this guest does not \
             have: set one (instantsnap_set_storage_hook()), or use snapshot='external', or 'no' \
             to leave the disk out"
        );
    }
    if flags.keeps_metadata() && !guest.capabilities().records_manual_disks {
        fail!(
            OperationUnsupported,
            "a snapshot with memory and with snapshot='manual' of disk '{name}' is not recorded in \
             libvirt, whose revert would combine the old memory with the disk's new content: add \
             VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA"
        );
    }
    Ok(())
}

fn check_paths_distinct(plan: &Plan, memory_file: &Path) -> Result<()> {
    match plan.disks.iter().find(|disk| Path::new(&disk.overlay) == memory_file) {
        Some(disk) => fail!(
            ConfigUnsupported,
            "disk '{}' and memory would have the same external snapshot file '{}': give each its \
             own",
            disk.drive.name(),
            disk.overlay
        ),
        None => Ok(()),
    }
}
