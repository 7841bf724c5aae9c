// SPDX-License-Identifier: LGPL-2.1-or-later

//! Reads the `<domainsnapshot>` XML of a caller's request.

use super::names::{check_name, check_path};
use super::snapshot_xml::{MemoryElement, SnapshotDisk, SnapshotXml};
use super::xml;
use crate::error::{Result, fail};

/// A caller's request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// The snapshot's name; by default, the time.
    pub name: Option<String>,
    /// A text for people.
    pub description: Option<String>,
    /// The memory image.
    pub memory: MemoryRequest,
    /// The disks that the request names.
    pub disks: Vec<DiskRequest>,
}

/// `<memory snapshot= file=>`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum MemoryRequest {
    /// No setting, or external without a file: the backend chooses the path.
    #[default]
    Default,
    /// Memory is written to this file.
    External(String),
    /// `snapshot='no'`.
    No,
}

/// `snapshot=` of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Location {
    /// The disk gets an overlay.
    External,
    /// The disk is left to the storage hook.
    Manual,
    /// The disk is left out.
    No,
}

/// One `<disk>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskRequest {
    /// The disk's name: its target, qdev id, drive alias, node name or the path of its image.
    pub name: String,
    /// The location; by default that of the domain XML, else external.
    pub location: Option<Location>,
    /// The overlay's path; by default, it is made from the disk's.
    pub source: Option<String>,
    /// The overlay is on a block device (`type='block'`).
    pub on_device: bool,
}

impl Request {
    /// Reads `<domainsnapshot>`.
    pub fn parse(text: &str) -> Result<Request> {
        let SnapshotXml { name, description, memory, disks, .. } =
            SnapshotXml::parse(text, &xml::GIVEN)?;
        if let Some(name) = &name {
            check_name(name)?;
        }
        let disks = disks.unwrap_or_default().into_iter().map(disk).collect::<Result<_>>()?;
        Ok(Request { name, description, memory: memory_request(memory)?, disks })
    }
}

fn memory_request(memory: Option<MemoryElement>) -> Result<MemoryRequest> {
    let Some(MemoryElement { snapshot, file }) = memory else { return Ok(MemoryRequest::Default) };
    match (snapshot.as_deref(), file) {
        (None | Some("external"), Some(file)) => {
            check_path("memory snapshot file", &file)?;
            Ok(MemoryRequest::External(file))
        }
        (None | Some("external"), None) => Ok(MemoryRequest::Default),
        (Some("no"), None) => Ok(MemoryRequest::No),
        (Some("internal"), None) => fail!(
            OperationUnsupported,
            "internal memory snapshots are not supported for this guest: use <memory \
             snapshot='external' file='...'/>"
        ),
        (Some("no" | "internal"), Some(file)) => {
            fail!(XmlError, "memory file '{file}' requires external snapshot")
        }
        (Some(other), _) => fail!(XmlError, "unknown memory snapshot setting '{other}'"),
    }
}

fn disk(disk: SnapshotDisk) -> Result<DiskRequest> {
    let name = disk.target;
    if name.is_empty() {
        fail!(XmlError, "missing name from disk snapshot element");
    }
    let location = match disk.snapshot.as_deref() {
        None => None,
        Some("external") => Some(Location::External),
        Some("manual") => Some(Location::Manual),
        Some("no") => Some(Location::No),
        Some("internal") => fail!(
            OperationUnsupported,
            "internal snapshot of disk '{name}' is not supported for this guest: use \
             snapshot='external', or 'no' to leave the disk out"
        ),
        Some(other) => fail!(XmlError, "unknown disk snapshot setting '{other}' of disk '{name}'"),
    };
    let on_device = match disk.kind.as_deref() {
        None | Some("file") => false,
        Some("block") => true,
        Some(kind) => fail!(
            ConfigUnsupported,
            "external snapshot of disk '{name}' to storage of type '{kind}' is not supported: use \
             type='file', or type='block' with <source dev='...'/>"
        ),
    };
    match disk.driver.as_deref() {
        None | Some("qcow2") => {}
        Some(format) => {
            fail!(
                ConfigUnsupported,
                "external snapshot format for disk '{name}' is unsupported: {format}, use qcow2"
            )
        }
    }
    let source = if on_device { disk.device } else { disk.file };
    if let Some(source) = &source {
        check_path(&format!("external snapshot file of disk '{name}'"), source)?;
        if matches!(location, Some(Location::Manual | Location::No)) {
            fail!(
                XmlError,
                "file '{source}' for disk '{name}' requires use of external snapshot mode"
            );
        }
    } else if on_device && matches!(location, None | Some(Location::External)) {
        fail!(
            XmlError,
            "external snapshot of disk '{name}' to a block device names none: add <source \
             dev='...'/>"
        );
    }
    Ok(DiskRequest { name, location, source, on_device })
}
