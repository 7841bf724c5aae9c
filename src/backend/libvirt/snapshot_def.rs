// SPDX-License-Identifier: LGPL-2.1-or-later

//! A domain's snapshots as libvirt has them recorded, and the edits of their records that a revert
//! or a delete needs.
//!
//! In a record the images of `<domain>` are the disks' state at the instant; `<disks>` names the
//! overlays that the guest went on with, and `<revertDisks>` (libvirt >= 9.9) those of the last
//! revert.

use std::ops::Range;

use roxmltree::Node;

use super::volumes::{self, Volume};
use crate::backend::images::{self, Id, id};
use crate::error::{Error, Result, fail};
pub use crate::model::domain::Disk as DiskImage;
use crate::model::domain::{self, Source, Storage};
use crate::model::snapshot_writer::{excluded_disk, external_disk};
use crate::model::{self, Notes, xml};

/// A snapshot of a domain.
#[derive(Debug)]
pub struct SnapshotDef {
    /// Its name.
    pub name: String,
    /// Its parent's name.
    pub parent: Option<String>,
    /// The guest's state at the instant.
    pub state: String,
    /// The memory image, where it is a file of its own.
    pub memory: Option<String>,
    /// `<disks>`.
    pub disks: Vec<SnapshotDisk>,
    /// `<revertDisks>`.
    pub revert_disks: Vec<SnapshotDisk>,
    /// The disks of `<domain>`.
    pub images: Vec<DiskImage>,
    /// The disks of `<inactiveDomain>`.
    pub inactive_images: Vec<DiskImage>,
    /// What we have noted down of it.
    pub notes: Notes,
    /// libvirt calls images of it by pool and volume.
    pub on_volumes: bool,
    xml: String,
}

/// What a snapshot did with a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotDisk {
    /// Its target.
    pub target: String,
    /// `external`, `internal`, `manual` or `no`.
    pub location: String,
    /// The overlay.
    pub overlay: Option<String>,
    /// Its format.
    pub format: String,
}

/// An image that another one has taken the place of.
#[derive(Clone, Debug)]
pub struct Replaced {
    /// It, and others to which the same happened.
    pub images: Vec<Id>,
    /// The image that has its content now.
    pub by: Storage,
    /// That image's format.
    pub format: String,
}

impl SnapshotDef {
    /// It, with paths in the place of these volumes.
    pub fn with_paths(self, volumes: &[Volume]) -> Result<SnapshotDef> {
        let text = volumes::record_with_paths(&self.xml, volumes)?;
        if text == self.xml {
            return Ok(self);
        }
        Ok(SnapshotDef { on_volumes: true, ..SnapshotDef::parse(self.name, text)? })
    }

    /// Of a snapshot of this name, its XML.
    pub fn parse(name: String, text: String) -> Result<SnapshotDef> {
        let step = format!("cannot read the record of snapshot '{name}'");
        let document = xml::parse(&text, "domainsnapshot", &xml::RECORDED)
            .map_err(|error| Error::new(error.code, format!("{step}: {}", error.message)))?;
        let root = document.root_element();
        let memory = xml::child(root, "memory")
            .filter(|memory| memory.attribute("snapshot") == Some("external"));
        let snapshot_disks =
            |element| xml::child(root, element).map(snapshot_disks).unwrap_or_default();
        let images = |element| xml::child(root, element).map(domain::disks).unwrap_or_default();
        Ok(SnapshotDef {
            name,
            parent: xml::child(root, "parent").and_then(|parent| xml::text(parent, "name")),
            state: xml::text(root, "state").unwrap_or_default(),
            memory: memory.and_then(|memory| memory.attribute("file")).map(str::to_owned),
            disks: snapshot_disks("disks"),
            revert_disks: snapshot_disks("revertDisks"),
            images: images("domain"),
            inactive_images: images("inactiveDomain"),
            notes: xml::child(root, "domain").map(Notes::read).unwrap_or_default(),
            on_volumes: false,
            xml: text.clone(),
        })
    }

    /// The record as it stands.
    pub fn xml(&self) -> &str {
        &self.xml
    }

    /// The disks that got an overlay, with their state at the instant.
    pub fn external(&self) -> impl Iterator<Item = (&SnapshotDisk, Option<&DiskImage>)> {
        let external = self.disks.iter().filter(|disk| disk.location == "external");
        external.map(|disk| (disk, self.images.iter().find(|image| image.target == disk.target)))
    }

    /// Whether it is one of memory in a file and disks on overlays.
    pub fn is_ours(&self) -> bool {
        self.memory.is_some()
            && matches!(self.state.as_str(), "running" | "paused")
            && !self.is_internal()
    }

    /// Whether something of it is inside of images.
    pub fn is_internal(&self) -> bool {
        self.disks.iter().any(|disk| disk.location == "internal")
    }

    /// All overlays that the record names, with their formats.
    pub fn overlays(&self) -> impl Iterator<Item = (&str, &str)> {
        let external =
            self.disks.iter().chain(&self.revert_disks).filter(|disk| disk.location == "external");
        external.filter_map(|disk| Some((disk.overlay.as_deref()?, disk.format.as_str())))
    }

