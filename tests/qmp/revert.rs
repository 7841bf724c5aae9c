// SPDX-License-Identifier: LGPL-2.1-or-later

//! Reverting to a snapshot: on fresh images, into a matching machine only, and without changing the
//! snapshot.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use common::backend::open_guest;
use common::{INSTANTLY, Opened, assert_error, assert_says, assert_untouched, machine, named};
use instantsnap::engine::{RevertPlan, prepare_revert};
use instantsnap::error::Code;
use instantsnap::image::Format as ImageFormat;
use instantsnap::model::flags::{NO_METADATA, revert};
use instantsnap_testkit::{Binary, Fault, Format, Guest, Machine, MachineType, Proxy, test};
use serde_json::json;

/// The contents of all files of a snapshot.
fn content(opened: &Opened, name: &str) -> BTreeMap<String, Vec<u8>> {
    let record = opened.record(name);
    let files =
        record.disks.iter().map(|disk| disk.image.clone()).chain([record.memory_file.clone()]);
    files.map(|file| (file.clone(), std::fs::read(&file).unwrap())).collect()
}

fn images(plan: &RevertPlan) -> Vec<(PathBuf, Format)> {
    plan.disks.iter().map(|disk| (disk.file.clone(), Format::Qcow2)).collect()
}

/// Opens a waiting QEMU with the original's state directory.
fn open(original: &Opened, guest: Guest) -> Opened {
    let handle = open_guest(&guest, &guest.qmp(), None, &original.state_dir()).unwrap();
    Opened { handle, guest }
}

#[test]
fn fresh_images_are_created_in_the_directory_under_unique_names() {
    let opened = Opened::start(&machine(&Binary::all()[0], 2));
    opened.snapshot("s").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let first = prepare_revert(&opened.state_dir(), "s", Some(directory.path())).unwrap();
    let second = prepare_revert(&opened.state_dir(), "s", Some(directory.path())).unwrap();
    let beside = prepare_revert(&opened.state_dir(), "s", None).unwrap();
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 4);
    let mut files: Vec<_> =
        [&first, &second, &beside].iter().flat_map(|plan| images(plan)).collect();
    files.sort_by(|a, b| a.0.cmp(&b.0));
    files.dedup();
    assert_eq!(files.len(), 6);
    let record = opened.record("s");
    for (disk, recorded) in first.disks.iter().zip(&record.disks) {
        assert_eq!(disk.name, recorded.name);
        assert_eq!(disk.format, "qcow2");
        assert_eq!(disk.backing_file.as_ref(), Some(&recorded.image));
        assert_eq!(disk.file.parent().unwrap(), directory.path().canonicalize().unwrap());
        let info = common::run("qemu-img", &["info", "-U", disk.file.to_str().unwrap()]);
        assert!(info.contains(&format!("backing file: {}", recorded.image)), "{info}");
        assert!(info.contains(&format!("backing file format: {}", recorded.format)), "{info}");
    }
    for (disk, recorded) in beside.disks.iter().zip(&record.disks) {
        assert_eq!(disk.file.parent(), PathBuf::from(&recorded.image).parent());
    }
    assert_eq!(first.memory_file, record.memory_file);
    assert_eq!(first.domain_xml, record.domain_xml);
    let clone = open(&opened, opened.guest.machine().for_revert(&images(&first)).start());
    clone.handle.load("s", 0).unwrap();
    clone.guest.wait_ticks(3);
}

#[test]
fn snapshot_with_a_missing_file_is_refused_and_nothing_is_left() {
    let opened = Opened::start(&machine(&Binary::all()[0], 2));
    opened.snapshot("s").unwrap();
    let record = opened.record("s");
    let directory = tempfile::tempdir().unwrap();
    let prepare = |directory: Option<&Path>| prepare_revert(&opened.state_dir(), "s", directory);
    assert_error(
        prepare_revert(&opened.state_dir(), "none", None),
        Code::NoDomainSnapshot,
        "'none'",
    );
    assert_error(prepare(Some(&directory.path().join("none"))), Code::SystemError, "none");
    // The second file is missing, so that the library has to remove what it has created for the
    // first.
    for missing in [&record.disks[1].image, &record.memory_file] {
        let aside = format!("{missing}.aside");
        std::fs::rename(missing, &aside).unwrap();
        let before = opened.trace();
        assert_error(prepare(None), Code::InvalidDomainSnapshot, missing);
        assert_error(prepare(Some(directory.path())), Code::InvalidDomainSnapshot, missing);
        assert_untouched(&opened, &before);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
        std::fs::rename(&aside, missing).unwrap();
    }
    prepare(None).unwrap();
}

