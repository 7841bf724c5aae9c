// SPDX-License-Identifier: LGPL-2.1-or-later

//! Checks that the images of a guest can be opened again by their names.
//!
//! A revert opens the snapshot's images by their names. An image may have lost its name: it was
//! removed, or is a temporary one, as those of QEMU's `snapshot=on` are. Or the name leads to
//! another file by now. Such an image is lost when QEMU ends.

use std::collections::BTreeSet;
use std::fs::Metadata;
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::{Result, fail};
use crate::model::DiskPlan;
use crate::monitor::json;

/// Refuses disks with images that QEMU, the process `pid`, does not have open under their names.
pub fn check_named(pid: Option<u32>, disks: &[DiskPlan]) -> Result<()> {
    let open = pid.and_then(open_files);
    for disk in disks {
        let images = std::iter::once(&disk.drive.file).chain(&disk.drive.backing);
        for file in images.flat_map(|image| files(image)) {
            check_file(pid, open.as_ref(), disk.drive.name(), &file)?;
        }
    }
    Ok(())
}

/// The files of an image, which QEMU names by its path, or by all its options (`json:`).
pub fn files(image: &str) -> Vec<String> {
    let Some(options) = image.strip_prefix("json:") else {
        return Some(image.to_owned()).filter(|file| file.starts_with('/')).into_iter().collect();
    };
    let Ok(opened) = json::parse(options.as_bytes()) else { return Vec::new() };
    let mut files = Vec::new();
    // Without recursion: a chain can be long.
    let mut pending: Vec<&Value> = vec![&opened];
    while let Some(options) = pending.pop() {
        let text = |name: &str| options[name].as_str().unwrap_or_default();
        let file = text("filename");
        if matches!(text("driver"), "file" | "host_device") && file.starts_with('/') {
            files.push(file.to_owned());
        }
        pending.extend(options.as_object().into_iter().flat_map(|options| options.values()));
    }
    files
}

fn check_file(
    pid: Option<u32>,
    open: Option<&BTreeSet<FileId>>,
    disk: &str,
    image: &str,
) -> Result<()> {
    if image.starts_with("/dev/fdset/") {
        fail!(
            ConfigUnsupported,
            "the image of disk '{disk}' was opened as a file descriptor ('{image}'), which no \
             overlay can refer to: start QEMU with its path, or leave the disk out (snapshot='no')"
        );
    }
    // A QEMU in a mount namespace of its own sees other files by these names.
    let root = pid.map(|pid| PathBuf::from(format!("/proc/{pid}/root{image}")));
    let results =
        [Some(PathBuf::from(image)), root].into_iter().flatten().map(|path| path.metadata());
    let (found, missing): (Vec<_>, Vec<_>) = results.partition(|metadata| metadata.is_ok());
    let found: Vec<Metadata> = found.into_iter().flatten().collect();
    // The image counts as gone only if the place was inspected: QEMU's own view of the files, or a
    // directory that exists here.
    let inspected = pid
        .is_some_and(|pid| Path::new(&format!("/proc/{pid}/root")).metadata().is_ok())
        || Path::new(image).parent().is_some_and(Path::is_dir);
    let gone = inspected
        && missing
            .into_iter()
            .filter_map(|metadata| metadata.err())
            .all(|error| error.kind() == ErrorKind::NotFound);
    let why = match open {
        _ if found.is_empty() && gone => {
            "does not exist any more under this name (it was removed, or is a temporary one)"
        }
        Some(open) if !found.is_empty() && !found.iter().any(|file| open.contains(&id(file))) => {
            "is not the file of this name any more (the file was replaced)"
        }
        _ => return Ok(()),
    };
    fail!(
        ConfigUnsupported,
        "the image '{image}', which disk '{disk}' of the guest is on, {why}: a snapshot of it \
         could not be reverted to. Leave the disk out (snapshot='no'), or copy it to a new image \
         first (virsh blockcopy, blockdev-mirror)"
    );
}

/// Identifies a file, or the device of a device node.
type FileId = (u64, u64);

fn id(file: &Metadata) -> FileId {
    let kind = file.file_type();
    // No file system has this number.
    if kind.is_block_device() || kind.is_char_device() {
        (u64::MAX, file.rdev())
    } else {
        (file.dev(), file.ino())
    }
}

/// The files that a process has open; `None` where they cannot be seen.
fn open_files(pid: u32) -> Option<BTreeSet<FileId>> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
    let files: BTreeSet<_> =
        entries.filter_map(|entry| Some(id(&entry.ok()?.path().metadata().ok()?))).collect();
    (!files.is_empty()).then_some(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_gone_only_where_its_place_was_looked_at() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("image");
        let image = image.to_str().unwrap();
        let elsewhere = directory.path().join("nowhere/image");
        let elsewhere = elsewhere.to_str().unwrap();
        let check = |pid, image| check_file(pid, None, "vda", image);
        let gone = |result: Result<()>| {
            assert!(result.unwrap_err().message.contains("does not exist any more"))
        };
        gone(check(None, image));
        // A directory that exists only for QEMU, in a container or on another host.
        check(None, elsewhere).unwrap();
        // No process has this number.
        check(Some(u32::MAX), elsewhere).unwrap();
        // The same for an image that QEMU itself would see.
        gone(check(Some(std::process::id()), elsewhere));
        std::fs::write(image, "").unwrap();
        check(None, image).unwrap();
        check(Some(std::process::id()), image).unwrap();
    }
}
