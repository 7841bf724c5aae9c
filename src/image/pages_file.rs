// SPDX-License-Identifier: LGPL-2.1-or-later

//! The file beside a memory image: what is known of the image's pages, and is not in the image.
//!
//! ```text
//! 0    InstantsnapPages, u32 version (1)
//!      u64 length of the image from QEMU's stream on, u64 hash of its end: which image it is of
//!      u32 number of memory blocks; of each its name (u8 length) and u64 size
//!      u32 number of entries; of each u32 block, u32 count, u64 page: the pages that the guest
//!          wrote first after the instant, in their order
//!      u8  1 if there are checksums; then of each block a u32 number of those that are not 0,
//!          and of each u64 number of the MiB, u64 checksum
//!      u8  1 if there is an index of a raw image; then of each block a u64 number of runs, and of
//!          each u64 page, u64 count, u64 offset of the first page's content in the image
//!      u64 hash of all before
//! ```
//!
//! Numbers are big-endian; hashes are XXH3. The image is whole without this file: readers ignore
//! one that is not of the image. It begins with its magic as soon as it exists, so that one that
//! was left behind is recognised.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;
use twox_hash::XxHash3_64;

use super::checksums::Checksums;
use super::cursor::{Cursor, Wrong, parse};
use super::first_writes::{self, FirstWrites, Pages};
use super::raw_index::{RawIndex, Run};
use super::records::{Block, Content, PAGE};
use crate::own_file::OwnFile;
use crate::sys;

const MAGIC: &[u8; 16] = b"InstantsnapPages";
const VERSION: u32 = 1;
/// The part of an image's end that is hashed: the devices, which differ from image to image.
const END: u64 = 1 << 20;
/// The length of the longest file that is read, and written.
const LONGEST: u64 = 1 << 30;
const HASH: usize = 8;

/// The path of the file that belongs to this image.
pub fn path_of(image: &Path) -> PathBuf {
    let mut name = OsString::from(image);
    name.push(".pages");
    name.into()
}

/// Whether a file is such a file, of whichever image, or the beginning of one.
pub fn is_one(path: &Path) -> bool {
    sys::open_file(path).is_ok_and(|file| is_begun(&file))
}

/// Whether an open file is such a file, or the beginning of one.
pub fn is_begun(file: &File) -> bool {
    let mut magic = [0; MAGIC.len()];
    file.read_exact_at(&mut magic, 0).is_ok() && magic == *MAGIC
}

/// Removes the file that belongs to this image, if there is one. Another file of that name stays.
pub fn remove(image: &Path) -> io::Result<()> {
    let path = path_of(image);
    if is_one(&path) { sys::remove_file(&path) } else { Ok(()) }
}

/// Creates the file for an image that was just created. One that an earlier image has left is
/// replaced. `None` if it cannot be created, or another file has its name.
pub fn create(image: &Path) -> Option<OwnFile> {
    remove(image).ok()?;
    let own = OwnFile::create(&path_of(image)).ok()?;
    if own.file().write_all_at(MAGIC, 0).is_err() {
        let _ = own.remove();
        return None;
    }
    Some(own)
}

/// A new file with these notes of a complete image, for [`put`]. It has the image's owner and mode.
pub fn replacement(
    notes: &PageNotes,
    image: &File,
    stream: u64,
    path: &Path,
) -> io::Result<NamedTempFile> {
    let new = sys::new_file_beside(path, ".pages")?;
    notes.write(new.as_file(), image, stream)?;
    sys::copy_owner_and_mode(new.as_file(), path)?;
    new.as_file().sync_all()?;
    Ok(new)
}

/// Puts a file of notes beside the image. If there is none, removes the one that is there. Another
/// file that has its name stays, and is an error of the kind `AlreadyExists` if there is one to
/// put.
pub fn put(image: &Path, new: Option<NamedTempFile>) -> io::Result<()> {
    let path = path_of(image);
    match new {
        Some(new) if is_one(&path) || !path.exists() => {
            new.persist(&path).map(drop).map_err(|error| error.error)
        }
        Some(_) => {
            let what = format!("'{}' is another file: move it away", path.display());
            Err(io::Error::new(io::ErrorKind::AlreadyExists, what))
        }
        None => remove(image),
    }
}

/// Removes all but the magic from a file.
pub fn empty(file: &File) -> io::Result<()> {
    file.set_len(MAGIC.len() as u64)
}

/// What is known of the pages of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageNotes {
    /// The memory blocks, in the image's order.
    pub blocks: Vec<Block>,
    /// The pages that the guest wrote first after the instant.
    pub first: Vec<Pages>,
    /// Checksums of the pages, if they are known.
    pub checksums: Option<Checksums>,
    /// Where the pages of a raw image are, if that was noted.
    pub index: Option<RawIndex>,
}

