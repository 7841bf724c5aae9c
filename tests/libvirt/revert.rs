// SPDX-License-Identifier: LGPL-2.1-or-later

//! Reverts domains of a stock libvirt to snapshots with memory.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::tree::{Maker, Tree};
use common::{OtherQemu, machine, virt};
use instantsnap::error::Code;
use instantsnap::model::flags::revert::{FORCE, PAUSED, RUNNING};
use instantsnap_testkit::machine::make_image;
use instantsnap_testkit::{Binary, Daemon, Format, only_when_thorough, skip, test, thorough};

#[test]
fn guest_continues_from_the_snapshot() {
    let makers = [Maker::Instant, Maker::Libvirt];
    for (daemon, first) in virt::daemons().into_iter().zip([0, 1]) {
        // Each daemon uses one of the makers, or in the long run both.
        for maker in makers.into_iter().cycle().skip(first).take(if thorough() { 2 } else { 1 }) {
            eprintln!("{:?} {maker:?}", daemon.mode());
            let mut tree = Tree::start(&machine(&Binary::all()[0], 2), &daemon, maker);
            tree.snapshot("a");
            tree.opened.guest.wait_ticks(20);
            tree.snapshot("b");
            tree.opened.guest.wait_ticks(20);
            tree.revert("a");
            tree.assert_shape("a< b<a", Some("a"));
            tree.opened.guest.wait_ticks(20);
            tree.revert("b");
            tree.revert("a");
            tree.revert("a");
            eprintln!("{:?}", tree.images());
            tree.assert_all_can_be_reverted_to();
        }
    }
}

/// A domain with the snapshots a and b.
fn start_with_two_snapshots(daemon: &Daemon) -> Tree {
    let mut tree = Tree::start(&machine(&Binary::all()[0], 2), daemon, Maker::Instant);
    tree.snapshot("a");
    tree.snapshot("b");
    tree
}

#[test]
fn shut_off_domain_continues_from_the_snapshot() {
    only_when_thorough();
    let tree = start_with_two_snapshots(&virt::session());
    tree.opened.guest.virsh("destroy", &[]);
    tree.revert("a");
    tree.opened.guest.virsh("destroy", &[]);
    tree.revert("b");
    tree.assert_all_can_be_reverted_to();
}

#[test]
fn domain_boots_from_its_reverted_disks() {
    let tree = start_with_two_snapshots(&virt::session());
    tree.revert("a");
    let inactive = tree.opened.guest.virsh("dumpxml", &["--inactive"]);
    let live = tree.opened.guest.virsh("domblklist", &[]);
    assert_eq!(live, tree.opened.guest.virsh("domblklist", &["--inactive"]));
    assert!(!inactive.contains("disk-0.b"), "{inactive}");
    tree.opened.guest.virsh("destroy", &[]);
    tree.opened.guest.start_domain();
    tree.opened.guest.wait_ticks(3);
    tree.assert_all_can_be_reverted_to();
}

#[test]
fn transient_domain_keeps_its_snapshots_after_a_revert() {
    for daemon in virt::daemons() {
        let mut tree =
            Tree::start(&machine(&Binary::all()[0], 1).transient(), &daemon, Maker::Instant);
        tree.snapshot("a");
        tree.snapshot("b");
        let before = tree.opened.guest.virsh("snapshot-dumpxml", &["b", "--security-info"]);
        tree.revert("a");
        tree.assert_shape("a< b<a", Some("a"));
        assert_eq!(before, tree.opened.guest.virsh("snapshot-dumpxml", &["b", "--security-info"]));
        assert!(tree.opened.guest.virsh("dominfo", &[]).contains("Persistent:     no"));
        tree.revert("b");
        tree.snapshot("c");
        tree.assert_shape("a< b<a c<b", Some("c"));
        tree.revert("a");
    }
}

#[test]
fn revert_to_a_snapshot_of_a_paused_guest_is_paused() {
    only_when_thorough();
    let mut tree = Tree::start(&machine(&Binary::all()[0], 1), &virt::session(), Maker::Instant);
    tree.snapshot("running");
    tree.opened.guest.virsh("suspend", &[]);
    tree.opened.snapshot("paused").unwrap();
    let state = |tree: &Tree| tree.opened.guest.virsh("domstate", &[]).trim().to_owned();
    for (name, flags, wanted) in [
        ("paused", 0, "paused"),
        ("paused", RUNNING, "running"),
        ("running", 0, "running"),
        ("running", PAUSED, "paused"),
        ("paused", PAUSED | FORCE, "paused"),
        ("running", RUNNING | FORCE, "running"),
    ] {
        tree.try_revert(name, flags).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(state(&tree), wanted, "{name} {flags}");
        if wanted == "paused" {
            tree.opened.guest.virsh("resume", &[]);
        }
        tree.opened.guest.wait_ticks(3);
    }
}

