// SPDX-License-Identifier: LGPL-2.1-or-later

//! Removes this library from the environment when a daemon's process loads it.
//!
//! libvirt passes `LD_PRELOAD` on to each QEMU that it starts, and to its helpers. There the
//! library has nothing to do, and the security policy may forbid to read it. So the daemon removes
//! the library from the variable. Other preloaded libraries stay.

use std::env;
use std::ffi::OsStr;
use std::path::Path;

use instantsnap_core::boundary::boundary;

const PRELOAD: &str = "LD_PRELOAD";
const DAEMONS: [&str; 2] = ["libvirtd", "virtqemud"];
/// The names of this library, as it is installed and as cargo has built it; and libinstantsnap,
/// which earlier versions preloaded into daemons.
const OURS: [&str; 3] =
    ["libinstantsnap-preload.so", "libinstantsnap_preload.so", "libinstantsnap.so"];

#[used]
#[unsafe(link_section = ".init_array")]
static AT_LOAD: extern "C" fn() = at_load;

/// Does nothing, except in a daemon that preloads this library. Errors are ignored.
extern "C" fn at_load() {
    boundary(drop, || {
        let preload = env::var_os(PRELOAD);
        let others = preload.as_ref().and_then(|preload| without_us(preload.to_str()?));
        if let Some(others) = others.filter(|_| has_daemons_name()) {
            remove_from_environment(&others);
        }
        Ok(())
    });
}

/// Whether this process has the name of a daemon with libvirt's QEMU driver.
pub fn has_daemons_name() -> bool {
    std::fs::read_to_string("/proc/self/comm").is_ok_and(|name| DAEMONS.contains(&name.trim_end()))
}

fn remove_from_environment(others: &str) {
    // SAFETY: `LD_PRELOAD` names this library, so the process is just being started, and has one
    // thread.
    unsafe {
        match others.is_empty() {
            true => env::remove_var(PRELOAD),
            false => env::set_var(PRELOAD, others),
        }
    }
}

/// A list of libraries without this one; `None` if this one is not in it.
fn without_us(list: &str) -> Option<String> {
    let libraries: Vec<_> = list.split([':', ' ']).filter(|library| !library.is_empty()).collect();
    let is_us = |library: &&str| {
        let name = Path::new(library).file_name().and_then(OsStr::to_str);
        name.is_some_and(|name| OURS.iter().any(|ours| name.starts_with(ours)))
    };
    let others: Vec<_> = libraries.iter().filter(|library| !is_us(library)).copied().collect();
    (others.len() < libraries.len()).then(|| others.join(":"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_that_are_preloaded_stay() {
        assert_eq!(without_us("/usr/lib/libinstantsnap-preload.so").as_deref(), Some(""));
        assert_eq!(
            without_us("/a.so:/usr/lib/libinstantsnap-preload.so /b.so").as_deref(),
            Some("/a.so:/b.so")
        );
        assert_eq!(
            without_us("/l/libinstantsnap.so.0:/a.so:/l/libinstantsnap_preload.so").as_deref(),
            Some("/a.so")
        );
        assert_eq!(without_us("/a.so:/usr/lib/libinstant.so"), None);
    }
}
