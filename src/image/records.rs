// SPDX-License-Identifier: LGPL-2.1-or-later

//! Reads the records of QEMU's migration stream as they come: the memory blocks, the pages, and
//! what follows the pages.
//!
//! ```text
//! head   QEVM, u32 version (3)
//!        7, u32 length, the machine type's name; subsections: 5, name, u32 version, content
//!        1, the memory's section: u32 number, name "ram", u32 instance, u32 version
//!           u64 size of all blocks | 4; of each block its name and u64 size
//!           u64 16, 0x7e, u32 number
//! pages  2 or 3, u32 number, then of each page u64 offset | flags
//!           flags without 32: the block's name. The block of the last page otherwise
//!           flag 2: the page has this byte everywhere (u8)
//!           flag 8: the page
//!        u64 16, 0x7e, u32 number
//! tail   the devices, and all that follows
//! ```
//!
//! Numbers are big-endian; a name is a u8 with its length, then its bytes. QEMU 6.0 to 11.1 write
//! this for x86 while no capability changes it. A background snapshot has no section of type 3.

use std::collections::{HashMap, HashSet};

/// The size of a page of the stream, whatever the guest's own pages are.
pub const PAGE: usize = 4096;

const MAGIC: &[u8; 4] = b"QEVM";
const VERSION: u32 = 3;
const CONFIGURATION: u8 = 7;
const SUBSECTION: u8 = 5;
const SECTION_START: u8 = 1;
const SECTION_PART: u8 = 2;
const SECTION_END: u8 = 3;
const FOOTER: u8 = 0x7e;

const ZERO: u64 = 2;
const BLOCKS: u64 = 4;
const DATA: u64 = 8;
const END: u64 = 16;
const CONTINUED: u64 = 32;
const FLAGS: u64 = PAGE as u64 - 1;

/// More than the head of any guest: 255 memory slots of 270 bytes at most, and short texts.
pub const LONGEST_HEAD: usize = 1 << 20;

/// A memory block of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// QEMU's name of it, such as `pc.ram`.
    pub name: Vec<u8>,
    /// Its size in bytes, a multiple of [`PAGE`].
    pub size: u64,
}

/// The part of a stream before the first page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// The stream from its first byte to the section of the memory.
    pub configuration: Vec<u8>,
    /// Where a note of QEMU's capabilities belongs in the configuration.
    pub capabilities_at: usize,
    /// The number, the instance and the version of the memory's section.
    pub section: [u32; 3],
    pub blocks: Vec<Block>,
}

