// SPDX-License-Identifier: LGPL-2.1-or-later

//! What is recorded of a snapshot: libvirt's `<domainsnapshot>`, as it stands in the state
//! directory.
//!
//! libvirt's format names, for each disk, the overlay that became active at the snapshot. The
//! snapshot's own content is the image below, which a later block job can move away from under the
//! overlay; so that image is written down too, as an element of our own namespace, which libvirt
//! passes over.

use roxmltree::Node;

use super::drive::Drive;
use super::frozen::Frozen;
use super::names::{check_name, check_path};
use super::{domain, xml};
use crate::error::{Code, Error, Result, fail};

/// A snapshot, complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its name.
    pub name: String,
    /// A text for people.
    pub description: Option<String>,
    /// The snapshot before it.
    pub parent: Option<String>,
    /// Seconds since the epoch.
    pub creation_time: u64,
    /// The guest's state at the instant.
    pub state: State,
    /// The memory image.
    pub memory_file: String,
    /// The disks that were switched.
    pub disks: Vec<RecordedDisk>,
    /// The disks that were left to others.
    pub manual: Vec<ManualDisk>,
    /// The UEFI variables.
    pub nvram: Vec<RecordedNvram>,
    /// `<domain>`, with the images that are the snapshot's.
    pub domain_xml: String,
}

/// The guest's state at the instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It ran.
    Running,
    /// It was paused.
    Paused,
}

/// A disk of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordedDisk {
    /// Its name.
    pub name: String,
    /// The overlay that the guest went on with.
    pub overlay: String,
    /// The image with the snapshot's content.
    pub image: String,
    /// That image's format.
    pub format: String,
    /// The image and all below it, as they were at the instant. Empty in records of versions that
    /// did not look.
    pub frozen: Vec<Frozen>,
}

/// A disk that is left to the caller's storage, which snapshots it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManualDisk {
    /// Its name.
    pub name: String,
    /// Its image or device, with which the guest went on.
    pub source: String,
    /// The format of that.
    pub format: String,
}

/// UEFI variables of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordedNvram {
    /// The drive's name.
    pub name: String,
    /// The copy that is the snapshot's.
    pub copy: String,
    /// The original guest's own file.
    pub original: String,
    /// The format of both.
    pub format: String,
    /// By what the copy's content is known again; of records of earlier versions it is not.
    pub content: Option<String>,
}

impl State {
    /// libvirt's word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            State::Running => "running",
            State::Paused => "paused",
        }
    }
}

impl Record {
    /// Reads what [`Record::to_xml`] wrote.
    pub fn parse(text: &str) -> Result<Record> {
        let damaged = |what: &str| {
            Error::new(Code::InvalidDomainSnapshot, format!("snapshot metadata {what}"))
        };
        let document = xml::parse(text, "domainsnapshot", &xml::RECORDED)
            .map_err(|error| damaged(&format!("is damaged: {error}")))?;
        let root = document.root_element();
        let required =
            |what| xml::text(root, what).ok_or_else(|| damaged(&format!("has no <{what}>")));
        let name = required("name")?;
        check_name(&name).map_err(|error| damaged(&format!("is damaged: {error}")))?;
        let state = match required("state")?.as_str() {
            "running" => State::Running,
            "paused" => State::Paused,
            other => return Err(damaged(&format!("has the unknown state '{other}'"))),
        };
        let disks = xml::child(root, "disks").ok_or_else(|| damaged("has no <disks>"))?;
        let domain = xml::child(root, "domain").ok_or_else(|| damaged("has no <domain>"))?;
        let (manual, switched): (Vec<_>, Vec<_>) = xml::children(disks, "disk")
            .partition(|disk| disk.attribute("snapshot") == Some("manual"));
        let record = Record {
            name,
            description: xml::text(root, "description"),
            parent: xml::child(root, "parent").and_then(|parent| xml::text(parent, "name")),
            creation_time: required("creationTime")?
                .parse()
                .map_err(|_| damaged("has no time of creation"))?,
            state,
            memory_file: xml::attribute(root, "memory", "file")
                .ok_or_else(|| damaged("names no memory image"))?
                .into(),
            disks: switched.into_iter().map(RecordedDisk::parse).collect::<Result<_>>()?,
            manual: manual.into_iter().map(ManualDisk::parse).collect::<Result<_>>()?,
            nvram: xml::children(disks, "nvram")
                .map(RecordedNvram::parse)
                .collect::<Result<_>>()?,
            domain_xml: domain::element_text(domain)
                .ok_or_else(|| damaged("has a <domain> without a name"))?,
        };
        // What was recorded was: a relative path would be one thing here and another there.
        let overlays = record.disks.iter().map(|disk| ("overlay", &disk.overlay));
        let copies = record.nvram.iter().map(|nvram| ("copy of UEFI variables", &nvram.copy));
        for (what, path) in overlays.chain(copies).chain([("memory image", &record.memory_file)]) {
            check_path(what, path).map_err(|error| damaged(&format!("is damaged: {error}")))?;
        }
        Ok(record)
    }
}

impl RecordedDisk {
    fn parse(node: Node) -> Result<RecordedDisk> {
        let (source, image) = (child(node, "source")?, child(node, "image")?);
        Ok(RecordedDisk {
            name: attribute(node, "name")?,
            overlay: source
                .attribute("dev")
                .map_or_else(|| attribute(source, "file"), |device| Ok(device.into()))?,
            image: attribute(image, "file")?,
            format: attribute(image, "format")?,
            frozen: xml::children(node, "frozen").filter_map(Frozen::read).collect(),
        })
    }
}

impl From<&Drive> for ManualDisk {
    fn from(drive: &Drive) -> ManualDisk {
        ManualDisk {
            name: drive.name().into(),
            source: drive.file.clone(),
            format: drive.format.clone(),
        }
    }
}

impl ManualDisk {
    fn parse(node: Node) -> Result<ManualDisk> {
        let image = child(node, "image")?;
        Ok(ManualDisk {
            name: attribute(node, "name")?,
            source: attribute(image, "file")?,
            format: attribute(image, "format")?,
        })
    }
}

impl RecordedNvram {
    fn parse(node: Node) -> Result<RecordedNvram> {
        Ok(RecordedNvram {
            name: attribute(node, "name")?,
            copy: attribute(node, "file")?,
            original: attribute(node, "original")?,
            format: attribute(node, "format")?,
            content: node.attribute("content").map(str::to_owned),
        })
    }
}

fn child<'a, 'i>(disk: Node<'a, 'i>, name: &str) -> Result<Node<'a, 'i>> {
    match xml::child(disk, name) {
        Some(child) => Ok(child),
        None => {
            let disk = attribute(disk, "name")?;
            fail!(InvalidDomainSnapshot, "disk '{disk}' of a snapshot has no <{name}>")
        }
    }
}

fn attribute(node: Node, name: &str) -> Result<String> {
    match node.attribute(name) {
        Some(value) => Ok(value.into()),
        None => fail!(
            InvalidDomainSnapshot,
            "<{}> in the metadata of a snapshot has no attribute '{name}'",
            node.tag_name().name()
        ),
    }
}
