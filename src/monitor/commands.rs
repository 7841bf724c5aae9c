// SPDX-License-Identifier: LGPL-2.1-or-later

//! Typed functions for the QMP commands that the engine and the backends use.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::command::{Command, Execute, Failure};
use super::json::Json;
use crate::deadline::Deadline;
use crate::error::{Code, Error, Result};

/// The guest's state, as `query-status` reports it.
#[derive(Clone, Debug, Deserialize)]
pub struct Status {
    /// The vCPUs run.
    pub running: bool,
    /// QEMU's name of the state: `running`, `paused`, `inmigrate`, ...
    pub status: String,
}

/// A migration, as `query-migrate` reports it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct Migration {
    /// The migration's state; absent before the first migration.
    pub status: Option<String>,
    /// The reason why it failed.
    pub error_desc: Option<String>,
    /// The reasons why the guest cannot be migrated.
    pub blocked_reasons: Vec<String>,
    /// The progress of its memory.
    pub ram: Option<MigrationRam>,
    /// How long the setup took, in milliseconds.
    setup_time: u64,
}

/// `ram` of `query-migrate`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct MigrationRam {
    normal: u64,
    duplicate: u64,
    /// The bytes of the stream that QEMU has sent.
    pub transferred: u64,
    /// The bytes of the guest's memory that are not saved yet.
    pub remaining: u64,
    /// The size of a page in bytes.
    pub page_size: u64,
}

impl MigrationRam {
    /// The least number of bytes that the stream has: `transferred` counts some of them twice.
    pub fn least(&self) -> u64 {
        self.normal * self.page_size
    }
}

/// The state of a migration, simplified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// There is no migration.
    None,
    /// The migration has begun, and not ended.
    UnderWay,
    /// The migration has succeeded.
    Completed,
    /// The migration has failed or was cancelled.
    Failed,
}

impl Migration {
    /// The migration's state.
    pub fn progress(&self) -> Progress {
        match self.status.as_deref() {
            None | Some("none") => Progress::None,
            Some("completed") => Progress::Completed,
            Some("failed" | "cancelled") => Progress::Failed,
            Some(_) => Progress::UnderWay,
        }
    }

    /// Whether pages have been saved. For a background snapshot this proves that write tracking is
    /// armed. The status `active` does not prove it: QEMU sets that before it saves the devices and
    /// arms.
    pub fn has_pages(&self) -> bool {
        self.ram.as_ref().is_some_and(|ram| ram.normal + ram.duplicate > 0)
    }

    /// Whether the migration sets up, and has not begun to save devices.
    pub fn is_setting_up(&self) -> bool {
        self.status.as_deref() == Some("setup")
    }

    /// Whether QEMU is stopping the guest, saving its devices and arming write tracking. That takes
    /// only a moment.
    pub fn is_between_setup_and_armed(&self) -> bool {
        self.progress() == Progress::UnderWay && !self.is_setting_up() && !self.has_pages()
    }

    /// How long the setup took; zero until it has ended.
    pub fn setup_time(&self) -> Duration {
        Duration::from_millis(self.setup_time)
    }

    /// The reason why it failed, as far as QEMU reports it.
    pub fn reason(&self) -> &str {
        match (&self.error_desc, self.status.as_deref()) {
            (Some(reason), _) => reason,
            (None, Some("cancelled")) => "it was cancelled",
            (None, _) => "QEMU gives no reason",
        }
    }
}

fn read<T: for<'a> Deserialize<'a>>(command: &str, reply: &Json) -> Result<T> {
    reply.read().map_err(|error| {
        Error::new(
            Code::InternalError,
            format!("QEMU's reply to {command} makes no sense: {error}"),
        )
    })
}

/// `query-status`.
pub fn query_status(qemu: &mut dyn Execute, deadline: Deadline) -> Result<Status> {
    let reply = qemu.run(
        "cannot ask for the guest's state",
        Command::new("query-status", json!({})),
        deadline,
    )?;
    read("query-status", &reply)
}

/// `query-version`: QEMU's major and minor version.
pub fn query_version(qemu: &mut dyn Execute, deadline: Deadline) -> Result<(u64, u64)> {
    let command = Command::new("query-version", json!({}));
    let reply = qemu.run("cannot ask for QEMU's version", command, deadline)?;
    let number = |what: &str| reply["qemu"][what].as_u64().unwrap_or_default();
    Ok((number("major"), number("minor")))
}

