//! A domain's drives, from its XML.

use roxmltree::Node;

use crate::error::{Error, Result, fail};
use crate::model::domain::Storage;
use crate::model::drive::OpenOptions;
use crate::model::{Drive, Role, nbd, xml};

/// The drives of a running domain, in the order of its XML. Sizes are not in it.
pub fn drives(domain_xml: &str) -> Result<Vec<Drive>> {
    let mut drives = disks(domain_xml)?;
    let document = xml::parse(domain_xml, "domain", &xml::GIVEN)?;
    drives.extend(firmware(document.root_element())?);
    Ok(drives)
}

/// The same without UEFI variables.
pub fn disks(domain_xml: &str) -> Result<Vec<Drive>> {
    let document = xml::parse(domain_xml, "domain", &xml::GIVEN)?;
    let devices = xml::child(document.root_element(), "devices");
    let Some(devices) = devices else { fail!(XmlError, "the domain has no <devices>") };
    Ok(xml::children(devices, "disk").filter_map(drive).collect())
}

/// Targets of all disks: those without a medium too.
pub fn targets(domain_xml: &str) -> Result<Vec<String>> {
    let document = xml::parse(domain_xml, "domain", &xml::GIVEN)?;
    let devices = xml::child(document.root_element(), "devices");
    let disks = devices.into_iter().flat_map(|devices| xml::children(devices, "disk"));
    Ok(disks.filter_map(|disk| xml::attribute(disk, "target", "dev").map(str::to_owned)).collect())
}

/// The image that each disk is on, and those below it, from the top down.
pub fn chains(domain_xml: &str) -> Result<Vec<(String, Vec<String>)>> {
    let drives = drives(domain_xml)?;
    let chain = |drive: Drive| {
        let name = drive.name().to_owned();
        (name, [vec![drive.file], drive.backing].concat())
    };
    let has_chain = |drive: &Drive| !matches!(drive.role, Role::Firmware | Role::Empty);
    Ok(drives.into_iter().filter(has_chain).map(chain).collect())
}

/// Targets of disks whose block job is done but for its last step.
pub fn ready_jobs(domain_xml: &str) -> Result<Vec<String>> {
    mirrored(domain_xml, ("ready", "yes"))
}

/// Targets of disks whose image is being merged into one below.
pub fn merging(domain_xml: &str) -> Result<Vec<String>> {
    mirrored(domain_xml, ("job", "active-commit"))
}

fn mirrored(domain_xml: &str, (name, value): (&str, &str)) -> Result<Vec<String>> {
    let document = xml::parse(domain_xml, "domain", &xml::GIVEN)?;
    let devices = xml::child(document.root_element(), "devices");
    let disks = devices.into_iter().flat_map(|devices| xml::children(devices, "disk"));
    let mirrored = disks.filter(|disk| xml::attribute(*disk, "mirror", name) == Some(value));
    Ok(mirrored
        .filter_map(|disk| xml::attribute(disk, "target", "dev").map(str::to_owned))
        .collect())
}

fn drive(disk: Node) -> Option<Drive> {
    let target = xml::attribute(disk, "target", "dev")?.to_owned();
    let Some(storage) = Storage::of(disk) else { return Some(plain(target, disk, Role::Empty)) };
    let source = xml::child(disk, "source")?;
    let kind = storage.kind();
    let hindrance = match (kind, storage.name()) {
        ("network", _) if source.attribute("protocol") == Some("nbd") && nbd::needs_secret(disk) => Some(
            "is on network storage that needs a secret (<auth>, <cookies>, <encryption> or TLS): \
             an overlay does not name it, so that the domain could not be started on one again, \
             nor an undo merge it by qemu-img; leave the disk out (snapshot='no') or to a storage \
             hook (snapshot='manual')"
                .to_owned(),
        ),
        ("file" | "block", Some(_)) if xml::child(source, "encryption").is_some() => {
            Some("is encrypted: instant snapshots of encrypted images are not supported".to_owned())
        }
        ("file" | "block" | "network", Some(_)) => None,
        // A volume that is a file or a device of this machine is called by its path by now.
        _ => {
            let protocol =
                source.attribute("protocol").map(|name| format!(" ({name}; what is supported is plain NBD)"));
            Some(format!(
                "is on storage of type '{kind}'{}: instant snapshots of it are not supported; \
                 leave it out (snapshot='no') or to a storage hook (snapshot='manual'), or take \
                 libvirt's own snapshot, which pauses the domain until its memory is saved \
                 (without VIR_DOMAIN_SNAPSHOT_CREATE_INSTANT, and with a file named for the \
                 overlay, <source file='...'/>)",
                protocol.unwrap_or_default()
            ))
        }
    };
    if xml::child(disk, "transient").is_some() {
        return Some(Drive {
            hindrance: Some("is transient: libvirt takes no snapshots of it".into()),
            ..plain(target, disk, Role::Disk)
        });
    }
    let hindrance = hindrance.or_else(|| unswitchable(disk));
    // libvirt leaves out what is read only, a CD-ROM's medium included.
    let role = match xml::child(disk, "readonly") {
        Some(_) => Role::ReadOnly,
        None => Role::Disk,
    };
    Some(Drive { hindrance, ..plain(target, disk, role) })
}

