// SPDX-License-Identifier: LGPL-2.1-or-later

//! Deletes snapshots of a guest by its QMP socket: what the guest has written since is kept, the
//! snapshot's files are removed, and an interrupted delete can be repeated.

use std::path::{Path, PathBuf};

use common::virt::OpenedDomain;
use common::{
    ALL_SECTORS, At, INSTANTLY, Opened, OtherQemu, assert_error, assert_says, assert_untouched,
    files_below, machine, named, through_proxy,
};
use instantsnap::engine::{Phase, prepare_revert};
use instantsnap::error::{Code, Error};
use instantsnap::model::flags::NO_METADATA;
use instantsnap::model::flags::delete::{CHILDREN, CHILDREN_ONLY, METADATA_ONLY};
use instantsnap::model::nvram::content_id;
use instantsnap::model::{Record, RecordedNvram};
use instantsnap_testkit::machine::make_image;
use instantsnap_testkit::{
    Attach, Binary, DEADLINE, Daemon, Fault, Format, Guest, Machine, test, wait_for,
};
use serde_json::json;

/// A guest with two disks and two snapshots.
fn start_with_two_snapshots(machine: &Machine) -> Opened {
    let opened = Opened::start(machine);
    take_two(&opened);
    opened
}

fn take_two(opened: &Opened) {
    for name in ["s1", "s2"] {
        opened.snapshot(name).unwrap();
        opened.guest.wait_ticks(2);
    }
}

#[track_caller]
fn delete(opened: &Opened, name: &str) {
    opened.handle.delete(name, 0).unwrap_or_else(|error| panic!("delete {name}: {error}"));
}

fn current(opened: &Opened) -> Option<String> {
    opened.handle.store().unwrap().current().unwrap()
}

/// The overlays and memory images that belong to this snapshot.
fn files_of(opened: &Opened, name: &str) -> Vec<PathBuf> {
    let directory = opened.guest.directory();
    let mut files = files_below(directory);
    files.retain(|file| {
        let file = file.file_name().unwrap().to_str().unwrap();
        file.ends_with(&format!(".{name}")) || file.starts_with(&format!("{name}."))
    });
    files
}

/// Without the notes on a memory image's pages, which not every format has.
fn without_notes(mut files: Vec<PathBuf>) -> Vec<PathBuf> {
    files.retain(|file| file.extension().is_none_or(|extension| extension != "pages"));
    files
}

fn status(guest: &Guest) -> String {
    guest.control().execute("query-status", json!({})).unwrap()["status"]
        .as_str()
        .unwrap()
        .to_owned()
}

/// Adds a copy of UEFI variables to the snapshot's record, as if the guest had such variables.
fn add_nvram(opened: &Opened, name: &str) -> PathBuf {
    let mut record = opened.record(name);
    let copy = format!("{}.pflash1.nvram", record.memory_file);
    std::fs::write(&copy, "variables").unwrap();
    record.nvram.push(RecordedNvram {
        name: "pflash1".into(),
        copy: copy.clone(),
        original: "/nowhere".into(),
        format: "raw".into(),
        content: Some(content_id(b"variables")),
    });
    std::fs::write(opened.state_dir().join(format!("{name}.xml")), record.to_xml()).unwrap();
    copy.into()
}

/// QEMU has the nodes of these images only, and no job.
#[track_caller]
fn assert_clean(opened: &Opened, images: [&str; 2]) {
    for (device, image) in ["vd0", "vd1"].into_iter().zip(images) {
        let expected = opened.guest.directory().join(image);
        assert_eq!(opened.active_image(device), expected.to_str().unwrap());
    }
    let mut control = opened.guest.control();
    assert_eq!(control.execute("query-jobs", json!({})).unwrap(), json!([]));
    let nodes = control.execute("query-named-block-nodes", json!({ "flat": true })).unwrap();
    let gone = |file: &str| file.starts_with('/') && !Path::new(file).exists();
    let left: Vec<_> = nodes
        .as_array()
        .unwrap()
        .iter()
        .filter(|node| gone(node["file"].as_str().unwrap()))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test(long)]
