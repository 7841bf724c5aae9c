// SPDX-License-Identifier: LGPL-2.1-or-later

//! Which disks a snapshot includes, under which names and on which overlays, and that each overlay
//! has its image's properties.

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use common::backend::{by_driver, open_guest};
use common::{
    ALL_SECTORS, At, INSTANTLY, Loop, Opened, assert_error, assert_untouched, block_of, machine,
    named, run, through_proxy, unwritten,
};
use instantsnap::engine::{Phase, prepare_revert};
use instantsnap::error::{Code, Error};
use instantsnap::image::Image;
use instantsnap::model::Record;
use instantsnap::model::flags::REUSE_EXT;
use instantsnap_testkit::machine::make_image;
use instantsnap_testkit::{
    Attach, Binary, DEADLINE, Format, Guest, Machine, Proxy, skip, test, wait_for,
};
use serde_json::{Value, json};

fn with(machine: Machine, args: &[&str]) -> Machine {
    args.iter().fold(machine, |machine, arg| machine.arg(arg))
}

/// A `<domainsnapshot>` with this name and these disks.
fn request(name: &str, disks: &str) -> String {
    format!("<domainsnapshot><name>{name}</name><disks>{disks}</disks></domainsnapshot>")
}

/// The names of the disks in a snapshot that is taken without a record.
fn disks(opened: &Opened, name: &str, disks: &str) -> Result<Vec<String>, Error> {
    let name = opened.handle.create(&request(name, disks), INSTANTLY, &mut ())?;
    let store = opened.handle.store().unwrap();
    let record = store.read(&name)?;
    store.forget(&name)?;
    Ok(record.disks.into_iter().map(|disk| disk.name).collect())
}

fn hmp(guest: &Guest, line: &str) -> String {
    let reply =
        guest.control().execute("human-monitor-command", json!({ "command-line": line })).unwrap();
    reply.as_str().unwrap().to_owned()
}

/// The backing chain by `qemu-img info`: each file, its format, and the backing file and format
/// that it names.
fn chain(image: &str) -> Vec<(String, String, Option<String>, Option<String>)> {
    let info = run("qemu-img", &["info", "-U", "--backing-chain", "--output=json", image]);
    let info: Value = serde_json::from_str(&info).unwrap();
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let one = |info: &Value| {
        (
            text(&info["filename"]).unwrap(),
            text(&info["format"]).unwrap(),
            text(&info["backing-filename"]),
            text(&info["backing-filename-format"]),
        )
    };
    info.as_array().unwrap().iter().map(one).collect()
}

/// Restores the snapshot on fresh images in this directory.
fn restore_in(opened: &Opened, name: &str, directory: &Path, disks: usize) -> Opened {
    let plan = prepare_revert(&opened.state_dir(), name, Some(directory)).unwrap();
    assert_eq!(plan.disks.len(), disks);
    let images: Vec<_> = plan.disks.iter().map(|disk| (disk.file.clone(), Format::Qcow2)).collect();
    let guest = machine(opened_binary(opened), disks).for_revert(&images).start();
    let clone = Opened {
        handle: open_guest(&guest, &guest.qmp(), None, &opened.state_dir()).unwrap(),
        guest,
    };
    clone.handle.load(name, 0).unwrap_or_else(|error| clone.guest.fail(&error.message));
    clone.guest.wait_ticks(5);
    clone
}

/// Deletes the newest snapshot, and checks that its disks are on their images again, and that the
/// images are sound.
#[track_caller]
fn delete(opened: &Opened, name: &str) {
    let disks = opened.record(name).disks;
    opened.handle.delete(name, 0).unwrap_or_else(|error| panic!("delete {name}: {error}"));
    let blocks = opened.guest.control().execute("query-block", json!({})).unwrap();
    let active: Vec<_> = blocks
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|block| block["inserted"]["file"].as_str())
        .collect();
    for disk in disks {
        let image = Path::new(&disk.image).file_name().unwrap().to_str().unwrap();
        assert!(active.iter().any(|file| file.contains(image)), "{image} is not in {active:?}");
        assert!(!Path::new(&disk.overlay).exists());
    }
    opened.guest.wait_ticks(ALL_SECTORS);
}

/// The binary that the guest runs on.
fn opened_binary(opened: &Opened) -> &'static Binary {
    let exe = std::fs::read_link(format!("/proc/{}/exe", opened.guest.pid())).unwrap();
    let is = |binary: &&Binary| binary.path.canonicalize().is_ok_and(|path| path == exe);
    Binary::all().iter().find(is).unwrap_or(&Binary::all()[0])
}

#[test]
fn disk_can_be_named_by_device_id_drive_node_or_path() {
    for binary in Binary::any() {
        for attach in [Attach::Drive, Attach::Blockdev] {
            let opened = Opened::start(&machine(binary, 2).attach(attach));
            let backend = opened.guest.disks()[1].backend.clone();
            let path = opened.guest.disks()[1].file.display().to_string();
            for (n, name) in ["vd1", &backend, &path].iter().enumerate() {
                // Under each name the second disk is excluded, so that it stays on its image.
                let left = disks(
                    &opened,
                    &format!("s{n}"),
                    &format!("<disk name='{name}' snapshot='no'/>"),
                )
                .unwrap();
                assert_eq!(left, ["vd0"], "{name}");
                assert_eq!(opened.active_image("vd1"), path);
            }
            let overlay = opened.guest.directory().join("explicit");
            let disk = format!("<disk name='{path}'><source file='{}'/></disk>", overlay.display());
            assert_eq!(disks(&opened, "x", &disk).unwrap(), ["vd0", "vd1"]);
            assert_eq!(opened.active_image("vd1"), overlay.display().to_string());
            // A disk is found by its current path only.
            let before = opened.trace();
            assert_error(
                disks(&opened, "y", &format!("<disk name='{path}'/>")),
                Code::ConfigUnsupported,
                &path,
            );
            assert_untouched(&opened, &before);
            opened.guest.wait_ticks(2);
        }
    }
}

#[test]
fn unknown_disk_is_refused_with_the_list_of_known_names() {
    let opened = Opened::start(&machine(&Binary::all()[0], 3));
    let before = opened.trace();
    let result = disks(&opened, "s", "<disk name='vdz'/>");
    for part in ["'vdz'", "vd0, vd1, vd2"] {
        assert_error(result.clone(), Code::ConfigUnsupported, part);
    }
    assert_untouched(&opened, &before);
}

/// A machine with `-blockdev` nodes and devices that have no id.
fn machine_without_ids(binary: &'static Binary, directory: &Path, drivers: &[&str]) -> Machine {
    let mut machine = Machine::new(binary);
    for (n, driver) in drivers.iter().enumerate() {
        let file = directory.join(format!("image-{n}.img"));
        make_image(&file, if *driver == "qcow2" { Format::Qcow2 } else { Format::Raw }, None);
        let protocol = format!("driver=file,node-name=proto{n},filename={}", file.display());
        machine = match *driver {
            // The device uses the protocol node itself.
            "file" => with(machine, &["-blockdev", &protocol.replace("proto", "node")]),
            driver => with(
                machine,
                &[
                    "-blockdev",
                    &protocol,
                    "-blockdev",
                    &format!("driver={driver},node-name=node{n},file=proto{n}"),
                ],
            ),
        };
        machine = with(machine, &["-device", &format!("virtio-blk-pci,drive=node{n}")]);
    }
    machine
}

