// SPDX-License-Identifier: LGPL-2.1-or-later

//! Guests that are opened by QMP: what a snapshot contains, how it can fail, and what remains of
//! it.

mod armed;
mod cancel;
mod consistency;
mod delete;
mod disks;
mod doctor;
mod early_start;
mod exclusive;
mod failures;
mod flags;
mod image;
mod killed;
mod killed_caller;
mod lazy;
mod map;
mod memory_image;
mod metadata;
mod monitor_faults;
mod other_clients;
mod paused;
mod random_clients;
mod recover;
mod recover_safely;
mod revert;
mod storage_hook;
mod tearing;
mod watchdog;
mod xml;

fn main() -> std::process::ExitCode {
    instantsnap_testkit::program::main()
}