fn delete_merges_the_newest_snapshot_then_the_previous_one() {
    for binary in Binary::any() {
        for attach in [Attach::Drive, Attach::Blockdev] {
            let opened = Opened::start(&machine(binary, 2).attach(attach));
            let nodes = opened.trace().qemu.0["nodes"].clone();
            take_two(&opened);
            let copy = add_nvram(&opened, "s2");
            delete(&opened, "s2");
            assert!(!copy.exists());
            assert_eq!(current(&opened).as_deref(), Some("s1"));
            assert_eq!(files_of(&opened, "s2"), Vec::<PathBuf>::new());
            assert_clean(&opened, ["disk-0.s1", "disk-1.s1"]);
            opened.guest.wait_ticks(2);
            opened.restore_clone("s1");

            delete(&opened, "s1");
            assert_eq!(current(&opened), None);
            assert_eq!(opened.handle.snapshot_list().names().unwrap(), Vec::<String>::new());
            assert_eq!(files_of(&opened, "s1"), Vec::<PathBuf>::new());
            assert_clean(&opened, ["disk-0.raw", "disk-1.qcow2"]);
            assert_eq!(opened.trace().qemu.0["nodes"], nodes);
            assert_error(opened.handle.delete("s1", 0), Code::NoDomainSnapshot, "'s1'");
            // The name can be used again.
            opened.snapshot("s1").unwrap();
            opened.assert_well();
        }
    }
}

/// The record lists the files to remove, but it can be wrong, or another program can have edited
/// it.
#[test]
fn delete_does_not_remove_files_that_an_edited_record_names() {
    for binary in Binary::any() {
        let opened = start_with_two_snapshots(&machine(binary, 1));
        let good = opened.record("s2");
        let precious = opened.guest.directory().join("precious");
        std::fs::write(&precious, "data").unwrap();
        let image = opened.guest.directory().join("image");
        make_image(&image, Format::Qcow2, None);
        let path = |path: &Path| path.to_str().unwrap().to_owned();
        let with_nvram = |copy: &Path, content: Option<&str>| {
            let mut record = good.clone();
            record.nvram.push(RecordedNvram {
                name: "pflash1".into(),
                copy: path(copy),
                original: "/nowhere".into(),
                format: "raw".into(),
                content: content.map(str::to_owned),
            });
            record
        };
        let beside = PathBuf::from(format!("{}.pflash1.nvram", good.memory_file));
        std::fs::write(&beside, "another").unwrap();
        let on_other_overlay = [&precious, &image].map(|overlay| {
            let mut record = good.clone();
            record.disks[0].overlay = path(overlay);
            record
        });
        let other_memory = opened.record("s1").memory_file;
        let edited = [
            Record { memory_file: path(&precious), ..good.clone() },
            Record { memory_file: other_memory, ..good.clone() },
            with_nvram(&precious, None),
            with_nvram(&beside, Some(&content_id(b"variables"))),
            on_other_overlay[0].clone(),
            on_other_overlay[1].clone(),
        ];
        let file = opened.state_dir().join("s2.xml");
        let before = opened.trace();
        for record in edited {
            std::fs::write(&file, record.to_xml()).unwrap();
            let error = opened.handle.delete("s2", 0).expect_err("this must fail");
            eprintln!("{error}");
            assert!(
                [Code::InvalidDomainSnapshot, Code::OperationFailed].contains(&error.code),
                "{error}"
            );
            assert_untouched(&opened, &before);
        }
        // The library does not wait for a named pipe either.
        let pipe = opened.guest.directory().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0)
            .unwrap();
        let mut on_pipe = Record { memory_file: path(&pipe), ..good.clone() };
        std::fs::write(&file, on_pipe.to_xml()).unwrap();
        assert_error(opened.handle.delete("s2", 0), Code::InvalidDomainSnapshot, "pipe");
        assert_error(
            prepare_revert(&opened.state_dir(), "s2", None),
            Code::InvalidDomainSnapshot,
            "pipe",
        );
        assert_error(opened.handle.load("s2", 0), Code::InvalidDomainSnapshot, "pipe");
        on_pipe = good.clone();
        (on_pipe.disks[0].overlay, on_pipe.disks[0].image) = (path(&pipe), path(&pipe));
        std::fs::write(&file, on_pipe.to_xml()).unwrap();
        opened.handle.delete("s2", 0).expect_err("this must fail");
        let elsewhere = Some(opened.guest.directory());
        assert_error(
            prepare_revert(&opened.state_dir(), "s2", elsewhere),
            Code::InvalidDomainSnapshot,
            "pipe",
        );
        std::fs::remove_file(&pipe).unwrap();
        assert_untouched(&opened, &before);

        // A stray file does not prevent the delete.
        std::fs::write(&file, good.to_xml()).unwrap();
        std::fs::write(opened.state_dir().join("stray.xml"), "<x/>").unwrap();
        delete(&opened, "s2");
        assert!(precious.exists() && image.exists() && beside.exists());
        opened.restore_clone("s1");
    }
}

