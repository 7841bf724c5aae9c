// SPDX-License-Identifier: LGPL-2.1-or-later

//! The names and paths that a snapshot can have.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::{Result, fail};

/// Names for a snapshot without one, the first choice first: the time in seconds, as in libvirt.
pub fn generated_names() -> impl Iterator<Item = String> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    (0..1000).map(move |n| if n == 0 { seconds.to_string() } else { format!("{seconds}-{n}") })
}

/// Refuses a name that cannot be the name of a file, as libvirt does: one with a `/` or a leading
/// dot. Also refuses control characters, which terminals and line-based tools cannot handle.
pub fn check_name(name: &str) -> Result<()> {
    // NAME.xml, and the slightly longer hidden name of the file while it is written, must fit into
    // NAME_MAX (255 bytes).
    const LONGEST: usize = 230;
    if name.is_empty() {
        fail!(XmlDetail, "invalid snapshot name: it is empty");
    }
    if name.contains('/') {
        fail!(XmlDetail, "invalid snapshot name '{name}': name can't contain '/'");
    }
    if name.starts_with('.') {
        fail!(XmlDetail, "invalid snapshot name '{name}': name can't start with '.'");
    }
    if name.chars().any(char::is_control) {
        fail!(XmlDetail, "invalid snapshot name {name:?}: name can't contain control characters");
    }
    if name.len() > LONGEST {
        fail!(XmlDetail, "invalid snapshot name: {} bytes, {LONGEST} are allowed", name.len());
    }
    Ok(())
}

/// Refuses a path that cannot be recorded: it must be absolute, and XML must be able to hold it.
pub fn check_path(what: &str, path: &str) -> Result<()> {
    if !path.starts_with('/') {
        fail!(XmlError, "{what} '{path}' must be an absolute path");
    }
    if path.chars().any(char::is_control) {
        fail!(XmlError, "{what} {path:?} can't contain control characters");
    }
    Ok(())
}
