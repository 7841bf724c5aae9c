// SPDX-License-Identifier: LGPL-2.1-or-later

//! libvirt's snapshot definitions, and the edits of them that a revert or a delete needs.
//!
//! In a definition, the images of `<domain>` have the disks' state at the instant. `<disks>` names
//! the overlays that the guest went on with, and `<revertDisks>` (libvirt >= 9.9) those of the last
//! revert.

use super::volumes::{self, Volume};
use crate::backend::images::{self, Id, id};
use crate::error::{Error, Result, fail};
use crate::model::domain::{self, Disk, Domain, Source, Storage, domain_disks};
use crate::model::snapshot_writer::{self, excluded_disk, external_disk};
use crate::model::snapshot_xml::{DomainElement, Edit, SnapshotDisk, SnapshotXml};
use crate::model::{Notes, xml};

/// The definition of a snapshot.
#[derive(Debug)]
pub struct SnapshotDef {
    /// Its name.
    pub name: String,
    /// Its parent's name.
    pub parent: Option<String>,
    /// The guest's state at the instant.
    pub state: String,
    /// The memory image, if memory is in a file.
    pub memory: Option<String>,
    /// `<disks>`.
    pub disks: Vec<SnapshotDisk>,
    /// `<revertDisks>`.
    pub revert_disks: Vec<SnapshotDisk>,
    /// The disks of `<domain>`.
    pub images: Vec<Disk>,
    /// The disks of `<inactiveDomain>`.
    pub inactive_images: Vec<Disk>,
    /// The library's notes about the snapshot.
    pub notes: Notes,
    /// libvirt names some of its images by pool and volume.
    pub on_volumes: bool,
    xml: SnapshotXml,
}

/// Images that were replaced by another one.
#[derive(Clone, Debug)]
pub struct Replaced {
    /// The images that were replaced.
    pub images: Vec<Id>,
    /// The image that has their content now.
    pub by: Storage,
    /// That image's format.
    pub format: String,
}

impl SnapshotDef {
    /// The same definition, with paths in place of these volumes.
    pub fn with_paths(self, volumes: &[Volume]) -> Result<SnapshotDef> {
        let text = volumes::record_with_paths(self.xml(), volumes)?;
        if text == self.xml() {
            return Ok(self);
        }
        Ok(SnapshotDef { on_volumes: true, ..SnapshotDef::parse(self.name, &text)? })
    }

    /// Parses the definition of a snapshot of this name.
    pub fn parse(name: String, text: &str) -> Result<SnapshotDef> {
        let mut xml = SnapshotXml::parse(text, &xml::RECORDED).map_err(|error| {
            let step = format!("cannot read the record of snapshot '{name}'");
            Error::new(error.code, format!("{step}: {}", error.message))
        })?;
        let images = |domain: &Option<DomainElement>| {
            domain.as_ref().map(|domain| domain.disks.clone()).unwrap_or_default()
        };
        Ok(SnapshotDef {
            name,
            parent: xml.parent.clone(),
            state: xml.state.clone().unwrap_or_default(),
            memory: xml.external_memory().map(str::to_owned),
            disks: xml.disks.take().unwrap_or_default(),
            revert_disks: std::mem::take(&mut xml.revert_disks),
            images: images(&xml.domain),
            inactive_images: images(&xml.inactive_domain),
            notes: xml.domain.as_ref().map(|domain| domain.notes.clone()).unwrap_or_default(),
            on_volumes: false,
            xml,
        })
    }

    /// The definition's XML.
    pub fn xml(&self) -> &str {
        self.xml.text()
    }

    /// The disks that got an overlay, each with its disk of `<domain>`, which has the state at the
    /// instant.
    pub fn external(&self) -> impl Iterator<Item = (&SnapshotDisk, Option<&Disk>)> {
        let external = self.disks.iter().filter(|disk| disk.is_external());
        external.map(|disk| (disk, self.images.iter().find(|image| image.target == disk.target)))
    }

