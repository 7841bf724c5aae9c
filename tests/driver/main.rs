// SPDX-License-Identifier: LGPL-2.1-or-later

//! Guests whose monitor belongs to a driver, which the library calls back.

mod callbacks;
mod daemon;

fn main() -> std::process::ExitCode {
    instantsnap_testkit::program::main()
}
