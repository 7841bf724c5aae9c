// SPDX-License-Identifier: LGPL-2.1-or-later

//! A QEMU without libvirt, by its QMP socket.

use std::fs;
use std::path::{Path, PathBuf};

use instantsnap_testkit::{Format, test};
use serde_json::Value;

use super::run::{Direct, PROGRAM, instantsnap, uri};

#[test]
fn a_snapshot_by_qmp_is_taken_listed_reverted_to_and_deleted() {
    let direct = Direct::start();
    let said = direct.run(&["--json", "snapshot-create-as", "vm", "a", "A text"]).succeeded();
    let events: Vec<Value> = said.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let kinds: Vec<&str> = events
        .iter()
        .map(|event| event["event"].as_str().unwrap())
        .filter(|kind| *kind != "progress")
        .collect();
    assert_eq!(kinds, ["paused", "switched", "instant", "complete"], "{said}");
    let last = events.last().unwrap();
    let memory = direct.state.join("a.mem");
    assert_eq!((&last["name"], &last["disks"]), (&"a".into(), &1.into()), "{last}");
    assert_eq!(last["memory_file"], memory.to_str().unwrap());
    // cargo builds that program with the library's package, and Meson always.
    let has_program = Path::new(PROGRAM).with_file_name("instantsnap-watchdog").exists();
    assert_eq!(last["watchdog"], if has_program { "program" } else { "fork" });
    assert!(last["paused_us"].as_u64().unwrap() > 0, "{last}");
    direct.guest.wait_ticks(2);

    let said = direct.run(&["snapshot-create", "vm", "--image-format", "sparse"]).succeeded();
    assert!(said.contains("Domain snapshot ") && said.ends_with(" created\n"), "{said}");
    let list = direct.run(&["--json", "snapshot-list", "vm"]).json();
    let names: Vec<&str> =
        list.as_array().unwrap().iter().map(|known| known["name"].as_str().unwrap()).collect();
    assert_eq!(names.len(), 2, "{list}");
    let second = *names.iter().find(|name| **name != "a").unwrap();
    assert_eq!(
        direct.run(&["snapshot-list", "vm", "--tree"]).succeeded(),
        format!("a\n  |\n  +- {second}\n\n")
    );
    assert_eq!(
        direct.run(&["snapshot-current", "vm", "--name"]).succeeded(),
        format!("{second}\n")
    );
    let info = direct.run(&["snapshot-info", "vm", "a"]).succeeded();
    for line in ["Name:           a\n", "Domain:         vm\n", "Children:       1\n"] {
        assert!(info.contains(line), "{info}");
    }
    let xml = direct.run(&["snapshot-dumpxml", "vm", "a"]).succeeded();
    assert!(xml.contains("<description>A text</description>"), "{xml}");

    let shown = instantsnap(&["image", "info", memory.to_str().unwrap()]).succeeded();
    assert!(shown.contains("format: sparse\n") && shown.contains("guest: ran\n"), "{shown}");

    // The QEMU that runs does not wait for memory, and stays as it is.
    let said = direct.run(&["snapshot-revert", "vm", "a"]).failed(1);
    assert!(said.contains("-incoming"), "{said}");
    let said = direct.run(&["snapshot-revert", "vm", "a", "--prepare"]).succeeded();
    assert!(said.contains("without --prepare") && said.contains("(qcow2)"), "{said}");
    let plan = direct.run(&["--json", "snapshot-revert", "vm", "a", "--prepare"]).json();
    let file = PathBuf::from(plan["disks"][0]["file"].as_str().unwrap());
    let machine = direct.guest.machine().for_revert(&[(file, Format::Qcow2)]);
    let continued = machine.start();
    let place = uri(&continued, &direct.state);
    let said = instantsnap(&["-c", &place, "snapshot-revert", "vm", "a"]).succeeded();
    assert_eq!(said, "Domain snapshot a reverted\n");
    // It checks each page of its memory and its disk while it counts.
    continued.wait_ticks(3);
    drop(continued);

    let plan = direct.run(&["--json", "snapshot-revert", "vm", "a", "--prepare", "--lazy"]).json();
    let file = PathBuf::from(plan["disks"][0]["file"].as_str().unwrap());
    let lazy = direct.guest.machine().for_revert(&[(file, Format::Qcow2)]).start();
    let place = uri(&lazy, &direct.state);
    let revert = ["-c", &place, "snapshot-revert", "vm", "a", "--lazy"];
    if has_program {
        instantsnap(&revert).succeeded();
        lazy.wait_ticks(3);
    } else {
        let said = instantsnap(&revert).failed(1);
        assert!(said.contains("instantsnap-watchdog"), "{said}");
    }
    drop(lazy);
    let plan = direct.run(&["--json", "snapshot-revert", "vm", "a", "--prepare", "--map"]).json();
    let backend = &plan["memory_backends"][0];
    assert_eq!(backend["file"], memory.to_str().unwrap(), "{plan}");
    assert!(backend["object"].as_str().unwrap().contains("readonly=on"), "{plan}");

    let said = direct.run(&["snapshot-delete", "vm", "a"]).failed(1);
    assert!(said.contains("children"), "{said}");
    direct.run(&["snapshot-delete", "vm", second]).succeeded();
    direct.run(&["snapshot-delete", "vm", "a"]).succeeded();
    assert!(!memory.exists());
    direct.guest.wait_ticks(2);
    let said = direct.run(&["recover", "vm"]).succeeded();
    assert_eq!(said, "No snapshot of domain vm was interrupted\n");
    assert_eq!(direct.run(&["--json", "recover", "vm"]).json(), serde_json::json!([]));
}

#[test]
fn doctor_shows_each_check_and_fails_if_one_does() {
    let direct = Direct::start();
    let said = direct.run(&["doctor", "vm"]).succeeded();
    let verdicts = ["PASS  ", "WARN  ", "SKIP  ", "      "];
    assert!(said.lines().all(|line| verdicts.iter().any(|verdict| line.starts_with(verdict))));
    assert!(said.contains("PASS  disk vd0: "), "{said}");
    assert_eq!(direct.run(&["-q", "doctor", "vm"]).succeeded(), "");
    fs::write(direct.state.join(".lost.journal"), "nonsense").unwrap();
    let said = direct.run(&["doctor", "vm"]).failed(1);
    assert!(said.contains("1 check failed"), "{said}");
    // This host may fail a check, and the status says so.
    let host = instantsnap(&["--json", "doctor"]);
    let found: Value = serde_json::from_str(&host.output).unwrap();
    let found = found.as_array().unwrap();
    assert!(found.iter().any(|found| found["check"] == "kernel" && found["verdict"] == "pass"));
    let has_failed = found.iter().any(|found| found["verdict"] == "fail");
    assert_eq!(host.status, Some(i32::from(has_failed)));
}

#[test]
fn the_name_of_the_domain_must_be_that_of_its_xml() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("vm.xml");
    fs::write(&file, "<domain type='qemu'><name>db</name></domain>").unwrap();
    let directory = directory.path().display();
    let place = format!("qmp:///nowhere?state={directory}&domain={}", file.display());
    let list = |name| instantsnap(&["-c", &place, "snapshot-list", name, "--name"]);
    let said = list("mail").failed(1);
    assert!(said.contains("is 'db' and not 'mail'"), "{said}");
    // Only metadata is read, so no QEMU need run.
    assert_eq!(list("db").succeeded(), "");
}
