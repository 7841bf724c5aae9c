// SPDX-License-Identifier: LGPL-2.1-or-later

//! Reads single pages of a memory image, in any order.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::collect::{Collected, collect};
use super::file::Image;
use super::first_writes::Pages;
use super::format::Format;
use super::pages_file::{self, PageNotes};
use super::raw_index::RawIndex;
use super::records::{Block, PAGE};
use super::sparse_reader::SparseStream;
use crate::error::{Code, Error, Result};
use crate::sys;

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
    blocks: Vec<Block>,
    places: Places,
    written_first: Vec<Pages>,
}

/// Where the pages are.
#[derive(Debug)]
enum Places {
    Sparse(SparseStream),
    Raw(RawIndex),
}

impl Index {
    /// The size of a page in bytes.
    pub const PAGE: usize = PAGE;

    /// Opens the index of a complete image, which must be sparse, or raw with an index that
    /// [`make_index`] has made.
    pub fn open(path: &Path) -> Result<Index> {
        let image = Image::open(path)?;
        // The image is whole without its notes.
        let notes = PageNotes::of(&image.file, image.stream_offset, path).ok().flatten();
        let (mut first, mut index) = (Vec::new(), None);
        if let Some(notes) = notes {
            (first, index) = (notes.first, notes.index.map(|index| (notes.blocks, index)));
        }
        let name = image.format().name();
        let (blocks, places) = match (image.sparse, index) {
            (Some(stream), _) => (stream.head.blocks.clone(), Places::Sparse(stream)),
            (None, Some((blocks, index))) => (blocks, Places::Raw(index)),
            (None, None) => {
                let what = match image.zstd {
                    Some(_) => "convert it to the format 'sparse'",
                    None => "make an index by instantsnap_image_index()",
                };
                return Err(Error::new(
                    Code::OperationUnsupported,
                    format!(
                        "the pages of memory snapshot file '{}', which has the format '{name}', \
                         cannot be read in any order: {what}",
                        path.display()
                    ),
                ));
            }
        };
        keep_known(&mut first, &blocks);
        Ok(Index { file: image.file, blocks, places, written_first: first })
    }

    /// The image's file, to read pages from.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The guest's memory blocks. Blocks are named by their places in this list.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// The number of pages of a block.
    pub fn pages(&self, block: usize) -> u64 {
        self.blocks.get(block).map_or(0, |block| block.size / PAGE as u64)
    }

    /// Where the content of a page is. Reads a few bytes of a sparse image.
    pub fn page_at(&self, block: usize, page: u64) -> Result<Page> {
        if page >= self.pages(block) {
            return Err(Error::new(
                Code::InvalidArg,
                format!("the memory image has no page {page} in its block {block}"),
            ));
        }
        let stream = match &self.places {
            Places::Sparse(stream) => stream,
            Places::Raw(index) => {
                return Ok(index.find(block, page).map_or(Page::Zero, Page::Data));
            }
        };
        let place = &stream.layout.places[block];
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
    /// Empty if that is not known. The list is a hint: some of these the guest has not written, and
    /// it has written others.
    pub fn written_first(&self) -> impl Iterator<Item = (usize, u64)> + '_ {
        numbers(&self.written_first)
    }
}

/// The same pages of a sparse image that is open already, at most so many.
pub fn written_first(image: &Image, path: &Path, most: usize) -> Vec<(usize, u64)> {
    let notes = PageNotes::of(&image.file, image.stream_offset, path).ok().flatten();
    let (Some(notes), Some(sparse)) = (notes, &image.sparse) else { return Vec::new() };
    let mut first = notes.first;
    keep_known(&mut first, &sparse.head.blocks);
    numbers(&first).take(most).collect()
}

/// Drops pages that no block has: notes that say otherwise than the image are not the image's.
fn keep_known(first: &mut Vec<Pages>, blocks: &[Block]) {
    first.retain(|pages| {
        let block = blocks.get(pages.block as usize);
        block.is_some_and(|block| pages.numbers().end <= block.size / PAGE as u64)
    });
}

