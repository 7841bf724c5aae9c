// SPDX-License-Identifier: LGPL-2.1-or-later

//! Which disks of a domain a snapshot includes, and on which overlays. Unsupported disks are
//! refused before anything is touched.

use std::path::{Path, PathBuf};
use std::process::Command;

use common::backend::{by_client_only, by_daemon};
use common::virt::{self, Clones, OpenedDomain, directory_for, with_driver};
use common::{ALL_SECTORS, At, INSTANTLY, Loop, run};
use instantsnap::engine::Phase;
use instantsnap::error::{Code, Error};
use instantsnap::model::flags::{NO_METADATA, REUSE_EXT};
use instantsnap_testkit::machine::make_image;
use instantsnap_testkit::{Binary, DEADLINE, Daemon, Format, Guest, Machine, test, wait_for};
use tempfile::TempDir;

fn machine(binary: &'static Binary) -> Machine {
    Machine::new(binary).disk(Format::Qcow2).disk(Format::Raw)
}

fn give(daemon: &Daemon, path: &Path) {
    std::os::unix::fs::chown(path, Some(daemon.user()), Some(daemon.user())).unwrap();
}

/// An image that the daemon's QEMU may use.
fn image_for(daemon: &Daemon, path: &Path, format: Format) -> PathBuf {
    make_image(path, format, None);
    give(daemon, path);
    path.to_owned()
}

/// The target and the active image of each disk.
fn sources(guest: &Guest) -> Vec<(String, String)> {
    let list = guest.virsh("domblklist", &[]);
    let row = |line: &str| {
        line.trim()
            .split_once(char::is_whitespace)
            .map(|(disk, file)| (disk.to_owned(), file.trim().to_owned()))
    };
    list.lines().filter_map(row).collect()
}

fn source(guest: &Guest, target: &str) -> String {
    let all = sources(guest);
    all.iter()
        .find(|(disk, _)| disk == target)
        .unwrap_or_else(|| panic!("no {target} in {all:?}"))
        .1
        .clone()
}

fn disks(xml: &str) -> String {
    format!("<disks>{xml}</disks>")
}

/// A `<disk>` with an overlay of the caller's choice.
fn disk_onto(target: &str, overlay: &Path) -> String {
    format!(
        "<disk name='{target}' snapshot='external'><source file='{}'/></disk>",
        overlay.display()
    )
}

/// Asserts that the request is refused before anything is created. The caller compares traces for
/// what is left.
#[track_caller]
fn assert_refused(
    opened: &OpenedDomain,
    xml: &str,
    flags: u32,
    code: Code,
    parts: &[&str],
) -> Error {
    let mut early = At(|phase| {
        assert!([Phase::Validate, Phase::Plan].contains(&phase), "{phase:?} is too late")
    });
    let error = opened.create_observed(xml, flags, &mut early).expect_err(xml);
    assert_eq!(error.code, code, "{error}");
    for part in parts {
        assert!(error.message.contains(part), "{part:?} is not in {error}");
    }
    error
}

#[test]
fn overlays_are_created_beside_their_images() {
    let daemon = virt::session();
    let clones = Clones::of(&daemon);
    let (one, other) = (directory_for(&daemon), directory_for(&daemon));
    let first = image_for(&daemon, &one.path().join("first.img"), Format::Raw);
    let second = image_for(&daemon, &other.path().join("second & 'last'.qcow2"), Format::Qcow2);
    let binary = &Binary::all()[0];
    let machine = Machine::new(binary)
        .disk_on(&first, Format::Raw)
        .disk_on(&second, Format::Qcow2)
        .disk(Format::Qcow2);
    let opened = OpenedDomain::start(&machine, &daemon);
    let name = format!("on-{}", binary.name);
    opened.snapshot(&name).unwrap();
    assert_eq!(Path::new(&source(&opened.guest, "vda")), one.path().join(format!("first.{name}")));
    assert_eq!(
        Path::new(&source(&opened.guest, "vdb")),
        other.path().join(format!("second & 'last'.{name}"))
    );
    assert_eq!(
        Path::new(&source(&opened.guest, "vdc")),
        opened.guest.disks()[2].file.with_extension(&name)
    );
    opened.guest.wait_ticks(3);
    // The kit does not unescape XML, so the second disk is checked in libvirt's output.
    let xml = daemon.virsh(&["save-image-dumpxml", opened.memory_file(&name).to_str().unwrap()]);
    assert!(xml.contains(&format!("<source file='{}", first.display())), "{xml}");
    assert!(xml.contains("second &amp; &apos;last&apos;.qcow2"), "{xml}");
    // The same names apply to a snapshot that fails.
    opened.assert_cancelled_without_a_trace(&opened.xml("cancelled", ""), INSTANTLY, 0);
    opened.guest.wait_ticks(ALL_SECTORS);
    drop(opened);
    let machine = Machine::new(binary).disk(Format::Qcow2).disk_on(&first, Format::Raw);
    let opened = OpenedDomain::start(&machine, &daemon);
    opened.snapshot("plain").unwrap();
    clones.check(&opened.guest, &opened.memory_file("plain"));
}

