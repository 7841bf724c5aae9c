// SPDX-License-Identifier: LGPL-2.1-or-later

//! Which drives get which overlay: the caller's disks aligned with the guest's, as libvirt aligns
//! them.

use std::path::Path;

use super::drive::{Drive, Role};
use super::request::{DiskRequest, Location, Request};
use crate::error::{Result, fail};
use crate::sys;

/// A disk that is switched to an overlay.
#[derive(Clone, Debug)]
pub struct DiskPlan {
    /// The drive as it is before the switch.
    pub drive: Drive,
    /// Where its overlay goes.
    pub overlay: String,
    /// The overlay is there already, and the caller's.
    pub reuse: bool,
    /// The caller says that it is a block device.
    pub on_device: bool,
}

/// What a snapshot does with the drives of a guest.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// Switched, in this order.
    pub disks: Vec<DiskPlan>,
    /// Left to the storage hook.
    pub manual: Vec<Drive>,
    /// UEFI variables, copied.
    pub firmware: Vec<Drive>,
}

/// Aligns what is asked for with what is there.
/// `reuse`: overlays that are named exist already.
pub fn plan(drives: Vec<Drive>, request: &Request, snapshot: &str, reuse: bool) -> Result<Plan> {
    let wanted = align(&drives, request)?;
    let images: Vec<_> =
        drives.iter().map(|drive| (drive.name().to_owned(), drive.images())).collect();
    let mut plan = Plan::default();
    for (drive, wish) in drives.into_iter().zip(wanted) {
        match (drive.role, location(&drive, wish)) {
            (Role::Firmware, Location::External | Location::Manual) => fail!(
                ConfigUnsupported,
                "a snapshot of disk '{}' by itself is not supported: it holds UEFI variables, \
                 which are copied with every snapshot anyway",
                drive.name()
            ),
            (Role::Firmware, Location::No) => plan.firmware.push(drive),
            (Role::Empty, Location::External | Location::Manual) => fail!(
                ConfigUnsupported,
                "a snapshot of disk '{}' is not supported while no medium is in it: leave it out \
                 (snapshot='no'), or put one in",
                drive.name()
            ),
            (Role::Empty, Location::No) => {}
            (Role::ReadOnly, Location::External) => {
                fail!(
                    ConfigUnsupported,
                    "external snapshot for readonly disk '{}' is not supported",
                    drive.name()
                )
            }
            (Role::Disk, Location::External) => {
                // The domain XML can wish for what the request cannot have; the request's own words
                // are checked there.
                if wish.and_then(|wish| wish.location).is_none()
                    && drive.snapshot.as_deref() == Some("internal")
                {
                    fail!(
                        OperationUnsupported,
                        "disk '{}' has snapshot='internal' in the domain XML, which is not \
                         supported for this guest: name it in the snapshot XML with \
                         snapshot='external' or 'no'",
                        drive.name()
                    );
                }
                if let Some(unsupported_reason) = &drive.unsupported_reason {
                    fail!(ConfigUnsupported, "disk '{}' {unsupported_reason}", drive.name());
                }
                check_recordable(&drive)?;
                let overlay = match wish.and_then(|wish| wish.source.clone()) {
                    Some(source) => source,
                    None => overlay_name(&drive, snapshot)?,
                };
                let on_device = wish.is_some_and(|wish| wish.on_device);
                plan.disks.push(DiskPlan { drive, overlay, reuse, on_device });
            }
            (Role::Disk | Role::ReadOnly, Location::Manual) => {
                check_recordable(&drive)?;
                plan.manual.push(drive);
            }
            (Role::Disk | Role::ReadOnly, Location::No) => {}
        }
    }
    check_distinct(&plan.disks)?;
    check_no_image(&plan.disks, &images)?;
    Ok(plan)
}

/// The drives that are left to others. Names that no drive has are passed over.
pub fn manual<'a>(drives: &'a [Drive], request: &Request) -> Vec<&'a Drive> {
    let wish = |drive: &Drive| {
        request
            .disks
            .iter()
            .find(|disk| drive.names.contains(&disk.name) || drive.file == disk.name)
    };
    drives.iter().filter(|drive| location(drive, wish(drive)) == Location::Manual).collect()
}

