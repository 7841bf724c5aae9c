// SPDX-License-Identifier: LGPL-2.1-or-later

//! The QEMU process behind a socket: holding it for one operation, and what /proc says of it.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::backend::exclusive::Exclusive;
use crate::error::{Error, Result};
use crate::monitor::QemuProcess;

/// Holds a socket: all that is known before it is connected to. A connection that QEMU does not
/// accept while it has another client takes a place in its queue until then, and there are two.
pub fn hold_socket(socket: &Path) -> Result<Exclusive> {
    let step = |error| {
        Error::system(format!("cannot connect to QMP socket '{}'", socket.display()), error)
    };
    let metadata = socket.metadata().map_err(step)?;
    Exclusive::take(
        &whose(socket),
        format!("instantsnap/{:x}:{:x}", metadata.dev(), metadata.ino()),
    )
}

/// Holds a QEMU process, by whichever backend it is opened elsewhere; `whose` says in an error what
/// is held by another.
pub fn hold_qemu(whose: &str, qemu: &QemuProcess) -> Result<Exclusive> {
    // A pid is used again one day; with its start time it is not.
    Exclusive::take(
        whose,
        format!("instantsnap/{}/{}", qemu.pid, start_time(qemu.pid).unwrap_or_default()),
    )
}

/// What messages call the guest behind a socket.
pub fn whose(socket: &Path) -> String {
    format!("the guest of QMP socket '{}'", socket.display())
}

fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The fields after the command, which is in parentheses and can hold anything; the start time
    // is field 22.
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// The path of its binary.
pub fn executable(pid: u32) -> Option<String> {
    std::fs::read_link(format!("/proc/{pid}/exe")).ok()?.into_os_string().into_string().ok()
}

/// A file name of QEMU's as an absolute path: relative ones are relative to where QEMU was started.
pub fn absolute(file: &str, pid: Option<u32>) -> Option<String> {
    if file.starts_with('/') {
        return Some(file.into());
    }
    let directory: PathBuf = std::fs::read_link(format!("/proc/{}/cwd", pid?)).ok()?;
    let path = directory.join(Path::new(file));
    path.exists().then(|| path.into_os_string().into_string().ok()).flatten()
}
