// SPDX-License-Identifier: LGPL-2.1-or-later

//! An examination agrees with what a snapshot then does, names every obstacle at once, and changes
//! nothing.

use common::backend::open_guest;
use common::{At, INSTANTLY, Opened, assert_untouched, block_of, machine, named};
use instantsnap::engine::{Finding, Phase, Verdict, examine_host};
use instantsnap_testkit::{Binary, test};
use rustix::process::geteuid;
use serde_json::json;

fn verdicts<'a>(found: &'a [Finding], check: &str) -> Vec<(&'a str, Verdict)> {
    let of_check = found.iter().filter(|found| found.check == check);
    of_check.map(|found| (found.object.as_str(), found.verdict)).collect()
}

fn failed(found: &[Finding]) -> Vec<&str> {
    let failed = found.iter().filter(|found| found.verdict == Verdict::Fail);
    failed.map(|found| found.check).collect()
}

#[test]
fn guest_without_a_failed_check_can_be_snapshotted_and_is_not_changed() {
    for binary in Binary::any() {
        // A QEMU of another user, where this test may start one.
        let machine = match geteuid().is_root() {
            true => machine(binary, 2).run_as(65534),
            false => machine(binary, 2),
        };
        let opened = Opened::start(&machine);
        let before = opened.trace();
        let found = opened.handle.examine();
        assert_untouched(&opened, &before);
        let checks = ["kernel", "qemu-img", "guest", "qemu", "settings", "memory", "jobs", "room"];
        for check in checks {
            assert!(
                matches!(verdicts(&found, check)[..], [(_, Verdict::Pass)]),
                "{check}: {found:?}"
            );
        }
        let disks = verdicts(&found, "disk");
        assert_eq!(disks, [("vd0", Verdict::Pass), ("vd1", Verdict::Pass)], "{found:?}");
        assert_eq!(opened.snapshot("s").is_ok(), failed(&found).is_empty(), "{found:?}");
        if failed(&found).is_empty() {
            opened.restore_clone("s");
        }
        for finding in found.iter().filter(|found| found.verdict == Verdict::Fail) {
            assert_eq!(finding.check, "userfaultfd");
            assert!(finding.remedy.contains("vm.unprivileged_userfaultfd=1"), "{finding:?}");
        }
    }
}

#[test]
fn every_obstacle_is_found_at_once() {
    let args = ["-object", "memory-backend-memfd,id=hostmem,size=1M,share=on", "-device"];
    let machine = args.into_iter().fold(machine(&Binary::all()[0], 2), |to, arg| to.arg(arg));
    let opened = Opened::start(&machine.arg("ivshmem-plain,memdev=hostmem,master=on"));
    std::fs::write(opened.state_dir().join(".lost.journal"), "nonsense").unwrap();
    let node = block_of(&opened.guest, "vd1")["inserted"]["node-name"].clone();
    let mut control = opened.guest.control();
    let target = json!({ "driver": "null-co", "node-name": "target", "size": 16 << 20 });
    control.execute("blockdev-add", target).unwrap();
    let mirror = json!({ "job-id": "theirs", "device": node, "target": "target", "sync": "full",
        "speed": 1 });
    control.execute("blockdev-mirror", mirror).unwrap();
    let found = opened.handle.examine();
    let named: Vec<_> = failed(&found);
    assert_eq!(named, ["memory", "jobs", "leftovers"], "{found:?}");
    let text = |check: &str| {
        let finding = found.iter().find(|found| found.check == check).unwrap();
        format!("{} {} {}", finding.object, finding.message, finding.remedy)
    };
    assert!(text("memory").contains("ivshmem-plain"), "{}", text("memory"));
    assert!(text("jobs").contains("vd1"), "{}", text("jobs"));
    assert!(text("leftovers").starts_with("lost ") && text("leftovers").contains("recover"));
    // The examination has settled nothing.
    assert!(opened.state_dir().join(".lost.journal").exists());
}

#[test]
fn guest_that_another_operation_holds_is_not_examined() {
    let opened = Opened::start(&machine(&Binary::all()[0], 1));
    let other = open_guest(&opened.guest, &opened.guest.qmp(), None, &opened.state_dir()).unwrap();
    let mut found = Vec::new();
    let examine = |phase| {
        if phase == Phase::Drain {
            found = other.examine();
        }
    };
    opened.handle.create(&named("s"), INSTANTLY, &mut At(examine)).unwrap();
    assert_eq!(failed(&found), ["guest"], "{found:?}");
    assert_eq!(verdicts(&found, "leftovers"), [("s", Verdict::Warn)]);
    assert_eq!(failed(&opened.handle.examine()), [""; 0]);
}

#[test]
fn host_is_examined_for_this_user() {
    let found = examine_host();
    assert!(matches!(verdicts(&found, "kernel")[..], [(_, Verdict::Pass)]), "{found:?}");
    let users = verdicts(&found, "userfaultfd");
    assert!(users.iter().all(|(user, _)| user.starts_with("user ")) && !users.is_empty());
    if geteuid().is_root() {
        assert_eq!(users[0], ("user root", Verdict::Pass));
    }
}
