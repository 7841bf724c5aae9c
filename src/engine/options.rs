// SPDX-License-Identifier: LGPL-2.1-or-later

//! The options of a handle's snapshots.

use std::sync::Arc;
use std::time::Duration;

use super::storage::StorageHook;
use crate::image::Format;
use crate::migration::early_start::EarlyStart;

/// The default of how long a snapshot may pause the guest.
const PAUSE_LIMIT: Duration = Duration::from_secs(30);

/// The options of a handle's snapshots.
#[derive(Clone)]
pub struct Options {
    /// How long a snapshot may pause the guest.
    pub pause_limit: Duration,
    /// Whether the migration begins before the pause, so that the pause does not grow with memory.
    pub early_start: EarlyStart,
    /// The hook that snapshots the disks that QEMU does not.
    pub storage: Option<Arc<dyn StorageHook>>,
    /// Whether one is refused that no watchdog can be started for.
    pub needs_watchdog: bool,
    /// The format of memory images; `None`: the backend's default.
    pub image_format: Option<Format>,
    /// Who reads a sparse memory image that is loaded.
    pub sparse_reader: SparseReader,
}

/// Who reads a sparse memory image when it is loaded into a QEMU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SparseReader {
    /// QEMU where it can, otherwise the library.
    #[default]
    Any,
    /// The library, which makes a stream of it.
    Library,
    /// QEMU by so many threads. If it cannot, the load fails.
    Qemu {
        /// The number of threads.
        channels: u8,
    },
}

impl Default for Options {
    fn default() -> Options {
        Options {
            pause_limit: PAUSE_LIMIT,
            early_start: EarlyStart::default(),
            storage: None,
            needs_watchdog: false,
            image_format: None,
            sparse_reader: SparseReader::default(),
        }
    }
}
