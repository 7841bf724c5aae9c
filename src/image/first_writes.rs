// SPDX-License-Identifier: LGPL-2.1-or-later

//! Which pages the guest wrote first after the instant.
//!
//! QEMU saves memory from the first page to the last one. Before the guest's first write to a page
//! that is not saved yet, QEMU saves that page, and goes on from there. So a page that comes out of
//! this order is one that the guest wrote.

use std::ops::Range;

use super::page_map::PageMap;
use super::records::{Block, PAGE};

/// Pages that come one after the other in their block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pages {
    /// The place of the block in the list of blocks.
    pub block: u32,
    /// How many pages.
    pub count: u32,
    /// The first one.
    pub first: u64,
}

impl Pages {
    /// The numbers of the pages.
    pub fn numbers(&self) -> Range<u64> {
        self.first..self.first + u64::from(self.count)
    }
}

/// The most entries of the list. What the guest wrote later matters less.
pub const MOST: usize = 1 << 17;
/// The most pages that are looked at to find out whether nothing was left out before a page. This
/// limits the time, whatever the order of the pages is.
const LONGEST_LOOK: u64 = 1 << 16;

/// Notes the order of pages.
#[derive(Debug)]
pub struct FirstWrites {
    seen: Vec<PageMap>,
    last: Option<(usize, u64)>,
    list: Vec<Pages>,
}

impl FirstWrites {
    pub fn new(blocks: &[Block]) -> FirstWrites {
        let maps = blocks.iter().map(|block| PageMap::new(block.size / PAGE as u64));
        FirstWrites { seen: maps.collect(), last: None, list: Vec::new() }
    }

    /// Notes the next page of the stream. Returns whether it has come before.
    pub fn page(&mut self, block: usize, page: u64) -> bool {
        let again = self.seen[block].has(page);
        if !again && !self.is_next(block, page) {
            self.add(block, page);
        }
        self.seen[block].set(page);
        self.last = Some((block, page));
        again
    }

    /// The list: the first page that the guest wrote comes first.
    pub fn list(&self) -> &[Pages] {
        &self.list
    }

    /// Whether all pages between the last page and this one have come before.
    fn is_next(&self, block: usize, page: u64) -> bool {
        let Some((last_block, last)) = self.last else { return page == 0 };
        if last_block == block && last < page {
            return self.has_all(block, last + 1..page);
        }
        self.has_all(last_block, last + 1..self.seen[last_block].pages())
            && self.has_all(block, 0..page)
    }

    fn has_all(&self, block: usize, pages: Range<u64>) -> bool {
        if pages.is_empty() {
            return true;
        }
        let looked = pages.end - pages.start <= LONGEST_LOOK;
        looked && self.seen[block].next(pages.start, false).is_none_or(|next| next >= pages.end)
    }

    fn add(&mut self, block: usize, page: u64) {
        if let Some(last) = self.list.last_mut()
            && last.block as usize == block
            && last.numbers().end == page
            && last.count < u32::MAX
        {
            last.count += 1;
            return;
        }
        if let Ok(block) = u32::try_from(block)
            && self.list.len() < MOST
        {
            self.list.push(Pages { block, count: 1, first: page });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks() -> Vec<Block> {
        [(&b"pc.ram"[..], 100), (b"rom", 4)]
            .map(|(name, pages)| Block { name: name.into(), size: pages * PAGE as u64 })
            .into()
    }

    fn list(pages: impl IntoIterator<Item = (usize, u64)>) -> Vec<(u32, u64, u32)> {
        let mut order = FirstWrites::new(&blocks());
        pages.into_iter().for_each(|(block, page)| {
            order.page(block, page);
        });
        order.list().iter().map(|pages| (pages.block, pages.first, pages.count)).collect()
    }

    #[test]
    fn pages_that_come_out_of_order_are_those_that_the_guest_wrote() {
        let ram = |pages: Range<u64>| pages.map(|page| (0, page));
        let rom = |pages: Range<u64>| pages.map(|page| (1, page));
        assert_eq!(list(ram(0..100).chain(rom(0..4))), []);
        // QEMU goes on behind a page that the guest wrote, and leaves out what has come.
        let stream = ram(0..10)
            .chain(ram(50..60))
            .chain(rom(3..4))
            .chain(ram(40..50))
            .chain(ram(60..100))
            .chain(rom(0..3))
            .chain(ram(10..40));
        assert_eq!(list(stream), [(0, 50, 1), (1, 3, 1), (0, 40, 1)]);
        // Writes to neighbours in descending order are entries of their own, and so are jumps.
        let stream = ram(0..1).chain([(0, 90), (0, 89), (0, 88), (0, 20)]).chain(ram(21..88));
        assert_eq!(list(stream), [(0, 90, 1), (0, 89, 1), (0, 88, 1), (0, 20, 1)]);
        // The first page is in order only if it is that of a block.
        assert_eq!(list(ram(7..9)), [(0, 7, 1)]);
    }

    #[test]
    fn the_list_has_a_limit_and_a_page_that_comes_again_is_told() {
        let pages = 4 * MOST as u64;
        let block = Block { name: b"ram".into(), size: pages * PAGE as u64 };
        let mut order = FirstWrites::new(&[block]);
        for page in (0..pages as usize).step_by(2).rev().map(|page| page as u64) {
            assert!(!order.page(0, page));
        }
        assert_eq!(order.list().len(), MOST);
        assert_eq!(order.list()[0].first, pages - 2);
        assert!(order.page(0, 2));
    }
}
