// SPDX-License-Identifier: LGPL-2.1-or-later

//! The kit itself: what the tests of the library rely on.

mod by_hand;
mod libvirt;
mod limit;
mod proxy;
mod tick;

fn main() -> std::process::ExitCode {
    instantsnap_testkit::program::main()
}