#[test]
fn default_overlay_names_are_libvirts() {
    let daemon = virt::session();
    let directory = directory_for(&daemon);
    std::fs::create_dir(directory.path().join("v1.2")).unwrap();
    give(&daemon, &directory.path().join("v1.2"));
    let mut machine = Machine::new(&Binary::all()[0]);
    for name in
        ["disk.qcow2", "nosuffix", "two.dots.img", "v1.2/nosuffix", "ends.", "white space.img"]
    {
        let image = image_for(&daemon, &directory.path().join(name), Format::Qcow2);
        machine = machine.disk_on(&image, Format::Qcow2);
    }
    let opened = OpenedDomain::start(&machine, &daemon);
    let rename = |all: &[(String, String)], from: &str, to: &str| {
        let other = |file: &str| {
            format!("{}{to}", file.strip_suffix(from).unwrap_or_else(|| panic!("{file}")))
        };
        all.iter().map(|(disk, file)| (disk.clone(), other(file))).collect::<Vec<_>>()
    };
    // libvirt's own snapshot, a merge, and the library's snapshot.
    opened.guest.virsh("snapshot-create-as", &["stock", "--disk-only"]);
    let stock = sources(&opened.guest);
    assert_eq!(stock.len(), 6);
    for (disk, _) in &stock {
        opened.guest.virsh("blockcommit", &[disk, "--active", "--pivot", "--wait"]);
    }
    opened.snapshot("ours").unwrap();
    assert_eq!(sources(&opened.guest), rename(&stock, "stock", "ours"));
    // The overlay's suffix is the snapshot's name, and the next snapshot replaces it.
    opened.snapshot("next.one").unwrap();
    assert_eq!(sources(&opened.guest), rename(&stock, "stock", "next.one"));
    opened.guest.virsh("snapshot-create-as", &["stock-too", "--disk-only"]);
    let again = sources(&opened.guest);
    opened.snapshot("ours-too").unwrap();
    let last = sources(&opened.guest);
    assert!(again[0].1.ends_with("disk.next.stock-too"), "{again:?}");
    assert!(last[0].1.ends_with("disk.next.ours-too"), "{last:?}");
    opened.guest.wait_ticks(3);
}

#[test]
fn overlays_with_equal_or_existing_paths_are_refused() {
    let daemon = virt::session();
    let directory = directory_for(&daemon);
    let at = |name: &str| directory.path().join(name);
    let first = image_for(&daemon, &at("a.img"), Format::Raw);
    let second = image_for(&daemon, &at("a.qcow2"), Format::Qcow2);
    let machine = Machine::new(&Binary::all()[0])
        .disk_on(&first, Format::Raw)
        .disk_on(&second, Format::Qcow2);
    let opened = OpenedDomain::start(&machine, &daemon);
    std::fs::write(at("taken"), "a user's file").unwrap();
    std::os::unix::fs::symlink(at("nowhere"), at("link")).unwrap();
    let before = opened.trace();
    let collide = ["'vda'", "'vdb'", "a.s", "give each its own"];
    assert_refused(&opened, &opened.xml("s", ""), INSTANTLY, Code::ConfigUnsupported, &collide);
    let same = disks(&(disk_onto("vda", &at("same")) + &disk_onto("vdb", &at("same"))));
    assert_refused(
        &opened,
        &opened.xml("s", &same),
        INSTANTLY,
        Code::ConfigUnsupported,
        &["give each its own"],
    );
    // The library creates the first of two overlays before it finds that the second exists, and
    // must remove the first.
    for taken in [at("taken"), at("link"), first.clone()] {
        let xml = opened.xml("s", &disks(&disk_onto("vdb", &taken)));
        let error = opened.create(&xml, INSTANTLY).expect_err("it exists");
        assert_eq!(error.code, Code::ConfigUnsupported, "{error}");
        for part in ["'vdb'", "already exists", taken.to_str().unwrap()] {
            assert!(error.message.contains(part), "{part:?} is not in {error}");
        }
    }
    opened.assert_untouched(&before);
    assert_eq!(std::fs::read(at("taken")).unwrap(), b"a user's file");
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 4);
    assert!(!at("nowhere").exists());
    opened.guest.wait_ticks(ALL_SECTORS);
    // With an explicit name for one of the two the snapshot succeeds.
    opened.create(&opened.xml("s", &disks(&disk_onto("vdb", &at("b.s")))), INSTANTLY).unwrap();
}

#[test]
fn readonly_and_empty_drives_are_excluded_and_unknown_disks_refused() {
    let daemon = virt::session();
    let clones = Clones::of(&daemon);
    let directory = directory_for(&daemon);
    let fixed = image_for(&daemon, &directory.path().join("fixed.img"), Format::Raw);
    let medium = image_for(&daemon, &directory.path().join("medium.iso"), Format::Raw);
    let binary = &Binary::all()[0];
    let machine = Machine::new(binary)
        .disk(Format::Qcow2)
        .cdrom(Some(&medium))
        .devices("<controller type='scsi' model='virtio-scsi'/>")
        .devices(&format!(
            "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{}'/>\
             <target dev='sda' bus='scsi'/><readonly/></disk><disk type='file' device='cdrom'>\
             <target dev='sdb' bus='scsi'/><readonly/></disk>",
            fixed.display()
        ));
    let opened = OpenedDomain::start(&machine, &daemon);
    opened.snapshot("s").unwrap();
    assert_eq!(
        source(&opened.guest, "vda"),
        opened.guest.disks()[0].file.with_extension("s").display().to_string()
    );
    assert_eq!(source(&opened.guest, "sda"), fixed.display().to_string());
    assert_eq!(source(&opened.guest, "hda"), medium.display().to_string());
    let xml = opened.guest.virsh("snapshot-dumpxml", &["s"]);
    for target in ["sda", "sdb", "hda"] {
        assert!(xml.contains(&format!("<disk name='{target}' snapshot='no'/>")), "{xml}");
    }
    let before = opened.trace();
    for target in ["sda", "hda"] {
        let xml = opened.xml("t", &disks(&disk_onto(target, &directory.path().join("overlay"))));
        assert_refused(&opened, &xml, INSTANTLY, Code::ConfigUnsupported, &["readonly", target]);
    }
    let unknown = opened.xml("t", &disks("<disk name='vdz'/>"));
    assert_refused(&opened, &unknown, INSTANTLY, Code::ConfigUnsupported, &["'vdz'", "vda"]);
    let twice = opened.xml("t", &disks("<disk name='vda'/><disk name='vda'/>"));
    assert_refused(&opened, &twice, INSTANTLY, Code::XmlError, &["'vda'", "twice"]);
    opened.assert_untouched(&before);
    opened.guest.wait_ticks(3);
    clones.check(&opened.guest, &opened.memory_file("s"));
}

