// SPDX-License-Identifier: LGPL-2.1-or-later

//! Snapshots that another thread takes: jobs.

mod at_random;
mod handles;
mod jobs;

fn main() -> std::process::ExitCode {
    instantsnap_testkit::program::main()
}
