// SPDX-License-Identifier: LGPL-2.1-or-later

//! What /proc says of processes, of this boot of the host, and of this process's namespaces.

use std::fmt::Display;
use std::fs;

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

/// The name of this process's namespace of this kind: `pid`, `net`.
pub fn namespace(kind: &str) -> String {
    let link = fs::read_link(format!("/proc/self/ns/{kind}")).unwrap_or_default();
    link.to_string_lossy().into_owned()
}