#[test]
fn delete_of_a_snapshot_with_a_child_is_refused() {
    for binary in Binary::any() {
        let opened = start_with_two_snapshots(&machine(binary, 2));
        let before = opened.trace();
        for flags in
            [0, CHILDREN, CHILDREN_ONLY, CHILDREN | METADATA_ONLY, CHILDREN_ONLY | METADATA_ONLY]
        {
            assert_error(opened.handle.delete("s1", flags), Code::OperationUnsupported, "'s2'");
        }
        for (flags, part) in [(CHILDREN | CHILDREN_ONLY, "mutually exclusive"), (1 << 3, "0x8")] {
            assert_error(opened.handle.delete("s2", flags), Code::InvalidArg, part);
        }
        assert_error(opened.handle.delete("none", 0), Code::NoDomainSnapshot, "'none'");
        assert_error(opened.handle.delete("none", METADATA_ONLY), Code::NoDomainSnapshot, "'none'");
        // The snapshot has no children to delete.
        opened.handle.delete("s2", CHILDREN_ONLY).unwrap();
        assert_untouched(&opened, &before);

        opened.handle.delete("s1", METADATA_ONLY).unwrap();
        let kept = without_notes(files_of(&opened, "s1"));
        assert_eq!(kept.len(), 3, "two overlays and the memory image");
        assert_eq!(opened.record("s2").parent, None);
        opened.handle.delete("s2", CHILDREN).unwrap();
        assert_eq!(files_of(&opened, "s2"), Vec::<PathBuf>::new());
        assert_clean(&opened, ["disk-0.s1", "disk-1.s1"]);
        opened.assert_well();
    }
}

#[test]
fn delete_leaves_a_paused_guest_paused() {
    for binary in Binary::any() {
        let opened = start_with_two_snapshots(&machine(binary, 2));
        opened.guest.control().execute("stop", json!({})).unwrap();
        delete(&opened, "s2");
        // QEMU before 10.0 reports another status for a guest that it has saved while it was
        // paused.
        opened.create(&named("paused"), 0).unwrap();
        let before = status(&opened.guest);
        delete(&opened, "paused");
        assert_eq!(status(&opened.guest), before);
        assert_clean(&opened, ["disk-0.s1", "disk-1.s1"]);
        opened.guest.control().execute("cont", json!({})).unwrap();
        opened.guest.wait_ticks(ALL_SECTORS);
        opened.assert_well();
    }
}

#[test]
fn delete_is_refused_during_another_operation() {
    let opened = start_with_two_snapshots(&machine(&Binary::all()[0], 1));
    let mut result = None;
    let mut observer = At(|phase| {
        if phase == Phase::Drain {
            result = Some(opened.handle.delete("s2", 0));
        }
    });
    opened.handle.create(&named("s3"), INSTANTLY, &mut observer).unwrap();
    assert_error(result.expect("no drain"), Code::OperationInvalid, "another snapshot operation");
    opened.restore_clone("s2");
}