    /// All images that a domain needs that is brought back to it.
    pub fn images(&self) -> impl Iterator<Item = &DiskImage> {
        self.images.iter().chain(&self.inactive_images)
    }

    /// Its `<domain>`, with these disks on these images.
    pub fn domain_on(&self, sources: &[Source]) -> Result<String> {
        match self.part("domain")? {
            Some(range) => {
                let domain = Notes::strip(&self.xml[range], "domain")?;
                model::Domain::parse(&domain)?.with_sources(sources)
            }
            None => fail!(
                InvalidDomainSnapshot,
                "the record of snapshot '{}' has no <domain>",
                self.name
            ),
        }
    }

    /// The machine type of its domain.
    pub fn machine(&self) -> Result<Option<String>> {
        let document = xml::parse(&self.xml, "domainsnapshot", &xml::RECORDED)?;
        let os = xml::child(document.root_element(), "domain")
            .and_then(|domain| xml::child(domain, "os"));
        Ok(os.and_then(|os| xml::attribute(os, "type", "machine")).map(str::to_owned))
    }

    /// What its domain is to be at its next start, with these disks on these images where they are
    /// on the snapshot's.
    pub fn config_on(&self, sources: &[Source]) -> Result<String> {
        let Some(range) = self.part("inactiveDomain")? else { return self.domain_on(sources) };
        let file = |images: &[DiskImage], target: &str| {
            images.iter().find(|image| image.target == target).and_then(|image| image.file.clone())
        };
        let same: Vec<Source> = sources
            .iter()
            .filter(|source| {
                file(&self.images, source.target) == file(&self.inactive_images, source.target)
            })
            .cloned()
            .collect();
        model::Domain::parse(&as_domain(&self.xml[range]))?.with_sources(&same)
    }

    /// The record with other overlays, by target; those of earlier reverts are forgotten.
    pub fn with_overlays(&self, overlays: &[Source]) -> Result<String> {
        self.edited(|root, edits| {
            edits.extend(xml::child(root, "revertDisks").map(|node| (node.range(), String::new())));
            for node in
                xml::child(root, "disks").into_iter().flat_map(|disks| xml::children(disks, "disk"))
            {
                if let Some(overlay) =
                    overlays.iter().find(|overlay| Some(overlay.target) == node.attribute("name"))
                {
                    edits.push((node.range(), external_disk(overlay)));
                }
            }
            Ok(())
        })
    }

    /// What is noted down of it once it names other overlays: those of before may have to stay.
    pub fn notes_afterwards(&self) -> Notes {
        let mut left: Vec<(String, String)> = self
            .overlays_of_disks()
            .filter(|(_, overlay)| images::is_there(overlay, "qcow2"))
            .map(|(target, overlay)| (target.to_owned(), overlay.to_owned()))
            .collect();
        left.sort();
        left.dedup();
        Notes { left, ..self.notes.clone() }
    }

    /// The record without overlays. libvirt, when it forgets a snapshot, puts its images in the
    /// place of its overlays in the records of its children: not of one without overlays.
    pub fn without_overlays(&self) -> Result<String> {
        self.edited(|root, edits| {
            for node in
                xml::child(root, "disks").into_iter().flat_map(|disks| xml::children(disks, "disk"))
            {
                let name = node.attribute("name").unwrap_or_default();
                edits.push((node.range(), excluded_disk(name)));
            }
            Ok(())
        })
    }

    /// The record where images were replaced; `None` where it names none of them.
    pub fn with_replaced(&self, replaced: &[Replaced]) -> Result<Option<String>> {
        let edited = self.edited(|root, edits| {
            for element in ["domain", "inactiveDomain"] {
                if let Some(node) = xml::child(root, element) {
                    replace_in_domain(node, replaced, edits)?;
                }
            }
            let lists = ["disks", "revertDisks"]
                .into_iter()
                .filter_map(|element| xml::child(root, element));
            for node in lists.flat_map(|list| xml::children(list, "disk")) {
                let disk = snapshot_disk(node);
                if let Some(replaced) =
                    disk.overlay.as_deref().and_then(|overlay| find(replaced, overlay))
                {
                    let source = Source {
                        target: &disk.target,
                        storage: replaced.by.clone(),
                        format: &replaced.format,
                    };
                    edits.push((node.range(), external_disk(&source)));
                }
            }
            Ok(())
        })?;
        Ok(Some(edited).filter(|edited| *edited != self.xml))
    }

    /// All overlays that it names, and those that it named before it was reverted to; with their
    /// disks.
    pub fn overlays_of_disks(&self) -> impl Iterator<Item = (&str, &str)> {
        let external =
            self.disks.iter().chain(&self.revert_disks).filter(|disk| disk.location == "external");
        let named =
            external.filter_map(|disk| Some((disk.target.as_str(), disk.overlay.as_deref()?)));
        named.chain(self.notes.left.iter().map(|(target, file)| (target.as_str(), file.as_str())))
    }

