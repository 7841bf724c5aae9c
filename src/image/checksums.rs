// SPDX-License-Identifier: LGPL-2.1-or-later

//! Checksums of a guest's memory, by which damaged pages of an image are found.
//!
//! There is one for each MiB: the sum of the hashes of its pages that are not zero. So it does not
//! depend on the order in which the pages come, nor on the image's format. It finds damage, not
//! forgery.

use twox_hash::XxHash3_64;

use super::records::{Block, Content, PAGE};

/// The pages of one checksum.
pub const GROUP: u64 = 256;

/// The checksums of all blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checksums {
    blocks: Vec<Vec<u64>>,
}

impl Checksums {
    pub fn new(blocks: &[Block]) -> Checksums {
        let groups = |block: &Block| (block.size / PAGE as u64).div_ceil(GROUP) as usize;
        Checksums { blocks: blocks.iter().map(|block| vec![0; groups(block)]).collect() }
    }

    /// Adds a page.
    pub fn add(&mut self, block: usize, page: u64, content: &Content) {
        let sum = &mut self.blocks[block][(page / GROUP) as usize];
        *sum = sum.wrapping_add(hash(page, content));
    }

    /// Takes a page away that was added.
    pub fn take(&mut self, block: usize, page: u64, content: &Content) {
        let sum = &mut self.blocks[block][(page / GROUP) as usize];
        *sum = sum.wrapping_sub(hash(page, content));
    }

    /// The checksums of a block.
    pub fn of(&self, block: usize) -> &[u64] {
        &self.blocks[block]
    }

    /// Sets a checksum; `None` if there is no such group of pages.
    pub fn set(&mut self, block: usize, group: u64, sum: u64) -> Option<()> {
        let groups = self.blocks.get_mut(block)?;
        *groups.get_mut(usize::try_from(group).ok()?)? = sum;
        Some(())
    }

    /// The first group whose checksum differs from that of the other ones, with its block.
    pub fn difference(&self, other: &Checksums) -> Option<(usize, u64)> {
        for (block, (own, other)) in self.blocks.iter().zip(&other.blocks).enumerate() {
            if let Some(group) = own.iter().zip(other).position(|(own, other)| own != other) {
                return Some((block, group as u64));
            }
        }
        None
    }
}

/// The hash of a page at its place; 0 of a page of zeros.
fn hash(page: u64, content: &Content) -> u64 {
    match content {
        Content::Fill(0) => 0,
        Content::Data(bytes) if **bytes == ZEROS => 0,
        Content::Data(bytes) => XxHash3_64::oneshot_with_seed(page, bytes),
        Content::Fill(byte) => XxHash3_64::oneshot_with_seed(page, &[*byte; PAGE]),
    }
}

static ZEROS: [u8; PAGE] = [0; PAGE];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_depend_on_content_and_place_and_not_on_the_order() {
        let blocks = [(&b"pc.ram"[..], 1000), (b"rom", 2)]
            .map(|(name, pages)| Block { name: name.into(), size: pages * PAGE as u64 });
        let page = |byte: u8| [byte; PAGE];
        let sums = |pages: &[(usize, u64, u8)]| {
            let mut sums = Checksums::new(&blocks);
            for (block, number, byte) in pages {
                sums.add(*block, *number, &Content::Data(&page(*byte)));
            }
            sums
        };
        let one = sums(&[(0, 1, 7), (0, 999, 8), (1, 1, 9)]);
        let other = sums(&[(1, 1, 9), (0, 5, 0), (0, 999, 8), (0, 1, 7)]);
        assert_eq!(one.difference(&other), None);
        assert_eq!(one.difference(&sums(&[(0, 2, 7), (0, 999, 8), (1, 1, 9)])), Some((0, 0)));
        assert_eq!(one.difference(&sums(&[(0, 1, 7), (0, 999, 9), (1, 1, 9)])), Some((0, 3)));
        assert_eq!(one.difference(&sums(&[(0, 1, 7), (0, 999, 8)])), Some((1, 0)));
        let mut changed = sums(&[(0, 1, 7), (0, 999, 3), (1, 1, 9)]);
        changed.take(0, 999, &Content::Fill(3));
        changed.add(0, 999, &Content::Fill(8));
        assert_eq!(changed, one);
    }
}
