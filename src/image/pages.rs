// SPDX-License-Identifier: LGPL-2.1-or-later

//! Reads all pages of an image, whatever its format is.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use super::file::Image;
use super::from_offset::FromOffset;
use super::pipe::CHUNK;
use super::records::{Block, Content, Head, HeadReader, PAGE, Record, Records};
use super::sparse_reader::{MOST_MEMORY, SparseStream};
use super::zstd_reader::whole_stream;

/// A page of an image.
#[derive(Debug)]
pub struct Page<'a> {
    pub block: usize,
    pub offset: u64,
    pub content: Content<'a>,
    /// Where the content, or the byte that fills the page, is in QEMU's stream.
    pub at: u64,
}

/// The stream of an image that is not sparse.
pub fn stream<'a>(image: &'a Image) -> io::Result<Box<dyn Read + 'a>> {
    Ok(match image.zstd {
        Some(_) => Box::new(whole_stream(&image.file, image.stream_offset)?),
        None => Box::new(FromOffset { file: &image.file, at: image.stream_offset }),
    })
}

/// Calls `begin` with the memory blocks, then `on` with each page, in the image's order. Pages that
/// a sparse image does not have are left out. The error is what is wrong with the image.
pub fn read<T>(
    image: &Image,
    begin: impl FnOnce(&[Block]) -> T,
    on: impl FnMut(&mut T, Page),
) -> Result<T, String> {
    match &image.sparse {
        Some(sparse) => read_sparse(&image.file, sparse, begin, on),
        None => {
            let from = stream(image).map_err(|error| format!("cannot be read: {error}"))?;
            read_stream(from, begin, on)
        }
    }
}

fn read_sparse<T>(
    file: &File,
    sparse: &SparseStream,
    begin: impl FnOnce(&[Block]) -> T,
    mut on: impl FnMut(&mut T, Page),
) -> Result<T, String> {
    const AT_ONCE: u64 = (CHUNK / PAGE) as u64;
    let mut state = begin(&sparse.head.blocks);
    let mut buffer = vec![0; CHUNK];
    for (block, _) in sparse.blocks() {
        let pages = sparse.layout.places[block].pages;
        for piece in sparse.pieces(file, block) {
            let (first, map) = piece?;
            for run in map.runs() {
                for page in run.clone().step_by(AT_ONCE as usize) {
                    let count = AT_ONCE.min(run.end - page);
                    let bytes = &mut buffer[..count as usize * PAGE];
                    let (offset, from) = ((first + page) * PAGE as u64, sparse.layout.begin);
                    let at = pages + offset;
                    file.read_exact_at(bytes, at)
                        .map_err(|error| format!("cannot be read: {error}"))?;
                    for (number, bytes) in (0..).zip(bytes.chunks_exact(PAGE)) {
                        let (offset, at) =
                            (offset + number * PAGE as u64, at + number * PAGE as u64);
                        let content = Content::Data(bytes);
                        on(&mut state, Page { block, offset, content, at: at - from });
                    }
                }
            }
        }
    }
    Ok(state)
}

/// Reads all records of a stream up to its devices.
pub fn read_stream<T>(
    mut from: impl Read,
    begin: impl FnOnce(&[Block]) -> T,
    mut on: impl FnMut(&mut T, Page),
) -> Result<T, String> {
    let unknown = |what: String| format!("has a stream that this version does not know: {what}");
    let mut buffer = vec![0; CHUNK];
    let (mut filled, mut before) = (0, 0);
    let mut begin = Some(begin);
    let mut head_reader = HeadReader::default();
    let mut reading: Option<(Records, T, Limit)> = None;
    loop {
        let read = match from.read(&mut buffer[filled..]) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            read => read.map_err(|error| format!("cannot be read: {error}"))?,
        };
        if read == 0 {
            return Err("is cut off: QEMU's stream ends among its pages".into());
        }
        filled += read;
        let mut used = 0;
        if let Some(parse) = begin.take() {
            let Some((head, length)) = head_reader.read(&buffer[..filled]).map_err(unknown)? else {
                begin = Some(parse);
                continue;
            };
            used = length;
            check_size(&head)?;
            reading = Some((Records::new(&head), parse(&head.blocks), Limit::new(&head)));
        }
        let Some((records, state, limit)) = &mut reading else { continue };
        while let Some((record, length)) = records.next(&buffer[used..filled]).map_err(unknown)? {
            used += length;
            match record {
                Record::Page { block, offset, content } => {
                    limit.count()?;
                    let own = if let Content::Data(page) = content { page.len() } else { 1 };
                    let at = before + (used - own) as u64;
                    on(state, Page { block, offset, content, at });
                }
                Record::Tail(_) => {
                    let done = reading.take().map(|(_, state, _)| state);
                    return done.ok_or_else(|| "is damaged".into());
                }
                Record::Mark => limit.count()?,
            }
        }
        buffer.copy_within(used..filled, 0);
        filled -= used;
        before += used as u64;
    }
}

/// Limits the number of records: a few bytes of a compressed image can stand for any number of
/// them.
struct Limit {
    left: u64,
}

impl Limit {
    fn new(head: &Head) -> Limit {
        // QEMU saves a page a few times at most, and writes few marks.
        let pages: u64 = head.blocks.iter().map(|block| block.size / PAGE as u64).sum();
        Limit { left: pages.saturating_mul(16) + (1 << 20) }
    }

    fn count(&mut self) -> Result<(), String> {
        let left = self.left.checked_sub(1);
        self.left = left.ok_or("is damaged: it has more pages than its guest")?;
        Ok(())
    }
}

/// Refuses a guest that is larger than any is.
pub fn check_size(head: &Head) -> Result<(), String> {
    let total: u64 = head.blocks.iter().map(|block| block.size).sum();
    if total > MOST_MEMORY {
        return Err("is damaged: its memory is larger than that of any guest".into());
    }
    Ok(())
}
