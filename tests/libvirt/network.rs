// SPDX-License-Identifier: LGPL-2.1-or-later

//! Disks on network storage (`<disk type='network'>`), with a real NBD server: snapshots with a
//! named overlay are taken, undone, restored and deleted, and the guest finds everything that it
//! has written.

use instantsnap_testkit::test;
use std::process::Command;

use common::backend::by_client_only;
use common::nbd::NbdDomain;
use common::virt;
use common::{ALL_SECTORS, At, INSTANTLY, assert_says};
use instantsnap::engine::Phase;
use instantsnap::error::Code;
use instantsnap::model::flags::REUSE_EXT;

#[test]
fn network_disk_needs_a_named_overlay_and_supports_undo_and_delete() {
    let daemon = virt::session();
    let remote = NbdDomain::start(&daemon);
    let (opened, guest) = (&remote.opened, remote.guest());
    let before = opened.trace();
    let error = opened.create(&opened.xml("s", ""), INSTANTLY).expect_err("no overlay is named");
    assert_says(
        &error,
        Code::ConfigUnsupported,
        &["'vdb'", &remote.name(), "<source file='...'/>"],
    );
    opened.assert_untouched(&before);
    opened
        .create(
            &opened.xml("without", "<disks><disk name='vdb' snapshot='no'/></disks>"),
            INSTANTLY,
        )
        .unwrap();
    opened.delete("without", 0).unwrap();
    opened.assert_cancelled_without_a_trace(&remote.xml("cancelled"), INSTANTLY, 3);
    check_overlay_on_another_export_is_refused(&remote);
    guest.wait_ticks(ALL_SECTORS);
    remote.assert_on_server();
    // The snapshot is of the instant, and after its delete the guest still has all data. The same
    // holds for libvirt's own snapshot.
    for (name, flags) in [("instant", INSTANTLY), ("plain", 0)] {
        opened.create(&remote.xml(name), flags).unwrap();
        assert!(guest.virsh("domblklist", &[]).contains(remote.overlay(name).to_str().unwrap()));
        guest.wait_ticks(3);
        opened.delete(name, 0).unwrap();
        assert!(!remote.overlay(name).exists() && !opened.memory_file(name).exists());
        remote.assert_on_server();
        guest.wait_ticks(ALL_SECTORS);
    }
}

/// A precreated overlay that is based on another export of the same server is refused.
fn check_overlay_on_another_export_is_refused(remote: &NbdDomain) {
    by_client_only();
    let (overlay, another) =
        (remote.overlay("other"), remote.name().replace("/remote?", "/another?"));
    let create = [
        "create",
        "-q",
        "-u",
        "-f",
        "qcow2",
        "-F",
        "raw",
        "-b",
        &another,
        overlay.to_str().unwrap(),
        "16M",
    ];
    common::run("qemu-img", &create);
    let xml = remote.xml("other").replace("<disks>", "<disks><disk name='vda' snapshot='no'/>");
    let refused = remote.opened.create(&xml, INSTANTLY | REUSE_EXT).expect_err("on another image");
    assert!(
        refused.message.contains(&another) && refused.message.contains("make it anew"),
        "{refused}"
    );
    std::fs::remove_file(&overlay).unwrap();
}