/// What is asked for of each drive.
fn align<'a>(drives: &[Drive], request: &'a Request) -> Result<Vec<Option<&'a DiskRequest>>> {
    let mut wanted = vec![None; drives.len()];
    for disk in &request.disks {
        let slot = find(drives, &disk.name)?;
        if let Some(DiskRequest { name, .. }) = wanted[slot].replace(disk) {
            fail!(XmlError, "disk '{name}' specified twice");
        }
    }
    Ok(wanted)
}

/// How a drive is snapshotted: as the request says, else as the domain XML does, else by an
/// overlay.
fn location(drive: &Drive, wish: Option<&DiskRequest>) -> Location {
    match (wish.and_then(|wish| wish.location), drive.role, drive.snapshot.as_deref()) {
        (Some(location), _, _) => location,
        (None, Role::Disk, Some("manual")) => Location::Manual,
        (None, Role::ReadOnly | Role::Firmware | Role::Empty, _)
        | (None, Role::Disk, Some("no")) => Location::No,
        (None, Role::Disk, _) => Location::External,
    }
}

/// The drive of this name: names first, then paths of images.
fn find(drives: &[Drive], name: &str) -> Result<usize> {
    let named = |drive: &Drive| drive.names.iter().any(|known| known == name);
    if let Some(slot) = drives.iter().position(named) {
        return Ok(slot);
    }
    let mut holders = (0..drives.len()).filter(|&slot| drives[slot].file == name);
    match (holders.next(), holders.next()) {
        (Some(slot), None) => Ok(slot),
        (Some(_), Some(_)) => {
            fail!(ConfigUnsupported, "more than one disk has the image '{name}': name it otherwise")
        }
        (None, _) => {
            let known: Vec<_> =
                drives.iter().filter(|drive| drive.role != Role::Empty).map(Drive::name).collect();
            fail!(ConfigUnsupported, "no disk named '{name}', the guest has: {}", known.join(", "))
        }
    }
}

/// The path of its image must be expressible in XML.
fn check_recordable(drive: &Drive) -> Result<()> {
    if drive.file.chars().any(char::is_control) {
        fail!(
            XmlError,
            "image of disk '{}' {:?} can't contain control characters",
            drive.name(),
            drive.file
        );
    }
    Ok(())
}

/// libvirt's rule: the image's path, its suffix replaced by the snapshot's name.
fn overlay_name(drive: &Drive, snapshot: &str) -> Result<String> {
    let image = Path::new(&drive.file);
    if !image.is_file() {
        fail!(
            ConfigUnsupported,
            "source for disk '{}' ('{}') is not a regular file; refusing to generate external \
             snapshot name: give it as <source file='...'/>",
            drive.name(),
            drive.file
        );
    }
    Ok(generated_name(&drive.file, snapshot))
}

/// What libvirt calls the overlay of an image in a snapshot of this name.
pub fn generated_name(image: &str, snapshot: &str) -> String {
    let image = Path::new(image);
    let stem = match (image.file_stem(), image.file_name()) {
        (Some(stem), Some(_)) => image.with_file_name(stem),
        _ => image.to_owned(),
    };
    format!("{}.{snapshot}", stem.display())
}

fn check_distinct(disks: &[DiskPlan]) -> Result<()> {
    for (n, disk) in disks.iter().enumerate() {
        let same = |other: &&DiskPlan| {
            other.overlay == disk.overlay
                || sys::same_file(Path::new(&other.overlay), Path::new(&disk.overlay))
        };
        if let Some(other) = disks[..n].iter().find(same) {
            fail!(
                ConfigUnsupported,
                "disks '{}' and '{}' would have the same external snapshot file '{}': give each \
                 its own",
                other.drive.name(),
                disk.drive.name(),
                disk.overlay
            );
        }
    }
    Ok(())
}

/// What the guest has its data in can be nobody's overlay, not even where an overlay may be there
/// beforehand.
fn check_no_image(disks: &[DiskPlan], images: &[(String, Vec<String>)]) -> Result<()> {
    for DiskPlan { drive, overlay, .. } in disks {
        let path = Path::new(overlay);
        let is_overlay = |image: &String| path.exists() && sys::same_file(Path::new(image), path);
        if let Some((owner, _)) = images.iter().find(|(_, images)| images.iter().any(is_overlay)) {
            fail!(
                ConfigUnsupported,
                "external snapshot file for disk '{}' already exists, and is an image of disk \
                 '{owner}': '{overlay}'; name another",
                drive.name()
            );
        }
    }
    Ok(())
}
