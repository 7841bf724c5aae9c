// SPDX-License-Identifier: LGPL-2.1-or-later

//! The tick guest counts on every QEMU and machine type, and notices data of another moment.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use instantsnap_testkit::{
    Accel, Attach, Binary, DEADLINE, Format, Guest, Machine, MachineType, skip, test,
    where_kvm_works,
};
use serde_json::json;

/// Counts to 10, and then measures 200 more rounds.
fn counts(what: &str, machine: Machine) {
    let start = Instant::now();
    let guest = machine.start();
    guest.wait_ticks(0);
    let boot = start.elapsed();
    let (from, start) = (guest.wait_ticks(10), Instant::now());
    let to = guest.wait_ticks(200);
    let rate = f64::from(to - from) / start.elapsed().as_secs_f64();
    eprintln!("{what}: first tick after {boot:.2?}, {rate:.0} ticks/s");
}

#[test]
fn tick_guest_counts_on_every_qemu_and_machine_type() {
    for binary in Binary::all() {
        for machine_type in [MachineType::Pc, MachineType::Q35] {
            let machine = Machine::new(binary).restless().machine_type(machine_type);
            let what = format!("{} {machine_type:?}", binary.name);
            let two = machine.clone().disk(Format::Raw).disk(Format::Qcow2);
            counts(&format!("{what} tcg, 2 drives"), two.clone());
            counts(&format!("{what} tcg, 2 blockdevs"), two.attach(Attach::Blockdev));
            counts(&format!("{what} tcg, 512 MiB prealloc"), machine.memory(512).prealloc());
        }
    }
}

/// Under nested KVM it takes seconds, or forever, before the guest counts.
#[test]
fn tick_guest_counts_under_kvm() {
    for binary in where_kvm_works(Binary::all()) {
        let machine = Machine::new(binary).restless().machine_type(MachineType::Q35);
        let two = machine.disk(Format::Raw).disk(Format::Qcow2).accel(Accel::Kvm);
        if let Err(why) = two.start().try_ticks(0, DEADLINE) {
            skip(format!("a machine with disks does not boot under KVM here: {why}"));
        }
        counts(&format!("{} kvm, 2 drives", binary.name), two);
    }
}

#[test]
fn tick_guest_counts_on_eight_disks_under_another_user() {
    let mut machine = Machine::new(&Binary::all()[0]).run_as(65534);
    for _ in 0..8 {
        machine = machine.disk(Format::Qcow2);
    }
    counts("8 disks, uid 65534", machine);
}

#[test]
fn every_dense_page_is_checked() {
    counts("dense", Machine::new(&Binary::all()[0]).append("pages=16 dense=16"));
}

/// Writes a number that the guest has never counted to, and returns the guest's report.
///
/// A guest that is between its check and its write of that place overwrites the number unseen. Then
/// the write is repeated.
fn trouble(guest: &Guest, file: &Path, offset: u64) -> String {
    let file = std::fs::File::options().write(true).open(file).expect("the file");
    for _ in 0..20 {
        guest.control().execute("stop", json!({})).expect("stop");
        file.write_all_at(&7_777_777_u32.to_le_bytes(), offset).expect("write");
        guest.control().execute("cont", json!({})).expect("cont");
        if let Err(line) = guest.try_ticks(3, DEADLINE) {
            assert!(guest.serial().torn(), "{line}");
            return line;
        }
    }
    guest.fail("altered 20 times, not noticed")
}

#[test]
fn altered_disk_is_reported_as_torn() {
    for binary in Binary::all() {
        let guest = Machine::new(binary).disk(Format::Raw).disk(Format::Raw).start();
        guest.wait_ticks(10);
        let fixed_sector = 8 * 512;
        let line = trouble(&guest, &guest.disks()[1].file, fixed_sector);
        assert!(line.starts_with("TORN disk 1 has 7777777 want "), "{line}");
    }
}

#[test]
fn altered_page_is_reported_as_torn() {
    for binary in Binary::all() {
        // The guest's memory is a file, so that the test can alter it.
        let directory = tempfile::tempdir().expect("a directory");
        let memory = directory.path().join("memory");
        let object =
            format!("memory-backend-file,id=ram1,size=16M,share=on,mem-path={}", memory.display());
        let guest = Machine::new(binary)
            .arg("-object")
            .arg(&object)
            .arg("-machine")
            .arg("memory-backend=ram1")
            .start();
        guest.wait_ticks(10);
        let end_of_first_page = (2 << 20) + 4092;
        let line = trouble(&guest, &memory, end_of_first_page);
        assert!(line.starts_with("TORN page 0 has 7777777 want "), "{line}");
    }
}

#[test]
fn flash_is_programmed() {
    for binary in Binary::all() {
        let directory = tempfile::tempdir().expect("a directory");
        let bios = Path::new("/usr/share/seabios/bios-256k.bin");
        if !bios.exists() {
            eprintln!("no SeaBIOS of 256 KiB here, not tried");
            return;
        }
        let variables = directory.path().join("variables");
        let file = std::fs::File::create(&variables).expect("a file");
        file.set_len(128 << 10).expect("set_len");
        let flash = |unit: u32, file: &Path, readonly: &str| {
            format!("if=pflash,unit={unit},format=raw,readonly={readonly},file={}", file.display())
        };
        let guest = Machine::new(binary)
            .arg("-drive")
            .arg(&flash(0, bios, "on"))
            .arg("-drive")
            .arg(&flash(1, &variables, "off"))
            .append("pflash=fffa0000")
            .start();
        guest.wait_ticks(3 * 64);
        drop(guest);
        let bytes = std::fs::read(&variables).expect("variables");
        assert_eq!(bytes[..4], [0, 1, 2, 3], "one byte each 64 rounds");
    }
}
