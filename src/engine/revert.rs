//! Bringing a snapshot back, first step: fresh images on top of the snapshot's, for a new QEMU.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempPath;

use super::nvram::copy_new;
use crate::error::{Code, Error, Result, fail};
use crate::image::Image;
use crate::snapshot::{Record, Store};
use crate::sys;

/// What a QEMU that is to continue a snapshot must be started with.
#[derive(Clone, Debug)]
pub struct RevertPlan {
    /// Its disks, and UEFI variables.
    pub disks: Vec<RevertDisk>,
    /// The memory image.
    pub memory_file: String,
    /// The `<domain>` of the snapshot.
    pub domain_xml: String,
}

/// One disk of it.
#[derive(Clone, Debug)]
pub struct RevertDisk {
    /// Its name in the snapshot.
    pub name: String,
    /// The fresh image.
    pub file: PathBuf,
    /// Its format.
    pub format: String,
    /// The snapshot's image beneath; UEFI variables have none.
    pub backing_file: Option<String>,
}

/// Makes the fresh images; all, or none.
pub fn prepare_revert(state_dir: &Path, name: &str, directory: Option<&Path>) -> Result<RevertPlan> {
    let record = Store::open(state_dir)?.read(name)?;
    Image::open(Path::new(&record.memory_file))?;
    let directory =
        match directory {
            Some(directory) => Some(directory.canonicalize().map_err(|error| {
                Error::system(format!("cannot open the directory '{}'", directory.display()), error)
            })?),
            None => None,
        };
    let mut disks = Vec::new();
    // Files of temporary names: they go with the list, unless it is kept.
    let mut fresh = Vec::new();
    for disk in &record.disks {
        check_image(&disk.image, directory.as_deref())?;
        let path = fresh_path(&record, &disk.image, directory.as_deref())?;
        create_overlay(&disk.image, &disk.format, &path)?;
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
        let path = fresh_path(&record, &nvram.copy, directory.as_deref())?;
        let copied = std::fs::remove_file(&path).and_then(|()| copy_new(Path::new(&nvram.copy), &path));
        copied.map_err(|error| {
            let step = format!("cannot copy the UEFI variables '{}' to '{}'", nvram.copy, path.display());
            Error::system(step, error)
        })?;
        disks.push(RevertDisk {
            name: nvram.name.clone(),
            file: path.to_path_buf(),
            format: nvram.format.clone(),
            backing_file: None,
        });
        fresh.push(path);
    }
    for path in fresh {
        path.keep().map_err(|error| Error::system("cannot keep a fresh image", error.error))?;
    }
    Ok(RevertPlan { disks, memory_file: record.memory_file, domain_xml: record.domain_xml })
}

fn check_image(image: &str, directory: Option<&Path>) -> Result<()> {
    let path = Path::new(image);
    if path.is_absolute() && !path.exists() {
        fail!(InvalidDomainSnapshot, "the snapshot's image '{image}' is missing");
    }
    // Beside a block device there is /dev, which is memory; beside what is no file at all, nothing.
    if directory.is_none() && !path.is_file() {
        fail!(
            ConfigUnsupported,
            "the snapshot's image '{image}' is not a regular file: name the directory where the fresh images are to be made"
        );
    }
    Ok(())
}

/// A new file that is nobody else's, beside the image or in the directory, called after image and snapshot.
fn fresh_path(record: &Record, image: &str, directory: Option<&Path>) -> Result<TempPath> {
    let image = Path::new(image);
    let parent = directory.or(image.parent()).unwrap_or(Path::new("/"));
    // A name may be as long as NAME_MAX (255) already.
    let stem = image.file_stem().unwrap_or(OsStr::new("disk")).to_string_lossy();
    let stem: String = stem.chars().take(40).collect();
    let name: String = record.name.chars().take(20).collect();
    let file = tempfile::Builder::new().prefix(&format!("{stem}.{name}-")).suffix(".revert").tempfile_in(parent);
    let file =
        file.map_err(|error| Error::system(format!("cannot create a fresh image in '{}'", parent.display()), error))?;
    sys::liken(file.as_file(), image)
        .map_err(|error| Error::system(format!("cannot set the owner of '{}'", file.path().display()), error))?;
    Ok(file.into_temp_path())
}

fn create_overlay(image: &str, format: &str, overlay: &Path) -> Result<()> {
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-F", format, "-b", image]).arg(overlay);
    sys::run_tool(&mut create)
        .map_err(|reason| Error::new(Code::OperationFailed, format!("cannot create an overlay of '{image}': {reason}")))
}