    /// Whether the snapshot has memory in a file and disks on overlays.
    pub fn is_ours(&self) -> bool {
        self.memory.is_some()
            && matches!(self.state.as_str(), "running" | "paused")
            && !self.is_internal()
    }

    /// Whether it has internal snapshots of disks.
    pub fn is_internal(&self) -> bool {
        self.disks.iter().any(|disk| disk.is_internal())
    }

    /// All overlays that the definition names, with their formats.
    pub fn overlays(&self) -> impl Iterator<Item = (&str, &str)> {
        let external =
            self.disks.iter().chain(&self.revert_disks).filter(|disk| disk.is_external());
        external.filter_map(|disk| Some((disk.overlay.as_deref()?, disk.format())))
    }

    /// All images that a revert to the snapshot needs.
    pub fn images(&self) -> impl Iterator<Item = &Disk> {
        self.images.iter().chain(&self.inactive_images)
    }

    /// Its `<domain>`, with these disks on these images.
    pub fn domain_on(&self, sources: &[Source]) -> Result<String> {
        match &self.xml.domain {
            Some(element) => {
                let domain = Notes::strip(self.xml.domain_text(element), "domain")?;
                Domain::parse(&domain)?.with_sources(sources)
            }
            None => fail!(
                InvalidDomainSnapshot,
                "the record of snapshot '{}' has no <domain>",
                self.name
            ),
        }
    }

    /// The machine type of its domain.
    pub fn machine(&self) -> Option<&str> {
        self.xml.domain.as_ref()?.machine.as_deref()
    }

    /// The domain's definition for its next start. These disks are put on these images if they are
    /// on the snapshot's images there too.
    pub fn config_on(&self, sources: &[Source]) -> Result<String> {
        let Some(element) = &self.xml.inactive_domain else { return self.domain_on(sources) };
        let file = |images: &[Disk], target: &str| {
            images.iter().find(|image| image.target == target).and_then(|image| image.file.clone())
        };
        let same: Vec<Source> = sources
            .iter()
            .filter(|source| {
                file(&self.images, source.target) == file(&self.inactive_images, source.target)
            })
            .cloned()
            .collect();
        Domain::parse(&as_domain(self.xml.domain_text(element)))?.with_sources(&same)
    }

    /// The definition with other overlays, by target, and with these notes. The overlays of earlier
    /// reverts are removed from it.
    pub fn with_overlays(&self, overlays: &[Source], notes: &Notes) -> Result<String> {
        let changed = self.disks.iter().filter_map(|disk| {
            let overlay = overlays.iter().find(|overlay| overlay.target == disk.target)?;
            Some(disk.replace(external_disk(overlay)))
        });
        let removed = self.xml.remove_revert_disks();
        Ok(self.xml.edited(changed.chain(removed).chain(self.put_notes(notes)?)))
    }

    /// The notes for the time after the definition names other overlays: its earlier overlays may
    /// have to stay.
    pub fn notes_afterwards(&self) -> Notes {
        let mut overlays: Vec<(String, String)> = self
            .overlays_of_disks()
            .filter(|(_, overlay)| images::is_there(overlay, "qcow2"))
            .map(|(target, overlay)| (target.to_owned(), overlay.to_owned()))
            .collect();
        overlays.sort();
        overlays.dedup();
        Notes { left: overlays, ..self.notes.clone() }
    }

    /// The definition without overlays. When libvirt deletes the metadata of a snapshot, it
    /// replaces the snapshot's overlays by its images in the definitions of its children; it does
    /// nothing if there are no overlays.
    pub fn without_overlays(&self) -> String {
        let disks = self.disks.iter();
        self.xml.edited(disks.map(|disk| disk.replace(excluded_disk(&disk.target))))
    }

    /// The definition with another parent.
    pub fn with_parent(&self, parent: &str) -> String {
        self.xml.edited(self.xml.set_parent(snapshot_writer::parent(parent)))
    }

