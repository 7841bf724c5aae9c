// SPDX-License-Identifier: LGPL-2.1-or-later

//! Prepares a snapshot while the guest runs: overlays, memory image, pipe, watchdog, settings.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::journal::{Entry, Journal};
use super::plan::Task;
use super::sizes::Sizes;
use crate::backend::{Description, Guest, RecoveryChannel, write_access};
use crate::cancel::Cancel;
use crate::engine::clock::Phase;
use crate::engine::durable::Unflushed;
use crate::engine::nvram;
use crate::error::{Error, Result, fail};
use crate::image::MemoryImage;
use crate::migration::{Mode, Settings, Stream, WriteCheck, early_start, prefault};
use crate::model::DiskPlan;
use crate::model::journal::{Line, NotedFile, Planned, QemuProcess};
use crate::sys;

/// The results of [`prepare`] that later steps need.
pub struct Prepared<'a> {
    pub settings: Settings,
    pub sizes: Sizes<'a>,
    /// Detects writes that other clients cause during the pause.
    pub write_check: WriteCheck<'a>,
    pub unflushed: Unflushed,
}

/// Prepares a snapshot.
pub fn prepare<'a>(
    task: &'a Task,
    guest: &mut dyn Guest,
    mut settings: Settings,
    cancel: &Cancel,
    journal: &mut Journal,
) -> Result<Prepared<'a>> {
    journal.enter(Entry::Phase(Phase::Prepare));
    begin_durable(task, guest, journal)?;
    journal.enter(Entry::Image(create_image(task)?));
    for nvram in &task.nvram {
        journal.enter(Entry::Copy(nvram::Copy::take(nvram.clone())?));
    }
    let unflushed = Unflushed::open(&task.plan.manual)?;
    cancel.check()?;
    write_access::check(guest, &task.plan.disks)?;
    journal.enter(Entry::Overlays);
    guest.create_overlays(&task.plan.disks)?;
    note_files(task, guest, journal)?;
    let sizes = Sizes::open(&task.plan.disks);
    cancel.check()?;
    open_stream(task, guest, &settings, journal)?;
    // The watchdog is running now, so QEMU may be changed from here on.
    settings.watchdog = journal.watchdog_process();
    journal.enter(Entry::Settings(settings.clone()));
    settings.apply(guest, task.mode)?;
    journal.stream()?.pass(guest)?;
    flush_disks(task);
    prefault_first(task, guest, cancel)?;
    let write_check = WriteCheck::new(&task.plan.disks, task.mode);
    cancel.check()?;
    if task.running && !guest.status()?.running {
        fail!(
            OperationInvalid,
            "another client has paused the guest while its snapshot was being prepared"
        );
    }
    // Checked again, because the preparation can take seconds.
    guest.check_not_busy(&task.plan.disks)?;
    sizes.ask_planned(guest)?;
    Ok(Prepared { settings, sizes, write_check, unflushed })
}

/// Begins the snapshot's durable journal: it says what is going to be made.
fn begin_durable(task: &Task, guest: &mut dyn Guest, journal: &mut Journal) -> Result<()> {
    let planned = Planned {
        qemu: guest.pid().and_then(QemuProcess::of),
        socket: guest.socket().and_then(|socket| socket.to_str().map(str::to_owned)),
        by_driver: guest.is_by_driver(),
        domain: guest.noted_domain(&task.reserved.name),
        running: task.running,
        is_recorded: task.flags.keeps_metadata(),
        memory: task.memory_file.clone(),
        copies: task.nvram.iter().map(|nvram| nvram.copy.clone()).collect(),
        overlays: guest.plan_overlays(&task.plan.disks),
        manual: task.plan.manual.iter().map(|drive| drive.name().to_owned()).collect(),
    };
    journal.begin_durable(task.reserved, planned)
}

