// SPDX-License-Identifier: LGPL-2.1-or-later

//! The second step of a revert: loads the snapshot's memory into a QEMU that waits for it.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::{lazy, map, mapped_load};
use crate::backend::{Connector, DEFAULT_TIMEOUT, Guest, Liveness};
use crate::deadline::Deadline;
use crate::engine::options::SparseReader;
use crate::error::{Result, fail};
use crate::image::{self, Image, RestoreStream, Zeros};
use crate::migration::{FD_NAME, Mode, Settings, reactivate_disks, start_incoming, wait_loaded};
use crate::model::flags::RevertFlags;
use crate::model::{Drive, Memory, Record, RecordedDisk, Role};
use crate::monitor::{Command, commands};
use crate::sys::{self, now};

/// How a snapshot is loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadOptions {
    /// How the memory comes.
    pub memory: Memory,
    /// Where memory follows: the bytes in a second of pages that the guest has not asked for.
    /// `None`: as many as can be.
    pub bandwidth: Option<u64>,
}

impl From<Memory> for LoadOptions {
    fn from(memory: Memory) -> LoadOptions {
        LoadOptions { memory, bandwidth: None }
    }
}

/// What a load did, and how long that took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// How the memory came: never [`Memory::Auto`].
    pub memory: Memory,
    /// Whether the guest runs.
    pub running: bool,
    /// The time of the checks, before QEMU begins to load.
    pub check: Duration,
    /// The time until QEMU has loaded the snapshot.
    pub load: Duration,
    /// The time until the guest runs, where it does, and the snapshot is recorded as current.
    pub finish: Duration,
}

/// How the memory comes.
enum Way {
    /// All of it is written to QEMU.
    Full,
    /// The guest runs, and its memory follows.
    Lazy,
    /// QEMU has mapped the blocks with these numbers, and the others are written to it.
    Map(Vec<usize>),
}

/// Decides how the memory comes. The caller's choice is refused if it is not possible: only
/// [`Memory::Auto`] leaves it to the library.
fn choose(guest: &mut dyn Guest, image: &Image, record: &Record, memory: Memory) -> Result<Way> {
    match memory {
        Memory::Auto if map::is_mapped(guest, record)? => choose(guest, image, record, Memory::Map),
        Memory::Auto => Ok(Way::Full),
        Memory::Full => map::check_not_mapped(guest, record, memory).map(|()| Way::Full),
        Memory::Lazy => {
            map::check_not_mapped(guest, record, memory)?;
            lazy::check(guest, record, image).map(|()| Way::Lazy)
        }
        Memory::Map => map::check(guest, image, record).map(Way::Map),
    }
}

impl Way {
    fn memory(&self) -> Memory {
        match self {
            Way::Full => Memory::Full,
            Way::Lazy => Memory::Lazy,
            Way::Map(_) => Memory::Map,
        }
    }
}

/// Loads a snapshot's memory into the guest's QEMU.
pub fn load(
    connector: &dyn Connector,
    name: &str,
    flags: RevertFlags,
    options: LoadOptions,
    reader: SparseReader,
) -> Result<Loaded> {
    let begun = now();
    let LoadOptions { memory, bandwidth } = options;
    if bandwidth.is_some() && memory != Memory::Lazy {
        fail!(
            InvalidArg,
            "a bandwidth is for memory 'lazy', and not for '{}': all other memory comes at once",
            memory.name()
        );
    }
    check_flags(flags)?;
    let Some(store) = connector.store() else {
        fail!(
            OperationUnsupported,
            "a snapshot that libvirt has recorded cannot be loaded: revert to it by \
             qemuSnapshotRevert()"
        );
    };
    let record = store.read_to_use(name)?;
    let image = Image::open(Path::new(&record.memory_file))?;
    let running = flags.runs().unwrap_or(image.was_running);
    let mut guest = connector.begin()?;
    let guest = &mut *guest;
    let status = guest.status()?.status;
    if status != "inmigrate" {
        fail!(
            OperationInvalid,
            "QEMU does not wait for a snapshot (its state is '{status}'): start it with `-incoming \
             defer`, with the images that instantsnap_snapshot_prepare_revert() names"
        );
    }
    // An earlier load of this QEMU may have been killed before QEMU began.
    Settings::recover(guest)?;
    check_machine(guest, &image)?;
    check_disks(&record, &guest.drives()?)?;
    check_frozen(&record, flags)?;
    let way = choose(guest, &image, &record, memory)?;
    let memory = way.memory();
    if memory == Memory::Map {
        map::take_lease(store, guest, &image, name)?;
    }
    let checked = now();

    match way {
        Way::Full => load_all(guest, image, reader)?,
        Way::Lazy => lazy::load(guest, &record, &image, running, bandwidth)?,
        Way::Map(blocks) => {
            let zeros = zeros_to_write(guest);
            let settings = Settings::query(guest)?;
            load_stream(guest, image, zeros, blocks, &settings)?;
        }
    }
    let loaded = now();

    let deadline = Deadline::after(DEFAULT_TIMEOUT);
    match (running, guest.status()?.running) {
        (true, false) => commands::cont(guest, deadline)?,
        (false, true) => guest.pause(deadline)?,
        _ => {}
    }
    if !running {
        reactivate_disks(guest)?;
    }
    store.set_current(name)?;
    Ok(Loaded {
        memory,
        running,
        check: checked.saturating_sub(begun),
        load: loaded.saturating_sub(checked),
        finish: now().saturating_sub(loaded),
    })
}

