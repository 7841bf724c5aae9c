// SPDX-License-Identifier: LGPL-2.1-or-later

//! Small streams for the tests, as QEMU writes them, and images of them.

use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use tempfile::TempDir;

use super::file::MemoryImage;
use super::format::Format;

const ZERO: u64 = 2;
const BLOCKS: u64 = 4;
const DATA: u64 = 8;
const END: u64 = 16;
const CONTINUED: u64 = 32;
const PART: u8 = 2;
const LAST_PART: u8 = 3;
const PAGE: usize = 4096;

fn section(kind: u8, pages: &[u8]) -> Vec<u8> {
    [&[kind, 0, 0, 0, 2][..], pages, &END.to_be_bytes(), &[0x7e, 0, 0, 0, 2]].concat()
}

pub fn named_page(block: &[u8], offset: u64, byte: u8) -> Vec<u8> {
    let header = (offset | DATA).to_be_bytes();
    [&header[..], &[block.len() as u8], block, &[byte; PAGE]].concat()
}

pub fn page(offset: u64, byte: u8) -> Vec<u8> {
    [&(offset | DATA | CONTINUED).to_be_bytes()[..], &[byte; PAGE]].concat()
}

pub fn fill(offset: u64, byte: u8) -> Vec<u8> {
    [&(offset | ZERO | CONTINUED).to_be_bytes()[..], &[byte]].concat()
}

/// The head of a machine with two blocks, `pc.ram` of 2 MiB and `rom` of 8 KiB.
pub fn head() -> Vec<u8> {
    let mut head = b"QEVM\0\0\0\x03\x07\0\0\0\x09pc-q35-10".to_vec();
    head.extend_from_slice(b"\x05\x12configuration/uuid\0\0\0\x01");
    head.extend_from_slice(&[7; 16]);
    head.extend_from_slice(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04");
    head.extend_from_slice(&((2 << 20) + 8192 + BLOCKS).to_be_bytes());
    for (name, size) in [(&b"pc.ram"[..], 2u64 << 20), (b"rom", 8192)] {
        head.push(name.len() as u8);
        head.extend_from_slice(name);
        head.extend_from_slice(&size.to_be_bytes());
    }
    head.extend_from_slice(&END.to_be_bytes());
    head.extend_from_slice(b"\x7e\0\0\0\x02");
    head
}

/// What follows the pages.
pub const TAIL: &[u8] = b"\x04the devices\x7e\0\0\0\x03\0\x06\0\0\0\x02{}";

/// A whole stream with these pages in its two sections.
pub fn stream(first: &[Vec<u8>], second: &[Vec<u8>]) -> Vec<u8> {
    [head(), section(PART, &first.concat()), section(LAST_PART, &second.concat()), TAIL.to_vec()]
        .concat()
}

/// A complete raw image with this stream, in a directory of its own.
pub fn image(stream: &[u8]) -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let xml = "<domain><name>vm</name></domain>";
    let image = MemoryImage::create(&path, xml, Some("<cookie/>"), true, Format::Raw).unwrap();
    image.file().unwrap().write_all_at(stream, image.stream_offset()).unwrap();
    image.complete(Format::Raw).unwrap();
    (directory, path)
}
