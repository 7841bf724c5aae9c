// SPDX-License-Identifier: LGPL-2.1-or-later

//! The memory image: libvirt's save format with QEMU's migration stream in it, and the threads that
//! move the stream.
//!
//! [`Drain`] moves the stream from QEMU's pipe to the file, [`RestoreStream`] from the file to a
//! QEMU that loads it. Both need only their descriptors, so that a helper process can take their
//! place.

mod checksums;
mod chunk_queue;
mod classic;
mod collect;
mod contents;
mod convert;
mod cursor;
mod drain;
mod file;
mod first_writes;
mod format;
mod from_offset;
#[cfg(any(test, feature = "fuzzing"))]
pub mod hostile;
mod incoming;
mod index;
mod mapping;
mod page_map;
mod page_source;
mod page_writer;
mod pages;
mod pages_file;
mod pipe;
mod raw_index;
mod records;
mod restore_stream;
#[cfg(test)]
mod sample;
mod sparse;
mod sparse_reader;
mod stream;
mod verify;
mod zstd_frames;
mod zstd_reader;
mod zstd_writer;

pub use classic::Zeros;
pub use contents::{Contents, Memory, Notes};
pub use convert::convert;
pub(crate) use cursor::{Cursor, Parsed, Short, parse};
pub use drain::{Drain, discard};
pub use file::{Image, MemoryImage, deleting, is_another, is_partial};
pub use format::{Format, Level};
pub use index::{Index, Page, make_index, written_first};
pub use mapping::Mapping;
pub(crate) use page_map::PageMap;
pub(crate) use page_source::PageSource;
pub use pages_file::{
    is_one as is_pages_file, path_of as pages_file_of, remove as remove_pages_file,
};
pub(crate) use pipe::open as open_pipe;
pub use pipe::pipe;
pub use records::Block;
pub(crate) use records::{Head, PAGE};
pub use restore_stream::RestoreStream;
pub use sparse_reader::SparseStream;
pub use stream::is_other_machine;
pub use verify::verify;