/// Loads all of the memory: QEMU reads the image itself, or gets a stream of it.
fn load_all(guest: &mut dyn Guest, image: Image, reader: SparseReader) -> Result<()> {
    let zeros = zeros_to_write(guest);
    let settings = Settings::query(guest)?;
    if mapped_load::load(guest, &image, zeros, &settings, reader)? {
        return Ok(());
    }
    load_stream(guest, image, zeros, Vec::new(), &settings)
}

/// Refuses flags that are not implemented.
pub fn check_flags(flags: RevertFlags) -> Result<()> {
    if flags.resets_nvram() {
        fail!(
            OperationUnsupported,
            "flag 'VIR_DOMAIN_SNAPSHOT_REVERT_RESET_NVRAM' is not supported for this guest yet"
        );
    }
    Ok(())
}

/// Refuses images that were written or replaced since the snapshot, unless the flags force it.
pub fn check_frozen(record: &Record, flags: RevertFlags) -> Result<()> {
    if flags.is_forced() {
        return Ok(());
    }
    let frozen = |disk: &RecordedDisk| {
        disk.frozen.iter().try_for_each(|frozen| frozen.check(&disk.name, &record.name))
    };
    record.disks.iter().try_for_each(frozen)
}

/// Refuses memory of another machine type: a QEMU before 9.1 ends when it loads that.
fn check_machine(guest: &mut dyn Guest, image: &Image) -> Result<()> {
    let Some(noted) = &image.machine else { return Ok(()) };
    let command = Command::new("qom-get", json!({ "path": "/machine", "property": "type" }));
    let kind =
        guest.run("cannot ask for the machine type", command, Deadline::after(DEFAULT_TIMEOUT))?;
    let kind = kind.as_str().unwrap_or_default();
    let machine = kind.strip_suffix("-machine").unwrap_or(kind);
    if !machine.is_empty() && machine != noted {
        fail!(
            ConfigUnsupported,
            "the snapshot is of a machine of type '{noted}', and this QEMU has the type \
             '{machine}': start it with `-machine {noted}`"
        );
    }
    Ok(())
}