#[test]
fn disk_known_by_its_node_only_keeps_its_name_over_snapshots() {
    for binary in Binary::any() {
        let directory = tempfile::tempdir().unwrap();
        let opened = Opened::start(&machine_without_ids(
            binary,
            directory.path(),
            &["qcow2", "raw", "file"],
        ));
        for name in ["a", "b", "c"] {
            opened.snapshot(name).unwrap();
            let record = opened.record(name);
            let names: Vec<_> = record.disks.iter().map(|disk| disk.name.as_str()).collect();
            assert_eq!(names, ["node0", "node1", "node2"], "{name}");
        }
        delete(&opened, "c");
        // The request can name the disk by its node.
        assert_eq!(
            disks(&opened, "d", "<disk name='node1' snapshot='no'/>").unwrap(),
            ["node0", "node2"]
        );
        opened.guest.wait_ticks(2);
    }
}

#[test]
fn raw_file_without_a_format_node_is_recorded_and_restored_as_raw() {
    for binary in Binary::any() {
        let directory = tempfile::tempdir().unwrap();
        let opened = Opened::start(&machine_without_ids(binary, directory.path(), &["file"]));
        opened.snapshot("s").unwrap();
        let record = opened.record("s");
        assert_eq!(record.disks[0].format, "raw");
        // A driver provides the XML itself.
        assert!(by_driver() || record.domain_xml.contains("type='raw'"), "{}", record.domain_xml);
        assert_eq!(chain(&record.disks[0].overlay)[0].3.as_deref(), Some("raw"));
        opened.guest.wait_ticks(2);
        restore_in(&opened, "s", directory.path(), 1);
        delete(&opened, "s");
    }
}

#[test]
fn readonly_empty_and_unattached_drives_are_excluded() {
    for binary in Binary::any() {
        let directory = tempfile::tempdir().unwrap();
        let image = |name: &str| {
            let path = directory.path().join(name);
            make_image(&path, Format::Raw, None);
            path.display().to_string()
        };
        let machine = with(
            machine(binary, 1),
            &[
                "-drive",
                &format!("if=none,id=ro,format=raw,readonly=on,file={}", image("ro")),
                "-device",
                "virtio-scsi-pci,id=scsi0",
                "-device",
                "scsi-hd,id=fixed,drive=ro",
                "-drive",
                &format!("if=none,id=loose,format=raw,file={}", image("loose")),
                "-device",
                "ide-cd,id=empty,bus=ide.0",
                "-drive",
                &format!(
                    "if=none,id=medium,media=cdrom,format=raw,readonly=on,file={}",
                    image("cd")
                ),
                "-device",
                "ide-cd,id=full,drive=medium,bus=ide.1",
            ],
        );
        let opened = Opened::start(&machine);
        assert_eq!(disks(&opened, "s", "").unwrap(), ["vd0"]);
        // The request may name such disks.
        assert_eq!(
            disks(&opened, "t", "<disk name='fixed' snapshot='no'/><disk name='full'/>").unwrap(),
            ["vd0"]
        );
        let empty = "<disk name='empty' snapshot='no'/>";
        assert_eq!(disks(&opened, "v", empty).unwrap(), ["vd0"]);
        let before = opened.trace();
        for wish in ["external", "manual"] {
            let disk = format!("<disk name='empty' snapshot='{wish}'/>");
            assert_error(disks(&opened, "u", &disk), Code::ConfigUnsupported, "no medium is in it");
        }
        for name in ["fixed", "full", "ro", "medium"] {
            let disk = format!("<disk name='{name}' snapshot='external'/>");
            assert_error(disks(&opened, "u", &disk), Code::ConfigUnsupported, "readonly");
        }
        let disk = "<disk name='loose' snapshot='external'/>";
        assert_error(disks(&opened, "u", disk), Code::ConfigUnsupported, "no disk named");
        assert_untouched(&opened, &before);
    }
}

#[test]
fn disks_excluded_by_the_request_stay_on_their_images() {
    for binary in Binary::any() {
        let opened = Opened::start(&machine(binary, 2));
        let image = opened.guest.disks()[0].file.display().to_string();
        let all = "<disk name='vd0' snapshot='no'/><disk name='vd1' snapshot='no'/>";
        assert!(disks(&opened, "none", all).unwrap().is_empty());
        assert_eq!(disks(&opened, "one", "<disk name='vd0' snapshot='no'/>").unwrap(), ["vd1"]);
        assert_eq!(opened.active_image("vd0"), image);
        opened.guest.wait_ticks(2);
    }
}

/// One disk of a domain XML, by its target, its other attributes and its content.
fn domain_disk(target: &str, attributes: &str, content: &str) -> String {
    format!(
        "    <disk type='file' device='disk'{attributes}>\n      {content}\n      <target dev='{target}'/>\n    </disk>\n"
    )
}

fn domain(disks: &[String]) -> String {
    format!(
        "<domain type='qemu'>\n  <name>dom</name>\n  <devices>\n{}  </devices>\n</domain>\n",
        disks.concat()
    )
}

#[test]
fn disk_can_be_named_by_its_target_in_the_domain_xml() {
    for binary in Binary::any() {
        for attach in [Attach::Drive, Attach::Blockdev] {
            let guest = machine(binary, 3).attach(attach).start();
            guest.wait_ticks(2);
            let source = |n: usize| format!("<source file='{}'/>", guest.disks()[n].file.display());
            let xml = domain(&[
                // By its alias, which is the device's id; the source does not matter.
                domain_disk(
                    "vdc",
                    "",
                    &format!("<source file='/nowhere'/><alias name='{}'/>", "vd0"),
                ),
                // By its source: at first the active image, later an image below the overlay.
                domain_disk("vdb", "", &source(1)),
                // By its target, which is the device's id.
                domain_disk("vd2", "", "<source file='/nowhere/else'/>"),
            ]);
            let opened = Opened::with_domain(guest, &xml);
            for name in ["s", "t", "u"] {
                opened.snapshot(name).unwrap();
                let record = opened.record(name);
                let names: Vec<_> = record.disks.iter().map(|disk| disk.name.as_str()).collect();
                assert_eq!(names, ["vdc", "vdb", "vd2"], "{name}");
            }
            assert_eq!(
                disks(&opened, "v", "<disk name='vdc' snapshot='no'/>").unwrap(),
                ["vdb", "vd2"]
            );
            // QEMU's own names are still accepted.
            assert_eq!(
                disks(&opened, "w", "<disk name='vd0' snapshot='no'/>").unwrap(),
                ["vdb", "vd2"]
            );
            opened.guest.wait_ticks(2);
        }
    }
}

