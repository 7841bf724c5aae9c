// SPDX-License-Identifier: LGPL-2.1-or-later

//! A reader of JSON that is as deep as QEMU's can be, for threads with small stacks.
//!
//! QEMU describes an image with the images below nested in it: a chain of a hundred overlays has
//! about two hundred levels. The thread that reads it is the caller's, and may have a small stack.
//! So nothing here recurses: neither reading, nor dropping a value. Users of [`Json`] must walk it
//! by loops, too.

use std::ops::Deref;

use serde::Deserialize;
use serde_json::{Map, Value};

/// The greatest depth that QEMU itself accepts. QEMU sends nothing deeper.
pub const DEEPEST: usize = 1024;
/// The greatest depth that is passed to serde, which recurses.
const SHALLOW: usize = 32;
/// The limit of what a text takes in memory, roughly. A chain of 200 images, described in full by
/// each of its nodes, needs 90 MiB.
const LARGEST: usize = 256 << 20;
/// Roughly the memory that an array or an object takes, and each value in it.
const CONTAINER: usize = 640;
const MEMBER: usize = 64;

/// A value that was read. It is dropped without recursion.
#[derive(Debug, Default)]
pub struct Json(Value);

impl Deref for Json {
    type Target = Value;

    fn deref(&self) -> &Value {
        &self.0
    }
}

impl Drop for Json {
    fn drop(&mut self) {
        take_apart(vec![self.0.take()]);
    }
}

impl Json {
    /// Takes a member out of an object.
    pub fn take(&mut self, member: &str) -> Option<Json> {
        self.0.get_mut(member).map(|value| Json(value.take()))
    }

    /// Reads it as another type. A value that is too deep for that cannot be a valid reply, because
    /// the commands whose replies are read in this way have shallow ones.
    pub fn read<'a, T: Deserialize<'a>>(&'a self) -> Result<T, String> {
        if is_deeper(&self.0, SHALLOW) {
            return Err("it is nested too deeply".into());
        }
        T::deserialize(&self.0).map_err(|error| error.to_string())
    }
}

fn is_deeper(value: &Value, limit: usize) -> bool {
    let mut left = vec![(value, 1)];
    while let Some((value, depth)) = left.pop() {
        if depth > limit {
            return true;
        }
        match value {
            Value::Array(values) => left.extend(values.iter().map(|value| (value, depth + 1))),
            Value::Object(members) => left.extend(members.values().map(|value| (value, depth + 1))),
            _ => {}
        }
    }
    false
}

fn take_apart(mut left: Vec<Value>) {
    let is_container = |value: &Value| value.is_array() || value.is_object();
    while let Some(value) = left.pop() {
        match value {
            Value::Array(values) => left.extend(values.into_iter().filter(is_container)),
            Value::Object(members) => {
                left.extend(members.into_iter().map(|(_, value)| value).filter(is_container))
            }
            _ => {}
        }
    }
}

/// Parses a text. The error describes what is wrong with it.
pub fn parse(text: &[u8]) -> Result<Json, String> {
    let mut parser = Parser { text, at: 0, open: Vec::new(), size: 0 };
    let value = parser.value()?;
    match parser.peek() {
        None => Ok(value),
        Some(_) => Err(parser.unexpected()),
    }
}

/// An array or an object that is not complete yet.
enum Open {
    Array(Vec<Value>),
    /// An object, with the name of the member that is being read.
    Object(Map<String, Value>, String),
}

struct Parser<'a> {
    text: &'a [u8],
    at: usize,
    open: Vec<Open>,
    size: usize,
}

impl Drop for Parser<'_> {
    fn drop(&mut self) {
        let open = self.open.drain(..).map(|open| match open {
            Open::Array(values) => Value::Array(values),
            Open::Object(members, _) => Value::Object(members),
        });
        take_apart(open.collect());
    }
}

