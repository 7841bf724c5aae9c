// SPDX-License-Identifier: LGPL-2.1-or-later

//! The memory image is in libvirt's format, complete or recognisably partial, and readable by its
//! owner only.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use common::{At, INSTANTLY, Opened, assert_error, first_tick, let_write, machine, named};
use instantsnap::engine::{Phase, prepare_revert};
use instantsnap::error::Code;
use instantsnap::image::{Format, Image, MemoryImage};
use instantsnap_testkit::{Binary, DEADLINE, skip, test, wait_for};
use serde_json::json;

/// libvirt's `virQEMUSaveHeader` and what follows it, parsed independently.
struct Header {
    magic: String,
    numbers: [u32; 5],
    unused: Vec<u8>,
    xml: String,
    padding: usize,
    stream: Vec<u8>,
}

fn header(path: &Path) -> Header {
    let bytes = std::fs::read(path).unwrap();
    let number = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
    let data_len = number(20) as usize;
    let data = &bytes[92..92 + data_len];
    let end = data.iter().position(|byte| *byte == 0).expect("the XML ends with a NUL");
    assert!(data[end..].iter().all(|byte| *byte == 0), "the padding is not zero");
    Header {
        magic: String::from_utf8(bytes[..16].to_vec()).unwrap(),
        numbers: [number(16), data_len as u32, number(24), number(28), number(32)],
        unused: bytes[36..92].to_vec(),
        xml: String::from_utf8(data[..end].to_vec()).unwrap(),
        padding: data_len - end - 1,
        stream: bytes[92 + data_len..].to_vec(),
    }
}

#[test]
fn header_is_libvirts_byte_for_byte() {
    for binary in Binary::any() {
        for (paused, flags) in [(false, INSTANTLY), (false, 0), (true, 0)] {
            let opened = Opened::start(&machine(binary, 1));
            if paused {
                opened.guest.control().execute("stop", serde_json::json!({})).unwrap();
            }
            opened.handle.create_as(Some(Format::Raw), &named("s"), flags, &mut ()).unwrap();
            let path = opened.state_dir().join("s.mem");
            let header = header(&path);
            assert_eq!(header.magic, "LibvirtQemudSave");
            let [version, _, was_running, format, cookie] = header.numbers;
            assert_eq!((version, was_running, format, cookie), (2, u32::from(!paused), 0, 0));
            assert_eq!(header.unused, [0; 56]);
            assert!(
                header.padding >= 64 << 10,
                "the XML can grow by {} bytes only",
                header.padding
            );
            assert_eq!(&header.stream[..4], b"QEVM");
            assert_eq!(
                header.xml.trim_end(),
                opened.record("s").domain_xml,
                "the XML is the recorded one"
            );
            assert_eq!(path.metadata().unwrap().mode() & 0o7777, 0o400);
            // The statistics count all of its bytes.
            let size = opened.handle.stats().unwrap().memory_image_bytes;
            assert_eq!(path.metadata().unwrap().len(), size);
        }
    }
}

#[test]
fn domain_xml_edited_in_place_is_read_back() {
    // `virsh save-image-edit` keeps data_len of the header, and the XML grows into the padding.
    let opened = Opened::start(&machine(&Binary::all()[0], 1));
    opened.snapshot("s").unwrap();
    let path = opened.state_dir().join("s.mem");
    let longer = header(&path)
        .xml
        .replace("</domain>", &format!("<!-- {} --></domain>", "x".repeat(60 << 10)));
    let_write(&path);
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(longer.as_bytes(), 92).unwrap();
    assert_eq!(Image::open(&path).unwrap().domain_xml, longer);
    opened.restore_clone("s");
}

