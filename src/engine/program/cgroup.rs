// SPDX-License-Identifier: LGPL-2.1-or-later

//! A cgroup of its own for the program, so that what happens to the caller's cgroup (a service that
//! is stopped, a freeze) does not happen to the watchdog.

use std::env;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::sys;

/// The environment variable that names the directory of a cgroup (v2) for the program.
const SETTING: &str = "INSTANTSNAP_WATCHDOG_CGROUP";

/// The directory of the cgroup that the program is to be in, if the caller's environment names one.
pub fn setting() -> Option<PathBuf> {
    env::var_os(SETTING).filter(|named| !named.is_empty() && !sys::is_secure()).map(PathBuf::from)
}

/// Moves this process to a cgroup.
pub fn enter(cgroup: &Path) -> io::Result<()> {
    // 0 stands for the process that writes it. The file exists already: it is not to be created in
    // a directory that is no cgroup.
    File::options().write(true).open(cgroup.join("cgroup.procs"))?.write_all(b"0")
}
