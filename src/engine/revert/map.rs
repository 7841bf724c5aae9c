// SPDX-License-Identifier: LGPL-2.1-or-later

//! The memory of a snapshot by a mapping: QEMU was started with the memory image as its RAM, in
//! private mappings, and needs only the rest of the snapshot from the library.
//!
//! QEMU says what its memory backends are; the kernel says what QEMU's process has really mapped.
//! Both must be what the image needs, because the guest would be corrupted otherwise, or would
//! write to the image.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::memory::{MemoryBackend, mappings};
use crate::backend::{DEFAULT_TIMEOUT, Guest};
use crate::deadline::Deadline;
use crate::error::{Code, Error, Result, fail};
use crate::image::{Image, Mapping};
use crate::model::lease::{Held, Lease};
use crate::model::{Memory, Record, Store};
use crate::monitor::{Command, commands};
use crate::procfs::{self, Part};
use crate::sys;

/// The first QEMU whose RAM can be a private mapping of a file that is opened for reading only
/// (`rom=off`).
const OLDEST: (u64, u64) = (8, 2);
/// The type of the memory backends that map files.
const FILE: &str = "memory-backend-file";

/// A memory backend of the QEMU that is to load the snapshot.
struct Backend {
    id: String,
    kind: String,
    /// The file that it maps, as QEMU names it.
    file: Option<String>,
}

/// QEMU's memory backends.
pub struct Backends(Vec<Backend>);

impl Backends {
    /// Asks QEMU for them.
    pub fn read(guest: &mut dyn Guest) -> Result<Backends> {
        let command = Command::new("qom-list", json!({ "path": "/objects" }));
        let objects =
            guest.run("cannot list the objects", command, Deadline::after(DEFAULT_TIMEOUT))?;
        let mut backends = Vec::new();
        for object in objects.as_array().into_iter().flatten() {
            let text = |name: &str| object[name].as_str().unwrap_or_default();
            let kind = text("type").trim_start_matches("child<").trim_end_matches('>');
            if !kind.starts_with("memory-backend") {
                continue;
            }
            let (id, kind) = (text("name").to_owned(), kind.to_owned());
            let file = match kind.as_str() {
                FILE => property(guest, &id, "mem-path")?.as_str().map(str::to_owned),
                _ => None,
            };
            backends.push(Backend { id, kind, file });
        }
        Ok(Backends(backends))
    }

    /// The id of one that is on the image.
    pub fn on(&self, guest: &dyn Guest, record: &Record) -> Option<&str> {
        let image = Path::new(&record.memory_file);
        let is_on = |backend: &&Backend| {
            let file = backend.file.as_deref();
            file.is_some_and(|file| {
                seen(guest.pid(), file).any(|path| sys::same_file(&path, image))
            })
        };
        self.0.iter().find(is_on).map(|backend| backend.id.as_str())
    }
}

/// The paths under which this process can see a file that QEMU names.
fn seen(pid: Option<u32>, file: &str) -> impl Iterator<Item = PathBuf> {
    let here = file.starts_with('/').then(|| PathBuf::from(file));
    let there = pid.map(|pid| match file.strip_prefix('/') {
        Some(file) => PathBuf::from(format!("/proc/{pid}/root")).join(file),
        None => PathBuf::from(format!("/proc/{pid}/cwd")).join(file),
    });
    here.into_iter().chain(there)
}

/// Whether QEMU has mapped the image, in whatever way.
pub fn is_mapped(guest: &mut dyn Guest, record: &Record) -> Result<bool> {
    Ok(Backends::read(guest)?.on(guest, record).is_some())
}

/// Refuses a QEMU that has mapped the image although its memory is to come in another way: what is
/// written to it could get into the image.
pub fn check_not_mapped(guest: &mut dyn Guest, record: &Record, memory: Memory) -> Result<()> {
    let backends = Backends::read(guest)?;
    if let Some(id) = backends.on(guest, record) {
        fail!(
            ConfigUnsupported,
            "memory backend '{id}' of this QEMU maps the snapshot's memory image '{}', which \
             memory '{}' would write to: load it with memory 'map', or start QEMU with other \
             memory",
            record.memory_file,
            memory.name()
        );
    }
    Ok(())
}

