// SPDX-License-Identifier: LGPL-2.1-or-later

//! Reads the environment. A program with more rights than its user (setuid, capabilities) ignores
//! it.

use std::ffi::OsString;
use std::io::Write;

use instantsnap_core::error::{Result, fail};
use instantsnap_core::image::Format;

/// The value of a variable; `None` if it is not set, or empty.
pub fn variable(name: &str) -> Option<OsString> {
    // SAFETY: reads a value that the kernel gave this process at its start.
    if unsafe { libc::getauxval(libc::AT_SECURE) } != 0 {
        return None;
    }
    std::env::var_os(name).filter(|value| !value.is_empty())
}

/// Whether LIVE snapshots are made as INSTANT ones.
pub fn upgrade_live() -> bool {
    variable("INSTANTSNAP_UPGRADE_LIVE").is_some_and(|value| value == "1")
}

/// The format of memory images that the environment asks for; `None`: the default.
pub fn image_format() -> Result<Option<Format>> {
    const NAME: &str = "INSTANTSNAP_IMAGE_FORMAT";
    let Some(name) = variable(NAME) else { return Ok(None) };
    match name.to_str().and_then(Format::named) {
        Some(format) => Ok(Some(format)),
        None => fail!(
            InvalidArg,
            "the environment variable {NAME} is '{}', and may be raw, zstd or sparse",
            name.display()
        ),
    }
}

/// Writes a debug message to stderr, if these are on.
pub fn debug(message: &str) {
    if variable("INSTANTSNAP_DEBUG").is_some() {
        say(message);
    }
}

/// Writes a message to stderr.
pub fn say(message: &str) {
    let _ = writeln!(std::io::stderr(), "instantsnap-preload: {message}");
}
