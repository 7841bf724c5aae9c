// SPDX-License-Identifier: LGPL-2.1-or-later

//! Reads what QEMU sends by the return path of a post-copy migration.
//!
//! ```text
//! u16 kind, u16 length, then
//! 1  SHUT: u32, 0 if all is well                2  PONG: u32
//! 3  pages are needed: u64 offset, u32 length, name of the block
//! 4  the same, of the block of the last such message
//! 5  received: name of a block. Behind the message come u64 length, so many bytes of a bitmap in
//!    little-endian words of 64 bits, and a mark
//! 6  resumed: u32 1
//! ```
//!
//! Numbers are big-endian, a name is a u8 with its length, then its bytes. All else is an error,
//! and so is a request for what the guest does not have. A message is at most 4 + 268 bytes long.

use std::collections::HashMap;
use std::ops::Range;

use crate::image::{Block, Cursor, PAGE, PageMap, Parsed, Short, parse};

const SHUT: u16 = 1;
const PONG: u16 = 2;
const PAGES_OF: u16 = 3;
const PAGES: u16 = 4;
const RECEIVED: u16 = 5;
const RESUMED: u16 = 6;
const RESUMED_WELL: u32 = 1;
/// What comes after the bitmap of received pages.
const BITMAP_END: u64 = 0x0123_4567_89ab_cdef;

/// A message of QEMU's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// All is in, and QEMU ends the migration; or it has failed.
    Shut {
        failed: bool,
    },
    Pong(u32),
    /// The guest needs these pages of this block.
    Pages(usize, Range<u64>),
    /// The bitmap of this block follows.
    Received(usize),
    Resumed,
}

/// What is known of the guest.
#[derive(Debug)]
pub struct ReturnPath {
    /// The numbers of pages of the blocks.
    pages: Vec<u64>,
    places: HashMap<Vec<u8>, usize>,
    /// The block of the last request.
    pub last: Option<usize>,
}

impl ReturnPath {
    pub fn new(blocks: &[Block]) -> ReturnPath {
        let places = blocks.iter().enumerate().map(|(place, block)| (block.name.clone(), place));
        ReturnPath {
            pages: blocks.iter().map(|block| block.size / PAGE as u64).collect(),
            places: places.collect(),
            last: None,
        }
    }

    /// Parses the next message from the beginning of these bytes. The error is what is wrong with
    /// it.
    pub fn next(&mut self, bytes: &[u8]) -> Parsed<Message> {
        let Some(((kind, body), length)) = parse(bytes, |cursor| Ok(frame(cursor)?))? else {
            return Ok(None);
        };
        let wrong = || format!("QEMU's message of kind {kind} and {} bytes is unknown", body.len());
        let cursor = &mut Cursor { bytes: body, at: 0 };
        let message = match self.message(kind, cursor) {
            Ok(message) if cursor.at == body.len() => message.ok_or_else(wrong)??,
            Ok(_) | Err(Short) => return Err(wrong()),
        };
        if let Message::Pages(block, _) = message {
            self.last = Some(block);
        }
        Ok(Some((message, length)))
    }

    /// `None`: this kind of message is unknown.
    fn message(
        &self,
        kind: u16,
        body: &mut Cursor,
    ) -> Result<Option<Result<Message, String>>, Short> {
        let unknown = || "QEMU asks for a memory block that the snapshot does not have".to_owned();
        Ok(Some(match kind {
            SHUT => Ok(Message::Shut { failed: body.u32()? != 0 }),
            PONG => Ok(Message::Pong(body.u32()?)),
            PAGES_OF | PAGES => {
                let (offset, length) = (body.u64()?, body.u32()?);
                let block = match kind {
                    PAGES => self.last,
                    _ => self.places.get(body.name()?).copied(),
                };
                block.ok_or_else(unknown).and_then(|block| self.pages(block, offset, length))
            }
            RECEIVED => {
                let block = self.places.get(body.name()?).copied();
                block.map(Message::Received).ok_or_else(unknown)
            }
            RESUMED => match body.u32()? {
                RESUMED_WELL => Ok(Message::Resumed),
                other => Err(format!("QEMU does not resume the migration ({other})")),
            },
            _ => return Ok(None),
        }))
    }

    fn pages(&self, block: usize, offset: u64, length: u32) -> Result<Message, String> {
        let (page, length) = (PAGE as u64, u64::from(length));
        let first = offset / page;
        let end = first.checked_add(length / page).filter(|end| *end <= self.pages[block]);
        match end {
            Some(end)
                if offset.is_multiple_of(page) && length.is_multiple_of(page) && length > 0 =>
            {
                Ok(Message::Pages(block, first..end))
            }
            _ => Err(format!(
                "QEMU asks for {length} bytes at {offset} of a memory block, where \
                              no pages are"
            )),
        }
    }

    /// Parses the bitmap that follows [`Message::Received`]: the pages that QEMU has.
    pub fn bitmap(&self, block: usize, bytes: &[u8]) -> Parsed<PageMap> {
        let pages = self.pages[block];
        let length = pages.div_ceil(64) * 8;
        let wrong = || "QEMU's bitmap of received pages has another length".to_owned();
        let parsed = parse(bytes, |cursor| {
            if cursor.u64()? != length {
                return Err(wrong().into());
            }
            let map = cursor.take(length as usize)?;
            if cursor.u64()? != BITMAP_END {
                return Err(wrong().into());
            }
            PageMap::from_bytes(map, pages).ok_or_else(|| wrong().into())
        })?;
        Ok(parsed)
    }
}

