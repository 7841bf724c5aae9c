// SPDX-License-Identifier: LGPL-2.1-or-later

//! Which names and paths a snapshot can have.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::{Result, fail};

/// Names for a snapshot that was given none, the first choice first: the time in seconds, as
/// libvirt has it.
pub fn generated_names() -> impl Iterator<Item = String> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    (0..1000).map(move |n| if n == 0 { seconds.to_string() } else { format!("{seconds}-{n}") })
}

/// A snapshot's name is the name of a file, as in libvirt: no `/`, no leading dot; and nothing that
/// a terminal or a line-based tool would trip over.
pub fn check_name(name: &str) -> Result<()> {
    // NAME.xml, and while it is written a hidden name that is a little longer, must fit into
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

/// A path that can be recorded: absolute, and expressible in XML.
pub fn check_path(what: &str, path: &str) -> Result<()> {
    if !path.starts_with('/') {
        fail!(XmlError, "{what} '{path}' must be an absolute path");
    }
    if path.chars().any(char::is_control) {
        fail!(XmlError, "{what} {path:?} can't contain control characters");
    }
    Ok(())
}
