// SPDX-License-Identifier: LGPL-2.1-or-later

//! Through a stock libvirt: memory, every disk and the serial line of a snapshot are of one moment.

use common::machine;
use common::virt::{self, OpenedDomain};
use instantsnap_testkit::{
    Accel, Binary, Daemon, Machine, MachineType, test, thorough, where_kvm_works,
};

/// Takes snapshots one after the other, on one growing backing chain, of a guest that writes all
/// the time, and restores a clone from each.
fn snapshots_in_a_row(machine: &Machine, daemon: &Daemon, rounds: u32) {
    let original = OpenedDomain::start(machine, daemon);
    for round in 0..rounds {
        let before = original.guest.wait_ticks(1);
        let name = original.snapshot(&format!("s{round}")).unwrap();
        let after = original.guest.wait_ticks(1);
        let clone = original.restore_clone(&name);
        let first = common::first_tick(&clone);
        assert!(
            (before..=after + 2).contains(&first),
            "round {round}: the clone goes on from {first}, the snapshot was taken between \
             {before} and {after}"
        );
    }
    original.guest.wait_ticks(3);
}

#[test]
fn every_snapshot_in_a_row_is_of_one_moment() {
    for binary in Binary::under_libvirt() {
        for daemon in virt::daemons() {
            for (machine_type, disks) in [(MachineType::Pc, 1), (MachineType::Q35, 3)] {
                eprintln!("{} {:?} {machine_type:?}, {disks} disks", binary.name, daemon.mode());
                snapshots_in_a_row(
                    &machine(binary, disks).restless().machine_type(machine_type),
                    &daemon,
                    if thorough() { 4 } else { 2 },
                );
            }
        }
    }
}

#[test]
fn every_snapshot_in_a_row_is_of_one_moment_under_kvm() {
    for binary in where_kvm_works(Binary::under_libvirt()) {
        // QEMU needs /dev/kvm, to which the user of a session daemon may have no access.
        snapshots_in_a_row(
            &machine(binary, 2).accel(Accel::Kvm),
            &virt::system().unwrap_or_else(virt::session),
            1,
        );
    }
}
