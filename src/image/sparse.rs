// SPDX-License-Identifier: LGPL-2.1-or-later

//! Where things are in a sparse memory image: libvirt's format 6, with QEMU's mapped-ram stream.
//!
//! ```text
//! head   as in any stream, with the capability mapped-ram noted in the configuration
//!        1, the memory's section as in any stream; each block's name and size is followed by
//!           u32 1, u64 4096, u64 offset of its bitmap, u64 offset of its pages; then its bitmap.
//!           The pages begin at the next multiple of 1 MiB, and the next block follows them
//! tail   the end of that section, an empty section of pages, then as in any stream
//! ```
//!
//! Offsets count from the beginning of the file. Bit k of a bitmap, in little-endian words of 64
//! bits, is set if page k is in the file. A page that is not has zeros everywhere.
//!
//! A reader of mapped-ram does not write the pages that are not in the file. But QEMU itself fills
//! some blocks before it loads: firmware and ACPI tables, which are small. So all bits of small
//! blocks are set here, also those of pages of zeros, which are holes in the file. (QEMU and
//! libvirt do not set them.)

use super::records::{Block, CAPABILITIES, Head, MAPPED_RAM, MAPPED_VERSION, PAGE};

/// The alignment of the pages of a block.
pub const ALIGN: u64 = 1 << 20;
/// The length of what follows the size of a block.
const PLACES: u64 = 4 + 3 * 8;

/// Larger than any block that QEMU fills before it loads: firmware has some MiB.
const SMALL: u64 = 64 << 20;

/// Whether QEMU may fill this block before it loads.
pub fn is_small(block: &Block) -> bool {
    block.size < SMALL
}

/// The offsets of a block in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Where its entry begins.
    pub entry: u64,
    pub bitmap: u64,
    pub pages: u64,
}

/// The offsets of all that is in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Where the stream begins.
    pub begin: u64,
    pub places: Vec<Place>,
    /// Where the tail begins, with the end of the memory's section.
    pub tail: u64,
}

impl Layout {
    /// The layout of a stream with this head that begins at this offset of the file. `None` if the
    /// file would be longer than any file can be.
    pub fn new(head: &Head, begin: u64) -> Option<Layout> {
        let mut at = begin.checked_add(opening(head).len() as u64)?;
        let mut places = Vec::with_capacity(head.blocks.len());
        for block in &head.blocks {
            let entry = at;
            let bitmap = entry + 1 + block.name.len() as u64 + 8 + PLACES;
            let pages = (bitmap + bitmap_length(block)).checked_next_multiple_of(ALIGN)?;
            at = pages.checked_add(block.size)?;
            places.push(Place { entry, bitmap, pages });
        }
        i64::try_from(at).ok()?;
        Some(Layout { begin, places, tail: at })
    }

    /// The bytes that belong to the head, each with its offset in the file. The bitmaps are not
    /// among them.
    pub fn head(&self, head: &Head) -> Vec<(u64, Vec<u8>)> {
        let entries = self.places.iter().zip(&head.blocks).map(|(place, block)| {
            let mut entry = vec![block.name.len() as u8];
            entry.extend_from_slice(&block.name);
            entry.extend_from_slice(&block.size.to_be_bytes());
            entry.extend_from_slice(&MAPPED_VERSION.to_be_bytes());
            for number in [PAGE as u64, place.bitmap, place.pages] {
                entry.extend_from_slice(&number.to_be_bytes());
            }
            (place.entry, entry)
        });
        [(self.begin, opening(head))].into_iter().chain(entries).collect()
    }

    /// The bytes between the last page and the devices.
    pub fn middle(head: &Head) -> Vec<u8> {
        [head.section_end(), head.part_start(), head.section_end()].concat()
    }
}

/// The length of a bitmap in bytes.
pub fn bitmap_length(block: &Block) -> u64 {
    (block.size / PAGE as u64).div_ceil(64) * 8
}

/// The stream up to the first block's entry.
fn opening(head: &Head) -> Vec<u8> {
    let (before, after) = head.configuration.split_at(head.capabilities_at);
    [
        before,
        &[5, CAPABILITIES.len() as u8],
        CAPABILITIES,
        // The subsection's version, and the number of capabilities.
        &1u32.to_be_bytes(),
        &1u32.to_be_bytes(),
        &[MAPPED_RAM.len() as u8],
        MAPPED_RAM,
        after,
        &head.section_start(),
        &head.total(),
    ]
    .concat()
}
