// SPDX-License-Identifier: LGPL-2.1-or-later

//! Writes the stream of a sparse memory image as every QEMU loads it: one page after the other.

use std::fs::File;
use std::io::{self, IoSliceMut, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::io::{Errno, preadv};

use super::records::{Block, PAGE, page_header};
use super::sparse::is_small;
use super::sparse_reader::SparseStream;

/// The zero pages that are written to the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeros {
    /// All of them.
    All,
    /// Those of small blocks only ([`super::sparse`]). The RAM of a QEMU that has just started is
    /// zero, unless it is a file that existed before.
    OfSmallBlocks,
}

/// The pages that are read and written at once.
const AT_ONCE: u64 = 128;
/// The length of a page's header without a name.
const HEADER: usize = 8;

/// Writes the stream, without the pages of the blocks with these numbers. The image is opened for
/// reading.
pub fn write<W: Write>(
    file: &File,
    stream: &SparseStream,
    zeros: Zeros,
    left_out: &[usize],
    to: &mut W,
) -> io::Result<()> {
    let head = &stream.head;
    let mut start = [&head.configuration[..], &head.section_start(), &head.total()].concat();
    for block in &head.blocks {
        start.push(block.name.len() as u8);
        start.extend_from_slice(&block.name);
        start.extend_from_slice(&block.size.to_be_bytes());
    }
    start.extend(head.section_end());
    start.extend(head.part_start());
    to.write_all(&start)?;
    for (number, block) in stream.blocks().filter(|(number, _)| !left_out.contains(number)) {
        let is_small = is_small(block);
        let has_zeros = zeros == Zeros::All || is_small;
        let write_pages = if is_small { write_few_pages } else { write_many_pages };
        let pages = stream.layout.places[number].pages;
        let mut name = Some(block);
        for piece in stream.pieces(file, number) {
            let (first, map) = piece.map_err(io::Error::other)?;
            let mut done = 0;
            // An empty run at the end stands for the zeros before it.
            let end = map.pages()..map.pages();
            for run in map.runs().chain(std::iter::once(end)) {
                if has_zeros {
                    write_zeros(&mut name, first + done..first + run.start, to)?;
                }
                done = run.end;
                let run = first + run.start..first + run.end;
                write_pages(file, pages, &mut name, run, to)?;
            }
        }
    }
    to.write_all(&head.section_end())?;
    copy_from(file, stream.devices, to)
}

/// Writes pages of zeros. The first one gets the block's name, if there is one.
fn write_zeros(
    name: &mut Option<&Block>,
    pages: Range<u64>,
    to: &mut impl Write,
) -> io::Result<()> {
    let mut records = Vec::new();
    for page in pages {
        records.extend(page_header(name.take(), page * PAGE as u64, false));
        records.push(0);
        if records.len() > AT_ONCE as usize * PAGE {
            to.write_all(&records)?;
            records.clear();
        }
    }
    to.write_all(&records)
}

/// Writes pages of the file, whose block begins at `begin`. Pages of zeros are among them.
fn write_few_pages<W: Write>(
    file: &File,
    begin: u64,
    name: &mut Option<&Block>,
    pages: Range<u64>,
    to: &mut W,
) -> io::Result<()> {
    let mut first = pages.start;
    while first < pages.end {
        let after = pages.end.min(first + AT_ONCE);
        let mut content = vec![0; (after - first) as usize * PAGE];
        file.read_exact_at(&mut content, begin + first * PAGE as u64)?;
        let mut records = Vec::with_capacity(content.len());
        for (page, content) in (first..after).zip(content.chunks_exact(PAGE)) {
            let has_data = content != [0; PAGE];
            records.extend(page_header(name.take(), page * PAGE as u64, has_data));
            records.extend_from_slice(if has_data { content } else { &[0] });
        }
        to.write_all(&records)?;
        first = after;
    }
    Ok(())
}

/// Writes pages of the file, whose block begins at `begin`, without looking at them.
fn write_many_pages<W: Write>(
    file: &File,
    begin: u64,
    name: &mut Option<&Block>,
    pages: Range<u64>,
    to: &mut W,
) -> io::Result<()> {
    let mut first = pages.start;
    while first < pages.end {
        if let Some(name) = name.take() {
            let offset = first * PAGE as u64;
            let mut page = [0; PAGE];
            file.read_exact_at(&mut page, begin + offset)?;
            to.write_all(&page_header(Some(name), offset, true))?;
            to.write_all(&page)?;
            first += 1;
            continue;
        }
        let after = pages.end.min(first + AT_ONCE);
        let mut records = vec![0; (after - first) as usize * (HEADER + PAGE)];
        for (page, record) in (first..after).zip(records.chunks_exact_mut(HEADER + PAGE)) {
            let header = page_header(None, page * PAGE as u64, true);
            record[..HEADER].copy_from_slice(&header);
        }
        let places = records.chunks_exact_mut(HEADER + PAGE);
        let mut places: Vec<_> =
            places.map(|record| IoSliceMut::new(&mut record[HEADER..])).collect();
        read_exact(file, &mut places, begin + first * PAGE as u64)?;
        to.write_all(&records)?;
        first = after;
    }
    Ok(())
}

/// Reads bytes that follow each other in the file into several places.
pub(super) fn read_exact(
    file: &File,
    mut left: &mut [IoSliceMut],
    mut offset: u64,
) -> io::Result<()> {
    while !left.is_empty() {
        match preadv(file, left, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => {
                offset += read as u64;
                IoSliceMut::advance_slices(&mut left, read);
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

fn copy_from(file: &File, mut at: u64, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; AT_ONCE as usize * PAGE];
    loop {
        match file.read_at(&mut buffer, at) {
            Ok(0) => return Ok(()),
            Ok(read) => {
                to.write_all(&buffer[..read])?;
                at += read as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
