// SPDX-License-Identifier: LGPL-2.1-or-later

//! Feeds bytes that can be damaged, or made to do harm, to all that reads images: for the fuzzers
//! in `fuzz/`, and for a test that does the same without one. Whatever the bytes are, the functions
//! return soon, without a panic, and use memory only in proportion to the bytes.

use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use rustix::fs::{MemfdFlags, memfd_create};

use super::contents::Contents;
use super::convert::copy_as;
use super::file::{Image, LIBVIRT_HEADER};
use super::format::Format;
use super::index::Index;
use super::page_writer::PageWriter;
use super::pages;
use super::pages_file::{self, PageNotes};
use super::records::HeadReader;
use super::verify::verify;
use super::zstd_writer::ZstdWriter;

/// The length of the longest file that [`image`] makes.
const LONGEST: u64 = 1 << 40;

fn memory() -> File {
    memfd_create("hostile", MemfdFlags::CLOEXEC).expect("a file in memory").into()
}

/// The path by which this process opens the file once more.
fn path_of(file: &File) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

/// QEMU's stream, as it comes from the pipe, and as it is read from a raw image.
pub fn stream(bytes: &[u8]) {
    let _ = pages::read_stream(bytes, |_| (), |(), _| ());
    let (sparse, zstd) = (memory(), memory());
    // Blocks of these sizes are written out: a guest with such memory has it.
    let is_small = |writer: &PageWriter| writer.memory() < 64 << 20;
    if let Ok(Some((head, length))) = HeadReader::default().read(bytes)
        && let Ok(mut writer) = PageWriter::begin(&sparse, &head, 4096)
        && is_small(&writer)
        && let records = &bytes[length..]
        && writer.write(&sparse, records).is_ok_and(|used| used == records.len())
    {
        let _ = writer.finish(&sparse);
    }
    if let Ok(mut writer) = ZstdWriter::begin(&zstd, 0, Default::default()) {
        let (first, rest) = bytes.split_at(bytes.len() / 2);
        let _ = writer.write(first).and_then(|()| writer.write(rest)).and_then(|()| writer.flush());
        let _ = writer.finish();
    }
}

/// The file of an image. The bytes are its length (u64), and any number of parts: u64 offset, u16
/// length, content. All that is not in a part is a hole. Numbers are little-endian.
pub fn image(bytes: &[u8]) {
    let Some(file) = file_of(bytes) else { return };
    let _ = Image::check(&file);
    let path = path_of(&file);
    let Ok(image) = Image::open(&path) else { return };
    let _ = Contents::read(&path);
    if let Ok(index) = Index::open(&path) {
        for block in 0..index.blocks().len().min(4) {
            for page in [0, 1, index.pages(block).saturating_sub(1), index.pages(block), u64::MAX] {
                let _ = index.page_at(block, page);
            }
        }
    }
    let is_small = image.file.metadata().is_ok_and(|found| found.len() < 64 << 20);
    if is_small {
        let _ = verify(&path);
        // One of them is enough for one input.
        let name = ["raw", "sparse", "zstd"][bytes.len() % 3];
        if let Some(format) = Format::named(name) {
            let _ = copy_as(&image, format, &memory());
        }
    }
}

/// Makes the file that [`image`] describes.
fn file_of(bytes: &[u8]) -> Option<File> {
    let (length, mut rest) = bytes.split_first_chunk()?;
    let length = u64::from_le_bytes(*length).min(LONGEST);
    let file = memory();
    file.set_len(length).ok()?;
    while let Some((offset, after)) = rest.split_first_chunk() {
        let (size, after) = after.split_first_chunk()?;
        let part = after.split_at_checked(u16::from_le_bytes(*size).into());
        let (content, after) = part.unwrap_or((after, &[]));
        let offset = u64::from_le_bytes(*offset);
        let fits = offset.checked_add(content.len() as u64).is_some_and(|end| end <= length);
        if fits {
            file.write_all_at(content, offset).ok()?;
        }
        rest = after;
    }
    Some(file)
}

/// A header of libvirt's with a short XML before these bytes. The first byte chooses the format.
pub fn header(bytes: &[u8]) {
    let Some((number, rest)) = bytes.split_first() else { return };
    let name = ["raw", "zstd", "sparse"][usize::from(*number) % 3];
    let Some(format) = Format::named(name) else { return };
    let mut file = memory();
    let mut head = vec![0; LIBVIRT_HEADER];
    head[..16].copy_from_slice(b"LibvirtQemudSave");
    for (place, number) in (16..).step_by(4).zip([2, 4, 1, format.number(), 0u32]) {
        head[place..place + 4].copy_from_slice(&number.to_ne_bytes());
    }
    let written = file.write_all(&head).and_then(|()| file.write_all(b"<a/>"));
    let written = written.and_then(|()| file.write_all(rest)).and_then(|()| file.rewind());
    written.expect("a file in memory");
    let path = path_of(&file);
    let _ = Image::check(&file);
    let _ = Contents::read(&path);
    let _ = verify(&path);
    // The same bytes as the whole file.
    file.set_len(0).and_then(|()| file.write_all_at(rest, 0)).expect("a file in memory");
    let _ = Image::open(&path);
    let _ = PageNotes::read(&file, &file, 0);
}