#[test]
fn request_overrides_the_snapshot_attributes_of_the_domain_xml() {
    let binary = &Binary::all()[0];
    let guest = machine(binary, 2).start();
    guest.wait_ticks(2);
    let disk = |n: usize, target: &str, attributes: &str| {
        domain_disk(
            target,
            attributes,
            &format!("<source file='{}'/>", guest.disks()[n].file.display()),
        )
    };
    let without = domain(&[disk(0, "vda", ""), disk(1, "vdb", " snapshot='no'")]);
    let unsupported = domain(&[disk(0, "vda", ""), disk(1, "vdb", " snapshot='manual'")]);
    let mut opened = Opened::with_domain(guest, &without);
    assert_eq!(disks(&opened, "s", "").unwrap(), ["vda"]);
    assert_eq!(
        disks(&opened, "t", "<disk name='vdb' snapshot='external'/>").unwrap(),
        ["vda", "vdb"]
    );
    opened = Opened::with_domain(opened.guest, &unsupported);
    let before = opened.trace();
    assert_error(disks(&opened, "u", ""), Code::OperationUnsupported, "snapshot='manual'");
    assert_untouched(&opened, &before);
    assert_eq!(disks(&opened, "u", "<disk name='vdb' snapshot='no'/>").unwrap(), ["vda"]);
}

#[test]
fn recorded_domain_xml_differs_from_the_original_in_sources_only() {
    for binary in Binary::any() {
        let guest = machine(binary, 2).start();
        guest.wait_ticks(2);
        let file = |n: usize| guest.disks()[n].file.display().to_string();
        let xml = format!(
            "<domain  type = \"qemu\" id='7'>\n\t<name>d&amp;d</name><!-- <disk> -->\n<metadata><x:y xmlns:x='urn:x' \
             a=\"'\"/></metadata>\n  <devices>\n    <disk device='disk' type=\"file\">\n      <driver type=\"raw\" name='qemu' \
             cache='none'/>\n      <source   file=\"{}\" index='1'/><backingStore/>\n      <target bus='virtio' \
             dev='vda'/>\n    </disk>\n    <disk type='file'>\n      <source file='{}'/>\n      <target dev='vdb'/>\n    \
             </disk>\n    <disk type='file' device='cdrom'><target dev='sda'/><readonly/></disk>\n  </devices>\n</domain>",
            file(0),
            file(1)
        );
        let opened = Opened::with_domain(guest, &xml);
        let stored = |name: &str| {
            let record = opened.record(name);
            let image = Image::open(&opened.state_dir().join(format!("{name}.mem"))).unwrap();
            assert_eq!(image.domain_xml.trim_end(), record.domain_xml);
            record
        };
        opened.snapshot("s").unwrap();
        let s = stored("s");
        assert_eq!(s.domain_xml, xml);
        opened.snapshot("t").unwrap();
        let expected = xml
            .replace(
                &format!("file=\"{}\"", s.disks[0].image),
                &format!("file='{}'", s.disks[0].overlay),
            )
            .replace(
                &format!("file='{}'", s.disks[1].image),
                &format!("file='{}'", s.disks[1].overlay),
            )
            .replace("type=\"file\"", "type='file'")
            .replace("type=\"raw\"", "type='qcow2'")
            .replace("<backingStore/>", "")
            .replace(
                "<disk type='file'>\n      <source",
                "<disk type='file'>\n      <driver name='qemu' type='qcow2'/>\n      <source",
            );
        assert_eq!(stored("t").domain_xml, expected);
    }
}

#[test]
fn default_overlay_names_follow_libvirts_rule() {
    let directory = tempfile::tempdir().unwrap();
    let image = |name: &str| directory.path().join(name);
    let mut machine = Machine::new(&Binary::all()[0]);
    let expected = [
        ("disk.qcow2", "disk.new"),
        ("nosuffix", "nosuffix.new"),
        ("two.dots.img", "two.dots.new"),
        (".hidden", ".hidden.new"),
    ];
    for (name, _) in expected {
        make_image(&image(name), Format::Qcow2, None);
        machine = machine.disk_on(&image(name), Format::Qcow2);
    }
    let opened = Opened::start(&machine);
    opened.snapshot("new").unwrap();
    for (disk, (_, overlay)) in opened.record("new").disks.iter().zip(expected) {
        assert_eq!(Path::new(&disk.overlay), image(overlay));
    }
    // The overlay's suffix is the snapshot's name, and the next snapshot replaces it.
    opened.snapshot("newer").unwrap();
    assert_eq!(Path::new(&opened.record("newer").disks[0].overlay), image("disk.newer"));
}

#[test]
fn overlays_with_equal_or_existing_paths_are_refused() {
    let binary = &Binary::all()[0];
    let directory = tempfile::tempdir().unwrap();
    let (first, second) = (directory.path().join("a.img"), directory.path().join("a.qcow2"));
    make_image(&first, Format::Raw, None);
    make_image(&second, Format::Qcow2, None);
    let opened = Opened::start(
        &Machine::new(binary).disk_on(&first, Format::Raw).disk_on(&second, Format::Qcow2),
    );
    let before = opened.trace();
    for part in ["'vd0'", "'vd1'", "a.s", "give each its own"] {
        assert_error(disks(&opened, "s", ""), Code::ConfigUnsupported, part);
    }
    let same = directory.path().join("same").display().to_string();
    let both = format!(
        "<disk name='vd0'><source file='{same}'/></disk><disk name='vd1'><source \
         file='{same}'/></disk>"
    );
    assert_error(disks(&opened, "s", &both), Code::ConfigUnsupported, "give each its own");
    // Two paths of one file: for the second disk the library finds the file that it has created for
    // the first.
    let detour = format!(
        "{}/../{}/same",
        directory.path().display(),
        directory.path().file_name().unwrap().display()
    );
    let both = both.replacen(&same, &detour, 1);
    assert_error(disks(&opened, "s", &both), Code::ConfigUnsupported, "already exists");
    // The image of another disk, and the memory image.
    let onto = format!("<disk name='vd0'><source file='{}'/></disk>", second.display());
    assert_error(disks(&opened, "s", &onto), Code::ConfigUnsupported, "already exists");
    let memory = format!(
        "<domainsnapshot><memory file='{same}'/><disks><disk name='vd1'><source \
         file='{same}'/></disk></disks></domainsnapshot>"
    );
    assert_error(opened.create(&memory, INSTANTLY), Code::ConfigUnsupported, "memory");
    assert_error(
        disks(&opened, "s", "<disk name='vd0'><source file='/nowhere/at/all'/></disk>"),
        Code::SystemError,
        "/nowhere/at/all",
    );
    assert_untouched(&opened, &before);
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 2);
    let other = "<disk name='vd1'><source file='".to_owned() + &same + "'/></disk>";
    assert_eq!(disks(&opened, "s", &other).unwrap(), ["vd0", "vd1"]);
}

