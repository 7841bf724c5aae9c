// SPDX-License-Identifier: LGPL-2.1-or-later

//! Reads `<domainsnapshot>`: a caller's request, a record in a state directory, or a snapshot
//! definition of libvirt.
//!
//! All three have the same format, and each needs other parts of it. So every part is optional
//! here, and none is checked: [`Request`](super::Request), [`Record`](super::Record) and the
//! libvirt backend's definition check which parts exist, and what they contain.

use std::ops::Range;

use roxmltree::Node;

use super::domain::{self, Storage};
use super::frozen::Frozen;
use super::notes::Notes;
use super::xml::{self, Limits};
use crate::error::Result;

/// A `<domainsnapshot>`.
#[derive(Debug, Default)]
pub struct SnapshotXml {
    text: String,
    /// `<name>`.
    pub name: Option<String>,
    /// `<description>`.
    pub description: Option<String>,
    /// `<parent><name>`.
    pub parent: Option<String>,
    /// `<creationTime>`.
    pub creation_time: Option<String>,
    /// `<state>`.
    pub state: Option<String>,
    /// `<memory>`.
    pub memory: Option<MemoryElement>,
    /// `<disks>`.
    pub disks: Option<Vec<SnapshotDisk>>,
    /// `<revertDisks>` of libvirt 9.9 and later.
    pub revert_disks: Vec<SnapshotDisk>,
    /// The copies of UEFI variables in the `<disks>` of our own records.
    pub nvram: Vec<NvramElement>,
    /// `<domain>`.
    pub domain: Option<DomainElement>,
    /// `<inactiveDomain>`.
    pub inactive_domain: Option<DomainElement>,
    name_at: Option<Range<usize>>,
    parent_at: Option<Range<usize>>,
    revert_disks_at: Option<Range<usize>>,
}

/// `<memory>`.
#[derive(Debug, Default)]
pub struct MemoryElement {
    /// `snapshot=`.
    pub snapshot: Option<String>,
    /// `file=`.
    pub file: Option<String>,
}

/// A `<disk>` of `<disks>` or `<revertDisks>`.
#[derive(Debug)]
pub struct SnapshotDisk {
    /// `name=`: the target, or another name of the disk; empty if there is none.
    pub target: String,
    /// `snapshot=`: `external`, `internal`, `manual` or `no`.
    pub snapshot: Option<String>,
    /// `type=`.
    pub kind: Option<String>,
    /// `<driver type=>`.
    pub driver: Option<String>,
    /// `<source file=>`.
    pub file: Option<String>,
    /// `<source dev=>`.
    pub device: Option<String>,
    /// The name of the image in `<source>`: the path of a file or a device, or an NBD export's URI.
    pub overlay: Option<String>,
    /// `<image>` of our own records: the image with the snapshot's content.
    pub image: Option<ImageElement>,
    /// It has a `<source>`.
    pub has_source: bool,
    /// `<frozen>` of our own records: that image and those below, with their state at the instant.
    pub frozen: Vec<Frozen>,
    at: Range<usize>,
}

/// `<image>`.
#[derive(Debug)]
pub struct ImageElement {
    /// `file=`.
    pub file: Option<String>,
    /// `format=`.
    pub format: Option<String>,
}

/// `<nvram>`: a copy of UEFI variables.
#[derive(Debug)]
pub struct NvramElement {
    /// `name=`.
    pub name: Option<String>,
    /// `file=`.
    pub file: Option<String>,
    /// `original=`.
    pub original: Option<String>,
    /// `format=`.
    pub format: Option<String>,
    /// `content=`.
    pub content: Option<String>,
}

/// `<domain>` or `<inactiveDomain>`.
#[derive(Debug)]
pub struct DomainElement {
    /// `<name>`.
    pub name: Option<String>,
    /// `<os><type machine=>`.
    pub machine: Option<String>,
    /// Its disks that have a target.
    pub disks: Vec<domain::Disk>,
    /// The library's notes in its metadata.
    pub notes: Notes,
    at: Range<usize>,
}

impl SnapshotXml {
    /// Reads a document.
    pub fn parse(text: &str, limits: &Limits) -> Result<SnapshotXml> {
        let document = xml::parse(text, "domainsnapshot", limits)?;
        let root = document.root_element();
        let at = |name| xml::child(root, name).map(|node| node.range());
        let disks = xml::child(root, "disks");
        Ok(SnapshotXml {
            text: text.to_owned(),
            name: xml::text(root, "name"),
            description: xml::text(root, "description"),
            parent: xml::child(root, "parent").and_then(|parent| xml::text(parent, "name")),
            creation_time: xml::text(root, "creationTime"),
            state: xml::text(root, "state"),
            memory: xml::child(root, "memory").map(|memory| MemoryElement {
                snapshot: attribute(memory, "snapshot"),
                file: attribute(memory, "file"),
            }),
            disks: disks.map(disk_elements),
            revert_disks: xml::child(root, "revertDisks").map(disk_elements).unwrap_or_default(),
            nvram: disks.into_iter().flat_map(nvram_elements).collect(),
            domain: xml::child(root, "domain").map(domain_element),
            inactive_domain: xml::child(root, "inactiveDomain").map(domain_element),
            name_at: at("name"),
            parent_at: at("parent"),
            revert_disks_at: at("revertDisks"),
        })
    }