fn numbers(list: &[Pages]) -> impl Iterator<Item = (usize, u64)> + '_ {
    list.iter().flat_map(|pages| {
        let block = pages.block as usize;
        pages.numbers().map(move |page| (block, page))
    })
}

/// Reads an image to its end, and writes down beside it what is found out: where the pages of a raw
/// image are, checksums of the pages, and, if the image has the order in which QEMU has saved them,
/// which ones the guest wrote first. Keeps such a list that is there.
pub fn make_index(path: &Path) -> Result<()> {
    let image = Image::open(path)?;
    let cannot =
        |error| Error::system(format!("cannot write the index of '{}'", path.display()), error);
    let path = &path.canonicalize().map_err(cannot)?;
    let known = PageNotes::of(&image.file, image.stream_offset, path).ok().flatten();
    let Collected { mut notes, has_filled } = collect(&image).map_err(|what| {
        let message = format!("memory snapshot file '{}' {what}", path.display());
        Error::new(Code::InvalidDomainSnapshot, message)
    })?;
    if has_filled {
        return Err(Error::new(
            Code::ConfigUnsupported,
            format!(
                "memory snapshot file '{}' has pages that are filled with one byte: convert it to \
                 the format 'sparse'",
                path.display()
            ),
        ));
    }
    if image.format() == Format::Raw && notes.index.is_none() {
        return Err(Error::new(
            Code::ConfigUnsupported,
            format!(
                "the pages of memory snapshot file '{}' are in too many places for an index: \
                 convert it to the format 'sparse'",
                path.display()
            ),
        ));
    }
    if let Some(known) = known {
        notes.first = known.first;
        // The writer of the image knew its pages before anything could damage them.
        notes.checksums = known.checksums.or(notes.checksums);
    }
    let new = pages_file::replacement(&notes, &image.file, image.stream_offset, path);
    pages_file::put(path, Some(new.map_err(cannot)?)).map_err(cannot)?;
    sys::sync_parent(path).map_err(cannot)
}

#[cfg(test)]
mod tests {
    use super::super::convert::convert;
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
        // A page that is filled with one byte is nowhere.
        assert_eq!(make_index(&path).unwrap_err().code, Code::ConfigUnsupported);
        convert(&path, Format::Sparse).unwrap();
        assert_found(&path);
        convert(&path, Format::Raw).unwrap();
        let error = Index::open(&path).unwrap_err();
        assert!(error.message.contains("instantsnap_image_index()"), "{error}");
        make_index(&path).unwrap();
        assert_found(&path);
        convert(&path, Format::named("zstd").unwrap()).unwrap();
        let error = Index::open(&path).unwrap_err();
        assert!(error.message.contains("'zstd'"), "{error}");
        make_index(&path).unwrap();
        assert!(Index::open(&path).is_err());
    }

    #[test]
    fn an_index_that_cannot_be_put_beside_its_image_is_an_error_and_a_conversion_goes_on() {
        let pages = [sample::named_page(b"pc.ram", 4096, 1)];
        let (_directory, path) = sample::image(&sample::stream(&pages, &[]));
        let notes = pages_file::path_of(&path);
        std::fs::write(&notes, "of another program").unwrap();
        let error = make_index(&path).unwrap_err();
        assert!(error.message.contains("another file"), "{error}");
        convert(&path, Format::Sparse).unwrap();
        assert_eq!(std::fs::read(&notes).unwrap(), b"of another program");
        assert!(Index::open(&path).is_ok());
    }

    fn assert_found(path: &Path) {
        let index = Index::open(path).unwrap();
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
                        // The pages of a small block are all in a sparse image.
                        Some(content[0]).filter(|byte| *byte != 0)
                    }
                };
                assert_eq!(content, byte, "page {page} of block {block}");
            }
        }
        for (block, page) in [(0, 512), (1, 2), (2, 0), (0, u64::MAX)] {
            assert_eq!(index.page_at(block, page).unwrap_err().code, Code::InvalidArg);
        }
        // QEMU saved these out of order.
        assert!(index.written_first().eq([(0, 1), (0, 0), (0, 3), (1, 1)]));
    }
}
