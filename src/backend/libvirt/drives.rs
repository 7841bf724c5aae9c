// SPDX-License-Identifier: LGPL-2.1-or-later

//! Reads a domain's drives from its XML.

use crate::error::{Result, fail};
use crate::model::domain::{Disk, Nvram};
use crate::model::drive::OpenOptions;
use crate::model::{Domain, Drive, Role};

/// The drives of a running domain, in the order of its XML. The XML does not have their sizes.
pub fn drives(domain: &Domain) -> Result<Vec<Drive>> {
    let mut drives = disks(domain);
    drives.extend(domain.nvram.as_ref().map(firmware).transpose()?);
    Ok(drives)
}

/// The same drives without the UEFI variables.
pub fn disks(domain: &Domain) -> Vec<Drive> {
    domain.disks.iter().map(drive).collect()
}

/// The image that each disk is on, and those below it, from the top down.
pub fn chains(domain: &Domain) -> Vec<(String, Vec<String>)> {
    let chain =
        |disk: &Disk| (disk.target.clone(), [vec![file(disk)], disk.backing.clone()].concat());
    domain.disks.iter().filter(|disk| disk.present).map(chain).collect()
}

/// The name of a disk's image: its path or URI, or else libvirt's name for it.
fn file(disk: &Disk) -> String {
    disk.file.clone().or_else(|| disk.source_name.clone()).unwrap_or_default()
}

fn drive(disk: &Disk) -> Drive {
    // libvirt leaves out read-only disks, including the medium of a CD-ROM.
    let (role, unsupported_reason) = match () {
        () if !disk.present => (Role::Empty, None),
        () if disk.transient => {
            (Role::Disk, Some("is transient: libvirt takes no snapshots of it".into()))
        }
        () if disk.read_only => (Role::ReadOnly, unsupported_reason(disk)),
        () => (Role::Disk, unsupported_reason(disk)),
    };
    let mut names = vec![disk.target.clone()];
    names.extend(disk.alias.clone());
    Drive {
        names,
        role,
        node: String::new(),
        file: file(disk),
        backing: disk.backing.clone(),
        format: disk.format.clone(),
        size: 0,
        bitmaps: Vec::new(),
        options: OpenOptions {
            no_flush: disk.cache.as_deref() == Some("unsafe"),
            ..OpenOptions::default()
        },
        unsupported_reason,
        snapshot: disk.snapshot.clone(),
    }
}

/// Why a disk that has a medium can get no overlay.
fn unsupported_reason(disk: &Disk) -> Option<String> {
    match (disk.kind.as_str(), &disk.file) {
        ("network", _) if disk.protocol.as_deref() == Some("nbd") && disk.needs_secret => Some(
            "is on network storage that needs a secret (<auth>, <cookies>, <encryption> or TLS): \
             an overlay does not name it, so that the domain could not be started on one again, \
             nor an undo merge it by qemu-img; leave the disk out (snapshot='no') or to a storage \
             hook (snapshot='manual')"
                .to_owned(),
        ),
        ("file" | "block", Some(_)) if disk.encrypted => {
            Some("is encrypted: instant snapshots of encrypted images are not supported".to_owned())
        }
        ("file" | "block" | "network", Some(_)) => unswitchable(disk),
        // By now, a volume that is a file or a device of this machine has its path here.
        (kind, _) => {
            let protocol = disk.protocol.as_ref();
            let protocol = protocol.map(|name| format!(" ({name}; only NBD is supported)"));
            Some(format!(
                "is on storage of type '{kind}'{}: instant snapshots of it are not supported; \
                 leave it out (snapshot='no') or to a storage hook (snapshot='manual'), or take \
                 libvirt's own snapshot, which pauses the domain until its memory is saved \
                 (without VIR_DOMAIN_SNAPSHOT_CREATE_INSTANT, and with a file named for the \
                 overlay, <source file='...'/>)",
                protocol.unwrap_or_default()
            ))
        }
    }
}

/// Why libvirt would give a disk no overlay. libvirt itself checks that only in the switch, when
/// the domain is paused.
fn unswitchable(disk: &Disk) -> Option<String> {
    /// libvirt's limit for the length of a backing chain.
    const DEEPEST: usize = 200;
    let depth = disk.depth;
    if disk.is_lun {
        Some(
            "is a SCSI device passed through (device='lun'), which libvirt gives no overlay: leave \
             it out (snapshot='no') or to a storage hook (snapshot='manual')"
                .into(),
        )
    } else if disk.shareable {
        Some(
            "is shared with other domains (<shareable/>), which would not see what is written to \
             an overlay: leave it out (snapshot='no') or to a storage hook (snapshot='manual')"
                .into(),
        )
    } else if depth + 1 > DEEPEST {
        Some(format!(
            "is on a chain of {depth} images, and libvirt takes no more than {DEEPEST}: merge some \
             of them first (delete snapshots, or virsh blockcommit)"
        ))
    } else {
        None
    }
}

fn firmware(nvram: &Nvram) -> Result<Drive> {
    if nvram.file.is_empty() {
        fail!(
            ConfigUnsupported,
            "the UEFI variables of the domain (<nvram>) are not in a file: they cannot be compared"
        );
    }
    Ok(Drive::of_image("nvram", Role::Firmware, "", &nvram.file, &nvram.format))
}

/// libvirt's save cookie. It has the CPU that the guest really has, which the XML of a memory image
/// need not have; and it permits a network card of type `user` to have its helper process.
pub fn cookie(live: &Domain) -> Option<String> {
    let cpu = live.cpu.as_ref()?;
    Some(format!("<cookie>\n  {cpu}\n  <slirpHelper/>\n</cookie>\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_drive_is_there_to_be_named_and_has_nothing_to_keep() {
        // As libvirt 9 and libvirt 12.8 write them.
        for source in ["", "<source index='1'/>", "<source startupPolicy='optional' index='2'/>"] {
            for device in ["floppy", "cdrom"] {
                let xml = format!(
                    "<domain><name>x</name><devices><disk type='file' device='{device}'><driver \
                     name='qemu' type='raw'/>{source}<target dev='sda' \
                     bus='x'/></disk></devices></domain>"
                );
                let domain = Domain::parse(&xml).unwrap();
                let drives = drives(&domain).unwrap();
                assert_eq!((drives[0].role, drives[0].name()), (Role::Empty, "sda"), "{xml}");
                assert_eq!(chains(&domain), []);
            }
        }
    }

    /// The only disk of a domain, on a chain of `depth` images.
    fn disk(attributes: &str, depth: usize) -> Drive {
        let below: String = (1..depth)
            .map(|n| format!("<backingStore type='file'><source file='/{n}'/>"))
            .collect();
        let end = "<backingStore/>".to_owned() + &"</backingStore>".repeat(depth - 1);
        let xml = format!(
            "<domain><name>x</name><devices><disk type='block' {attributes}><source dev='/dev/sdx'/>{below}{end}\
             <target dev='sda' bus='scsi'/></disk></devices></domain>"
        );
        disks(&Domain::parse(&xml).unwrap()).remove(0)
    }

    #[test]
    fn a_disk_that_libvirt_gives_no_overlay_is_known_by_its_xml() {
        assert_eq!(disk("device='disk'", 1).unsupported_reason, None);
        assert!(disk("device='lun'", 1).unsupported_reason.unwrap().contains("passed through"));
        assert_eq!(disk("device='disk'", 199).unsupported_reason, None);
        assert!(
            disk("device='disk'", 200)
                .unsupported_reason
                .unwrap()
                .contains("a chain of 200 images")
        );
    }
}