/// What libvirt finds in the switch, when the domain is paused: a disk that it gives no overlay.
fn unswitchable(disk: Node) -> Option<String> {
    /// libvirt's limit of a chain of images.
    const DEEPEST: usize = 200;
    let (mut depth, mut image) = (1, disk);
    while let Some(below) =
        xml::child(image, "backingStore").filter(|image| xml::child(*image, "source").is_some())
    {
        (depth, image) = (depth + 1, below);
    }
    if disk.attribute("device") == Some("lun") {
        Some(
            "is a SCSI device passed through (device='lun'), which libvirt gives no overlay: leave \
             it out (snapshot='no') or to a storage hook (snapshot='manual')"
                .into(),
        )
    } else if xml::child(disk, "shareable").is_some() {
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

fn plain(target: String, disk: Node, role: Role) -> Drive {
    let attribute = |child, name| xml::attribute(disk, child, name).map(str::to_owned);
    let path =
        |image: Node| Storage::of(image).and_then(|storage| storage.name().map(str::to_owned));
    let mut backing = Vec::new();
    let mut below = xml::child(disk, "backingStore");
    while let Some(image) = below {
        let Some(file) = path(image) else { break };
        backing.push(file);
        below = xml::child(image, "backingStore");
    }
    let mut names = vec![target];
    names.extend(attribute("alias", "name"));
    Drive {
        names,
        role,
        node: String::new(),
        file: path(disk).or_else(|| attribute("source", "name")).unwrap_or_default(),
        backing,
        format: attribute("driver", "type").unwrap_or_else(|| "raw".into()),
        size: 0,
        bitmaps: Vec::new(),
        options: OpenOptions {
            no_flush: xml::attribute(disk, "driver", "cache") == Some("unsafe"),
            ..OpenOptions::default()
        },
        hindrance: None,
        snapshot: disk.attribute("snapshot").map(str::to_owned),
    }
}

/// UEFI variables: `<os><nvram>`, whose file is its text, or a `<source>` in it.
fn firmware(root: Node) -> Result<Option<Drive>> {
    let Some(nvram) = xml::child(root, "os").and_then(|os| xml::child(os, "nvram")) else {
        return Ok(None);
    };
    let source = xml::child(nvram, "source");
    let file = source
        .and_then(|source| source.attribute("file"))
        .or(nvram.text().map(str::trim))
        .unwrap_or_default();
    if file.is_empty() {
        return Err(Error::new(
            crate::error::Code::ConfigUnsupported,
            "the UEFI variables of the domain (<nvram>) are not in a file: they cannot be compared",
        ));
    }
    Ok(Some(Drive {
        names: vec!["nvram".into()],
        role: Role::Firmware,
        node: String::new(),
        file: file.into(),
        format: nvram.attribute("format").unwrap_or("raw").into(),
        backing: Vec::new(),
        size: 0,
        bitmaps: Vec::new(),
        options: OpenOptions::default(),
        hindrance: None,
        snapshot: None,
    }))
}

/// libvirt's save cookie: the CPU that the guest really has, which the XML of a memory image need
/// not say; and that a network card of type `user` may have its helper process.
pub fn cookie(live_xml: &str) -> Result<Option<String>> {
    let document = xml::parse(live_xml, "domain", &xml::GIVEN)?;
    let cpu = xml::child(document.root_element(), "cpu");
    Ok(cpu.map(|cpu| {
        format!("<cookie>\n  {}\n  <slirpHelper/>\n</cookie>\n", &live_xml[cpu.range()])
    }))
}

/// Whether resuming takes more than starting the vCPUs: libvirt gives disk leases and macvtap
/// devices away while a domain is paused.
pub fn holds_leases(domain_xml: &str) -> bool {
    let Ok(document) = xml::parse(domain_xml, "domain", &xml::GIVEN) else { return true };
    let Some(devices) = xml::child(document.root_element(), "devices") else { return false };
    let macvtap = xml::children(devices, "interface").any(|interface| {
        interface.attribute("type") == Some("direct")
            || xml::attribute(interface, "actual", "type") == Some("direct")
    });
    macvtap || xml::child(devices, "lease").is_some()
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
                let drives = drives(&xml).unwrap();
                assert_eq!((drives[0].role, drives[0].name()), (Role::Empty, "sda"), "{xml}");
                assert_eq!(chains(&xml).unwrap(), []);
            }
        }
    }

    /// The only disk of a domain, on so many images.
    fn disk(attributes: &str, depth: usize) -> Drive {
        let below: String = (1..depth)
            .map(|n| format!("<backingStore type='file'><source file='/{n}'/>"))
            .collect();
        let end = "<backingStore/>".to_owned() + &"</backingStore>".repeat(depth - 1);
        let xml = format!(
            "<domain><devices><disk type='block' {attributes}><source dev='/dev/sdx'/>{below}{end}\
             <target dev='sda' bus='scsi'/></disk></devices></domain>"
        );
        disks(&xml).unwrap().remove(0)
    }

    #[test]
    fn a_disk_that_libvirt_gives_no_overlay_is_known_by_its_xml() {
        assert_eq!(disk("device='disk'", 1).hindrance, None);
        assert!(disk("device='lun'", 1).hindrance.unwrap().contains("passed through"));
        assert_eq!(disk("device='disk'", 199).hindrance, None);
        assert!(disk("device='disk'", 200).hindrance.unwrap().contains("a chain of 200 images"));
    }
}