/// Collects the notes while the pages come.
#[derive(Debug)]
pub struct Collector {
    blocks: Vec<Block>,
    order: FirstWrites,
    checksums: Checksums,
    exact: bool,
}

impl Collector {
    pub fn new(blocks: &[Block]) -> Collector {
        let (order, checksums) = (FirstWrites::new(blocks), Checksums::new(blocks));
        Collector { blocks: blocks.into(), order, checksums, exact: true }
    }

    /// Adds a page. If it has come before, `old` reads the content that it had.
    pub fn page(
        &mut self,
        block: usize,
        offset: u64,
        content: &Content,
        old: impl FnOnce() -> Option<Vec<u8>>,
    ) {
        let page = offset / PAGE as u64;
        if self.order.page(block, page) {
            match old() {
                Some(old) => self.checksums.take(block, page, &Content::Data(&old)),
                None => self.exact = false,
            }
        }
        self.checksums.add(block, page, content);
    }

    /// The notes. They have no checksums if the old content of a page was not known.
    pub fn finish(self) -> PageNotes {
        let Collector { blocks, order, checksums, exact } = self;
        let checksums = exact.then_some(checksums);
        PageNotes { blocks, first: order.list().into(), checksums, index: None }
    }
}

/// Which image a file belongs to.
#[derive(PartialEq, Eq)]
struct Binding {
    length: u64,
    end: u64,
}

impl Binding {
    fn of(image: &File, stream: u64) -> io::Result<Binding> {
        let end = image.metadata()?.len();
        let begin = end.saturating_sub(END).max(stream.min(end));
        let mut bytes = vec![0; (end - begin) as usize];
        image.read_exact_at(&mut bytes, begin)?;
        Ok(Binding { length: end.saturating_sub(stream), end: XxHash3_64::oneshot(&bytes) })
    }
}

impl PageNotes {
    /// Writes the notes of an image that is complete but for its mark, and whose stream begins at
    /// `stream`. Notes that no reader would take are an error.
    pub fn write(&self, to: &File, image: &File, stream: u64) -> io::Result<()> {
        let bytes = self.encode(&Binding::of(image, stream)?);
        if bytes.len() as u64 > LONGEST {
            return Err(io::Error::other("the notes are longer than they can be"));
        }
        to.write_all_at(&bytes, 0)?;
        to.set_len(bytes.len() as u64)
    }

    /// Reads the notes of an image with this path, whose stream begins at `stream`. `None` if there
    /// are none. The error is what is wrong with them.
    pub fn of(image: &File, stream: u64, path: &Path) -> Result<Option<PageNotes>, String> {
        // It is beside the image itself, which can have links.
        let path = path_of(&path.canonicalize().unwrap_or_else(|_| path.into()));
        let failed = |error: io::Error| format!("cannot be read: {error}");
        let file = match sys::open_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file.map_err(failed)?,
        };
        PageNotes::read(&file, image, stream).map(Some)
    }

    /// Reads the notes of an image whose stream begins at `stream`.
    pub fn read(file: &File, image: &File, stream: u64) -> Result<PageNotes, String> {
        let failed = |error: io::Error| format!("cannot be read: {error}");
        let length = file.metadata().map_err(failed)?.len();
        if length > LONGEST {
            return Err("is longer than it can be".into());
        }
        let mut bytes = vec![0; length as usize];
        file.read_exact_at(&mut bytes, 0).map_err(failed)?;
        let (notes, binding) = PageNotes::decode(&bytes)?;
        if binding != Binding::of(image, stream).map_err(failed)? {
            return Err("is not of this image, or one of the two is damaged".into());
        }
        Ok(notes)
    }

    fn encode(&self, binding: &Binding) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        let u32s = |bytes: &mut Vec<u8>, number: u32| bytes.extend(number.to_be_bytes());
        let u64s = |bytes: &mut Vec<u8>, number: u64| bytes.extend(number.to_be_bytes());
        u32s(&mut bytes, VERSION);
        u64s(&mut bytes, binding.length);
        u64s(&mut bytes, binding.end);
        u32s(&mut bytes, self.blocks.len() as u32);
        for block in &self.blocks {
            bytes.push(block.name.len() as u8);
            bytes.extend(&block.name);
            u64s(&mut bytes, block.size);
        }
        u32s(&mut bytes, self.first.len() as u32);
        for pages in &self.first {
            u32s(&mut bytes, pages.block);
            u32s(&mut bytes, pages.count);
            u64s(&mut bytes, pages.first);
        }
        bytes.push(self.checksums.is_some().into());
        if let Some(checksums) = &self.checksums {
            for block in 0..self.blocks.len() {
                let known = (0u64..).zip(checksums.of(block)).filter(|(_, sum)| **sum != 0);
                u32s(&mut bytes, known.clone().count() as u32);
                for (group, sum) in known {
                    u64s(&mut bytes, group);
                    u64s(&mut bytes, *sum);
                }
            }
        }
        bytes.push(self.index.is_some().into());
        for runs in self.index.iter().flat_map(RawIndex::blocks) {
            u64s(&mut bytes, runs.len() as u64);
            for run in runs {
                [run.first, run.count, run.offset].iter().for_each(|n| u64s(&mut bytes, *n));
            }
        }
        let hash = XxHash3_64::oneshot(&bytes);
        u64s(&mut bytes, hash);
        bytes
    }

    fn decode(bytes: &[u8]) -> Result<(PageNotes, Binding), String> {
        let damaged = || "is damaged".to_owned();
        let Some((content, hash)) = bytes.split_last_chunk::<HASH>() else {
            return Err(damaged());
        };
        if !content.starts_with(MAGIC) || XxHash3_64::oneshot(content) != u64::from_be_bytes(*hash)
        {
            return Err(damaged());
        }
        match parse(content, notes)? {
            Some((parsed, length)) if length == content.len() => Ok(parsed),
            _ => Err(damaged()),
        }
    }
}

