// SPDX-License-Identifier: LGPL-2.1-or-later

//! The snapshots of a guest, as their metadata describes them, and how they descend.

use instantsnap_core::error::{Code, Error};
use instantsnap_core::model::snapshot_xml::{SnapshotDisk, SnapshotXml};
use instantsnap_core::model::xml;
use serde_json::{Value, json};

use crate::failure::{Failure, Result, most_like};
use crate::guest::Guest;

/// A snapshot.
#[derive(Debug)]
pub struct Known {
    /// Its name.
    pub name: String,
    /// A text for people.
    pub description: Option<String>,
    /// The name of its parent.
    pub parent: Option<String>,
    /// The time in seconds since the epoch.
    pub creation_time: Option<u64>,
    /// The guest's state at the instant, or `disk-snapshot` if memory is not part of it.
    pub state: String,
    /// Whether it is in files of its own.
    pub is_external: bool,
    /// The memory image.
    pub memory_file: Option<String>,
    disks: Vec<Disk>,
}

/// A disk of a snapshot.
#[derive(Debug)]
struct Disk {
    name: String,
    /// Where its snapshot is: `external`, `internal`, `manual` or `no`.
    snapshot: Option<String>,
    overlay: Option<String>,
}

impl Known {
    /// Reads `<domainsnapshot>`.
    pub fn parse(text: &str) -> Result<Known> {
        let found = SnapshotXml::parse(text, &xml::RECORDED)?;
        let missing = |what: &str| {
            let message = format!("the metadata of a snapshot has no <{what}>");
            Failure::Failed(Error::new(Code::InvalidDomainSnapshot, message))
        };
        let memory_file = found.external_memory().map(str::to_owned);
        let disks = found.disks.unwrap_or_default();
        let is_external = memory_file.is_some()
            || disks.iter().any(|disk| disk.is_external() || disk.is_manual());
        let of_disk = |SnapshotDisk { target, snapshot, overlay, .. }| Disk {
            name: target,
            snapshot,
            overlay,
        };
        Ok(Known {
            name: found.name.ok_or_else(|| missing("name"))?,
            description: found.description,
            parent: found.parent,
            creation_time: found.creation_time.and_then(|time| time.trim().parse().ok()),
            state: found.state.ok_or_else(|| missing("state"))?,
            is_external,
            memory_file,
            disks: disks.into_iter().map(of_disk).collect(),
        })
    }

    /// libvirt's word for where it is.
    pub fn location(&self) -> &'static str {
        if self.is_external { "external" } else { "internal" }
    }
}

/// All snapshots of a guest.
pub struct Tree {
    /// The snapshots, each parent before its children.
    pub all: Vec<Known>,
    /// The name of the current one.
    pub current: Option<String>,
    domain: String,
}

impl Tree {
    /// Reads them.
    pub fn read(guest: &Guest) -> Result<Tree> {
        Ok(Tree {
            all: guest.snapshots()?,
            current: guest.current()?,
            domain: guest.name().to_owned(),
        })
    }

    /// The snapshot of this name.
    pub fn get(&self, name: &str) -> Result<&Known> {
        self.all.iter().find(|known| known.name == name).ok_or_else(|| {
            let names = self.all.iter().map(|known| known.name.as_str());
            let advice = match most_like(name, names) {
                Some(like) => format!("did you mean '{like}'?"),
                None if self.all.is_empty() => "it has none".to_owned(),
                None => format!("instantsnap snapshot-list {} shows them", self.domain),
            };
            Failure::not_found(
                Code::NoDomainSnapshot,
                format!("domain '{}' has no snapshot '{name}': {advice}", self.domain),
            )
        })
    }

    /// The current snapshot.
    pub fn get_current(&self) -> Result<&Known> {
        match &self.current {
            Some(name) => self.get(name),
            None => Err(Failure::not_found(
                Code::NoDomainSnapshot,
                format!("domain '{}' has no current snapshot", self.domain),
            )),
        }
    }

    /// The snapshot of this name, or the current one.
    pub fn named_or_current(&self, name: Option<&str>) -> Result<&Known> {
        name.map_or_else(|| self.get_current(), |name| self.get(name))
    }

    /// The children of a snapshot; of none: those without a parent that is known.
    pub fn children<'a>(&'a self, parent: Option<&'a str>) -> impl Iterator<Item = &'a Known> {
        self.all.iter().filter(move |known| self.parent(known) == parent)
    }

    fn parent<'a>(&'a self, known: &'a Known) -> Option<&'a str> {
        let parent = known.parent.as_deref()?;
        self.all.iter().any(|other| other.name == parent).then_some(parent)
    }

    /// The children of a snapshot, their children, and so on.
    pub fn descendants<'a>(&'a self, ancestor: &'a str) -> Vec<&'a Known> {
        let mut found: Vec<&Known> = self.children(Some(ancestor)).collect();
        let mut next = 0;
        while next < found.len() {
            let children = self.children(Some(&found[next].name));
            // Damaged metadata can have a circle.
            let is_new = |child: &&Known| !found.iter().any(|known| known.name == child.name);
            let fresh: Vec<&Known> = children.filter(is_new).collect();
            found.extend(fresh);
            next += 1;
        }
        found
    }

    /// A snapshot for programs.
    pub fn to_json(&self, known: &Known) -> Value {
        let disk = |disk: &Disk| {
            let Disk { name, snapshot, overlay } = disk;
            json!({ "name": name, "snapshot": snapshot, "file": overlay })
        };
        json!({
            "name": known.name,
            "domain": self.domain,
            "description": known.description,
            "current": self.current.as_deref() == Some(&known.name),
            "state": known.state,
            "location": known.location(),
            "parent": known.parent,
            "children": self.children(Some(&known.name)).count(),
            "descendants": self.descendants(&known.name).len(),
            "creation_time": known.creation_time,
            "memory_file": known.memory_file,
            "disks": known.disks.iter().map(disk).collect::<Vec<_>>(),
        })
    }
}