    /// The unchanged document.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The memory image, if the snapshot's memory is in a file.
    pub fn external_memory(&self) -> Option<&str> {
        let memory = self.memory.as_ref()?;
        memory.file.as_deref().filter(|_| memory.snapshot.as_deref() == Some("external"))
    }

    /// The unchanged text of `<domain>` or `<inactiveDomain>`.
    pub fn domain_text(&self, part: &DomainElement) -> &str {
        &self.text[part.at.clone()]
    }

    /// The document with these edits.
    pub fn edited(&self, edits: impl IntoIterator<Item = Edit>) -> String {
        let mut edits: Vec<Edit> = edits.into_iter().collect();
        edits.sort_by_key(|edit| edit.at.start);
        let mut text = self.text.clone();
        for Edit { at, element } in edits.into_iter().rev() {
            text.replace_range(at, &element);
        }
        text
    }

    /// The edit that puts this `<parent>` into the document.
    pub fn set_parent(&self, element: String) -> Option<Edit> {
        let after_name = || self.name_at.as_ref().map(|name| name.end..name.end);
        let at = self.parent_at.clone().or_else(after_name)?;
        Some(Edit { at, element })
    }

    /// The edit that removes `<revertDisks>`.
    pub fn remove_revert_disks(&self) -> Option<Edit> {
        let at = self.revert_disks_at.clone()?;
        Some(Edit { at, element: String::new() })
    }
}

/// An edit of a document: an element in place of another.
#[derive(Debug)]
pub struct Edit {
    at: Range<usize>,
    element: String,
}

impl SnapshotDisk {
    /// Whether the disk got an overlay.
    pub fn is_external(&self) -> bool {
        self.snapshot.as_deref() == Some("external")
    }

    /// Whether the snapshot of the disk is inside its image.
    pub fn is_internal(&self) -> bool {
        self.snapshot.as_deref() == Some("internal")
    }

    /// Whether the disk was left to a storage hook.
    pub fn is_manual(&self) -> bool {
        self.snapshot.as_deref() == Some("manual")
    }

    /// The overlay's format.
    pub fn format(&self) -> &str {
        self.driver.as_deref().unwrap_or("qcow2")
    }

    /// The edit that puts another `<disk>` into its place.
    pub fn replace(&self, element: String) -> Edit {
        Edit { at: self.at.clone(), element }
    }
}

impl DomainElement {
    /// The edit that puts another element into its place.
    pub fn replace(&self, element: String) -> Edit {
        Edit { at: self.at.clone(), element }
    }
}

fn attribute(node: Node, name: &str) -> Option<String> {
    node.attribute(name).map(str::to_owned)
}

fn disk_elements(list: Node) -> Vec<SnapshotDisk> {
    xml::children(list, "disk").map(disk_element).collect()
}

fn disk_element(node: Node) -> SnapshotDisk {
    let child = |name, attribute| xml::attribute(node, name, attribute).map(str::to_owned);
    SnapshotDisk {
        target: attribute(node, "name").unwrap_or_default(),
        snapshot: attribute(node, "snapshot"),
        kind: attribute(node, "type"),
        driver: child("driver", "type"),
        file: child("source", "file"),
        device: child("source", "dev"),
        overlay: Storage::of(node).and_then(|storage| storage.name().map(str::to_owned)),
        image: xml::child(node, "image").map(|image| ImageElement {
            file: attribute(image, "file"),
            format: attribute(image, "format"),
        }),
        has_source: xml::child(node, "source").is_some(),
        frozen: xml::children(node, "frozen").filter_map(Frozen::read).collect(),
        at: node.range(),
    }
}

fn nvram_elements<'a>(disks: Node<'a, '_>) -> impl Iterator<Item = NvramElement> {
    xml::children(disks, "nvram").map(|node| NvramElement {
        name: attribute(node, "name"),
        file: attribute(node, "file"),
        original: attribute(node, "original"),
        format: attribute(node, "format"),
        content: attribute(node, "content"),
    })
}

fn domain_element(node: Node) -> DomainElement {
    let machine = xml::child(node, "os").and_then(|os| xml::attribute(os, "type", "machine"));
    DomainElement {
        name: xml::text(node, "name"),
        machine: machine.map(str::to_owned),
        disks: domain::disks(node),
        notes: Notes::read(node),
        at: node.range(),
    }
}