    fn part(&self, element: &str) -> Result<Option<Range<usize>>> {
        let document = xml::parse(&self.xml, "domainsnapshot", &xml::RECORDED)?;
        Ok(xml::child(document.root_element(), element).map(|node| node.range()))
    }

    fn edited(&self, edit: impl FnOnce(Node, &mut Edits) -> Result<()>) -> Result<String> {
        let document = xml::parse(&self.xml, "domainsnapshot", &xml::RECORDED)?;
        let mut edits = Edits::new();
        edit(document.root_element(), &mut edits)?;
        edits.sort_by_key(|(range, _)| range.start);
        let mut text = self.xml.clone();
        for (range, replacement) in edits.into_iter().rev() {
            text.replace_range(range, &replacement);
        }
        Ok(text)
    }
}

/// A record with these notes in the place of others. One without a `<domain>` stays as it is.
pub fn noted(record_xml: &str, notes: &Notes) -> Result<String> {
    let document = xml::parse(record_xml, "domainsnapshot", &xml::RECORDED)?;
    let Some(domain) = xml::child(document.root_element(), "domain").map(|domain| domain.range())
    else {
        return Ok(record_xml.to_owned());
    };
    let mut text = record_xml.to_owned();
    text.replace_range(domain.clone(), &notes.put_into(&record_xml[domain], "domain")?);
    Ok(text)
}

type Edits = Vec<(Range<usize>, String)>;

/// The disks of a domain's XML.
pub fn domain_images(domain_xml: &str) -> Result<Vec<DiskImage>> {
    let document = xml::parse(domain_xml, "domain", &xml::GIVEN)?;
    Ok(domain::disks(document.root_element()))
}

/// A domain's XML where images were replaced; `None` where it names none of them.
pub fn domain_with_replaced(domain_xml: &str, replaced: &[Replaced]) -> Result<Option<String>> {
    let images = domain_images(domain_xml)?;
    let source = |image: &'_ DiskImage| {
        let replaced = find(replaced, image.file.as_deref()?)?;
        Some((image.target.clone(), replaced))
    };
    let sources: Vec<_> = images.iter().filter_map(source).collect();
    let sources: Vec<Source> = sources
        .iter()
        .map(|(target, replaced)| Source {
            target,
            storage: replaced.by.clone(),
            format: &replaced.format,
        })
        .collect();
    let changed = model::Domain::parse(domain_xml)?.with_sources(&sources)?;
    let changed = without_chains_of(&changed, replaced)?;
    Ok(Some(changed).filter(|changed| changed != domain_xml))
}

/// Without what a disk tells of the images below its own, where those were replaced: libvirt finds
/// out itself.
fn without_chains_of(domain_xml: &str, replaced: &[Replaced]) -> Result<String> {
    let document = xml::parse(domain_xml, "domain", &xml::GIVEN)?;
    let disks = xml::children(document.root_element(), "devices")
        .flat_map(|devices| xml::children(devices, "disk"));
    let stale = |disk: &Node| {
        domain::disk(*disk)
            .is_some_and(|image| image.backing.iter().any(|file| find(replaced, file).is_some()))
    };
    let chains: Vec<_> =
        disks.filter(stale).filter_map(|disk| xml::child(disk, "backingStore")).collect();
    let mut text = domain_xml.to_owned();
    for chain in chains.into_iter().rev() {
        text.replace_range(chain.range(), "");
    }
    Ok(text)
}

fn replace_in_domain(node: Node, replaced: &[Replaced], edits: &mut Edits) -> Result<()> {
    let text = &node.document().input_text()[node.range()];
    if let Some(domain) = domain_with_replaced(&as_domain(text), replaced)? {
        let name = node.tag_name().name();
        edits.push((
            node.range(),
            if name == "domain" { domain } else { rename(&domain, "domain", name) },
        ));
    }
    Ok(())
}

fn find<'a>(replaced: &'a [Replaced], file: &str) -> Option<&'a Replaced> {
    replaced.iter().find(|replaced| replaced.images.contains(&id(file)))
}

fn as_domain(element: &str) -> String {
    rename(element, "inactiveDomain", "domain")
}

/// An element under another name.
fn rename(element: &str, from: &str, to: &str) -> String {
    let (open, close) = (format!("<{from}"), format!("</{from}>"));
    match element.trim().strip_prefix(&open).and_then(|rest| rest.strip_suffix(&close)) {
        Some(inner) => format!("<{to}{inner}</{to}>"),
        None => element.to_owned(),
    }
}

fn snapshot_disks(list: Node) -> Vec<SnapshotDisk> {
    xml::children(list, "disk").map(snapshot_disk).collect()
}

fn snapshot_disk(node: Node) -> SnapshotDisk {
    SnapshotDisk {
        target: node.attribute("name").unwrap_or_default().into(),
        location: node.attribute("snapshot").unwrap_or_default().into(),
        overlay: name(node),
        format: xml::attribute(node, "driver", "type").unwrap_or("qcow2").into(),
    }
}

/// What the image of a disk, or one below it, is called.
fn name(image: Node) -> Option<String> {
    Storage::of(image)?.name().map(str::to_owned)
}