#[test]
fn image_is_marked_partial_until_it_is_complete() {
    for binary in Binary::any() {
        let opened = Opened::start(&machine(binary, 1));
        let path = opened.state_dir().join("s.mem");
        let mut seen = Vec::new();
        let mut observer = At(|phase| {
            if matches!(phase, Phase::Drain | Phase::Finish) {
                let magic = std::fs::read(&path).unwrap()[..16].to_vec();
                let refused = Image::open(&path).expect_err("it is partial");
                assert_eq!(refused.code, Code::InvalidDomainSnapshot);
                seen.push((
                    phase,
                    String::from_utf8(magic).unwrap(),
                    path.metadata().unwrap().mode() & 0o7777,
                ));
            }
        });
        opened.handle.create(&named("s"), INSTANTLY, &mut observer).unwrap();
        let partial = || "LibvirtQemudPart".to_owned();
        assert_eq!(seen, [(Phase::Drain, partial(), 0o600), (Phase::Finish, partial(), 0o600)]);
        assert_eq!(header(&path).magic, "LibvirtQemudSave");
    }
}

/// Writes a complete image with a made-up stream; no QEMU is involved.
fn sample(directory: &Path) -> PathBuf {
    let path = directory.join("sample.mem");
    let image =
        MemoryImage::create(&path, "<domain><name>x</name></domain>", None, true, Format::Raw)
            .unwrap();
    image.file().unwrap().write_all_at(b"QEVM\0\0\0\x03\0", image.stream_offset()).unwrap();
    image.complete(Format::Raw).unwrap();
    path
}

fn overwrite(path: &Path, at: u64, bytes: &[u8]) {
    std::fs::OpenOptions::new().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
}

#[test]
fn damaged_image_is_refused_with_its_name_and_the_damage() {
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 11] = [
        ("incomplete", |path| overwrite(path, 0, b"LibvirtQemudPart")),
        ("not a memory image", |path| overwrite(path, 0, b"NotLibvirtAtAll!")),
        ("too short", |path| {
            std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(0).unwrap()
        }),
        ("too short", |path| {
            std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(50).unwrap()
        }),
        ("too short", |path| {
            std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(92).unwrap()
        }),
        ("too short", |path| {
            std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(4000).unwrap()
        }),
        ("version 3", |path| overwrite(path, 16, &3u32.to_ne_bytes())),
        ("compressed", |path| overwrite(path, 28, &1u32.to_ne_bytes())),
        ("damaged header", |path| overwrite(path, 20, &0u32.to_ne_bytes())),
        ("damaged header", |path| overwrite(path, 20, &u32::MAX.to_ne_bytes())),
        ("damaged domain XML", |path| overwrite(path, 92, &[0xff])),
    ];
    let directory = tempfile::tempdir().unwrap();
    for (what, damage) in damages {
        let path = sample(directory.path());
        assert!(Image::open(&path).is_ok());
        damage(&path);
        assert_error(Image::open(&path), Code::InvalidDomainSnapshot, what);
        assert_error(Image::open(&path), Code::InvalidDomainSnapshot, path.to_str().unwrap());
        std::fs::remove_file(&path).unwrap();
    }
    assert_error(
        Image::open(&directory.path().join("none")),
        Code::InvalidDomainSnapshot,
        "cannot be opened",
    );
}

