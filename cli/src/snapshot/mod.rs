// SPDX-License-Identifier: LGPL-2.1-or-later

//! The commands for snapshots, spelled as virsh spells them.

mod create;
mod follow;
mod known;
mod list;
mod names;
mod remove;
mod show;
mod spec;

use clap::Subcommand;

pub use known::Known;

use crate::Context;
use crate::examples;
use crate::failure::Result;

/// A command for snapshots.
#[derive(Subcommand)]
pub enum Snapshot {
    /// Take an instant snapshot, by arguments
    ///
    /// A running guest is snapshotted at once, memory and disks, and runs on while its memory is
    /// written (LIVE with INSTANT). Each disk gets an overlay beside its image, named as libvirt
    /// names it (vm1.qcow2: vm1.NAME). The memory of a domain of libvirt's goes beside its first
    /// disk (DOMAIN.NAME.mem), that of a QEMU by QMP into its state directory (NAME.mem).
    ///
    /// Ctrl-C undoes the snapshot: the guest runs on, as before.
    #[command(name = "snapshot-create-as",
              override_usage = "instantsnap snapshot-create-as [OPTIONS] DOMAIN [NAME \
                                [DESCRIPTION [DISKSPEC]...]]",
              after_help = examples::of("snapshot-create-as"))]
    CreateAs(create::CreateAs),
    /// Take an instant snapshot, by an XML file
    ///
    /// The snapshot is taken as by snapshot-create-as. Without a file, everything has its default.
    #[command(name = "snapshot-create",
              override_usage = "instantsnap snapshot-create [OPTIONS] DOMAIN [XMLFILE]",
              after_help = examples::of("snapshot-create"))]
    Create(create::Create),
    /// List a guest's snapshots
    #[command(name = "snapshot-list",
              override_usage = "instantsnap snapshot-list [OPTIONS] DOMAIN",
              after_help = examples::of("snapshot-list"))]
    List(list::List),
    /// Show a snapshot's XML
    #[command(name = "snapshot-dumpxml",
              override_usage = "instantsnap snapshot-dumpxml [OPTIONS] DOMAIN SNAPSHOT",
              after_help = examples::of("snapshot-dumpxml"))]
    Dumpxml(show::DumpXml),
    /// Show what a snapshot is
    #[command(name = "snapshot-info",
              override_usage = "instantsnap snapshot-info [OPTIONS] DOMAIN {SNAPSHOT | \
                                --current}",
              after_help = examples::of("snapshot-info"))]
    Info(show::Info),
    /// Show the current snapshot: the parent of the next one
    #[command(name = "snapshot-current",
              override_usage = "instantsnap snapshot-current [OPTIONS] DOMAIN",
              after_help = examples::of("snapshot-current"))]
    Current(show::Current),
    /// Show the name of a snapshot's parent
    #[command(name = "snapshot-parent",
              override_usage = "instantsnap snapshot-parent [OPTIONS] DOMAIN {SNAPSHOT | \
                                --current}",
              after_help = examples::of("snapshot-parent"))]
    Parent(show::Parent),
    /// Revert a guest to a snapshot
    ///
    /// What the guest has done since the snapshot that it is on now is lost.
    ///
    /// A domain of libvirt's is reverted as a whole. The QEMU of a qmp: URI is the user's own, so
    /// that takes three steps: --prepare makes a fresh image for each disk; the user starts QEMU
    /// with these images and `-incoming defer`; without --prepare, the command loads the
    /// snapshot's memory into it.
    #[command(name = "snapshot-revert",
              override_usage = "instantsnap snapshot-revert [OPTIONS] DOMAIN {SNAPSHOT | \
                                --current}",
              after_help = examples::of("snapshot-revert"))]
    Revert(remove::Revert),
    /// Delete a snapshot; the guest loses nothing and runs on
    ///
    /// What the guest has written since the snapshot is merged into the images below, and the
    /// snapshot's files are removed.
    #[command(name = "snapshot-delete",
              override_usage = "instantsnap snapshot-delete [OPTIONS] DOMAIN {SNAPSHOT | \
                                --current}",
              after_help = examples::of("snapshot-delete"))]
    Delete(remove::Delete),
}

/// Runs a command.
pub fn run(command: Snapshot, context: &Context) -> Result<()> {
    match command {
        Snapshot::CreateAs(command) => command.run(context),
        Snapshot::Create(command) => command.run(context),
        Snapshot::List(command) => command.run(context),
        Snapshot::Dumpxml(command) => command.run(context),
        Snapshot::Info(command) => command.run(context),
        Snapshot::Current(command) => command.run(context),
        Snapshot::Parent(command) => command.run(context),
        Snapshot::Revert(command) => command.run(context),
        Snapshot::Delete(command) => command.run(context),
    }
}