#[test]
fn overlay_records_its_backing_file_and_format() {
    for binary in Binary::any() {
        for attach in [Attach::Drive, Attach::Blockdev] {
            let opened = Opened::start(&machine(binary, 2).attach(attach));
            opened.snapshot("s").unwrap();
            opened.snapshot("t").unwrap();
            for (n, format) in ["raw", "qcow2"].iter().enumerate() {
                let base = opened.guest.disks()[n].file.display().to_string();
                let (s, t) = (&opened.record("s").disks[n], &opened.record("t").disks[n]);
                assert_eq!((&s.image, s.format.as_str()), (&base, *format));
                assert_eq!((&t.image, t.format.as_str()), (&s.overlay, "qcow2"));
                let link = |file: &str, format: &str, below: Option<(&str, &str)>| {
                    (
                        file.to_owned(),
                        format.to_owned(),
                        below.map(|below| below.0.to_owned()),
                        below.map(|below| below.1.to_owned()),
                    )
                };
                assert_eq!(
                    chain(&t.overlay),
                    [
                        link(&t.overlay, "qcow2", Some((&s.overlay, "qcow2"))),
                        link(&s.overlay, "qcow2", Some((&base, format))),
                        link(&base, format, None),
                    ]
                );
            }
        }
    }
}

#[test]
fn block_device_gets_the_named_overlay_and_can_be_restored() {
    for binary in Binary::any() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("backing");
        make_image(&file, Format::Raw, None);
        let device = Loop::on(&file);
        for driver in ["raw", "host_device"] {
            let drive = match driver {
                "raw" => format!(
                    "driver=raw,node-name=blk0,file.driver=host_device,file.filename={}",
                    device.0
                ),
                _ => format!("driver=host_device,node-name=blk0,filename={}", device.0),
            };
            let machine = with(
                Machine::new(binary),
                &["-blockdev", &drive, "-device", "virtio-blk-pci,id=vd0,drive=blk0"],
            );
            let opened = Opened::start(&machine);
            let before = opened.trace();
            assert_error(opened.snapshot("s"), Code::ConfigUnsupported, "<source file='...'/>");
            assert_untouched(&opened, &before);
            let overlay = directory.path().join(format!("overlay-{driver}"));
            let xml = request(
                "s",
                &format!("<disk name='vd0'><source file='{}'/></disk>", overlay.display()),
            );
            opened.create(&xml, INSTANTLY).unwrap();
            let disk = &opened.record("s").disks[0];
            assert_eq!((&disk.image, disk.format.as_str()), (&device.0, "raw"), "{driver}");
            assert_eq!(chain(&disk.overlay)[0].3.as_deref(), Some("raw"));
            // The device's mode does not let everybody read it.
            let mode = Path::new(&device.0).metadata().unwrap().mode() & 0o666;
            assert_eq!(overlay.metadata().unwrap().mode() & 0o7777, mode);
            assert_error(
                prepare_revert(&opened.state_dir(), "s", None),
                Code::ConfigUnsupported,
                "directory",
            );
            opened.guest.wait_ticks(2);
            restore_in(&opened, "s", directory.path(), 1);
            delete(&opened, "s");
        }
    }
}

/// The commands of the pause: those before the switch, and those after it.
fn commands_in_the_pause(proxy: &Proxy) -> (Vec<String>, Vec<String>) {
    let commands = proxy.commands();
    let place = |name: &str| commands.iter().rposition(|command| command == name).expect(name);
    let (stop, switch, begin) = (place("stop"), place("transaction"), place("migrate"));
    (commands[stop..switch].to_vec(), commands[switch..begin].to_vec())
}

#[test]
fn pause_queries_image_sizes_at_most_once() {
    for binary in Binary::any() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).display().to_string();
        make_image(Path::new(&path("backing")), Format::Raw, None);
        let device = Loop::on(Path::new(&path("backing")));
        // A format whose header the library does not read.
        run("qemu-img", &["create", "-q", "-f", "qed", &path("qed"), "16M"]);
        let device =
            format!("driver=raw,node-name=blk0,file.driver=host_device,file.filename={}", device.0);
        let other =
            format!("driver=qed,node-name=blk0,file.driver=file,file.filename={}", path("qed"));
        for (drive, questions) in [(device, 0), (other, 1)] {
            let machine = with(
                Machine::new(binary),
                &["-blockdev", &drive, "-device", "virtio-blk-pci,id=vd0,drive=blk0"],
            );
            let (opened, proxy) = through_proxy(&machine);
            let overlay = path(&format!("overlay-{questions}"));
            let xml = request("s", &format!("<disk name='vd0'><source file='{overlay}'/></disk>"));
            opened.create(&xml, INSTANTLY).unwrap();
            let (before, after) = commands_in_the_pause(&proxy);
            assert!(!before.contains(&"query-block".into()), "{before:?}");
            assert_eq!(
                after.iter().filter(|command| *command == "query-block").count(),
                questions,
                "{after:?}"
            );
            delete(&opened, "s");
            if questions > 0 {
                // Sizes that were read before the pause can still change until the switch.
                let gate = proxy.hold("stop", 1);
                let error = std::thread::scope(|scope| {
                    let snapshot = scope.spawn(|| opened.create(&xml, INSTANTLY));
                    assert!(gate.wait_arrived(DEADLINE));
                    let size = json!({ "node-name": "blk0", "size": 24 << 20 });
                    opened.guest.control().execute("block_resize", size).unwrap();
                    gate.release();
                    snapshot.join().unwrap()
                });
                assert_error(error, Code::OperationFailed, "resized disk 'vd0'");
                assert_eq!(
                    block_of(&opened.guest, "vd0")["inserted"]["image"]["virtual-size"],
                    24 << 20
                );
                assert_eq!(opened.active_image("vd0"), path("qed"));
                opened.guest.wait_ticks(3);
            }
        }
    }
}

/// Cancels a snapshot in its drain after the guest has written more, and asserts that nothing is
/// left of the snapshot.
#[track_caller]
fn assert_cancelled_without_a_trace(opened: &Opened, xml: &str, flags: u32) {
    let mut cancel = At(|phase| {
        if phase == Phase::Drain {
            opened.guest.wait_ticks(5);
            opened.handle.cancel().unwrap();
        }
    });
    opened.assert_fails_observed(xml, flags, &mut cancel, Code::OperationAborted, &[]);
}

