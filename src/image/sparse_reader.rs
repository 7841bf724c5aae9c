// SPDX-License-Identifier: LGPL-2.1-or-later

//! Reads a sparse memory image ([`super::sparse`]): the head, where the pages are, which pages are
//! in the file, and where the devices begin.
//!
//! The file can be damaged, or made to do harm. All places are checked against its length, and
//! bitmaps are read piece by piece, so that memory and time depend on the file and not on the
//! numbers in it.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::cursor::Parsed;
use super::page_map::PageMap;
use super::records::{Block, Head, LONGEST_BLOCK, Opening, PAGE, Record, Records};
use super::sparse::{ALIGN, Layout, Place, bitmap_length, is_small};

/// More than the part of a stream before its first memory block.
const LONGEST_OPENING: usize = 4096;
/// More memory blocks than any guest has.
const MOST_BLOCKS: usize = 4096;
/// More memory than any guest has.
pub const MOST_MEMORY: u64 = 1 << 46;
/// More than the marks between the last page and the devices. QEMU writes a mark of 18 bytes each
/// time that it looks for changed pages.
const LONGEST_MIDDLE: u64 = 1 << 20;
/// The pages of one piece of a bitmap: those of 1 GiB.
const PIECE: u64 = 1 << 18;

/// The stream of a sparse memory image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SparseStream {
    /// Its head.
    pub head: Head,
    /// The offsets of its parts.
    pub layout: Layout,
    /// Where the devices begin in the file.
    pub devices: u64,
}

impl SparseStream {
    /// Reads the stream that begins here. The error is what is wrong with the image.
    pub fn read(file: &File, begin: u64) -> Result<SparseStream, String> {
        let end = file.metadata().map_err(cannot_read)?.len();
        let window = Window { file, end };
        let (mut opening, length) = window.parse(begin, LONGEST_OPENING, Opening::parse_mapped)?;
        if opening.left() > MOST_MEMORY {
            return Err(damaged("its memory is larger than that of any guest"));
        }
        let mut at = begin + length;
        let mut places = Vec::new();
        while !opening.has_all_blocks() {
            if places.len() == MOST_BLOCKS {
                return Err(damaged("it has more memory blocks than any guest"));
            }
            let parse = |bytes: &[u8]| opening.mapped_block(bytes);
            let (mapped, length) = window.parse(at, LONGEST_BLOCK, parse)?;
            let place = Place { entry: at, bitmap: mapped.bitmap, pages: mapped.pages };
            let after = opening.blocks().last().and_then(|block| {
                (place.bitmap >= at + length).then_some(())?;
                let bitmap_end = place.bitmap.checked_add(bitmap_length(block))?;
                (place.pages >= bitmap_end && place.pages.is_multiple_of(ALIGN)).then_some(())?;
                place.pages.checked_add(block.size).filter(|after| *after < end)
            });
            at = after
                .ok_or_else(|| damaged("the pages of a memory block are not where they can be"))?;
            places.push(place);
        }
        let (head, length) = window.parse(at, LONGEST_BLOCK, |bytes| opening.parse_end(bytes))?;
        let devices = find_devices(&window, &head, at + length)?;
        Ok(SparseStream { head, layout: Layout { begin, places, tail: at }, devices })
    }

    /// Reads which pages of a block are in the file, piece by piece: the number of the first page
    /// of a piece, and the pages from there on.
    pub fn pieces(
        &self,
        file: &File,
        block: usize,
    ) -> impl Iterator<Item = Result<(u64, PageMap), String>> {
        let bitmap = self.layout.places[block].bitmap;
        let pages = self.head.blocks[block].size / PAGE as u64;
        let firsts = (0..pages.div_ceil(PIECE)).map(|piece| piece * PIECE);
        firsts.map(move |first| {
            let pages = PIECE.min(pages - first);
            let mut bytes = vec![0; (pages.div_ceil(64) * 8) as usize];
            file.read_exact_at(&mut bytes, bitmap + first / 8).map_err(cannot_read)?;
            let map = PageMap::from_bytes(&bytes, pages);
            map.map(|map| (first, map))
                .ok_or_else(|| damaged("a bitmap names pages beyond the end of its memory block"))
        })
    }