/// One record after the head.
#[derive(Debug, PartialEq, Eq)]
pub enum Record<'a> {
    /// A page: the place of its block in [`Head::blocks`], its offset in the block, its content.
    Page { block: usize, offset: u64, content: Content<'a> },
    /// What follows the pages: the next bytes of it.
    Tail(&'a [u8]),
    /// Nothing: a mark between records.
    Mark,
}

/// The content of a page.
#[derive(Debug, PartialEq, Eq)]
pub enum Content<'a> {
    /// These bytes.
    Data(&'a [u8]),
    /// This byte everywhere.
    Fill(u8),
}

/// A record and its length in bytes; `None` if more bytes are needed.
type Parsed<T> = Result<Option<(T, usize)>, String>;

/// Reads from the beginning of some bytes.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

/// The bytes end before the record does.
struct Short;

enum Wrong {
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
    fn take(&mut self, count: usize) -> Result<&'a [u8], Short> {
        let end = self.at.checked_add(count).ok_or(Short)?;
        let taken = self.bytes.get(self.at..end).ok_or(Short)?;
        self.at = end;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, Short> {
        self.take(1).map(|bytes| bytes[0])
    }

    fn peek(&self) -> Result<u8, Short> {
        self.bytes.get(self.at).copied().ok_or(Short)
    }

    fn u32(&mut self) -> Result<u32, Short> {
        self.take(4).map(|bytes| bytes.iter().fold(0, |sum, byte| sum << 8 | u32::from(*byte)))
    }

    fn u64(&mut self) -> Result<u64, Short> {
        self.take(8).map(|bytes| bytes.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
    }

    fn name(&mut self) -> Result<&'a [u8], Short> {
        let length = self.byte()?;
        self.take(length.into())
    }
}

/// Parses with `parse` from the beginning of `bytes`.
fn parse<'a, T>(
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

impl Head {
    /// Parses a head from the beginning of a stream. The error is what this does not understand.
    pub fn parse(bytes: &[u8]) -> Parsed<Head> {
        match parse(bytes, head)? {
            None if bytes.len() >= LONGEST_HEAD => Err("its head does not end".into()),
            parsed => Ok(parsed),
        }
    }

    /// The section of the memory, from its type to its instance and version.
    pub fn section_start(&self) -> Vec<u8> {
        let [number, instance, version] = self.section.map(u32::to_be_bytes);
        [&[SECTION_START][..], &number, b"\x03ram", &instance, &version].concat()
    }

    /// The size of all blocks, with the flag that says so.
    pub fn total(&self) -> [u8; 8] {
        let total: u64 = self.blocks.iter().map(|block| block.size).sum();
        (total | BLOCKS).to_be_bytes()
    }

    /// The end of a section of the memory.
    pub fn section_end(&self) -> Vec<u8> {
        [&END.to_be_bytes()[..], &[FOOTER], &self.section[0].to_be_bytes()].concat()
    }

    /// The beginning of a section of pages.
    pub fn part_start(&self) -> Vec<u8> {
        [&[SECTION_PART][..], &self.section[0].to_be_bytes()].concat()
    }

    /// The header of a page that has a block's name.
    pub fn page_header(block: &Block, offset: u64) -> Vec<u8> {
        let header = (offset | DATA).to_be_bytes();
        [&header[..], &[block.name.len() as u8], &block.name].concat()
    }

    /// The header of a page of the block of the page before.
    pub fn continued_header(offset: u64) -> [u8; 8] {
        (offset | DATA | CONTINUED).to_be_bytes()
    }
}

fn head(cursor: &mut Cursor) -> Result<Head, Wrong> {
    let (configuration, capabilities_at) = configuration(cursor)?;
    let (section, blocks) = memory_section(cursor, |_, _| Ok(()))?;
    Ok(Head { configuration, capabilities_at, section, blocks })
}

/// The configuration, and where QEMU's capabilities are noted in it.
fn configuration(cursor: &mut Cursor) -> Result<(Vec<u8>, usize), Wrong> {
    let begin = cursor.at;
    if cursor.take(4)? != MAGIC || cursor.u32()? != VERSION {
        return Err("it is no stream of QEMU's".to_owned().into());
    }
    if cursor.byte()? != CONFIGURATION {
        return Err("it does not name its machine type".to_owned().into());
    }
    let length = cursor.u32()?;
    if length > 255 {
        return Err("the name of its machine type is too long".to_owned().into());
    }
    cursor.take(length as usize)?;
    let mut capabilities_at = cursor.at;
    while cursor.peek()? == SUBSECTION {
        cursor.byte()?;
        let name = cursor.name()?;
        let _version = cursor.u32()?;
        match name {
            b"configuration/target-page-bits" => {
                if cursor.u32()? != PAGE.ilog2() {
                    return Err("its pages are not of 4096 bytes".to_owned().into());
                }
                capabilities_at = cursor.at;
            }
            b"configuration/uuid" => drop(cursor.take(16)?),
            name => {
                let name = String::from_utf8_lossy(name);
                return Err(format!("it has the subsection '{name}'").into());
            }
        }
    }
    Ok((cursor.bytes[begin..cursor.at].to_vec(), capabilities_at - begin))
}

/// The section that names the blocks. `more` reads what a format adds to each of them.
fn memory_section<'a>(
    cursor: &mut Cursor<'a>,
    mut more: impl FnMut(&mut Cursor<'a>, &Block) -> Result<(), Wrong>,
) -> Result<([u32; 3], Vec<Block>), Wrong> {
    let kind = cursor.byte()?;
    let number = cursor.u32()?;
    if kind != SECTION_START || cursor.name()? != b"ram" {
        return Err("a section comes before that of the memory".to_owned().into());
    }
    let section = [number, cursor.u32()?, cursor.u32()?];
    let total = cursor.u64()?;
    if total & FLAGS != BLOCKS {
        return Err("its memory blocks are missing".to_owned().into());
    }
    let mut left = total & !FLAGS;
    let mut blocks: Vec<Block> = Vec::new();
    let mut names = HashSet::new();
    while left > 0 {
        let name = cursor.name()?.to_vec();
        let size = cursor.u64()?;
        if size == 0 || size & FLAGS != 0 || size > left || !names.insert(name.clone()) {
            return Err("the sizes or names of its memory blocks are wrong".to_owned().into());
        }
        left -= size;
        let block = Block { name, size };
        more(cursor, &block)?;
        blocks.push(block);
    }
    if blocks.is_empty() {
        return Err("it has no memory blocks".to_owned().into());
    }
    if cursor.u64()? != END || cursor.byte()? != FOOTER || cursor.u32()? != number {
        return Err("the list of its memory blocks does not end as it should".to_owned().into());
    }
    Ok((section, blocks))
}

/// Reads the records after the head.
#[derive(Debug)]
pub struct Records {
    section: u32,
    blocks: Vec<Block>,
    places: HashMap<Vec<u8>, usize>,
    /// The block of the last page.
    block: Option<usize>,
    at: At,
}

/// What comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    Section,
    Page,
    Footer,
    Tail,
}

