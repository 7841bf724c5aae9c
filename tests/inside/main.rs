// SPDX-License-Identifier: LGPL-2.1-or-later

//! The library in other programs: in libvirt's daemon and in clients of libvirt.

mod clients;
mod consistency;
mod polkit;
mod preload;
mod recover;
mod safety;

fn main() -> std::process::ExitCode {
    instantsnap_testkit::program::main()
}
