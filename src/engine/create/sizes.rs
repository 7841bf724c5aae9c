// SPDX-License-Identifier: LGPL-2.1-or-later

//! Checks that no disk is resized between the plan and the instant.
//!
//! An overlay is made with the size that its disk has in the plan. If another client resizes the
//! disk after that, the switch would revert the resize, while the guest knows the new size. If it
//! does so between switch and instant, the memory would know of a larger disk than the snapshot's
//! image is. Nothing keeps another client from it, so the sizes are compared right before the
//! switch, right after it, and once the instant has passed.
//!
//! An image's size is read from the image's file or block device, if that agreed with QEMU at the
//! time of the plan: it takes microseconds, and no command. QEMU is asked for the sizes of the
//! others: other formats, and files that this process may not read. Before the switch QEMU is asked
//! while the guest still runs. A later resize is found by the one query that must be made in the
//! pause, after the switch: the guest must not run on an overlay of another size.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;

use serde_json::{Value, json};

use crate::backend::{DEFAULT_TIMEOUT, Guest, is_block_of};
use crate::deadline::Deadline;
use crate::error::{Result, fail};
use crate::model::DiskPlan;
use crate::monitor::Command;
use crate::monitor::json::Json;
use crate::sys;

/// The sizes of a snapshot's disks.
#[derive(Debug)]
pub struct Sizes<'a> {
    disks: Vec<Files<'a>>,
}

/// The files of a disk's image and of its overlay; none for one whose file does not tell its size.
#[derive(Debug)]
struct Files<'a> {
    disk: &'a DiskPlan,
    image: Option<File>,
    overlay: Option<File>,
}

/// An image in a disk's chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layer {
    /// The image that the guest's device uses.
    Top,
    /// The image below that.
    Below,
}

impl Sizes<'_> {
    /// Opens the files of disks whose overlays have been made.
    pub fn open(disks: &[DiskPlan]) -> Sizes<'_> {
        let open = |path: &str, format: &str, size: u64| {
            let file = sys::open_file(Path::new(path)).ok()?;
            (size_in(&file, format) == Some(size)).then_some(file)
        };
        let files = |disk| {
            let DiskPlan { drive, overlay, .. }: &DiskPlan = disk;
            let image = open(&drive.file, &drive.format, drive.size);
            Files { disk, image, overlay: open(overlay, "qcow2", drive.size) }
        };
        Sizes { disks: disks.iter().map(files).collect() }
    }

    /// Before the pause: checks the disks whose files do not tell their sizes.
    pub fn ask_planned(&self, guest: &mut dyn Guest) -> Result<()> {
        let deadline = Deadline::after(DEFAULT_TIMEOUT);
        self.check_top(guest, deadline, |image| image.is_none())
    }

    /// Right before the switch: checks the other disks, by their files.
    pub fn check_planned(&self, guest: &mut dyn Guest, deadline: Deadline) -> Result<()> {
        self.check_top(guest, deadline, |image| image.is_some())
    }

    fn check_top(
        &self,
        guest: &mut dyn Guest,
        deadline: Deadline,
        which: impl Fn(&Option<File>) -> bool,
    ) -> Result<()> {
        let mut qemu = Blocks::default();
        for Files { disk, image, .. } in self.disks.iter().filter(|files| which(&files.image)) {
            let now = qemu.size(
                guest,
                disk,
                image.as_ref().zip(Some(&*disk.drive.format)),
                Layer::Top,
                deadline,
            )?;
            check(disk, now)?;
        }
        Ok(())
    }

    /// Right after the switch: checks that the images below the overlays still have the planned
    /// sizes. If one was resized, its overlay is resized too, so that the guest keeps that size.
    pub fn check_switched(&self, guest: &mut dyn Guest, deadline: Deadline) -> Result<()> {
        let mut qemu = Blocks::default();
        let mut changed = Ok(());
        for Files { disk, image, .. } in &self.disks {
            let now = qemu.size(
                guest,
                disk,
                image.as_ref().zip(Some(&*disk.drive.format)),
                Layer::Below,
                deadline,
            )?;
            let Err(error) = check(disk, now) else { continue };
            let put_back = guest.resize_overlay(disk, now, deadline);
            changed = changed.and(Err(match put_back {
                Ok(()) => error,
                Err(failed) => error.and(failed.message),
            }));
        }
        changed
    }

    /// After the instant: checks that the overlays had the planned sizes when memory was captured.
    pub fn check_captured(&self, guest: &mut dyn Guest) -> Result<()> {
        let deadline = Deadline::after(DEFAULT_TIMEOUT);
        let mut qemu = Blocks::default();
        for Files { disk, overlay, .. } in &self.disks {
            let now =
                qemu.size(guest, disk, overlay.as_ref().zip(Some("qcow2")), Layer::Top, deadline)?;
            check(disk, now)?;
        }
        Ok(())
    }
}

