// SPDX-License-Identifier: LGPL-2.1-or-later

//! Decompresses the stream of a zstd memory image.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};

use zstd::stream::read::Decoder;

use super::from_offset::FromOffset;
use super::records::{HeadReader, LONGEST_HEAD};
use super::zstd_frames::{Broken, Frames};

/// The largest window that a decoder allocates: 128 MiB, as the zstd program does by default.
const LARGEST_WINDOW: u32 = 27;
/// More than the devices of any guest. A small file can stand for a very long stream. A stream that
/// is one frame has its memory in that frame, so this is no limit for it.
const MOST_DEVICES: u64 = 4 << 30;
const AT_ONCE: usize = 128 << 10;

/// The whole stream, which begins here. It is an error as soon as it is longer than that of any
/// guest with its memory. If it is of an unknown kind, the size of its memory is not known, and any
/// length is right.
pub fn whole_stream(file: &File, begin: u64) -> io::Result<impl Read + '_> {
    let left = longest(&beginning(file, begin, LONGEST_HEAD as u64)?);
    Ok(Limited { from: decompress(file, begin)?, left })
}

/// The length of the longest stream that begins with these bytes. QEMU saves a page a few times at
/// most.
fn longest(beginning: &[u8]) -> u64 {
    let Ok(Some((head, _))) = HeadReader::default().read(beginning) else { return u64::MAX };
    let memory: u64 = head.blocks.iter().map(|block| block.size).sum();
    memory.saturating_mul(16).saturating_add(MOST_DEVICES)
}

/// A stream that has this many bytes left at most.
struct Limited<R> {
    from: R,
    left: u64,
}

impl<R: Read> Read for Limited<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.from.read(buffer)?;
        self.left = self.left.checked_sub(read as u64).ok_or_else(|| {
            let what = "it is damaged: it is longer than the stream of a guest with its memory";
            io::Error::new(io::ErrorKind::InvalidData, what)
        })?;
        Ok(read)
    }
}

/// The stream from the frame that begins here to the end of the file.
fn decompress(file: &File, frame: u64) -> io::Result<impl Read + '_> {
    let mut decoder =
        Decoder::with_buffer(BufReader::with_capacity(AT_ONCE, FromOffset { file, at: frame }))?;
    decoder.window_log_max(LARGEST_WINDOW)?;
    Ok(decoder)
}

/// The first bytes of the stream that begins here, at most this many.
pub fn beginning(file: &File, begin: u64, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    decompress(file, begin)?.take(most).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Calls `on` with the content of the last frame, piece by piece, as far as that is in the file.
/// `zstd_writer.rs` puts the devices into that frame.
pub fn last_frame(file: &File, begin: u64, on: impl FnMut(&[u8])) -> io::Result<()> {
    last_frame_within(file, begin, MOST_DEVICES, on)
}

fn last_frame_within(
    file: &File,
    begin: u64,
    most_devices: u64,
    mut on: impl FnMut(&[u8]),
) -> io::Result<()> {
    let frames = match Frames::find(file, begin) {
        Ok(frames) | Err(Broken::CutOff(frames)) => frames,
        Err(broken) => return Err(io::Error::new(io::ErrorKind::InvalidData, broken.to_string())),
    };
    let mut from = BufReader::with_capacity(AT_ONCE, decompress(file, frames.last)?);
    let most = if frames.count > 1 { most_devices } else { u64::MAX };
    let mut length = 0;
    loop {
        let bytes = match from.fill_buf() {
            // The file ends inside the frame.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            bytes => bytes?,
        };
        if bytes.is_empty() {
            return Ok(());
        }
        on(bytes);
        let read = bytes.len();
        from.consume(read);
        length += read as u64;
        if length > most {
            let what = "its devices are larger than those of any guest";
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
    }
}

/// The last bytes of the last frame, at most this many.
pub fn end_of_last_frame(file: &File, begin: u64, most: u64) -> io::Result<Vec<u8>> {
    let most = most as usize;
    let mut end = Vec::new();
    last_frame(file, begin, |bytes| {
        if end.len() > 2 * most {
            end.drain(..end.len() - most);
        }
        end.extend_from_slice(bytes);
    })?;
    end.drain(..end.len().saturating_sub(most));
    Ok(end)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::super::sample;
    use super::*;

    #[test]
    fn a_stream_that_is_longer_than_its_memory_allows_is_an_error() {
        let memory = (2 << 20) + 8192;
        assert_eq!(longest(&sample::stream(&[], &[])), 16 * memory + (4 << 30));
        assert_eq!(longest(b"QEVM\0\0\0\x03\x01an old machine"), u64::MAX);
        let read = |left| io::copy(&mut Limited { from: &[0; 100][..], left }, &mut io::sink());
        assert_eq!(read(100).unwrap(), 100);
        assert_eq!(read(99).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn a_stream_of_one_frame_can_be_longer_than_devices_are() {
        const MOST: u64 = 1 << 20;
        let large = zstd::encode_all(&vec![0; 3 << 20][..], 1).unwrap();
        let small = zstd::encode_all(&b"devices"[..], 1).unwrap();
        let read = |frames: &[&[u8]]| {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&frames.concat()).unwrap();
            let mut length = 0;
            last_frame_within(&file, 0, MOST, |bytes| length += bytes.len()).map(|()| length)
        };
        assert_eq!(read(&[&large]).unwrap(), 3 << 20);
        assert_eq!(read(&[&large, &small]).unwrap(), 7);
        assert_eq!(read(&[&small, &large]).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
