// SPDX-License-Identifier: LGPL-2.1-or-later

//! Reads numbers and names from bytes of QEMU's stream.

/// A record and its length in bytes; `None` if more bytes are needed.
pub type Parsed<T> = Result<Option<(T, usize)>, String>;

/// Reads from the beginning of some bytes.
pub struct Cursor<'a> {
    pub bytes: &'a [u8],
    pub at: usize,
}

/// The bytes end before the record does.
pub struct Short;

/// Why no record was read.
pub enum Wrong {
    Short,
    Unknown(String),
}

impl From<Short> for Wrong {
    fn from(_: Short) -> Wrong {
        Wrong::Short
    }
}

impl From<String> for Wrong {
    fn from(what: String) -> Wrong {
        Wrong::Unknown(what)
    }
}

impl<'a> Cursor<'a> {
    pub fn take(&mut self, count: usize) -> Result<&'a [u8], Short> {
        let end = self.at.checked_add(count).ok_or(Short)?;
        let taken = self.bytes.get(self.at..end).ok_or(Short)?;
        self.at = end;
        Ok(taken)
    }

    pub fn byte(&mut self) -> Result<u8, Short> {
        self.take(1).map(|bytes| bytes[0])
    }

    pub fn peek(&self) -> Result<u8, Short> {
        self.bytes.get(self.at).copied().ok_or(Short)
    }

    pub fn u32(&mut self) -> Result<u32, Short> {
        self.take(4).map(|bytes| bytes.iter().fold(0, |sum, byte| sum << 8 | u32::from(*byte)))
    }

    pub fn u64(&mut self) -> Result<u64, Short> {
        self.take(8).map(|bytes| bytes.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
    }

    pub fn name(&mut self) -> Result<&'a [u8], Short> {
        let length = self.byte()?;
        self.take(length.into())
    }
}

/// Parses with `parse` from the beginning of `bytes`.
pub fn parse<'a, T>(
    bytes: &'a [u8],
    parse: impl FnOnce(&mut Cursor<'a>) -> Result<T, Wrong>,
) -> Parsed<T> {
    let mut cursor = Cursor { bytes, at: 0 };
    match parse(&mut cursor) {
        Ok(parsed) => Ok(Some((parsed, cursor.at))),
        Err(Wrong::Short) => Ok(None),
        Err(Wrong::Unknown(what)) => Err(what),
    }
}