#[test]
fn image_whose_directory_is_gone_is_reported_as_missing() {
    let images = tempfile::tempdir().unwrap();
    let file = images.path().join("disk.qcow2");
    instantsnap_testkit::machine::make_image(&file, Format::Qcow2, None);
    let opened = Opened::start(&Machine::new(&Binary::all()[0]).disk_on(&file, Format::Qcow2));
    opened.snapshot("s").unwrap();
    std::fs::rename(images.path(), images.path().with_extension("moved")).unwrap();
    let result = prepare_revert(&opened.state_dir(), "s", None);
    std::fs::rename(images.path().with_extension("moved"), images.path()).unwrap();
    assert_error(result, Code::InvalidDomainSnapshot, "disk.qcow2");
}

#[test]
fn load_into_a_qemu_without_incoming_defer_is_refused() {
    for binary in Binary::any() {
        let opened = Opened::start(&machine(binary, 1));
        opened.snapshot("s").unwrap();
        let before = opened.trace();
        assert_error(opened.handle.load("s", 0), Code::OperationInvalid, "-incoming defer");
        opened.guest.control().execute("stop", json!({})).unwrap();
        assert_error(opened.handle.load("s", 0), Code::OperationInvalid, "-incoming defer");
        opened.guest.control().execute("cont", json!({})).unwrap();
        assert_error(opened.handle.load("none", 0), Code::NoDomainSnapshot, "'none'");
        assert_untouched(&opened, &before);
        // Conversely, a waiting QEMU cannot be snapshotted.
        let clone = opened.start_clone("s");
        assert_error(
            clone.handle.create(&named("t"), INSTANTLY, &mut ()),
            Code::OperationInvalid,
            "incoming",
        );
        clone.handle.load("s", 0).unwrap();
        clone.guest.wait_ticks(3);
        // A QEMU can be loaded only once.
        assert_error(clone.handle.load("s", 0), Code::OperationInvalid, "-incoming defer");
    }
}

#[test]
fn load_that_qemu_refuses_leaves_nothing_and_can_be_repeated() {
    for binary in Binary::any() {
        let opened = Opened::start(&machine(binary, 1));
        // A sparse image that QEMU refuses to read itself is given to it as a stream.
        opened.handle.create_as(Some(ImageFormat::Raw), &named("s"), INSTANTLY, &mut ()).unwrap();
        let plan = prepare_revert(&opened.state_dir(), "s", None).unwrap();
        let guest = opened.guest.machine().for_revert(&images(&plan)).start();
        let proxy = Proxy::start(&guest.directory().join("proxy.sock"), &guest.qmp());
        let handle = open_guest(&guest, proxy.path(), None, &opened.state_dir()).unwrap();
        let clone = Opened { handle, guest };
        let before = clone.trace();
        proxy.rule("migrate-incoming", 1, Fault::fail("not today"));
        assert_error(clone.handle.load("s", 0), Code::OperationFailed, "not today");
        assert_untouched(&clone, &before);
        clone.handle.load("s", 0).unwrap();
        clone.guest.wait_ticks(3);
    }
}