#[test]
fn precreated_empty_overlay_is_used_and_emptied_again_by_undo() {
    for binary in Binary::any() {
        let directory = tempfile::tempdir().unwrap();
        let empty = directory.path().join("empty");
        std::fs::write(&empty, "").unwrap();
        let opened = Opened::start(&machine(binary, 1));
        let xml = |name: &str| {
            request(name, &format!("<disk name='vd0'><source file='{}'/></disk>", empty.display()))
        };
        assert_cancelled_without_a_trace(&opened, &xml("cancelled"), INSTANTLY);
        assert_eq!(std::fs::read(&empty).unwrap(), b"");
        opened.create(&xml("s"), INSTANTLY).unwrap();
        opened.guest.wait_ticks(3);
        opened.restore_clone("s");
        delete(&opened, "s");
        // When QEMU ends, the library merges the overlay.
        std::fs::write(&empty, "").unwrap();
        let mut kill = At(|phase| {
            if phase == Phase::Drain {
                opened.guest.wait_ticks(5);
                opened.guest.kill();
            }
        });
        opened.handle.create(&xml("killed"), INSTANTLY, &mut kill).expect_err("QEMU has ended");
        assert_eq!(std::fs::read(&empty).unwrap(), b"");
    }
}

#[test]
fn block_device_can_be_an_overlay_and_is_not_removed() {
    for binary in Binary::any() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("backing");
        std::fs::File::create(&file).unwrap().set_len(32 << 20).unwrap();
        let device = Loop::on(&file);
        let opened = Opened::start(&machine(binary, 1));
        let image = opened.guest.disks()[0].file.clone();
        let (image, format) = (image.to_str().unwrap(), opened.guest.disks()[0].format.name());
        let xml = |name: &str| {
            request(
                name,
                &format!("<disk name='vd0' type='block'><source dev='{}'/></disk>", device.0),
            )
        };
        let make = || {
            run(
                "qemu-img",
                &["create", "-q", "-u", "-f", "qcow2", "-F", format, "-b", image, &device.0, "16M"],
            );
        };
        for flags in [INSTANTLY, INSTANTLY | REUSE_EXT] {
            if flags & REUSE_EXT != 0 {
                // The device is no longer an overlay after the merge.
                assert_error(
                    opened.create(&xml("s"), flags),
                    Code::ConfigUnsupported,
                    "is no qcow2 image",
                );
                make();
            }
            assert_cancelled_without_a_trace(&opened, &xml("cancelled"), flags);
            if flags & REUSE_EXT != 0 {
                assert_error(
                    opened.create(&xml("s"), flags),
                    Code::ConfigUnsupported,
                    "has content already",
                );
                make();
            }
            opened.create(&xml("s"), flags).unwrap();
            let record = opened.handle.store().unwrap().read("s").unwrap();
            assert_eq!(record.disks[0].overlay, device.0);
            let said = record.to_xml();
            assert!(
                said.contains(&format!("<source dev=\"{}\"", device.0))
                    && said.contains("type=\"block\""),
                "{said}"
            );
            opened.guest.wait_ticks(3);
            opened.restore_clone("s");
            // The next snapshot's overlay is based on the device.
            let onto = directory.path().join(format!("t-{flags:x}"));
            let next = request(
                "t",
                &format!("<disk name='vd0'><source file='{}'/></disk>", onto.display()),
            );
            opened.create(&next, INSTANTLY).unwrap();
            assert_error(
                opened.create(&xml("u"), flags),
                Code::ConfigUnsupported,
                "is an image of disk 'vd0'",
            );
            restore_in(&opened, "t", directory.path(), 1);
            delete(&opened, "t");
            opened.handle.delete("s", 0).unwrap();
            assert_eq!(opened.active_image("vd0"), image);
            opened.guest.wait_ticks(ALL_SECTORS);
            assert!(Path::new(&device.0).exists());
        }
    }
}

#[test]
fn three_disks_are_switched_in_one_transaction() {
    for binary in Binary::any() {
        let (opened, proxy) = through_proxy(&machine(binary, 3));
        opened.snapshot("s").unwrap();
        let commands = proxy.commands();
        let at = |name: &str| commands.iter().position(|command| command == name).unwrap();
        assert_eq!(commands.iter().filter(|command| *command == "transaction").count(), 1);
        assert!(
            !commands.iter().any(|command| command.starts_with("blockdev-snapshot")),
            "{commands:?}"
        );
        // The pause has no command that could come before or after it. Other clients are let in
        // last, and the library checks then that the guest was not reset.
        let pause = &commands[at("stop")..at("migrate")];
        assert!(
            pause == ["stop", "transaction"]
                || pause == ["stop", "transaction", "migrate-set-parameters", "query-status"],
            "{pause:?}"
        );
        assert_eq!(opened.record("s").disks.len(), 3);
        opened.restore_clone("s");
    }
}

#[test]
fn overlay_has_the_owner_and_mode_of_its_image() {
    let opened = Opened::start(&machine(&Binary::all()[0], 2));
    let root = rustix::process::geteuid().is_root();
    let (first, second) = (&opened.guest.disks()[0].file, &opened.guest.disks()[1].file);
    std::fs::set_permissions(first, PermissionsExt::from_mode(0o640)).unwrap();
    // The overlay does not get the execute permission and the set-user-id bit of the image.
    std::fs::set_permissions(second, PermissionsExt::from_mode(0o4755)).unwrap();
    if root {
        chown(first, Some(1234), Some(2345)).unwrap();
    }
    let owner = (first.metadata().unwrap().uid(), first.metadata().unwrap().gid());
    opened.snapshot("s").unwrap();
    let of = |n: usize| Path::new(&opened.record("s").disks[n].overlay).metadata().unwrap();
    assert_eq!((of(0).uid(), of(0).gid()), owner);
    assert_eq!(of(0).mode() & 0o7777, 0o640);
    assert_eq!(of(1).mode() & 0o7777, 0o644);
    // The fresh images of a clone have them too.
    let plan = prepare_revert(&opened.state_dir(), "s", None).unwrap();
    let fresh = plan.disks[0].file.metadata().unwrap();
    assert_eq!((fresh.uid(), fresh.gid(), fresh.mode() & 0o7777), (owner.0, owner.1, 0o640));
}

#[test]
fn overlay_keeps_the_cache_mode_of_its_disk() {
    for binary in Binary::any() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("disk.qcow2");
        make_image(&image, Format::Qcow2, None);
        let direct = rustix::fs::OFlags::DIRECT | rustix::fs::OFlags::RDWR;
        if rustix::fs::open(&image, direct, rustix::fs::Mode::empty()).is_err() {
            skip(format!("no O_DIRECT in {}", directory.path().display()));
        }
        let drive = format!(
            "if=none,id=d,file={},format=qcow2,cache=none,aio=native,detect-zeroes=on",
            image.display()
        );
        let args = ["-drive", &drive, "-device", "virtio-blk-pci,id=vd0,drive=d"];
        let opened = Opened::start(&with(Machine::new(binary), &args));
        let options = |opened: &Opened| {
            let inserted = &block_of(&opened.guest, "vd0")["inserted"];
            (inserted["cache"].clone(), inserted["detect_zeroes"].clone())
        };
        let before = options(&opened);
        assert_eq!(before.0["direct"], true);
        opened.snapshot("s").unwrap();
        assert_ne!(opened.active_image("vd0"), image.display().to_string());
        assert_eq!(options(&opened), before);
        opened.guest.wait_ticks(2);
        restore_in(&opened, "s", directory.path(), 1);
    }
}

