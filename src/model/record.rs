// SPDX-License-Identifier: LGPL-2.1-or-later

//! The record of a snapshot: libvirt's `<domainsnapshot>`, as it is in the state directory.
//!
//! libvirt's format names, for each disk, the overlay that became active at the snapshot. The
//! snapshot's own content is in the image below, and a later block job can put another image there.
//! So that image is recorded too, as an element in our own namespace, which libvirt ignores.

use super::drive::Drive;
use super::frozen::Frozen;
use super::names::{check_name, check_path};
use super::snapshot_xml::{ImageElement, NvramElement, SnapshotDisk, SnapshotXml};
use super::xml;
use crate::error::{Code, Error, Result, fail};

/// The record of a complete snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its name.
    pub name: String,
    /// A description for people.
    pub description: Option<String>,
    /// The name of its parent.
    pub parent: Option<String>,
    /// The time in seconds since the epoch.
    pub creation_time: u64,
    /// The guest's state at the instant.
    pub state: State,
    /// The memory image.
    pub memory_file: String,
    /// The disks that were switched.
    pub disks: Vec<RecordedDisk>,
    /// The disks that were left to the storage hook.
    pub manual: Vec<ManualDisk>,
    /// The UEFI variables.
    pub nvram: Vec<RecordedNvram>,
    /// The `<domain>`, on the snapshot's images.
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
    /// The image and all images below it, with their state at the instant. Empty in records of
    /// earlier versions.
    pub frozen: Vec<Frozen>,
}

/// A disk that is left to the caller's storage, which snapshots it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManualDisk {
    /// Its name.
    pub name: String,
    /// Its image or device, which the guest goes on with.
    pub source: String,
    /// The format of the image.
    pub format: String,
}

/// UEFI variables of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordedNvram {
    /// The drive's name.
    pub name: String,
    /// The snapshot's copy.
    pub copy: String,
    /// The file of the original guest.
    pub original: String,
    /// The format of both.
    pub format: String,
    /// The fingerprint of the copy's content; `None` in records of earlier versions.
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
    /// Parses the text that [`Record::to_xml`] writes.
    pub fn parse(text: &str) -> Result<Record> {
        let damaged = |what: &str| {
            Error::new(Code::InvalidDomainSnapshot, format!("snapshot metadata {what}"))
        };
        let mut found = SnapshotXml::parse(text, &xml::RECORDED)
            .map_err(|error| damaged(&format!("is damaged: {error}")))?;
        let required = |value: Option<String>, element: &str| {
            value.ok_or_else(|| damaged(&format!("has no <{element}>")))
        };
        let name = required(found.name.take(), "name")?;
        check_name(&name).map_err(|error| damaged(&format!("is damaged: {error}")))?;
        let state = match required(found.state.take(), "state")?.as_str() {
            "running" => State::Running,
            "paused" => State::Paused,
            other => return Err(damaged(&format!("has the unknown state '{other}'"))),
        };
        let disks = found.disks.take().ok_or_else(|| damaged("has no <disks>"))?;
        let domain = found.domain.take().ok_or_else(|| damaged("has no <domain>"))?;
        if domain.name.is_none() {
            return Err(damaged("has a <domain> without a name"));
        }
        let domain_xml = found.domain_text(&domain).to_owned();
        let (manual, switched): (Vec<_>, Vec<_>) =
            disks.into_iter().partition(|disk| disk.is_manual());
        let record = Record {
            name,
            description: found.description,
            parent: found.parent,
            creation_time: required(found.creation_time, "creationTime")?
                .parse()
                .map_err(|_| damaged("has no time of creation"))?,
            state,
            memory_file: found
                .memory
                .and_then(|memory| memory.file)
                .ok_or_else(|| damaged("names no memory image"))?,
            disks: switched.into_iter().map(RecordedDisk::read).collect::<Result<_>>()?,
            manual: manual.into_iter().map(ManualDisk::read).collect::<Result<_>>()?,
            nvram: found.nvram.into_iter().map(RecordedNvram::read).collect::<Result<_>>()?,
            domain_xml,
        };
        // Recorded paths are absolute. A relative path would depend on the working directory.
        let overlays = record.disks.iter().map(|disk| ("overlay", &disk.overlay));
        let copies = record.nvram.iter().map(|nvram| ("copy of UEFI variables", &nvram.copy));
        for (what, path) in overlays.chain(copies).chain([("memory image", &record.memory_file)]) {
            check_path(what, path).map_err(|error| damaged(&format!("is damaged: {error}")))?;
        }
        Ok(record)
    }
}

impl RecordedDisk {
    fn read(disk: SnapshotDisk) -> Result<RecordedDisk> {
        let name = attribute(Some(disk.target).filter(|name| !name.is_empty()), "disk", "name")?;
        if !disk.has_source {
            fail!(InvalidDomainSnapshot, "disk '{name}' of a snapshot has no <source>");
        }
        let (image, format) = image(disk.image, &name)?;
        Ok(RecordedDisk {
            name,
            overlay: attribute(disk.device.or(disk.file), "source", "file")?,
            image,
            format,
            frozen: disk.frozen,
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
    fn read(disk: SnapshotDisk) -> Result<ManualDisk> {
        let name = attribute(Some(disk.target).filter(|name| !name.is_empty()), "disk", "name")?;
        let (source, format) = image(disk.image, &name)?;
        Ok(ManualDisk { name, source, format })
    }
}

impl RecordedNvram {
    fn read(copy: NvramElement) -> Result<RecordedNvram> {
        Ok(RecordedNvram {
            name: attribute(copy.name, "nvram", "name")?,
            copy: attribute(copy.file, "nvram", "file")?,
            original: attribute(copy.original, "nvram", "original")?,
            format: attribute(copy.format, "nvram", "format")?,
            content: copy.content,
        })
    }
}

/// The image with the snapshot's content of a disk, and its format.
fn image(image: Option<ImageElement>, disk: &str) -> Result<(String, String)> {
    match image {
        Some(ImageElement { file, format }) => {
            Ok((attribute(file, "image", "file")?, attribute(format, "image", "format")?))
        }
        None => fail!(InvalidDomainSnapshot, "disk '{disk}' of a snapshot has no <image>"),
    }
}

fn attribute(value: Option<String>, element: &str, name: &str) -> Result<String> {
    match value {
        Some(value) => Ok(value),
        None => fail!(
            InvalidDomainSnapshot,
            "<{element}> in the metadata of a snapshot has no attribute '{name}'"
        ),
    }
}
