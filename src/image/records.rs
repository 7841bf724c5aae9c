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
//!        between two sections sometimes a command: 8, u16 11, u16 0
//! tail   the devices, and all that follows
//! ```
//!
//! Numbers are big-endian; a name is a u8 with its length, then its bytes. QEMU 6.0 to 11.1 write
//! this for x86 while no capability changes it. A background snapshot has no section of type 3.

use std::collections::{HashMap, HashSet};

use super::cursor::{Cursor, Parsed, Wrong, parse};

/// The size of a page of the stream, whatever the guest's own pages are.
pub const PAGE: usize = 4096;

const MAGIC: &[u8; 4] = b"QEVM";
const VERSION: u32 = 3;
const CONFIGURATION: u8 = 7;
const SUBSECTION: u8 = 5;
const SECTION_START: u8 = 1;
const SECTION_PART: u8 = 2;
const SECTION_END: u8 = 3;
const SECTION_FULL: u8 = 4;
const COMMAND: u8 = 8;
const STREAM_END: u8 = 0;
/// The number of the command by which QEMU 10.0 says that the last pages follow, and its
/// length. It is for devices that load while the guest still runs at the source. A QEMU that loads
/// from a file does not need it.
const SWITCHOVER_START: &[u8] = &[0, 11, 0, 0];
const FOOTER: u8 = 0x7e;

const ZERO: u64 = 2;
const BLOCKS: u64 = 4;
const DATA: u64 = 8;
const END: u64 = 16;
const CONTINUED: u64 = 32;
const FLAGS: u64 = PAGE as u64 - 1;

/// The subsection of the configuration that notes capabilities, and the one that is understood.
pub const CAPABILITIES: &[u8] = b"configuration/capabilities";
pub const MAPPED_RAM: &[u8] = b"mapped-ram";
/// The version of what a mapped-ram stream adds to each block.
pub const MAPPED_VERSION: u32 = 1;
/// The length of the longest block of a mapped-ram stream: a name, a size, and the places.
pub const LONGEST_BLOCK: usize = 1 + 255 + 8 + 4 + 3 * 8;

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

impl Head {
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
}

/// The header of a page. The name of the block is left out if the page before is of it too.
pub fn page_header(block: Option<&Block>, offset: u64, is_data: bool) -> Vec<u8> {
    let flags = if is_data { DATA } else { ZERO };
    let Some(block) = block else {
        return (offset | flags | CONTINUED).to_be_bytes().to_vec();
    };
    [&(offset | flags).to_be_bytes()[..], &[block.name.len() as u8], &block.name].concat()
}

/// Reads a head from the beginning of a stream, whose bytes come one after the other.
#[derive(Default)]
pub struct HeadReader {
    opening: Option<Opening>,
    /// The length of the parts that are parsed.
    at: usize,
}

impl HeadReader {
    /// Parses the head from all bytes that have come, and goes on where it has stopped the last
    /// time. The error is what it does not understand. Not called again after the head's end.
    pub fn read(&mut self, bytes: &[u8]) -> Parsed<Head> {
        match self.head(bytes)? {
            None if bytes.len() >= LONGEST_HEAD => Err("its head does not end".into()),
            parsed => Ok(parsed),
        }
    }

    fn head(&mut self, bytes: &[u8]) -> Parsed<Head> {
        let mut opening = match self.opening.take() {
            Some(opening) => opening,
            None => match parse(bytes, |cursor| opening(cursor, Noted::Nothing))? {
                Some((opening, length)) => {
                    self.at = length;
                    opening
                }
                None => return Ok(None),
            },
        };
        while !opening.has_all_blocks() {
            match parse(&bytes[self.at..], Opening::entry)? {
                Some(((name, size), length)) => {
                    opening.add(name, size)?;
                    self.at += length;
                }
                None => {
                    self.opening = Some(opening);
                    return Ok(None);
                }
            }
        }
        let at = self.at;
        match parse(&bytes[at..], |cursor| opening.end(cursor))? {
            Some(((), length)) => Ok(Some((opening.head, at + length))),
            None => {
                self.opening = Some(opening);
                Ok(None)
            }
        }
    }
}

/// The capabilities that QEMU has noted in the configuration.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Noted {
    Nothing,
    MappedRam,
}

/// The configuration without the note of QEMU's capabilities, and where that belongs in it.
fn configuration(cursor: &mut Cursor, noted: Noted) -> Result<(Vec<u8>, usize), Wrong> {
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
    let mut note = None;
    while cursor.peek()? == SUBSECTION {
        let subsection = cursor.at;
        cursor.byte()?;
        let name = cursor.name()?;
        let _version = cursor.u32()?;
        match name {
            b"configuration/target-page-bits" => {
                if cursor.u32()? != PAGE.ilog2() {
                    return Err("its pages are not of 4096 bytes".to_owned().into());
                }
                if note.is_none() {
                    capabilities_at = cursor.at;
                }
            }
            CAPABILITIES if noted == Noted::MappedRam && note.is_none() => {
                if cursor.u32()? != 1 || cursor.name()? != MAPPED_RAM {
                    let what = "QEMU wrote it with other capabilities than mapped-ram";
                    return Err(what.to_owned().into());
                }
                capabilities_at = subsection;
                note = Some(subsection..cursor.at);
            }
            b"configuration/uuid" => drop(cursor.take(16)?),
            name => {
                let name = String::from_utf8_lossy(name);
                return Err(format!("it has the subsection '{name}'").into());
            }
        }
    }
    let mut bytes = cursor.bytes[begin..cursor.at].to_vec();
    match note {
        Some(note) => drop(bytes.drain(note.start - begin..note.end - begin)),
        None if noted == Noted::MappedRam => {
            return Err("QEMU wrote it without the capability mapped-ram".to_owned().into());
        }
        None => {}
    }
    Ok((bytes, capabilities_at - begin))
}

