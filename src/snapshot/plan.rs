//! Which drives get which overlay: the caller's disks aligned with the guest's, as libvirt aligns them.

use std::path::Path;

use super::{DiskRequest, Drive, Location, Request, Role};
use crate::error::{Result, fail};

/// A disk that is switched to an overlay.
#[derive(Clone, Debug)]
pub struct DiskPlan {
    /// The drive as it is before the switch.
    pub drive: Drive,
    /// Where its overlay goes.
    pub overlay: String,
}

/// What a snapshot does with the drives of a guest.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// Switched, in this order.
    pub disks: Vec<DiskPlan>,
    /// UEFI variables, copied.
    pub firmware: Vec<Drive>,
}

/// Aligns what is asked for with what is there.
pub fn plan(drives: Vec<Drive>, request: &Request, snapshot: &str) -> Result<Plan> {
    let mut wanted = vec![None; drives.len()];
    for disk in &request.disks {
        let slot = find(&drives, &disk.name)?;
        if let Some(DiskRequest { name, .. }) = wanted[slot].replace(disk) {
            fail!(XmlError, "disk '{name}' specified twice");
        }
    }
    let mut plan = Plan::default();
    for (drive, wish) in drives.into_iter().zip(wanted) {
        let external = match (wish.and_then(|wish| wish.location), drive.role) {
            (Some(location), _) => location == Location::External,
            (None, Role::Disk) => drive.snapshot.as_deref() != Some("no"),
            (None, _) => false,
        };
        match drive.role {
            Role::Firmware if external => fail!(
                ConfigUnsupported,
                "external snapshot for disk '{}' is not supported: it holds UEFI variables, which are copied with every \
                 snapshot anyway",
                drive.name()
            ),
            Role::ReadOnly if external => {
                fail!(ConfigUnsupported, "external snapshot for readonly disk '{}' is not supported", drive.name())
            }
            Role::Firmware => plan.firmware.push(drive),
            Role::Disk if external => {
                // The domain XML can wish for what the request cannot have; the request's own words are checked there.
                if let (None, Some(wish @ ("internal" | "manual"))) =
                    (wish.and_then(|wish| wish.location), drive.snapshot.as_deref())
                {
                    fail!(
                        OperationUnsupported,
                        "disk '{}' has snapshot='{wish}' in the domain XML, which is not supported for this guest: name \
                         it in the snapshot XML with snapshot='external' or 'no'",
                        drive.name()
                    );
                }
                if let Some(hindrance) = &drive.hindrance {
                    fail!(ConfigUnsupported, "disk '{}' {hindrance}", drive.name());
                }
                if drive.file.chars().any(char::is_control) {
                    fail!(
                        XmlError,
                        "image of disk '{}' {:?} can't contain control characters",
                        drive.name(),
                        drive.file
                    );
                }
                let overlay = match wish.and_then(|wish| wish.source.clone()) {
                    Some(source) => source,
                    None => overlay_name(&drive, snapshot)?,
                };
                plan.disks.push(DiskPlan { drive, overlay });
            }
            Role::Disk | Role::ReadOnly => {}
        }
    }
    check_distinct(&plan.disks)?;
    Ok(plan)
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
        (Some(_), Some(_)) => fail!(ConfigUnsupported, "more than one disk has the image '{name}': name it otherwise"),
        (None, _) => {
            let known: Vec<_> = drives.iter().map(Drive::name).collect();
            fail!(ConfigUnsupported, "no disk named '{name}', the guest has: {}", known.join(", "))
        }
    }
}

/// libvirt's rule: the image's path, its suffix replaced by the snapshot's name.
fn overlay_name(drive: &Drive, snapshot: &str) -> Result<String> {
    let image = Path::new(&drive.file);
    if !image.is_file() {
        fail!(
            ConfigUnsupported,
            "source for disk '{}' ('{}') is not a regular file; refusing to generate external snapshot name: give it as \
             <source file='...'/>",
            drive.name(),
            drive.file
        );
    }
    let stem = match (image.file_stem(), image.file_name()) {
        (Some(stem), Some(_)) => image.with_file_name(stem),
        _ => image.to_owned(),
    };
    Ok(format!("{}.{snapshot}", stem.display()))
}

fn check_distinct(disks: &[DiskPlan]) -> Result<()> {
    for (n, disk) in disks.iter().enumerate() {
        if let Some(other) = disks[..n].iter().find(|other| other.overlay == disk.overlay) {
            fail!(
                ConfigUnsupported,
                "disks '{}' and '{}' would have the same external snapshot file '{}': give each its own",
                other.drive.name(),
                disk.drive.name(),
                disk.overlay
            );
        }
    }
    Ok(())
}
