//! Taking a snapshot: the phases, top down.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::cancel::Cancel;
use super::clock::{By, Clock, Phase};
use super::guard::{Script, Stage};
use super::migration::{FD_NAME, Mode, Settings, Stream, wait_armed};
use super::nvram;
use super::reactivate::reactivate_disks;
use super::undo::Made;
use crate::error::{Error, Result, fail};
use crate::flags::{self, Flags};
use crate::guest::{Connector, Guest, PATIENCE};
use crate::image::MemoryImage;
use crate::monitor::commands::{self, Progress};
use crate::monitor::{Deadline, Failure};
use crate::snapshot::domain::{Domain, Source};
use crate::snapshot::{
    Drive, MemoryRequest, Plan, Record, RecordedDisk, RecordedNvram, Request, Reservation, Role, State, Store, plan,
};

/// A snapshot to be made: everything is decided, and nothing touched.
struct Job<'a> {
    store: &'a Store,
    reservation: Reservation,
    description: Option<String>,
    flags: Flags,
    /// The guest runs, and is to run again.
    running: bool,
    mode: Mode,
    pause_limit: Duration,
    plan: Plan,
    nvram: Vec<RecordedNvram>,
    memory_file: PathBuf,
    domain_xml: String,
}

/// Takes a snapshot.
pub fn create(
    connector: &dyn Connector,
    xml: &str,
    flags: u32,
    pause_limit: Duration,
    cancel: &Cancel,
    clock: &mut Clock,
) -> Result<Record> {
    let flags = Flags::check(flags)?;
    flags.require_built(connector.built_flags())?;
    let request = Request::parse(xml)?;
    check_memory_request(flags, &request)?;
    let reservation = connector.store().reserve(request.name.as_deref())?;
    let mut guest = connector.begin()?;
    let guest = &mut *guest;
    let state = check_state(guest)?;
    let running = state == GuestState::Running;
    let mode = match (flags.has(flags::INSTANT), state) {
        (true, GuestState::Running) => Mode::Background,
        // It must stay paused, and not every QEMU leaves it so.
        (true, GuestState::Paused) if guest.background_keeps_paused() => Mode::Background,
        // A background snapshot of a guest that was never started ends QEMU 10.0.
        _ => Mode::Paused,
    };
    let settings = Settings::read(guest)?;
    if flags.has(flags::INSTANT) {
        settings.require_background()?;
    }
    if mode == Mode::Background && running {
        guest.check_memory_is_its_own()?;
    }

    clock.enter(Phase::Plan);
    let drives = guest.drives()?;
    let domain_xml = domain_xml(connector, guest, &drives)?;
    let plan = plan(drives, &request, &reservation.name)?;
    let memory_file = match request.memory {
        MemoryRequest::External(file) => file.into(),
        _ => connector.store().path(&format!("{}.mem", reservation.name)),
    };
    let nvram = plan.firmware.iter().map(|drive| nvram::Copy::plan(drive, &memory_file)).collect();
    check_paths_distinct(&plan, &memory_file)?;
    cancel.check()?;
    clock.stats.disks = plan.disks.len();
    let job = Job {
        store: connector.store(),
        reservation,
        description: request.description,
        flags,
        running,
        mode,
        pause_limit,
        plan,
        nvram,
        memory_file,
        domain_xml,
    };

    let mut made = Made::default();
    let make = AssertUnwindSafe(|| job.make(guest, settings, cancel, clock, &mut made));
    // A defect of ours is no reason to leave a guest paused.
    let record = match catch_unwind(make)
        .unwrap_or_else(|_| fail!(InternalError, "a defect of instantsnap, please report it"))
    {
        Ok(record) => record,
        Err(error) => {
            clock.enter(Phase::Undo);
            return Err(made.undo(guest, error));
        }
    };
    if job.flags.has(flags::HALT) {
        guest.halt().map_err(|error| error.and(format!("the snapshot '{}' is complete", record.name)))?;
    }
    Ok(record)
}