#[test]
fn excluded_disk_stays_on_its_image() {
    let daemon = virt::session();
    // The guest checks what it writes. It must not write to a disk outside the snapshot, or a clone
    // would find other data there.
    let machine = machine(&Binary::all()[0]).disk_attributes("snapshot='no'").append("nodisk=1");
    let opened = OpenedDomain::start(&machine, &daemon);
    let guest = &opened.guest;
    let image = |n: usize| guest.disks()[n].file.display().to_string();
    let overlay =
        |n: usize, name: &str| guest.disks()[n].file.with_extension(name).display().to_string();
    let now = || (source(guest, "vda"), source(guest, "vdb"));
    opened.snapshot("domains-wish").unwrap();
    assert_eq!(now(), (overlay(0, "domains-wish"), image(1)));
    let also = opened.xml("also", &disks("<disk name='vdb' snapshot='external'/>"));
    opened.create(&also, INSTANTLY).unwrap();
    assert_eq!(now(), (overlay(0, "also"), overlay(1, "also")));
    // By its target, or by its image.
    let by_image = format!("<disk name='{}' snapshot='no'/>", overlay(0, "also"));
    for (n, out) in ["<disk name='vda' snapshot='no'/>", &by_image].into_iter().enumerate() {
        let name = format!("out-{n}");
        opened.create(&opened.xml(&name, &disks(out)), INSTANTLY).unwrap();
        assert_eq!(now(), (overlay(0, "also"), overlay(1, "also")));
        let xml = guest.virsh("snapshot-dumpxml", &[&name]);
        assert!(
            xml.contains("<disk name='vda' snapshot='no'/>")
                && xml.contains("<disk name='vdb' snapshot='no'/>"),
            "{xml}"
        );
    }
    // A snapshot of memory only, without a record.
    let out = "<disk name='vda' snapshot='no'/><disk name='vdb' snapshot='no'/>";
    opened.create(&opened.xml("memory", &disks(out)), INSTANTLY | NO_METADATA).unwrap();
    guest.wait_ticks(3);
    for wish in ["internal", "manual"] {
        let xml = opened.xml("x", &disks(&format!("<disk name='vda' snapshot='{wish}'/>")));
        assert_refused(
            &opened,
            &xml,
            INSTANTLY,
            Code::OperationUnsupported,
            &["'vda'", wish, "external"],
        );
    }
}

/// Creates an overlay as a caller with REUSE_EXT does.
fn precreated_overlay(opened: &OpenedDomain, disk: usize, name: &str) -> PathBuf {
    let (daemon, disk) = (opened.guest.daemon(), &opened.guest.disks()[disk]);
    let overlay = opened.guest.directory().join(name);
    let create = [
        "create",
        "-q",
        "-u",
        "-f",
        "qcow2",
        "-F",
        disk.format.name(),
        "-b",
        disk.file.to_str().unwrap(),
    ];
    run("qemu-img", &[&create[..], &[overlay.to_str().unwrap(), "16M"]].concat());
    give(daemon, &overlay);
    overlay
}