/// Notes the inodes of the files that were made, by which a recovery recognises them.
fn note_files(task: &Task, guest: &dyn Guest, journal: &mut Journal) -> Result<()> {
    let own = journal.copies().map(nvram::Copy::known).chain(journal.image()?.known());
    let files = own
        .map(|known| NotedFile::of(known.with_absolute_path()))
        .chain(guest.overlay_files())
        .collect();
    let inode = |disk: &DiskPlan| {
        let metadata = Path::new(&disk.drive.file).metadata().ok()?;
        metadata.is_file().then(|| (disk.drive.file.clone(), metadata.ino()))
    };
    journal.note(&Line::Made { files, images: task.plan.disks.iter().filter_map(inode).collect() })
}

/// Opens the stream of memory to its image, and starts a watchdog for the time that it is open.
pub fn open_stream(
    task: &Task,
    guest: &mut dyn Guest,
    settings: &Settings,
    journal: &mut Journal,
) -> Result<()> {
    journal.set_stream(Stream::open(journal.image()?)?);
    start_watchdog(task, guest, settings, journal)
}

/// Starts a watchdog for the stream, which goes on where an earlier one has moved it to.
pub fn start_watchdog(
    task: &Task,
    guest: &mut dyn Guest,
    settings: &Settings,
    journal: &mut Journal,
) -> Result<()> {
    let name = &task.reserved.name;
    let restore = settings.script(task.mode);
    let record = guest.record_file(name).filter(|_| task.flags.keeps_metadata());
    let channel = guest.recovery_channel(name);
    let can_resume = !matches!(channel, RecoveryChannel::None);
    // A plain snapshot pauses it until its memory is saved.
    let limited = task.running && task.mode == Mode::Background;
    let limit =
        limited.then(|| task.options.pause_limit.saturating_sub(journal.clock.pause_so_far()));
    journal.start_watchdog(channel, &guest.held(), task.reserved, record, limit, &restore)?;
    if task.options.needs_watchdog && !can_resume {
        fail!(
            OperationFailed,
            "no watchdog could resume the guest if this process were killed: it has no way to QEMU \
             (a driver without a monitor socket for it, or no virsh)"
        );
    }
    if task.options.needs_watchdog && journal.watchdog_process().is_none() {
        fail!(
            OperationFailed,
            "no watchdog can be started, which would resume the guest if this process were killed: \
             this process may have reached a limit of processes or of file descriptors"
        );
    }
    if task.options.needs_watchdog && !journal.watchdog.is_placed() {
        fail!(
            OperationFailed,
            "the watchdog cannot enter the cgroup that INSTANTSNAP_WATCHDOG_CGROUP names, or the \
             program instantsnap-watchdog cannot be started"
        );
    }
    Ok(())
}

/// Prefaults the guest's memory before its first snapshot. For later ones that is not needed,
/// because memory that has been touched stays.
fn prefault_first(task: &Task, guest: &mut dyn Guest, cancel: &Cancel) -> Result<()> {
    let first = task.running
        && task.mode == Mode::Background
        && !early_start::has_samples(&guest.identity());
    match first.then(|| guest.pid()).flatten() {
        Some(pid) => prefault(guest, pid, cancel),
        None => Ok(()),
    }
}

fn create_image(task: &Task) -> Result<MemoryImage> {
    let Description { domain_xml, cookie, owner } = &task.about;
    let (cookie, format) = (cookie.as_deref(), task.image_format);
    let image = MemoryImage::create(&task.memory_file, domain_xml, cookie, task.running, format)?;
    if let Some(owner) = owner {
        image.give_to_owner_of(owner).map_err(|error| {
            let _ = image.remove();
            Error::system(
                format!("cannot set the owner of '{}'", task.memory_file.display()),
                error,
            )
        })?;
    }
    Ok(image)
}

/// Makes the host write dirty pages of the images out now, while the guest runs, because `stop`
/// waits for them.
fn flush_disks(task: &Task) {
    let drives = task.plan.disks.iter().map(|disk| &disk.drive).chain(&task.plan.manual);
    for drive in drives {
        // A failure does no harm: then `stop` does it.
        let _ = sys::open_file(Path::new(&drive.file)).and_then(|image| image.sync_data());
    }
}
