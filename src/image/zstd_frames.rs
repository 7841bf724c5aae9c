// SPDX-License-Identifier: LGPL-2.1-or-later

//! Finds the frames of a zstd stream without decompressing it, and with them whether it is whole.
//!
//! ```text
//! frame  0xFD2FB528; descriptor (u8); window (u8), dictionary (0, 1, 2 or 4), content size
//!        blocks: u24 with 1 bit: the last one, 2 bits: the kind, 21 bits: the length
//!            kind 0: stored, 1: one byte for all, 2: compressed
//!        checksum (4), if the descriptor says so
//! other  0x184D2A50 to 0x184D2A5F, u32 length, what programs may skip
//! ```
//!
//! Numbers are little-endian.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

const MAGIC: u32 = 0xfd2f_b528;
const SKIPPED: u32 = 0x184d_2a50;
/// The longest block.
const LONGEST_BLOCK: u32 = 128 << 10;
/// Compressors write no empty blocks but at a frame's end. This limits the time.
const MOST_EMPTY: u32 = 64;

/// The frames of a zstd stream that ends with its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frames {
    /// The number of frames that have content.
    pub count: u64,
    /// Where the last one begins.
    pub last: u64,
}

/// Why the frames were not found.
#[derive(Debug, PartialEq, Eq)]
pub enum Broken {
    /// The file ends inside the last frame, or there is none. The frames up to there.
    CutOff(Frames),
    /// What is wrong.
    Damaged(&'static str),
    Unreadable(String),
}

impl From<io::Error> for Broken {
    fn from(error: io::Error) -> Broken {
        Broken::Unreadable(format!("cannot be read: {error}"))
    }
}

impl std::fmt::Display for Broken {
    fn fmt(&self, to: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Broken::CutOff(_) => write!(to, "is cut off: its compressed stream has no end"),
            Broken::Damaged(what) => write!(to, "is damaged: {what}"),
            Broken::Unreadable(what) => write!(to, "{what}"),
        }
    }
}

impl Frames {
    /// Finds the frames from `begin` to the end of the file.
    pub fn find(file: &File, begin: u64) -> Result<Frames, Broken> {
        let end = file.metadata()?.len();
        let mut bytes = Bytes { file, at: begin, end, buffer: Vec::new(), from: begin };
        let mut frames = Frames { count: 0, last: begin };
        while bytes.at < end || frames.count == 0 {
            let at = bytes.at;
            match bytes.frame() {
                Ok(true) => frames = Frames { count: frames.count + 1, last: at },
                Ok(false) => {}
                Err(Wrong::Short) => {
                    return Err(Broken::CutOff(Frames { count: frames.count + 1, last: at }));
                }
                Err(Wrong::Is(broken)) => return Err(broken),
            }
        }
        Ok(frames)
    }
}

enum Wrong {
    Short,
    Is(Broken),
}

impl From<io::Error> for Wrong {
    fn from(error: io::Error) -> Wrong {
        Wrong::Is(error.into())
    }
}

/// The bytes of a file from a place on.
struct Bytes<'a> {
    file: &'a File,
    at: u64,
    end: u64,
    /// What was read, and where it begins.
    buffer: Vec<u8>,
    from: u64,
}

impl Bytes<'_> {
    /// Goes over one frame. Returns whether it has content.
    fn frame(&mut self) -> Result<bool, Wrong> {
        const DAMAGED: Wrong = Wrong::Is(Broken::Damaged("it is no zstd stream"));
        let magic = self.number(4)?;
        if magic & !0xf == SKIPPED {
            let length = self.number(4)?;
            self.skip(length.into())?;
            return Ok(false);
        }
        if magic != MAGIC {
            return Err(DAMAGED);
        }
        let descriptor = self.number(1)?;
        let is_single = descriptor >> 5 & 1;
        let dictionary = [0, 1, 2, 4][(descriptor & 3) as usize];
        let size = match descriptor >> 6 {
            0 => u64::from(is_single),
            size => 1 << size,
        };
        self.skip(u64::from(1 - is_single) + dictionary + size)?;
        let mut empty = 0;
        loop {
            let head = self.number(3)?;
            let (is_last, kind, length) = (head & 1 == 1, head >> 1 & 3, head >> 3);
            empty = if length == 0 { empty + 1 } else { 0 };
            if kind == 3 || length > LONGEST_BLOCK || empty > MOST_EMPTY {
                return Err(DAMAGED);
            }
            self.skip(if kind == 1 { 1 } else { length.into() })?;
            if is_last {
                break;
            }
        }
        self.skip(if descriptor & 4 != 0 { 4 } else { 0 })?;
        Ok(true)
    }

    fn skip(&mut self, length: u64) -> Result<(), Wrong> {
        let after = self.at.checked_add(length).filter(|after| *after <= self.end);
        self.at = after.ok_or(Wrong::Short)?;
        Ok(())
    }

    /// Reads a number of this many bytes, at most 4.
    fn number(&mut self, length: usize) -> Result<u32, Wrong> {
        const AT_ONCE: u64 = 4096;
        let at = self.at;
        self.skip(length as u64)?;
        let is_read = at >= self.from && self.at <= self.from + self.buffer.len() as u64;
        if !is_read {
            self.buffer.resize((self.end - at).min(AT_ONCE) as usize, 0);
            self.from = at;
            self.file.read_exact_at(&mut self.buffer, at)?;
        }
        let bytes = &self.buffer[(at - self.from) as usize..][..length];
        Ok(bytes.iter().rev().fold(0, |number, byte| number << 8 | u32::from(*byte)))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::random::Random;

    fn find(bytes: &[u8]) -> Result<Frames, Broken> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"head").unwrap();
        file.write_all(bytes).unwrap();
        Frames::find(&file, 4)
    }

    #[test]
    fn frames_are_found_whole_and_the_one_that_is_cut_off_is_told() {
        let mut random = Random(5);
        let mut content = vec![0u8; 300_000];
        content[100_000..].fill_with(|| random.below(256) as u8);
        let first = zstd::encode_all(&content[..], 3).unwrap();
        let second = zstd::encode_all(&b"devices"[..], 3).unwrap();
        let skipped = b"\x53\x2a\x4d\x18\x03\0\0\0abc";
        let both = [&first[..], skipped, &second].concat();
        let last = 4 + (first.len() + skipped.len()) as u64;
        assert_eq!(find(&both), Ok(Frames { count: 2, last }));
        assert_eq!(find(&first), Ok(Frames { count: 1, last: 4 }));
        for length in (0..both.len()).filter(|length| *length != first.len()) {
            let is_second = length >= first.len() + skipped.len();
            match find(&both[..length]) {
                Err(Broken::CutOff(frames)) if is_second => assert_eq!(frames.last, last),
                Err(Broken::CutOff(_)) => {}
                // The end of what may be skipped.
                Ok(_) if is_second && length + second.len() == both.len() => {}
                other => panic!("{length}: {other:?}"),
            }
        }
        for wrong in [&b"QEVM\0\0\0\x03"[..], &[0; 100], &[&first[..], b"more"].concat()] {
            assert!(matches!(find(wrong), Err(Broken::Damaged(_))), "{wrong:x?}");
        }
        // Blocks that are empty and do not end.
        let empty = [&MAGIC.to_le_bytes()[..], &[0, 0x58], &[0; 1 << 20]].concat();
        assert!(matches!(find(&empty), Err(Broken::Damaged(_))));
    }
}
