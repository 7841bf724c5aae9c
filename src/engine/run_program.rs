// SPDX-License-Identifier: LGPL-2.1-or-later

//! What the program `instantsnap-watchdog` runs.

use std::convert::Infallible;

use super::program::Role;
use super::{page_server, watchdog};

/// Runs the program. It returns only an error: the library has not started it, another version has,
/// or it cannot do its task.
///
/// # Safety
/// Nothing in this process owns a descriptor beyond the first three, and it has one thread.
pub unsafe fn run_program() -> Result<Infallible, &'static str> {
    match Role::of_this_process() {
        // SAFETY: as above.
        Some(Role::Watchdog) => unsafe { watchdog::run() },
        // SAFETY: as above.
        Some(Role::PageServer) => unsafe { page_server::run() },
        None => Err("libinstantsnap starts this program for the time of a snapshot or a revert"),
    }
}
