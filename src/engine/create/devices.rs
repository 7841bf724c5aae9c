// SPDX-License-Identifier: LGPL-2.1-or-later

//! Checks that no device is attached or detached between the plan and the instant.
//!
//! A device that is attached meanwhile is in the memory image, and not in the domain XML beside it;
//! for one that is detached it is the other way round. A QEMU that is started by that XML could not
//! load the image. QEMU refuses to attach and to detach devices while a migration is under way, so
//! once the guest is stopped and `migrate` was accepted, the devices are those of the image. They
//! are read before the plan and again when the guest runs again, so that the pause is not longer.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::backend::{DEFAULT_TIMEOUT, Guest};
use crate::deadline::Deadline;
use crate::error::{Result, fail};
use crate::monitor::{Command, Failure};

/// The guest's devices, vCPUs, and media in drives, each as messages name it.
#[derive(Debug)]
pub struct Devices(BTreeSet<String>);

impl Devices {
    /// Asks QEMU for them.
    pub fn read(guest: &mut dyn Guest) -> Result<Devices> {
        let mut query = |command: &str, arguments: Value| {
            let step = format!("cannot ask for the guest's devices ({command})");
            guest.run(&step, Command::new(command, arguments), Deadline::after(DEFAULT_TIMEOUT))
        };
        let mut found = BTreeSet::new();
        for path in ["/machine/peripheral", "/machine/peripheral-anon"] {
            let entries = query("qom-list", json!({ "path": path }))?;
            found.extend(entries.as_array().into_iter().flatten().filter_map(device));
        }
        // The vCPUs that QEMU was started with are not among the above, but can be unplugged too.
        let vcpus = query("query-cpus-fast", json!({}))?;
        found.extend(vcpus.as_array().into_iter().flatten().filter_map(|vcpu| {
            let path = vcpu["qom-path"].as_str()?;
            Some(format!("vCPU {} ({path})", vcpu["cpu-index"]))
        }));
        found.extend(media(guest)?);
        Ok(Devices(found))
    }

    /// Returns an error if the guest has other devices now.
    pub fn check(&self, guest: &mut dyn Guest) -> Result<()> {
        let now = Devices::read(guest)?.0;
        let change = match (now.difference(&self.0).next(), self.0.difference(&now).next()) {
            (Some(new), _) => format!("{new} was attached"),
            (None, Some(gone)) => format!("{gone} was detached"),
            (None, None) => return Ok(()),
        };
        fail!(
            OperationFailed,
            "{change} by another client, or by the guest, while the snapshot was being taken: its \
             memory could not be loaded by the domain that it was planned with; take the snapshot \
             again"
        );
    }
}

fn device(entry: &Value) -> Option<String> {
    let kind = entry["type"].as_str()?.strip_prefix("child<")?.strip_suffix('>')?;
    Some(format!("device '{}' ({kind})", entry["name"].as_str()?))
}

/// The media in the guest's drives. A writable disk is listed without its file, because the
/// snapshot itself changes that.
///
/// The human monitor is asked: `query-block` nests each image in the one above it, which can be
/// deeper than libvirt passes on.
fn media(guest: &mut dyn Guest) -> Result<Vec<String>> {
    let command = Command::new("human-monitor-command", json!({ "command-line": "info block" }));
    match guest.execute(command, Deadline::after(DEFAULT_TIMEOUT)) {
        Ok(reply) => Ok(read_media(reply.as_str().unwrap_or_default())),
        // This QEMU was built without the human monitor.
        Err(Failure::Refused(class, _)) if class == "CommandNotFound" => Ok(Vec::new()),
        Err(failure) => Err(failure.into_error("cannot ask for the guest's devices (info block)")),
    }
}

fn read_media(info: &str) -> Vec<String> {
    let mut media = Vec::new();
    let mut medium = None;
    for line in info.lines() {
        if let Some(drive) = line.trim_start().strip_prefix("Attached to:") {
            let drive = drive.trim();
            media.extend(medium.take().map(|medium: &str| match medium.rsplit_once(" (") {
                Some((file, options)) if options.contains("read-only") => {
                    format!("the medium '{file}' of drive '{drive}'")
                }
                _ => format!("the disk of drive '{drive}'"),
            }));
        } else if !line.starts_with(char::is_whitespace) {
            medium = line
                .split_once(": ")
                .map(|(_, medium)| medium)
                .filter(|medium| *medium != "[not inserted]");
        }
    }
    media
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn media_are_read_as_qemu_tells_of_them() {
        let info = "d0 (#block159): /images/d: isk (1).qcow2 (qcow2)\r\n    Attached to:      /machine/peripheral/vda/x\r\n    \
                    Cache mode:       writeback\r\n\r\nfree (#block2): /images/f (raw)\r\n    Cache mode:       writeback\r\n\r\n\
                    cd (#block3): /images/a.iso (raw, read-only)\r\n    Attached to:      cd\r\n    Removable device: not \
                    locked, tray closed\r\n\r\nfd: [not inserted]\r\n    Attached to:      fd\r\n";
        let found = [
            "the disk of drive '/machine/peripheral/vda/x'",
            "the medium '/images/a.iso' of drive 'cd'",
        ];
        assert_eq!(read_media(info), found);
    }
}