/// A file of notes, without the hash at its end.
pub fn notes(bytes: &[u8]) {
    if let Ok(notes) = pages_file::decode_without_hash(bytes) {
        // What was read is written as it was.
        assert!(bytes == notes);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::super::convert::convert;
    use super::super::index::make_index;
    use super::super::sample;
    use super::*;
    use crate::random::Random;

    type Target = (&'static str, fn(&[u8]));
    const TARGETS: [Target; 4] =
        [("stream", stream), ("image", image), ("header", header), ("notes", notes)];

    fn corpus(target: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target)
    }

    /// The parts of a file that are not zero, as [`image`] takes them.
    fn parts(file: &[u8]) -> Vec<u8> {
        let mut parts = (file.len() as u64).to_le_bytes().to_vec();
        let mut at = 0;
        while let Some(begin) = file[at..].iter().position(|byte| *byte != 0) {
            let begin = at + begin;
            // Few zeros do not end a part.
            let end = file[begin..].windows(16).position(|bytes| bytes == [0; 16]);
            let end = end.map_or(file.len(), |length| begin + length).min(begin + 0xffff);
            parts.extend((begin as u64).to_le_bytes());
            parts.extend(((end - begin) as u16).to_le_bytes());
            parts.extend(&file[begin..end]);
            at = end;
        }
        parts
    }

    /// What the corpus was made of: a small stream, images of each format, a file of notes.
    fn samples() -> Vec<(&'static str, &'static str, Vec<u8>)> {
        let pages = [
            sample::named_page(b"pc.ram", 8192, 1),
            sample::page(0, 2),
            sample::fill(4096, 0),
            sample::named_page(b"rom", 4096, 3),
        ];
        let stream = sample::stream(&pages, &[sample::named_page(b"pc.ram", 0, 4)]);
        let (_directory, path) = sample::image(&stream);
        make_index(&path).unwrap();
        let notes = |path: &Path| {
            let bytes = std::fs::read(pages_file::path_of(path)).unwrap();
            bytes[..bytes.len() - 8].to_vec()
        };
        let mut all = vec![
            ("stream", "whole", stream.clone()),
            ("stream", "head", sample::head()),
            ("notes", "raw", notes(&path)),
        ];
        for (number, format) in (0u8..).zip(["raw", "zstd", "sparse"]) {
            convert(&path, Format::named(format).unwrap()).unwrap();
            let bytes = std::fs::read(&path).unwrap();
            all.push(("image", format, parts(&bytes)));
            if format != "sparse" {
                let begin = Image::open(&path).unwrap().stream_offset as usize;
                all.push(("header", format, [&[number][..], &bytes[begin..]].concat()));
            } else {
                all.push(("notes", format, notes(&path)));
            }
        }
        all
    }

    /// Changes some bytes, or the length, in the ways in which fuzzers do.
    fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
        const NUMBERS: [u64; 8] =
            [0, 1, 0xff, 0x7fff_ffff, 0xffff_ffff, 1 << 40, 1 << 62, u64::MAX];
        for _ in 0..=random.below(4) {
            if bytes.is_empty() {
                return;
            }
            let at = random.below(bytes.len());
            let length = 1 + random.below(8.min(bytes.len() - at));
            let number = NUMBERS[random.below(NUMBERS.len())];
            match random.below(8) {
                0 => bytes[at] ^= 1 << random.below(8),
                1 => bytes[at] = random.below(256) as u8,
                2 => bytes[at..at + length].copy_from_slice(&number.to_be_bytes()[8 - length..]),
                3 => bytes[at..at + length].copy_from_slice(&number.to_le_bytes()[..length]),
                4 => drop(bytes.drain(at..at + length)),
                5 => bytes.truncate(at),
                6 => {
                    let copied = bytes[at..at + length].to_vec();
                    let to = random.below(bytes.len());
                    drop(bytes.splice(to..to, copied));
                }
                _ => {
                    let from = random.below(bytes.len() - length + 1);
                    bytes.copy_within(from..from + length, at);
                }
            }
        }
    }

    /// By INSTANTSNAP_FUZZ_SECONDS this goes on for longer, with other changes each time.
    #[test]
    fn hostile_bytes_are_read_to_an_error_or_an_end() {
        let seconds = std::env::var("INSTANTSNAP_FUZZ_SECONDS").ok().and_then(|n| n.parse().ok());
        let begun = std::time::Instant::now();
        let seed = if seconds.is_some() { u64::from(std::process::id()) } else { 1 };
        let mut random = Random(seed);
        let mut rounds = 0u64;
        let mut inputs = Vec::new();
        for (target, run) in TARGETS {
            let files: BTreeSet<_> =
                corpus(target).read_dir().unwrap().map(|entry| entry.unwrap().path()).collect();
            assert!(!files.is_empty(), "{target}");
            inputs.extend(files.iter().map(|file| (run, std::fs::read(file).unwrap())));
        }
        inputs.iter().for_each(|(run, bytes)| run(bytes));
        loop {
            for (run, bytes) in &inputs {
                let mut bytes = bytes.clone();
                mutate(&mut bytes, &mut random);
                run(&bytes);
                rounds += 1;
            }
            match seconds {
                None if rounds > 100 => return,
                Some(seconds) if begun.elapsed().as_secs() >= seconds => break,
                _ => {}
            }
        }
        println!("{rounds} changed inputs, seed {seed}");
    }

    #[test]
    fn corpus_has_the_samples() {
        let write = std::env::var_os("INSTANTSNAP_WRITE_CORPUS").is_some();
        for (target, name, bytes) in samples() {
            let path = corpus(target).join(name);
            if write {
                std::fs::create_dir_all(corpus(target)).unwrap();
                std::fs::write(&path, &bytes).unwrap();
            }
            // zstd's output differs from version to version, and from machine to machine.
            if name != "zstd" && !(target == "notes" && name == "sparse") {
                assert!(std::fs::read(&path).unwrap() == bytes, "{}", path.display());
            }
        }
    }
}