#[test]
fn revert_flags_are_validated() {
    let tree = start_with_two_snapshots(&virt::session());
    let before = tree.opened.trace();
    for (flags, part) in [(RUNNING | PAUSED, "mutually exclusive"), (1 << 9, "0x200")] {
        common::assert_error(tree.try_revert("a", flags), Code::InvalidArg, part);
    }
    tree.opened.assert_untouched(&before);
}

/// Every detectable damage to the snapshot is noticed before the domain is stopped.
#[test]
fn damaged_snapshot_is_refused_and_the_domain_keeps_running() {
    let tree = start_with_two_snapshots(&virt::session());
    let (memory, moved) = (tree.memory("a"), tree.memory("moved"));
    let fails = |part: &str| {
        let before = tree.opened.trace();
        let error = tree.try_revert("a", 0).expect_err("damaged");
        eprintln!("{:?} {error}", error.code);
        assert_eq!(error.code, Code::InvalidDomainSnapshot, "{error}");
        assert!(error.message.contains(part), "{error}");
        tree.opened.assert_untouched(&before);
        tree.opened.guest.wait_ticks(3);
    };

    std::fs::rename(&memory, &moved).unwrap();
    fails("is missing");
    std::fs::write(&memory, "no image").unwrap();
    fails("is damaged");
    std::fs::copy(&moved, &memory).unwrap();
    let user = tree.opened.guest.daemon().user();
    std::os::unix::fs::chown(&memory, Some(user), Some(user)).unwrap();
    let overwrite = |at: u64, bytes: &[u8]| {
        OpenOptions::new().write(true).open(&memory).unwrap().write_all_at(bytes, at).unwrap();
    };
    overwrite(0, b"LibvirtQemudPart");
    fails("is damaged");
    overwrite(0, b"LibvirtQemudSave");
    // QEMU would find this damage when it loads the memory, after the domain was stopped.
    let whole = std::fs::read(&moved).unwrap();
    let stream = 92 + u32::from_ne_bytes(whole[20..24].try_into().unwrap()) as usize;
    overwrite(stream as u64, b"QEVX");
    fails("no stream of QEMU's");
    overwrite(stream as u64, b"QEVM");
    // The last digit of the machine's version.
    let digit = stream + 12 + usize::from(whole[stream + 12]);
    overwrite(digit as u64, b"9");
    fails("of a machine of type");
    overwrite(digit as u64, &whole[digit..=digit]);
    OpenOptions::new().write(true).open(&memory).unwrap().set_len(whole.len() as u64 / 2).unwrap();
    fails("cut off");
    std::fs::rename(&moved, &memory).unwrap();

    let image = tree.opened.guest.disks()[0].file.clone();
    let away = image.with_extension("away");
    std::fs::rename(&image, &away).unwrap();
    let error = tree.try_revert("a", 0).expect_err("no image");
    assert_eq!(error.code, Code::InvalidDomainSnapshot, "{error}");
    std::fs::rename(&away, &image).unwrap();
    tree.opened.guest.wait_ticks(3);
    tree.assert_all_can_be_reverted_to();
}

/// Damage in the middle of the stream shows only when QEMU loads it.
#[test]
fn failed_restore_of_memory_leaves_a_startable_domain() {
    only_when_thorough();
    if Daemon::version() >= (9, 9, 0) {
        skip("it is libvirt's own revert");
    }
    for transient in [false, true] {
        let plain = machine(&Binary::all()[0], 1);
        let machine = if transient { plain.transient() } else { plain };
        let mut tree = Tree::start(&machine, &virt::session(), Maker::Instant);
        tree.snapshot("a");
        tree.snapshot("b");
        let memory = tree.memory("a");
        let kept = tree.memory("kept");
        std::fs::copy(&memory, &kept).unwrap();
        // QEMU knows no section of this name.
        let whole = std::fs::read(&memory).unwrap();
        let name = whole.windows(5).position(|bytes| bytes == b"\x03ram\0").unwrap() as u64;
        OpenOptions::new()
            .write(true)
            .open(&memory)
            .unwrap()
            .write_all_at(b"\x03rax", name)
            .unwrap();
        let images = tree.images();
        let error = tree.try_revert("a", 0).expect_err("damaged");
        eprintln!("{:?} {error}", error.code);
        assert!(error.message.contains("virsh start"), "{error}");
        assert_eq!(images, tree.images());
        tree.assert_shape("a< b<a", Some("b"));
        tree.opened.guest.start_domain();
        tree.opened.guest.wait_ticks(3);
        std::fs::copy(&kept, &memory).unwrap();
        std::fs::remove_file(&kept).unwrap();
        tree.assert_all_can_be_reverted_to();
    }
}

