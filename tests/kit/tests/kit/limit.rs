// SPDX-License-Identifier: LGPL-2.1-or-later

//! A test that hangs ends its program, and the program names the test.

use std::process::Command;

use instantsnap_testkit::{Binary, DEADLINE, Machine, process, program, test, wait_for};

#[test]
fn hanging_test_ends_its_program_and_its_guest() {
    let directory = tempfile::tempdir().unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "limit::hangs", "--ignored"])
        .env(program::LIMIT, "3")
        .env("TMPDIR", directory.path())
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(!output.status.success(), "{said}");
    assert!(said.contains("limit::hangs has not ended within 3s"), "{said}");
    let guest =
        said.lines().find_map(|line| line.strip_prefix("its QEMU is ")).expect("the child says so");
    let is_gone = || (!std::path::Path::new("/proc").join(guest).exists()).then_some(());
    wait_for(DEADLINE, is_gone).expect("its QEMU ends too");
}

#[process]
fn hangs() {
    let guest = Machine::new(&Binary::all()[0]).start();
    eprintln!("its QEMU is {}", guest.pid());
    loop {
        std::thread::park();
    }
}
