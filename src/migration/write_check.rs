// SPDX-License-Identifier: LGPL-2.1-or-later

//! The write check: detects writes to the disks between their switch and the instant.
//!
//! The guest is paused, but nothing keeps another client from resuming it, by a second monitor, or
//! by the daemon or the driver that runs it. What the guest writes before the write tracking is
//! armed, or before a non-live migration has ended, would be in its memory and on an overlay, and
//! not in the images of the snapshot. A guest that was resumed and paused again, and wrote nothing,
//! is as good as one that stood still. One that ran at the instant is recognized by its stream
//! ([`MemoryImage::state_at_instant`](crate::image::MemoryImage::state_at_instant)).

use std::fs;

use serde_json::json;

use super::settings::Mode;
use crate::backend::{Guest, is_block_of};
use crate::deadline::Deadline;
use crate::error::{Result, fail};
use crate::model::DiskPlan;
use crate::monitor::Command;

/// The lengths of the overlays before the pause, when they are empty.
#[derive(Debug)]
pub struct WriteCheck<'a> {
    disks: Vec<(&'a DiskPlan, Option<u64>)>,
}

impl WriteCheck<'_> {
    /// Reads the lengths. At the end of a non-live migration QEMU closes its images, which can make
    /// their files longer: in that mode the check asks QEMU instead.
    pub fn new(disks: &[DiskPlan], mode: Mode) -> WriteCheck<'_> {
        let length = |disk| if mode == Mode::Background { length(disk) } else { None };
        WriteCheck { disks: disks.iter().map(|disk| (disk, length(disk))).collect() }
    }

    /// Returns an error if anything was written to an overlay.
    pub fn check(&self, guest: &mut dyn Guest, deadline: Deadline) -> Result<()> {
        let (by_length, by_query): (Vec<_>, Vec<_>) =
            self.disks.iter().partition(|(_, length)| length.is_some());
        let mut by_length = by_length.into_iter();
        if let Some((disk, _)) = by_length.find(|(disk, before)| length(disk) != *before) {
            return written(disk);
        }
        if by_query.is_empty() {
            return Ok(());
        }
        let step = "cannot ask whether the guest has written to its disks";
        let reply = guest.run(step, Command::new("query-blockstats", json!({})), deadline)?;
        for (disk, _) in by_query {
            let mut devices = reply.as_array().into_iter().flatten();
            let Some(device) = devices.find(|device| is_block_of(device, &disk.drive)) else {
                fail!(
                    OperationFailed,
                    "disk '{}' was removed in the pause of its snapshot",
                    disk.drive.name()
                );
            };
            // QEMU counts from when it opened the overlay.
            if device["stats"]["wr_highest_offset"] != 0 {
                return written(disk);
            }
        }
        Ok(())
    }
}

/// The length of an overlay's file; none where we did not make it, or it is no file. The first
/// write to an empty qcow2 image makes its file longer. QEMU need not be asked for the length, so
/// it adds nothing to the pause.
fn length(disk: &DiskPlan) -> Option<u64> {
    if disk.reuse {
        return None;
    }
    fs::metadata(&disk.overlay).ok().filter(fs::Metadata::is_file).map(|file| file.len())
}

fn written(disk: &DiskPlan) -> Result<()> {
    fail!(
        OperationFailed,
        "disk '{}' was written to in the pause of its snapshot: another client has resumed the \
         guest, or changed the disk's images: take the snapshot again",
        disk.drive.name()
    );
}
