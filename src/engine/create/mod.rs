//! Taking a snapshot: the phases, top down.

mod devices;
mod sizes;
mod undo;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use self::devices::Devices;
use self::sizes::Sizes;
use self::undo::Made;
use crate::backend::{
    Catalog, Connector, DEFAULT_TIMEOUT, Description, Guest, Reserved, write_access,
};
use crate::cancel::Cancel;
use crate::deadline::Deadline;
use crate::engine::clock::{Clock, Phase};
use crate::engine::durable::{Unflushed, sync_images};
use crate::engine::nvram;
use crate::engine::options::Options;
use crate::engine::storage::{Called, StorageCall};
use crate::engine::watchdog::{self, Stage};
use crate::error::{Error, Result, fail};
use crate::image::MemoryImage;
use crate::migration::early_start::{self, Sample};
use crate::migration::{
    FD_NAME, Flow, Mode, PopulateProgress, Settings, Stream, WriteCheck, prefault,
    reactivate_disks, run_state, wait_armed,
};
use crate::model::flags::CreateFlags;
use crate::model::{
    Frozen, ManualDisk, MemoryRequest, Plan, Record, RecordedDisk, RecordedNvram, Request, State,
    plan, validate,
};
use crate::monitor::Failure;
use crate::monitor::commands::{self, Progress};
use crate::sys;

/// A snapshot to be made: everything is decided, and nothing touched.
struct Task<'a> {
    reserved: &'a Reserved,
    description: Option<String>,
    flags: CreateFlags,
    /// The guest runs, and is to run again.
    running: bool,
    /// QEMU's word for the state in which it is to be saved.
    stands: &'static str,
    mode: Mode,
    options: Options,
    plan: Plan,
    nvram: Vec<RecordedNvram>,
    memory_file: PathBuf,
    about: Description,
    /// The devices that it was planned with.
    devices: Devices,
}

/// A migration that was begun while the guest ran, of a guest that is paused now.
struct Begun {
    /// When the pause must end.
    deadline: Deadline,
    populate: PopulateProgress,
    stopping: Duration,
}

/// A snapshot that is complete.
#[derive(Debug)]
pub struct Created {
    /// Its name.
    pub name: String,
    /// What was recorded of it, or would have been; nothing where another has made it.
    record: Option<Record>,
    /// It was recorded.
    recorded: bool,
}

impl Created {
    /// Its `<domainsnapshot>`: as it is recorded, as far as it is.
    pub fn xml(&self, catalog: &dyn Catalog) -> Result<String> {
        match (&self.record, self.recorded) {
            (Some(record), false) => Ok(record.to_xml()),
            // Somebody may have deleted it by now, or the daemon be away.
            (Some(record), true) => Ok(catalog.xml(&self.name).unwrap_or_else(|_| record.to_xml())),
            (None, _) => catalog.xml(&self.name),
        }
    }

    fn by_another(name: String) -> Created {
        Created { name, record: None, recorded: true }
    }
}