/// Parses a file of notes without its hash. Returns what would be written for it, without the hash.
#[cfg(any(test, feature = "fuzzing"))]
pub(super) fn decode_without_hash(bytes: &[u8]) -> Result<Vec<u8>, String> {
    match parse(bytes, notes)? {
        Some(((notes, binding), length)) if length == bytes.len() => {
            let mut encoded = notes.encode(&binding);
            encoded.truncate(encoded.len() - HASH);
            Ok(encoded)
        }
        _ => Err("is damaged".into()),
    }
}

fn flag(cursor: &mut Cursor) -> Result<bool, Wrong> {
    match cursor.byte()? {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Wrong::Unknown("is damaged".into())),
    }
}

/// Parses all but the hash. No length in it is believed before as many bytes are there.
fn notes(cursor: &mut Cursor) -> Result<(PageNotes, Binding), Wrong> {
    let damaged = || Wrong::Unknown("is damaged".into());
    if cursor.take(MAGIC.len())? != MAGIC {
        return Err(damaged());
    }
    let version = cursor.u32()?;
    if version != VERSION {
        return Err(format!("has version {version}, {VERSION} is supported").into());
    }
    let binding = Binding { length: cursor.u64()?, end: cursor.u64()? };
    let mut blocks = Vec::new();
    let mut total = 0u64;
    for _ in 0..cursor.u32()? {
        let block = Block { name: cursor.name()?.to_vec(), size: cursor.u64()? };
        total = total.checked_add(block.size).ok_or_else(damaged)?;
        blocks.push(block);
    }
    if total > super::sparse_reader::MOST_MEMORY {
        return Err(damaged());
    }
    let pages_of = |block: usize| blocks.get(block).map(|block| block.size / PAGE as u64);
    let mut first = Vec::new();
    let entries = cursor.u32()?;
    if entries as usize > first_writes::MOST {
        return Err(damaged());
    }
    for _ in 0..entries {
        let (block, count, page) = (cursor.u32()?, cursor.u32()?, cursor.u64()?);
        let end = page.checked_add(count.into()).ok_or_else(damaged)?;
        if pages_of(block as usize).is_none_or(|pages| end > pages) {
            return Err(damaged());
        }
        first.push(Pages { block, count, first: page });
    }
    let mut checksums = None;
    if flag(cursor)? {
        let mut sums = Checksums::new(&blocks);
        for block in 0..blocks.len() {
            let mut next = 0;
            for _ in 0..cursor.u32()? {
                let (group, sum) = (cursor.u64()?, cursor.u64()?);
                let set = sums.set(block, group, sum).filter(|()| group >= next && sum != 0);
                set.ok_or_else(damaged)?;
                next = group + 1;
            }
        }
        checksums = Some(sums);
    }
    let mut index = None;
    if flag(cursor)? {
        let mut all = Vec::new();
        for block in 0..blocks.len() {
            let mut runs = Vec::new();
            for _ in 0..cursor.u64()? {
                let [first, count, offset] = [cursor.u64()?, cursor.u64()?, cursor.u64()?];
                runs.push(Run { first, count, offset });
            }
            let pages = pages_of(block).unwrap_or_default();
            all.push((runs, pages));
        }
        index = Some(RawIndex::from_runs(all).ok_or_else(damaged)?);
    }
    Ok((PageNotes { blocks, first, checksums, index }, binding))
}