#[test]
fn load_and_prepare_revert_refuse_a_damaged_image_and_leave_nothing() {
    let opened = Opened::start(&machine(&Binary::all()[0], 1));
    opened.snapshot("s").unwrap();
    let clone = opened.start_clone("s");
    let path = opened.state_dir().join("s.mem");
    let_write(&path);
    let files = opened.trace();
    let whole = std::fs::read(&path).unwrap();
    let refused = |what: &str| {
        let path = path.to_str().unwrap();
        for result in
            [clone.handle.load("s", 0), prepare_revert(&opened.state_dir(), "s", None).map(drop)]
        {
            assert_error(result.clone(), Code::InvalidDomainSnapshot, path);
            assert_error(result, Code::InvalidDomainSnapshot, what);
        }
    };
    let stream = 92 + u64::from(u32::from_ne_bytes(whole[20..24].try_into().unwrap()));
    for (at, bytes, what) in [
        (0, b"LibvirtQemudPart".as_slice(), "incomplete"),
        (0, b"LibvirtQemudXXXX", "not a memory image"),
        (28, &2u32.to_ne_bytes(), "compressed"),
        (stream, b"QEVX", "no stream of QEMU's"),
        (stream + 4, &9u32.to_be_bytes(), "version 9"),
    ] {
        overwrite(&path, at, bytes);
        refused(what);
        overwrite(&path, at, &whole[at as usize..][..bytes.len()]);
    }
    // QEMU would detect a truncated stream only at its end.
    for rest in [stream as usize + 4, whole.len() / 2, whole.len() - 1] {
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(rest as u64).unwrap();
        refused(if rest < stream as usize + 9 { "too short" } else { "cut off" });
        overwrite(&path, rest as u64, &whole[rest..]);
    }
    // QEMU would detect another machine type only then, too.
    let digit = stream + 13 + u64::from(whole[stream as usize + 12]) - 1;
    overwrite(&path, digit, b"9");
    for part in ["of a machine of type", "this QEMU has the type", "`-machine"] {
        assert_error(clone.handle.load("s", 0), Code::ConfigUnsupported, part);
    }
    overwrite(&path, digit, &whole[digit as usize..][..1]);
    common::assert_untouched(&opened, &files);
    // The waiting QEMU was not given a byte, and can still be used.
    clone.handle.load("s", 0).unwrap();
    clone.guest.wait_ticks(3);
}

/// QEMU 9.0 and later reads such an image by itself, through its capability `mapped-ram`.
#[test]
fn qemu_itself_loads_a_sparse_image() {
    let Some(binary) = Binary::all().iter().find(|binary| binary.name.starts_with("10")) else {
        skip("no QEMU 10 is installed");
    };
    for (disks, flags) in [(1, INSTANTLY), (2, 0)] {
        let opened = Opened::start(&machine(binary, disks).restless());
        let before = opened.guest.wait_ticks(1);
        opened.handle.create_as(Some(Format::Sparse), &named("s"), flags, &mut ()).unwrap();
        let stats = opened.handle.stats().unwrap();
        assert_eq!(stats.image_format, Some(Format::Sparse));
        let path = opened.state_dir().join("s.mem");
        let image = path.metadata().unwrap();
        assert_eq!(stats.memory_image_bytes, image.blocks() * 512);
        // Pages of zeros take no room.
        assert!(
            image.blocks() * 512 < image.len() / 2,
            "{} of {}",
            image.blocks() * 512,
            image.len()
        );
        let header = header(&path);
        assert_eq!((header.magic.as_str(), header.numbers[3]), ("LibvirtQemudSave", 6));
        let offset = image.len() - header.stream.len() as u64;

        let clone = opened.start_clone("s");
        let mut control = clone.guest.control();
        let on = json!([{ "capability": "mapped-ram", "state": true }]);
        control.execute("migrate-set-capabilities", json!({ "capabilities": on })).unwrap();
        let uri = format!("file:{},offset={offset}", path.display());
        control.execute("migrate-incoming", json!({ "uri": uri })).unwrap();
        let loaded = || {
            let status = control.execute("query-status", json!({})).unwrap();
            (status["status"] != "inmigrate").then_some(())
        };
        wait_for(DEADLINE, loaded).expect("QEMU loads the image");
        control.execute("cont", json!({})).unwrap();
        clone.guest.wait_ticks(5);
        assert!(first_tick(&clone.guest) >= before);
    }
}