#[test]
fn reuse_ext_uses_the_callers_overlays_and_never_removes_them() {
    by_client_only();
    let daemon = virt::session();
    let clones = Clones::of(&daemon);
    let binary = &Binary::all()[0];
    let opened = OpenedDomain::start(&machine(binary), &daemon);
    let guest = &opened.guest;
    let (first, second) =
        (precreated_overlay(&opened, 0, "own-0"), precreated_overlay(&opened, 1, "own-1"));
    let both = disks(&(disk_onto("vda", &first) + &disk_onto("vdb", &second)));
    let flags = INSTANTLY | REUSE_EXT;
    let before = opened.trace();

    let missing = guest.directory().join("missing");
    let not_qcow2 = guest.directory().join("tick.elf");
    for (file, part) in [(&missing, "No such file"), (&not_qcow2, "is no qcow2 image")] {
        let xml = opened.xml("s", &disks(&(disk_onto("vda", &first) + &disk_onto("vdb", file))));
        let error = opened.create(&xml, flags).expect_err(part);
        assert_eq!(error.code, Code::ConfigUnsupported, "{error}");
        for part in ["'vdb'", "which is to be reused", part, file.to_str().unwrap()] {
            assert!(error.message.contains(part), "{part:?} is not in {error}");
        }
    }
    // REUSE_EXT applies to generated names too.
    opened.create(&opened.xml("s", ""), flags).expect_err("there are none of these names");
    opened.assert_untouched(&before);
    opened.assert_cancelled_without_a_trace(&opened.xml("s", &both), flags, 5);
    assert!(first.exists() && second.exists());
    guest.wait_ticks(ALL_SECTORS);

    // The cancelled snapshot has left data in the overlays, so REUSE_EXT needs fresh ones.
    let error = opened.create(&opened.xml("s", &both), flags).expect_err("they have content");
    assert!(
        error.message.contains("has content already") && error.message.contains("make it anew"),
        "{error}"
    );
    let (first, second) =
        (precreated_overlay(&opened, 0, "fresh-0"), precreated_overlay(&opened, 1, "fresh-1"));
    let both = disks(&(disk_onto("vda", &first) + &disk_onto("vdb", &second)));
    opened.create(&opened.xml("s", &both), flags).unwrap();
    assert_eq!(
        (source(guest, "vda"), source(guest, "vdb")),
        (first.display().to_string(), second.display().to_string())
    );
    guest.wait_ticks(3);
    clones.check(guest, &opened.memory_file("s"));
    guest.wait_ticks(ALL_SECTORS);
}

/// A loop device that QEMU's user owns.
fn loop_on(daemon: &Daemon, file: &Path) -> Loop {
    let device = Loop::on(file);
    give(daemon, Path::new(&device.0));
    device
}

#[test]
fn block_device_gets_the_named_overlay() {
    for daemon in virt::daemons() {
        let clones = Clones::of(&daemon);
        let directory = directory_for(&daemon);
        let file = image_for(&daemon, &directory.path().join("backing"), Format::Raw);
        let device = loop_on(&daemon, &file);
        let machine = Machine::new(&Binary::all()[0])
            .disk_on(Path::new(&device.0), Format::Raw)
            .disk(Format::Qcow2);
        let opened = OpenedDomain::start(&machine, &daemon);
        let before = opened.trace();
        let parts = ["'vda'", &device.0, "<source file='...'/>"];
        assert_refused(&opened, &opened.xml("s", ""), INSTANTLY, Code::ConfigUnsupported, &parts);
        let xml =
            |name: &str| opened.xml(name, &disks(&disk_onto("vda", &directory.path().join(name))));
        opened.assert_untouched(&before);
        opened.assert_cancelled_without_a_trace(&xml("cancelled"), INSTANTLY, 3);
        opened.guest.wait_ticks(ALL_SECTORS);
        opened.create(&xml("s"), INSTANTLY).unwrap();
        assert_eq!(Path::new(&source(&opened.guest, "vda")), directory.path().join("s"));
        opened.guest.wait_ticks(3);
        // The clone shares the device. Where its daemon uses another user, libvirt changes the
        // device's owner.
        clones.check(&opened.guest, &opened.memory_file("s"));
        opened.guest.wait_ticks(3);
    }
}

/// Asserts that the domain's definition has the device, with the disk type that matches it.
#[track_caller]
fn assert_on_device(guest: &Guest, device: &str) {
    let xml = guest.virsh("dumpxml", &["--inactive"]);
    assert!(
        xml.contains("<disk type='block'") && xml.contains(&format!("<source dev='{device}'")),
        "{xml}"
    );
    assert!(!xml.contains(&format!("file='{device}'")), "{xml}");
}

#[test]
fn block_device_keeps_its_type_after_deletes_reverts_and_undo() {
    let daemon = virt::session();
    let directory = directory_for(&daemon);
    let file = image_for(&daemon, &directory.path().join("backing"), Format::Raw);
    let device = loop_on(&daemon, &file);
    let machine = Machine::new(&Binary::all()[0]).disk_on(Path::new(&device.0), Format::Raw);
    let opened = OpenedDomain::start(&machine, &daemon);
    let guest = &opened.guest;
    let xml =
        |name: &str| opened.xml(name, &disks(&disk_onto("vda", &directory.path().join(name))));
    let start_again = || {
        guest.start_domain();
        guest.wait_ticks(2);
    };
    // A delete while the domain is off merges the overlay into the device.
    opened.create(&xml("s"), INSTANTLY).unwrap();
    guest.virsh("destroy", &[]);
    opened.delete("s", 0).unwrap();
    assert_on_device(guest, &device.0);
    start_again();
    // Three snapshots are reverted to and deleted.
    for name in ["a", "b", "c"] {
        opened.create(&xml(name), INSTANTLY).unwrap();
        guest.wait_ticks(2);
    }
    for name in ["b", "a"] {
        opened.revert(name, 0).unwrap();
        guest.wait_ticks(2);
    }
    for name in ["c", "b"] {
        opened.delete(name, 0).unwrap();
    }
    let record = guest.virsh("snapshot-dumpxml", &["a"]);
    assert!(!record.contains(&format!("file='{}'", device.0)), "{record}");
    guest.virsh("destroy", &[]);
    opened.delete("a", 0).unwrap();
    assert_on_device(guest, &device.0);
    start_again();
    // QEMU ends at the instant: the library merges the overlay and restores the definition.
    if !by_daemon() {
        let mut kill = At(|phase| {
            if phase == Phase::Drain {
                guest.kill();
            }
        });
        opened.create_observed(&xml("killed"), INSTANTLY, &mut kill).expect_err("QEMU has ended");
        assert_on_device(guest, &device.0);
        start_again();
    }
}