impl Parser<'_> {
    fn value(&mut self) -> Result<Json, String> {
        loop {
            let mut complete = match self.peek() {
                Some(b'[') => {
                    self.open(Open::Array(Vec::new()))?;
                    if !self.skip(b']') {
                        continue;
                    }
                    self.close()
                }
                Some(b'{') => {
                    self.open(Open::Object(Map::new(), String::new()))?;
                    if !self.skip(b'}') {
                        self.name()?;
                        continue;
                    }
                    self.close()
                }
                _ => self.scalar()?,
            };
            // The complete value is a part of the innermost open one, which may become complete
            // now.
            loop {
                let end = match self.open.last_mut() {
                    None => return Ok(complete),
                    Some(Open::Array(values)) => {
                        values.push(complete.0.take());
                        b']'
                    }
                    Some(Open::Object(members, name)) => {
                        drop(members.insert(std::mem::take(name), complete.0.take()).map(Json));
                        b'}'
                    }
                };
                self.charge(MEMBER)?;
                if self.skip(b',') {
                    if end == b'}' {
                        self.name()?;
                    }
                    break;
                }
                if !self.skip(end) {
                    return Err(self.unexpected());
                }
                complete = self.close();
            }
        }
    }

    fn open(&mut self, open: Open) -> Result<(), String> {
        if self.open.len() == DEEPEST {
            return Err("it is nested too deeply".into());
        }
        self.charge(CONTAINER)?;
        self.at += 1;
        self.open.push(open);
        Ok(())
    }

    fn close(&mut self) -> Json {
        Json(match self.open.pop() {
            Some(Open::Array(values)) => Value::Array(values),
            Some(Open::Object(members, _)) => Value::Object(members),
            None => Value::Null,
        })
    }

    /// Reads the name of a member of the innermost open object, and the colon.
    fn name(&mut self) -> Result<(), String> {
        let name = self.string()?;
        if !self.skip(b':') {
            return Err(self.unexpected());
        }
        if let Some(Open::Object(_, member)) = self.open.last_mut() {
            *member = name;
        }
        Ok(())
    }

    fn scalar(&mut self) -> Result<Json, String> {
        if self.peek() == Some(b'"') {
            return Ok(Json(Value::String(self.string()?)));
        }
        let rest = &self.text[self.at..];
        let is_part =
            |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'+' | b'.');
        let length = rest.iter().position(|byte| !is_part(byte)).unwrap_or(rest.len());
        if length == 0 {
            return Err(self.unexpected());
        }
        self.at += length;
        serde_json::from_slice(&rest[..length]).map(Json).map_err(|error| error.to_string())
    }

    fn string(&mut self) -> Result<String, String> {
        if self.peek() != Some(b'"') {
            return Err(self.unexpected());
        }
        let rest = &self.text[self.at..];
        let mut escaped = false;
        let is_end = |byte: &u8| {
            let end = *byte == b'"' && !escaped;
            escaped = *byte == b'\\' && !escaped;
            end
        };
        let Some(end) = rest[1..].iter().position(is_end) else {
            self.at = self.text.len();
            return Err(self.unexpected());
        };
        // The string with its two quotes.
        let text = &rest[..end + 2];
        self.charge(text.len())?;
        self.at += text.len();
        serde_json::from_slice(text).map_err(|error| error.to_string())
    }

    /// The next byte that is not white space.
    fn peek(&mut self) -> Option<u8> {
        while self.text.get(self.at).is_some_and(is_white_space) {
            self.at += 1;
        }
        self.text.get(self.at).copied()
    }

    /// Skips this byte if it is the next one. Returns whether it was.
    fn skip(&mut self, byte: u8) -> bool {
        let is_next = self.peek() == Some(byte);
        self.at += usize::from(is_next);
        is_next
    }

    fn charge(&mut self, size: usize) -> Result<(), String> {
        self.size += size;
        if self.size > LARGEST { Err("it is too large".into()) } else { Ok(()) }
    }

    fn unexpected(&self) -> String {
        match self.text.get(self.at) {
            Some(byte) => format!("unexpected '{}' at byte {}", byte.escape_ascii(), self.at),
            None => "it ends too early".into(),
        }
    }
}

/// Whether JSON regards the byte as white space.
pub fn is_white_space(byte: &u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\r' | b'\n')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitor::generated::Generator;

    fn nested(depth: usize) -> String {
        "{\"a\":[".repeat(depth / 2) + "1" + &"]}".repeat(depth / 2)
    }

    #[test]
    fn a_long_chain_of_images_can_be_read_on_a_small_stack_and_nothing_deeper_than_qemu_says() {
        let read = || {
            let mut value = parse(nested(DEEPEST).as_bytes()).unwrap();
            assert!(value["a"][0]["a"].is_array());
            assert!(value.read::<Value>().is_err());
            drop(value.take("a").unwrap());
            assert!(value["a"].is_null());
            parse(nested(DEEPEST + 2).as_bytes()).unwrap_err();
            parse("[".repeat(10_000_000).as_bytes()).unwrap_err();
            // Incomplete values are dropped without recursion too: after an error, and when a
            // second member has the same name.
            parse((nested(DEEPEST) + "x").as_bytes()).unwrap_err();
            parse(format!("[{}, x", nested(DEEPEST - 1)).as_bytes()).unwrap_err();
            parse(format!("{{\"a\": {}, \"a\": 1}}", nested(DEEPEST - 1)).as_bytes()).unwrap();
        };
        std::thread::Builder::new().stack_size(32 << 10).spawn(read).unwrap().join().unwrap();
    }

    #[test]
    fn small_text_cannot_become_much_in_memory() {
        parse(format!("[{}0]", "{\"\":0},".repeat(1 << 20)).as_bytes()).unwrap_err();
        parse(format!("[{}0]", "{\"\":0},".repeat(1 << 16)).as_bytes()).unwrap();
    }

    #[test]
    fn brackets_in_strings_are_text() {
        let text = format!("[\"{}\\\"[\", 1]", "[".repeat(DEEPEST * 2));
        assert_eq!(parse(text.as_bytes()).unwrap()[1], 1);
    }

    #[test]
    fn garbage_is_an_error() {
        for text in [
            "", "{", "{} {}", "no", "\"\\", "[1,]", "{,}", "{\"a\"}", "{\"a\":}", "{1:2}", "[1 2]",
            "[}", "01",
        ] {
            parse(text.as_bytes()).unwrap_err();
        }
    }

    #[test]
    fn it_reads_what_serde_reads_and_refuses_what_serde_refuses() {
        let mut generator = Generator::new();
        for _ in 0..2000 {
            let mut text = generator.text().into_bytes();
            if generator.below(2) == 0 {
                let at = generator.below(text.len());
                text[at] = b"{}[],:\"\\x1 -"[generator.below(12)];
            }
            let ours = parse(&text);
            let theirs = serde_json::from_slice::<Value>(&text);
            let text = String::from_utf8_lossy(&text);
            match (ours, theirs) {
                (Ok(ours), Ok(theirs)) => assert_eq!(*ours, theirs, "{text}"),
                (Err(_), Err(_)) => {}
                (ours, theirs) => panic!("{text}: {ours:?}, {theirs:?}"),
            }
        }
    }
}
