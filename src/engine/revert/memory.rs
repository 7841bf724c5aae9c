// SPDX-License-Identifier: LGPL-2.1-or-later

//! The ways in which the memory of a snapshot comes back, as far as the caller has a part in them.

use std::path::{Path, PathBuf};

use crate::error::{Code, Error, Result};
use crate::image::{Format, Image, Mapping};

/// A memory backend that QEMU must be started with to map a memory image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryBackend {
    /// Its id.
    pub id: String,
    /// The memory image.
    pub file: PathBuf,
    /// Where the backend's pages begin in the image.
    pub offset: u64,
    /// Its size.
    pub size: u64,
    /// Whether QEMU names the memory block by the backend's path instead of its id.
    by_path: bool,
}

impl MemoryBackend {
    pub(super) fn new(mapping: Mapping, file: &Path) -> MemoryBackend {
        let Mapping { id, by_path, offset, size, .. } = mapping;
        MemoryBackend { id, file: file.to_owned(), offset, size, by_path }
    }

    /// The argument of QEMU's option `-object`.
    pub fn object(&self) -> String {
        let MemoryBackend { id, file, offset, size, by_path } = self;
        // A comma of a value is written twice.
        let file = file.to_string_lossy().replace(',', ",,");
        let by_path = if *by_path { "on" } else { "off" };
        format!(
            "memory-backend-file,id={id},size={size},mem-path={file},offset={offset},share=off,\
             readonly=on,rom=off,x-use-canonical-path-for-ramblock-id={by_path}"
        )
    }
}

/// The blocks of an image that QEMU can map. `file` is its name in messages.
pub(super) fn mappings(image: &Image, file: &str) -> Result<Vec<Mapping>> {
    let Some(blocks) = image.mappings() else {
        return Err(Error::new(
            Code::ConfigUnsupported,
            format!(
                "the memory image '{file}' has the format '{}', and QEMU can only map one of the \
                 format '{}': convert it first (instantsnap_image_convert()), or load all of it \
                 (memory 'full')",
                image.format().name(),
                Format::Sparse.name()
            ),
        ));
    };
    if blocks.is_empty() {
        return Err(Error::new(
            Code::ConfigUnsupported,
            format!(
                "the memory image '{file}' has no memory block that a memory backend of QEMU could \
                 have: load all of it (memory 'full')"
            ),
        ));
    }
    Ok(blocks)
}
