// SPDX-License-Identifier: LGPL-2.1-or-later

//! The order in which pages are sent that nobody has asked for.

use std::collections::VecDeque;
use std::ops::Range;

use super::sent::Sent;
use crate::image::PageSource;

/// First some pages in an order of their own, then all others from the first to the last.
#[derive(Debug, Default)]
pub struct Order {
    first: VecDeque<(usize, u64)>,
    block: usize,
    page: u64,
}

impl Order {
    /// `first`: blocks and pages that come first.
    pub fn new(first: impl IntoIterator<Item = (usize, u64)>) -> Order {
        Order { first: first.into_iter().collect(), block: 0, page: 0 }
    }

    /// The next pages that are in the file and were not sent, of one block, at most so many. `None`
    /// if there are no more.
    pub fn next(
        &mut self,
        pages: &PageSource,
        sent: &Sent,
        most: u64,
    ) -> Option<(usize, Range<u64>)> {
        while let Some((block, page)) = self.first.pop_front() {
            let is_known = pages.blocks().get(block).is_some()
                && page < pages.in_file(block).pages()
                && pages.in_file(block).has(page);
            if is_known && !sent.has(block, page) {
                return Some((block, page..page + 1));
            }
        }
        while self.block < pages.blocks().len() {
            let in_file = pages.in_file(self.block);
            while let Some(page) = in_file.next_in_file(self.page) {
                let run = sent.run(self.block, in_file, page, most);
                self.page = run.end.max(page + 1);
                if !run.is_empty() {
                    return Some((self.block, run));
                }
            }
            (self.block, self.page) = (self.block + 1, 0);
        }
        None
    }
}
