// SPDX-License-Identifier: LGPL-2.1-or-later

//! The recovery commands of a snapshot of a libvirt domain, which use virsh.

use serde_json::{Value, json};

use super::overlays::Overlays;
use crate::backend::guest::{MergeCommands, RecoveryCommand, RecoveryCommands};
use crate::backend::overlay_file::OverlayFile;
use crate::model::DiskPlan;
use crate::tool;

/// virsh with a connection URI.
#[derive(Clone, Debug)]
pub struct Virsh {
    program: String,
    uri: String,
    tries: u32,
}

/// virsh, if it is installed and the URI has a daemon. `tries` is for how many seconds the daemon
/// may be unavailable.
pub fn virsh(uri: &str, tries: u32) -> Option<Virsh> {
    if uri.contains("/embed") {
        return None;
    }
    let program = tool::find("virsh")?.into_os_string().into_string().ok()?;
    Some(Virsh { program, uri: uri.into(), tries })
}

impl Virsh {
    fn run(&self, arguments: &[&str]) -> RecoveryCommand {
        let own = [&self.program, "--quiet", "--connect", &self.uri];
        let arguments = own.iter().chain(arguments).map(|word| (*word).to_owned());
        RecoveryCommand { arguments: arguments.collect(), then_discard: None }
    }
}

/// The recovery commands for a snapshot of the domain with this UUID.
pub fn commands(
    virsh: &Virsh,
    uuid: &str,
    restore: &[(&str, Value)],
    overlays: &Overlays,
    snapshot: &str,
) -> RecoveryCommands {
    let settings = restore.iter().map(|(name, arguments)| {
        let command = json!({ "execute": name, "arguments": arguments }).to_string();
        virsh.run(&["qemu-monitor-command", uuid, &command])
    });
    let forget =
        virsh.run(&["snapshot-delete", uuid, &format!("--snapshotname={snapshot}"), "--metadata"]);
    let merge = |(disk, file): (&DiskPlan, &OverlayFile)| {
        let (target, overlay) = (disk.drive.name(), &disk.overlay);
        // The overlay is named: if the disk was not switched, the command fails. The image below is
        // not named: libvirt can know it by another name than its path.
        let arguments =
            ["blockcommit", uuid, target, "--top", overlay, "--shallow", "--active", "--pivot"];
        MergeCommands {
            merge: RecoveryCommand { then_discard: file.known(), ..virsh.run(&arguments) },
            is_in_use: virsh.run(&["domblkinfo", uuid, overlay]),
            complaint: format!(
                "the caller that took snapshot '{snapshot}' of domain {uuid} was killed, and its \
                 overlay '{overlay}' of disk '{target}' could not be merged back into '{}': the \
                 domain goes on with it, and it must not be removed; merge it with `virsh \
                 blockcommit {uuid} {target} --shallow --active --pivot` when the cause is fixed",
                disk.drive.file
            ),
        }
    };
    RecoveryCommands {
        look: virsh.run(&["uri"]),
        tries: virsh.tries,
        resume: virsh.run(&["resume", uuid]),
        resume_all_the_same: virsh.run(&["qemu-monitor-command", uuid, r#"{"execute":"cont"}"#]),
        query_migrate: virsh.run(&["qemu-monitor-command", uuid, r#"{"execute":"query-migrate"}"#]),
        query_status: virsh.run(&["qemu-monitor-command", uuid, r#"{"execute":"query-status"}"#]),
        restore: settings.collect(),
        forget,
        merge: overlays.made().map(merge).collect(),
    }
}