/// Checks that QEMU has mapped the image as it must. Returns the numbers of the mapped blocks.
pub fn check(guest: &mut dyn Guest, image: &Image, record: &Record) -> Result<Vec<usize>> {
    let version = commands::query_version(guest, Deadline::after(DEFAULT_TIMEOUT))?;
    if version < OLDEST {
        let ((major, minor), (needs_major, needs_minor)) = (version, OLDEST);
        fail!(
            ConfigUnsupported,
            "QEMU {major}.{minor} cannot map a memory image as its memory, which needs QEMU \
             {needs_major}.{needs_minor} or later: load all of it (memory 'full')"
        );
    }
    let file = &record.memory_file;
    let blocks = mappings(image, file)?;
    let backends = Backends::read(guest)?;
    let mut mapped = Vec::new();
    for block in blocks {
        // A block that no backend has is a device's, or firmware's.
        if let Some(backend) = backends.0.iter().find(|backend| backend.id == block.id) {
            check_backend(guest, backend, &block, record)?;
            mapped.push(block);
        }
    }
    if mapped.is_empty() {
        fail!(
            ConfigUnsupported,
            "this QEMU has no memory backend for the memory image '{file}': start it as \
             instantsnap_snapshot_prepare_revert_with() says for INSTANTSNAP_MEMORY_MAP"
        );
    }
    check_process(guest, image, &mapped, file)?;
    for block in &mapped {
        image.check_zeros(block).map_err(|what| {
            Error::new(
                Code::InvalidDomainSnapshot,
                format!(
                    "the memory image '{file}' cannot be mapped, because block '{}' {what}: \
                     convert it to the format 'raw', and then to 'sparse' again \
                     (instantsnap_image_convert())",
                    block.id
                ),
            )
        })?;
    }
    Ok(mapped.into_iter().map(|block| block.block).collect())
}

fn property(guest: &mut dyn Guest, id: &str, name: &str) -> Result<Value> {
    let path = format!("/objects/{id}");
    let command = Command::new("qom-get", json!({ "path": path, "property": name }));
    let step = format!("cannot ask for '{name}' of memory backend '{id}'");
    let reply = guest.run(&step, command, Deadline::after(DEFAULT_TIMEOUT))?;
    reply.read().map_err(|error| {
        let what = format!("QEMU's reply for '{name}' of '{id}' makes no sense: {error}");
        Error::new(Code::InternalError, what)
    })
}

/// Checks what QEMU says of a memory backend.
fn check_backend(
    guest: &mut dyn Guest,
    backend: &Backend,
    block: &Mapping,
    record: &Record,
) -> Result<()> {
    let Backend { id, kind, file } = backend;
    let image = Path::new(&record.memory_file);
    let how = MemoryBackend::new(block.clone(), image).object();
    if kind != FILE {
        fail!(
            ConfigUnsupported,
            "memory backend '{id}' of this QEMU is a {kind}, and does not map the memory image: \
             start QEMU with `-object {how}`, or load all of the memory (memory 'full')"
        );
    }
    let file = file.as_deref().unwrap_or_default();
    if !seen(guest.pid(), file).any(|path| sys::same_file(&path, image)) {
        fail!(
            ConfigUnsupported,
            "memory backend '{id}' of this QEMU is on '{file}', which is not the snapshot's memory \
             image: start QEMU with `-object {how}`"
        );
    }
    for (name, needed) in [
        ("offset", json!(block.offset)),
        ("size", json!(block.size)),
        ("share", json!(false)),
        ("readonly", json!(true)),
        ("rom", json!("off")),
    ] {
        let found = property(guest, id, name)?;
        if found != needed {
            fail!(
                ConfigUnsupported,
                "memory backend '{id}' of this QEMU has {name}={}, and needs {name}={}: start QEMU \
                 with `-object {how}`",
                shown(&found),
                shown(&needed)
            );
        }
    }
    Ok(())
}

