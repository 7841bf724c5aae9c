// SPDX-License-Identifier: LGPL-2.1-or-later

//! `snapshot-dumpxml`, `-info`, `-current` and `-parent`.

use clap::Args;
use instantsnap_core::error::Code;
use serde_json::json;

use super::known::Tree;
use super::names::{DomainWord, OneSnapshot, SnapshotWords};
use crate::failure::{Failure, Result};
use crate::{Context, output};

/// `snapshot-dumpxml`.
#[derive(Args)]
pub struct DumpXml {
    #[command(flatten)]
    words: SnapshotWords,
    /// Include passwords
    #[arg(long)]
    security_info: bool,
}

impl DumpXml {
    /// Runs it.
    pub fn run(self, context: &Context) -> Result<()> {
        let (domain, snapshot) = self.words.get(true)?;
        let guest = context.guest(&domain)?;
        let tree = Tree::read(&guest)?;
        let name = &tree.get(&snapshot.unwrap_or_default())?.name;
        let xml = guest.snapshot_xml(name, self.security_info)?;
        if context.json {
            return output::json(&json!({ "name": name, "xml": xml }));
        }
        output::line(xml.trim_end())
    }
}

/// `snapshot-info`.
#[derive(Args)]
pub struct Info {
    #[command(flatten)]
    words: OneSnapshot,
}

impl Info {
    /// Runs it.
    pub fn run(self, context: &Context) -> Result<()> {
        let (domain, snapshot) = self.words.get()?;
        let guest = context.guest(&domain)?;
        let tree = Tree::read(&guest)?;
        let known = tree.named_or_current(snapshot.as_deref())?;
        if context.json {
            return output::json(&tree.to_json(known));
        }
        let is_current = tree.current.as_deref() == Some(&known.name);
        let mut text = String::new();
        for (name, value) in [
            ("Name", known.name.clone()),
            ("Domain", guest.name().to_owned()),
            ("Current", if is_current { "yes" } else { "no" }.to_owned()),
            ("State", known.state.clone()),
            ("Location", known.location().to_owned()),
            ("Parent", known.parent.clone().unwrap_or_else(|| "-".to_owned())),
            ("Children", tree.children(Some(&known.name)).count().to_string()),
            ("Descendants", tree.descendants(&known.name).len().to_string()),
            ("Metadata", "yes".to_owned()),
        ] {
            text += &format!("{:15} {value}\n", format!("{name}:"));
        }
        output::print(&text)
    }
}

/// `snapshot-current`.
#[derive(Args)]
pub struct Current {
    #[command(flatten)]
    domain: DomainWord,
    /// Show its name only
    #[arg(long)]
    name: bool,
    /// Include passwords
    #[arg(long, conflicts_with = "name")]
    security_info: bool,
}

impl Current {
    /// Runs it.
    pub fn run(self, context: &Context) -> Result<()> {
        let guest = context.guest(&self.domain.get()?)?;
        let tree = Tree::read(&guest)?;
        let current = tree.get_current()?;
        match (context.json, self.name) {
            (true, _) => output::json(&tree.to_json(current)),
            (false, true) => output::line(&current.name),
            (false, false) => {
                output::line(guest.snapshot_xml(&current.name, self.security_info)?.trim_end())
            }
        }
    }
}

/// `snapshot-parent`.
#[derive(Args)]
pub struct Parent {
    #[command(flatten)]
    words: OneSnapshot,
}

impl Parent {
    /// Runs it.
    pub fn run(self, context: &Context) -> Result<()> {
        let (domain, snapshot) = self.words.get()?;
        let guest = context.guest(&domain)?;
        let tree = Tree::read(&guest)?;
        let known = tree.named_or_current(snapshot.as_deref())?;
        if context.json {
            return output::json(&json!({ "name": known.name, "parent": known.parent }));
        }
        match &known.parent {
            Some(parent) => output::line(parent),
            None => Err(Failure::not_found(
                Code::NoDomainSnapshot,
                format!("snapshot '{}' has no parent", known.name),
            )),
        }
    }
}
