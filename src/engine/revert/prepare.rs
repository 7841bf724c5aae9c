// SPDX-License-Identifier: LGPL-2.1-or-later

//! The first step of a revert: makes fresh images on top of the snapshot's, for a new QEMU.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use tempfile::{NamedTempFile, TempPath};

use super::lazy;
use super::memory::{MemoryBackend, mappings};
use crate::backend::{overlay_file, revert_file};
use crate::engine::nvram::copy;
use crate::engine::recover;
use crate::engine::storage::{StorageCall, StorageHook};
use crate::error::{Error, Result, fail};
use crate::image::Image;
use crate::model::nvram::Found;
use crate::model::{ManualDisk, Memory, Record, RecordedNvram, Store};
use crate::sys;

/// The files that a QEMU must be started with to continue a snapshot.
#[derive(Clone, Debug)]
pub struct RevertPlan {
    /// The disks, and the UEFI variables.
    pub disks: Vec<RevertDisk>,
    /// The memory backends, if QEMU is to map the memory image.
    pub memory_backends: Vec<MemoryBackend>,
    /// The memory image.
    pub memory_file: String,
    /// The `<domain>` of the snapshot.
    pub domain_xml: String,
    /// The images that were made here, without those of a storage hook.
    fresh: Vec<PathBuf>,
}

/// One disk of a [`RevertPlan`].
#[derive(Clone, Debug)]
pub struct RevertDisk {
    /// The disk's name in the snapshot.
    pub name: String,
    /// The fresh image, or the one that the storage hook names.
    pub file: PathBuf,
    /// The format of `file`.
    pub format: String,
    /// The snapshot's image below `file`. None for UEFI variables, and for the disks of a storage
    /// hook.
    pub backing_file: Option<String>,
}

impl RevertPlan {
    /// Removes the fresh images. They must be unused.
    pub fn discard(&self) {
        for image in &self.fresh {
            let _ = sys::remove_file(image);
        }
    }
}

/// How a revert is prepared.
#[derive(Clone, Copy, Default)]
pub struct RevertOptions<'a> {
    /// Where the fresh images are made; `None`: beside the snapshot's images.
    pub directory: Option<&'a Path>,
    /// The hook that names the images of its disks.
    pub hook: Option<&'a dyn StorageHook>,
    /// How QEMU is to get the memory.
    pub memory: Memory,
}

/// Makes the fresh images: all of them, or none if there is an error.
pub fn prepare_revert(
    state_dir: &Path,
    name: &str,
    directory: Option<&Path>,
) -> Result<RevertPlan> {
    prepare_revert_with(state_dir, name, RevertOptions { directory, ..RevertOptions::default() })
}

/// Like [`prepare_revert`], with options.
pub fn prepare_revert_with(
    state_dir: &Path,
    name: &str,
    options: RevertOptions,
) -> Result<RevertPlan> {
    let RevertOptions { directory, hook, memory } = options;
    let store = Store::open(state_dir)?;
    recover::before_revert(&store, name)?;
    let record = store.read_to_use(name)?;
    let image = Image::open(Path::new(&record.memory_file))?;
    let memory_backends = match memory {
        Memory::Auto | Memory::Full => Vec::new(),
        Memory::Lazy => lazy::check_image(&record, &image).map(|()| Vec::new())?,
        Memory::Map => memory_backends(&image, &record)?,
    };
    if let (Some(disk), None) = (record.manual.first(), hook) {
        fail!(
            OperationUnsupported,
            "disk '{}' of snapshot '{name}' was left to a storage hook (snapshot='manual'), which \
             must name the image that the disk had at the instant: use \
             instantsnap_snapshot_prepare_revert_hooked()",
            disk.name
        );
    }
    let directory = match directory {
        Some(directory) => Some(directory.canonicalize().map_err(|error| {
            Error::system(format!("cannot open the directory '{}'", directory.display()), error)
        })?),
        None => None,
    };
    let mut disks = Vec::new();
    // Temporary files: they are removed when this list is dropped before they are kept.
    let mut fresh = Vec::new();
    for disk in &record.disks {
        check_image(&disk.image, directory.as_deref())?;
        let file = fresh_file(&record, &disk.image, directory.as_deref())?;
        overlay_file::create_on(file.as_file(), &disk.image, &disk.format)?;
        sync_fresh(&file)?;
        let path = file.into_temp_path();
        disks.push(RevertDisk {
            name: disk.name.clone(),
            file: path.to_path_buf(),
            format: "qcow2".into(),
            backing_file: Some(disk.image.clone()),
        });
        fresh.push(path);
    }
    for nvram in &record.nvram {
        check_image(&nvram.copy, directory.as_deref())?;
        check_copy(nvram, &record)?;
        let file = fresh_file(&record, &nvram.copy, directory.as_deref())?;
        copy(Path::new(&nvram.copy), file.as_file()).map_err(|error| {
            let step = format!(
                "cannot copy the UEFI variables '{}' to '{}'",
                nvram.copy,
                file.path().display()
            );
            Error::system(step, error)
        })?;
        sync_fresh(&file)?;
        let path = file.into_temp_path();
        disks.push(RevertDisk {
            name: nvram.name.clone(),
            file: path.to_path_buf(),
            format: nvram.format.clone(),
            backing_file: None,
        });
        fresh.push(path);
    }
    if let Some(hook) = hook.filter(|_| !record.manual.is_empty()) {
        // The hook is asked last: no later step can fail and leave its images unused.
        disks.extend(ask_hook(hook, &record)?);
    }
    let keep = |path: TempPath| {
        path.keep().map_err(|error| Error::system("cannot keep a fresh image", error.error))
    };
    let fresh = fresh.into_iter().map(keep).collect::<Result<_>>()?;
    Ok(RevertPlan {
        disks,
        memory_backends,
        memory_file: record.memory_file,
        domain_xml: record.domain_xml,
        fresh,
    })
}

