// SPDX-License-Identifier: LGPL-2.1-or-later

//! Deletes snapshots with memory of domains of a stock libvirt.

use std::path::{Path, PathBuf};

use common::backend::by_client_only;
use common::tree::{Maker, Tree};
use common::virt::OpenedDomain;
use common::{OtherQemu, machine, virt};
use instantsnap::engine::{delete_managed, revert_managed};
use instantsnap::error::Code;
use instantsnap::model::flags::delete::{CHILDREN, CHILDREN_ONLY, METADATA_ONLY};
use instantsnap::model::flags::{DeleteFlags, RevertFlags};
use instantsnap_testkit::machine::make_image;
use instantsnap_testkit::{Binary, Daemon, Format, only_when_thorough, test};
use rustix::process::{Pid, Signal, kill_process};

/// A domain with snapshots a, b and c in a chain, which was then reverted to b and snapshotted as
/// d.
fn start_with_branches(daemon: &Daemon, maker: Maker) -> Tree {
    let mut tree = Tree::start(&machine(&Binary::all()[0], 2), daemon, maker);
    for name in ["a", "b", "c"] {
        tree.snapshot(name);
    }
    tree.revert("b");
    tree.snapshot("d");
    tree.assert_shape("a< b<a c<b d<b", Some("d"));
    tree
}

#[test]
fn delete_of_an_inactive_leaf_removes_its_files() {
    only_when_thorough();
    let tree = start_with_branches(&virt::session(), Maker::Instant);
    tree.delete("c", 0);
    tree.assert_shape("a< b<a d<b", Some("d"));
    assert!(!tree.images().iter().any(|image| image.ends_with(".c")), "{:?}", tree.images());
    tree.assert_all_can_be_reverted_to();
}

#[test]
fn delete_of_the_current_leaf_merges_it() {
    let tree = start_with_branches(&virt::session(), Maker::Libvirt);
    tree.delete("d", 0);
    tree.assert_shape("a< b<a c<b", Some("b"));
    assert!(!tree.images().iter().any(|image| image.ends_with(".d")), "{:?}", tree.images());
    tree.assert_all_can_be_reverted_to();
}

/// libvirt >= 9.9 needs a current snapshot. The library makes another snapshot the current one, and
/// writes the disks' new overlays into its record.
#[test]
fn delete_of_the_current_snapshot_keeps_excluded_disks_excluded() {
    let daemon = virt::session();
    let directory = tempfile::tempdir_in(daemon.directory().join("guests")).unwrap();
    let medium = directory.path().join("medium.iso");
    make_image(&medium, Format::Raw, None);
    for path in [directory.path(), &medium] {
        std::os::unix::fs::chown(path, Some(daemon.user()), Some(daemon.user())).unwrap();
    }
    let machine = machine(&Binary::all()[0], 1).cdrom(Some(&medium));
    let opened = OpenedDomain::start(&machine, &daemon);
    for name in ["s", "t"] {
        opened.snapshot(name).unwrap();
        opened.guest.wait_ticks(3);
    }
    opened.revert("s", 0).unwrap();
    opened.delete("s", 0).unwrap();
    let record = opened.guest.virsh("snapshot-dumpxml", &["t"]);
    let disks = record.split_once("<disks>").unwrap().1.split_once("</disks>").unwrap().0;
    assert_eq!(disks.matches("snapshot='external'").count(), 1, "{disks}");
    opened.revert("t", 0).unwrap();
    opened.guest.wait_ticks(3);
    let sources = opened.guest.virsh("domblklist", &[]);
    assert!(sources.contains(&format!(" {}\n", medium.display())), "{sources}");
}

#[test]
fn delete_of_a_snapshot_with_several_children_keeps_them() {
    let tree = start_with_branches(&virt::session(), Maker::Instant);
    tree.delete("b", 0);
    tree.assert_shape("a< c<a d<a", Some("d"));
    tree.assert_all_can_be_reverted_to();
}

#[test]
fn delete_of_a_root_merges_its_overlay() {
    only_when_thorough();
    let tree = start_with_branches(&virt::session(), Maker::Instant);
    tree.delete("a", 0);
    tree.assert_shape("b< c<b d<b", Some("d"));
    assert!(!tree.images().iter().any(|image| image.ends_with(".a")), "{:?}", tree.images());
    tree.assert_all_can_be_reverted_to();
}