/// The overlay's backing file name cannot express it: here, that the disk is a slice of the export.
#[test]
fn slice_of_a_network_disk_is_refused_and_can_be_excluded() {
    let daemon = virt::session();
    let remote = NbdDomain::start_with(
        &daemon,
        "<slices><slice type='storage' offset='0' size='16777216'/></slices>",
    );
    let (opened, guest) = (&remote.opened, remote.guest());
    let before = opened.trace();
    let parts = [
        "'vdb'",
        "'network'",
        "nbd",
        "snapshot='no'",
        "without VIR_DOMAIN_SNAPSHOT_CREATE_INSTANT",
        "<source file='...'/>",
    ];
    for xml in [opened.xml("s", ""), remote.xml("s")] {
        assert_says(
            &opened.create(&xml, INSTANTLY).expect_err("refused"),
            Code::ConfigUnsupported,
            &parts,
        );
    }
    opened.assert_untouched(&before);
    // The error recommends to exclude the disk, or to take libvirt's own snapshot.
    opened
        .create(
            &opened.xml("without", "<disks><disk name='vdb' snapshot='no'/></disks>"),
            INSTANTLY,
        )
        .unwrap();
    opened.create(&remote.xml("s"), 0).unwrap();
    guest.wait_ticks(3);
    // The snapshot is not deleted while its overlay holds data of the disk. The recommended
    // commands help.
    let (error, overlay) =
        (opened.delete("s", 0).expect_err("it cannot be merged"), remote.overlay("s"));
    let parts = [
        "'s'",
        "'vdb'",
        overlay.to_str().unwrap(),
        "virsh blockcommit",
        "remove the file",
        "delete the snapshot again",
    ];
    assert_says(&error, Code::OperationUnsupported, &parts);
    assert!(overlay.exists() && opened.memory_file("s").exists() && opened.find("s").is_some());
    guest.virsh("blockcommit", &["vdb", "--shallow", "--active", "--pivot", "--wait"]);
    std::fs::remove_file(&overlay).unwrap();
    opened.delete("s", 0).unwrap();
    opened.delete("without", 0).unwrap();
    remote.assert_on_server();
    guest.wait_ticks(ALL_SECTORS);
}

#[test(long)]
fn network_disk_can_be_reverted_and_its_snapshots_deleted_in_any_order() {
    let daemon = virt::session();
    let remote = NbdDomain::start(&daemon);
    let (opened, guest) = (&remote.opened, remote.guest());
    for name in ["s", "t", "u"] {
        opened.create(&remote.xml(name), INSTANTLY).unwrap();
        guest.wait_ticks(3);
    }
    // A clone or a guest that finds other numbers than it has written says TORN.
    opened.revert("t", 0).unwrap();
    guest.wait_ticks(3);
    opened.revert("s", 0).unwrap();
    guest.wait_ticks(ALL_SECTORS);
    // The delete has to merge images that the domain is not on, and the server accepts QEMU's
    // connection only.
    let error = opened.delete("t", 0).expect_err("qemu-img is not let in");
    assert_says(
        &error,
        Code::OperationTimeout,
        &[&remote.name(), "shut the domain off", "nothing was changed"],
    );
    guest.wait_ticks(3);
    guest.virsh("destroy", &[]);
    opened.delete("t", 0).unwrap();
    opened.revert("u", 0).unwrap();
    guest.wait_ticks(3);
    // Two overlays are merged into the server's image.
    opened.delete("s", 0).unwrap();
    guest.wait_ticks(3);
    opened.revert("u", 0).unwrap();
    guest.wait_ticks(3);
    opened.delete("u", 0).unwrap();
    remote.assert_on_server();
    guest.wait_ticks(ALL_SECTORS);
    guest.virsh("destroy", &[]);
    guest.start_domain();
    guest.wait_ticks(ALL_SECTORS);
}

#[test]
fn network_disk_can_be_reverted_and_deleted_while_shut_off() {
    let daemon = virt::session();
    let mut remote = NbdDomain::start(&daemon);
    remote.opened.create(&remote.xml("s"), INSTANTLY).unwrap();
    remote.guest().wait_ticks(3);
    remote.guest().virsh("destroy", &[]);
    // Where the server does not answer, the call is refused, and nothing is lost.
    remote.stop_server();
    let before = remote.guest().virsh("dumpxml", &["--inactive"]);
    for error in [remote.opened.delete("s", 0), remote.opened.revert("s", 0)] {
        let error = error.expect_err("there is no server");
        assert!(
            error.message.contains("cannot ask the server")
                && error.message.contains(&remote.name()),
            "{error}"
        );
    }
    assert_eq!(remote.guest().virsh("dumpxml", &["--inactive"]), before);
    assert!(remote.overlay("s").exists() && remote.opened.memory_file("s").exists());
    remote.start_server();
    // The other two are libvirt's own snapshots, whose overlays name the image in another way. The
    // last one is deleted without a revert.
    for (name, flags) in [("s", None), ("plain", Some(0)), ("deleted", Some(0))] {
        if let Some(flags) = flags {
            remote.opened.create(&remote.xml(name), flags).unwrap();
            remote.guest().wait_ticks(3);
            remote.guest().virsh("destroy", &[]);
        }
        if name != "deleted" {
            remote.opened.revert(name, 0).unwrap();
            remote.guest().wait_ticks(3);
            remote.guest().virsh("destroy", &[]);
        }
        remote.opened.delete(name, 0).unwrap();
        assert!(!remote.overlay(name).exists());
        remote.assert_on_server();
        remote.guest().start_domain();
        remote.guest().wait_ticks(ALL_SECTORS);
    }
}