/// The memory backends of a QEMU that maps the image.
fn memory_backends(image: &Image, record: &Record) -> Result<Vec<MemoryBackend>> {
    let file = &record.memory_file;
    let blocks = mappings(image, file)?;
    Ok(blocks.into_iter().map(|block| MemoryBackend::new(block, Path::new(file))).collect())
}

fn ask_hook(hook: &dyn StorageHook, record: &Record) -> Result<Vec<RevertDisk>> {
    let call = StorageCall::of(record);
    let files = match hook.revert(&call) {
        Ok(files) if files.len() == call.disks.len() => files,
        Ok(files) => fail!(
            OperationFailed,
            "the storage hook has named {} images, not {}, {}",
            files.len(),
            call.disks.len(),
            call.subject()
        ),
        Err(reason) => fail!(
            OperationFailed,
            "the storage hook could not name the image {}: {reason}",
            call.subject()
        ),
    };
    let named = |(disk, file): (ManualDisk, PathBuf)| RevertDisk {
        name: disk.name,
        file,
        format: disk.format,
        backing_file: None,
    };
    Ok(call.disks.into_iter().zip(files).map(named).collect())
}

fn check_image(image: &str, directory: Option<&Path>) -> Result<()> {
    let path = Path::new(image);
    if path.is_absolute() && !path.exists() {
        fail!(InvalidDomainSnapshot, "the snapshot's image '{image}' is missing");
    }
    let kind = path.metadata().map(|metadata| metadata.file_type());
    if kind.is_ok_and(|kind| !kind.is_file() && !kind.is_block_device()) {
        fail!(
            InvalidDomainSnapshot,
            "the snapshot's image '{image}' is neither a file nor a block device"
        );
    }
    // The fresh image goes beside the snapshot's. Beside a block device that would be /dev, which
    // is in memory, and an image that is no file has no directory.
    if directory.is_none() && !path.is_file() {
        fail!(
            ConfigUnsupported,
            "the snapshot's image '{image}' is not a regular file: name the directory where the \
             fresh images are to be made"
        );
    }
    Ok(())
}

/// Refuses a copy of the UEFI variables that is not the snapshot's: the memory would not fit to it,
/// and an edited record can name a file of another guest.
fn check_copy(nvram: &RecordedNvram, record: &Record) -> Result<()> {
    let found = nvram.compare(&record.memory_file).map_err(|error| {
        Error::system(format!("cannot read the UEFI variables '{}'", nvram.copy), error)
    })?;
    if found != Found::Whole {
        fail!(
            InvalidDomainSnapshot,
            "the copy of the UEFI variables '{}' is not the one that was made with the snapshot",
            nvram.copy
        );
    }
    Ok(())
}

/// Syncs a fresh image and its directory. The guest's data will be in the image, so a crash of the
/// host must lose neither its name nor the header that makes it an overlay.
fn sync_fresh(file: &NamedTempFile) -> Result<()> {
    let synced = file.as_file().sync_all().and_then(|()| sys::sync_parent(file.path()));
    synced.map_err(|error| {
        Error::system(format!("cannot write the fresh image '{}'", file.path().display()), error)
    })
}

/// Creates a new file beside the image or in the directory, with a name made of the image's and the
/// snapshot's.
fn fresh_file(record: &Record, image: &str, directory: Option<&Path>) -> Result<NamedTempFile> {
    let image = Path::new(image);
    let parent = directory.or(image.parent()).unwrap_or(Path::new("/"));
    let file = revert_file::create_in(parent, image, &record.name).map_err(|error| {
        Error::system(format!("cannot create a fresh image in '{}'", parent.display()), error)
    })?;
    sys::copy_owner_and_mode(file.as_file(), image).map_err(|error| {
        Error::system(format!("cannot set the owner of '{}'", file.path().display()), error)
    })?;
    Ok(file)
}