fn check_memory_request(flags: Flags, request: &Request) -> Result<()> {
    if request.memory != MemoryRequest::No {
        return Ok(());
    }
    if flags.has(flags::LIVE) {
        fail!(
            OperationUnsupported,
            "live snapshot creation is supported only with external memory: use <memory snapshot='external'/>"
        );
    }
    fail!(
        OperationUnsupported,
        "a snapshot without memory is not supported for this guest yet: use <memory snapshot='external'/>"
    );
}

/// A guest that a snapshot can be taken of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum GuestState {
    Running,
    Paused,
    NotStarted,
}

/// The guest's state; an error where no snapshot can be taken.
fn check_state(guest: &mut dyn Guest) -> Result<GuestState> {
    let status = guest.status()?;
    let migration = commands::query_migrate(guest, Deadline::after(PATIENCE))?;
    if status.status == "inmigrate" {
        fail!(OperationInvalid, "the guest waits for an incoming migration: load a snapshot, or resume it, first");
    }
    if migration.progress() == Progress::UnderWay {
        fail!(
            OperationInvalid,
            "a migration of the guest is in progress (it is saved, migrated or snapshotted already)"
        );
    }
    if !migration.blocked_reasons.is_empty() {
        fail!(ConfigUnsupported, "the guest's memory cannot be saved: {}", migration.blocked_reasons.join("; "));
    }
    match status.status.as_str() {
        "running" => Ok(GuestState::Running),
        "paused" => Ok(GuestState::Paused),
        "prelaunch" => Ok(GuestState::NotStarted),
        "postmigrate" => fail!(
            OperationInvalid,
            "the guest was saved while it was paused, and QEMU saves it once only until it has run again: resume it first"
        ),
        other => fail!(OperationInvalid, "no snapshot can be taken of a guest in the state '{other}'"),
    }
}

/// `<domain>` with the images that the snapshot will hold.
fn domain_xml(connector: &dyn Connector, guest: &mut dyn Guest, drives: &[Drive]) -> Result<String> {
    let source = |drive| {
        let Drive { file, format, .. }: &Drive = drive;
        Source { target: drive.name(), file, format }
    };
    let disks = drives.iter().filter(|drive| drive.role != Role::Firmware);
    match connector.domain() {
        Some(domain) => domain.with_sources(&disks.map(source).collect::<Vec<_>>()),
        None => Ok(Domain::minimal(&guest.machine()?, &disks.map(source).collect::<Vec<_>>())),
    }
}

fn check_paths_distinct(plan: &Plan, memory_file: &Path) -> Result<()> {
    match plan.disks.iter().find(|disk| Path::new(&disk.overlay) == memory_file) {
        Some(disk) => fail!(
            ConfigUnsupported,
            "disk '{}' and memory would have the same external snapshot file '{}': give each its own",
            disk.drive.name(),
            disk.overlay
        ),
        None => Ok(()),
    }
}