fn frame<'a>(cursor: &mut Cursor<'a>) -> Result<(u16, &'a [u8]), Short> {
    let word = cursor.u32()?;
    let (kind, length) = ((word >> 16) as u16, word & 0xffff);
    /// The longest message that is known.
    const LONGEST: u32 = 8 + 4 + 256;
    // A longer one is unknown, and is not waited for.
    Ok((kind, cursor.take(length.min(LONGEST + 1) as usize)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    fn path() -> ReturnPath {
        let block = |name: &[u8], size| Block { name: name.to_vec(), size };
        ReturnPath::new(&[block(b"pc.ram", 1 << 20), block(b"rom", 8192)])
    }

    fn message(kind: u16, body: &[u8]) -> Vec<u8> {
        [&kind.to_be_bytes()[..], &(body.len() as u16).to_be_bytes(), body].concat()
    }

    fn request(kind: u16, offset: u64, length: u32, name: &[u8]) -> Vec<u8> {
        message(kind, &[&offset.to_be_bytes()[..], &length.to_be_bytes(), name].concat())
    }

    #[test]
    fn messages_are_read_as_they_come_and_requests_remember_their_block() {
        let mut path = path();
        let messages = [
            (message(PONG, &[0, 0, 0, 3]), Message::Pong(3)),
            (request(PAGES_OF, 4096, 8192, b"\x06pc.ram"), Message::Pages(0, 1..3)),
            (request(PAGES, 0, 4096, b""), Message::Pages(0, 0..1)),
            (request(PAGES_OF, 4096, 4096, b"\x03rom"), Message::Pages(1, 1..2)),
            (request(PAGES, 0, 8192, b""), Message::Pages(1, 0..2)),
            (message(RECEIVED, b"\x03rom"), Message::Received(1)),
            (message(RESUMED, &[0, 0, 0, 1]), Message::Resumed),
            (message(SHUT, &[0; 4]), Message::Shut { failed: false }),
            (message(SHUT, &[0, 0, 0, 1]), Message::Shut { failed: true }),
        ];
        for (bytes, expected) in messages {
            for end in 0..bytes.len() {
                assert_eq!(path.next(&bytes[..end]), Ok(None));
            }
            let longer = [&bytes[..], &bytes].concat();
            assert_eq!(path.next(&longer), Ok(Some((expected, bytes.len()))));
        }
    }

    #[test]
    fn what_qemu_cannot_mean_is_an_error() {
        for bytes in [
            message(0, &[]),
            message(9, &[0; 4]),
            message(PONG, &[0; 3]),
            message(PONG, &[0; 5]),
            message(RESUMED, &[0; 4]),
            message(RECEIVED, b"\x03ram"),
            message(RECEIVED, b"\x04rom"),
            // Nothing was asked for yet.
            request(PAGES, 0, 4096, b""),
            request(PAGES_OF, 0, 4096, b"\x03ram"),
            request(PAGES_OF, 0, 4096, b"\x03rom!"),
            request(PAGES_OF, 8192, 4096, b"\x03rom"),
            request(PAGES_OF, 4096, 8192, b"\x03rom"),
            request(PAGES_OF, 1, 4096, b"\x03rom"),
            request(PAGES_OF, 0, 4095, b"\x03rom"),
            request(PAGES_OF, 0, 0, b"\x03rom"),
            request(PAGES_OF, u64::MAX - 4095, !4095, b"\x03rom"),
            message(PONG, &[0; 300]),
        ] {
            assert!(path().next(&bytes).is_err(), "{bytes:x?}");
        }
        // The length of an unknown message is not waited for.
        assert!(path().next(&message(9, &[0; 60_000])[..400]).is_err());
    }

    #[test]
    fn bitmap_of_received_pages_has_the_block_s_length() {
        let path = path();
        let bitmap = |length: u64, map: &[u8], end: u64| {
            [&length.to_be_bytes()[..], map, &end.to_be_bytes()].concat()
        };
        let good = bitmap(8, &[2, 0, 0, 0, 0, 0, 0, 0], BITMAP_END);
        let (map, length) = path.bitmap(1, &good).unwrap().unwrap();
        assert_eq!((map.has(0), map.has(1), length), (false, true, good.len()));
        assert_eq!(path.bitmap(1, &good[..20]), Ok(None));
        for bad in [
            bitmap(16, &[0; 16], BITMAP_END),
            bitmap(u64::MAX, &[0; 8], BITMAP_END),
            bitmap(8, &[0; 8], 0),
            bitmap(8, &[4, 0, 0, 0, 0, 0, 0, 0], BITMAP_END),
        ] {
            assert!(path.bitmap(1, &bad).is_err());
        }
    }

    #[test]
    fn random_bytes_are_read_or_refused_and_never_a_panic() {
        let mut random = Random(42);
        for _ in 0..20_000 {
            let mut path = path();
            let mut bytes = request(PAGES_OF, 4096, 4096, b"\x06pc.ram");
            bytes.extend(request(PAGES, 0, 4096, b""));
            for _ in 0..random.below(4) {
                let place = random.below(bytes.len());
                bytes[place] = random.below(256) as u8;
            }
            bytes.truncate(random.below(bytes.len() + 1));
            let mut at = 0;
            while let Ok(Some((message, length))) = path.next(&bytes[at..]) {
                if let Message::Pages(block, pages) = message {
                    assert!(pages.start < pages.end && pages.end <= [256, 2][block]);
                }
                at += length;
            }
            let _ = path.bitmap(1, &bytes);
        }
    }
}
