// SPDX-License-Identifier: LGPL-2.1-or-later

//! The command on real domains and QEMUs, in pipes and in terminals.

mod completion;
mod examples;
mod interrupt;
mod qmp;
mod run;
mod terminal;
mod usage;
mod virsh;

fn main() -> std::process::ExitCode {
    instantsnap_testkit::program::main()
}
