//! The guest's devices between the plan and the instant.
//!
//! What is attached or detached meanwhile is in the memory image, and not in the domain XML beside it, or the other way round:
//! no QEMU that is started by that XML can load the image. QEMU refuses to attach and to detach devices while a migration is
//! under way, so once the guest is stopped and `migrate` was accepted, the devices are those of the image. They are looked at
//! before the plan and again when the guest runs again, which costs the pause nothing.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::error::{Result, fail};
use crate::guest::{Guest, PATIENCE};
use crate::monitor::{Command, Deadline};

/// What a guest has: devices, vCPUs, media in drives. Each by the words that messages call it by.
#[derive(Debug)]
pub struct Devices(BTreeSet<String>);

impl Devices {
    /// Looks at them.
    pub fn read(guest: &mut dyn Guest) -> Result<Devices> {
        let mut query = |command: &str, arguments: Value| {
            let step = format!("cannot ask for the guest's devices ({command})");
            guest.run(&step, Command::new(command, arguments), Deadline::after(PATIENCE))
        };
        let mut found = BTreeSet::new();
        for path in ["/machine/peripheral", "/machine/peripheral-anon"] {
            let entries = query("qom-list", json!({ "path": path }))?;
            found.extend(entries.as_array().into_iter().flatten().filter_map(device));
        }
        // Those that QEMU has begun with are not among them, and can be taken out all the same.
        let vcpus = query("query-cpus-fast", json!({}))?;
        found.extend(vcpus.as_array().into_iter().flatten().filter_map(|vcpu| {
            let path = vcpu["qom-path"].as_str()?;
            Some(format!("vCPU {} ({path})", vcpu["cpu-index"]))
        }));
        let blocks = query("query-block", json!({}))?;
        found.extend(blocks.as_array().into_iter().flatten().filter_map(medium));
        Ok(Devices(found))
    }

    /// Looks whether they are the same still.
    pub fn check(&self, guest: &mut dyn Guest) -> Result<()> {
        let now = Devices::read(guest)?.0;
        let change = match (now.difference(&self.0).next(), self.0.difference(&now).next()) {
            (Some(new), _) => format!("{new} was attached"),
            (None, Some(gone)) => format!("{gone} was detached"),
            (None, None) => return Ok(()),
        };
        fail!(
            OperationFailed,
            "{change} by another client, or by the guest, while the snapshot was being taken: its memory could not be loaded by \
             the domain that it was planned with; take the snapshot again"
        );
    }
}

fn device(entry: &Value) -> Option<String> {
    let kind = entry["type"].as_str()?.strip_prefix("child<")?.strip_suffix('>')?;
    Some(format!("device '{}' ({kind})", entry["name"].as_str()?))
}

/// Of what is written only that it is there: its images are the snapshot's affair.
fn medium(block: &Value) -> Option<String> {
    let (drive, inserted) = (block["qdev"].as_str()?, &block["inserted"]);
    if !inserted.is_object() {
        return None;
    }
    Some(match inserted["ro"] == true {
        true => format!("the medium '{}' of drive '{drive}'", inserted["file"].as_str()?),
        false => format!("the disk of drive '{drive}'"),
    })
}