/// `query-migrate`.
pub fn query_migrate(qemu: &mut dyn Execute, deadline: Deadline) -> Result<Migration> {
    let command = Command::new("query-migrate", json!({}));
    let reply = qemu.run("cannot ask for the migration's state", command, deadline)?;
    read("query-migrate", &reply)
}

/// `query-memory-size-summary`: the size of the guest's memory in bytes, with plugged modules.
pub fn query_memory_size(qemu: &mut dyn Execute, deadline: Deadline) -> Result<u64> {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Summary {
        base_memory: u64,
        #[serde(default)]
        plugged_memory: u64,
    }
    let command = Command::new("query-memory-size-summary", json!({}));
    let reply = qemu.run("cannot ask for the guest's memory", command, deadline)?;
    let summary: Summary = read("query-memory-size-summary", &reply)?;
    Ok(summary.base_memory + summary.plugged_memory)
}

/// `query-memory-devices`: the sizes in bytes of the virtio-mem devices whose memory is only partly
/// plugged in.
pub fn query_partly_plugged(qemu: &mut dyn Execute, deadline: Deadline) -> Result<Vec<u64>> {
    let devices = match qemu.execute(Command::new("query-memory-devices", json!({})), deadline) {
        Ok(devices) => devices,
        // This machine has no memory devices.
        Err(Failure::Refused(..)) => return Ok(Vec::new()),
        Err(failure) => return Err(failure.into_error("cannot ask for the guest's memory devices")),
    };
    let partly = |device: &Value| {
        let (plugged, max) =
            (device["data"]["size"].as_u64()?, device["data"]["max-size"].as_u64()?);
        (device["type"] == "virtio-mem" && plugged < max).then_some(max)
    };
    Ok(devices.as_array().into_iter().flatten().filter_map(partly).collect())
}

/// `info ramblock` of the human monitor: the names of QEMU's memory blocks and how many bytes of
/// each are in use. `None` if this QEMU does not tell.
pub fn ram_blocks(
    qemu: &mut dyn Execute,
    deadline: Deadline,
) -> Result<Option<Vec<(String, u64)>>> {
    let command = Command::new("human-monitor-command", json!({ "command-line": "info ramblock" }));
    match qemu.execute(command, deadline) {
        Ok(reply) => Ok(reply.as_str().map(read_ram_blocks)),
        Err(Failure::Refused(..)) => Ok(None),
        Err(failure) => Err(failure.into_error("cannot ask for the guest's memory blocks")),
    }
}

/// Each line has a name, the size of a page (`4 KiB`), and in hexadecimal the offset, the size in
/// use and the whole size.
fn read_ram_blocks(text: &str) -> Vec<(String, u64)> {
    let block = |line: &str| {
        let (before, numbers) = line.split_once("0x")?;
        let before = before.trim_end().rsplit_once(' ')?.0.trim_end().rsplit_once(' ')?.0;
        let used = numbers.split_ascii_whitespace().nth(1)?.strip_prefix("0x")?;
        Some((before.trim().to_owned(), u64::from_str_radix(used, 16).ok()?))
    };
    text.lines().filter_map(block).collect()
}

/// `query-migrate-capabilities`: names and states, in QEMU's order.
pub fn query_migrate_capabilities(
    qemu: &mut dyn Execute,
    deadline: Deadline,
) -> Result<Vec<(String, bool)>> {
    #[derive(Deserialize)]
    struct Capability {
        capability: String,
        state: bool,
    }
    let command = Command::new("query-migrate-capabilities", json!({}));
    let reply = qemu.run("cannot ask for the migration capabilities", command, deadline)?;
    let capabilities: Vec<Capability> = read("query-migrate-capabilities", &reply)?;
    Ok(capabilities
        .into_iter()
        .map(|capability| (capability.capability, capability.state))
        .collect())
}

/// `migrate-set-capabilities`.
pub fn migrate_set_capabilities(
    qemu: &mut dyn Execute,
    capabilities: &[(String, bool)],
    deadline: Deadline,
) -> std::result::Result<(), Failure> {
    let capabilities: Vec<_> = capabilities
        .iter()
        .map(|(name, state)| json!({ "capability": name, "state": state }))
        .collect();
    let command = Command::new("migrate-set-capabilities", json!({ "capabilities": capabilities }));
    qemu.execute(command, deadline).map(drop)
}

/// `query-migrate-parameters`.
pub fn query_migrate_parameters(
    qemu: &mut dyn Execute,
    deadline: Deadline,
) -> Result<Map<String, Value>> {
    let command = Command::new("query-migrate-parameters", json!({}));
    let reply = qemu.run("cannot ask for the migration parameters", command, deadline)?;
    read("query-migrate-parameters", &reply)
}

