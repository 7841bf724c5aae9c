// SPDX-License-Identifier: LGPL-2.1-or-later

//! Converts a memory image to another format.
//!
//! The new image is written to a file of its own beside the old one, which takes the old one's name
//! when all of it is on disk. So the image is at no time without its content: a process that has
//! the old one open reads that to its end.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use super::classic::{self, Zeros};
use super::file::{Image, mark_complete, marked_partial};
use super::format::Format;
use super::incoming::Incoming;
use super::page_writer::{Failure, PageWriter};
use super::pages;
use super::pages_file::{self, PageNotes};
use super::pipe::CHUNK;
use super::zstd_writer::ZstdWriter;
use crate::error::{Code, Error, Result, fail};
use crate::sys::{self, IMAGE_LOCKS};

/// Converts a complete image in place. It keeps its domain XML, libvirt's cookie, its mode and,
/// where this process may set it, its owner; and the notes of its pages, if there are any. An image
/// that has the format already stays as it is.
pub fn convert(path: &Path, format: Format) -> Result<()> {
    let image = Image::open(path)?;
    if image.format().number() == format.number() {
        return Ok(());
    }
    check_not_read(&image, path)?;
    let cannot = |error: io::Error| {
        Error::system(format!("cannot convert the memory image '{}'", path.display()), error)
    };
    // The name can be a symbolic link, which stays.
    let path = path.canonicalize().map_err(cannot)?;
    let new = sys::new_file_beside(&path, ".converting").map_err(cannot)?;
    let known = PageNotes::of(&image.file, image.stream_offset, &path).ok().flatten();
    let found = write(&image, format, new.as_file()).map_err(|failure| match failure {
        Failure::File(error) => cannot(error),
        Failure::Stream(what) => Error::new(
            Code::ConfigUnsupported,
            format!(
                "the memory image '{}' cannot be converted to the format '{}': {what}",
                path.display(),
                format.name()
            ),
        ),
    })?;
    sys::copy_owner_and_mode(new.as_file(), &path).map_err(cannot)?;
    mark_complete(new.as_file()).map_err(cannot)?;
    let is_same = |old: &File| {
        let (old, now) = (old.metadata()?, path.metadata()?);
        Ok((old.dev(), old.ino()) == (now.dev(), now.ino()))
    };
    if !is_same(&image.file).map_err(cannot)? {
        fail!(
            OperationInvalid,
            "the memory image '{}' was replaced or removed while it was being converted",
            path.display()
        );
    }
    // The pages are where the new format has them.
    let notes = known.map(|known| PageNotes { index: None, ..known }).or(found);
    let notes = notes.and_then(|notes| {
        pages_file::replacement(&notes, new.as_file(), image.stream_offset, &path).ok()
    });
    // A load can have begun meanwhile.
    check_not_read(&image, &path)?;
    // The old notes are not of the new image.
    pages_file::remove(&path).map_err(cannot)?;
    new.persist(&path).map_err(|error| cannot(error.error))?;
    match pages_file::put(&path, notes) {
        // Another file has the name. The image is whole without its notes.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        put => put,
    }
    .and_then(|()| sys::sync_parent(&path))
    .map_err(cannot)
}

/// Refuses an image that a page server may have to open again by its name.
fn check_not_read(image: &Image, path: &Path) -> Result<()> {
    if sys::is_locked(&image.file, IMAGE_LOCKS) {
        fail!(
            OperationInvalid,
            "the memory image '{}' is being read: the memory of a guest that was reverted to its \
             snapshot is still coming from it. Wait until all of it is in",
            path.display()
        );
    }
    Ok(())
}

/// Writes a partial image of this format to a file.
#[cfg(any(test, feature = "fuzzing"))]
pub(super) fn copy_as(
    image: &Image,
    format: Format,
    to: &File,
) -> std::result::Result<(), Failure> {
    write(image, format, to).map(drop)
}

