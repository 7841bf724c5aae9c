// SPDX-License-Identifier: LGPL-2.1-or-later

//! Loads a sparse memory image by QEMU's own reader of such images (mapped-ram), which reads pages
//! by several threads, and no page of zeros. QEMU 9.0 and later have it.

use crate::backend::{DEFAULT_TIMEOUT, Guest, Liveness};
use crate::deadline::Deadline;
use crate::engine::options::SparseReader;
use crate::error::{Result, fail};
use crate::image::{Block, Image, SparseStream, Zeros};
use crate::migration::{PassedImage, Settings, start_incoming, wait_loaded};
use crate::monitor::commands;

/// Loads an image if it is sparse, `reader` allows it, and this QEMU and this image are fit for
/// that. Returns false if not, or if QEMU refuses to begin: then it waits for a stream, as before.
/// The caller has read the settings.
pub fn load(
    guest: &mut dyn Guest,
    image: &Image,
    zeros: Zeros,
    settings: &Settings,
    reader: SparseReader,
) -> Result<bool> {
    let (channels, must) = match reader {
        SparseReader::Any => (default_channels(), false),
        SparseReader::Library => return Ok(false),
        SparseReader::Qemu { channels } => (channels, true),
    };
    let loaded = is_fit(image, zeros, settings)
        && has_same_blocks(guest, image)?
        && load_passed(guest, image, settings, channels)?;
    if must && !loaded {
        fail!(
            OperationUnsupported,
            "this QEMU cannot read this memory image itself: let the library read it"
        );
    }
    Ok(loaded)
}

/// The threads of QEMU's that read the image: no more than there are CPUs for this process.
fn default_channels() -> u8 {
    const MOST: usize = 4;
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    cpus.min(MOST) as u8
}

/// QEMU writes only the pages that are in the file. So its RAM must be zero, and the image must
/// have all pages of the blocks that QEMU has filled already.
fn is_fit(image: &Image, zeros: Zeros, settings: &Settings) -> bool {
    let has_all = |sparse: &SparseStream| {
        // The other reader says what is wrong with a bitmap that is damaged.
        sparse.has_all_of_small_blocks(&image.file).unwrap_or(false)
    };
    zeros == Zeros::OfSmallBlocks
        && settings.has_mapped_ram()
        && image.sparse.as_ref().is_some_and(has_all)
}

/// Whether QEMU has all memory blocks of the image in their sizes. QEMU's own reader of such images
/// does not compare them, so that a guest with other memory would be loaded without an error.
fn has_same_blocks(guest: &mut dyn Guest, image: &Image) -> Result<bool> {
    let Some(sparse) = &image.sparse else { return Ok(false) };
    let found = commands::ram_blocks(guest, Deadline::after(DEFAULT_TIMEOUT))?.unwrap_or_default();
    let is_there = |block: &Block| {
        found.iter().any(|(name, size)| name.as_bytes() == block.name && *size == block.size)
    };
    Ok(sparse.head.blocks.iter().all(is_there))
}

/// Returns false if QEMU refuses to begin.
fn load_passed(
    guest: &mut dyn Guest,
    image: &Image,
    settings: &Settings,
    channels: u8,
) -> Result<bool> {
    // A policy of the host's can keep QEMU from taking a descriptor of the image.
    let Ok(passed) = PassedImage::pass(guest, &image.file) else { return Ok(false) };
    let begun = settings
        .apply_mapped(guest, channels)
        .and_then(|()| start_incoming(guest, &passed.uri(image.stream_offset)));
    let (has_begun, loaded) = match begun {
        Ok(()) => (true, wait_loaded(guest)),
        Err(_) if is_alive(guest) => (false, Ok(())),
        Err(error) => (false, Err(error)),
    };
    // Everything is put back, even if QEMU could not load and is of no more use.
    let restored = match loaded.is_ok() || is_alive(guest) {
        true => settings.restore_mapped(guest).and(passed.close(guest)),
        false => Ok(()),
    };
    match (loaded, restored) {
        (Ok(()), restored) => restored.map(|()| has_begun),
        (Err(error), Ok(())) => Err(error),
        (Err(error), Err(left)) => Err(error.and(left.message)),
    }
}

fn is_alive(guest: &mut dyn Guest) -> bool {
    matches!(guest.liveness(), Liveness::Alive)
}
