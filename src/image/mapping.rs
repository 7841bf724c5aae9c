// SPDX-License-Identifier: LGPL-2.1-or-later

//! Which parts of a sparse memory image a QEMU can map as its memory.

use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::file::Image;
use super::records::{Block, PAGE};

/// The prefix of the names of some memory blocks: those of memory backends of old machine types.
const OBJECTS: &str = "/objects/";
/// The ends of the names of blocks that belong to a device or to firmware, and have no backend.
const OF_DEVICES: [&str; 6] = [".bios", ".rom", ".vram", ".vgavram", ".flash0", ".flash1"];
/// Less memory than any memory backend of a guest has.
const SMALLEST: u64 = 1 << 20;

/// A memory block of the guest, and where its pages are in the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The number of the block.
    pub block: usize,
    /// The id of the memory backend that has this block.
    pub id: String,
    /// Whether QEMU names the block by the backend's path instead of its id.
    pub by_path: bool,
    /// Where the pages begin in the file.
    pub offset: u64,
    /// The size of the block.
    pub size: u64,
}

impl Image {
    /// The blocks that memory backends can have: the guest's RAM, but not ROMs and the memory of
    /// devices. `None` if the pages are not at places of their own in the file.
    pub fn mappings(&self) -> Option<Vec<Mapping>> {
        let sparse = self.sparse.as_ref()?;
        let of = |(number, block): (usize, &Block)| {
            let name = std::str::from_utf8(&block.name).ok()?;
            let id = name.strip_prefix(OBJECTS).unwrap_or(name);
            (is_id(id) && block.size >= SMALLEST).then(|| Mapping {
                block: number,
                id: id.into(),
                by_path: id.len() < name.len(),
                offset: sparse.layout.places[number].pages,
                size: block.size,
            })
        };
        Some(sparse.blocks().filter_map(of).collect())
    }
}

impl Image {
    /// Checks that each page of a block that the image does not have is zero in the file, as a
    /// mapping needs it. This library leaves holes for such pages, but another program can leave
    /// old content there. The error is what is wrong.
    pub fn check_zeros(&self, mapping: &Mapping) -> Result<(), String> {
        let cannot = |error| format!("cannot be read: {error}");
        let Some(sparse) = &self.sparse else { return Err("has no place of its own".into()) };
        let data = self.data(mapping.offset, mapping.offset + mapping.size).map_err(cannot)?;
        let mut data = data.into_iter().peekable();
        let mut buffer = [0; PAGE];
        for piece in sparse.pieces(&self.file, mapping.block) {
            let (first, map) = piece?;
            let end = first + map.pages();
            while let Some((from, to)) = data.peek().copied() {
                for page in from.max(first)..to.min(end) {
                    if map.has(page - first) {
                        continue;
                    }
                    let at = mapping.offset + page * PAGE as u64;
                    self.file.read_exact_at(&mut buffer, at).map_err(cannot)?;
                    if buffer != [0; PAGE] {
                        return Err(format!("has old content in page {page}, which is zero"));
                    }
                }
                if to > end {
                    break;
                }
                data.next();
            }
        }
        Ok(())
    }

    /// The parts of the file from `begin` to `end` that are not holes, as pages from `begin`.
    fn data(&self, begin: u64, end: u64) -> std::io::Result<Vec<(u64, u64)>> {
        let page = PAGE as u64;
        let (mut parts, mut at) = (Vec::new(), begin);
        while at < end {
            let from = match seek(&self.file, SeekFrom::Data(at)) {
                Ok(from) if from < end => from,
                Ok(_) | Err(Errno::NXIO) => break,
                Err(errno) => return Err(errno.into()),
            };
            let to = seek(&self.file, SeekFrom::Hole(from))?.min(end);
            parts.push(((from - begin) / page, (to - begin).div_ceil(page)));
            at = to;
        }
        Ok(parts)
    }
}

/// Whether an object of QEMU can have this id, and no block of a device or of firmware is known to
/// have this name.
fn is_id(name: &str) -> bool {
    name.starts_with(|first: char| first.is_ascii_alphabetic())
        && name.chars().all(|sign| sign.is_ascii_alphanumeric() || "-._".contains(sign))
        && !OF_DEVICES.iter().any(|end| name.ends_with(end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_told_from_that_of_devices() {
        for name in ["pc.ram", "mach-virt.ram", "ram-node0", "mem-dimm1", "m"] {
            assert!(is_id(name), "{name}");
        }
        for name in [
            "pc.bios",
            "pc.rom",
            "vga.vram",
            "0000:00:02.0/vga.vram",
            "/rom@etc/acpi/tables",
            "system.flash0",
            "",
        ] {
            assert!(!is_id(name), "{name}");
        }
    }
}