/// Writes a partial image of this format. Returns the notes of its pages, as far as they are known
/// from the stream.
fn write(
    image: &Image,
    format: Format,
    to: &File,
) -> std::result::Result<Option<PageNotes>, Failure> {
    let begin = image.stream_offset;
    to.write_all_at(&marked_partial(image, format)?, 0)?;
    match (&image.sparse, format) {
        (Some(sparse), Format::Zstd(level)) => {
            let mut to = Compressed(ZstdWriter::begin(to, begin, level)?);
            classic::write(&image.file, sparse, Zeros::All, &[], &mut to)?;
            // The order of the pages is not known: they come as they are in the image.
            let mut notes = to.0.finish()?;
            notes.iter_mut().for_each(|notes| notes.first.clear());
            Ok(notes)
        }
        (Some(sparse), _) => {
            let mut to = appending(to, begin)?;
            // A QEMU that loads the image need not have fresh memory.
            classic::write(&image.file, sparse, Zeros::All, &[], &mut to)?;
            to.flush()?;
            Ok(None)
        }
        (None, Format::Zstd(level)) => {
            let mut to = Compressed(ZstdWriter::begin(to, begin, level)?);
            io::copy(&mut source(image)?, &mut to)?;
            to.0.finish()
        }
        (None, Format::Raw) => {
            let mut to = appending(to, begin)?;
            io::copy(&mut source(image)?, &mut to)?;
            to.flush()?;
            Ok(None)
        }
        (None, Format::Sparse) => write_sparse(source(image)?, begin, to).map(Some),
    }
}

/// The stream of an image that is not sparse.
fn source(image: &Image) -> io::Result<impl Read + '_> {
    Ok(BufReader::with_capacity(CHUNK, pages::stream(image)?))
}

fn appending(mut to: &File, begin: u64) -> io::Result<BufWriter<&File>> {
    to.seek(SeekFrom::Start(begin))?;
    Ok(BufWriter::with_capacity(CHUNK, to))
}

struct Compressed(ZstdWriter);

