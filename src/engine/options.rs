// SPDX-License-Identifier: LGPL-2.1-or-later

//! How snapshots are taken.

use std::sync::Arc;
use std::time::Duration;

use super::storage::StorageHook;
use crate::migration::early_start::EarlyStart;

/// For how long a snapshot may pause the guest, unless the caller says otherwise.
const PAUSE_LIMIT: Duration = Duration::from_secs(30);

/// How snapshots are taken.
#[derive(Clone)]
pub struct Options {
    /// For how long they may pause the guest.
    pub pause_limit: Duration,
    /// How they keep the guest's memory out of the pause.
    pub early_start: EarlyStart,
    /// Who snapshots the disks that QEMU does not.
    pub storage: Option<Arc<dyn StorageHook>>,
}

impl Default for Options {
    fn default() -> Options {
        Options { pause_limit: PAUSE_LIMIT, early_start: EarlyStart::default(), storage: None }
    }
}
