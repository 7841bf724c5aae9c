// SPDX-License-Identifier: LGPL-2.1-or-later

//! What the environment says. A program with more rights than its user (setuid, capabilities) does
//! not listen to it.

use std::ffi::OsString;
use std::io::Write;

/// A variable that is set, and not to nothing.
pub fn variable(name: &str) -> Option<OsString> {
    // SAFETY: reads a value that the kernel gave this process at its start.
    if unsafe { libc::getauxval(libc::AT_SECURE) } != 0 {
        return None;
    }
    std::env::var_os(name).filter(|value| !value.is_empty())
}

/// Whether LIVE snapshots are to be instant.
pub fn upgrade_live() -> bool {
    variable("INSTANTSNAP_UPGRADE_LIVE").is_some_and(|value| value == "1")
}

/// A line on stderr that says what this library does.
pub fn debug(message: &str) {
    if variable("INSTANTSNAP_DEBUG").is_some() {
        say(message);
    }
}

/// A line on stderr.
pub fn say(message: &str) {
    let _ = writeln!(std::io::stderr(), "instantsnap-preload: {message}");
}