#[test]
fn empty_drive_can_be_excluded_and_cannot_have_an_overlay() {
    let daemon = virt::session();
    let machine = Machine::new(&Binary::all()[0])
        .disk(Format::Qcow2)
        .cdrom(None)
        .devices("<disk type='file' device='floppy'><target dev='fda' bus='fdc'/></disk>");
    let opened = OpenedDomain::start(&machine, &daemon);
    let empty = disks("<disk name='hda' snapshot='no'/><disk name='fda' snapshot='no'/>");
    opened.create(&opened.xml("s", &empty), INSTANTLY).unwrap();
    // The XML that libvirt prints is accepted as a request, under another name.
    let again = opened.guest.virsh("snapshot-dumpxml", &["s"]);
    let (again, _) = again.split_once("<domain ").unwrap();
    let again = again.replace(
        &opened.memory_file("s").display().to_string(),
        &opened.memory_file("t").display().to_string(),
    );
    let again = again
        .replace("<name>s</name>", "<name>t</name>")
        .replace("disk.s'", "disk.t'")
        .replace(".s'/>", ".t'/>");
    opened.create(&format!("{again}</domainsnapshot>"), INSTANTLY).unwrap();
    let before = opened.trace();
    for (target, wish) in [("hda", "external"), ("fda", "external")] {
        let xml = opened.xml("u", &disks(&format!("<disk name='{target}' snapshot='{wish}'/>")));
        assert_refused(&opened, &xml, INSTANTLY, Code::ConfigUnsupported, &[target, "no medium"]);
    }
    opened.assert_untouched(&before);
    opened.guest.wait_ticks(2);
}

/// A `<disk>` with an overlay on a block device.
fn disk_onto_device(target: &str, device: &Loop) -> String {
    format!(
        "<disk name='{target}' snapshot='external' type='block'><source dev='{}'/></disk>",
        device.0
    )
}

/// An empty file of this daemon's user.
fn empty_file(daemon: &Daemon, path: &Path) -> PathBuf {
    std::fs::write(path, "").unwrap();
    give(daemon, path);
    path.to_owned()
}

/// Kills QEMU while memory is saved, so that the library merges the overlays.
fn kill_qemu_in_the_drain(opened: &OpenedDomain, xml: &str, flags: u32) {
    let mut kill = At(|phase| {
        if phase == Phase::Drain {
            opened.guest.wait_ticks(3);
            opened.guest.kill();
        }
    });
    opened.create_observed(xml, flags, &mut kill).expect_err("QEMU has ended");
    opened.guest.start_domain();
    opened.guest.wait_ticks(ALL_SECTORS);
}

#[test]
fn precreated_empty_overlay_is_used_and_emptied_again_by_undo() {
    let daemon = virt::session();
    let clones = Clones::of(&daemon);
    let directory = directory_for(&daemon);
    let opened = OpenedDomain::start(&machine(&Binary::all()[0]), &daemon);
    let guest = &opened.guest;
    let (empty, other) = (directory.path().join("empty"), directory.path().join("other"));
    let (empty, other) = (empty_file(&daemon, &empty), empty_file(&daemon, &other));
    let link = directory.path().join("link");
    std::os::unix::fs::symlink(&other, &link).unwrap();
    let xml = |name: &str| {
        opened.xml(name, &disks(&(disk_onto("vda", &empty) + &disk_onto("vdb", &link))))
    };
    if by_daemon() {
        // The daemon would open it with its own privileges.
        let error = opened.create(&xml("s"), INSTANTLY).expect_err("it exists");
        for part in [
            "'vda'",
            "already exists",
            "inside the daemon",
            empty.to_str().unwrap(),
            "name another",
        ] {
            assert!(error.message.contains(part), "{part:?} is not in {error}");
        }
        assert_eq!(std::fs::read(&empty).unwrap(), b"");
        return;
    }
    let assert_empty = || {
        assert_eq!(
            (std::fs::read(&empty).unwrap(), std::fs::read(&other).unwrap()),
            (vec![], vec![])
        );
    };
    opened.assert_cancelled_without_a_trace(&xml("cancelled"), INSTANTLY, 5);
    assert_empty();
    // The second overlay is refused after the first has been created.
    let taken = directory.path().join("taken");
    std::fs::write(&taken, "a user's file").unwrap();
    let both = opened.xml("s", &disks(&(disk_onto("vda", &empty) + &disk_onto("vdb", &taken))));
    let parts = ["'vdb'", "already exists", "neither empty nor a block device", "REUSE_EXT"];
    opened.assert_fails(&both, INSTANTLY, Code::ConfigUnsupported, &parts);
    assert_empty();
    guest.wait_ticks(ALL_SECTORS);
    kill_qemu_in_the_drain(&opened, &xml("killed"), INSTANTLY);
    assert_empty();
    opened.create(&xml("s"), INSTANTLY).unwrap();
    assert_eq!(source(guest, "vda"), empty.display().to_string());
    guest.wait_ticks(3);
    clones.check(guest, &opened.memory_file("s"));
    // A file that holds the guest's data now is not accepted as an overlay again.
    let again = opened.xml(
        "t",
        &disks(&(disk_onto("vda", &directory.path().join("t")) + &disk_onto("vdb", &empty))),
    );
    let error = opened.create(&again, INSTANTLY).expect_err("it is in use");
    assert!(error.message.contains("is an image of disk 'vda'"), "{error}");
    opened.revert("s", 0).unwrap();
    guest.wait_ticks(3);
    opened.delete("s", 0).unwrap();
    guest.wait_ticks(ALL_SECTORS);
    // A newer libvirt reverts by itself, and removes the link, not the file that the link points
    // to.
    let is_gone = |overlay: &Path| std::fs::symlink_metadata(overlay).is_err();
    assert!(is_gone(&empty) && (is_gone(&other) || is_gone(&link)), "an overlay is left");
}

