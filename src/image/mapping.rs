// SPDX-License-Identifier: LGPL-2.1-or-later

//! Which parts of a sparse memory image a QEMU can map as its memory.

use super::file::Image;
use super::records::Block;

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