/// The delete fails at each of these steps, by an error of QEMU's or by the loss of the connection,
/// as when the caller is killed. Then the delete is repeated.
#[test(long)]
fn interrupted_delete_can_be_repeated() {
    for binary in Binary::any() {
        let (opened, proxy) = through_proxy(&machine(binary, 2));
        let lost: fn() -> Fault = || Fault::Hangup;
        let refused: fn() -> Fault = || Fault::fail("not today");
        for (command, occurrence, fault, spoilt) in [
            ("block-commit", 1, refused, false),
            ("block-commit", 2, refused, true),
            ("job-complete", 2, lost, true),
            ("job-dismiss", 2, lost, true),
            ("blockdev-del", 1, refused, true),
            ("blockdev-del", 2, refused, true),
            ("blockdev-del", 3, lost, true),
        ] {
            let what = format!("{}: {command} {occurrence}", binary.name);
            opened.snapshot("s").unwrap();
            opened.guest.wait_ticks(1);
            let before = opened.trace();
            proxy.rule(command, occurrence, fault());
            let error = opened.handle.delete("s", 0).expect_err(&what);
            eprintln!("{what}: {error}");
            assert_eq!(proxy.rules_left(), 0, "{what}");
            assert_eq!(error.code, Code::OperationFailed, "{what}: {error}");
            assert!(error.message.starts_with("cannot delete snapshot 's': "), "{what}: {error}");
            let again = error.message.contains("again when the cause is fixed");
            assert_eq!(
                (again, error.message.contains("nothing was changed")),
                (spoilt, !spoilt),
                "{what}: {error}"
            );
            opened.guest.wait_ticks(1);
            if spoilt {
                let prepared = prepare_revert(&opened.state_dir(), "s", None).map(drop);
                assert_error(prepared, Code::InvalidDomainSnapshot, "delete it again");
            } else {
                assert_untouched(&opened, &before);
                opened.restore_clone("s");
            }
            delete(&opened, "s");
            assert_eq!(files_of(&opened, "s"), Vec::<PathBuf>::new(), "{what}");
            assert_clean(&opened, ["disk-0.raw", "disk-1.qcow2"]);
        }
        opened.assert_well();
    }
}

#[test]
fn delete_of_a_branch_left_by_a_revert_removes_its_files_only() {
    for binary in Binary::any() {
        let opened = start_with_two_snapshots(&machine(binary, 2));
        let (clone, _) = opened.restore_clone("s1");
        // While the original runs on its overlays, the clone must not remove them, and the images
        // below them must not change.
        assert_error(clone.handle.delete("s2", 0), Code::OperationInvalid, "is in use");
        assert_eq!(without_notes(files_of(&opened, "s2")).len(), 4);
        opened.guest.wait_ticks(2);
        opened.restore_clone("s2");
        opened.guest.kill();

        let fresh = [clone.active_image("vd0"), clone.active_image("vd1")];
        delete(&clone, "s2");
        assert_eq!(files_of(&opened, "s2"), Vec::<PathBuf>::new());
        assert_eq!([clone.active_image("vd0"), clone.active_image("vd1")], fresh);
        opened.restore_clone("s1");

        // The snapshot that the guest was reverted to: its memory image is removed, and the images
        // stay, because the guest's overlays are on them.
        delete(&clone, "s1");
        assert_eq!(files_of(&opened, "s1"), Vec::<PathBuf>::new());
        assert_eq!([clone.active_image("vd0"), clone.active_image("vd1")], fresh);
        clone.guest.wait_ticks(ALL_SECTORS);
        clone.snapshot("after").unwrap();
        opened.restore_clone("after");
    }
}

/// QEMU's image locks show it before anything is changed.
#[test]
fn delete_does_not_merge_into_an_image_that_a_clone_is_based_on() {
    for binary in Binary::any() {
        let opened = start_with_two_snapshots(&machine(binary, 2));
        let (clone, _) = opened.restore_clone("s2");
        let before = opened.trace();
        let error = opened.handle.delete("s2", 0).expect_err("a clone is on it");
        assert!(
            error.message.contains("nothing was changed") && error.message.contains("lock"),
            "{error}"
        );
        assert_untouched(&opened, &before);
        clone.guest.wait_ticks(ALL_SECTORS);
        drop(clone);
        opened.restore_clone("s2");
        delete(&opened, "s2");
        opened.assert_well();
    }
}

