// SPDX-License-Identifier: LGPL-2.1-or-later

//! Reads a guest's drives and machine from QEMU.

use std::path::Path;

use serde_json::{Value, json};

use super::process::absolute;
use crate::backend::guest::DEFAULT_TIMEOUT;
use crate::deadline::Deadline;
use crate::error::Result;
use crate::model::domain::{Disk, Domain, Machine};
use crate::model::drive::OpenOptions;
use crate::model::{Bitmap, Drive, Role};
use crate::monitor::json::{Json, parse};
use crate::monitor::{Command, Execute};
use crate::sys;

use super::jobs::NODE_PREFIX;

/// Filter drivers, which pass a disk's data through: the image is below them.
const FILTERS: [&str; 8] = [
    "blkreplay",
    "compress",
    "copy-before-write",
    "copy-on-read",
    "preallocate",
    "quorum",
    "snapshot-access",
    "throttle",
];
/// Drivers of files and devices of the host.
const PROTOCOLS: [&str; 3] = ["file", "host_device", "host_cdrom"];

fn query(monitor: &mut dyn Execute, command: &str, arguments: Value) -> Result<Json> {
    let step = format!("cannot ask the guest ({command})");
    monitor.run(&step, Command::new(command, arguments), Deadline::after(DEFAULT_TIMEOUT))
}

/// The drives of a guest's devices. Those without a medium are included only so that a request can
/// name them.
pub fn drives(
    monitor: &mut dyn Execute,
    domain: Option<&Domain>,
    pid: Option<u32>,
) -> Result<Vec<Drive>> {
    let blocks = query(monitor, "query-block", json!({}))?;
    let mut drives = Vec::new();
    for block in blocks.as_array().into_iter().flatten() {
        // The guest cannot change a drive that has no device.
        if !block["qdev"].is_string() {
            continue;
        }
        drives.push(drive(monitor, block, pid)?);
    }
    if drives.iter().any(|drive| drive.names.is_empty() && drive.role != Role::Empty) {
        name_by_nodes(monitor, &mut drives, pid)?;
    }
    if let Some(domain) = domain {
        name_by_domain(domain, &mut drives);
    }
    Ok(drives)
}

fn drive(monitor: &mut dyn Execute, block: &Value, pid: Option<u32>) -> Result<Drive> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let inserted = &block["inserted"];
    let (qdev, device) = (text(&block["qdev"]), text(&block["device"]));
    let node = text(&inserted["node-name"]);
    let mut names = Vec::new();
    names.extend(device_id(&qdev));
    names.extend(Some(device.clone()).filter(|device| !device.is_empty()));
    names.extend(
        Some(node.clone()).filter(|node| !node.starts_with('#') && !node.starts_with(NODE_PREFIX)),
    );

    let role = if !inserted.is_object() {
        Role::Empty
    } else if inserted["ro"] == true {
        Role::ReadOnly
    } else if is_firmware(monitor, &qdev, &device)? {
        Role::Firmware
    } else {
        Role::Disk
    };
    let driver = text(&inserted["drv"]);
    let unsupported_reason = if FILTERS.contains(&driver.as_str()) {
        Some(format!(
            "has a filter ({driver}) on top of its image, and QEMU switches no disk below a \
             filter: remove it first (throttling by the drive's own options or by a throttle \
             group of the device is supported)"
        ))
    } else if inserted["encrypted"] == true {
        Some("is encrypted: snapshots of encrypted images are not supported".into())
    } else {
        None
    };
    let mut backing = Vec::new();
    let mut below = &inserted["image"]["backing-image"];
    while below.is_object() {
        backing.push(image_path(&text(&below["filename"]), below, pid));
        below = &below["backing-image"];
    }
    Ok(Drive {
        file: match role {
            Role::Empty => String::new(),
            _ => image_path(&text(&inserted["file"]), &inserted["image"], pid),
        },
        backing,
        role,
        node,
        // A file or a device without a format layer is raw.
        format: if PROTOCOLS.contains(&driver.as_str()) { "raw".into() } else { driver },
        size: inserted["image"]["virtual-size"].as_u64().unwrap_or_default(),
        bitmaps: inserted["dirty-bitmaps"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(bitmap)
            .collect(),
        options: OpenOptions {
            direct: inserted["cache"]["direct"] == true,
            no_flush: inserted["cache"]["no-flush"] == true,
            detect_zeroes: inserted["detect_zeroes"].as_str().map(str::to_owned),
            aio: None,
            discard: None,
        },
        unsupported_reason,
        snapshot: None,
        names,
    })
}