#[test]
fn delete_with_children_removes_descendants() {
    let tree = start_with_branches(&virt::session(), Maker::Libvirt);
    tree.delete("b", CHILDREN);
    tree.assert_shape("a<", Some("a"));
    tree.assert_all_can_be_reverted_to();
}

#[test]
fn delete_of_all_snapshots_returns_the_domain_to_its_own_images() {
    only_when_thorough();
    let tree = start_with_branches(&virt::session(), Maker::Instant);
    tree.delete("a", CHILDREN);
    tree.assert_shape("", None);
    assert_eq!(tree.images(), ["disk-0.raw", "disk-1.qcow2"]);
    tree.assert_images_are_sound();
    tree.opened.guest.start_domain();
    tree.opened.guest.wait_ticks(3);
}

#[test]
fn delete_children_only_keeps_the_snapshot_itself() {
    only_when_thorough();
    let tree = start_with_branches(&virt::session(), Maker::Instant);
    tree.delete("b", CHILDREN_ONLY);
    tree.assert_shape("a< b<a", Some("b"));
    tree.assert_all_can_be_reverted_to();
}

#[test]
fn delete_of_the_current_snapshot_keeps_its_children() {
    for daemon in virt::daemons() {
        let tree = start_with_branches(&daemon, Maker::Instant);
        tree.revert("b");
        tree.delete("b", 0);
        tree.assert_shape("a< c<a d<a", Some("a"));
        tree.assert_all_can_be_reverted_to();
    }
}

#[test]
fn delete_of_the_current_root_keeps_its_children() {
    only_when_thorough();
    let tree = start_with_branches(&virt::session(), Maker::Instant);
    tree.revert("a");
    tree.delete("a", 0);
    assert_eq!(tree.shape(), "b< c<b d<b");
    // libvirt >= 9.9 requires a current snapshot.
    assert_eq!(tree.current().is_some(), Daemon::version() >= (9, 9, 0));
    // libvirt's own revert works on the remaining snapshots.
    if Daemon::version() >= (9, 9, 0) {
        tree.opened.guest.virsh("snapshot-revert", &["c"]);
        tree.assert_is_at("c");
    }
    tree.assert_all_can_be_reverted_to();
}

#[test]
fn delete_works_on_a_shut_off_domain() {
    only_when_thorough();
    for (name, flags, shape) in [
        ("a", 0, "b< c<b d<b"),
        ("b", 0, "a< c<a d<a"),
        ("d", 0, "a< b<a c<b"),
        ("b", CHILDREN, "a<"),
    ] {
        let tree = start_with_branches(&virt::session(), Maker::Instant);
        tree.opened.guest.virsh("destroy", &[]);
        tree.delete(name, flags);
        assert_eq!(tree.shape(), shape);
        tree.opened.guest.start_domain();
        tree.opened.guest.wait_ticks(3);
        tree.assert_all_can_be_reverted_to();
    }
}

#[test]
fn delete_works_on_a_transient_domain() {
    only_when_thorough();
    let mut tree =
        Tree::start(&machine(&Binary::all()[0], 1).transient(), &virt::session(), Maker::Instant);
    for name in ["a", "b", "c"] {
        tree.snapshot(name);
    }
    tree.delete("b", 0);
    tree.assert_shape("a< c<a", Some("c"));
    tree.revert("a");
    tree.delete("a", 0);
    assert_eq!(tree.shape(), "c<");
    tree.revert("c");
    tree.delete("c", 0);
    tree.assert_shape("", None);
    assert_eq!(tree.images(), ["disk-0.raw"]);
}

#[test]
fn delete_one_by_one_after_reverts_and_new_snapshots() {
    only_when_thorough();
    let mut tree = start_with_branches(&virt::session(), Maker::Instant);
    tree.revert("a");
    tree.snapshot("e");
    tree.revert("c");
    tree.snapshot("f");
    tree.assert_shape("a< b<a c<b d<b e<a f<c", Some("f"));
    for (name, shape) in [
        ("b", "a< c<a d<a e<a f<c"),
        ("a", "c< d< e< f<c"),
        ("c", "d< e< f<"),
        ("e", "d< f<"),
        ("f", "d<"),
    ] {
        tree.delete(name, 0);
        assert_eq!(tree.shape(), shape);
    }
    tree.assert_all_can_be_reverted_to();
    tree.opened.guest.start_domain();
    tree.delete("d", 0);
    tree.assert_images_are_sound();
}

