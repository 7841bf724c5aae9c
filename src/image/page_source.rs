// SPDX-License-Identifier: LGPL-2.1-or-later

//! Reads pages of a sparse memory image in any order, as records of QEMU's stream, and the parts of
//! the stream around them.

use std::fs::File;
use std::io::{self, IoSliceMut, Read, Seek, SeekFrom};
use std::ops::Range;

use super::classic::read_exact;
use super::page_map::PageMap;
use super::records::{Block, Head, PAGE, page_header};
use super::sparse_reader::SparseStream;
use super::stream;

/// QEMU takes no more of the devices at once.
const MOST_DEVICES: u64 = 16 << 20;
/// More than any description of the devices.
const MOST_DESCRIPTION: u64 = 32 << 20;

/// The pages of a sparse memory image.
#[derive(Debug)]
pub struct PageSource {
    file: File,
    head: Head,
    /// Where the pages of each block begin in the file, and which of them are there.
    blocks: Vec<(u64, PageMap)>,
    devices: Vec<u8>,
}

impl PageSource {
    /// Opens the pages of a sparse image whose stream begins here. The error is what is wrong with
    /// the image.
    pub fn open(file: File, begin: u64) -> Result<PageSource, String> {
        let stream = SparseStream::read(&file, begin)?;
        let mut blocks = Vec::new();
        for (number, block) in stream.blocks() {
            let mut map = PageMap::new(block.size / PAGE as u64);
            for piece in stream.pieces(&file, number) {
                let (first, pages) = piece?;
                pages.runs().flatten().for_each(|page| map.set(first + page));
            }
            blocks.push((stream.layout.places[number].pages, map));
        }
        let devices = read_devices(&file, stream.devices)
            .map_err(|error| format!("cannot be read: {error}"))?;
        let devices =
            stream::without_end(&devices).ok_or("is cut off: QEMU's stream has no end")?;
        if devices.len() as u64 > MOST_DEVICES {
            return Err("has more of its devices than QEMU takes at once".into());
        }
        let devices = devices.to_vec();
        Ok(PageSource { file, head: stream.head, blocks, devices })
    }

    /// The part of the stream before the pages.
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// The saved devices, without the end of the stream.
    pub fn devices(&self) -> &[u8] {
        &self.devices
    }

    /// The memory blocks. They are named by their places in this list.
    pub fn blocks(&self) -> &[Block] {
        &self.head.blocks
    }

    /// Which pages of a block are in the file. All others have zeros everywhere.
    pub fn in_file(&self, block: usize) -> &PageMap {
        &self.blocks[block].1
    }

    /// The number of pages that are in the file.
    pub fn count(&self) -> u64 {
        self.blocks.iter().map(|(_, map)| map.count()).sum()
    }

    /// The records of these pages, which are all in the file, or all not. The first one names the
    /// block.
    pub fn records(&self, block: usize, pages: Range<u64>) -> io::Result<Vec<u8>> {
        let mut name = Some(&self.head.blocks[block]);
        let is_data = self.in_file(block).has(pages.start);
        let mut records = Vec::with_capacity((pages.end - pages.start) as usize * (PAGE + 16));
        let mut places = Vec::new();
        for page in pages.clone() {
            records.extend(page_header(name.take(), page * PAGE as u64, is_data));
            if is_data {
                places.push(records.len());
            }
            records.resize(records.len() + if is_data { PAGE } else { 1 }, 0);
        }
        if is_data {
            let mut slices = Vec::with_capacity(places.len());
            let mut rest = &mut records[..];
            let mut at = 0;
            for place in places {
                let (_, from) = std::mem::take(&mut rest).split_at_mut(place - at);
                let (page, after) = from.split_at_mut(PAGE);
                slices.push(IoSliceMut::new(page));
                rest = after;
                at = place + PAGE;
            }
            read_exact(&self.file, &mut slices, self.blocks[block].0 + pages.start * PAGE as u64)?;
        }
        Ok(records)
    }
}

fn read_devices(file: &File, begin: u64) -> io::Result<Vec<u8>> {
    let mut file = file.try_clone()?;
    file.seek(SeekFrom::Start(begin))?;
    let mut devices = Vec::new();
    file.take(MOST_DEVICES + MOST_DESCRIPTION).read_to_end(&mut devices)?;
    Ok(devices)
}
