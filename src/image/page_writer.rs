// SPDX-License-Identifier: LGPL-2.1-or-later

//! Writes a sparse memory image from the records of QEMU's stream.

use std::fs::File;
use std::io::{self, IoSlice};
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::pwritev;

use super::page_map::PageMap;
use super::pages::check_size;
use super::pages_file::{Collector, PageNotes};
use super::records::{Block, Content, Head, PAGE, Record, Records};
use super::sparse::{Layout, is_small};

/// Why a stream is not in its image.
#[derive(Debug)]
pub enum Failure {
    /// The stream is wrong, or of a kind that this does not know.
    Stream(String),
    File(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        Failure::File(error)
    }
}

impl From<rustix::io::Errno> for Failure {
    fn from(errno: rustix::io::Errno) -> Failure {
        Failure::File(errno.into())
    }
}

/// Writes the pages of one stream to their places, and notes what is known of them. Its memory is
/// that of bitmaps and checksums: 72 KiB for each GiB of the guest's.
#[derive(Debug)]
pub struct PageWriter {
    records: Records,
    layout: Layout,
    /// The pages of each block that have data, and whether all its pages are to be in the bitmap.
    maps: Vec<(PageMap, bool)>,
    notes: Collector,
    /// Where the next bytes of the tail belong.
    tail: u64,
}

impl PageWriter {
    /// Begins an image whose stream has this head and begins at `begin`. After a failure of the
    /// stream nothing is in the file. Memory that no reader would take is such a failure.
    pub fn begin(file: &File, head: &Head, begin: u64) -> Result<PageWriter, Failure> {
        check_size(head).map_err(|what| Failure::Stream(format!("it {what}")))?;
        let layout = Layout::new(head, begin)
            .ok_or_else(|| Failure::Stream("its memory blocks are too large".into()))?;
        for (offset, bytes) in layout.head(head) {
            file.write_all_at(&bytes, offset)?;
        }
        let middle = Layout::middle(head);
        file.write_all_at(&middle, layout.tail)?;
        let map = |block: &Block| (PageMap::new(block.size / PAGE as u64), is_small(block));
        Ok(PageWriter {
            records: Records::new(head),
            maps: head.blocks.iter().map(map).collect(),
            notes: Collector::new(&head.blocks),
            tail: layout.tail + middle.len() as u64,
            layout,
        })
    }

    /// The size of the guest's memory.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn memory(&self) -> u64 {
        self.maps.iter().map(|(map, _)| map.pages() * PAGE as u64).sum()
    }

    /// Writes what is whole of these bytes, which begin with a record, and returns how many bytes
    /// that were. The others belong before the next ones.
    pub fn write(&mut self, file: &File, bytes: &[u8]) -> Result<usize, Failure> {
        let mut run = Run::default();
        let mut at = 0;
        while let Some((record, length)) =
            self.records.next(&bytes[at..]).map_err(Failure::Stream)?
        {
            at += length;
            if let Record::Page { block, offset, content } = &record {
                let (block, offset) = (*block, *offset);
                let place = self.layout.places[block].pages + offset;
                let map = &self.maps[block].0;
                let mut written = Ok(());
                self.notes.page(block, offset, content, || {
                    // The page has come before: its old content is in the file, or is zero.
                    let mut old = vec![0; PAGE];
                    if map.has(offset / PAGE as u64) {
                        written =
                            run.write(file).and_then(|()| file.read_exact_at(&mut old, place));
                    }
                    Some(old)
                });
                written?;
            }
            match record {
                Record::Page { block, offset, content: Content::Data(page) } => {
                    self.maps[block].0.set(offset / PAGE as u64);
                    let place = self.layout.places[block].pages + offset;
                    if !run.takes(place) {
                        run.write(file)?;
                    }
                    run.add(place, page);
                }
                Record::Page { block, offset, content: Content::Fill(0) } => {
                    let page = offset / PAGE as u64;
                    if self.maps[block].0.has(page) {
                        // An earlier record of this page had data.
                        run.write(file)?;
                        self.maps[block].0.clear(page);
                        punch(file, self.layout.places[block].pages + offset)?;
                    }
                }
                Record::Page { block, offset, content: Content::Fill(byte) } => {
                    run.write(file)?;
                    self.maps[block].0.set(offset / PAGE as u64);
                    let place = self.layout.places[block].pages + offset;
                    file.write_all_at(&[byte; PAGE], place)?;
                }
                Record::Tail(bytes) => {
                    run.write(file)?;
                    file.write_all_at(bytes, self.tail)?;
                    self.tail += bytes.len() as u64;
                }
                Record::Mark => {}
            }
        }
        run.write(file)?;
        Ok(at)
    }

    /// Writes the bitmaps, after the whole stream. Returns the notes of the pages.
    pub fn finish(self, file: &File) -> Result<PageNotes, Failure> {
        if !self.records.is_after_pages() {
            return Err(Failure::Stream("it ends among its pages".into()));
        }
        for (place, (map, has_all)) in self.layout.places.iter().zip(&self.maps) {
            let bitmap = match has_all {
                true => PageMap::full(map.pages()).to_bytes(),
                false => map.to_bytes(),
            };
            file.write_all_at(&bitmap, place.bitmap)?;
        }
        Ok(self.notes.finish())
    }
}

fn punch(file: &File, offset: u64) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match fallocate(file, flags, offset, PAGE as u64) {
        Ok(()) => Ok(()),
        // This file system has no holes.
        Err(_) => file.write_all_at(&[0; PAGE], offset),
    }
}

/// Pages that are neighbours in the file, to be written at once.
#[derive(Default)]
struct Run<'a> {
    begin: u64,
    pages: Vec<IoSlice<'a>>,
}

/// The most pages that one system call writes.
const LONGEST_RUN: usize = 1024;

impl<'a> Run<'a> {
    /// Whether a page at this offset belongs to the run.
    fn takes(&self, offset: u64) -> bool {
        self.pages.len() < LONGEST_RUN && offset == self.begin + (self.pages.len() * PAGE) as u64
    }

    fn add(&mut self, offset: u64, page: &'a [u8]) {
        if self.pages.is_empty() {
            self.begin = offset;
        }
        self.pages.push(IoSlice::new(page));
    }

    /// Writes the run, and empties it.
    fn write(&mut self, file: &File) -> io::Result<()> {
        let mut left = &mut self.pages[..];
        let mut offset = self.begin;
        while !left.is_empty() {
            match pwritev(file, left, offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    offset += written as u64;
                    IoSlice::advance_slices(&mut left, written);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        self.pages.clear();
        Ok(())
    }
}
