// SPDX-License-Identifier: LGPL-2.1-or-later

//! Reads which library the running daemons have.

use std::fs;
use std::io::Read;
use std::path::Path;

use super::library::Kind;
use super::root::Root;
use super::{Result, library};

/// The processes with this name.
pub fn called(name: &str) -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let is_called = |pid: &u32| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == name)
    };
    let mut pids: Vec<u32> = pids.filter(is_called).collect();
    pids.sort_unstable();
    pids
}

/// One of our libraries in a process.
pub struct Mapped {
    pub kind: Kind,
    /// Its path, and its version.
    pub shown: String,
}

/// Our library in a process; `None` if it has none.
pub fn mapped(pid: u32) -> Result<Option<Mapped>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))
        .map_err(|error| format!("cannot look into process {pid} (are you root?): {error}"))?;
    let Some((kind, path)) = library_of(&maps) else { return Ok(None) };
    let shown = match path.strip_suffix(" (deleted)") {
        Some(path) => format!("{path}, which was replaced since: restart it to have the new one"),
        None => {
            // The path is as the process sees it.
            let mut bytes = Vec::new();
            let read = Root::open(Path::new(&format!("/proc/{pid}/root")))
                .and_then(|root| root.open_file(path))
                .and_then(|mut file| file.read_to_end(&mut bytes));
            let version = read.ok().and_then(|_| library::version(&bytes));
            format!("{path}, version {}", version.as_deref().unwrap_or("unknown"))
        }
    };
    Ok(Some(Mapped { kind, shown }))
}

/// Our library among the mapped files. If both kinds are mapped, that for LD_PRELOAD.
fn library_of(maps: &str) -> Option<(Kind, &str)> {
    let ours = || {
        maps.lines().filter_map(|line| {
            let path = &line[line.find('/')?..];
            Some((Kind::of(path)?, path))
        })
    };
    ours().find(|(kind, _)| *kind == Kind::Preload).or_else(|| ours().next())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_library_is_told_from_others() {
        let line =
            |path: &str| format!("7f00-7f01 r-xp 00000000 fe:01 42                 {path}\n");
        let others =
            line("/usr/lib/libinstant.so") + &line("[heap]") + &line("/usr/lib/libvirt.so.0");
        assert_eq!(library_of(&others), None);
        let former = "/usr/lib/libinstantsnap.so.0.1.0 (deleted)";
        let maps = others + &line(former);
        assert_eq!(library_of(&maps), Some((Kind::Former, former)));
        let path = "/usr/lib/libinstantsnap-preload.so";
        assert_eq!(library_of(&(maps + &line(path))), Some((Kind::Preload, path)));
    }
}