#[test]
fn block_device_can_be_an_overlay_and_is_not_removed() {
    for daemon in virt::daemons() {
        let clones = Clones::of(&daemon);
        let directory = directory_for(&daemon);
        let backing = |name: &str| {
            let file = directory.path().join(name);
            std::fs::File::create(&file).unwrap().set_len(32 << 20).unwrap();
            loop_on(&daemon, &file)
        };
        let (first, second) = (backing("first"), backing("second"));
        let opened = OpenedDomain::start(&machine(&Binary::all()[0]), &daemon);
        let guest = &opened.guest;
        let xml = |name: &str, on: &Loop| {
            let overlay = directory.path().join(format!("vdb.{name}"));
            opened.xml(name, &disks(&(disk_onto_device("vda", on) + &disk_onto("vdb", &overlay))))
        };
        if by_daemon() {
            let error = opened.create(&xml("s", &first), INSTANTLY).expect_err("it exists");
            for part in ["'vda'", "already exists", "inside the daemon", &first.0] {
                assert!(error.message.contains(part), "{part:?} is not in {error}");
            }
            return;
        }
        opened.assert_cancelled_without_a_trace(&xml("cancelled", &first), INSTANTLY, 5);
        guest.wait_ticks(ALL_SECTORS);
        kill_qemu_in_the_drain(&opened, &xml("killed", &first), INSTANTLY);
        let no_device = opened.xml(
            "s",
            &disks(&format!(
                "<disk name='vda' type='block'><source dev='{}'/></disk>",
                guest.disks()[1].file.display()
            )),
        );
        let error = opened.create(&no_device, INSTANTLY).expect_err("it is a file");
        assert!(
            error.message.contains("'vda'") || error.message.contains("image of disk"),
            "{error}"
        );

        opened.create(&xml("s", &first), INSTANTLY).unwrap();
        assert_eq!(source(guest, "vda"), first.0);
        assert!(
            guest.virsh("dumpxml", &["--inactive"]).contains(&format!("<source dev='{}'", first.0))
        );
        guest.wait_ticks(3);
        clones.check(guest, &opened.memory_file("s"));
        // The second overlay is based on the first, which is an image now and cannot be another
        // snapshot's overlay.
        opened.create(&xml("t", &second), INSTANTLY).unwrap();
        guest.wait_ticks(3);
        clones.check(guest, &opened.memory_file("t"));
        opened.revert("s", 0).unwrap();
        guest.wait_ticks(3);
        let error = opened.create(&xml("u", &first), INSTANTLY).expect_err("t is on it");
        for part in ["'vda'", &first.0, "image of snapshot 't'"] {
            assert!(error.message.contains(part), "{part:?} is not in {error}");
        }
        opened.delete("t", 0).unwrap();
        guest.wait_ticks(3);
        // No overlay is based on it any more.
        opened.create(&xml("u", &first), INSTANTLY).unwrap();
        guest.wait_ticks(3);
        opened.delete("s", 0).unwrap();
        guest.wait_ticks(3);
        opened.revert("u", 0).unwrap();
        guest.wait_ticks(3);
        guest.virsh("destroy", &[]);
        opened.delete("u", 0).unwrap();
        guest.start_domain();
        guest.wait_ticks(ALL_SECTORS);
        for device in [&first, &second] {
            // An overlay that is no longer needed has no qcow2 header any more.
            let info = run("qemu-img", &["info", "-U", &device.0]);
            assert!(info.contains("file format: raw"), "{info}");
        }
    }
}

#[test]
fn reuse_ext_overlay_on_a_block_device_is_not_touched_by_undo() {
    by_client_only();
    let daemon = virt::session();
    let clones = Clones::of(&daemon);
    let directory = directory_for(&daemon);
    let file = directory.path().join("backing");
    std::fs::File::create(&file).unwrap().set_len(32 << 20).unwrap();
    let device = loop_on(&daemon, &file);
    let opened = OpenedDomain::start(&Machine::new(&Binary::all()[0]).disk(Format::Qcow2), &daemon);
    let guest = &opened.guest;
    let image = guest.disks()[0].file.clone();
    let make = || {
        let create =
            ["create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", image.to_str().unwrap()];
        run("qemu-img", &[&create[..], &[&device.0, "16M"]].concat());
    };
    let (xml, flags) = (
        |name: &str| opened.xml(name, &disks(&disk_onto_device("vda", &device))),
        INSTANTLY | REUSE_EXT,
    );
    opened.assert_fails(
        &xml("s"),
        flags,
        Code::ConfigUnsupported,
        &["'vda'", "is no qcow2 image", "qemu-img create"],
    );
    make();
    opened.assert_cancelled_without_a_trace(&xml("cancelled"), flags, 5);
    guest.wait_ticks(ALL_SECTORS);
    // It has what the guest wrote before the cancelling, which the guest must not see again.
    let parts =
        ["'vda'", "has content already", "make it anew: qemu-img create -f qcow2 -F qcow2 -b"];
    opened.assert_fails(&xml("s"), flags, Code::ConfigUnsupported, &parts);
    make();
    kill_qemu_in_the_drain(&opened, &xml("killed"), flags);
    make();
    opened.create(&xml("s"), flags).unwrap();
    assert_eq!(source(guest, "vda"), device.0);
    guest.wait_ticks(3);
    clones.check(guest, &opened.memory_file("s"));
    opened.revert("s", 0).unwrap();
    guest.wait_ticks(3);
    opened.delete("s", 0).unwrap();
    guest.wait_ticks(ALL_SECTORS);
    assert!(Path::new(&device.0).exists());
}