impl Job<'_> {
    fn make(
        &self,
        guest: &mut dyn Guest,
        settings: Settings,
        cancel: &Cancel,
        clock: &mut Clock,
        made: &mut Made,
    ) -> Result<Record> {
        clock.enter(Phase::Prepare);
        made.ran = self.running;
        let image = made.image.insert(MemoryImage::create(&self.memory_file, &self.domain_xml, self.running)?);
        let mut copies = Vec::new();
        for nvram in &self.nvram {
            copies.push(nvram::Copy::take(nvram.clone())?);
            made.files.push(PathBuf::from(&nvram.copy));
        }
        made.overlays = true;
        guest.create_overlays(&self.plan.disks)?;
        let stream = made.stream.insert(Stream::open(image)?);
        if let Some(monitor) = guest.monitor_socket() {
            made.guarded.start(monitor, stream.pipe(), &Script::new(&settings.script(self.mode)));
        }
        // From here on QEMU is changed: there is a guard now.
        let (settings, _) = made.settings.insert((settings, self.mode));
        settings.apply(guest, self.mode)?;
        stream.pass(guest)?;
        self.flush_disks();
        cancel.check()?;

        let paused_at = Instant::now();
        let deadline = Deadline::after(self.pause_limit);
        if self.running {
            if !guest.status()?.running {
                fail!(OperationInvalid, "the guest was paused by somebody else while its snapshot was being prepared");
            }
            clock.enter(Phase::Pause);
            made.guarded.enter(Stage::Paused);
            guest.pause(deadline)?;
            cancel.check()?;
        }
        clock.enter(Phase::Switch);
        made.switched = true;
        guest.switch_disks(deadline)?;
        cancel.check()?;

        clock.enter(Phase::Arm);
        let before = made.guarded.stage();
        made.guarded.enter(if self.running { Stage::Migrating } else { Stage::Draining });
        if let Err(failure) = commands::migrate(guest, FD_NAME, deadline) {
            if matches!(failure, Failure::Refused(..)) {
                // The migration that there may be is somebody else's.
                made.guarded.enter(before);
            }
            return Err(failure.into_error("cannot start saving memory"));
        }
        let bytes = match self.mode {
            Mode::Background => {
                wait_armed(guest, cancel, deadline)?;
                None
            }
            Mode::Paused => Some(stream.wait_saved(guest, cancel)?),
        };
        if self.running {
            guest.resume(Deadline::after(PATIENCE))?;
            let by_commands = (paused_at.elapsed(), By::Commands);
            made.guarded.enter(Stage::Draining);
            clock.stats.paused = Some(by_commands);
        } else if self.mode == Mode::Paused {
            reactivate_disks(guest)?;
        }
        let instant = SystemTime::now();
        clock.instant();

        let bytes = match bytes {
            Some(bytes) => bytes,
            None => {
                clock.enter(Phase::Drain);
                stream.wait_saved(guest, cancel)?
            }
        };
        clock.stats.memory_image_bytes = image.stream_offset() + bytes;

        clock.enter(Phase::Finish);
        if let (Some(pause), true) = (guest.last_pause(), self.running) {
            clock.stats.paused = Some((pause, By::Events));
        }
        settings.restore(guest, self.mode)?;
        if self.running && guest.status()?.status == "io-error" {
            fail!(
                OperationFailed,
                "the guest was stopped by an I/O error (its state is 'io-error') while its memory was being saved: the file \
                 system of an overlay is full, or fails"
            );
        }
        image.complete()?;
        copies.iter().try_for_each(nvram::Copy::check_unchanged)?;
        cancel.check()?;
        let record = self.record(instant)?;
        if self.flags.has(flags::NO_METADATA) {
            return Ok(record);
        }
        self.store.commit(&self.reservation, record)
    }

    /// What the host still has to write, it writes now, while the guest runs: `stop` waits for it.
    fn flush_disks(&self) {
        for disk in &self.plan.disks {
            // A wish: where it cannot be done, `stop` does it.
            let _ = File::open(&disk.drive.file).and_then(|image| image.sync_data());
        }
    }

    fn record(&self, instant: SystemTime) -> Result<Record> {
        let since_epoch = instant.duration_since(UNIX_EPOCH);
        let disks = self.plan.disks.iter().map(|disk| RecordedDisk {
            name: disk.drive.name().into(),
            overlay: disk.overlay.clone(),
            image: disk.drive.file.clone(),
            format: disk.drive.format.clone(),
        });
        let Some(memory_file) = self.memory_file.to_str() else {
            return Err(Error::system("the memory image's path", std::io::Error::other("is not UTF-8")));
        };
        Ok(Record {
            name: self.reservation.name.clone(),
            description: self.description.clone(),
            parent: None,
            creation_time: since_epoch.unwrap_or_default().as_secs(),
            state: if self.running { State::Running } else { State::Paused },
            memory_file: memory_file.into(),
            disks: disks.collect(),
            nvram: self.nvram.clone(),
            domain_xml: self.domain_xml.clone(),
        })
    }
}
