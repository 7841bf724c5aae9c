// SPDX-License-Identifier: LGPL-2.1-or-later

//! `snapshot-revert` and `snapshot-delete`.

use std::path::PathBuf;

use clap::Args;
use instantsnap_core::engine::{RevertOptions, RevertPlan, prepare_revert_with};
use instantsnap_core::model::Memory;
use instantsnap_core::model::flags::{DeleteFlags, RevertFlags, delete, revert};
use serde_json::{Value, json};

use super::known::Tree;
use super::names::OneSnapshot;
use crate::failure::{Failure, Result};
use crate::guest::{Direct, Guest};
use crate::signals::uninterrupted;
use crate::{Context, output};

/// `snapshot-revert`.
#[derive(Args)]
pub struct Revert {
    #[command(flatten)]
    words: OneSnapshot,
    /// The guest runs afterwards
    #[arg(long, conflicts_with = "paused")]
    running: bool,
    /// The guest is paused afterwards
    #[arg(long)]
    paused: bool,
    /// Accept images that have changed since the snapshot
    #[arg(long)]
    force: bool,
    /// Make the UEFI variables from their template
    #[arg(long)]
    reset_nvram: bool,
    /// Load all of the memory before the guest runs (qmp: URIs only)
    #[arg(long, group = "memory")]
    full: bool,
    /// Let the guest run at once; its memory follows (qmp: URIs only)
    #[arg(long, group = "memory")]
    lazy: bool,
    /// Let QEMU map the sparse memory image, with the backends that --prepare --map names; QEMU 8.2
    /// or later (qmp: URIs only)
    #[arg(long, group = "memory")]
    map: bool,
    /// Only make the images for a new QEMU, and say what to start it with (qmp: URIs only)
    #[arg(long, conflicts_with_all = ["running", "paused", "force", "reset_nvram"])]
    prepare: bool,
    /// Where to make them; by default beside the snapshot's images
    #[arg(long, value_name = "DIRECTORY", requires = "prepare",
          value_hint = clap::ValueHint::DirPath)]
    directory: Option<PathBuf>,
}

impl Revert {
    /// Runs it.
    pub fn run(self, context: &Context) -> Result<()> {
        let (domain, snapshot) = self.words.get()?;
        let guest = context.guest(&domain)?;
        let name = meant(&guest, snapshot)?;
        if self.prepare {
            return match &guest {
                Guest::Qmp(direct) => self.prepare(direct, &name, context),
                Guest::Libvirt(_) => Err(Failure::Usage(
                    "--prepare is for qmp: URIs: libvirt starts the QEMU of its domains itself"
                        .into(),
                )),
            };
        }
        if matches!(guest, Guest::Libvirt(_)) && self.memory() != Memory::Auto {
            return Err(Failure::Usage(format!(
                "--{} is for qmp: URIs: a domain of libvirt's gets all of its memory first",
                self.memory().name()
            )));
        }
        let bits = [
            (self.running, revert::RUNNING),
            (self.paused, revert::PAUSED),
            (self.force, revert::FORCE),
            (self.reset_nvram, revert::RESET_NVRAM),
        ];
        let flags = RevertFlags::parse(sum(&bits))?;
        uninterrupted("a revert", || guest.revert(&name, flags, self.memory()))?;
        done(context, &name, "reverted")
    }

    /// How the memory is to come back.
    fn memory(&self) -> Memory {
        match (self.full, self.lazy, self.map) {
            (true, ..) => Memory::Full,
            (_, true, _) => Memory::Lazy,
            (.., true) => Memory::Map,
            _ => Memory::Auto,
        }
    }

    fn prepare(&self, direct: &Direct, name: &str, context: &Context) -> Result<()> {
        let options = RevertOptions {
            directory: self.directory.as_deref(),
            memory: self.memory(),
            ..RevertOptions::default()
        };
        let plan = prepare_revert_with(direct.store().directory(), name, options)?;
        let written = if context.json {
            output::json(&to_json(name, &plan))
        } else {
            let mut text = String::from("Start QEMU with -incoming defer and these images:\n");
            for disk in &plan.disks {
                text += &format!("  {}: {} ({})\n", disk.name, disk.file.display(), disk.format);
            }
            if !plan.memory_backends.is_empty() {
                text += "and with the memory image, by -machine memory-backend=ID or -numa \
                         node,memdev=ID as in the original:\n";
            }
            for backend in &plan.memory_backends {
                text += &format!("  -object {}\n", backend.object());
            }
            text += "Then load the memory: the same command without --prepare\n";
            output::print(&text)
        };
        // Nobody would know of the images.
        written.inspect_err(|_| plan.discard())
    }
}

fn to_json(name: &str, plan: &RevertPlan) -> Value {
    let disks = plan.disks.iter().map(|disk| {
        json!({
            "name": disk.name,
            "file": disk.file.display().to_string(),
            "format": disk.format,
            "backing_file": disk.backing_file,
        })
    });
    let backends = plan.memory_backends.iter().map(|backend| {
        json!({
            "id": backend.id,
            "file": backend.file.display().to_string(),
            "offset": backend.offset,
            "size": backend.size,
            "object": backend.object(),
        })
    });
    json!({
        "name": name,
        "disks": disks.collect::<Vec<_>>(),
        "memory_backends": backends.collect::<Vec<_>>(),
        "memory_file": plan.memory_file,
        "domain_xml": plan.domain_xml,
    })
}

/// `snapshot-delete`.
#[derive(Args)]
pub struct Delete {
    #[command(flatten)]
    words: OneSnapshot,
    /// Also delete its children, their children, and so on
    #[arg(long, conflicts_with = "children_only")]
    children: bool,
    /// Delete these, and not the snapshot itself
    #[arg(long)]
    children_only: bool,
    /// Delete only the metadata; all files stay
    #[arg(long)]
    metadata: bool,
}

impl Delete {
    /// Runs it.
    pub fn run(self, context: &Context) -> Result<()> {
        let (domain, snapshot) = self.words.get()?;
        let guest = context.guest(&domain)?;
        let name = meant(&guest, snapshot)?;
        let bits = [
            (self.children, delete::CHILDREN),
            (self.children_only, delete::CHILDREN_ONLY),
            (self.metadata, delete::METADATA_ONLY),
        ];
        let flags = DeleteFlags::parse(sum(&bits))?;
        uninterrupted("a deletion", || guest.delete(&name, flags))?;
        done(context, &name, if self.children_only { "children deleted" } else { "deleted" })
    }
}

/// The name of the snapshot that is meant, which exists.
fn meant(guest: &Guest, snapshot: Option<String>) -> Result<String> {
    let tree = Tree::read(guest)?;
    Ok(tree.named_or_current(snapshot.as_deref())?.name.clone())
}

fn sum(bits: &[(bool, u32)]) -> u32 {
    bits.iter().filter(|(is_set, _)| *is_set).fold(0, |sum, (_, bit)| sum | bit)
}

fn done(context: &Context, name: &str, what: &str) -> Result<()> {
    match (context.json, context.quiet) {
        (true, _) => output::json(&json!({ "name": name, "done": what })),
        (false, true) => Ok(()),
        (false, false) => output::line(&format!("Domain snapshot {name} {what}")),
    }
}
