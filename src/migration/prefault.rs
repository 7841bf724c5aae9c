// SPDX-License-Identifier: LGPL-2.1-or-later

//! Prefault: touches the guest's memory from outside, while the guest runs.
//!
//! QEMU touches every page before it arms. A page that is not in memory (never used, or swapped
//! out) makes that slow: the kernel fetches it then, in the pause if the guest has been stopped.
//! Prefault reads one byte of each page beforehand, from QEMU's memory by the kernel's
//! `process_vm_readv`. Where that is not permitted, or QEMU's process is not known, only time is
//! lost. Prefault takes several times as long as QEMU takes for pages that are in memory, and
//! delays the instant by that, so it has a time limit.
//!
//! It touches only what QEMU itself would touch. QEMU skips the memory of a virtio-mem device that
//! the guest has not plugged in; to read it would allocate it where it is shared or of huge pages.
//! (QEMU does touch memory that a balloon has taken.)

use std::fs;
use std::time::{Duration, Instant};

use crate::backend::{DEFAULT_TIMEOUT, Guest};
use crate::cancel::Cancel;
use crate::deadline::Deadline;
use crate::error::Result;
use crate::monitor::commands;
use crate::sys;

/// Smaller mappings are QEMU's own, or not worth it.
const SMALLEST: u64 = 16 << 20;
/// A multiple of the pages that the kernel reads at once.
const PIECE: u64 = 4 << 20;
/// Prefault ends after this time.
const LIMIT: Duration = Duration::from_secs(3);

/// Touches the memory of the guest that the process `pid` runs.
pub fn prefault(guest: &mut dyn Guest, pid: u32, cancel: &Cancel) -> Result<()> {
    let Ok(maps) = fs::read_to_string(format!("/proc/{pid}/maps")) else { return Ok(()) };
    // A failure here must not fail the snapshot: without QEMU's answer nothing is touched.
    let Ok(partly_plugged) =
        commands::query_partly_plugged(guest, Deadline::after(DEFAULT_TIMEOUT))
    else {
        return Ok(());
    };
    let until = Instant::now() + LIMIT;
    for (begin, end) in plugged(maps.lines().filter_map(memory).collect(), &partly_plugged) {
        for piece in (begin..end).step_by(PIECE as usize) {
            cancel.check()?;
            if sys::touch(pid, piece, end.min(piece + PIECE)).is_err() {
                break;
            }
            if Instant::now() > until {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// The mappings without those of devices whose memory is only partly plugged in, which are
/// recognized by their sizes. Returns no mapping if one of these is not found, because any mapping
/// could be it.
fn plugged(mut mappings: Vec<(u64, u64)>, partly_plugged: &[u64]) -> Vec<(u64, u64)> {
    let length = |(begin, end): &(u64, u64)| end - begin;
    let found = |size: &u64| mappings.iter().filter(|mapping| length(mapping) == *size).count();
    if partly_plugged
        .iter()
        .any(|size| found(size) < partly_plugged.iter().filter(|other| *other == size).count())
    {
        return Vec::new();
    }
    mappings.retain(|mapping| !partly_plugged.contains(&length(mapping)));
    mappings
}

/// The addresses of a mapping that can be guest memory: it is large, readable and writable, and not
/// executable, as QEMU's translated code is.
fn memory(line: &str) -> Option<(u64, u64)> {
    let mut fields = line.split_ascii_whitespace();
    let (begin, end) = fields.next()?.split_once('-')?;
    let [begin, end] = [begin, end].map(|address| u64::from_str_radix(address, 16));
    let (begin, end) = (begin.ok()?, end.ok()?);
    (fields.next()?.starts_with("rw-") && end.checked_sub(begin)? >= SMALLEST)
        .then_some((begin, end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_told_from_other_mappings() {
        let anonymous = "7f0000000000-7f0020000000 rw-p 00000000 00:00 0 ";
        assert_eq!(memory(anonymous), Some((0x7f00_0000_0000, 0x7f00_2000_0000)));
        let memfd =
            "7f0000000000-7f0020000000 rw-s 00000000 00:01 5 /memfd:memory-backend-memfd (deleted)";
        assert!(memory(memfd).is_some());
        assert_eq!(memory("7f0000000000-7f0040000000 rwxp 00000000 00:00 0"), None);
        assert_eq!(memory("7f0000000000-7f0000021000 rw-p 00000000 00:00 0"), None);
        assert_eq!(memory("7f0000000000-7f0020000000 ---p 00000000 00:00 0"), None);
        assert_eq!(memory("no mapping"), None);
    }

    #[test]
    fn memory_that_is_not_plugged_in_is_left_out() {
        let (small, large) = ((0, 64 << 20), (1 << 40, (1 << 40) + (256 << 20)));
        assert_eq!(plugged(vec![small, large], &[]), [small, large]);
        assert_eq!(plugged(vec![small, large], &[256 << 20]), [small]);
        assert!(plugged(vec![small, large], &[128 << 20]).is_empty());
        assert!(plugged(vec![small, large], &[256 << 20, 256 << 20]).is_empty());
    }

    #[test]
    fn memory_is_touched_and_what_is_none_is_an_error() {
        let memory = vec![1u8; 3 << 20];
        let begin = memory.as_ptr() as u64;
        sys::touch(std::process::id(), begin, begin + memory.len() as u64).unwrap();
        sys::touch(std::process::id(), 4096, 8192).expect_err("nothing is mapped there");
    }
}