    /// Whether all pages of small blocks are in the file: then a reader of mapped-ram loads the
    /// image into any QEMU whose RAM is zero. (`virsh save` makes other images.)
    pub fn has_all_of_small_blocks(&self, file: &File) -> Result<bool, String> {
        for (number, _) in self.blocks().filter(|(_, block)| is_small(block)) {
            for piece in self.pieces(file, number) {
                let (_, map) = piece?;
                if map.count() != map.pages() {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// The number of pages of a block that are not all zeros. Those of a large block are not looked
    /// at: what is in the file counts.
    pub fn data_pages(&self, file: &File, number: usize) -> Result<u64, String> {
        let is_small = is_small(&self.head.blocks[number]);
        let begin = self.layout.places[number].pages;
        let mut count = 0;
        for piece in self.pieces(file, number) {
            let (first, map) = piece?;
            count += match is_small {
                false => map.count(),
                true => map
                    .runs()
                    .map(|run| data_in(file, begin, first + run.start..first + run.end))
                    .sum::<io::Result<u64>>()
                    .map_err(cannot_read)?,
            };
        }
        Ok(count)
    }

    /// The blocks, each with its number.
    pub fn blocks(&self) -> impl Iterator<Item = (usize, &Block)> {
        self.head.blocks.iter().enumerate()
    }
}

/// The number of these pages that are not all zeros. Holes of the file are not read: there may be
/// more of them than a reader has time for.
fn data_in(file: &File, begin: u64, pages: Range<u64>) -> io::Result<u64> {
    const AT_ONCE: u64 = 64;
    let (mut count, mut next) = (0, pages.start);
    while next < pages.end {
        next = match seek(file, SeekFrom::Data(begin + next * PAGE as u64)) {
            Ok(data) => (data - begin) / PAGE as u64,
            // No data follows.
            Err(Errno::NXIO) => break,
            // This file system does not tell.
            Err(_) => next,
        };
        let after = pages.end.min(next + AT_ONCE);
        let mut content = vec![0; after.saturating_sub(next) as usize * PAGE];
        file.read_exact_at(&mut content, begin + next * PAGE as u64)?;
        let has_data = |page: &&[u8]| **page != [0; PAGE];
        count += content.chunks_exact(PAGE).filter(has_data).count() as u64;
        next = after.max(next);
    }
    Ok(count)
}

fn damaged(what: &str) -> String {
    format!("is damaged: {what}")
}

fn cannot_read(error: io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => "is cut off".into(),
        _ => format!("cannot be read: {error}"),
    }
}

/// A file and its length.
struct Window<'a> {
    file: &'a File,
    end: u64,
}

impl Window<'_> {
    /// Reads at most this many bytes.
    fn read(&self, at: u64, most: usize) -> Result<Vec<u8>, String> {
        let mut bytes = vec![0; self.end.saturating_sub(at).min(most as u64) as usize];
        self.file.read_exact_at(&mut bytes, at).map_err(cannot_read)?;
        Ok(bytes)
    }

    /// Parses what is here, and returns its length too.
    fn parse<T>(
        &self,
        at: u64,
        most: usize,
        parse: impl FnOnce(&[u8]) -> Parsed<T>,
    ) -> Result<(T, u64), String> {
        let bytes = self.read(at, most)?;
        match parse(&bytes).map_err(|what| damaged(&what))? {
            Some((parsed, length)) => Ok((parsed, length as u64)),
            None if bytes.len() < most => Err("is cut off".into()),
            None => Err(damaged("its head does not end")),
        }
    }
}

/// Where the devices begin, behind sections of the memory that have no pages.
fn find_devices(window: &Window, head: &Head, begin: u64) -> Result<u64, String> {
    let mut records = Records::new(head);
    let mut at = begin;
    while at < begin + LONGEST_MIDDLE {
        let bytes = window.read(at, 4096)?;
        let mut used = 0;
        while let Some((record, length)) =
            records.next(&bytes[used..]).map_err(|what| damaged(&what))?
        {
            match record {
                Record::Mark => used += length,
                Record::Tail(_) => return Ok(at + used as u64),
                Record::Page { .. } => return Err(damaged("its stream has pages in it")),
            }
        }
        if used == 0 {
            return Err("is cut off".into());
        }
        at += used as u64;
    }
    Err(damaged("its devices are missing"))
}