/// The path of an image. QEMU names the image by `json:` and all its options if its backing file is
/// not the one that its header names. That includes a backing file that only has another name
/// there, such as a relative path; then the plain path is returned.
fn image_path(file: &str, info: &Value, pid: Option<u32>) -> String {
    let mut layers = vec![(file, info)];
    // The name of an image depends on the name of the one below it. No recursion: a chain can be
    // deeper than the stack.
    while let Some((_, info)) = layers.last().filter(|(file, _)| file.starts_with(BY_OPTIONS)) {
        let below = &info["backing-image"];
        match below["filename"].as_str() {
            Some(file) => layers.push((file, below)),
            None => break,
        }
    }
    let path_of = |below: Option<String>, (file, info): (&str, &Value)| {
        Some(path_above(file, info, below, pid))
    };
    layers.into_iter().rev().fold(None, path_of).unwrap_or_default()
}

/// The prefix of a name that lists all options of an image.
const BY_OPTIONS: &str = "json:";

fn path_above(file: &str, info: &Value, below: Option<String>, pid: Option<u32>) -> String {
    let plain = || {
        let opened = parse(file.strip_prefix(BY_OPTIONS)?.as_bytes()).ok()?;
        let only = |value: &Value, known: &[&str]| {
            value
                .as_object()
                .is_some_and(|options| options.keys().all(|key| known.contains(&key.as_str())))
        };
        let protocol = &opened["file"];
        if !only(&opened, &["driver", "file", "backing"])
            || !only(protocol, &["driver", "filename"])
        {
            return None;
        }
        let named = info["full-backing-filename"].as_str().or(info["backing-filename"].as_str())?;
        let known = PROTOCOLS.contains(&protocol["driver"].as_str()?);
        let same = sys::same_file(Path::new(named), Path::new(&below?));
        protocol["filename"].as_str().filter(|_| known && same).map(str::to_owned)
    };
    let file = plain().unwrap_or_else(|| file.to_owned());
    absolute(&file, pid).unwrap_or(file)
}

/// The id that the user gave a device: `/machine/peripheral/ID/...`, or only the id, depending on
/// the version of QEMU.
fn device_id(qdev: &str) -> Option<String> {
    match qdev.strip_prefix("/machine/peripheral/") {
        Some(path) => path.split('/').next().map(str::to_owned),
        None => Some(qdev.to_owned()).filter(|id| !id.is_empty() && !id.starts_with('/')),
    }
}

fn is_firmware(monitor: &mut dyn Execute, qdev: &str, device: &str) -> Result<bool> {
    if !device.starts_with("pflash") && !qdev.contains("flash") {
        return Ok(false);
    }
    let kind = query(monitor, "qom-get", json!({ "path": qdev, "property": "type" }))?;
    Ok(kind.as_str().is_some_and(|kind| kind.starts_with("cfi.pflash")))
}

/// A bitmap that libvirt too would carry over. `None` if it is temporary, disabled or broken.
fn bitmap(value: &Value) -> Option<Bitmap> {
    if value["persistent"] != true || value["recording"] != true || value["inconsistent"] == true {
        return None;
    }
    Some(Bitmap {
        name: value["name"].as_str()?.into(),
        granularity: value["granularity"].as_u64()?,
    })
}

/// A block node of an image.
pub struct Node {
    /// Its name.
    pub name: String,
    /// The image.
    pub file: String,
    /// It is the node of the file, not of the format.
    pub protocol: bool,
}

