// SPDX-License-Identifier: LGPL-2.1-or-later

//! Loads a snapshot so that its guest runs at once, and its memory follows.

use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde_json::json;

use crate::backend::{DEFAULT_TIMEOUT, Guest, Liveness, find_other_writer};
use crate::deadline::Deadline;
use crate::engine::page_server::{MOST_FIRST, PageServer, Task};
use crate::error::{Code, Error, Result, fail};
use crate::image::{Image, written_first};
use crate::migration::post_copy::Start;
use crate::migration::{FD_NAME, Lazy, Settings, start_incoming, wait_devices};
use crate::model::Record;
use crate::monitor::{Command, commands};
use crate::own_file::from_root;
use crate::sys;

/// Loads the devices, and leaves the memory to a page server. Returns when the guest can run: it
/// does, or is paused. If it is to stay paused, it does not run for a moment.
pub fn load(
    guest: &mut dyn Guest,
    record: &Record,
    image: &Image,
    running: bool,
    bandwidth: Option<u64>,
) -> Result<()> {
    let path = Path::new(&record.memory_file);
    let cannot_read = |error| {
        Error::system(format!("cannot read memory snapshot file '{}'", path.display()), error)
    };
    sys::mark_in_use(&image.file).map_err(cannot_read)?;
    let file = image.file.metadata().map_err(cannot_read)?;
    let lazy = Lazy {
        token: token()?,
        snapshot: record.name.clone(),
        image: from_root(path),
        id: (file.dev(), file.ino()),
    };
    let monitor = guest.monitor_socket();
    let (mut server, socket) = PageServer::start(&Task {
        start: Start::Fresh,
        image,
        token: &lazy.token,
        monitor: monitor.as_deref(),
        first: written_first(image, path, MOST_FIRST),
        bandwidth,
    })?;
    let settings = Settings::query(guest)?;
    let deadline = || Deadline::after(DEFAULT_TIMEOUT);
    let begun = settings.apply_lazy(guest, &lazy).and_then(|()| {
        // QEMU starts a guest by itself if it was started without `-S`, unless it is told now.
        if !running {
            commands::stop(guest, deadline())?;
        }
        commands::getfd(guest, FD_NAME, socket.as_fd(), deadline())?;
        start_incoming(guest, &format!("fd:{FD_NAME}")).inspect_err(|_| {
            // QEMU has not taken the socket, and would keep it.
            let _ = commands::closefd(guest, FD_NAME, deadline());
        })
    });
    drop(socket);
    begun.map_err(|error| {
        // Unless QEMU has ended, it still waits, so that the caller can try again.
        let restored = match guest.liveness() {
            Liveness::Alive => settings.restore_lazy(guest),
            Liveness::Exited | Liveness::Unresponsive => Ok(()),
        };
        restored.err().into_iter().fold(error, |error, left| error.and(left.message))
    })?;
    // The settings are not restored in a QEMU that could not load, because it is of no more use.
    server.begin().map_err(|error| explain(guest, error))?;
    server.leave();
    // The connection has its own credentials now.
    Settings::lock_lazy(guest, true)?;
    wait_devices(guest)?;
    if running && !guest.status()?.running {
        commands::cont(guest, deadline())?;
    }
    Ok(())
}

/// Refuses an image whose pages cannot be read in any order.
pub fn check_image(record: &Record, image: &Image) -> Result<()> {
    if image.sparse.is_none() {
        fail!(
            ConfigUnsupported,
            "the memory of snapshot '{}' cannot follow, because its image '{}' has the format \
             '{}': convert it to the format 'sparse' (instantsnap_image_convert()), or load all of \
             it first",
            record.name,
            record.memory_file,
            image.format().name()
        );
    }
    Ok(())
}

/// Refuses what cannot be loaded in this way.
pub fn check(guest: &mut dyn Guest, record: &Record, image: &Image) -> Result<()> {
    check_image(record, image)?;
    check_backends(guest)?;
    if let Some(writer) = find_other_writer(guest)? {
        fail!(
            ConfigUnsupported,
            "memory cannot follow: {writer} uses the guest's memory from another process or a \
             device, which could not wait for a page. Load all of the memory first"
        );
    }
    Ok(())
}

/// Refuses memory that is not anonymous: QEMU would empty its file; and memory of huge pages, which
/// have to come whole.
fn check_backends(guest: &mut dyn Guest) -> Result<()> {
    let deadline = Deadline::after(DEFAULT_TIMEOUT);
    let step = "cannot ask for the guest's memory backends";
    let command = Command::new("qom-list", json!({ "path": "/objects" }));
    let objects = guest.run(step, command, deadline)?;
    for object in objects.as_array().into_iter().flatten() {
        let kind = object["type"].as_str().unwrap_or_default();
        let kind = kind.trim_start_matches("child<").trim_end_matches('>');
        let name = object["name"].as_str().unwrap_or_default();
        let has_huge_pages = match kind {
            "memory-backend-ram" => false,
            "memory-backend-memfd" => {
                let path = format!("/objects/{name}");
                let property = json!({ "path": path, "property": "hugetlb" });
                *guest.run(step, Command::new("qom-get", property), deadline)? != json!(false)
            }
            kind if kind.contains("memory-backend") => true,
            _ => false,
        };
        if has_huge_pages {
            fail!(
                ConfigUnsupported,
                "memory cannot follow into memory backend '{name}' ({kind}), which is a file or \
                 has huge pages: load all of the memory first, or use memory-backend-ram"
            );
        }
    }
    Ok(())
}

/// The error of a QEMU that could not load.
fn explain(guest: &mut dyn Guest, error: Error) -> Error {
    match guest.liveness() {
        Liveness::Exited => Error::new(
            Code::OperationFailed,
            "QEMU ended while it loaded the devices, as it does when the machine differs from that \
             of the snapshot: see its standard error",
        ),
        Liveness::Alive => match commands::query_migrate(guest, Deadline::after(DEFAULT_TIMEOUT)) {
            Ok(migration) if migration.error_desc.is_some() => Error::new(
                Code::OperationFailed,
                format!("QEMU cannot load the memory image: {}", migration.reason()),
            ),
            _ => error,
        },
        Liveness::Unresponsive => error,
    }
}

/// A word by which the page server of this load can be found among all processes.
fn token() -> Result<String> {
    let mut random = [0; 16];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| Error::system("cannot get random bytes", error))?;
    Ok(format!("{:032x}", u128::from_ne_bytes(random)))
}