#[test]
fn load_refuses_wrong_disks_before_qemu_is_given_a_byte() {
    for binary in Binary::any() {
        let opened = Opened::start(&machine(binary, 2));
        opened.snapshot("s").unwrap();
        opened.snapshot("t").unwrap();
        let before = content(&opened, "s");
        let own: Vec<_> =
            opened.guest.disks().iter().map(|disk| (disk.file.clone(), disk.format)).collect();
        let plan = || images(&prepare_revert(&opened.state_dir(), "s", None).unwrap());
        let mut swapped = plan();
        swapped.reverse();
        let mixed = vec![plan().remove(0), own[1].clone()];
        let of_t = images(&prepare_revert(&opened.state_dir(), "t", None).unwrap());
        let one = machine(binary, 1).for_revert(&plan()[..1]);
        let two = |disks: &[_]| opened.guest.machine().for_revert(disks);
        // QEMU locks images, and the original has its own open.
        opened.guest.kill();
        for (what, machine, part) in [
            ("a disk is missing", one, "'vd1'"),
            ("the snapshot's own images", two(&own), "the snapshot's own"),
            ("one of the snapshot's own images", two(&mixed), "the snapshot's own"),
            ("the images of another snapshot", two(&of_t), "no disk 'vd0'"),
            ("two disks swapped", two(&swapped), "no disk 'vd0'"),
        ] {
            eprintln!("{}: {what}", binary.name);
            let clone = open(&opened, machine.incoming().start());
            assert_error(clone.handle.load("s", 0), Code::ConfigUnsupported, part);
            let status = clone.guest.control().execute("query-status", json!({})).unwrap();
            assert_eq!(status["status"], "inmigrate", "{what}");
        }
        assert!(content(&opened, "s") == before, "the snapshot was written to");
        let clone = open(&opened, two(&plan()).start());
        clone.handle.load("s", 0).unwrap();
        clone.guest.wait_ticks(3);
    }
}

#[test]
fn load_into_another_machine_fails_with_qemus_reason() {
    for binary in Binary::any() {
        let opened = Opened::start(&machine(binary, 1));
        opened.snapshot("s").unwrap();
        opened.snapshot("t").unwrap();
        for (what, change) in [
            ("more memory", (|machine| machine.memory(32)) as fn(Machine) -> Machine),
            ("less memory", |machine| machine.memory(8)),
        ] {
            let plan = prepare_revert(&opened.state_dir(), "s", None).unwrap();
            let clone =
                open(&opened, change(opened.guest.machine().for_revert(&images(&plan))).start());
            let error = clone.handle.load("s", 0).expect_err(what);
            eprintln!("{}: {what}: {error}", binary.name);
            assert_eq!(error.code, Code::OperationFailed, "{what}: {error}");
            let said =
                if clone.guest.alive() { "cannot load the memory image: " } else { "QEMU ended" };
            assert!(error.message.contains(said), "{what}: {error}");
            assert!(!error.message.contains("no reason"), "{what}: {error}");
        }
        // The image names its machine type.
        let plan = prepare_revert(&opened.state_dir(), "s", None).unwrap();
        let other =
            opened.guest.machine().for_revert(&images(&plan)).machine_type(MachineType::Q35);
        let clone = open(&opened, other.start());
        let error = clone.handle.load("s", 0).expect_err("another machine type");
        assert_says(
            &error,
            Code::ConfigUnsupported,
            &["of a machine of type 'pc-i440fx-", "has the type 'pc-q35-"],
        );
        assert_eq!(
            clone.guest.control().execute("query-status", json!({})).unwrap()["status"],
            "inmigrate"
        );
        // A snapshot that was not loaded does not become current.
        assert_eq!(opened.handle.store().unwrap().current().unwrap().as_deref(), Some("t"));
        opened.restore_clone("s");
    }
}