#[test]
fn encrypted_disk_is_refused_and_can_be_excluded() {
    let daemon = virt::session();
    // This driver of libvirt keeps the key.
    with_driver(&daemon, "libvirt_driver_secret.so");
    let directory = directory_for(&daemon);
    let (image, secret) = (directory.path().join("luks"), directory.path().join("secret.xml"));
    let uuid = "11111111-2222-3333-4444-555555555555";
    std::fs::write(
        &secret,
        format!("<secret ephemeral='no' private='no'><uuid>{uuid}</uuid></secret>"),
    )
    .unwrap();
    daemon.virsh(&["secret-define", secret.to_str().unwrap()]);
    std::fs::write(&secret, "c2VjcmV0").unwrap();
    daemon.virsh(&["secret-set-value", uuid, "--file", secret.to_str().unwrap()]);
    let create = [
        "create",
        "-q",
        "--object",
        "secret,id=k,data=secret",
        "-f",
        "luks",
        "-o",
        "key-secret=k,iter-time=10",
    ];
    // qemu-img benchmarks its key derivation, and fails where a busy machine does not allow a
    // result.
    let created = wait_for(DEADLINE, || {
        let output = Command::new("qemu-img").args(create).arg(&image).arg("16M").output().unwrap();
        output.status.success().then_some(())
    });
    created.expect("no encrypted image");
    give(&daemon, &image);
    let machine = machine(&Binary::all()[0])
        .devices("<controller type='scsi' model='virtio-scsi'/>")
        .devices(&format!(
            "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source \
         file='{}'><encryption format='luks'><secret type='passphrase' \
         uuid='{uuid}'/></encryption></source><target dev='sda' bus='scsi'/></disk>",
            image.display()
        ));
    let opened = OpenedDomain::start(&machine, &daemon);
    let before = opened.trace();
    assert_refused(
        &opened,
        &opened.xml("s", ""),
        INSTANTLY,
        Code::ConfigUnsupported,
        &["'sda'", "encrypted"],
    );
    opened.assert_untouched(&before);
    opened.create(&opened.xml("s", &disks("<disk name='sda' snapshot='no'/>")), INSTANTLY).unwrap();
    opened.guest.wait_ticks(3);
}

#[test]
fn disks_that_libvirt_would_refuse_in_the_pause_are_refused_in_the_plan() {
    by_client_only();
    let daemon = virt::session();
    let directory = directory_for(&daemon);
    let shared = image_for(&daemon, &directory.path().join("shared.raw"), Format::Raw);
    let disk = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='raw' cache='none'/><source \
         file='{}'/><target dev='vdz' bus='virtio'/><shareable/></disk>",
        shared.display()
    );
    let opened = OpenedDomain::start(&machine(&Binary::all()[0]).devices(&disk), &daemon);
    let before = opened.trace();
    let xml = opened.xml("s", &disks(&disk_onto("vdz", &directory.path().join("overlay"))));
    assert_refused(
        &opened,
        &xml,
        INSTANTLY,
        Code::ConfigUnsupported,
        &["'vdz'", "shared with other domains", "snapshot='no'"],
    );
    // The image is deleted, and only QEMU has it open.
    let image = opened.guest.disks()[0].file.clone();
    let (aside, xml) = (
        image.with_extension("aside"),
        opened.xml("s", &disks("<disk name='vdz' snapshot='no'/>")),
    );
    std::fs::rename(&image, &aside).unwrap();
    let overlay = image.with_extension("overlay");
    let named = opened.xml(
        "s",
        &disks(&format!("<disk name='vdz' snapshot='no'/>{}", disk_onto("vda", &overlay))),
    );
    assert_refused(
        &opened,
        &named,
        INSTANTLY,
        Code::ConfigUnsupported,
        &["'vda'", "does not exist any more under this name"],
    );
    std::fs::copy(&aside, &image).unwrap();
    assert_refused(
        &opened,
        &xml,
        INSTANTLY,
        Code::ConfigUnsupported,
        &["'vda'", "not the file of this name any more"],
    );
    std::fs::rename(&aside, &image).unwrap();
    opened.assert_untouched(&before);
    opened.create(&xml, INSTANTLY).unwrap();
    opened.guest.wait_ticks(3);
}

/// A domain with a disk that libvirt addresses by pool and volume.
struct VolumeDomain {
    opened: OpenedDomain,
    directory: TempDir,
    path: String,
}

/// The disk's source in the domain's XML.
const POOLED: &str = "<source pool='p' volume='v &amp; w.qcow2'/>";

