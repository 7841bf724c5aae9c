// SPDX-License-Identifier: LGPL-2.1-or-later

//! What is in a memory image. To find out, all that says where the pages are is read, so that an
//! image that is damaged there is found.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::Serialize;

use super::file::Image;
use super::pages::{self, Page};
use super::pages_file::PageNotes;
use super::records::{Block, Content, PAGE};
use super::sparse_reader::SparseStream;
use crate::error::{Code, Error, Result};
use crate::model::xml;

/// The contents of a memory image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Contents {
    /// The name of the format.
    pub format: &'static str,
    /// The name of the domain, if its XML has one.
    pub domain: Option<String>,
    /// The machine type, if QEMU has noted it.
    pub machine: Option<String>,
    /// Whether the guest ran at the instant.
    pub was_running: bool,
    /// The length of the file, and the space that it takes on its disk.
    pub file_bytes: u64,
    /// The space that the file takes on its disk.
    pub disk_bytes: u64,
    /// The memory blocks.
    pub blocks: Vec<Memory>,
    /// What the file of notes beside the image has; `None` if there is none, or it is not of the
    /// image.
    pub notes: Option<Notes>,
}

/// What the file of notes beside an image has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Notes {
    /// Whether it has checksums of the pages.
    pub checksums: bool,
    /// Whether it has an index of a raw image.
    pub index: bool,
    /// The number of pages that are known to have been written first after the instant.
    pub written_first: u64,
}

impl Notes {
    fn new(notes: &PageNotes) -> Notes {
        Notes {
            checksums: notes.checksums.is_some(),
            index: notes.index.is_some(),
            written_first: notes.first.iter().map(|pages| u64::from(pages.count)).sum(),
        }
    }
}

/// A memory block of the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// QEMU's name of it.
    pub name: String,
    /// Its size in bytes.
    pub bytes: u64,
    /// The number of pages of 4096 bytes that are not all zeros.
    pub data_pages: u64,
    /// The number of pages of zeros.
    pub zero_pages: u64,
}

impl Memory {
    fn new(block: &Block) -> Memory {
        let name = String::from_utf8_lossy(&block.name).into_owned();
        Memory { name, bytes: block.size, data_pages: 0, zero_pages: 0 }
    }
}

impl Contents {
    /// Reads the contents of a complete image, or finds out what is wrong with it. Reads all of a
    /// raw image and of one that is compressed by zstd; of a sparse one everything but the pages of
    /// large blocks.
    pub fn read(path: &Path) -> Result<Contents> {
        let image = Image::open(path)?;
        let metadata = image
            .file
            .metadata()
            .map_err(|error| Error::system(format!("cannot read '{}'", path.display()), error))?;
        let blocks = match &image.sparse {
            Some(sparse) => of_sparse(&image.file, sparse),
            None => of_stream(&image),
        };
        let blocks = blocks.map_err(|what| {
            let message = format!("memory snapshot file '{}' {what}", path.display());
            Error::new(Code::InvalidDomainSnapshot, message)
        })?;
        Ok(Contents {
            format: image.format().name(),
            domain: domain_name(&image.domain_xml),
            was_running: image.was_running,
            file_bytes: metadata.len(),
            disk_bytes: metadata.blocks() * 512,
            notes: PageNotes::of(&image.file, image.stream_offset, path)
                .ok()
                .flatten()
                .as_ref()
                .map(Notes::new),
            machine: image.machine,
            blocks,
        })
    }
}

impl Contents {
    /// The contents as JSON.
    pub fn to_json(&self) -> Result<String> {
        serde_json::to_string(self)
            .map_err(|error| Error::new(Code::InternalError, error.to_string()))
    }
}

fn domain_name(domain_xml: &str) -> Option<String> {
    let document = xml::parse(domain_xml, "domain", &xml::RECORDED).ok()?;
    xml::text(document.root_element(), "name")
}

fn of_sparse(file: &File, sparse: &SparseStream) -> std::result::Result<Vec<Memory>, String> {
    let mut memory: Vec<_> = sparse.head.blocks.iter().map(Memory::new).collect();
    for (number, block) in memory.iter_mut().enumerate() {
        block.data_pages = sparse.data_pages(file, number)?;
        block.zero_pages = block.bytes / PAGE as u64 - block.data_pages;
    }
    Ok(memory)
}

fn of_stream(image: &Image) -> std::result::Result<Vec<Memory>, String> {
    let begin = |blocks: &[Block]| -> Vec<Memory> { blocks.iter().map(Memory::new).collect() };
    pages::read(image, begin, |memory, page: Page| {
        let memory = &mut memory[page.block];
        match page.content {
            Content::Fill(0) => memory.zero_pages += 1,
            _ => memory.data_pages += 1,
        }
    })
}
