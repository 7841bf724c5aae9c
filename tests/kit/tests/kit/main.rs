// SPDX-License-Identifier: LGPL-2.1-or-later

//! Tests of the kit, on which the tests of the library rely.

mod by_hand;
mod libvirt;
mod limit;
mod proxy;
mod tick;

fn main() -> std::process::ExitCode {
    instantsnap_testkit::program::main()
}