/// QEMU does not name the machine types of QEMU 2.3 and before in the stream.
#[test]
fn stream_of_a_kind_that_is_not_known_stays_raw_and_the_statistics_say_so() {
    let Some(binary) = Binary::all().iter().find(|binary| binary.version < (9, 0, 0)) else {
        skip("no QEMU with such old machine types is installed");
    };
    let opened = Opened::start(&machine(binary, 1).arg("-machine").arg("pc-i440fx-2.3"));
    opened.handle.create_as(Some(Format::Sparse), &named("s"), INSTANTLY, &mut ()).unwrap();
    let stats = opened.handle.stats().unwrap();
    let path = opened.state_dir().join("s.mem");
    assert_eq!(stats.image_format, Some(Format::Raw));
    assert_eq!(stats.memory_image_bytes, path.metadata().unwrap().len());
    assert_eq!(header(&path).numbers[3], 0);
    opened.restore_clone("s");
}

#[test]
fn the_default_is_sparse() {
    let opened = Opened::start(&machine(&Binary::all()[0], 1));
    opened.handle.create_as(None, &named("s"), INSTANTLY, &mut ()).unwrap();
    assert_eq!(opened.handle.stats().unwrap().image_format, Some(Format::Sparse));
    assert_eq!(header(&opened.state_dir().join("s.mem")).numbers[3], 6);
}

#[test]
fn existing_memory_file_is_not_touched() {
    let opened = Opened::start(&machine(&Binary::all()[0], 1));
    let path = opened.guest.directory().join("somebody's");
    std::fs::write(&path, "precious").unwrap();
    let before = opened.trace();
    let xml = format!(
        "<domainsnapshot><name>s</name><memory snapshot='external' file=\"{}\"/></domainsnapshot>",
        path.display()
    );
    assert_error(opened.create(&xml, INSTANTLY), Code::ConfigUnsupported, "already exists");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    common::assert_untouched(&opened, &before);
}

#[test]
fn image_has_the_domain_xml_of_the_caller() {
    let guest = machine(&Binary::all()[0], 1).start();
    guest.wait_ticks(2);
    let file = guest.disks()[0].file.display().to_string();
    let xml = format!(
        "<domain type='qemu'>\n  <name>ünï &amp; &lt;co&gt;</name>\n  <!-- theirs -->\n  <devices>\n    <disk type='file' \
         device='disk'>\n      <driver name='qemu' type='raw'/>\n      <source file='{file}'/>\n      <target \
         dev='vda'/>\n    </disk>\n  </devices>\n</domain>\n"
    );
    let opened = Opened::with_domain(guest, &xml);
    opened.snapshot("s").unwrap();
    assert_eq!(header(&opened.state_dir().join("s.mem")).xml.trim_end(), xml.trim_end());
}

/// The status of the guest that a background snapshot records.
#[test]
fn image_records_whether_the_guest_ran() {
    for binary in Binary::any() {
        for (state, prepare) in [("running", "query-status"), ("paused", "stop")] {
            let guest = common::machine(binary, 1).start();
            guest.wait_ticks(2);
            let stream = guest.directory().join("stream");
            let mut control = guest.control();
            let on =
                json!({ "capabilities": [{ "capability": "background-snapshot", "state": true }] });
            control.execute("migrate-set-capabilities", on).unwrap();
            control.execute(prepare, json!({})).unwrap();
            let to_file = format!("exec:cat >{0}.part && mv {0}.part {0}", stream.display());
            control.execute("migrate", json!({ "uri": to_file })).unwrap();
            wait_for(DEADLINE, || stream.exists().then_some(())).expect("QEMU saves its memory");
            let image = MemoryImage::create(
                &guest.directory().join("image"),
                "<domain/>",
                None,
                true,
                Format::Raw,
            )
            .unwrap();
            let mut file = image.file().unwrap();
            file.seek(SeekFrom::Start(image.stream_offset())).unwrap();
            std::io::copy(&mut File::open(&stream).unwrap(), &mut file).unwrap();
            assert_eq!(
                image.state_at_instant().unwrap().as_deref(),
                Some(state),
                "QEMU {}",
                binary.name
            );
        }
    }
}