/// QEMU's reply to `query-block`, once it was asked.
#[derive(Default)]
struct Blocks(Option<Json>);

impl Blocks {
    /// The size of a disk's image: by its file if that still has the planned size, or else by QEMU.
    /// A file can be made longer, and a device larger, before QEMU is told of it.
    fn size(
        &mut self,
        guest: &mut dyn Guest,
        disk: &DiskPlan,
        file: Option<(&File, &str)>,
        layer: Layer,
        deadline: Deadline,
    ) -> Result<u64> {
        let planned = disk.drive.size;
        if file.is_some_and(|(file, format)| size_in(file, format) == Some(planned)) {
            return Ok(planned);
        }
        if self.0.is_none() {
            let step = "cannot ask for the sizes of the guest's disks";
            self.0 = Some(guest.run(step, Command::new("query-block", json!({})), deadline)?);
        }
        let mut blocks = self.0.iter().flat_map(|blocks| blocks.as_array().into_iter().flatten());
        let is_of_disk = |block: &&Value| {
            let inserted = &block["inserted"];
            let file = inserted["file"].as_str().unwrap_or_default();
            is_block_of(block, &disk.drive)
                || inserted["node-name"] == *disk.drive.node
                || [&disk.drive.file, &disk.overlay].iter().any(|known| *known == file)
        };
        let image = blocks.find(is_of_disk).map(|block| &block["inserted"]["image"]);
        let image =
            image.map(|image| if layer == Layer::Below { &image["backing-image"] } else { image });
        match image.and_then(|image| image["virtual-size"].as_u64()) {
            Some(size) => Ok(size),
            None => fail!(
                OperationFailed,
                "QEMU does not report the size of disk '{}' any more: another client has detached \
                 it, or changed its images",
                disk.drive.name()
            ),
        }
    }
}

fn check(disk: &DiskPlan, now: u64) -> Result<()> {
    let planned = disk.drive.size;
    if now != planned {
        fail!(
            OperationFailed,
            "another client has resized disk '{}' while its snapshot was being taken ({planned} \
             bytes before, {now} now): take the snapshot again",
            disk.drive.name()
        );
    }
    Ok(())
}

/// The size that the guest sees of an image, in bytes; `None` where the file does not tell it.
fn size_in(file: &File, format: &str) -> Option<u64> {
    match format {
        "raw" => {
            let metadata = file.metadata().ok()?;
            match metadata.file_type() {
                kind if kind.is_file() => Some(metadata.len()),
                // `stat` does not tell it.
                kind if kind.is_block_device() => (&*file).seek(SeekFrom::End(0)).ok(),
                _ => None,
            }
        }
        "qcow2" => {
            const SIZE: std::ops::Range<usize> = 24..32;
            let mut header = [0; SIZE.end];
            file.read_exact_at(&mut header, 0).ok()?;
            let size = header[SIZE].try_into().map(u64::from_be_bytes).ok()?;
            header.starts_with(b"QFI\xfb").then_some(size)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The size of a block device, which the kernel tells in sectors of 512 bytes.
    fn known_size(device: &Path) -> Option<u64> {
        let sectors = std::fs::read_to_string(device.join("size")).ok()?;
        sectors.trim().parse::<u64>().ok().map(|sectors| sectors * 512)
    }

    #[test]
    fn the_size_of_a_block_device_is_read_from_the_device() {
        let devices = std::fs::read_dir("/sys/class/block").unwrap().flatten();
        let opened = devices.filter_map(|entry| {
            let file = sys::open_file(&Path::new("/dev").join(entry.file_name())).ok()?;
            known_size(&entry.path()).filter(|size| *size > 0).map(|size| (file, size))
        });
        let mut found = 0;
        for (file, size) in opened {
            assert_eq!(size_in(&file, "raw"), Some(size));
            found += 1;
        }
        if found == 0 {
            eprintln!("skipped: no block device can be opened here");
        }
    }
}
