// SPDX-License-Identifier: LGPL-2.1-or-later

//! Decompresses the stream of a zstd memory image.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};

use zstd::stream::read::Decoder;

use super::from_offset::FromOffset;
use super::zstd_frames::{Broken, Frames};

/// The largest window that a decoder allocates: 128 MiB, as the zstd program does by default.
const LARGEST_WINDOW: u32 = 27;
/// More than the devices of any guest. A small file can stand for a very long stream. A stream that
/// is one frame has its memory in that frame, so this is no limit for it.
const MOST_DEVICES: u64 = 4 << 30;
const AT_ONCE: usize = 128 << 10;

/// The stream from the frame that begins here to the end of the file.
pub fn decompress(file: &File, frame: u64) -> io::Result<impl Read + '_> {
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

    use super::*;

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