#[test]
fn delete_handles_stock_disk_snapshots_in_the_tree() {
    only_when_thorough();
    let made = || {
        let mut tree =
            Tree::start(&machine(&Binary::all()[0], 1), &virt::session(), Maker::Instant);
        tree.snapshot("a");
        tree.opened.guest.virsh("snapshot-create-as", &["disks", "--disk-only"]);
        tree.snapshot("b");
        tree
    };
    let tree = made();
    tree.delete("a", 0);
    tree.assert_shape("b<disks disks<", Some("b"));
    tree.revert("b");

    let tree = made();
    tree.delete("b", 0);
    tree.assert_shape("a< disks<a", Some("disks"));
    tree.revert("a");
    tree.delete("a", CHILDREN_ONLY);
    tree.assert_shape("a<", Some("a"));
    tree.assert_all_can_be_reverted_to();

    let tree = made();
    tree.delete("a", CHILDREN);
    tree.assert_shape("", None);
    assert_eq!(tree.images(), ["disk-0.raw"]);
}

#[test]
fn delete_names_the_obstacle_and_changes_nothing() {
    let tree = start_with_branches(&virt::session(), Maker::Instant);
    let before = tree.opened.trace();
    common::assert_error(
        tree.try_delete("a", CHILDREN | CHILDREN_ONLY),
        Code::InvalidArg,
        "mutually exclusive",
    );
    common::assert_error(tree.try_delete("a", 1 << 9), Code::InvalidArg, "0x200");
    tree.opened.assert_untouched(&before);
    let copy = tree.memory("copy").display().to_string();
    tree.opened.guest.virsh("blockcopy", &["vda", &copy, "--transient-job"]);
    let files = common::files_below(tree.opened.guest.directory());
    assert!(tree.try_delete("d", 0).unwrap_err().message.contains("block job"));
    assert_eq!(files, common::files_below(tree.opened.guest.directory()));
    tree.opened.guest.virsh("blockjob", &["vda", "--abort"]);
    tree.assert_shape("a< b<a c<b d<b", Some("d"));
    tree.opened.guest.virsh("managedsave", &[]);
    let error = tree.try_delete("d", 0).unwrap_err();
    eprintln!("{error}");
    tree.opened.guest.start_domain();
    tree.assert_shape("a< b<a c<b d<b", Some("d"));
    tree.assert_all_can_be_reverted_to();
}

/// An interrupted delete can be repeated, and until then its snapshot cannot be reverted to.
#[test]
fn interrupted_delete_can_be_repeated() {
    only_when_thorough();
    let tree = start_with_branches(&virt::session(), Maker::Instant);
    let memory = tree.memory("a");
    std::fs::rename(&memory, memory.with_extension("mem.deleting")).unwrap();
    common::assert_error(tree.try_revert("a", 0), Code::InvalidDomainSnapshot, "is missing");
    tree.delete("a", 0);
    assert!(!memory.with_extension("mem.deleting").exists());
    tree.assert_shape("b< c<b d<b", Some("d"));
    tree.assert_all_can_be_reverted_to();
}

#[test]
fn delete_metadata_only_keeps_files_and_other_snapshots() {
    let tree = start_with_branches(&virt::session(), Maker::Instant);
    tree.try_delete("b", METADATA_ONLY).unwrap();
    tree.assert_shape("a< c<a d<a", Some("d"));
    assert!(tree.memory("b").exists());
    tree.assert_all_can_be_reverted_to();
}

/// A domain with a disk `sda` that can be detached, and its snapshot `s`.
fn start_with_scsi_disk() -> (Tree, PathBuf) {
    let daemon = virt::session();
    let directory =
        tempfile::Builder::new().prefix("disks-").tempdir_in(daemon.directory()).unwrap().keep();
    let image = directory.join("sda.img");
    make_image(&image, Format::Qcow2, None);
    daemon.give(&directory);
    let disk = format!(
        "<controller type='scsi' model='virtio-scsi'/><disk type='file' device='disk'><driver \
         name='qemu' type='qcow2'/><source file='{}'/><target dev='sda' bus='scsi'/></disk>",
        image.display()
    );
    let mut tree =
        Tree::start(&machine(&Binary::all()[0], 1).devices(&disk), &daemon, Maker::Instant);
    tree.snapshot("s");
    (tree, directory.join("sda.s"))
}