#[test]
fn overlay_of_a_network_disk_is_merged_or_kept_when_qemu_ends() {
    by_client_only();
    let daemon = virt::session();
    let mut remote = NbdDomain::start(&daemon);
    let killed = |remote: &NbdDomain, name: &str| {
        let mut kill = At(|phase| {
            if phase == Phase::Drain {
                remote.guest().wait_ticks(3);
                remote.guest().kill();
            }
        });
        remote
            .opened
            .create_observed(&remote.xml(name), INSTANTLY, &mut kill)
            .expect_err("QEMU has ended")
    };
    killed(&remote, "s");
    assert!(!remote.overlay("s").exists());
    remote.assert_on_server();
    remote.guest().start_domain();
    remote.guest().wait_ticks(ALL_SECTORS);
    // The server is gone too, so the guest's data stays in the overlay.
    let (opened, guest) = (&remote.opened, remote.guest());
    let overlay = remote.overlay("t");
    let socket = remote.directory.path().join("nbd.sock");
    let aside = socket.with_extension("aside");
    let mut kill = At(|phase| {
        if phase == Phase::Drain {
            guest.wait_ticks(3);
            std::fs::rename(&socket, &aside).unwrap();
            guest.kill();
        }
    });
    let error =
        opened.create_observed(&remote.xml("t"), INSTANTLY, &mut kill).expect_err("QEMU has ended");
    for part in [overlay.to_str().unwrap(), "must not be removed", "qemu-img commit"] {
        assert!(error.message.contains(part), "{part:?} is not in {error}");
    }
    assert!(overlay.exists());
    std::fs::rename(&aside, &socket).unwrap();
    // The domain continues on the overlay.
    assert!(guest.virsh("dumpxml", &["--inactive"]).contains(overlay.to_str().unwrap()));
    guest.start_domain();
    guest.wait_ticks(ALL_SECTORS);
    remote.stop_server();
}

#[test]
fn network_disk_snapshot_can_be_restored_by_virsh_on_a_new_overlay() {
    let daemon = virt::session();
    let remote = NbdDomain::start(&daemon);
    let (opened, guest) = (&remote.opened, remote.guest());
    opened.create(&remote.xml("s"), INSTANTLY).unwrap();
    guest.wait_ticks(5);
    guest.virsh("destroy", &[]);
    let memory = opened.memory_file("s");
    let xml = daemon.virsh(&["save-image-dumpxml", memory.to_str().unwrap(), "--security-info"]);
    // Fresh overlays on both images, as the documentation says.
    let file = guest.disks()[0].file.display().to_string();
    let fresh = |name: &str| remote.directory.path().join(name);
    for (name, format, image) in [("vda", "qcow2", &file), ("vdb", "raw", &remote.name())] {
        let create = ["create", "-q", "-f", "qcow2", "-F", format, "-b", image];
        let output = Command::new("qemu-img").args(create).arg(fresh(name)).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        std::os::unix::fs::chown(fresh(name), Some(daemon.user()), Some(daemon.user())).unwrap();
    }
    let xml = xml.replace("<backingStore/>", "");
    let xml = xml.replace(
        &format!("<source file='{file}'"),
        &format!("<source file='{}'", fresh("vda").display()),
    );
    let (before, disk) = xml.split_once("<disk type='network'").expect("a disk on a server");
    let (driver, rest) = disk.split_once("<source ").unwrap();
    let (_, rest) = rest.split_once("</source>").unwrap();
    let driver = driver.replace("type='raw'", "type='qcow2'");
    let source = format!("<source file='{}'/>", fresh("vdb").display());
    let edited = fresh("edited.xml");
    std::fs::write(&edited, format!("{before}<disk type='file'{driver}{source}{rest}")).unwrap();
    daemon.virsh(&["restore", memory.to_str().unwrap(), "--xml", edited.to_str().unwrap()]);
    guest.wait_ticks(ALL_SECTORS);
}
