// SPDX-License-Identifier: LGPL-2.1-or-later

//! What is in a memory image. To find out, all that says where the pages are is read, so that an
//! image that is damaged there is found.

use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use serde::Serialize;

use super::file::Image;
use super::incoming::Incoming;
use super::records::{Block, Content, Head, PAGE, Record, Records};
use super::sparse_reader::{MOST_MEMORY, SparseStream};
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
    /// Reads the contents of a complete image that is not compressed, or finds out what is wrong
    /// with it. Reads all of a raw image; of a sparse one everything but the pages of large blocks.
    pub fn read(path: &Path) -> Result<Contents> {
        let image = Image::open(path)?;
        let metadata = image
            .file
            .metadata()
            .map_err(|error| Error::system(format!("cannot read '{}'", path.display()), error))?;
        let blocks = match &image.sparse {
            Some(sparse) => of_sparse(&image.file, sparse),
            None => of_raw(&image.file, image.stream_offset),
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

/// Reads all records of a stream up to its devices.
fn of_raw(file: &File, begin: u64) -> std::result::Result<Vec<Memory>, String> {
    let unknown = |what: String| format!("has a stream that this version does not know: {what}");
    let cannot_read = |error: io::Error| format!("cannot be read: {error}");
    let mut at = begin;
    let mut read = |space: &mut [u8]| read_next(file, &mut at, space).map_err(cannot_read);
    let mut incoming = Incoming::new();
    let head = incoming.head(&mut read)?.map_err(unknown)?;
    check_size(&head)?;
    let mut records = Records::new(&head);
    let mut memory: Vec<_> = head.blocks.iter().map(Memory::new).collect();
    let count = |bytes: &[u8]| {
        let mut used = 0;
        while let Some((record, length)) = records.next(&bytes[used..]).map_err(unknown)? {
            used += length;
            match record {
                Record::Page { block, content: Content::Fill(0), .. } => {
                    memory[block].zero_pages += 1;
                }
                Record::Page { block, .. } => memory[block].data_pages += 1,
                Record::Tail(_) => return Ok(ControlFlow::Break(())),
                Record::Mark => {}
            }
        }
        Ok(ControlFlow::Continue(used))
    };
    incoming.each(&mut read, count)?;
    if !records.is_after_pages() {
        return Err("is cut off: QEMU's stream ends among its pages".into());
    }
    Ok(memory)
}

/// Reads the next bytes of a file; none at its end.
pub(super) fn read_next(file: &File, at: &mut u64, space: &mut [u8]) -> io::Result<usize> {
    loop {
        match file.read_at(space, *at) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
            Ok(read) => {
                *at += read as u64;
                return Ok(read);
            }
        }
    }
}

/// Refuses a guest that is larger than any is.
pub(super) fn check_size(head: &Head) -> std::result::Result<(), String> {
    let total: u64 = head.blocks.iter().map(|block| block.size).sum();
    if total > MOST_MEMORY {
        return Err("is damaged: its memory is larger than that of any guest".into());
    }
    Ok(())
}
