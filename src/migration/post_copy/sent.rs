// SPDX-License-Identifier: LGPL-2.1-or-later

//! Which pages were sent. The process that sends shares this with its spare.

use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;

use crate::image::{Block, PAGE, PageMap};
use crate::sys::ForkedNumbers;

/// A bit for each page of each block.
#[derive(Debug)]
pub struct Sent {
    words: ForkedNumbers,
    /// For each block its first word and its number of pages.
    blocks: Vec<(usize, u64)>,
}

impl Sent {
    pub fn new(blocks: &[Block]) -> io::Result<Sent> {
        let mut count = 0;
        let mut places = Vec::new();
        for block in blocks {
            let pages = block.size / PAGE as u64;
            places.push((count, pages));
            count += pages.div_ceil(64) as usize;
        }
        Ok(Sent { words: ForkedNumbers::new(count)?, blocks: places })
    }

    pub fn has(&self, block: usize, page: u64) -> bool {
        let word = self.blocks[block].0 + (page / 64) as usize;
        self.words[word].load(Ordering::Relaxed) >> (page % 64) & 1 == 1
    }

    pub fn add(&self, block: usize, pages: Range<u64>) {
        for page in pages {
            let word = self.blocks[block].0 + (page / 64) as usize;
            self.words[word].fetch_or(1 << (page % 64), Ordering::Relaxed);
        }
    }

    /// Adds the pages that QEMU says that it has.
    pub fn add_map(&self, block: usize, map: &PageMap) {
        map.runs().for_each(|run| self.add(block, run));
    }

    /// The pages from this one on that were not sent and are alike: all in the file, or all not. At
    /// most so many. Empty if this page was sent.
    pub fn run(&self, block: usize, in_file: &PageMap, first: u64, most: u64) -> Range<u64> {
        let end = self.blocks[block].1.min(first.saturating_add(most));
        let is_in_file = first < end && in_file.has(first);
        let is_in_run = |page: &u64| !self.has(block, *page) && in_file.has(*page) == is_in_file;
        first..(first..end).find(|page| !is_in_run(page)).unwrap_or(end).max(first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_end_where_pages_were_sent_or_are_of_the_other_kind() {
        let block = |size| Block { name: Vec::new(), size };
        let sent = Sent::new(&[block(70 * 4096), block(200 * 4096)]).unwrap();
        let mut map = PageMap::new(200);
        (10..150).for_each(|page| map.set(page));
        assert_eq!(sent.run(1, &map, 0, 1000), 0..10);
        assert_eq!(sent.run(1, &map, 10, 1000), 10..150);
        assert_eq!(sent.run(1, &map, 10, 5), 10..15);
        assert_eq!(sent.run(1, &map, 150, 1000), 150..200);
        sent.add(1, 100..101);
        sent.add(0, 69..70);
        assert_eq!(sent.run(1, &map, 20, 1000), 20..100);
        assert_eq!(sent.run(1, &map, 100, 1000), 100..100);
        assert!(sent.has(0, 69) && !sent.has(0, 5) && !sent.has(1, 5));
        let mut received = PageMap::new(200);
        received.set(199);
        sent.add_map(1, &received);
        assert_eq!(sent.run(1, &map, 150, 1000), 150..199);
        assert_eq!(sent.run(1, &map, 200, 1000), 200..200);
    }
}
