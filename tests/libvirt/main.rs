// SPDX-License-Identifier: LGPL-2.1-or-later

//! Domains of a stock libvirt. Each test starts its own daemon.

mod consistency;
mod daemon;
mod delete;
mod disks;
mod doctor;
mod domains;
mod events;
mod image;
mod jobs;
mod killed_caller;
mod leases;
mod metadata;
mod network;
mod owner;
mod random_clients;
mod recover;
mod revert;
mod side_by_side;
mod started;
mod virsh_table;
mod watchdog;

fn main() -> std::process::ExitCode {
    instantsnap_testkit::program::main()
}