#[test]
fn revert_removes_abandoned_overlays_and_keeps_snapshot_images() {
    let mut tree = start_with_two_snapshots(&virt::session());
    tree.snapshot("c");
    tree.revert("b");
    let images = tree.images();
    assert!(!images.iter().any(|image| image.ends_with(".c")), "{images:?}");
    // Each disk has its first image, an overlay for a, one for b, and the fresh one.
    assert_eq!(images.len(), 8, "{images:?}");
    tree.revert("b");
    assert_eq!(images.len(), tree.images().len());
    tree.opened.guest.virsh(
        "blockcopy",
        &["vda", &tree.memory("copy").display().to_string(), "--transient-job"],
    );
    common::assert_error(tree.try_revert("a", 0), Code::OperationInvalid, "block job");
    tree.opened.guest.virsh("blockjob", &["vda", "--abort"]);
    tree.assert_all_can_be_reverted_to();
}

#[test]
fn revert_keeps_stock_disk_snapshots() {
    only_when_thorough();
    let mut tree = start_with_two_snapshots(&virt::session());
    tree.opened.guest.virsh("snapshot-create-as", &["disks", "--disk-only"]);
    tree.snapshot("c");
    tree.assert_shape("a< b<a c<disks disks<b", Some("c"));
    tree.revert("a");
    tree.revert("c");
    tree.assert_shape("a< b<a c<disks disks<b", Some("c"));
    for name in ["b", "c", "a"] {
        tree.revert(name);
    }
    tree.assert_images_are_sound();
}

#[test]
fn revert_is_refused_with_a_managed_save_image() {
    only_when_thorough();
    let tree = start_with_two_snapshots(&virt::session());
    tree.opened.guest.virsh("managedsave", &[]);
    common::assert_error(tree.try_revert("a", 0), Code::OperationInvalid, "managed save");
    tree.opened.guest.start_domain();
    tree.opened.guest.wait_ticks(3);
    tree.assert_all_can_be_reverted_to();
}

/// The user is another running QEMU, or a shut off domain with an image that is based on them.
#[test]
fn revert_keeps_images_that_other_guests_use() {
    let mut tree = Tree::start(&machine(&Binary::all()[0], 2), &virt::session(), Maker::Instant);
    tree.snapshot("s");
    let guest = &tree.opened.guest;
    guest.virsh("destroy", &[]);
    let overlay = |index: usize| guest.directory().join(format!("disk-{index}.s"));
    let clone = guest.directory().join("clone.qcow2");
    make_image(&clone, Format::Qcow2, Some((&overlay(0), Format::Qcow2)));
    guest.daemon().give(guest.directory());
    // Another QEMU that writes to an image below the domain's would tear it.
    let frozen = guest.disks()[1].file.clone();
    let writer = OtherQemu::open(&frozen, false);
    common::assert_error(tree.try_revert("s", 0), Code::OperationInvalid, frozen.to_str().unwrap());
    drop(writer);
    let running = OtherQemu::open(&clone, true);
    tree.revert("s");
    drop(running);
    assert!(overlay(0).exists() && !overlay(1).exists(), "{:?}", tree.images());
}

/// Another client's block job, a replacing copy or a tool has changed the image, so memory would be
/// older than the disks.
#[test]
fn image_written_or_replaced_since_the_snapshot_is_refused_by_name() {
    let mut tree = Tree::start(&machine(&Binary::all()[0], 2), &virt::session(), Maker::Instant);
    tree.snapshot("s");
    let guest = &tree.opened.guest;
    let images: Vec<_> = guest.disks().iter().map(|disk| disk.file.clone()).collect();
    let refused = |image: &Path, change: &str| {
        let before = tree.opened.trace();
        let error = tree.try_revert("s", 0).expect_err("it would be torn");
        common::assert_says(
            &error,
            Code::SnapshotRevertRisky,
            &[image.to_str().unwrap(), change, "FORCE"],
        );
        tree.opened.assert_untouched(&before);
    };
    // A copy with the same content under the same name.
    let copy = images[1].with_extension("copy");
    let kept = images[1].with_extension("kept");
    std::fs::copy(&images[1], &copy).unwrap();
    guest.daemon().give(guest.directory());
    std::fs::rename(&images[1], &kept).unwrap();
    std::fs::rename(&copy, &images[1]).unwrap();
    refused(&images[1], "was replaced");
    guest.virsh("destroy", &[]);
    let error = tree.try_revert("s", 0).expect_err("it was replaced");
    common::assert_says(
        &error,
        Code::SnapshotRevertRisky,
        &[images[1].to_str().unwrap(), "was replaced"],
    );
    tree.try_revert("s", FORCE).unwrap();
    tree.assert_is_at("s");
    guest.virsh("destroy", &[]);
    std::fs::rename(&kept, &images[1]).unwrap();
    tree.revert("s");
    // The domain is on the image itself again, and writes to it.
    guest.virsh("blockcommit", &["vda", "--active", "--pivot", "--wait"]);
    guest.wait_ticks(3);
    refused(&images[0], "was written to");
    guest.virsh("destroy", &[]);
    let error = tree.try_revert("s", 0).expect_err("it was written to");
    common::assert_says(
        &error,
        Code::SnapshotRevertRisky,
        &[images[0].to_str().unwrap(), "was written to"],
    );
}

