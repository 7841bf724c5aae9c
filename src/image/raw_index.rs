// SPDX-License-Identifier: LGPL-2.1-or-later

//! Where the pages of a raw memory image are in its file.

use std::collections::BTreeMap;

use super::records::PAGE;

/// The distance of two pages that are neighbours in QEMU's stream: a page and its header.
const STRIDE: u64 = PAGE as u64 + 8;

/// Pages of a block that are neighbours in the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    pub first: u64,
    pub count: u64,
    /// Where the content of the first one is in the file.
    pub offset: u64,
}

impl Run {
    /// Where the content of a page is, if it belongs to the run.
    fn find(&self, page: u64) -> Option<u64> {
        let place = page.checked_sub(self.first)?;
        (place < self.count).then(|| self.offset + place * STRIDE)
    }
}

/// The runs of each block, in the order of their pages. A page that is in none has zeros.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawIndex {
    blocks: Vec<Vec<Run>>,
}

impl RawIndex {
    /// An index from its runs, and the number of pages of each block; `None` if they overlap or
    /// are beyond their block.
    pub fn from_runs(all: Vec<(Vec<Run>, u64)>) -> Option<RawIndex> {
        let is_right = |(runs, pages): &(Vec<Run>, u64)| {
            let mut free = 0;
            runs.iter().all(|run| {
                let end = run.first.checked_add(run.count);
                let bytes =
                    run.count.checked_mul(STRIDE).and_then(|all| all.checked_add(run.offset));
                let right = run.first >= free
                    && bytes.is_some()
                    && end.is_some_and(|end| end <= *pages && end > run.first);
                free = end.unwrap_or(u64::MAX);
                right
            })
        };
        let right = all.iter().all(is_right);
        right.then(|| RawIndex { blocks: all.into_iter().map(|(runs, _)| runs).collect() })
    }

    /// The runs of each block.
    pub fn blocks(&self) -> impl Iterator<Item = &[Run]> {
        self.blocks.iter().map(Vec::as_slice)
    }

    /// Where the content of a page is in the file; `None` if it has zeros.
    pub fn find(&self, block: usize, page: u64) -> Option<u64> {
        let runs = self.blocks.get(block)?;
        let after = runs.partition_point(|run| run.first <= page);
        runs[..after].last()?.find(page)
    }
}

/// The most runs of an index: it is in memory, and in a file that has a limit too.
const MOST_RUNS: usize = 40 << 20;

/// Makes an index while the pages come.
#[derive(Debug)]
pub struct Indexer {
    /// The runs of each block, by their first pages.
    blocks: Vec<BTreeMap<u64, Run>>,
    /// How many runs there are, and how many there may be.
    runs: usize,
    most: usize,
}

impl Indexer {
    pub fn new(blocks: usize) -> Indexer {
        Indexer { blocks: vec![BTreeMap::new(); blocks], runs: 0, most: MOST_RUNS }
    }

    /// Whether there were more runs than an index can have. Nothing is noted any more then.
    pub fn is_over(&self) -> bool {
        self.runs > self.most
    }

    /// Notes that the content of a page is at this offset; `None` if the page has zeros. The last
    /// note of a page counts. Returns the offset of the content that it had before.
    pub fn page(&mut self, block: usize, page: u64, offset: Option<u64>) -> Option<u64> {
        if self.is_over() {
            return None;
        }
        let runs = &mut self.blocks[block];
        let before = runs.len();
        let old = Indexer::note(runs, page, offset);
        self.runs = self.runs - before + runs.len();
        if self.is_over() {
            self.blocks.clear();
        }
        old
    }

    fn note(runs: &mut BTreeMap<u64, Run>, page: u64, offset: Option<u64>) -> Option<u64> {
        let before = runs.range(..=page).next_back().map(|(_, run)| *run);
        let old = before.and_then(|run| run.find(page));
        if let (Some(run), Some(_)) = (before, old) {
            // Cuts the page out of its run.
            let place = page - run.first;
            runs.remove(&run.first);
            if place > 0 {
                runs.insert(run.first, Run { count: place, ..run });
            }
            let rest = run.count - place - 1;
            if rest > 0 {
                let offset = run.offset + (place + 1) * STRIDE;
                runs.insert(page + 1, Run { first: page + 1, count: rest, offset });
            }
        }
        let Some(offset) = offset else { return old };
        match runs.range_mut(..page).next_back() {
            Some((_, run))
                if run.first + run.count == page && run.offset + run.count * STRIDE == offset =>
            {
                run.count += 1;
            }
            _ => drop(runs.insert(page, Run { first: page, count: 1, offset })),
        }
        old
    }

    /// The index; `None` if it would have too many runs.
    pub fn finish(self) -> Option<RawIndex> {
        let is_over = self.is_over();
        let blocks = self.blocks.into_iter().map(|runs| runs.into_values().collect());
        (!is_over).then(|| RawIndex { blocks: blocks.collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    #[test]
    fn an_index_with_too_many_runs_is_none() {
        let mut indexer = Indexer { most: 2, ..Indexer::new(2) };
        for (block, page) in [(0, 1), (0, 5), (0, 6)] {
            indexer.page(block, page, Some(page * STRIDE));
        }
        assert!(!indexer.is_over());
        indexer.page(0, 5, None);
        indexer.page(1, 7, Some(0));
        assert!(indexer.is_over());
        assert_eq!(indexer.page(0, 6, None), None);
        assert_eq!(indexer.finish(), None);
    }

    #[test]
    fn a_page_is_where_it_was_noted_last() {
        const PAGES: usize = 60;
        let mut random = Random(3);
        let mut indexer = Indexer::new(1);
        let mut known = [None; PAGES];
        let mut offset = 0;
        for _ in 0..2000 {
            let begin = random.below(PAGES);
            let count = 1 + random.below(9);
            for (page, known) in known.iter_mut().enumerate().skip(begin).take(count) {
                offset += if random.below(5) == 0 { 7 } else { STRIDE };
                let place = (random.below(4) != 0).then_some(offset);
                assert_eq!(indexer.page(0, page as u64, place), *known);
                *known = place;
            }
        }
        let index = indexer.finish().unwrap();
        for (page, known) in (0..).zip(known) {
            assert_eq!(index.find(0, page), known, "{page}");
        }
        assert_eq!((index.find(0, PAGES as u64), index.find(1, 0)), (None, None));
        let runs: Vec<_> = index.blocks[0].clone();
        assert!(runs.len() < PAGES);
        assert_eq!(RawIndex::from_runs(vec![(runs.clone(), PAGES as u64)]), Some(index));
        assert_eq!(RawIndex::from_runs(vec![(runs.clone(), 5)]), None);
        let reversed = runs.into_iter().rev().collect();
        assert_eq!(RawIndex::from_runs(vec![(reversed, PAGES as u64)]), None);
    }
}