/// The name, the granularity, whether it records, and the count in bytes, of each bitmap of the
/// active image.
fn bitmaps(guest: &Guest, device: &str) -> Vec<(String, u64, bool, u64)> {
    let block = block_of(guest, device);
    let bitmaps = block["inserted"]["dirty-bitmaps"].as_array().cloned().unwrap_or_default();
    let mut bitmaps: Vec<_> = bitmaps
        .iter()
        .map(|bitmap| {
            (
                bitmap["name"].as_str().unwrap_or_default().to_owned(),
                bitmap["granularity"].as_u64().unwrap(),
                bitmap["recording"] == true,
                bitmap["count"].as_u64().unwrap(),
            )
        })
        .collect();
    bitmaps.sort();
    bitmaps
}

/// A guest that does not write to its disk, which has three bitmaps.
fn with_bitmaps(binary: &'static Binary) -> Opened {
    let opened = Opened::start(&Machine::new(binary).disk(Format::Qcow2).append("nodisk=1"));
    let mut control = opened.guest.control();
    for bitmap in [
        json!({ "node": "drive-0", "name": "kept", "persistent": true, "granularity": 131_072 }),
        json!({ "node": "drive-0", "name": "off", "persistent": true, "disabled": true }),
        json!({ "node": "drive-0", "name": "transient" }),
    ] {
        control.execute("block-dirty-bitmap-add", bitmap).unwrap();
    }
    drop(control);
    hmp(&opened.guest, "qemu-io drive-0 \"write -P 1 1M 64k\"");
    opened
}

#[test]
fn persistent_recording_bitmaps_continue_in_the_overlay() {
    for binary in Binary::any() {
        let opened = with_bitmaps(binary);
        opened.snapshot("s").unwrap();
        let found = bitmaps(&opened.guest, "vd0");
        assert_eq!(found, [("kept".into(), 131_072, true, 0)]);
        hmp(&opened.guest, "qemu-io drive-0 \"write -P 2 4M 64k\"");
        assert_eq!(bitmaps(&opened.guest, "vd0")[0].3, 131_072);
        // The bitmap is persistent in the overlay too: the next snapshot carries it on.
        opened.snapshot("t").unwrap();
        assert_eq!(bitmaps(&opened.guest, "vd0"), [("kept".into(), 131_072, true, 0)]);
        hmp(&opened.guest, "qemu-io drive-0 \"write -P 3 8M 64k\"");
        // After the merge the image's bitmap covers what the guest wrote before and since.
        delete(&opened, "t");
        assert_eq!(bitmaps(&opened.guest, "vd0"), [("kept".into(), 131_072, true, 2 * 131_072)]);
    }
}

#[test]
fn failed_snapshot_restores_bitmaps_with_the_writes_since_the_switch() {
    for binary in Binary::any() {
        let opened = with_bitmaps(binary);
        let before = bitmaps(&opened.guest, "vd0");
        assert_eq!(before.iter().map(|bitmap| bitmap.3).collect::<Vec<_>>(), [131_072, 0, 65_536]);
        let trace = opened.trace();
        let in_the_way = opened.state_dir().join(".current");
        let mut observer = At(|phase| {
            if phase == Phase::Drain {
                std::fs::create_dir(&in_the_way).unwrap();
                hmp(&opened.guest, "qemu-io drive-0 \"write -P 3 8M 64k\"");
            }
        });
        let result = opened.handle.create(&named("s"), INSTANTLY, &mut observer).map(drop);
        assert_error(result, Code::SystemError, ".current");
        std::fs::remove_dir(&in_the_way).unwrap();
        assert_untouched(&opened, &trace);
        let after = bitmaps(&opened.guest, "vd0");
        let expected = [
            ("kept", 131_072, true, 2 * 131_072),
            ("off", 65_536, false, 0),
            ("transient", 65_536, true, 131_072),
        ];
        assert_eq!(
            after,
            expected.map(|(name, granularity, on, count)| (
                name.to_owned(),
                granularity,
                on,
                count
            ))
        );
        // The guest's writes are in the image, which is active again.
        let image = opened.guest.disks()[0].file.display().to_string();
        let read = run("qemu-io", &["-r", "-U", "-f", "qcow2", "-c", "read -P 3 8M 64k", &image]);
        assert!(read.contains("read 65536/65536") && !read.contains("failed"), "{read}");
        opened.snapshot("s").unwrap();
        opened.restore_clone("s");
    }
}

#[test]
fn disk_with_an_iothread_can_be_snapshotted() {
    for binary in Binary::any() {
        let machine =
            machine(binary, 2).arg("-object").arg("iothread,id=io0").device_options("iothread=io0");
        let opened = Opened::start(&machine);
        opened.snapshot("s").unwrap();
        opened.snapshot("t").unwrap();
        // The same holds for a snapshot that fails.
        let before = opened.trace();
        let in_the_way = opened.state_dir().join("late.xml");
        let mut observer = At(|phase| {
            if phase == Phase::Drain {
                std::fs::create_dir(&in_the_way).unwrap();
            }
        });
        opened
            .handle
            .create(&named("late"), INSTANTLY, &mut observer)
            .expect_err("its record cannot be written");
        std::fs::remove_dir(&in_the_way).unwrap();
        assert_untouched(&opened, &before);
        opened.guest.wait_ticks(3);
        opened.restore_clone("s");
        opened.restore_clone("t");
        delete(&opened, "t");
    }
}

#[test]
fn filter_node_is_refused_and_drive_throttling_is_supported() {
    for binary in Binary::any() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("disk.raw");
        make_image(&image, Format::Raw, None);
        let throttled = with(
            Machine::new(binary),
            &[
                "-object",
                "throttle-group,id=group,x-iops-total=100000",
                "-blockdev",
                &format!(
                    "driver=raw,node-name=base,file.driver=file,file.filename={}",
                    image.display()
                ),
                "-blockdev",
                "driver=throttle,node-name=top,throttle-group=group,file=base",
                "-device",
                "virtio-blk-pci,id=vd0,drive=top",
            ],
        );
        let opened = Opened::start(&throttled);
        let before = opened.trace();
        assert_error(opened.snapshot("s"), Code::ConfigUnsupported, "filter (throttle)");
        assert_untouched(&opened, &before);
        drop(opened);

        let drive = format!(
            "if=none,id=d,file={},format=raw,throttling.iops-total=100000",
            image.display()
        );
        let device = ["-drive", &drive, "-device", "virtio-blk-pci,id=vd0,drive=d"];
        let opened = Opened::start(&with(Machine::new(binary), &device));
        opened.snapshot("s").unwrap();
        assert_eq!(block_of(&opened.guest, "vd0")["inserted"]["iops"], 100_000);
    }
}