/// Asserts that `delete` is refused with the file's name, and that nothing is changed.
#[track_caller]
fn assert_delete_refused(tree: &Tree, file: &Path, parts: &[&str]) {
    let files = || {
        let mut files = common::files_below(tree.opened.guest.directory());
        files.extend(common::files_below(file.parent().unwrap()));
        files
    };
    let of_disk = format!("'{}.", file.with_extension("").display());
    let (before, shape) = (files(), tree.shape());
    for flags in [0, CHILDREN] {
        let error = tree.try_delete("s", flags).expect_err("this must be refused");
        common::assert_says(&error, Code::OperationInvalid, &[&of_disk, "nothing was changed"]);
        common::assert_says(&error, Code::OperationInvalid, parts);
        assert_eq!(files(), before);
        assert_eq!(tree.shape(), shape);
    }
}

#[test]
fn delete_keeps_the_newest_data_of_a_detached_disk() {
    let (tree, overlay) = start_with_scsi_disk();
    let guest = &tree.opened.guest;
    guest.virsh("detach-disk", &["sda", "--live", "--config"]);
    assert_delete_refused(
        &tree,
        &overlay,
        &["'sda'", "hold what was written to it last", "attach the disk"],
    );
    guest.wait_ticks(3);
    guest.virsh("destroy", &[]);
    assert_delete_refused(&tree, &overlay, &["'sda'"]);
    // It is merged once the domain has the disk again.
    guest.virsh(
        "attach-disk",
        &[overlay.to_str().unwrap(), "sda", "--config", "--subdriver", "qcow2"],
    );
    tree.delete("s", 0);
    assert!(!overlay.exists());
    let xml = guest.virsh("dumpxml", &["--inactive"]);
    assert!(xml.contains("sda.img") && !xml.contains("sda.s"), "{xml}");
    tree.assert_images_are_sound();
    guest.start_domain();
    guest.wait_ticks(3);
}

#[test]
fn delete_keeps_the_newest_data_of_a_disk_detached_while_shut_off() {
    let (tree, overlay) = start_with_scsi_disk();
    tree.opened.guest.virsh("destroy", &[]);
    tree.opened.guest.virsh("detach-disk", &["sda", "--config"]);
    assert_delete_refused(&tree, &overlay, &["'sda'"]);
    // Another disk of that name does not count.
    let other = overlay.with_file_name("other.qcow2");
    make_image(&other, Format::Qcow2, None);
    tree.opened.guest.virsh(
        "attach-disk",
        &[other.to_str().unwrap(), "sda", "--config", "--subdriver", "qcow2"],
    );
    assert_delete_refused(&tree, &overlay, &["'sda'"]);
    tree.try_delete("s", METADATA_ONLY).unwrap();
    assert!(overlay.exists());
}

#[test]
fn delete_keeps_the_newest_data_of_a_live_only_disk() {
    let daemon = virt::session();
    let controller = "<controller type='scsi' model='virtio-scsi'/>";
    let mut tree =
        Tree::start(&machine(&Binary::all()[0], 1).devices(controller), &daemon, Maker::Instant);
    let guest = &tree.opened.guest;
    let image = guest.directory().join("sdb.img");
    make_image(&image, Format::Qcow2, None);
    daemon.give(guest.directory());
    guest.virsh("attach-disk", &[image.to_str().unwrap(), "sdb", "--live", "--subdriver", "qcow2"]);
    tree.snapshot("s");
    tree.opened.guest.virsh("destroy", &[]);
    assert_delete_refused(&tree, &image.with_extension("s"), &["'sdb'"]);
}