impl Records {
    pub fn new(head: &Head) -> Records {
        let places = head.blocks.iter().enumerate();
        Records {
            section: head.section[0],
            blocks: head.blocks.clone(),
            places: places.map(|(place, block)| (block.name.clone(), place)).collect(),
            block: None,
            at: At::Section,
        }
    }

    /// Parses the next record from the beginning of these bytes. The error is what is wrong with
    /// the stream.
    pub fn next<'a>(&mut self, bytes: &'a [u8]) -> Parsed<Record<'a>> {
        if bytes.is_empty() {
            return Ok(None);
        }
        if self.at == At::Tail {
            return Ok(Some((Record::Tail(bytes), bytes.len())));
        }
        parse(bytes, |cursor| self.record(cursor))
    }

    /// Whether the pages have ended.
    pub fn is_after_pages(&self) -> bool {
        self.at == At::Tail
    }

    fn record<'a>(&mut self, cursor: &mut Cursor<'a>) -> Result<Record<'a>, Wrong> {
        match self.at {
            At::Page => self.page(cursor),
            At::Footer => {
                if cursor.byte()? != FOOTER || cursor.u32()? != self.section {
                    return Err("a section does not end as it should".to_owned().into());
                }
                self.at = At::Section;
                Ok(Record::Mark)
            }
            At::Section if !matches!(cursor.peek()?, SECTION_PART | SECTION_END) => {
                self.at = At::Tail;
                Ok(Record::Mark)
            }
            At::Section => {
                cursor.byte()?;
                if cursor.u32()? != self.section {
                    return Err("a section other than that of the memory comes in parts"
                        .to_owned()
                        .into());
                }
                self.at = At::Page;
                Ok(Record::Mark)
            }
            At::Tail => Err("it does not end".to_owned().into()),
        }
    }

    fn page<'a>(&mut self, cursor: &mut Cursor<'a>) -> Result<Record<'a>, Wrong> {
        let word = cursor.u64()?;
        let (offset, flags) = (word & !FLAGS, word & FLAGS);
        if flags == END {
            self.at = At::Footer;
            return Ok(Record::Mark);
        }
        let block = match flags & CONTINUED {
            0 => self.places.get(cursor.name()?).copied(),
            _ => self.block,
        };
        let Some(block) = block else {
            return Err("a page is in no memory block".to_owned().into());
        };
        if offset >= self.blocks[block].size {
            return Err("a page is beyond the end of its memory block".to_owned().into());
        }
        let content = match flags & !CONTINUED {
            ZERO => Content::Fill(cursor.byte()?),
            DATA => Content::Data(cursor.take(PAGE)?),
            flags => return Err(format!("a page has the flags {flags:#x}").into()),
        };
        self.block = Some(block);
        Ok(Record::Page { block, offset, content })
    }
}