#[test]
fn encrypted_image_is_refused() {
    for binary in Binary::any() {
        let directory = tempfile::tempdir().unwrap();
        for (format, option) in
            [("luks", "key-secret=k"), ("qcow2", "encrypt.format=luks,encrypt.key-secret=k")]
        {
            let image = directory.path().join(format);
            let image = image.to_str().unwrap();
            let secret = "secret,id=k,data=secret";
            let (iterations, key) = match format {
                "luks" => ("iter-time=10", "key-secret=k"),
                _ => ("encrypt.iter-time=10", "encrypt.format=luks,encrypt.key-secret=k"),
            };
            let options = format!("{option},{iterations}");
            let create =
                ["create", "-q", "--object", secret, "-f", format, "-o", &options, image, "16M"];
            // qemu-img benchmarks its key derivation, and fails where a busy machine does not allow
            // a result.
            let created = wait_for(instantsnap_testkit::DEADLINE, || {
                let output = Command::new("qemu-img").args(create).output().unwrap();
                (output.status.success()
                    || !String::from_utf8_lossy(&output.stderr).contains("CPU usage"))
                .then_some(output)
            });
            let created = created.expect("qemu-img cannot tell how fast it is");
            assert!(created.status.success(), "{}", String::from_utf8_lossy(&created.stderr));
            let drive = format!("if=none,id=d,file={image},format={format},{key}");
            let args =
                ["-object", secret, "-drive", &drive, "-device", "virtio-blk-pci,id=vd0,drive=d"];
            let opened = Opened::start(&with(Machine::new(binary), &args));
            let before = opened.trace();
            assert_error(opened.snapshot("s"), Code::ConfigUnsupported, "encrypted");
            assert_untouched(&opened, &before);
            // The request can exclude the disk.
            assert!(disks(&opened, "s", "<disk name='vd0' snapshot='no'/>").unwrap().is_empty());
        }
    }
}

#[test]
fn relative_paths_are_resolved_in_qemus_working_directory() {
    for binary in Binary::any() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("images")).unwrap();
        make_image(&directory.path().join("images/disk.raw"), Format::Raw, None);
        // QEMU's working directory is not this process's.
        let script = directory.path().join("qemu");
        let path = binary.path.display();
        let text =
            format!("#!/bin/sh\ncd '{}' && exec '{path}' \"$@\"\n", directory.path().display());
        std::fs::write(&script, text).unwrap();
        std::fs::set_permissions(&script, PermissionsExt::from_mode(0o755)).unwrap();
        let elsewhere: &'static Binary = Box::leak(Box::new(Binary {
            name: binary.name.clone(),
            version: binary.version,
            path: script,
            firmware: binary.firmware.clone(),
            modules: binary.modules.clone(),
        }));
        let drive = [
            "-drive",
            "if=none,id=d,file=images/disk.raw,format=raw",
            "-device",
            "virtio-blk-pci,id=vd0,drive=d",
        ];
        let opened = Opened::start(&with(Machine::new(elsewhere), &drive));
        opened.snapshot("s").unwrap();
        let image = directory.path().canonicalize().unwrap().join("images/disk.raw");
        let disk = &opened.record("s").disks[0];
        assert_eq!(Path::new(&disk.image), image);
        assert_eq!(Path::new(&disk.overlay), image.with_file_name("disk.s"));
        assert_eq!(chain(&disk.overlay).len(), 2);
        // By its absolute path too.
        assert_eq!(
            disks(&opened, "t", &format!("<disk name='{}' snapshot='no'/>", disk.overlay))
                .unwrap()
                .len(),
            0
        );
        opened.guest.wait_ticks(2);
        restore_in(&opened, "s", directory.path(), 1);
        delete(&opened, "s");
    }
}

#[test]
fn image_is_supported_under_any_spelling_of_its_file_name() {
    for binary in Binary::any() {
        let directory = tempfile::tempdir().unwrap();
        let strange = directory.path().join("a b,c=d & \"e\" 'f' <g> ü 日本 %s #1");
        std::fs::create_dir(&strange).unwrap();
        let images = [strange.join("di sk,1 & \"x\".qcow2"), strange.join("é,'.raw")];
        make_image(&images[0], Format::Qcow2, None);
        make_image(&images[1], Format::Raw, None);
        let drive = |n: usize, format: &str| {
            let file = images[n].display().to_string().replace(',', ",,");
            format!("if=none,id=d{n},format={format},file={file}")
        };
        let args = [
            "-drive",
            &drive(0, "qcow2"),
            "-device",
            "virtio-blk-pci,id=vd0,drive=d0",
            "-drive",
            &drive(1, "raw"),
            "-device",
            "virtio-blk-pci,id=vd1,drive=d1",
        ];
        let opened = Opened::start(&with(Machine::new(binary), &args));
        opened.snapshot("s").unwrap();
        let record = opened.record("s");
        for (disk, image) in record.disks.iter().zip(&images) {
            assert_eq!(Path::new(&disk.image), image);
            assert_eq!(Path::new(&disk.overlay), image.with_extension("s"));
        }
        assert_eq!(Record::parse(&record.to_xml()).unwrap(), record);
        opened.snapshot("t").unwrap();
        assert_eq!(chain(&opened.record("t").disks[0].overlay).len(), 3);
        opened.guest.wait_ticks(2);
        let plan = prepare_revert(&opened.state_dir(), "s", Some(directory.path())).unwrap();
        let machine = (0..2).fold(Machine::new(binary), |machine, n| {
            let file = plan.disks[n].file.display().to_string().replace(',', ",,");
            let drive = format!("if=none,id=d{n},format=qcow2,file={file}");
            with(
                machine,
                &["-drive", &drive, "-device", &format!("virtio-blk-pci,id=vd{n},drive=d{n}")],
            )
        });
        let guest = machine.incoming().start();
        let clone = Opened {
            handle: open_guest(&guest, &guest.qmp(), None, &opened.state_dir()).unwrap(),
            guest,
        };
        clone.handle.load("s", 0).unwrap_or_else(|error| clone.guest.fail(&error.message));
        clone.guest.wait_ticks(5);
        // The fresh images are put beside the images too.
        let plan = prepare_revert(&opened.state_dir(), "s", None).unwrap();
        assert!(
            plan.disks
                .iter()
                .all(|disk| disk.file.parent() == Some(&strange.canonicalize().unwrap()))
        );
        delete(&opened, "t");
    }
}

#[test]
fn image_whose_name_is_not_valid_in_xml_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let image: PathBuf = directory.path().join("new\nline.raw");
    make_image(&image, Format::Raw, None);
    let opened = Opened::start(&Machine::new(&Binary::all()[0]).disk_on(&image, Format::Raw));
    let before = opened.trace();
    assert_error(opened.snapshot("s"), Code::XmlError, "control characters");
    let overlay = directory.path().join("overlay").display().to_string();
    let disk = format!("<disk name='vd0'><source file='{overlay}'/></disk>");
    assert_error(
        opened.create(&request("s", &disk), INSTANTLY),
        Code::XmlError,
        "control characters",
    );
    assert_untouched(&opened, &before);
}

