// SPDX-License-Identifier: LGPL-2.1-or-later

//! The program `instantsnap-watchdog`: the watchdog of a snapshot (`src/engine/watchdog/`), or the
//! server of a guest's pages (`src/engine/page_server/`).

use std::process::ExitCode;

use instantsnap_core::engine::run_program;

fn main() -> ExitCode {
    // SAFETY: nothing in this process has opened a descriptor, or owns one.
    let Err(why) = unsafe { run_program() };
    eprintln!("instantsnap-watchdog: {why}");
    ExitCode::FAILURE
}
