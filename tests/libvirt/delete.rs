// SPDX-License-Identifier: LGPL-2.1-or-later

//! Deleting snapshots with memory of domains of a stock libvirt.

use std::path::{Path, PathBuf};

use common::tree::{Maker, Tree};
use common::virt::OpenedDomain;
use common::{OtherQemu, machine, virt};
use instantsnap::error::Code;
use instantsnap::model::flags::delete::{CHILDREN, CHILDREN_ONLY, METADATA_ONLY};
use instantsnap_testkit::machine::make_image;
use instantsnap_testkit::{Binary, Daemon, Format, only_when_thorough, test};

/// a - b - c, and back to b, and on to d.
fn forked(daemon: &Daemon, maker: Maker) -> Tree {
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
fn a_leaf_that_the_domain_is_not_on_goes_with_its_files() {
    only_when_thorough();
    let tree = forked(&virt::session(), Maker::Instant);
    tree.delete("c", 0);
    tree.assert_shape("a< b<a d<b", Some("d"));
    assert!(!tree.images().iter().any(|image| image.ends_with(".c")), "{:?}", tree.images());
    tree.assert_all_can_be_reverted_to();
}

#[test]
fn the_current_leaf_is_merged() {
    let tree = forked(&virt::session(), Maker::Libvirt);
    tree.delete("d", 0);
    tree.assert_shape("a< b<a c<b", Some("b"));
    assert!(!tree.images().iter().any(|image| image.ends_with(".d")), "{:?}", tree.images());
    tree.assert_all_can_be_reverted_to();
}

/// libvirt >= 9.9 needs a current snapshot: another becomes that, and its record names the disks'
/// overlays anew.
#[test]
fn a_disk_that_was_left_out_stays_so_when_the_current_snapshot_is_deleted() {
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
fn one_with_several_children_goes_and_they_stay() {
    let tree = forked(&virt::session(), Maker::Instant);
    tree.delete("b", 0);
    tree.assert_shape("a< c<a d<a", Some("d"));
    tree.assert_all_can_be_reverted_to();
}

#[test]
fn a_root_is_merged_into_what_is_above() {
    only_when_thorough();
    let tree = forked(&virt::session(), Maker::Instant);
    tree.delete("a", 0);
    tree.assert_shape("b< c<b d<b", Some("d"));
    assert!(!tree.images().iter().any(|image| image.ends_with(".a")), "{:?}", tree.images());
    tree.assert_all_can_be_reverted_to();
}

#[test]
fn one_goes_with_all_that_came_after_it() {
    let tree = forked(&virt::session(), Maker::Libvirt);
    tree.delete("b", CHILDREN);
    tree.assert_shape("a<", Some("a"));
    tree.assert_all_can_be_reverted_to();
}

#[test]
fn all_go_and_the_domain_is_on_its_own_images_again() {
    only_when_thorough();
    let tree = forked(&virt::session(), Maker::Instant);
    tree.delete("a", CHILDREN);
    tree.assert_shape("", None);
    assert_eq!(tree.images(), ["disk-0.raw", "disk-1.qcow2"]);
    tree.assert_images_are_sound();
    tree.opened.guest.start_domain();
    tree.opened.guest.wait_ticks(3);
}

#[test]
fn only_the_children_go() {
    only_when_thorough();
    let tree = forked(&virt::session(), Maker::Instant);
    tree.delete("b", CHILDREN_ONLY);
    tree.assert_shape("a< b<a", Some("b"));
    tree.assert_all_can_be_reverted_to();
}

#[test]
fn the_current_one_goes_and_its_children_stay() {
    for daemon in virt::daemons() {
        let tree = forked(&daemon, Maker::Instant);
        tree.revert("b");
        tree.delete("b", 0);
        tree.assert_shape("a< c<a d<a", Some("a"));
        tree.assert_all_can_be_reverted_to();
    }
}

#[test]
fn the_current_root_goes_and_its_children_stay() {
    only_when_thorough();
    let tree = forked(&virt::session(), Maker::Instant);
    tree.revert("a");
    tree.delete("a", 0);
    assert_eq!(tree.shape(), "b< c<b d<b");
    // libvirt >= 9.9 must not be without a current one.
    assert_eq!(tree.current().is_some(), Daemon::version() >= (9, 9, 0));
    // libvirt's own revert lives with what is left.
    if Daemon::version() >= (9, 9, 0) {
        tree.opened.guest.virsh("snapshot-revert", &["c"]);
        tree.assert_is_at("c");
    }
    tree.assert_all_can_be_reverted_to();
}

#[test]
fn a_domain_that_is_shut_off_is_pruned_too() {
    only_when_thorough();
    for (name, flags, shape) in [
        ("a", 0, "b< c<b d<b"),
        ("b", 0, "a< c<a d<a"),
        ("d", 0, "a< b<a c<b"),
        ("b", CHILDREN, "a<"),
    ] {
        let tree = forked(&virt::session(), Maker::Instant);
        tree.opened.guest.virsh("destroy", &[]);
        tree.delete(name, flags);
        assert_eq!(tree.shape(), shape);
        tree.opened.guest.start_domain();
        tree.opened.guest.wait_ticks(3);
        tree.assert_all_can_be_reverted_to();
    }
}

#[test]
fn a_transient_domain_is_pruned_too() {
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
fn after_every_revert_and_snapshot_all_can_go_one_by_one() {
    only_when_thorough();
    let mut tree = forked(&virt::session(), Maker::Instant);
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
fn snapshots_of_somebody_else_stay_or_go_with_the_others() {
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
fn what_stands_in_the_way_is_said_and_nothing_is_changed() {
    let tree = forked(&virt::session(), Maker::Instant);
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

/// A delete that was cut short can be done again, and until then its snapshot cannot be reverted
/// to.
#[test]
fn a_delete_that_was_cut_short_can_be_done_again() {
    only_when_thorough();
    let tree = forked(&virt::session(), Maker::Instant);
    let memory = tree.memory("a");
    std::fs::rename(&memory, memory.with_extension("mem.deleting")).unwrap();
    common::assert_error(tree.try_revert("a", 0), Code::InvalidDomainSnapshot, "is missing");
    tree.delete("a", 0);
    assert!(!memory.with_extension("mem.deleting").exists());
    tree.assert_shape("b< c<b d<b", Some("d"));
    tree.assert_all_can_be_reverted_to();
}

#[test]
fn only_metadata_goes_and_the_others_stay_right() {
    let tree = forked(&virt::session(), Maker::Instant);
    tree.try_delete("b", METADATA_ONLY).unwrap();
    tree.assert_shape("a< c<a d<a", Some("d"));
    assert!(tree.memory("b").exists());
    tree.assert_all_can_be_reverted_to();
}

/// A domain with a disk `sda` that can be taken out, and its snapshot `s`.
fn with_scsi_disk() -> (Tree, PathBuf) {
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

/// `delete` is refused, naming the file, and nothing is changed; the metadata alone can go.
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
fn the_newest_data_of_a_disk_that_was_detached_is_never_deleted() {
    let (tree, overlay) = with_scsi_disk();
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
    // Where the domain has it again, it is merged.
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
fn the_newest_data_of_a_disk_that_was_detached_while_its_domain_was_off_is_never_deleted() {
    let (tree, overlay) = with_scsi_disk();
    tree.opened.guest.virsh("destroy", &[]);
    tree.opened.guest.virsh("detach-disk", &["sda", "--config"]);
    assert_delete_refused(&tree, &overlay, &["'sda'"]);
    // Another disk of that name is not it.
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
fn the_newest_data_of_a_disk_that_the_domain_only_had_while_it_ran_is_never_deleted() {
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
fn images_that_another_guest_has_open_or_stands_on_are_not_touched() {
    let (mut tree, overlay) = with_scsi_disk();
    tree.snapshot("t");
    let (daemon, directory) =
        (tree.opened.guest.daemon().clone(), tree.opened.guest.directory().to_owned());
    // Running: the domain's own QEMU has the image open, and so has another.
    let clone = overlay.with_file_name("clone.qcow2");
    make_image(&clone, Format::Qcow2, Some((&overlay, Format::Qcow2)));
    daemon.give(clone.parent().unwrap());
    let running = OtherQemu::open(&clone, false);
    assert_delete_refused(&tree, &overlay, &["another QEMU has it open"]);
    drop(running);
    // A domain that is shut off stands on it.
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
fn the_newest_data_of_a_detached_disk_outlives_a_revert_and_a_delete() {
    let (tree, overlay) = with_scsi_disk();
    tree.opened.guest.virsh("detach-disk", &["sda", "--live", "--config"]);
    let before = std::fs::read(&overlay).unwrap();
    let base = std::fs::read(overlay.with_extension("img")).unwrap();
    for _ in 0..2 {
        tree.revert("s");
        assert_delete_refused(&tree, &overlay, &["'sda'", "sda.s"]);
    }
    assert_eq!(std::fs::read(&overlay).unwrap(), before);
    assert_eq!(std::fs::read(overlay.with_extension("img")).unwrap(), base);
    // Where it is of no use, the snapshot goes, and the disk is on its own image again.
    std::fs::remove_file(&overlay).unwrap();
    tree.delete("s", 0);
    let images: Vec<_> = common::files_below(overlay.parent().unwrap());
    assert_eq!(images, [overlay.with_extension("img")]);
    assert_eq!(tree.images(), ["disk-0.raw"]);
}

/// Where branches have forked an image cannot take in what is above; when but one of them is left,
/// it does.
#[test]
fn when_the_last_snapshot_goes_no_overlay_is_left_and_the_domain_is_on_its_own_images() {
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