/// A head that is being read: its beginning, and the memory blocks so far.
pub struct Opening {
    head: Head,
    names: HashSet<Vec<u8>>,
    /// The size of the blocks that are still to come.
    left: u64,
}

/// The beginning of a head, up to its first memory block.
fn opening(cursor: &mut Cursor, noted: Noted) -> Result<Opening, Wrong> {
    let (configuration, capabilities_at) = configuration(cursor, noted)?;
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
    let head = Head { configuration, capabilities_at, section, blocks: Vec::new() };
    Ok(Opening { head, names: HashSet::new(), left: total & !FLAGS })
}

/// The places that a block of a mapped-ram stream has in its file.
pub struct Mapped {
    pub bitmap: u64,
    pub pages: u64,
}

impl Opening {
    /// Parses the beginning of a mapped-ram stream. After it comes [`Opening::mapped_block`].
    pub fn parse_mapped(bytes: &[u8]) -> Parsed<Opening> {
        parse(bytes, |cursor| opening(cursor, Noted::MappedRam))
    }

    /// The size of the blocks that are still to come.
    pub fn left(&self) -> u64 {
        self.left
    }

    pub fn blocks(&self) -> &[Block] {
        &self.head.blocks
    }

    pub fn has_all_blocks(&self) -> bool {
        self.left == 0
    }

    /// The name and the size of a block.
    fn entry<'a>(cursor: &mut Cursor<'a>) -> Result<(&'a [u8], u64), Wrong> {
        Ok((cursor.name()?, cursor.u64()?))
    }

    fn add(&mut self, name: &[u8], size: u64) -> Result<(), String> {
        let is_wrong = size == 0 || size & FLAGS != 0 || size > self.left;
        if is_wrong || self.names.contains(name) {
            return Err("the sizes or names of its memory blocks are wrong".into());
        }
        self.left -= size;
        self.names.insert(name.to_vec());
        self.head.blocks.push(Block { name: name.to_vec(), size });
        Ok(())
    }

    /// Parses the next block of a mapped-ram stream.
    pub fn mapped_block(&mut self, bytes: &[u8]) -> Parsed<Mapped> {
        if bytes.len() < LONGEST_BLOCK {
            // The block is added only once.
            return Ok(None);
        }
        parse(bytes, |cursor| {
            let (name, size) = Opening::entry(cursor)?;
            self.add(name, size)?;
            let version = cursor.u32()?;
            if version != MAPPED_VERSION || cursor.u64()? != PAGE as u64 {
                return Err("its memory blocks have another version or page size than is known"
                    .to_owned()
                    .into());
            }
            Ok(Mapped { bitmap: cursor.u64()?, pages: cursor.u64()? })
        })
    }

    /// Parses the end of the list of blocks, which are all there.
    pub fn parse_end(self, bytes: &[u8]) -> Parsed<Head> {
        let end = parse(bytes, |cursor| self.end(cursor))?;
        Ok(end.map(|((), length)| (self.head, length)))
    }

    fn end(&self, cursor: &mut Cursor) -> Result<(), Wrong> {
        let head = &self.head;
        if head.blocks.is_empty() {
            return Err("it has no memory blocks".to_owned().into());
        }
        if cursor.u64()? != END || cursor.byte()? != FOOTER || cursor.u32()? != head.section[0] {
            let what = "the list of its memory blocks does not end as it should";
            return Err(what.to_owned().into());
        }
        Ok(())
    }
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
            At::Section if matches!(cursor.peek()?, SECTION_FULL | STREAM_END) => {
                self.at = At::Tail;
                Ok(Record::Mark)
            }
            At::Section => {
                match cursor.byte()? {
                    SECTION_PART | SECTION_END => {}
                    COMMAND if cursor.take(4)? == SWITCHOVER_START => return Ok(Record::Mark),
                    kind => {
                        return Err(format!("a section of type {kind} is among its pages").into());
                    }
                }
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

#[cfg(test)]
mod tests {
    use super::super::sample;
    use super::*;

    /// The error of a stream, whichever part it is of.
    fn error(stream: &[u8]) -> String {
        let (head, mut at) = match HeadReader::default().read(stream) {
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
        // One reader that gets a byte at a time, and for each length another one.
        let mut reader = HeadReader::default();
        for end in 0..head.len() {
            assert_eq!(HeadReader::default().read(&head[..end]), Ok(None), "{end}");
            assert_eq!(reader.read(&head[..end]), Ok(None), "{end}");
        }
        let whole = reader.read(&head);
        assert_eq!(HeadReader::default().read(&head), whole);
        let (parsed, length) = whole.unwrap().unwrap();
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