/// The call is refused before anything is created.
#[track_caller]
fn assert_refused_in_the_plan(opened: &Opened, xml: &str, code: Code, parts: &[&str]) {
    let mut early = At(|phase| {
        assert!([Phase::Validate, Phase::Plan].contains(&phase), "{phase:?} is too late")
    });
    opened.assert_fails_observed(xml, INSTANTLY, &mut early, code, parts);
}

#[test]
fn removed_or_replaced_image_is_refused_before_anything_is_created() {
    for binary in Binary::any() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let named = |disk: &str| {
            let overlay = path("overlay");
            request(
                "s",
                &format!("<disk name='{disk}'><source file='{}'/></disk>", overlay.display()),
            )
        };
        make_image(&path("below.raw"), Format::Raw, None);
        make_image(&path("above.qcow2"), Format::Qcow2, Some((&path("below.raw"), Format::Raw)));
        make_image(&path("temporary.qcow2"), Format::Qcow2, None);
        let drive = |name: &str, more: &str| {
            format!("if=none,id=d-{name},format=qcow2,file={}{more}", path(name).display())
        };
        let args = [
            "-drive",
            &drive("above.qcow2", ""),
            "-device",
            "virtio-blk-pci,id=vd1,drive=d-above.qcow2",
            "-drive",
            &drive("temporary.qcow2", ",snapshot=on"),
            "-device",
            "virtio-blk-pci,id=vd2,drive=d-temporary.qcow2",
        ];
        let opened = Opened::start(&with(machine(binary, 1), &args));
        let gone = "does not exist any more under this name";
        let only = |disk: &str| {
            let others = ["vd0", "vd1", "vd2"].into_iter().filter(|other| *other != disk);
            let others: String =
                others.map(|other| format!("<disk name='{other}' snapshot='no'/>")).collect();
            named(disk).replace("</disks>", &format!("{others}</disks>"))
        };
        assert_refused_in_the_plan(
            &opened,
            &only("vd2"),
            Code::ConfigUnsupported,
            &["'vd2'", gone, "not be reverted to"],
        );
        // An image that was removed, and one that was replaced, under the running guest; then the
        // same for an image further down a chain.
        let image = opened.guest.disks()[0].file.clone();
        let aside = path("aside");
        for (disk, image) in
            [("vd0", &image), ("vd1", &path("above.qcow2")), ("vd1", &path("below.raw"))]
        {
            std::fs::hard_link(image, &aside).unwrap();
            std::fs::remove_file(image).unwrap();
            let text = image.display().to_string();
            assert_refused_in_the_plan(
                &opened,
                &only(disk),
                Code::ConfigUnsupported,
                &[disk, &text, gone],
            );
            std::fs::copy(&aside, image).unwrap();
            let replaced = "is not the file of this name any more";
            assert_refused_in_the_plan(
                &opened,
                &only(disk),
                Code::ConfigUnsupported,
                &[disk, &text, replaced],
            );
            std::fs::rename(&aside, image).unwrap();
        }
        assert_eq!(
            disks(&opened, "s", "<disk name='vd2' snapshot='no'/>").unwrap(),
            ["vd0", "vd1"]
        );
        opened.guest.wait_ticks(2);
    }
}

#[test]
fn disk_with_a_block_job_is_refused_before_the_pause() {
    for binary in Binary::any() {
        let opened = Opened::start(&machine(binary, 2));
        let run = |command: &str, arguments: Value| {
            opened.guest.control().execute(command, arguments).unwrap()
        };
        run(
            "blockdev-add",
            json!({ "driver": "null-co", "node-name": "target", "size": 16 << 20 }),
        );
        let node = block_of(&opened.guest, "vd1")["inserted"]["node-name"].clone();
        let job = json!({ "job-id": "theirs", "device": node, "target": "target", "sync": "full", "speed": 1 });
        run("blockdev-mirror", job);
        let parts = ["'vd1'", "'theirs'", "mirror", "cancel it"];
        assert_refused_in_the_plan(&opened, &named("s"), Code::OperationInvalid, &parts);
        // The job works on images of the other disk.
        assert_eq!(disks(&opened, "other", "<disk name='vd1' snapshot='no'/>").unwrap(), ["vd0"]);
        run("block-job-cancel", json!({ "device": "theirs", "force": true }));
        let ended = || (run("query-block-jobs", json!({})) == json!([])).then_some(());
        wait_for(instantsnap_testkit::DEADLINE, ended).expect("the job does not end");
        opened.assert_well();
    }
}

#[test]
fn images_with_cache_unsafe_are_flushed_before_success_is_reported() {
    for flags in [INSTANTLY, 0] {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("image");
        make_image(&image, Format::Qcow2, None);
        let drive = format!("if=none,id=vd0,format=qcow2,cache=unsafe,file={}", image.display());
        let machine = with(
            Machine::new(&Binary::all()[0]),
            &["-drive", &drive, "-device", "virtio-blk-pci,id=vd0,drive=vd0"],
        );
        let opened = Opened::start(&machine);
        let image = image.to_str().unwrap();
        match unwritten(image) {
            None => skip("this kernel does not tell what it has not written"),
            Some(0) => skip("on this file system, or by now, all of it is written"),
            Some(_) => {}
        }
        opened.create("<domainsnapshot><name>s</name></domainsnapshot>", flags).unwrap();
        assert_eq!(unwritten(image), Some(0));
    }
}

#[test]
fn image_that_qemu_cannot_reopen_for_writing_is_refused_or_named_by_undo() {
    const USER: u32 = 65534;
    let root = rustix::process::geteuid().is_root();
    let machine = machine(&Binary::all()[0], 1);
    let machine = if root { machine.run_as(USER) } else { machine };
    let opened = Opened::start(&machine);
    let image = opened.guest.disks()[0].file.clone();
    let set = |mode: u32| {
        std::fs::set_permissions(&image, std::fs::Permissions::from_mode(mode)).unwrap()
    };
    set(0o444);
    let mut early = At(|phase| {
        assert!([Phase::Validate, Phase::Plan, Phase::Prepare, Phase::Undo].contains(&phase))
    });
    let parts = ["'vd0'", image.to_str().unwrap(), "444", "snapshot='no'"];
    opened.assert_fails_observed(
        &request("s", ""),
        INSTANTLY,
        &mut early,
        Code::ConfigUnsupported,
        &parts,
    );
    set(0o644);
    let mut late = At(|phase| {
        if phase == Phase::Drain {
            set(0o444);
            opened.handle.cancel().unwrap();
        }
    });
    let error = opened
        .handle
        .create(&request("s", ""), INSTANTLY, &mut late)
        .expect_err("it was cancelled");
    assert_eq!(error.code, Code::OperationFailed, "{error}");
    let overlay = image.with_extension("s");
    for part in ["cancelled", "'vd0'", overlay.to_str().unwrap(), "must not be removed"] {
        assert!(error.message.contains(part), "{part:?} is not in {error}");
    }
    opened.guest.wait_ticks(ALL_SECTORS);
    assert_eq!(opened.active_image("vd0"), overlay.display().to_string());
}