#[test]
fn delete_names_the_obstacle_and_changes_nothing() {
    let binary = &Binary::all()[0];
    let opened = start_with_two_snapshots(&machine(binary, 2));
    let refused = |part: &str| {
        let before = opened.trace();
        assert_error(opened.handle.delete("s2", 0), Code::OperationInvalid, part);
        assert_untouched(&opened, &before);
    };

    // Another client's job.
    let file = opened.guest.directory().join("backup.qcow2");
    let backup = json!({
        "job-id": "backup", "device": "drive-0", "sync": "full", "target": file, "speed": 1, "auto-dismiss": false,
    });
    let before = opened.trace();
    opened.guest.control().execute("drive-backup", backup).unwrap();
    assert_error(opened.handle.delete("s2", 0), Code::OperationInvalid, "'backup'");
    opened
        .guest
        .control()
        .execute("block-job-cancel", json!({ "device": "backup", "force": true }))
        .unwrap();
    let dismissed =
        || opened.guest.control().execute("job-dismiss", json!({ "id": "backup" })).ok();
    wait_for(DEADLINE, dismissed).expect("the end of the backup");
    std::fs::remove_file(&file).unwrap();
    assert_untouched(&opened, &before);

    // A clone has taken a snapshot, and its record names another parent.
    let (clone, _) = opened.restore_clone("s2");
    clone.handle.create(&named("other"), INSTANTLY, &mut ()).unwrap();
    drop(clone);
    let other = Record { parent: Some("s1".into()), ..opened.record("other") };
    std::fs::write(opened.state_dir().join("other.xml"), other.to_xml()).unwrap();
    opened.handle.store().unwrap().set_current("s2").unwrap();
    refused("snapshot 'other' stands on");

    // An unrecorded snapshot on top of it.
    opened.create(&named("unrecorded"), INSTANTLY | NO_METADATA).unwrap();
    refused("stands on the snapshot's overlay");
    opened.guest.wait_ticks(2);
    opened.restore_clone("s2");
}

/// The clone is on the image of the second disk, whose merge would begin after the first disk's.
#[test]
fn delete_finds_an_image_in_use_before_the_first_disk_is_merged() {
    for binary in Binary::any() {
        let opened = start_with_two_snapshots(&machine(binary, 2));
        let clone = opened.guest.directory().join("clone.qcow2");
        make_image(
            &clone,
            Format::Qcow2,
            Some((Path::new(&opened.record("s2").disks[1].image), Format::Qcow2)),
        );
        let other = OtherQemu::open(&clone, false);
        let before = opened.trace();
        let error = opened.handle.delete("s2", 0).expect_err("another guest stands on it");
        assert_says(
            &error,
            Code::OperationInvalid,
            &["disk-1.s1", "another QEMU", "nothing was changed"],
        );
        assert_untouched(&opened, &before);
        drop(other);
        delete(&opened, "s2");
        opened.assert_well();
    }
}

/// As if the disk had been detached since.
#[test]
fn delete_keeps_the_overlay_of_a_disk_that_the_guest_does_not_have() {
    let opened = start_with_two_snapshots(&machine(&Binary::all()[0], 2));
    let overlay = opened.guest.directory().join("disk-9.s2");
    std::fs::write(&overlay, "written last").unwrap();
    let record = opened.state_dir().join("s2.xml");
    let xml = std::fs::read_to_string(&record).unwrap();
    std::fs::write(
        &record,
        xml.replace("'vd1'", "'vd9'").replace("\"vd1\"", "\"vd9\"").replace("disk-1", "disk-9"),
    )
    .unwrap();
    let before = opened.trace();
    assert_error(opened.handle.delete("s2", 0), Code::OperationInvalid, overlay.to_str().unwrap());
    assert_untouched(&opened, &before);
    opened.handle.delete("s2", METADATA_ONLY).unwrap();
    assert!(overlay.exists());
}

#[test]
fn delete_by_a_libvirt_handle_deletes_the_domain_snapshot() {
    let daemon = Daemon::session();
    let opened = OpenedDomain::start(&machine(&Binary::all()[0], 2), &daemon);
    opened.snapshot("s1").unwrap();
    opened.snapshot("s2").unwrap();
    let result: Result<(), Error> = opened.handle.delete("none", 0);
    assert_error(result, Code::NoDomainSnapshot, "'none'");
    opened.handle.delete("s2", 0).unwrap();
    assert_eq!(opened.handle.snapshot_list().names().unwrap(), ["s1"]);
    assert!(!opened.memory_file("s2").exists());
    opened.guest.wait_ticks(ALL_SECTORS);
    opened.handle.delete("s1", METADATA_ONLY).unwrap();
    assert!(opened.memory_file("s1").exists());
}