/// Refuses disks that do not fit to the snapshot's memory, which would corrupt the guest; and disks
/// that are the snapshot's own images, because the guest would overwrite the snapshot.
fn check_disks(record: &Record, drives: &[Drive]) -> Result<()> {
    let same = |a: &str, b: &str| sys::same_file(Path::new(a), Path::new(b));
    let drives: Vec<Drive> =
        drives.iter().filter(|drive| drive.role != Role::Empty).cloned().collect();
    for drive in &drives {
        let kept = record
            .disks
            .iter()
            .map(|disk| &disk.image)
            .chain(record.nvram.iter().map(|nvram| &nvram.copy));
        if let Some(image) =
            kept.into_iter().find(|image| drive.role != Role::ReadOnly && same(&drive.file, image))
        {
            fail!(
                ConfigUnsupported,
                "disk '{}' would write to '{image}', which is the snapshot's own: use the image \
                 that instantsnap_snapshot_prepare_revert() names",
                drive.name()
            );
        }
    }
    let named =
        |name: &str| drives.iter().find(|drive| drive.names.iter().any(|known| known == name));
    for disk in &record.disks {
        let on_image =
            |drive: &Drive| drive.backing.first().is_some_and(|backing| same(backing, &disk.image));
        // If a drive has this name, it must be on the image; otherwise any drive may be.
        let found = named(&disk.name).map_or_else(|| drives.iter().any(on_image), on_image);
        if !found {
            fail!(
                ConfigUnsupported,
                "this QEMU has no disk '{}' on an overlay of '{}': start it with the images that \
                 instantsnap_snapshot_prepare_revert() names",
                disk.name,
                disk.image
            );
        }
    }
    for disk in &record.manual {
        // Its content cannot be checked: only the storage hook knows it, and the device can be the
        // original one, which the storage has reverted.
        if named(&disk.name).is_none() && drives.len() < record.disks.len() + record.manual.len() {
            fail!(
                ConfigUnsupported,
                "this QEMU has no disk '{}': start it with the images that \
                 instantsnap_snapshot_prepare_revert_hooked() names",
                disk.name
            );
        }
    }
    for nvram in &record.nvram {
        let firmware: Vec<_> = drives.iter().filter(|drive| drive.role == Role::Firmware).collect();
        if let Some(drive) = firmware.iter().find(|drive| same(&drive.file, &nvram.original)) {
            fail!(
                ConfigUnsupported,
                "'{}' has the UEFI variables of the original guest ('{}'), which loading would \
                 overwrite: use the copy that instantsnap_snapshot_prepare_revert() names",
                drive.name(),
                nvram.original
            );
        }
        if firmware.is_empty() {
            fail!(
                ConfigUnsupported,
                "this QEMU has no pflash for the UEFI variables '{}' of the snapshot",
                nvram.name
            );
        }
    }
    Ok(())
}

/// Loads an image by a stream of it, which every QEMU loads, without the pages of the blocks that
/// QEMU has mapped.
fn load_stream(
    guest: &mut dyn Guest,
    image: Image,
    zeros: Zeros,
    mapped: Vec<usize>,
    settings: &Settings,
) -> Result<()> {
    let begun = settings.apply(guest, Mode::Paused).and_then(|()| begin(guest));
    let write = begun.map_err(|error| {
        // Unless QEMU has ended, it still waits, so that the caller can try again.
        let restored = match guest.liveness() {
            Liveness::Alive => settings.restore(guest, Mode::Paused),
            Liveness::Exited | Liveness::Unresponsive => Ok(()),
        };
        restored.err().into_iter().fold(error, |error, left| error.and(left.message))
    })?;
    // The settings are not restored in a QEMU that could not load, because it is of no more use.
    write_stream(guest, image, zeros, mapped, write)
        .and_then(|()| settings.restore(guest, Mode::Paused))
}

/// Makes QEMU load from a pipe. Returns the pipe's write end.
fn begin(guest: &mut dyn Guest) -> Result<OwnedFd> {
    let (read, write) = image::pipe()?;
    commands::getfd(guest, FD_NAME, read.as_fd(), Deadline::after(DEFAULT_TIMEOUT))?;
    start_incoming(guest, &format!("fd:{FD_NAME}")).inspect_err(|_| {
        // QEMU has not taken the pipe, and would keep it.
        let _ = commands::closefd(guest, FD_NAME, Deadline::after(DEFAULT_TIMEOUT));
    })?;
    Ok(write)
}

/// Writes the image's stream to QEMU, without the pages of the blocks that QEMU has mapped.
fn write_stream(
    guest: &mut dyn Guest,
    image: Image,
    zeros: Zeros,
    mapped: Vec<usize>,
    write: OwnedFd,
) -> Result<()> {
    let stream = RestoreStream::start(image, zeros, mapped, write)?;
    wait_loaded(guest)?;
    // QEMU closes its end when it has all that it needs, so an error about the rest of the file
    // does not matter.
    let _ = stream.join();
    Ok(())
}

/// The zero pages that QEMU has to be told of. RAM that is a file can have an old content; so where
/// QEMU has such RAM, or does not say that it has none, it is told of all of them.
fn zeros_to_write(guest: &mut dyn Guest) -> Zeros {
    let command = Command::new("qom-list", json!({ "path": "/objects" }));
    let step = "cannot list the objects";
    let Ok(objects) = guest.run(step, command, Deadline::after(DEFAULT_TIMEOUT)) else {
        return Zeros::All;
    };
    let is_known = |object: &Value| {
        let kind = object["type"].as_str().unwrap_or_default();
        !kind.contains("memory-backend")
            || matches!(kind, "child<memory-backend-ram>" | "child<memory-backend-memfd>")
    };
    match objects.as_array() {
        Some(objects) if objects.iter().all(is_known) => Zeros::OfSmallBlocks,
        _ => Zeros::All,
    }
}