impl VolumeDomain {
    fn start(daemon: &Daemon) -> VolumeDomain {
        with_driver(daemon, "libvirt_driver_storage.so");
        let directory = directory_for(daemon);
        let volume = image_for(daemon, &directory.path().join("v & w.qcow2"), Format::Qcow2);
        daemon.virsh(&[
            "pool-create-as",
            "p",
            "dir",
            "--target",
            directory.path().to_str().unwrap(),
        ]);
        let path = volume.display().to_string();
        let file = format!("<source file='{}'/>", path.replace('&', "&amp;"));
        let machine =
            Machine::new(&Binary::all()[0]).disk_on(&volume, Format::Qcow2).edit_xml(move |xml| {
                assert!(xml.contains(&file), "{xml}");
                xml.replace(&file, POOLED).replace(
                    "<disk type='file' device='disk'>",
                    "<disk type='volume' device='disk'>",
                )
            });
        VolumeDomain { opened: OpenedDomain::start(&machine, daemon), directory, path }
    }

    /// Asserts that the disk is on the volume itself, however libvirt addresses it, and has
    /// everything that the guest wrote.
    #[track_caller]
    fn assert_on_volume(&self) {
        let live = source(&self.opened.guest, "vda");
        assert!(live == self.path || live == "v & w.qcow2", "{live}");
        self.opened.guest.wait_ticks(ALL_SECTORS);
    }
}

#[test]
fn stock_snapshot_of_a_storage_volume_can_be_reverted_to_and_deleted() {
    let daemon = virt::session();
    let volume = VolumeDomain::start(&daemon);
    let (opened, guest) = (&volume.opened, &volume.opened.guest);
    let overlay = |name: &str| volume.directory.path().join(format!("overlay-{name}"));
    let snapshot = |name: &str| {
        let memory = format!("file={},snapshot=external", opened.memory_file(name).display());
        let disk = format!("vda,snapshot=external,file={}", overlay(name).display());
        guest.virsh("snapshot-create-as", &[name, "--memspec", &memory, "--diskspec", &disk]);
        guest.wait_ticks(3);
    };
    snapshot("s");
    assert!(guest.virsh("snapshot-dumpxml", &["s"]).contains("<disk type='volume'"));
    opened.delete("s", 0).unwrap();
    assert!(!overlay("s").exists());
    volume.assert_on_volume();
    // Two snapshots, one based on the other, and a revert to the first.
    snapshot("t");
    snapshot("u");
    opened.revert("t", 0).unwrap();
    guest.wait_ticks(3);
    opened.delete("u", 0).unwrap();
    guest.wait_ticks(3);
    guest.virsh("destroy", &[]);
    opened.delete("t", 0).unwrap();
    guest.start_domain();
    volume.assert_on_volume();
    assert!(!overlay("t").exists() && !overlay("u").exists());
}

#[test]
fn storage_volume_can_be_snapshotted_and_stays_a_volume_after_undo() {
    let daemon = virt::session();
    let volume = VolumeDomain::start(&daemon);
    let (opened, directory) = (&volume.opened, &volume.directory);
    let guest = &opened.guest;
    let assert_on_volume = || {
        let xml = guest.virsh("dumpxml", &["--inactive"]);
        assert!(xml.contains(POOLED) && xml.contains("<disk type='volume'"), "{xml}");
    };
    opened.assert_cancelled_without_a_trace(&opened.xml("cancelled", ""), INSTANTLY, 3);
    assert_on_volume();
    if !by_daemon() {
        let mut kill = At(|phase| {
            if phase == Phase::Drain {
                guest.kill();
            }
        });
        opened.snapshot_observed("killed", &mut kill).expect_err("QEMU has ended");
        assert_on_volume();
        guest.start_domain();
        guest.wait_ticks(2);
    }
    for name in ["s", "t"] {
        opened.snapshot(name).unwrap();
        guest.wait_ticks(3);
    }
    assert_eq!(Path::new(&source(guest, "vda")), directory.path().join("v & w.t"));
    opened.revert("s", 0).unwrap();
    guest.wait_ticks(3);
    opened.delete("t", 0).unwrap();
    // The overlay is merged into the volume, whether the domain runs or not.
    opened.delete("s", 0).unwrap();
    guest.wait_ticks(ALL_SECTORS);
    guest.virsh("destroy", &[]);
    guest.start_domain();
    volume.assert_on_volume();
}

#[test]
fn domain_with_an_excluded_block_device_can_be_reverted() {
    let daemon = virt::session();
    let directory = directory_for(&daemon);
    let file = image_for(&daemon, &directory.path().join("backing"), Format::Raw);
    let device = loop_on(&daemon, &file);
    // The guest checks what it writes, so it must not write to a disk outside the snapshot.
    let machine = Machine::new(&Binary::all()[0])
        .disk(Format::Qcow2)
        .disk_on(Path::new(&device.0), Format::Raw)
        .append("nodisk=1");
    let opened = OpenedDomain::start(&machine, &daemon);
    opened.create(&opened.xml("s", &disks("<disk name='vdb' snapshot='no'/>")), INSTANTLY).unwrap();
    opened.guest.wait_ticks(2);
    opened.revert("s", 0).unwrap();
    opened.guest.wait_ticks(ALL_SECTORS);
    assert_on_device(&opened.guest, &device.0);
}