/// The notes of earlier versions have another XML namespace.
#[test]
fn notes_of_a_former_version_are_honoured_and_replaced() {
    const NAMESPACE: &str = "urn:instantsnap:notes:1";
    const FORMER: &str = "https://instantsnap.invalid/snapshot/1";
    let mut tree = Tree::start(&machine(&Binary::all()[0], 1), &virt::session(), Maker::Instant);
    tree.snapshot("s");
    let guest = &tree.opened.guest;
    let record = || guest.virsh("snapshot-dumpxml", &["s", "--security-info"]);
    let counts = || [NAMESPACE, FORMER].map(|namespace| record().matches(namespace).count());
    assert_eq!(counts(), [1, 0]);
    let former = guest.directory().join("former.xml");
    std::fs::write(&former, record().replace(NAMESPACE, FORMER)).unwrap();
    let former = former.to_str().unwrap();
    guest.virsh("snapshot-create", &[former, "--redefine", "--current"]);
    assert_eq!(counts(), [0, 1]);

    let image = guest.disks()[0].file.clone();
    let [copy, kept] = ["copy", "kept"].map(|end| image.with_extension(end));
    let refused = || {
        std::fs::copy(&image, &copy).unwrap();
        guest.daemon().give(guest.directory());
        std::fs::rename(&image, &kept).unwrap();
        std::fs::rename(&copy, &image).unwrap();
        let result = tree.try_revert("s", 0);
        std::fs::rename(&kept, &image).unwrap();
        common::assert_error(result, Code::SnapshotRevertRisky, "was replaced");
    };
    refused();
    assert_eq!(counts(), [0, 1]);
    tree.revert("s");
    // libvirt's own revert, which libvirt >= 9.9 has, keeps the notes as they are.
    let replaced = if Daemon::version() >= (9, 9, 0) { [0, 1] } else { [1, 0] };
    assert_eq!(counts(), replaced);
    refused();
    for flags in [&[][..], &["--inactive"]] {
        let xml = guest.virsh("dumpxml", flags);
        assert!(Daemon::version() >= (9, 9, 0) || !xml.contains("instantsnap"), "{xml}");
    }
    tree.delete("s", 0);
}

/// The notes that identify the image do not get into the domain's own XML either.
#[test]
fn image_merged_by_a_delete_is_accepted_by_a_later_revert() {
    let mut tree = start_with_two_snapshots(&virt::session());
    tree.snapshot("c");
    tree.try_delete("a", 0).unwrap();
    tree.revert("c");
    tree.try_delete("b", 0).unwrap();
    tree.revert("c");
    let frozen = |tree: &Tree| {
        let xml = tree.opened.guest.virsh("snapshot-dumpxml", &["c"]);
        let images: Vec<_> =
            tree.opened.guest.disks().iter().map(|disk| disk.file.clone()).collect();
        images.iter().all(|image| {
            xml.contains(&format!(
                "<instantsnap:image disk=\"vd{}\" file=\"{}\"",
                if *image == images[0] { 'a' } else { 'b' },
                image.display()
            ))
        })
    };
    assert!(frozen(&tree), "{}", tree.opened.guest.virsh("snapshot-dumpxml", &["c"]));
    for flags in [&[][..], &["--inactive"]] {
        let xml = tree.opened.guest.virsh("dumpxml", flags);
        assert!(Daemon::version() >= (9, 9, 0) || !xml.contains("instantsnap"), "{xml}");
    }
    // An image that was changed from outside stays refused.
    let image = tree.opened.guest.disks()[0].file.clone();
    tree.snapshot("d");
    tree.opened.guest.virsh("destroy", &[]);
    let file = OpenOptions::new().write(true).open(&image).unwrap();
    file.write_all_at(&[0], image.metadata().unwrap().len() - 1).unwrap();
    tree.try_delete("d", 0).unwrap();
    common::assert_error(
        tree.try_revert("c", 0),
        Code::SnapshotRevertRisky,
        image.to_str().unwrap(),
    );
}
