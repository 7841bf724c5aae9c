// SPDX-License-Identifier: LGPL-2.1-or-later

//! Finds out of an image what is noted of its pages.

use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use super::file::Image;
use super::format::Format;
use super::pages;
use super::pages_file::{Collector, PageNotes};
use super::raw_index::Indexer;
use super::records::{Block, Content, PAGE};

/// What was found out.
#[derive(Debug)]
pub struct Collected {
    /// The notes. They have an index if the image is raw, unless that would have too many runs. The
    /// order of a sparse image's pages says nothing, so its list of first writes is empty.
    pub notes: PageNotes,
    /// Whether the image is raw, and has pages that are filled with one byte other than 0. The
    /// index does not have these.
    pub has_filled: bool,
}

/// Reads an image to its end. The error is what is wrong with it.
pub fn collect(image: &Image) -> Result<Collected, String> {
    let is_raw = image.format() == Format::Raw;
    let mut has_filled = false;
    let begin = |blocks: &[Block]| (Collector::new(blocks), Indexer::new(blocks.len()));
    let on = |(collector, indexer): &mut (Collector, Indexer), page: pages::Page| {
        let at = match page.content {
            Content::Data(_) => Some(image.stream_offset + page.at),
            Content::Fill(0) => None,
            Content::Fill(_) => {
                has_filled |= is_raw;
                None
            }
        };
        let number = page.offset / PAGE as u64;
        let before = if is_raw { indexer.page(page.block, number, at) } else { None };
        let is_known = is_raw && !indexer.is_over();
        collector.page(page.block, page.offset, &page.content, || {
            // A page of a raw image that has come before.
            let mut old = vec![0; PAGE];
            let read = before.map_or(Ok(()), |at| image.file.read_exact_at(&mut old, at));
            (is_known && read.is_ok()).then_some(old)
        });
    };
    let (collector, indexer) = match &image.sparse {
        Some(_) => pages::read(image, begin, on)?,
        None => {
            let mut stream = pages::stream(image).map_err(unreadable)?;
            let collected = pages::read_stream(&mut stream, begin, on)?;
            // The frames of a compressed image have checksums of their own.
            if image.zstd.is_some() {
                to_end(stream)?;
            }
            collected
        }
    };
    let mut notes = collector.finish();
    if image.sparse.is_some() {
        notes.first.clear();
    }
    if has_filled {
        // Their old contents were not found.
        notes.checksums = None;
    }
    notes.index = if is_raw { indexer.finish() } else { None };
    Ok(Collected { notes, has_filled })
}

fn to_end(stream: impl Read) -> Result<(), String> {
    /// More than the devices of any guest. A small file can stand for a very long stream.
    const MOST: u64 = 4 << 30;
    match io::copy(&mut stream.take(MOST), &mut io::sink()) {
        Ok(MOST) => Err("is damaged: its devices are larger than those of any guest".into()),
        read => read.map(drop).map_err(unreadable),
    }
}

fn unreadable(error: io::Error) -> String {
    format!("is damaged, or cannot be read: {error}")
}