/// A stream for tests.
#[cfg(test)]
pub mod sample {
    use super::*;

    fn section(kind: u8, pages: &[u8]) -> Vec<u8> {
        [&[kind, 0, 0, 0, 2][..], pages, &END.to_be_bytes(), &[FOOTER, 0, 0, 0, 2]].concat()
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

    pub const TAIL: &[u8] = b"\x04the devices\x7e\0\0\0\x03\0\x06\0\0\0\x02{}";

    /// A whole stream with these pages in its two sections.
    pub fn stream(first: &[Vec<u8>], second: &[Vec<u8>]) -> Vec<u8> {
        [
            head(),
            section(SECTION_PART, &first.concat()),
            section(SECTION_END, &second.concat()),
            TAIL.to_vec(),
        ]
        .concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The error of a stream, whichever part it is of.
    fn error(stream: &[u8]) -> String {
        let (head, mut at) = match Head::parse(stream) {
            Ok(parsed) => parsed.expect("a whole head"),
            Err(what) => return what,
        };
        let mut records = Records::new(&head);
        loop {
            match records.next(&stream[at..]) {
                Ok(parsed) => at += parsed.expect("a whole record").1,
                Err(what) => return what,
            }
        }
    }

    #[test]
    fn a_head_is_whole_only_with_its_last_byte() {
        let head = sample::head();
        for end in 0..head.len() {
            assert_eq!(Head::parse(&head[..end]), Ok(None), "{end}");
        }
        let (parsed, length) = Head::parse(&head).unwrap().unwrap();
        assert_eq!(length, head.len());
        let blocks = [("pc.ram", 2 << 20), ("rom", 8192)];
        let blocks = blocks.map(|(name, size)| Block { name: name.into(), size });
        assert_eq!(parsed.blocks, blocks);
        assert_eq!(parsed.section, [2, 0, 4]);
        // The subsection of capabilities comes before that of the UUID.
        assert_eq!(parsed.capabilities_at, b"QEVM....7....pc-q35-10".len());
    }

    #[test]
    fn what_is_not_known_or_lies_is_told() {
        let change = |at: &[u8], with: &[u8]| {
            let stream = sample::stream(&[sample::named_page(b"rom", 0, 1)], &[]);
            let found = stream.windows(at.len()).position(|window| window == at).unwrap();
            [&stream[..found], with, &stream[found + at.len()..]].concat()
        };
        let with = |pages: &[Vec<u8>]| sample::stream(pages, &[]);
        for (stream, what) in [
            (change(b"QEVM", b"QEVN"), "no stream of QEMU's"),
            (change(b"n/uuid", b"n/oops"), "the subsection 'configuration/oops'"),
            (
                change(b"\x01\0\0\0\x02\x03ram", b"\x04\0\0\0\x02\x03ram"),
                "before that of the memory",
            ),
            (change(b"\x03rom\0\0\0\0\0\0\x20", b"\x03rom\0\0\0\0\0\x01\x20"), "sizes or names"),
            (change(b"\x03rom\0\0\0\0\0\0\x20", b"\x03rom\0\0\0\0\0\0\x21"), "sizes or names"),
            (change(b"\x02\0\0\0\x02", b"\x02\0\0\0\x05"), "other than that of the memory"),
            (with(&[sample::page(0, 1)]), "in no memory block"),
            (with(&[sample::named_page(b"ram", 0, 1)]), "in no memory block"),
            (with(&[sample::named_page(b"rom", 8192, 1)]), "beyond the end"),
            (with(&[(4096u64 | 0x40).to_be_bytes().to_vec(), b"\x03rom".to_vec()]), "flags 0x40"),
        ] {
            assert!(error(&stream).contains(what), "{what}: {}", error(&stream));
        }
    }
}