/// Takes a snapshot.
pub fn create(
    connector: &dyn Connector,
    xml: &str,
    flags: CreateFlags,
    options: Options,
    cancel: &Cancel,
    clock: &mut Clock,
) -> Result<Created> {
    cancel.check()?;
    if !flags.is_instant()
        && let Some(delegated) = connector.delegate(xml, flags)
    {
        return delegated.map(Created::by_another);
    }
    flags.require_supported(connector.supported_flags())?;
    if flags.validates() {
        validate(xml)?;
    }
    let request = Request::parse(xml)?;
    check_memory_request(flags, &request)?;
    let reserved = connector.reserve(request.name.as_deref())?;
    let mut guest = connector.begin()?;
    let guest = &mut *guest;
    let state = check_state(guest)?;
    let running = state == GuestState::Running;
    if !running && let Some(delegated) = connector.delegate(xml, flags) {
        return delegated.map(Created::by_another);
    }
    guest.accept(&reserved.name, flags)?;
    let mode = match (flags.is_instant(), state) {
        (true, GuestState::Running) => Mode::Background,
        // It must stay paused, and not every QEMU leaves it so.
        (true, GuestState::Paused) if guest.background_keeps_paused() => Mode::Background,
        // A background snapshot of a guest that was never started ends QEMU 10.0.
        _ => Mode::Paused,
    };
    let settings = Settings::read(guest)?;
    if flags.is_instant() {
        settings.require_background()?;
    }
    if mode == Mode::Background && running {
        guest.check_memory_not_shared()?;
    }
    cancel.check()?;

    clock.enter(Phase::Plan);
    // Before the domain's XML is read: what comes in between is noticed, and not only in one of the
    // two.
    let devices = Devices::read(guest)?;
    let drives = guest.drives()?;
    let about = guest.describe(&drives)?;
    let plan = plan(drives, &request, &reserved.name, flags.reuses_overlays())?;
    guest.check_images_are_named(&plan.disks)?;
    guest.check_not_busy(&plan.disks)?;
    let memory_file = match (request.memory, &reserved.memory_file) {
        (MemoryRequest::External(file), _) => file.into(),
        (_, Some(file)) => file.clone(),
        (_, None) => fail!(
            OperationUnsupported,
            "an instant snapshot is supported only with external memory: name the file, <memory \
             snapshot='external' file='...'/>"
        ),
    };
    let nvram = plan.firmware.iter().map(|drive| nvram::Copy::plan(drive, &memory_file)).collect();
    check_paths_distinct(&plan, &memory_file)?;
    check_storage_hook(guest, &plan, flags, &options)?;
    cancel.check()?;
    clock.stats.disks = plan.disks.len();
    let task = Task {
        reserved: &reserved,
        description: request.description,
        flags,
        running,
        stands: if state == GuestState::NotStarted {
            run_state::PRELAUNCH
        } else {
            run_state::PAUSED
        },
        mode,
        options,
        plan,
        nvram,
        memory_file,
        about,
        devices,
    };

    let mut made = Made::default();
    let make = AssertUnwindSafe(|| task.make(guest, settings, cancel, clock, &mut made));
    // A defect of ours is no reason to leave a guest paused.
    let record = match catch_unwind(make)
        .unwrap_or_else(|_| fail!(InternalError, "a defect of instantsnap, please report it"))
    {
        Ok(record) => record,
        Err(error) => {
            clock.enter(Phase::Undo);
            return Err(made.undo(guest, error, clock));
        }
    };
    if flags.halts() {
        guest
            .halt()
            .map_err(|error| error.and(format!("the snapshot '{}' is complete", record.name)))?;
    }
    Ok(Created {
        name: record.name.clone(),
        record: Some(record),
        recorded: flags.keeps_metadata(),
    })
}

