// SPDX-License-Identifier: LGPL-2.1-or-later

//! Plans which drives get which overlay: matches the caller's disks with the guest's, as libvirt
//! does.

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
    /// The path of its overlay.
    pub overlay: String,
    /// The overlay exists already: the caller has made it.
    pub reuse: bool,
    /// The caller says that it is a block device.
    pub on_device: bool,
}

/// What a snapshot does with each drive of a guest.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// The disks that are switched, in this order.
    pub disks: Vec<DiskPlan>,
    /// The drives that are left to the storage hook.
    pub manual: Vec<Drive>,
    /// The UEFI variables, which are copied.
    pub firmware: Vec<Drive>,
}

/// Matches the request with the guest's drives. `reuse`: overlays that are named exist already.
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
                // The domain XML can ask for a snapshot that a request cannot; the request itself
                // was checked when it was parsed.
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

/// The drives that are left to the storage hook. Names that no drive has are ignored.
pub fn manual<'a>(drives: &'a [Drive], request: &Request) -> Vec<&'a Drive> {
    let wish = |drive: &Drive| {
        request
            .disks
            .iter()
            .find(|disk| drive.names.contains(&disk.name) || drive.file == disk.name)
    };
    drives.iter().filter(|drive| location(drive, wish(drive)) == Location::Manual).collect()
}

/// The request for each drive.
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

/// How a drive is snapshotted: as the request says, else as the domain XML says, else by an
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

/// The drive with this name, or, if there is none, with an image of this path.
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

/// Refuses an image whose path XML cannot hold.
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

/// The path of an overlay by libvirt's rule: the image's path, with the suffix replaced by the
/// snapshot's name.
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

/// libvirt's path for the overlay of an image in a snapshot of this name.
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

/// Refuses an overlay that is an image of the guest, even if existing files may be used.
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