    /// The definition with these notes in place of others.
    pub fn with_notes(&self, notes: &Notes) -> Result<String> {
        Ok(self.xml.edited(self.put_notes(notes)?))
    }

    /// The edit that puts the notes into `<domain>`. `None` if the definition has no `<domain>`.
    fn put_notes(&self, notes: &Notes) -> Result<Option<Edit>> {
        let Some(element) = &self.xml.domain else { return Ok(None) };
        let domain = notes.put_into(self.xml.domain_text(element), "domain")?;
        Ok(Some(element.replace(domain)))
    }

    /// The definition with replaced images; `None` if it names none of them.
    pub fn with_replaced(&self, replaced: &[Replaced]) -> Result<Option<String>> {
        let mut edits: Vec<Edit> = Vec::new();
        if let Some(element) = &self.xml.domain {
            let domain = domain_with_replaced(self.xml.domain_text(element), replaced)?;
            edits.extend(domain.map(|domain| element.replace(domain)));
        }
        if let Some(element) = &self.xml.inactive_domain {
            let domain = as_domain(self.xml.domain_text(element));
            let domain = domain_with_replaced(&domain, replaced)?;
            edits.extend(
                domain.map(|domain| element.replace(rename(&domain, "domain", "inactiveDomain"))),
            );
        }
        edits.extend(self.disks.iter().chain(&self.revert_disks).filter_map(|disk| {
            let replaced = find(replaced, disk.overlay.as_deref()?)?;
            let source = Source {
                target: &disk.target,
                storage: replaced.by.clone(),
                format: &replaced.format,
            };
            Some(disk.replace(external_disk(&source)))
        }));
        let edited = self.xml.edited(edits);
        Ok(Some(edited).filter(|edited| edited != self.xml()))
    }

    /// All overlays that the definition names, and those that it named before a revert, with the
    /// disks' targets.
    pub fn overlays_of_disks(&self) -> impl Iterator<Item = (&str, &str)> {
        let external =
            self.disks.iter().chain(&self.revert_disks).filter(|disk| disk.is_external());
        let named =
            external.filter_map(|disk| Some((disk.target.as_str(), disk.overlay.as_deref()?)));
        named.chain(self.notes.left.iter().map(|(target, file)| (target.as_str(), file.as_str())))
    }
}

/// A domain's XML with replaced images; `None` if it names none of them.
pub fn domain_with_replaced(domain_xml: &str, replaced: &[Replaced]) -> Result<Option<String>> {
    let images = domain_disks(domain_xml)?;
    let source = |image: &'_ Disk| {
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
    let changed = Domain::parse(domain_xml)?.with_sources(&sources)?;
    let changed = without_chains_of(&changed, replaced)?;
    Ok(Some(changed).filter(|changed| changed != domain_xml))
}

/// A domain's XML without the backing chains that name replaced images: libvirt reads the chains
/// from the images then.
fn without_chains_of(domain_xml: &str, replaced: &[Replaced]) -> Result<String> {
    let document = xml::parse(domain_xml, "domain", &xml::GIVEN)?;
    let disks = xml::children(document.root_element(), "devices")
        .flat_map(|devices| xml::children(devices, "disk"));
    let stale = |disk: &roxmltree::Node| {
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

fn find<'a>(replaced: &'a [Replaced], file: &str) -> Option<&'a Replaced> {
    replaced.iter().find(|replaced| replaced.images.contains(&id(file)))
}

fn as_domain(element: &str) -> String {
    rename(element, "inactiveDomain", "domain")
}

/// The element with another name.
fn rename(element: &str, from: &str, to: &str) -> String {
    let (open, close) = (format!("<{from}"), format!("</{from}>"));
    match element.trim().strip_prefix(&open).and_then(|rest| rest.strip_suffix(&close)) {
        Some(inner) => format!("<{to}{inner}</{to}>"),
        None => element.to_owned(),
    }
}