/// The nodes of images, without filters. `flat`: without the backing files, on which some names
/// depend.
pub fn nodes(monitor: &mut dyn Execute, pid: Option<u32>, flat: bool) -> Result<Vec<Node>> {
    let nodes = query(monitor, "query-named-block-nodes", json!({ "flat": flat }))?;
    let node = |node: &Value| {
        let (name, driver, image) =
            (node["node-name"].as_str()?, node["drv"].as_str()?, &node["image"]);
        let file = image_path(node["file"].as_str()?, image, pid);
        let protocol = PROTOCOLS.contains(&driver);
        (image["format"] == driver).then(|| Node { name: name.into(), file, protocol })
    };
    Ok(nodes.as_array().into_iter().flatten().filter_map(node).collect())
}

/// Names drives that have only a node's name. That name belongs to the image: once a snapshot has
/// put an overlay on top, the drive keeps the name of the topmost image that the user named.
fn name_by_nodes(monitor: &mut dyn Execute, drives: &mut [Drive], pid: Option<u32>) -> Result<()> {
    let nodes = nodes(monitor, pid, true)?;
    let named = |file: &str, protocol: bool| {
        let own = |node: &&Node| !node.name.starts_with('#') && !node.name.starts_with(NODE_PREFIX);
        let mut own = nodes.iter().filter(own);
        own.find(|node| node.protocol == protocol && node.file == file)
            .map(|node| node.name.clone())
    };
    // The node of the format is preferred to that of the file.
    let named = |file: &str| named(file, false).or_else(|| named(file, true));
    for drive in drives.iter_mut().filter(|drive| drive.names.is_empty()) {
        drive.names.extend(drive.backing.iter().find_map(|file| named(file)));
    }
    Ok(())
}

/// Gives each drive its target in the domain XML, and the options that only the XML has.
fn name_by_domain(domain: &Domain, drives: &mut [Drive]) {
    let mut free: Vec<&Disk> = domain.disks.iter().collect();
    let rules: [fn(&Disk, &Drive) -> bool; 3] = [
        |disk, drive| {
            disk.alias.as_ref().is_some_and(|alias| {
                drive
                    .names
                    .iter()
                    .any(|name| name == alias || name.strip_prefix("drive-") == Some(alias))
            })
        },
        |disk, drive| {
            let file = disk.file.as_ref().filter(|_| disk.kind != "network");
            file.is_some_and(|file| drive.file == *file || drive.backing.contains(file))
        },
        |disk, drive| drive.names.contains(&disk.target),
    ];
    let mut matched = vec![false; drives.len()];
    for rule in rules {
        for (slot, drive) in
            drives.iter_mut().enumerate().filter(|(slot, _)| !matched[*slot]).collect::<Vec<_>>()
        {
            let Some(at) = free.iter().position(|disk| rule(disk, drive)) else { continue };
            let disk = free.remove(at);
            drive.names.retain(|name| *name != disk.target);
            drive.names.insert(0, disk.target.clone());
            drive.snapshot.clone_from(&disk.snapshot);
            drive.options.aio.clone_from(&disk.io);
            drive.options.discard.clone_from(&disk.discard);
            matched[slot] = true;
        }
    }
}

/// Reads the machine, for a domain XML that the library makes itself.
pub fn machine(monitor: &mut dyn Execute, emulator: Option<String>) -> Result<Machine> {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let name = text(&query(monitor, "query-name", json!({}))?["name"]);
    let uuid = text(&query(monitor, "query-uuid", json!({}))?["UUID"]);
    let kvm = query(monitor, "query-kvm", json!({}))?["enabled"] == true;
    let memory = query(monitor, "query-memory-size-summary", json!({}))?;
    let bytes = |part: &str| memory[part].as_u64().unwrap_or_default();
    let vcpus = query(monitor, "query-cpus-fast", json!({}))?.as_array().map_or(1, Vec::len);
    let arch = text(&query(monitor, "query-target", json!({}))?["arch"]);
    let kind = query(monitor, "qom-get", json!({ "path": "/machine", "property": "type" }))?;
    let kind = text(&kind);
    let kind = kind.unwrap_or_default();
    Ok(Machine {
        name: name.unwrap_or_else(|| "guest".into()),
        uuid: uuid.unwrap_or_default(),
        kvm,
        memory: bytes("base-memory") + bytes("plugged-memory"),
        vcpus,
        arch: arch.unwrap_or_default(),
        machine: kind.strip_suffix("-machine").unwrap_or(&kind).into(),
        emulator,
    })
}
