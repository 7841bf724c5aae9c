// SPDX-License-Identifier: LGPL-2.1-or-later

//! All snapshots of a domain, as libvirt has them defined.

use super::managed_domain::ManagedDomain;
use super::snapshot_def::SnapshotDef;
use super::volumes::{self, Volume};
use crate::error::{Code, Error, Result};

/// All snapshots of a domain.
#[derive(Debug)]
pub struct SnapshotTree {
    /// Parents first.
    pub snapshots: Vec<SnapshotDef>,
    /// The name of the current one.
    pub current: Option<String>,
    /// The volumes that their disks are on.
    pub volumes: Vec<Volume>,
}

impl SnapshotTree {
    /// Reads all definitions.
    pub fn read(domain: &ManagedDomain) -> Result<SnapshotTree> {
        let texts = domain.snapshots();
        let texts =
            texts.map_err(|trouble| trouble.into_error("cannot read the domain's snapshots"))?;
        let parse = |(name, text)| SnapshotDef::parse(name, text);
        let snapshots = texts.all.into_iter().map(parse).collect::<Result<Vec<_>>>()?;
        let volumes = volumes::of_records(snapshots.iter().map(SnapshotDef::xml))?;
        let named = snapshots.into_iter().map(|snapshot| snapshot.with_paths(&volumes));
        let snapshots = named.collect::<Result<Vec<_>>>()?;
        Ok(SnapshotTree { snapshots, current: texts.current, volumes })
    }

    /// The snapshot of this name.
    pub fn get(&self, name: &str) -> Result<&SnapshotDef> {
        self.snapshots.iter().find(|snapshot| snapshot.name == name).ok_or_else(|| {
            Error::new(
                Code::NoDomainSnapshot,
                format!("no domain snapshot with matching name '{name}'"),
            )
        })
    }

    /// Whether it is the current one.
    pub fn is_current(&self, snapshot: &SnapshotDef) -> bool {
        self.current.as_ref() == Some(&snapshot.name)
    }

    /// Its children.
    pub fn children(&self, name: &str) -> impl Iterator<Item = &SnapshotDef> {
        self.snapshots.iter().filter(move |snapshot| snapshot.parent.as_deref() == Some(name))
    }

    /// The names of all that come after it, parents first.
    pub fn descendants<'a>(&'a self, name: &'a str) -> Vec<&'a str> {
        let mut found = vec![name];
        // A child comes after its parent.
        for snapshot in &self.snapshots {
            if snapshot.parent.as_deref().is_some_and(|parent| found.contains(&parent)) {
                found.push(&snapshot.name);
            }
        }
        found.split_off(1)
    }
}