#[test]
fn load_flags_decide_whether_the_guest_runs_and_paused_is_kept() {
    for binary in Binary::any() {
        let opened = Opened::start(&machine(binary, 1));
        opened.snapshot("ran").unwrap();
        opened.guest.control().execute("stop", json!({})).unwrap();
        opened.create(&named("paused"), 0).unwrap();
        // QEMU does not save a paused guest a second time before it has run.
        opened.guest.control().execute("cont", json!({})).unwrap();
        opened.guest.wait_ticks(2);
        opened.guest.control().execute("stop", json!({})).unwrap();
        opened.create(&named("paused-instant"), INSTANTLY).unwrap();
        for (name, flags, running) in [
            ("ran", 0, true),
            ("ran", revert::PAUSED, false),
            ("ran", revert::RUNNING, true),
            ("paused", 0, false),
            ("paused", revert::RUNNING, true),
            ("paused-instant", 0, false),
            ("paused-instant", revert::PAUSED, false),
        ] {
            let clone = opened.start_clone(name);
            for (bad, code) in [
                (revert::RUNNING | revert::PAUSED, Code::InvalidArg),
                (1 << 4, Code::InvalidArg),
                (1 << 31 | revert::RUNNING, Code::InvalidArg),
                (revert::RESET_NVRAM, Code::OperationUnsupported),
            ] {
                assert_error(clone.handle.load(name, bad), code, "flag");
            }
            clone.handle.load(name, flags).unwrap();
            let status = clone.guest.control().execute("query-status", json!({})).unwrap();
            assert_eq!(status["running"], running, "{name} {flags}");
            if !running {
                assert_eq!(clone.guest.serial().tick, None, "it ran");
                clone.guest.control().execute("cont", json!({})).unwrap();
            }
            clone.guest.wait_ticks(3);
        }
    }
}

#[test]
fn snapshot_of_a_clone_can_be_restored_and_no_image_changes() {
    for binary in Binary::any() {
        let opened = Opened::start(&machine(binary, 2));
        opened.snapshot("s").unwrap();
        let of_s = content(&opened, "s");
        let (clone, from) = opened.restore_clone("s");
        clone.handle.create(&named("c"), INSTANTLY, &mut ()).unwrap();
        let of_c = content(&opened, "c");
        assert_eq!(opened.record("c").parent.as_deref(), Some("s"));
        let (grandchild, later) = opened.restore_clone("c");
        assert!(later > from);
        grandchild.handle.create(&named("g"), INSTANTLY | NO_METADATA, &mut ()).unwrap();
        for opened in [&opened, &clone, &grandchild] {
            opened.guest.wait_ticks(5);
        }
        drop((clone, grandchild));
        // No clone has written to the images that it is based on.
        assert!(content(&opened, "s") == of_s, "snapshot s has changed");
        assert!(content(&opened, "c") == of_c, "snapshot c has changed");
        let (_again, again) = opened.restore_clone("s");
        assert!(again.abs_diff(from) <= 1);
    }
}

#[test]
fn machine_with_preallocated_memory_can_be_restored() {
    for binary in Binary::any() {
        let opened = Opened::start(&machine(binary, 1).prealloc());
        opened.snapshot("s").unwrap();
        opened.guest.wait_ticks(2);
        opened.restore_clone("s");
    }
}

#[test]
fn image_written_or_replaced_since_the_snapshot_is_refused_by_name() {
    let opened = Opened::start(&machine(&Binary::all()[0], 2));
    opened.snapshot("s").unwrap();
    opened.guest.kill();
    let record = opened.record("s");
    let image = Path::new(&record.disks[1].image);
    let refused = |clone: &Opened, change: &str| {
        let error = clone.handle.load("s", 0).expect_err("it would be torn");
        assert_says(&error, Code::SnapshotRevertRisky, &[&record.disks[1].image, change, "FORCE"]);
    };
    let copy = image.with_extension("copy");
    std::fs::copy(image, &copy).unwrap();
    std::fs::rename(&copy, image).unwrap();
    let clone = opened.start_clone("s");
    refused(&clone, "was replaced");
    // QEMU was not given a byte, and the content is the same.
    clone.handle.load("s", revert::FORCE).unwrap();
    clone.guest.wait_ticks(3);
    drop(clone);

    let raw = Path::new(&record.disks[0].image);
    let length = raw.metadata().unwrap().len();
    let written = std::fs::OpenOptions::new().write(true).open(raw).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&written, &[0], length - 1).unwrap();
    let clone = opened.start_clone("s");
    let error = clone.handle.load("s", 0).expect_err("it would be torn");
    assert_says(&error, Code::SnapshotRevertRisky, &[&record.disks[0].image, "was written to"]);
}