fn check_memory_request(flags: CreateFlags, request: &Request) -> Result<()> {
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

/// The guest's run state once its memory is saved must not be one that the snapshot has brought
/// about.
fn check_runs_on(guest: &mut dyn Guest) -> Result<()> {
    match guest.status()?.status.as_str() {
        "io-error" => fail!(
            OperationFailed,
            "the guest was stopped by an I/O error (its state is 'io-error') while its memory was \
             being saved: the file system of an overlay is full, or fails"
        ),
        "postmigrate" => fail!(
            OperationFailed,
            "the guest was stopped when its memory was saved, because another client has switched \
             QEMU's migration capability 'background-snapshot' off: take the snapshot again"
        ),
        _ => Ok(()),
    }
}

/// Disks that are left to others need somebody who snapshots them, and somebody who knows of it
/// when the snapshot is brought back.
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
    if flags.keeps_metadata() && !guest.records_manual_disks() {
        fail!(
            OperationUnsupported,
            "a snapshot with memory and with snapshot='manual' of disk '{name}' is not recorded in \
             libvirt, whose revert would put old memory beside the disk as it is then: add \
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

impl Task<'_> {
    fn make(
        &self,
        guest: &mut dyn Guest,
        mut settings: Settings,
        cancel: &Cancel,
        clock: &mut Clock,
        made: &mut Made,
    ) -> Result<Record> {
        clock.enter(Phase::Prepare);
        made.ran = self.running;
        made.image = Some(self.create_image()?);
        for nvram in &self.nvram {
            made.copies.push(nvram::Copy::take(nvram.clone())?);
        }
        let unflushed = Unflushed::open(&self.plan.manual)?;
        cancel.check()?;
        write_access::check(guest, &self.plan.disks)?;
        made.overlays = true;
        guest.create_overlays(&self.plan.disks)?;
        let sizes = Sizes::open(&self.plan.disks);
        cancel.check()?;
        self.open_stream(guest, &settings, made)?;
        // From here on QEMU is changed: there is a watchdog now.
        settings.watchdog = made.watchdog.process();
        made.settings = Some((settings.clone(), self.mode));
        settings.apply(guest, self.mode)?;
        made.stream()?.pass(guest)?;
        self.flush_disks();
        self.prefault(guest, cancel)?;
        // Notices what other clients let the guest write in the pause.
        let write_check = WriteCheck::new(&self.plan.disks, self.mode);
        cancel.check()?;
        if self.running && !guest.status()?.running {
            fail!(
                OperationInvalid,
                "the guest was paused by somebody else while its snapshot was being prepared"
            );
        }
        // Again: it can take seconds until here.
        guest.check_not_busy(&self.plan.disks)?;
        sizes.ask_planned(guest)?;

        let begun = self.begin_while_it_runs(guest, &settings, cancel, clock, made)?;
        let deadline =
            begun.as_ref().map_or_else(|| self.pause_deadline(clock), |begun| begun.deadline);
        if self.running && begun.is_none() {
            clock.enter(Phase::Pause);
            made.watchdog.enter(Stage::Paused);
            clock.pausing();
            guest.pause(deadline)?;
            clock.paused();
            cancel.check()?;
        }
        clock.enter(Phase::Switch);
        sizes.check_planned(guest, deadline)?;
        made.switched = true;
        if self.running && begun.is_none() {
            made.watchdog.enter(Stage::Switching);
        }
        guest.switch_disks(deadline)?;
        sizes.check_switched(guest, deadline)?;
        clock.switched();
        cancel.check()?;
        self.snapshot_storage(cancel, clock, made, unflushed, deadline)?;

        clock.enter(Phase::Arm);
        let keeps_paused = guest.background_keeps_paused();
        if begun.is_none() {
            if self.mode == Mode::Background && !keeps_paused {
                // By the time that it is armed the guest runs, and writes.
                write_check.check(guest, deadline)?;
            }
            cancel.check()?;
            // Late: until `migrate`, another client's save would be a background snapshot
            // ([`Made::outrun`]).
            settings.unlock(guest, deadline)?;
            // Last: QEMU cannot capture it in another state.
            run_state::check(guest, self.stands, deadline)?;
            let stage = if self.running { Stage::Migrating } else { Stage::Draining };
            self.migrate(guest, &settings, made, stage, deadline)?;
        }
        let (flow, saved) = match self.mode {
            Mode::Background => {
                let migration = wait_armed(guest, self.running, cancel, deadline)?;
                clock.stats.setup = migration.setup_time();
                clock.stats.started_early = begun.is_some();
                if keeps_paused {
                    write_check.check(guest, deadline)?;
                }
                (made.stream()?.flow(Some(&migration)), None)
            }
            Mode::Paused => {
                let bytes = made.wait_saved(guest, cancel, clock)?;
                // QEMU saves what the guest wrote meanwhile to its memory; what it wrote to disks
                // is on the overlays.
                write_check.check(guest, Deadline::after(DEFAULT_TIMEOUT))?;
                (Flow { done: bytes, total: bytes, ..Flow::default() }, Some(bytes))
            }
        };
        if self.running {
            guest.resume(Deadline::after(DEFAULT_TIMEOUT))?;
            made.watchdog.enter(Stage::Draining);
            clock.resumed(guest.last_pause());
        } else if self.mode == Mode::Paused {
            reactivate_disks(guest)?;
        }
        let instant = SystemTime::now();
        // From the event on the caller may change both.
        sizes.check_captured(guest)?;
        self.devices.check(guest)?;
        clock.instant(flow);
        if self.mode == Mode::Background {
            self.record_samples(&guest.identity(), clock, begun);
        }
        let record = self.record(instant, made)?;
        if self.flags.keeps_metadata() {
            made.registered = true;
            guest.register(&record)?;
        }

        clock.stats.memory_image_bytes = match saved {
            Some(bytes) => bytes,
            None => {
                clock.enter(Phase::Drain);
                made.wait_saved(guest, cancel, clock)?
            }
        };
        cancel.check()?;

        clock.enter(Phase::Finish);
        if self.running {
            // While others are locked out: a guest that has stopped now was not stopped by their
            // migration.
            check_runs_on(guest)?;
        }
        settings.restore(guest, self.mode)?;
        made.settings_are_back();
        let image = made.image()?;
        if let Some(state) = image.state_at_instant()? {
            run_state::check_text(&state, self.stands)?;
        }
        cancel.check()?;
        sync_images(&self.plan.disks, guest.pid())?;
        image.complete()?;
        made.copies.iter().try_for_each(nvram::Copy::check_unchanged)?;
        cancel.check()?;
        guest.confirm()?;
        if !guest.keeps_firmware_copies() {
            made.copies.iter().try_for_each(nvram::Copy::remove)?;
        }
        made.watchdog.enter(Stage::Committing);
        let record = match self.flags.keeps_metadata() {
            true => guest
                .commit(self.reserved, record)
                .inspect_err(|_| made.watchdog.enter(Stage::Finishing))?,
            false => record,
        };
        made.watchdog.dismiss();
        Ok(record)
    }

    /// Has the caller's storage snapshot the disks that QEMU does not.
    fn snapshot_storage(
        &self,
        cancel: &Cancel,
        clock: &Clock,
        made: &mut Made,
        unflushed: Unflushed,
        deadline: Deadline,
    ) -> Result<()> {
        let Some(hook) = self.options.storage.clone().filter(|_| !self.plan.manual.is_empty())
        else {
            return Ok(());
        };
        let left = deadline.left().unwrap_or_default();
        let call = StorageCall {
            snapshot: self.reserved.name.clone(),
            disks: self.plan.manual.iter().map(Into::into).collect(),
            paused: clock.pause_so_far(),
            left: hook.deadline().map_or(left, |own| own.min(left)),
        };
        made.storage.insert(Called::begin(hook, call, unflushed)?).wait(cancel)
    }

    /// For the next one's sake.
    fn record_samples(&self, identity: &str, clock: &Clock, begun: Option<Begun>) {
        let setup = clock.stats.setup;
        match begun {
            Some(Begun { populate, stopping, .. }) => {
                early_start::record(identity, Sample::Running(populate.total_at(setup)));
                early_start::record(identity, Sample::Stopping(stopping));
            }
            None => {
                early_start::record(identity, Sample::Stopped(setup));
                if self.running {
                    // Without the question.
                    early_start::record(
                        identity,
                        Sample::Stopping(clock.stats.phase(Phase::Pause) * 3 / 2),
                    );
                }
            }
        }
    }

    /// Has all of memory be there when QEMU touches it: before the first snapshot. What is there
    /// then stays.
    fn prefault(&self, guest: &mut dyn Guest, cancel: &Cancel) -> Result<()> {
        let first = self.running
            && self.mode == Mode::Background
            && !early_start::has_samples(&guest.identity());
        match first.then(|| guest.pid()).flatten() {
            Some(pid) => prefault(guest, pid, cancel),
            None => Ok(()),
        }
    }

    /// The way of memory to its image, and a watchdog for the time that it is open.
    fn open_stream(
        &self,
        guest: &mut dyn Guest,
        settings: &Settings,
        made: &mut Made,
    ) -> Result<()> {
        made.stream = Some(Stream::open(made.image()?)?);
        let files: Vec<_> =
            made.copies.iter().map(nvram::Copy::known).chain([made.image()?.known()]).collect();
        let restore = settings.script(self.mode);
        let channel = guest.recovery_channel(&self.reserved.name);
        let Made { stream: Some(stream), watchdog, .. } = made else { unreachable!("just made") };
        let task = watchdog::Task {
            held: &guest.held(),
            reservation: self.reserved.held(),
            record: guest.record_file(&self.reserved.name).filter(|_| self.flags.keeps_metadata()),
            pipe: stream.pipe(),
            restore: &restore,
            files: &files,
        };
        watchdog.start(channel, &task);
        Ok(())
    }

    /// Begins the migration, and the stage that the guest is in from then on. Others are locked out
    /// again while it sets up: what they begin after its end must not be a background snapshot.
    fn migrate(
        &self,
        guest: &mut dyn Guest,
        settings: &Settings,
        made: &mut Made,
        stage: Stage,
        deadline: Deadline,
    ) -> Result<()> {
        let before = made.watchdog.stage();
        made.watchdog.enter(stage);
        commands::migrate(guest, FD_NAME, deadline).map_err(|failure| {
            if matches!(failure, Failure::Refused(..)) {
                // The migration that there may be is another client's.
                made.watchdog.enter(before);
                made.outrun = self.mode == Mode::Background;
            }
            failure.into_error("cannot start saving memory")
        })?;
        settings.lock(guest, deadline)
    }

    /// Begins the migration while the guest runs, and pauses the guest in time, where that is worth
    /// it: see [`early_start`]. `None` where nothing was begun.
    fn begin_while_it_runs(
        &self,
        guest: &mut dyn Guest,
        settings: &Settings,
        cancel: &Cancel,
        clock: &mut Clock,
        made: &mut Made,
    ) -> Result<Option<Begun>> {
        if !self.running || self.mode != Mode::Background || !guest.background_keeps_paused() {
            return Ok(None);
        }
        let identity = guest.identity();
        let memory = commands::query_memory_size(guest, Deadline::after(DEFAULT_TIMEOUT))?;
        while clock.stats.lost < self.options.early_start.tries {
            let estimated = || early_start::estimate(&identity, memory, clock.stats.lost);
            let Some(stop_after) = self.options.early_start.stop_after.or_else(estimated) else {
                return Ok(None);
            };
            settings.unlock(guest, Deadline::after(DEFAULT_TIMEOUT))?;
            let process =
                if self.options.early_start.stop_after.is_none() { guest.pid() } else { None };
            let mut populate = PopulateProgress::begin(process);
            self.migrate(guest, settings, made, Stage::Begun, Deadline::after(DEFAULT_TIMEOUT))?;
            while let Some(rest) = stop_after
                .checked_sub(populate.done())
                .filter(|rest| *rest >= early_start::TOLERANCE)
            {
                cancel.wait(PopulateProgress::interval(rest))?;
            }

            clock.enter(Phase::Pause);
            made.watchdog.enter(Stage::Racing);
            let deadline = self.pause_deadline(clock);
            clock.pausing();
            let order = Instant::now();
            guest.pause(deadline)?;
            // First: where it was reset, QEMU must not come to the capture before the guest runs.
            let stands = run_state::stands(guest, deadline)?;
            let migration = commands::query_migrate(guest, deadline)?;
            let stopping = order.elapsed();
            if stands && migration.is_setting_up() {
                made.watchdog.enter(Stage::Migrating);
                clock.paused();
                cancel.check()?;
                return Ok(Some(Begun { deadline, populate, stopping }));
            }
            // Too late; or it was reset, and runs again.
            let setup = wait_armed(guest, self.running, cancel, deadline)?.setup_time();
            guest.resume(Deadline::after(DEFAULT_TIMEOUT))?;
            clock.lost();
            clock.enter(Phase::Prepare);
            made.watchdog.enter(Stage::Begun);
            early_start::record(&identity, Sample::Running(populate.total_at(setup)));
            early_start::record(&identity, Sample::Stopping(stopping));
            self.begin_anew(guest, settings, cancel, made)?;
            cancel.check()?;
        }
        Ok(None)
    }

    /// When the pause must end. Tries that were lost count.
    fn pause_deadline(&self, clock: &Clock) -> Deadline {
        Deadline::after(self.options.pause_limit.saturating_sub(clock.stats.lost_pause))
    }

    /// Throws away what was saved, and opens the way to the image once more.
    fn begin_anew(
        &self,
        guest: &mut dyn Guest,
        settings: &Settings,
        cancel: &Cancel,
        made: &mut Made,
    ) -> Result<()> {
        let stream = made.stream()?;
        stream.give_up(guest, self.mode)?;
        stream.wait_given_up(guest, self.mode)?;
        stream.wait_discarded(cancel)?;
        made.image()?.discard_stream()?;
        self.open_stream(guest, settings, made)?;
        made.watchdog.enter(Stage::Prepared);
        settings.watch(guest, self.mode, made.watchdog.process())?;
        made.stream()?.pass(guest)
    }

    fn create_image(&self) -> Result<MemoryImage> {
        let Description { domain_xml, cookie, owner } = &self.about;
        let image =
            MemoryImage::create(&self.memory_file, domain_xml, cookie.as_deref(), self.running)?;
        if let Some(owner) = owner {
            sys::give_to_owner_of(owner, &image.file()?).map_err(|error| {
                let _ = image.remove();
                Error::system(
                    format!("cannot set the owner of '{}'", self.memory_file.display()),
                    error,
                )
            })?;
        }
        Ok(image)
    }

    /// What the host still has to write, it writes now, while the guest runs: `stop` waits for it.
    fn flush_disks(&self) {
        let drives = self.plan.disks.iter().map(|disk| &disk.drive).chain(&self.plan.manual);
        for drive in drives {
            // A wish: where it cannot be done, `stop` does it.
            let _ = sys::open_file(Path::new(&drive.file)).and_then(|image| image.sync_data());
        }
    }

    fn record(&self, instant: SystemTime, made: &Made) -> Result<Record> {
        let since_epoch = instant.duration_since(UNIX_EPOCH);
        let disks = self.plan.disks.iter().map(|disk| RecordedDisk {
            name: disk.drive.name().into(),
            overlay: disk.overlay.clone(),
            image: disk.drive.file.clone(),
            format: disk.drive.format.clone(),
            frozen: Frozen::of_all(std::iter::once(&disk.drive.file).chain(&disk.drive.backing)),
        });
        let manual = self.plan.manual.iter().map(ManualDisk::from);
        let Some(memory_file) = self.memory_file.to_str() else {
            return Err(Error::system(
                "the memory image's path",
                std::io::Error::other("is not UTF-8"),
            ));
        };
        Ok(Record {
            name: self.reserved.name.clone(),
            description: self.description.clone(),
            parent: None,
            creation_time: since_epoch.unwrap_or_default().as_secs(),
            state: if self.running { State::Running } else { State::Paused },
            memory_file: memory_file.into(),
            disks: disks.collect(),
            manual: manual.collect(),
            nvram: made.copies.iter().map(|copy| copy.recorded.clone()).collect(),
            domain_xml: self.about.domain_xml.clone(),
        })
    }
}
