// SPDX-License-Identifier: LGPL-2.1-or-later

//! The shared memory check: refuses a guest whose RAM another process or a device writes, without
//! QEMU's own mapping of it.

use serde_json::{Value, json};

use super::guest::DEFAULT_TIMEOUT;
use crate::deadline::Deadline;
use crate::error::{Code, Result, fail};
use crate::monitor::json::Json;
use crate::monitor::{Command, Execute};

/// Devices whose backend is another process that writes guest RAM by its own mapping.
const SHARING_DEVICES: [&str; 5] =
    ["vhost-user", "vhost-vdpa", "ivshmem", "vfio-user", "x-pci-proxy"];

/// Block drivers that let a device, or another process, read data into guest RAM.
const SHARING_BLOCK_DRIVERS: [&str; 5] = [
    "nvme",
    "nvme-io_uring",
    "virtio-blk-vfio-pci",
    "virtio-blk-vhost-user",
    "virtio-blk-vhost-vdpa",
];

fn query(guest: &mut dyn Execute, command: &str, arguments: Value) -> Result<Json> {
    let step = format!("cannot ask the guest ({command})");
    guest.run(&step, Command::new(command, arguments), Deadline::after(DEFAULT_TIMEOUT))
}

/// Refuses a guest whose RAM another process or a device writes: userfaultfd covers QEMU's own
/// mapping only.
pub fn check_memory_not_shared(guest: &mut dyn Execute) -> Result<()> {
    match find_other_writer(guest)? {
        None => Ok(()),
        Some(writer) => fail!(
            ConfigUnsupported,
            "{writer} writes the guest's memory from another process or a device, where QEMU \
             cannot hold it at the instant: take a non-live snapshot (without INSTANT), or remove \
             the device first"
        ),
    }
}

/// What writes the guest's RAM from another process or a device, if anything does.
pub fn find_other_writer(guest: &mut dyn Execute) -> Result<Option<String>> {
    for path in ["/machine/peripheral", "/machine/peripheral-anon", "/objects"] {
        let devices = query(guest, "qom-list", json!({ "path": path }))?;
        for device in devices.as_array().into_iter().flatten() {
            let kind = device["type"].as_str().unwrap_or_default();
            if SHARING_DEVICES.iter().any(|writer| kind.contains(writer)) {
                let kind = kind.trim_start_matches("child<").trim_end_matches('>');
                let name = device["name"].as_str().unwrap_or_default();
                return Ok(Some(format!("device '{name}' ({kind})")));
            }
        }
    }
    let nodes = query(guest, "query-named-block-nodes", json!({ "flat": true }))?;
    for node in nodes.as_array().into_iter().flatten() {
        let driver = node["drv"].as_str().unwrap_or_default();
        if SHARING_BLOCK_DRIVERS.contains(&driver) {
            let name = node["node-name"].as_str().unwrap_or_default();
            return Ok(Some(format!("the storage of block node '{name}' (driver {driver})")));
        }
    }
    // No QMP command tells a network backend's type.
    let network = query(guest, "human-monitor-command", json!({ "command-line": "info network" }));
    let network = match network {
        Ok(network) => network,
        // This QEMU was built without the human monitor. Such a build has no vhost-user network
        // backends either.
        Err(error) if error.code == Code::OperationFailed => return Ok(None),
        Err(error) => return Err(error),
    };
    for line in network.as_str().unwrap_or_default().lines() {
        let kind =
            line.split("type=").nth(1).and_then(|rest| rest.split(',').next()).unwrap_or_default();
        if SHARING_DEVICES.iter().any(|writer| kind.contains(writer)) {
            let name = line.trim_start_matches([' ', '\\']).split(':').next().unwrap_or_default();
            return Ok(Some(format!("network backend '{name}' ({kind})")));
        }
    }
    Ok(None)
}
