// SPDX-License-Identifier: LGPL-2.1-or-later

//! What /proc says of processes, of this boot of the host, and of this process's namespaces; and
//! the name of the host.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::fs;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;

/// The state and the start of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    /// The kernel's letter for its state: `Z` for a zombie, `T` or `t` for one that is stopped.
    pub state: char,
    /// When it was started, in ticks since the host's boot. Together with the number of a process
    /// it is unique.
    pub started: u64,
}

impl Stat {
    /// Reads those of the process with this number, as it is named in /proc.
    pub fn read(process: impl Display) -> Option<Stat> {
        let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
        // The fields after the command, which is in parentheses and can hold anything. The start
        // time is field 22.
        let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
        let state = fields.next()?.chars().next()?;
        Some(Stat { state, started: fields.nth(18)?.parse().ok()? })
    }

    /// When a process was started that still does something. A zombie does not.
    pub fn start_if_alive(process: impl Display) -> Option<u64> {
        Stat::read(process).filter(|stat| stat.state != 'Z').map(|stat| stat.started)
    }
}

/// The kernel's name of this boot of the host.
pub fn boot() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().into()
}

/// When this boot of the host began, in seconds since the epoch, by its present clock.
pub fn boot_time() -> Option<u64> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}

/// Identifies this host among others: its machine id (machine-id(5)), or else its network name.
pub fn machine() -> String {
    let id = ["/etc/machine-id", "/var/lib/dbus/machine-id"].into_iter().find_map(|file| {
        fs::read_to_string(file).ok().map(|id| id.trim().to_owned()).filter(|id| !id.is_empty())
    });
    id.unwrap_or_else(|| rustix::system::uname().nodename().to_string_lossy().into_owned())
}

/// The name of this process's namespace of this kind: `pid`, `net`.
pub fn namespace(kind: &str) -> String {
    let link = fs::read_link(format!("/proc/self/ns/{kind}")).unwrap_or_default();
    link.to_string_lossy().into_owned()
}

/// A part of a file that a process has mapped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Where the part is in the file.
    pub file: Range<u64>,
    /// The file's inode. Its device is not here, because the kernel names another one than stat()
    /// for the files of some file systems.
    pub inode: u64,
    /// The file's path as it was when it was opened.
    pub path: String,
}

/// The parts of files that a process has mapped privately: what it writes there is its own.
pub fn private_parts(process: impl Display) -> io::Result<Vec<Part>> {
    let maps = fs::read(format!("/proc/{process}/maps"))?;
    let maps = String::from_utf8_lossy(&maps);
    Ok(maps.lines().filter_map(private_part).collect())
}

/// Parses a line of /proc/PID/maps: addresses, permissions, offset, device, inode, path.
fn private_part(line: &str) -> Option<Part> {
    let mut fields = line.splitn(6, ' ');
    let (begin, end) = fields.next()?.split_once('-')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    let length = number(end)?.checked_sub(number(begin)?)?;
    fields.next()?.ends_with('p').then_some(())?;
    let offset = number(fields.next()?)?;
    let inode = fields.nth(1)?.parse().ok().filter(|inode| *inode != 0)?;
    let path = fields.next().unwrap_or_default().trim_start().to_owned();
    Some(Part { file: offset..offset.checked_add(length)?, inode, path })
}

/// The paths by which a process has opened the file with this device and inode.
pub fn files(process: impl Display, id: (u64, u64)) -> io::Result<BTreeSet<String>> {
    let mut paths = BTreeSet::new();
    for entry in fs::read_dir(format!("/proc/{process}/fd"))? {
        let link = entry?.path();
        // The descriptor may have been closed meanwhile.
        if let (Ok(file), Ok(path)) = (link.metadata(), link.read_link())
            && (file.dev(), file.ino()) == id
        {
            paths.insert(path.to_string_lossy().into_owned());
        }
    }
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_mappings_of_files_are_found_in_their_lines() {
        let line = "7f0000000000-7f0001000000 rw-p 00200000 fe:01 1234        /a b/s.mem (deleted)";
        let part =
            Part { file: 0x20_0000..0x120_0000, inode: 1234, path: "/a b/s.mem (deleted)".into() };
        assert_eq!(private_part(line), Some(part));
        for line in [
            "7f0000000000-7f0001000000 rw-s 00200000 fe:01 1234        /a/s.mem",
            "7f0000000000-7f0001000000 rw-p 00000000 00:00 0           [heap]",
            "7f0000000000-7f0001000000 rw-p 00000000 00:00 0",
            "7f0000000000",
            "",
        ] {
            assert_eq!(private_part(line), None, "{line}");
        }
    }

    #[test]
    fn open_files_of_a_process_are_found_by_their_inode() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let metadata = file.as_file().metadata().unwrap();
        let found = files(std::process::id(), (metadata.dev(), metadata.ino())).unwrap();
        assert_eq!(found, BTreeSet::from([file.path().to_str().unwrap().to_owned()]));
        assert!(files(std::process::id(), (metadata.dev(), u64::MAX)).unwrap().is_empty());
        assert!(files(u32::MAX, (0, 0)).is_err());
    }
}
