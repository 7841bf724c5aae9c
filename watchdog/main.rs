// SPDX-License-Identifier: LGPL-2.1-or-later

//! The program `instantsnap-watchdog`, the watchdog of a snapshot: see `src/engine/watchdog/`.

use std::process::ExitCode;

use instantsnap_core::engine::run_watchdog;

fn main() -> ExitCode {
    // SAFETY: nothing in this process has opened a descriptor, or owns one.
    let Err(why) = unsafe { run_watchdog() };
    eprintln!("instantsnap-watchdog: {why}");
    ExitCode::FAILURE
}
