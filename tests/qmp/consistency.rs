// SPDX-License-Identifier: LGPL-2.1-or-later

//! Memory, every disk and the serial line of a snapshot are of one moment, between the call and its
//! return.

use common::{INSTANTLY, Opened, machine, named};
use instantsnap::model::flags;
use instantsnap_testkit::{
    Accel, Attach, Binary, MachineType, only_when_thorough, skip, test, thorough, where_kvm_works,
};

/// The number of snapshots in a row. `long` is for the long run of `.ci/run`.
fn rounds(short: u32, long: u32) -> u32 {
    if thorough() { long } else { short }
}

/// Takes snapshots one after the other, on one growing backing chain, of a guest that writes all
/// the time, and restores a clone from each.
fn snapshots_in_a_row(
    binary: &'static Binary,
    machine_type: MachineType,
    accel: Accel,
    disks: usize,
    rounds: u32,
) {
    let attach = if disks > 1 { Attach::Blockdev } else { Attach::Drive };
    let machine =
        machine(binary, disks).restless().machine_type(machine_type).accel(accel).attach(attach);
    let original = Opened::start(&machine);
    for round in 0..rounds {
        let before = original.guest.wait_ticks(1);
        let name = original.snapshot(&format!("s{round}")).unwrap();
        let after = original.guest.wait_ticks(1);
        let (clone, first) = original.restore_clone(&name);
        // The guest can have printed the line of the snapshot's number before the instant, or only
        // a part of it.
        assert!(
            (before..=after + 2).contains(&first),
            "round {round}: the clone goes on from {first}, the snapshot was taken between \
             {before} and {after}"
        );
        drop(clone);
    }
    // The clone has not affected the original.
    original.guest.wait_ticks(3);
}

const MACHINES: [(MachineType, usize); 4] =
    [(MachineType::Pc, 1), (MachineType::Pc, 3), (MachineType::Q35, 1), (MachineType::Q35, 3)];

fn on_all_machines(binaries: impl IntoIterator<Item = &'static Binary>, accel: Accel, rounds: u32) {
    for binary in binaries {
        // The short run takes every third combination, so that no two of them share the machine or
        // the disks.
        let step = if thorough() { 1 } else { 3 };
        for (machine_type, disks) in MACHINES.into_iter().step_by(step) {
            eprintln!(
                "{} {machine_type:?} {accel:?}, {disks} disks: {rounds} snapshots",
                binary.name
            );
            snapshots_in_a_row(binary, machine_type, accel, disks, rounds);
        }
    }
}

#[test]
fn every_snapshot_in_a_row_is_of_one_moment_under_tcg() {
    on_all_machines(Binary::all().iter(), Accel::Tcg, rounds(3, 12));
}

#[test]
fn every_snapshot_in_a_row_is_of_one_moment_under_kvm() {
    on_all_machines(where_kvm_works(Binary::all()), Accel::Kvm, rounds(1, 5));
}

/// The backing chain grows with each snapshot.
#[test(long)]
fn every_snapshot_of_a_long_chain_is_of_one_moment() {
    let binary = &Binary::all()[0];
    snapshots_in_a_row(binary, MachineType::Q35, Accel::Tcg, 3, rounds(5, 100));
}

#[test(long)]
fn every_snapshot_of_a_long_chain_is_of_one_moment_with_a_newer_qemu() {
    only_when_thorough();
    let Some(binary) = Binary::all().get(1) else { skip("there is one QEMU only") };
    snapshots_in_a_row(binary, MachineType::Q35, Accel::Tcg, 3, 100);
}

#[test]
fn non_live_snapshot_is_of_one_moment() {
    for binary in Binary::some() {
        let original = Opened::start(&machine(binary, 2).restless());
        original.create(&named("plain"), 0).unwrap();
        original.guest.wait_ticks(3);
        original.restore_clone("plain");
    }
}

#[test]
fn snapshot_can_be_restored_repeatedly_while_the_original_runs() {
    for binary in Binary::some() {
        let original = Opened::start(&machine(binary, 1).restless());
        original.snapshot("s").unwrap();
        let (first, from) = original.restore_clone("s");
        let (second, again) = original.restore_clone("s");
        assert!(from.abs_diff(again) <= 1, "{from} and {again}");
        // The original and both clones go on, each on its own images.
        original.guest.wait_ticks(3);
        first.guest.wait_ticks(3);
        second.guest.wait_ticks(3);
        // A clone can be snapshotted like its original, and that snapshot can be restored.
        first.handle.create(&named("of-clone"), INSTANTLY | flags::NO_METADATA, &mut ()).unwrap();
        first.guest.wait_ticks(3);
    }
}
