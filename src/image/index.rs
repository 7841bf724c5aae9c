// SPDX-License-Identifier: LGPL-2.1-or-later

//! Reads single pages of a memory image, in any order.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::file::Image;
use super::records::{Block, PAGE};
use super::sparse_reader::SparseStream;
use crate::error::{Code, Error, Result};

/// Where a page's content is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Page {
    /// Nowhere: the page has zeros everywhere.
    Zero,
    /// At this offset of the image's file.
    Data(u64),
}

/// The pages of a memory image. Any number of threads can use it at the same time.
#[derive(Debug)]
pub struct Index {
    file: File,
    stream: SparseStream,
}

impl Index {
    /// The size of a page in bytes.
    pub const PAGE: usize = PAGE;

    /// Opens the index of a complete image. The image must be sparse.
    pub fn open(path: &Path) -> Result<Index> {
        let Image { file, sparse, .. } = Image::open(path)?;
        let Some(stream) = sparse else {
            return Err(Error::new(
                Code::OperationUnsupported,
                format!(
                    "the pages of memory snapshot file '{}' cannot be read in any order: convert \
                     it to the format 'sparse'",
                    path.display()
                ),
            ));
        };
        Ok(Index { file, stream })
    }

    /// The image's file, to read pages from.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The guest's memory blocks. Blocks are named by their places in this list.
    pub fn blocks(&self) -> &[Block] {
        &self.stream.head.blocks
    }

    /// The number of pages of a block.
    pub fn pages(&self, block: usize) -> u64 {
        self.blocks().get(block).map_or(0, |block| block.size / PAGE as u64)
    }

    /// Where the content of a page is. Reads a few bytes of the file.
    pub fn page_at(&self, block: usize, page: u64) -> Result<Page> {
        if page >= self.pages(block) {
            return Err(Error::new(
                Code::InvalidArg,
                format!("the memory image has no page {page} in its block {block}"),
            ));
        }
        let place = &self.stream.layout.places[block];
        let mut byte = [0];
        self.file
            .read_exact_at(&mut byte, place.bitmap + page / 8)
            .map_err(|error| Error::system("cannot read the memory image", error))?;
        Ok(match byte[0] >> (page % 8) & 1 {
            0 => Page::Zero,
            _ => Page::Data(place.pages + page * PAGE as u64),
        })
    }

    /// The pages that the guest wrote first after the instant: block and page, in their order.
    /// Empty if that is not known.
    pub fn written_first(&self) -> impl Iterator<Item = (usize, u64)> + '_ {
        std::iter::empty()
    }
}

#[cfg(test)]
mod tests {
    use super::super::convert::convert;
    use super::super::format::Format;
    use super::super::sample;
    use super::*;

    #[test]
    fn each_page_is_found_wherever_it_is() {
        let pages = [
            sample::named_page(b"pc.ram", 4096, 1),
            sample::page(0, 3),
            sample::fill(12288, 0),
            sample::fill(16384, 9),
            sample::named_page(b"rom", 4096, 4),
        ];
        let (_directory, path) = sample::image(&sample::stream(&pages, &[]));
        let error = Index::open(&path).unwrap_err();
        assert_eq!(error.code, Code::OperationUnsupported, "{error}");
        convert(&path, Format::Sparse).unwrap();
        let index = Index::open(&path).unwrap();
        let found = index.blocks().iter().map(|block| block.name.as_slice());
        assert!(found.eq([&b"pc.ram"[..], b"rom"]));
        assert_eq!((index.pages(0), index.pages(1), index.pages(2)), (512, 2, 0));
        for (block, filled) in [(0, &[(0, 3), (1, 1), (4, 9)][..]), (1, &[(1, 4)])] {
            for page in 0..index.pages(block) {
                let byte = filled.iter().find(|(number, _)| *number == page).map(|(_, byte)| *byte);
                let content = match index.page_at(block, page).unwrap() {
                    Page::Zero => None,
                    Page::Data(offset) => {
                        let mut content = [0; PAGE];
                        index.file().read_exact_at(&mut content, offset).unwrap();
                        assert_eq!(content, [content[0]; PAGE]);
                        Some(content[0])
                    }
                };
                assert_eq!(content, byte, "page {page} of block {block}");
            }
        }
        for (block, page) in [(0, 512), (1, 2), (2, 0), (0, u64::MAX)] {
            assert_eq!(index.page_at(block, page).unwrap_err().code, Code::InvalidArg);
        }
        assert_eq!(index.written_first().count(), 0);
    }
}