/// `migrate-set-parameters`.
pub fn migrate_set_parameters(
    qemu: &mut dyn Execute,
    parameters: Map<String, Value>,
    deadline: Deadline,
) -> Result<()> {
    let command = Command::new("migrate-set-parameters", Value::Object(parameters));
    qemu.run("cannot set the migration parameters", command, deadline).map(drop)
}

/// `getfd`: QEMU keeps a copy of the descriptor under this name.
pub fn getfd(qemu: &mut dyn Execute, name: &str, fd: BorrowedFd, deadline: Deadline) -> Result<()> {
    let command = Command { name: "getfd", arguments: json!({ "fdname": name }), fd: Some(fd) };
    qemu.run("cannot pass the memory pipe to QEMU", command, deadline).map(drop)
}

/// `closefd`.
pub fn closefd(
    qemu: &mut dyn Execute,
    name: &str,
    deadline: Deadline,
) -> std::result::Result<(), Failure> {
    qemu.execute(Command::new("closefd", json!({ "fdname": name })), deadline).map(drop)
}

/// `add-fd`: QEMU keeps a copy of the descriptor, and can open it as `/dev/fdset/` with the number
/// that this returns.
pub fn add_fd(qemu: &mut dyn Execute, fd: BorrowedFd, deadline: Deadline) -> Result<i64> {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Added {
        fdset_id: i64,
    }
    let command = Command { name: "add-fd", arguments: json!({}), fd: Some(fd) };
    let reply = qemu.run("cannot pass the memory image to QEMU", command, deadline)?;
    let added: Added = read("add-fd", &reply)?;
    Ok(added.fdset_id)
}

/// `remove-fd`: QEMU closes its copies of the descriptors of this number.
pub fn remove_fd(qemu: &mut dyn Execute, set: i64, deadline: Deadline) -> Result<()> {
    let command = Command::new("remove-fd", json!({ "fdset-id": set }));
    qemu.run("cannot have QEMU close the memory image", command, deadline).map(drop)
}

/// `migrate` into a descriptor passed by [`getfd`].
pub fn migrate(
    qemu: &mut dyn Execute,
    fd: &str,
    deadline: Deadline,
) -> std::result::Result<(), Failure> {
    qemu.execute(Command::new("migrate", json!({ "uri": format!("fd:{fd}") })), deadline).map(drop)
}

/// `migrate_cancel`.
pub fn migrate_cancel(qemu: &mut dyn Execute, deadline: Deadline) -> Result<()> {
    qemu.run("cannot cancel saving memory", Command::new("migrate_cancel", json!({})), deadline)
        .map(drop)
}

/// `stop`: returns when the vCPUs are stopped and the disks flushed.
pub fn stop(qemu: &mut dyn Execute, deadline: Deadline) -> Result<()> {
    qemu.run("cannot pause the guest", Command::new("stop", json!({})), deadline).map(drop)
}

/// `cont`.
pub fn cont(qemu: &mut dyn Execute, deadline: Deadline) -> Result<()> {
    qemu.run("cannot resume the guest", Command::new("cont", json!({})), deadline).map(drop)
}

/// Whether QEMU has this command.
pub fn has_command(qemu: &mut dyn Execute, name: &str, deadline: Deadline) -> Result<bool> {
    let reply = qemu.run(
        "cannot ask for QEMU's commands",
        Command::new("query-commands", json!({})),
        deadline,
    )?;
    Ok(reply
        .as_array()
        .is_some_and(|commands| commands.iter().any(|command| command["name"] == name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_blocks_are_read_as_qemu_tells_of_them() {
        let text = "              Block Name    PSize              Offset               Used              \
                    Total                HVA  RO\r\n                  pc.ram    4 KiB  \
                    0x0000000000000000 0x0000000004000000 0x0000000004000000 0x00007f505be00000  \
                    rw\r\n    /rom@etc/acpi/tables    2 MiB  0x0000000005100000 0x0000000000020000 \
                    0x0000000000200000 0x00007f505a800000  ro\r\n";
        let found =
            [("pc.ram".to_owned(), 64 << 20), ("/rom@etc/acpi/tables".to_owned(), 128 << 10)];
        assert_eq!(read_ram_blocks(text), found);
        assert_eq!(read_ram_blocks("nothing\n"), []);
    }
}