impl Write for Compressed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes).map(|()| bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

fn write_sparse(
    mut from: impl Read,
    begin: u64,
    to: &File,
) -> std::result::Result<PageNotes, Failure> {
    let mut read = |space: &mut [u8]| loop {
        match from.read(space) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            read => return read.map_err(Failure::File),
        }
    };
    let mut incoming = Incoming::new();
    let head = incoming.head(&mut read)?.map_err(Failure::Stream)?;
    let mut writer = PageWriter::begin(to, &head, begin)?;
    let write = |bytes: &[u8]| Ok(ControlFlow::Continue(writer.write(to, bytes)?));
    match incoming.each(&mut read, write)? {
        true => writer.finish(to),
        false => Err(Failure::Stream("it ends among its pages".into())),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::contents::Contents;
    use super::super::records::{Content, Head, HeadReader, Record, Records};
    use super::super::sample::{self, image};
    use super::super::verify::verify;
    use super::*;
    use crate::random::Random;
    use tempfile::TempDir;

    /// The head of a raw image with all before it, its pages that are not zero, and its tail.
    type Parts = (Vec<u8>, BTreeMap<(usize, u64), Vec<u8>>, Vec<u8>);

    fn parts(path: &Path) -> Parts {
        let begin = Image::open(path).unwrap().stream_offset as usize;
        let bytes = std::fs::read(path).unwrap();
        let (head, length) = HeadReader::default().read(&bytes[begin..]).unwrap().unwrap();
        let mut records = Records::new(&head);
        let (mut at, mut pages) = (begin + length, BTreeMap::new());
        loop {
            let (record, length) = records.next(&bytes[at..]).unwrap().unwrap();
            at += length;
            match record {
                Record::Page { block, offset, content: Content::Fill(0) } => {
                    pages.remove(&(block, offset));
                }
                Record::Page { block, offset, content } => {
                    let page = match content {
                        Content::Data(page) => page.to_vec(),
                        Content::Fill(byte) => vec![byte; 4096],
                    };
                    pages.insert((block, offset), page);
                }
                Record::Tail(tail) => {
                    pages.retain(|_, page| page.iter().any(|byte| *byte != 0));
                    return (bytes[..begin + length_of(&head)].to_vec(), pages, tail.to_vec());
                }
                Record::Mark => {}
            }
        }
    }

    /// The length of a head: the list of blocks ends the head of [`sample`].
    fn length_of(head: &Head) -> usize {
        let blocks: usize = head.blocks.iter().map(|block| block.name.len() + 9).sum();
        head.configuration.len() + head.section_start().len() + 8 + blocks + 13
    }

    #[test]
    fn all_that_is_in_an_image_is_in_the_converted_one_too() {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let mut below = |limit: usize| random.below(limit) as u64;
        for round in 0..12 {
            // Pages come in any order, some of them again, zero or filled with a byte.
            let mut section = |count: u64| -> Vec<Vec<u8>> {
                let mut pages = vec![sample::named_page(b"rom", 4096, 1)];
                for n in 0..count {
                    let (ram, byte) = (below(512) * 4096, below(4) as u8);
                    match below(4) {
                        _ if n == 0 => pages.push(sample::named_page(b"pc.ram", ram, byte)),
                        0 => pages.push(sample::fill(ram, byte)),
                        _ => pages.push(sample::page(ram, byte)),
                    }
                }
                pages
            };
            let stream = sample::stream(&section(round * 20), &section(round));
            let (_directory, path) = image(&stream);
            let before = parts(&path);
            let raw = Contents::read(&path).unwrap();
            convert(&path, Format::Sparse).unwrap();
            let sparse = Contents::read(&path).unwrap();
            assert_eq!((sparse.format, sparse.domain), ("sparse", Some("vm".to_owned())));
            let pages = sparse.blocks.iter().map(|block| block.data_pages).sum::<u64>();
            assert_eq!(pages, before.1.len() as u64);
            assert_eq!(sparse.blocks[0].data_pages + sparse.blocks[0].zero_pages, 512);
            verify(&path).unwrap();
            for format in [zstd(), Format::Sparse, zstd(), Format::Raw] {
                convert(&path, format).unwrap();
                verify(&path).unwrap();
                let contents = Contents::read(&path).unwrap();
                assert_eq!(contents.format, format.name());
                assert_eq!(contents.blocks, sparse.blocks, "round {round}");
                assert_eq!(
                    contents.notes.unwrap().written_first,
                    sparse.notes.as_ref().unwrap().written_first
                );
            }
            assert_eq!(parts(&path), before, "round {round}");
            assert_eq!(Contents::read(&path).unwrap().machine, raw.machine);
            let text = std::fs::read(&path).unwrap();
            assert!(text.windows(9).any(|part| part == b"<cookie/>"));
        }
    }

    fn zstd() -> Format {
        Format::named("zstd").unwrap()
    }

    fn sparse() -> (TempDir, std::path::PathBuf) {
        let first = [sample::named_page(b"pc.ram", 4096, 1), sample::page(8192, 2)];
        let (directory, path) = image(&sample::stream(&first, &[]));
        convert(&path, Format::Sparse).unwrap();
        (directory, path)
    }

    fn change(path: &Path, at: usize, bytes: &[u8]) {
        File::options().write(true).open(path).unwrap().write_all_at(bytes, at as u64).unwrap();
    }

    #[test]
    fn sparse_image_whose_numbers_lie_is_refused() {
        let (_directory, path) = sparse();
        let whole = std::fs::read(&path).unwrap();
        let entry = whole.windows(7).position(|part| part == b"\x06pc.ram").unwrap();
        let (total, size, version) = (entry - 8, entry + 7, entry + 15);
        let (page, bitmap, pages) = (version + 4, version + 12, version + 20);
        let capability = whole.windows(10).position(|part| part == b"mapped-ram").unwrap();
        let beyond = (whole.len() as u64).next_multiple_of(1 << 20);
        let map = version + 28;
        let numbers: [(usize, u64); 11] = [
            (total, u64::MAX - 4095 + 4),
            (total, (1 << 46) + 4096 + 4),
            (size, u64::MAX - 4095),
            (size, 4095),
            (page, 16384),
            (bitmap, 0),
            (bitmap, 1 << 20),
            (bitmap, u64::MAX),
            (pages, beyond),
            (pages, u64::MAX - (1 << 20) + 1),
            (pages, (1 << 20) + 4096),
        ];
        let refused = |what: &str| {
            let error = Contents::read(&path).expect_err(what);
            assert_eq!(error.code, Code::InvalidDomainSnapshot, "{what}: {error}");
            assert!(convert(&path, Format::Raw).is_err(), "{what}");
        };
        for (at, number) in numbers {
            change(&path, at, &number.to_be_bytes());
            refused(&format!("{number:#x} at {at}"));
            change(&path, at, &whole[at..at + 8]);
        }
        change(&path, version, &[0, 0, 0, 2]);
        refused("another version");
        change(&path, version, &whole[version..version + 4]);
        change(&path, capability, b"x-ignore-s");
        refused("another capability");
        change(&path, capability, b"mapped-ram");
        Contents::read(&path).unwrap();
        // The bitmap of the second block has two bits, which are set because it is small.
        let rom = whole.windows(4).rposition(|part| part == b"\x03rom").unwrap() + 4 + 8 + 28;
        change(&path, rom, &[4]);
        refused("a page beyond the block");
        change(&path, rom, &whole[rom..rom + 1]);
        // A head of mapped-ram in an image that says that it is raw.
        change(&path, 28, &0u32.to_ne_bytes());
        let error = Contents::read(&path).unwrap_err();
        assert!(error.message.contains("configuration/capabilities"), "{error}");
        change(&path, 28, &6u32.to_ne_bytes());
        assert_eq!(std::fs::read(&path).unwrap(), whole);
        assert_eq!(Contents::read(&path).unwrap().blocks[0].data_pages, 2);
        assert_eq!(whole[rom], 3);
        assert_eq!(&whole[map..map + 64], &[0xff; 64]);
    }

    #[test]
    fn damaged_bytes_and_cut_off_ends_are_an_error_or_harmless_and_never_a_panic() {
        let (_directory, path) = sparse();
        let whole = std::fs::read(&path).unwrap();
        let interesting: Vec<usize> = (0..whole.len())
            .filter(|at| whole[*at] != 0 || at % 40_009 == 0)
            .filter(|at| *at < 92 || *at > (64 << 10))
            .filter(|at| whole[*at] > 2 || at % 97 == 0)
            .collect();
        for at in interesting {
            for byte in [whole[at] ^ 1, 0xff] {
                change(&path, at, &[byte]);
                let _ = Contents::read(&path);
            }
            change(&path, at, &whole[at..at + 1]);
        }
        Contents::read(&path).unwrap();
        for end in (0..whole.len()).step_by(100_003).chain([whole.len() - 1]) {
            File::options().write(true).open(&path).unwrap().set_len(end as u64).unwrap();
            assert!(Contents::read(&path).is_err(), "{end}");
        }
    }

    #[test]
    fn image_with_an_unknown_stream_stays_as_it_is() {
        // QEMU would write another flag with compression.
        let (directory, path) = image(&sample::stream(
            &[[&(4096u64 | 0x100).to_be_bytes()[..], b"\x06pc.ram"].concat()],
            &[],
        ));
        let before = std::fs::read(&path).unwrap();
        let error = convert(&path, Format::Sparse).unwrap_err();
        assert_eq!(error.code, Code::ConfigUnsupported, "{error}");
        assert!(error.message.contains("0x100"), "{error}");
        assert_eq!(Contents::read(&path).unwrap_err().code, Code::InvalidDomainSnapshot);
        assert_eq!(std::fs::read(&path).unwrap(), before);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
