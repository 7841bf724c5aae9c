// SPDX-License-Identifier: LGPL-2.1-or-later

//! What the source sends besides pages.
//!
//! ```text
//! opening  the saved configuration
//!          OPEN_RETURN_PATH, PING 1
//!          ADVISE: the sizes of pages. QEMU empties its memory
//!          the saved list of memory blocks
//!          DISCARD of one page: without it, QEMU 7.2 to 11.1 wait for ever in LISTEN
//!          PACKAGED: LISTEN; the saved devices; PING 3; RUN
//!          PING 4
//!          the beginning of a section of pages, which stays open
//! pages
//! closing  the end of that section, an empty last one, the end of the stream
//! ```
//!
//! A command is u8 8, u16 its number, u16 the length of its data, the data. The pong to PING 3
//! proves that QEMU has loaded the devices.

use crate::image::{Head, PAGE, PageSource};

const COMMAND: u8 = 8;
const OPEN_RETURN_PATH: u16 = 1;
const PING: u16 = 2;
const ADVISE: u16 = 3;
const LISTEN: u16 = 4;
const RUN: u16 = 5;
const DISCARD: u16 = 6;
const PACKAGED: u16 = 7;
const RESUME: u16 = 9;
const RECEIVED: u16 = 10;
/// The version of the data of DISCARD.
const DISCARD_VERSION: u8 = 0;

const SECTION_START: u8 = 1;
const SECTION_END: u8 = 3;
const STREAM_END: u8 = 0;

/// The ping that QEMU answers when it has loaded the devices.
pub const DEVICES_LOADED: u32 = 3;

/// The beginning of the stream, up to the first page.
pub fn opening(pages: &PageSource) -> Vec<u8> {
    let head = pages.head();
    let size = (PAGE as u64).to_be_bytes();
    let package =
        [command(LISTEN, &[]), pages.devices().to_vec(), ping(DEVICES_LOADED), command(RUN, &[])]
            .concat();
    [
        head.configuration.clone(),
        command(OPEN_RETURN_PATH, &[]),
        ping(1),
        command(ADVISE, &[size, size].concat()),
        block_list(head),
        discard(head),
        command(PACKAGED, &(package.len() as u32).to_be_bytes()),
        package,
        ping(4),
        head.part_start(),
    ]
    .concat()
}

/// The end of the stream, after the last page.
pub fn closing(head: &Head) -> Vec<u8> {
    let last = [&[SECTION_END][..], &head.section[0].to_be_bytes()].concat();
    [head.section_end(), last, head.section_end(), vec![STREAM_END]].concat()
}

/// Asks QEMU which pages of a block it has received.
pub fn ask_received(name: &[u8]) -> Vec<u8> {
    command(RECEIVED, &[&[name.len() as u8], name].concat())
}

/// Goes on after an interruption, up to the next page.
pub fn resumption(head: &Head) -> Vec<u8> {
    [command(RESUME, &[]), head.part_start()].concat()
}

fn command(number: u16, data: &[u8]) -> Vec<u8> {
    // All data here is shorter than 64 KiB.
    let [number, length] = [number, data.len() as u16].map(u16::to_be_bytes);
    [&[COMMAND][..], &number, &length, data].concat()
}

fn ping(number: u32) -> Vec<u8> {
    command(PING, &number.to_be_bytes())
}

fn block_list(head: &Head) -> Vec<u8> {
    let mut list = head.section_start();
    debug_assert_eq!(list[0], SECTION_START);
    list.extend(head.total());
    for block in &head.blocks {
        list.push(block.name.len() as u8);
        list.extend_from_slice(&block.name);
        list.extend_from_slice(&block.size.to_be_bytes());
    }
    list.extend(head.section_end());
    list
}

/// Discards the first page of the smallest block.
fn discard(head: &Head) -> Vec<u8> {
    let smallest = head.blocks.iter().min_by_key(|block| block.size);
    let name = smallest.map(|block| &block.name[..]).unwrap_or_default();
    let range = [0, PAGE as u64].map(u64::to_be_bytes).concat();
    command(DISCARD, &[&[DISCARD_VERSION, name.len() as u8], name, &[0], &range].concat())
}

#[cfg(test)]
mod tests {
    use crate::image::Block;

    use super::*;

    fn head() -> Head {
        let block = |name: &[u8], size| Block { name: name.to_vec(), size };
        Head {
            configuration: b"QEVM".to_vec(),
            capabilities_at: 4,
            section: [2, 0, 4],
            blocks: vec![block(b"pc.ram", 1 << 20), block(b"rom", 8192)],
        }
    }

    #[test]
    fn commands_have_their_number_and_the_length_of_their_data() {
        assert_eq!(ping(3), [8, 0, 2, 0, 4, 0, 0, 0, 3]);
        assert_eq!(command(LISTEN, &[]), [8, 0, 4, 0, 0]);
        assert_eq!(ask_received(b"rom"), *b"\x08\0\x0a\0\x04\x03rom");
        assert_eq!(resumption(&head()), *b"\x08\0\x09\0\0\x02\0\0\0\x02");
    }

    #[test]
    fn one_page_of_the_smallest_block_is_discarded() {
        let expected = b"\x08\0\x06\0\x16\0\x03rom\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x10\0";
        assert_eq!(discard(&head()), *expected);
    }

    #[test]
    fn block_list_is_as_qemu_writes_it_and_closing_ends_the_stream() {
        let list = b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04\
            \0\0\0\0\0\x10\x20\x04\x06pc.ram\0\0\0\0\0\x10\0\0\x03rom\0\0\0\0\0\0\x20\0\
            \0\0\0\0\0\0\0\x10\x7e\0\0\0\x02";
        assert_eq!(block_list(&head()), *list);
        let end = b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02";
        let closing = [&end[..], b"\x03\0\0\0\x02", end, b"\0"].concat();
        assert_eq!(super::closing(&head()), closing);
    }
}