/// A property as it is in QEMU's options.
fn shown(value: &Value) -> String {
    match value {
        Value::Bool(true) => "on".into(),
        Value::Bool(false) => "off".into(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Checks what QEMU's process has mapped. The file of the image's name can be another one than when
/// QEMU was started.
fn check_process(guest: &dyn Guest, image: &Image, blocks: &[Mapping], file: &str) -> Result<()> {
    let pid = process(guest)?;
    let cannot = |error| {
        Error::system(format!("cannot see what QEMU (process {pid}) has mapped"), error)
            .and("work as root, or as QEMU's user")
    };
    let id = id_of(&image.file).map_err(cannot)?;
    let replaced = || -> Result<()> {
        fail!(
            ConfigUnsupported,
            "QEMU (process {pid}) has not mapped the memory image that '{file}' is now: it was \
             replaced since QEMU was started, or QEMU does not use its memory backends; start QEMU \
             again"
        )
    };
    let opened = procfs::files(pid, id).map_err(cannot)?;
    if opened.is_empty() {
        return replaced();
    }
    let parts: Vec<Part> = procfs::private_parts(pid)
        .map_err(cannot)?
        .into_iter()
        .filter(|part| part.inode == id.1 || opened.contains(&part.path))
        .collect();
    for block in blocks {
        let end = block.offset + block.size;
        let mut at = block.offset;
        while at < end {
            let next = parts.iter().find(|part| part.file.contains(&at)).map(|part| part.file.end);
            match next {
                Some(next) => at = next,
                None => return replaced(),
            }
        }
    }
    Ok(())
}

fn id_of(file: &File) -> std::io::Result<(u64, u64)> {
    file.metadata().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// QEMU's process, without which it cannot be seen what is mapped, and until when.
fn process(guest: &dyn Guest) -> Result<u32> {
    match guest.pid() {
        Some(pid) => Ok(pid),
        None => fail!(
            ConfigUnsupported,
            "QEMU's process cannot be seen from here (it is in another PID namespace, or the \
             driver has no socket of it), and memory 'map' needs to see what it has mapped: load \
             all of the memory (memory 'full')"
        ),
    }
}

/// Notes that QEMU maps the image, before it depends on that.
pub fn take_lease(store: &Store, guest: &dyn Guest, image: &Image, name: &str) -> Result<()> {
    let pid = process(guest)?;
    let lease = Lease::of(pid, &image.file)
        .map_err(|error| Error::system("cannot look at the memory image", error))?;
    match lease {
        Some(lease) => store.note_lease(name, &lease),
        None => fail!(OperationFailed, "QEMU (process {pid}) has ended"),
    }
}

/// Refuses to remove a memory image that a QEMU maps. `files`: the names that the image can have.
pub fn check_unmapped(store: &Store, name: &str, files: [&Path; 2]) -> Result<()> {
    let mut images = BTreeSet::new();
    for file in files {
        match file.metadata() {
            Ok(metadata) => drop(images.insert((metadata.dev(), metadata.ino()))),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => {
                return Err(Error::system(format!("cannot look at '{}'", file.display()), error));
            }
        }
    }
    let leases = store.leases(name)?;
    let held = leases.iter().find(|(_, lease)| images.iter().any(|image| lease.is_of(*image)));
    let Some((noted, lease)) = held else { return Ok(()) };
    let pid = lease.qemu.pid;
    let why = match lease.held() {
        Held::No => return Ok(()),
        Held::Yes => format!("process {pid} runs on it: end that guest first"),
        Held::Unknown => format!(
            "process {pid} of another PID namespace or another host may run on it: end that guest \
             first, and then remove '{}'",
            noted.display()
        ),
    };
    fail!(
        OperationInvalid,
        "its memory image '{}' is mapped by a guest that was loaded with memory 'map', and {why}; \
         nothing was changed",
        files[0].display()
    )
}
