// SPDX-License-Identifier: LGPL-2.1-or-later

//! Which pages of a memory block are in the file.

use std::ops::Range;

/// One bit for each page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageMap {
    words: Vec<u64>,
    pages: u64,
}

impl PageMap {
    pub fn new(pages: u64) -> PageMap {
        PageMap { words: vec![0; pages.div_ceil(64) as usize], pages }
    }

    /// A map of a block of which all pages are in the file.
    pub fn full(pages: u64) -> PageMap {
        let mut map = PageMap { words: vec![u64::MAX; pages.div_ceil(64) as usize], pages };
        if let (Some(last), used @ 1..) = (map.words.last_mut(), pages % 64) {
            *last = u64::MAX >> (64 - used);
        }
        map
    }

    /// A map from its bytes in a file. `None` if they have another length, or name pages beyond
    /// the last one.
    pub fn from_bytes(bytes: &[u8], pages: u64) -> Option<PageMap> {
        let words: Vec<u64> = bytes
            .chunks_exact(8)
            .filter_map(|word| word.try_into().ok().map(u64::from_le_bytes))
            .collect();
        let beyond = match pages % 64 {
            0 => 0,
            used => words.last().map_or(0, |last| last >> used),
        };
        let fits = words.len() as u64 == pages.div_ceil(64) && bytes.len().is_multiple_of(8);
        (fits && beyond == 0).then_some(PageMap { words, pages })
    }

    /// The bytes of the map in a file.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    pub fn has(&self, page: u64) -> bool {
        self.words[(page / 64) as usize] >> (page % 64) & 1 == 1
    }

    pub fn set(&mut self, page: u64) {
        self.words[(page / 64) as usize] |= 1 << (page % 64);
    }

    pub fn clear(&mut self, page: u64) {
        self.words[(page / 64) as usize] &= !(1 << (page % 64));
    }

    /// The number of pages of the block.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The number of pages that are in the file.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// The runs of pages that are in the file, in their order.
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut from = 0;
        std::iter::from_fn(move || {
            let begin = self.next(from, true)?;
            let end = self.next(begin, false).unwrap_or(self.pages);
            from = end;
            Some(begin..end)
        })
    }

    /// The next page from this one on that is in the file.
    pub fn next_in_file(&self, from: u64) -> Option<u64> {
        self.next(from, true)
    }

    /// The next page from this one on that is in the file, or is not.
    pub fn next(&self, from: u64, is_in_file: bool) -> Option<u64> {
        let mut at = from;
        while at < self.pages {
            let word = self.words[(at / 64) as usize] ^ if is_in_file { 0 } else { u64::MAX };
            let rest = word >> (at % 64);
            if rest != 0 {
                let found = at + u64::from(rest.trailing_zeros());
                return (found < self.pages).then_some(found);
            }
            at = (at / 64 + 1) * 64;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_the_pages_that_were_set() {
        let mut map = PageMap::new(200);
        let pages = [0, 1, 2, 62, 63, 64, 65, 100, 128, 191, 192, 199];
        pages.iter().for_each(|page| map.set(*page));
        map.set(7);
        map.clear(7);
        let runs: Vec<_> = map.runs().collect();
        assert_eq!(runs, [0..3, 62..66, 100..101, 128..129, 191..193, 199..200]);
        assert_eq!(runs.into_iter().flatten().collect::<Vec<_>>(), pages);
        assert_eq!(map.count(), pages.len() as u64);
        assert!(map.has(63) && !map.has(61));
        assert_eq!(PageMap::from_bytes(&map.to_bytes(), 200).as_ref(), Some(&map));
        // 200 pages need 4 words, of which the last one has 8 bits.
        assert_eq!(PageMap::from_bytes(&map.to_bytes(), 199), None);
        assert_eq!(PageMap::from_bytes(&map.to_bytes()[..24], 200), None);
        assert_eq!(PageMap::new(64).runs().count(), 0);
        for pages in [0, 1, 63, 64, 65, 200] {
            let full = PageMap::full(pages);
            assert_eq!(full.count(), pages);
            assert_eq!(PageMap::from_bytes(&full.to_bytes(), pages), Some(full));
        }
    }
}
