// SPDX-License-Identifier: LGPL-2.1-or-later

//! Splits the bytes that QEMU sends into messages.
//!
//! A message is a JSON object, on one line or (`pretty=on`) on several: it ends with its last
//! bracket. Each byte is looked at once, however the socket divides them. The memory is limited:
//! white space between the parts of a message is reduced to one byte.

use super::json::is_white_space;

/// The received bytes, as messages.
#[derive(Debug, Default)]
pub struct Messages {
    /// The received bytes; those from `next` on were not looked at yet.
    received: Vec<u8>,
    next: usize,
    /// The message that has begun. White space outside of strings is reduced to one space.
    message: Vec<u8>,
    position: Position,
}

/// The position of the next byte in its message.
#[derive(Debug, Default)]
struct Position {
    depth: usize,
    quoted: bool,
    escaped: bool,
}

/// The reason why no further message can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unreadable {
    /// The next bytes are not the beginning of a message.
    NotJson,
    /// A message is too long.
    TooLong,
}

impl Messages {
    /// Adds received bytes. Call it when [`Messages::next`] has returned no message.
    pub fn add(&mut self, bytes: &[u8]) {
        self.received.drain(..self.next);
        self.next = 0;
        self.received.extend_from_slice(bytes);
    }

    /// The next message, if it is complete. It is an error if it is longer than `longest`.
    pub fn next(&mut self, longest: usize) -> Result<Option<Vec<u8>>, Unreadable> {
        while let Some(byte) = self.received.get(self.next) {
            let byte = if self.position.quoted || !is_white_space(byte) { *byte } else { b' ' };
            if byte == b' '
                && !self.position.quoted
                && matches!(self.message.last(), None | Some(b' '))
            {
                self.next += 1;
                continue;
            }
            if self.message.is_empty() && !matches!(byte, b'{' | b'[') {
                return Err(Unreadable::NotJson);
            }
            if self.message.len() == longest {
                return Err(Unreadable::TooLong);
            }
            self.message.push(byte);
            self.next += 1;
            if self.position.pass(byte) {
                return Ok(Some(std::mem::take(&mut self.message)));
            }
        }
        Ok(None)
    }
}

impl Position {
    /// Advances by one byte. Returns whether it is the message's last one.
    fn pass(&mut self, byte: u8) -> bool {
        match byte {
            _ if self.escaped => self.escaped = false,
            b'\\' if self.quoted => self.escaped = true,
            b'"' => self.quoted = !self.quoted,
            b'[' | b'{' if !self.quoted => self.depth += 1,
            b']' | b'}' if !self.quoted => {
                self.depth -= 1;
                return self.depth == 0;
            }
            _ => {}
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::monitor::generated::Generator;

    const LONGEST: usize = 1 << 20;

    fn all(messages: &mut Messages) -> Vec<Value> {
        let next = || messages.next(LONGEST).unwrap();
        std::iter::from_fn(next).map(|text| serde_json::from_slice(&text).unwrap()).collect()
    }

    #[test]
    fn messages_are_told_apart_however_they_are_written_and_wherever_they_are_cut() {
        let mut generator = Generator::new();
        for _ in 0..100 {
            let texts: Vec<String> = (0..3).map(|_| generator.text()).collect();
            let expected: Vec<Value> =
                texts.iter().map(|text| serde_json::from_str(text).unwrap()).collect();
            let stream = texts.join(["\r\n", "\n", "", " \t"][generator.below(4)]).into_bytes();
            for cut in 0..=stream.len() {
                let mut messages = Messages::default();
                messages.add(&stream[..cut]);
                let mut got = all(&mut messages);
                messages.add(&stream[cut..]);
                got.extend(all(&mut messages));
                assert_eq!(got, expected, "cut at {cut}: {}", String::from_utf8_lossy(&stream));
            }
            let mut messages = Messages::default();
            let mut got = Vec::new();
            for byte in stream {
                messages.add(&[byte]);
                got.extend(all(&mut messages));
            }
            assert_eq!(got, expected);
        }
    }

    #[test]
    fn what_begins_no_message_is_told_at_once_and_for_good() {
        let mut messages = Messages::default();
        messages.add(b" {} ]{}");
        assert!(messages.next(LONGEST).unwrap().is_some());
        for _ in 0..2 {
            assert_eq!(messages.next(LONGEST), Err(Unreadable::NotJson));
        }
    }

    #[test]
    fn a_message_has_an_end_and_white_space_takes_no_room() {
        let mut messages = Messages::default();
        for _ in 0..100 {
            messages.add(&[b' '; LONGEST]);
            assert_eq!(messages.next(10), Ok(None));
        }
        messages.add(b"{\"a\":\r\n  \t  1}");
        assert_eq!(messages.next(8), Ok(Some(b"{\"a\": 1}".to_vec())));
        messages.add(b"{\"a\":123}");
        for _ in 0..2 {
            assert_eq!(messages.next(8), Err(Unreadable::TooLong));
        }
        assert!(messages.received.capacity() <= 4 * LONGEST);
    }
}
