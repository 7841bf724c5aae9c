// SPDX-License-Identifier: LGPL-2.1-or-later

//! The QEMU process behind a socket: holds it for one operation, and reads its entries in /proc.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::backend::exclusive::Exclusive;
use crate::error::{Error, Result};
use crate::monitor::QemuProcess;
use crate::procfs::Stat;

/// Holds a guest by its socket, before connecting. A connection that waits while QEMU serves
/// another client takes one of the two places in the socket's queue.
pub fn hold_socket(socket: &Path) -> Result<Exclusive> {
    let step = |error| {
        Error::system(format!("cannot connect to QMP socket '{}'", socket.display()), error)
    };
    let metadata = socket.metadata().map_err(step)?;
    Exclusive::take(
        &guest_label(socket),
        format!("instantsnap/{:x}:{:x}", metadata.dev(), metadata.ino()),
    )
}

/// Holds a QEMU process, which another backend may have open too. `label` names the guest in an
/// error.
pub fn hold_qemu(label: &str, qemu: &QemuProcess) -> Result<Exclusive> {
    // A pid is reused one day; a pid with its start time is unique.
    let started = Stat::read(qemu.pid).map(|stat| stat.started);
    Exclusive::take(label, format!("instantsnap/{}/{}", qemu.pid, started.unwrap_or_default()))
}

/// The name of the guest behind a socket, for messages.
pub fn guest_label(socket: &Path) -> String {
    format!("the guest of QMP socket '{}'", socket.display())
}

/// The path of a process's binary.
pub fn executable(pid: u32) -> Option<String> {
    std::fs::read_link(format!("/proc/{pid}/exe")).ok()?.into_os_string().into_string().ok()
}

/// Makes a file name of QEMU's absolute: relative names are relative to QEMU's working directory.
pub fn absolute(file: &str, pid: Option<u32>) -> Option<String> {
    if file.starts_with('/') {
        return Some(file.into());
    }
    let directory: PathBuf = std::fs::read_link(format!("/proc/{}/cwd", pid?)).ok()?;
    let path = directory.join(Path::new(file));
    path.exists().then(|| path.into_os_string().into_string().ok()).flatten()
}
