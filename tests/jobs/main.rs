// SPDX-License-Identifier: LGPL-2.1-or-later

//! Jobs: snapshots that are taken on a thread of their own.

mod at_random;
mod handles;
mod jobs;

fn main() -> std::process::ExitCode {
    instantsnap_testkit::program::main()
}