#[test]
fn delete_does_not_touch_images_that_another_guest_uses() {
    let (mut tree, overlay) = start_with_scsi_disk();
    tree.snapshot("t");
    let (daemon, directory) =
        (tree.opened.guest.daemon().clone(), tree.opened.guest.directory().to_owned());
    // While the domain runs, both its own QEMU and another one have the image open.
    let clone = overlay.with_file_name("clone.qcow2");
    make_image(&clone, Format::Qcow2, Some((&overlay, Format::Qcow2)));
    daemon.give(clone.parent().unwrap());
    let running = OtherQemu::open(&clone, false);
    assert_delete_refused(&tree, &overlay, &["another QEMU has it open"]);
    drop(running);
    // A shut off domain uses an image that is based on it.
    let xml = format!(
        "<domain \
         type='qemu'><name>other</name><memory>1024</memory><os><type>hvm</type></os><devices><emulator>{}</emulator><disk \
         type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{}'/><target \
         dev='vda' bus='virtio'/></disk></devices></domain>",
        Binary::all()[0].emulator().display(),
        clone.display()
    );
    let file = directory.join("other.xml");
    std::fs::write(&file, xml).unwrap();
    daemon.virsh(&["define", file.to_str().unwrap()]);
    std::fs::remove_file(&file).unwrap();
    assert_delete_refused(&tree, &overlay, &["domain 'other' stands on it"]);
    tree.opened.guest.virsh("destroy", &[]);
    assert_delete_refused(&tree, &overlay, &["domain 'other' stands on it"]);
    let running = OtherQemu::open(&clone, false);
    daemon.virsh(&["undefine", "other"]);
    assert_delete_refused(&tree, &overlay, &["another QEMU has it open"]);
    drop(running);
    tree.delete("s", CHILDREN);
    assert!(!overlay.exists());
    std::fs::remove_file(&clone).unwrap();
    tree.assert_images_are_sound();
}

#[test]
fn newest_data_of_a_detached_disk_survives_reverts_and_deletes() {
    let (tree, overlay) = start_with_scsi_disk();
    tree.opened.guest.virsh("detach-disk", &["sda", "--live", "--config"]);
    let before = std::fs::read(&overlay).unwrap();
    let base = std::fs::read(overlay.with_extension("img")).unwrap();
    for _ in 0..2 {
        tree.revert("s");
        assert_delete_refused(&tree, &overlay, &["'sda'", "sda.s"]);
    }
    assert_eq!(std::fs::read(&overlay).unwrap(), before);
    assert_eq!(std::fs::read(overlay.with_extension("img")).unwrap(), base);
    // Where the overlay is gone anyway, the snapshot is deleted, and the disk is on its own image.
    std::fs::remove_file(&overlay).unwrap();
    tree.delete("s", 0);
    let images: Vec<_> = common::files_below(overlay.parent().unwrap());
    assert_eq!(images, [overlay.with_extension("img")]);
    assert_eq!(tree.images(), ["disk-0.raw"]);
}

/// An image on which several branches are based cannot take in any of their overlays. When one
/// branch is left, it can.
#[test]
fn delete_of_the_last_snapshot_leaves_no_overlay() {
    for off in [false, true] {
        let mut tree =
            Tree::start(&machine(&Binary::all()[0], 2), &virt::session(), Maker::Instant);
        tree.snapshot("a");
        tree.snapshot("b");
        tree.revert("a");
        if off {
            tree.opened.guest.virsh("destroy", &[]);
        }
        tree.delete("a", 0);
        assert_eq!(tree.shape(), "b<");
        tree.delete("b", 0);
        assert_eq!(tree.images(), ["disk-0.raw", "disk-1.qcow2"]);
        let xml = tree.opened.guest.virsh("dumpxml", &["--inactive"]);
        assert!(
            xml.contains("disk-0.raw") && xml.contains("disk-1.qcow2") && !xml.contains(".revert"),
            "{xml}"
        );
        tree.assert_images_are_sound();
        tree.opened.guest.start_domain();
        tree.opened.guest.wait_ticks(3);
    }
}

#[test(long)]
fn delete_and_revert_end_when_the_daemon_hangs() {
    by_client_only();
    let daemon = virt::session();
    let opened = OpenedDomain::start(&machine(&Binary::any()[0], 1), &daemon);
    opened.snapshot("s").unwrap();
    let before = opened.trace();
    let snapshot = opened.find("s").unwrap();
    let process = Pid::from_raw(daemon.pid() as i32).unwrap();
    kill_process(process, Signal::STOP).unwrap();
    std::thread::scope(|scope| {
        let delete = scope.spawn(|| delete_managed(&snapshot, DeleteFlags::parse(0).unwrap()));
        let revert = scope.spawn(|| revert_managed(&snapshot, RevertFlags::parse(0).unwrap()));
        for call in [delete, revert] {
            let error = call.join().unwrap().unwrap_err();
            assert_eq!(error.code, Code::OperationTimeout, "{error}");
        }
    });
    kill_process(process, Signal::CONT).unwrap();
    opened.assert_untouched(&before);
    opened.delete("s", 0).unwrap();
}
