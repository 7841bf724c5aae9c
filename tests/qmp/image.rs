// SPDX-License-Identifier: LGPL-2.1-or-later

//! Memory images in another format: a snapshot comes back from a sparse image as from a raw one,
//! and conversion keeps all that is in an image.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use common::backend::open_guest;
use common::{INSTANTLY, Opened, assert_error, first_tick, let_write, machine, named};
use instantsnap::engine::{SparseReader, prepare_revert};
use instantsnap::error::Code;
use instantsnap::image::{Contents, Format, Image, Index, Page, convert, make_index, verify};
use instantsnap::model::flags::revert::PAUSED;
use instantsnap_testkit::{
    Binary, Fault, Fingerprint, Format as DiskFormat, Guest, Proxy, fingerprint, skip, test,
};
use serde_json::json;

const PAGE: usize = 4096;

/// The parts of a raw image, read independently.
#[derive(PartialEq, Eq)]
struct Raw {
    /// All up to the first page.
    head: Vec<u8>,
    /// The pages that are not all zeros, by block and offset.
    pages: BTreeMap<(String, u64), Vec<u8>>,
    /// All after the last page.
    tail: Vec<u8>,
}

fn raw(path: &Path) -> Raw {
    let bytes = std::fs::read(path).unwrap();
    let u32_at = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
    let u64_at = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let name_at = |at: usize| {
        let length = usize::from(bytes[at]);
        (String::from_utf8(bytes[at + 1..at + 1 + length].to_vec()).unwrap(), at + 1 + length)
    };
    let begin = 92 + u32::from_ne_bytes(bytes[20..24].try_into().unwrap()) as usize;
    let ram = b"\x03ram\0\0\0\0\0\0\0\x04";
    let ram = bytes[begin..].windows(ram.len()).position(|part| part == ram).unwrap();
    let section = u32_at(begin + ram - 4);
    let mut at = begin + ram + 12;
    let mut left = u64_at(at) & !0xfff;
    at += 8;
    while left > 0 {
        let (_, size) = name_at(at);
        left -= u64_at(size);
        at = size + 8;
    }
    // The end of the section.
    at += 8 + 5;
    let head = bytes[..at].to_vec();
    let mut pages = BTreeMap::new();
    let mut block = String::new();
    while matches!(bytes[at], 2 | 3) && u32_at(at + 1) == section {
        at += 5;
        loop {
            let (offset, flags) = (u64_at(at) & !0xfff, u64_at(at) & 0xfff);
            at += 8;
            if flags == 16 {
                break;
            }
            if flags & 32 == 0 {
                (block, at) = name_at(at);
            }
            let key = (block.clone(), offset);
            if flags & 8 != 0 {
                pages.insert(key, bytes[at..at + PAGE].to_vec());
                at += PAGE;
            } else {
                assert_eq!((flags & !32, bytes[at]), (2, 0));
                pages.remove(&key);
                at += 1;
            }
        }
        assert_eq!((bytes[at], u32_at(at + 1)), (0x7e, section));
        at += 5;
    }
    pages.retain(|_, page| page.iter().any(|byte| *byte != 0));
    Raw { head, pages, tail: bytes[at..].to_vec() }
}

#[test]
fn snapshot_comes_back_from_a_sparse_image_and_conversion_to_raw_keeps_its_pages() {
    for binary in Binary::all() {
        let opened = Opened::start(&machine(binary, 2));
        opened.handle.create_as(Some(Format::Raw), &named("s"), INSTANTLY, &mut ()).unwrap();
        let path = opened.state_dir().join("s.mem");
        let before = raw(&path);
        let contents = Contents::read(&path).unwrap();
        let (_, first) = opened.restore_clone("s");

        convert(&path, Format::Sparse).unwrap();
        let image = Image::open(&path).unwrap();
        assert_eq!(image.format(), Format::Sparse);
        let sparse = Contents::read(&path).unwrap();
        assert_eq!(sparse.format, "sparse");
        let data = |contents: &Contents| -> u64 {
            contents.blocks.iter().map(|block| block.data_pages).sum()
        };
        assert_eq!(data(&sparse), data(&contents));
        assert_eq!(sparse.machine, contents.machine);
        // Pages of zeros take no space.
        let pages: u64 = sparse.blocks.iter().map(|block| block.bytes).sum();
        assert!(sparse.disk_bytes < pages / 2, "{} {pages}", sparse.disk_bytes);
        let (clone, again) = opened.restore_clone("s");
        assert_eq!(again, first, "QEMU {}", binary.name);
        // A clone can be snapshotted in turn.
        clone.snapshot("t").unwrap();

        convert(&path, Format::Raw).unwrap();
        assert!(raw(&path) == before, "QEMU {}", binary.name);
        let (_, again) = opened.restore_clone("s");
        assert_eq!(again, first);
    }
}

fn zstd() -> Format {
    Format::named("zstd").unwrap()
}

fn pages_file(image: &Path) -> std::path::PathBuf {
    format!("{}.pages", image.display()).into()
}

#[test]
fn snapshot_comes_back_from_a_zstd_image_that_the_zstd_program_reads() {
    for binary in Binary::all() {
        let opened = Opened::start(&machine(binary, 2));
        opened.handle.create_as(Some(zstd()), &named("s"), INSTANTLY, &mut ()).unwrap();
        let path = opened.state_dir().join("s.mem");
        assert_eq!(opened.handle.stats().unwrap().image_format, Some(zstd()));
        let contents = Contents::read(&path).unwrap();
        assert_eq!(contents.format, "zstd");
        assert!(contents.notes.as_ref().is_some_and(|notes| notes.checksums));
        verify(&path).unwrap();
        let (clone, first) = opened.restore_clone("s");
        clone.snapshot("t").unwrap();
        clone.handle.delete("t", 0).unwrap();

        // Libvirt runs this program.
        let begin = Image::open(&path).unwrap().stream_offset as usize;
        let bytes = std::fs::read(&path).unwrap();
        let compressed = opened.guest.directory().join("compressed");
        std::fs::write(&compressed, &bytes[begin..]).unwrap();
        let input = std::fs::File::open(&compressed).unwrap();
        let output = std::process::Command::new("zstd").arg("-dc").stdin(input).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        convert(&path, Format::Raw).unwrap();
        assert!(std::fs::read(&path).unwrap()[begin..] == output.stdout);
        assert!(bytes.len() < output.stdout.len() / 3, "{} {}", bytes.len(), output.stdout.len());
        let (_, again) = opened.restore_clone("s");
        assert_eq!(again, first, "QEMU {}", binary.name);

        // All ways from format to format keep the pages.
        let before = raw(&path);
        for format in [Format::Sparse, zstd()] {
            convert(&path, format).unwrap();
            verify(&path).unwrap();
            assert_eq!(Contents::read(&path).unwrap().blocks, contents.blocks);
        }
        convert(&path, Format::Raw).unwrap();
        assert!(raw(&path) == before, "QEMU {}", binary.name);
    }
}

/// The pages that the guest writes first after the instant are noted, and each page is found by
/// the index, in a sparse image and in a raw one.
#[test]
fn index_finds_each_page_and_says_what_the_guest_wrote_first_and_goes_with_its_image() {
    for binary in Binary::any() {
        let opened = Opened::start(&machine(binary, 1));
        opened.handle.create_as(Some(Format::Sparse), &named("s"), INSTANTLY, &mut ()).unwrap();
        let path = opened.state_dir().join("s.mem");
        assert_eq!(pages_file(&path).metadata().unwrap().mode() & 0o7777, 0o600);
        let index = Index::open(&path).unwrap();
        let first: Vec<_> = index.written_first().collect();
        // The guest writes all the time, so it has written before QEMU had saved all.
        let ram = index.blocks().iter().position(|block| block.name == b"pc.ram").unwrap();
        assert!(first.iter().any(|(block, _)| *block == ram), "{first:?}");
        convert(&path, Format::Raw).unwrap();
        make_index(&path).unwrap();
        let pages = raw(&path).pages;
        let by_raw = Index::open(&path).unwrap();
        assert!(by_raw.written_first().eq(first));
        for index in [index, by_raw] {
            for (number, block) in index.blocks().iter().enumerate() {
                let name = String::from_utf8(block.name.clone()).unwrap();
                for page in 0..index.pages(number) {
                    let mut content = [0; PAGE];
                    if let Page::Data(offset) = index.page_at(number, page).unwrap() {
                        use std::os::unix::fs::FileExt;
                        index.file().read_exact_at(&mut content, offset).unwrap();
                    }
                    let expected = pages.get(&(name.clone(), page * PAGE as u64));
                    let is_equal =
                        expected.map_or(content == [0; PAGE], |page| page[..] == content);
                    assert!(is_equal, "page {page} of {name}, QEMU {}", binary.name);
                }
            }
        }
        opened.handle.delete("s", 0).unwrap();
        assert!(!pages_file(&path).exists());
        opened.assert_well();
    }
}

/// Files can be RAM, and such a file can have an old content.
#[test]
fn memory_that_was_loaded_is_the_images_page_by_page_whatever_was_there_before() {
    /// A block of this size can be loaded without its pages of zeros.
    const MIB: u32 = 64;
    const SIZE: usize = (MIB as usize) << 20;
    for binary in Binary::any() {
        let opened = Opened::start(&machine(binary, 1).memory(MIB));
        opened.handle.create_as(Some(Format::Raw), &named("s"), INSTANTLY, &mut ()).unwrap();
        let path = opened.state_dir().join("s.mem");
        let pages = raw(&path).pages;
        for format in [Format::Raw, Format::Sparse] {
            convert(&path, format).unwrap();
            let ram = opened.guest.directory().join("ram");
            std::fs::write(&ram, vec![0xa5; SIZE]).unwrap();
            let plan = prepare_revert(&opened.state_dir(), "s", None).unwrap();
            let disks: Vec<_> =
                plan.disks.iter().map(|disk| (disk.file.clone(), DiskFormat::Qcow2)).collect();
            let backend = format!(
                "memory-backend-file,id=pc.ram,size={SIZE},mem-path={},share=on",
                ram.display()
            );
            let machine = opened.guest.machine().for_revert(&disks).arg("-object").arg(&backend);
            let guest = machine.arg("-machine").arg("memory-backend=pc.ram").start();
            let handle = open_guest(&guest, &guest.qmp(), None, &opened.state_dir()).unwrap();
            handle.load("s", PAUSED).unwrap();
            let loaded = std::fs::read(&ram).unwrap();
            assert_eq!(loaded.len(), SIZE);
            for (page, loaded) in (0..).zip(loaded.chunks(PAGE)) {
                let expected = pages.get(&("pc.ram".to_owned(), page * PAGE as u64));
                let is_equal = expected.map_or(*loaded == [0; PAGE], |page| page == loaded);
                assert!(is_equal, "page {page}, {format:?}, QEMU {}", binary.name);
            }
        }
    }
}

/// The memory blocks of a QEMU that has loaded a snapshot and has not run: `pc.ram`, which is a
/// memfd, and the others where QEMU says where they are.
fn loaded_ram(guest: &Guest) -> Vec<(String, Vec<u8>)> {
    let fds = std::fs::read_dir(format!("/proc/{}/fd", guest.pid())).unwrap();
    let is_memory = |fd: &PathBuf| {
        fd.read_link().is_ok_and(|link| link.to_str().unwrap().contains("memfd:memory-backend"))
    };
    let memory = fds.map(|fd| fd.unwrap().path()).find(is_memory).expect("the guest's memory");
    let mut blocks = vec![("pc.ram".to_owned(), std::fs::read(memory).unwrap())];
    let command = json!({ "command-line": "info ramblock" });
    let table = guest.control().execute("human-monitor-command", command).unwrap();
    let number = |text: &str| usize::from_str_radix(text.trim_start_matches("0x"), 16).unwrap();
    let memory = File::open(format!("/proc/{}/mem", guest.pid())).unwrap();
    for line in table.as_str().unwrap().lines().skip(1) {
        // The name, the page size and its unit, the offset, the sizes, the address.
        let words: Vec<_> = line.split_whitespace().collect();
        if let [name, _, _, _, used, _, address, _] = words[..] {
            let mut content = vec![0; number(used)];
            memory.read_exact_at(&mut content, number(address) as u64).unwrap();
            blocks.push((name.to_owned(), content));
        }
    }
    blocks
}

/// The library or QEMU reads the image. A page of the ACPI tables is zero in the image, and not in a
/// QEMU that has just started.
#[test]
fn memory_is_the_images_page_by_page_whoever_reads_the_image() {
    /// A block of this size can be loaded without its pages of zeros.
    const MIB: u32 = 64;
    const SIZE: usize = (MIB as usize) << 20;
    const TABLES: &str = "/rom@etc/acpi/tables";
    for binary in Binary::all() {
        let opened = Opened::start(&machine(binary, 1).memory(MIB));
        opened.handle.create_as(Some(Format::Sparse), &named("s"), INSTANTLY, &mut ()).unwrap();
        let path = opened.state_dir().join("s.mem");
        let image = Image::open(&path).unwrap();
        let sparse = image.sparse.unwrap();
        let named =
            |wanted: &str| sparse.blocks().find(|(_, block)| block.name == wanted.as_bytes());
        let (tables, _) = named(TABLES).unwrap();
        let place = sparse.layout.places[tables].pages;
        let_write(&path);
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let mut page = [0; PAGE];
        file.read_exact_at(&mut page, place).unwrap();
        assert_ne!(page, [0; PAGE]);
        file.write_all_at(&[0; PAGE], place).unwrap();
        convert(&path, Format::Raw).unwrap();
        let pages = raw(&path).pages;
        assert!(!pages.contains_key(&(TABLES.to_owned(), 0)));

        let mut ways = vec![
            (Format::Raw, SparseReader::Any),
            (Format::Sparse, SparseReader::Any),
            (Format::Sparse, SparseReader::Library),
        ];
        if binary.version >= (9, 0, 0) {
            let by_qemu = [1, 2, 4].map(|channels| SparseReader::Qemu { channels });
            ways.extend(by_qemu.map(|reader| (Format::Sparse, reader)));
        }
        for (format, reader) in ways {
            convert(&path, format).unwrap();
            let plan = prepare_revert(&opened.state_dir(), "s", None).unwrap();
            let disks: Vec<_> =
                plan.disks.iter().map(|disk| (disk.file.clone(), DiskFormat::Qcow2)).collect();
            let backend = format!("memory-backend-memfd,id=pc.ram,size={SIZE},share=on");
            let machine = opened.guest.machine().for_revert(&disks).arg("-object").arg(&backend);
            let guest = machine.arg("-machine").arg("memory-backend=pc.ram").start();
            let before = fingerprint(&mut guest.control());
            let handle = open_guest(&guest, &guest.qmp(), None, &opened.state_dir()).unwrap();
            handle.set_sparse_reader(reader);
            handle.load("s", PAUSED).unwrap();
            let blocks = loaded_ram(&guest);
            assert!(blocks.len() > 1 || binary.version < (9, 0, 0), "{blocks:?}");
            for (block, loaded) in blocks {
                for (page, loaded) in (0..).zip(loaded.chunks(PAGE)) {
                    let expected = pages.get(&(block.clone(), page * PAGE as u64));
                    let is_equal = expected.map_or(*loaded == [0; PAGE], |page| page == loaded);
                    assert!(is_equal, "{block}, page {page}, {reader:?}, QEMU {}", binary.name);
                }
            }
            let after = fingerprint(&mut guest.control());
            for part in ["capabilities", "parameters", "fdsets"] {
                assert_eq!(after.0[part], before.0[part], "{reader:?}, QEMU {}", binary.name);
            }
        }
    }
}

/// QEMU does not begin, or fails when it reads the devices.
#[test]
fn qemu_that_cannot_read_the_image_has_its_settings_back_and_is_given_a_stream_if_it_still_waits() {
    let Some(binary) = Binary::all().iter().find(|binary| binary.version >= (9, 1, 0)) else {
        skip("no QEMU is installed that reads sparse images, and says why it cannot");
    };
    let opened = Opened::start(&machine(binary, 1));
    opened.handle.create_as(Some(Format::Sparse), &named("s"), INSTANTLY, &mut ()).unwrap();
    let path = opened.state_dir().join("s.mem");
    let assert_restored = |guest: &Guest, before: &Fingerprint| {
        let after = fingerprint(&mut guest.control());
        for part in ["capabilities", "parameters", "fdsets"] {
            assert_eq!(after.0[part], before.0[part]);
        }
    };
    for command in ["add-fd", "migrate-set-capabilities", "migrate-incoming"] {
        let Opened { guest, handle } = opened.start_clone("s");
        drop(handle);
        let proxy = Proxy::start(&guest.directory().join("proxy"), &guest.qmp());
        let mut control = guest.control();
        let other = json!({ "multifd-channels": 7, "max-bandwidth": 12345678 });
        control.execute("migrate-set-parameters", other).unwrap();
        let xbzrle = json!({ "capabilities": [{ "capability": "xbzrle", "state": true }] });
        control.execute("migrate-set-capabilities", xbzrle).unwrap();
        let before = fingerprint(&mut control);
        drop(control);
        let handle = open_guest(&guest, proxy.path(), None, &opened.state_dir()).unwrap();
        proxy.rule(command, 1, Fault::fail("not today"));
        handle.load("s", PAUSED).unwrap();
        assert_eq!(proxy.rules_left(), 0);
        assert_restored(&guest, &before);
    }

    // The section's mark between two devices.
    let image = Image::open(&path).unwrap();
    let whole = std::fs::read(&path).unwrap();
    let devices = image.sparse.unwrap().devices as usize;
    let mark = devices + whole[devices..].iter().position(|byte| *byte == 0x7e).unwrap();
    let_write(&path);
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(&[0x7f], mark as u64).unwrap();
    let clone = opened.start_clone("s");
    let before = fingerprint(&mut clone.guest.control());
    let result = clone.handle.load("s", 0);
    assert_error(result, Code::OperationFailed, "QEMU cannot load the memory image");
    assert_restored(&clone.guest, &before);
}

#[test]
fn paused_guest_comes_back_paused_from_a_sparse_image() {
    let opened = Opened::start(&machine(&Binary::all()[0], 1));
    opened.guest.control().execute("stop", serde_json::json!({})).unwrap();
    opened.create(&named("s"), INSTANTLY).unwrap();
    convert(&opened.state_dir().join("s.mem"), Format::Sparse).unwrap();
    let clone = opened.start_clone("s");
    clone.handle.load("s", 0).unwrap();
    let status = clone.guest.control().execute("query-status", serde_json::json!({})).unwrap();
    assert_eq!(status["status"], "paused");
    clone.guest.control().execute("cont", serde_json::json!({})).unwrap();
    clone.guest.wait_ticks(5);
    first_tick(&clone.guest);
}

#[test]
fn conversion_keeps_mode_and_xml_and_leaves_no_other_file() {
    let opened = Opened::start(&machine(&Binary::all()[0], 1));
    opened.snapshot("s").unwrap();
    let path = opened.state_dir().join("s.mem");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
    make_index(&path).unwrap();
    let link = opened.state_dir().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    let before = (opened.trace(), Image::open(&path).unwrap().domain_xml);
    convert(&link, Format::Sparse).unwrap();
    assert!(link.symlink_metadata().unwrap().is_symlink());
    assert_eq!(path.metadata().unwrap().mode() & 0o7777, 0o640);
    assert_eq!((opened.trace(), Image::open(&path).unwrap().domain_xml), before);
    // It has the format already.
    let inode = path.metadata().unwrap().ino();
    convert(&path, Format::Sparse).unwrap();
    assert_eq!(path.metadata().unwrap().ino(), inode);
}

#[test]
fn cut_off_sparse_image_is_refused_before_qemu_is_given_a_byte() {
    cut_off_is_refused(Format::Sparse);
}

#[test]
fn cut_off_zstd_image_is_refused_before_qemu_is_given_a_byte() {
    cut_off_is_refused(zstd());
}

fn cut_off_is_refused(format: Format) {
    let opened = Opened::start(&machine(&Binary::all()[0], 1));
    opened.snapshot("s").unwrap();
    let path = opened.state_dir().join("s.mem");
    convert(&path, format).unwrap();
    let_write(&path);
    let clone = opened.start_clone("s");
    let whole = std::fs::read(&path).unwrap();
    let shorten = |length: u64| {
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(length).unwrap();
    };
    for rest in [70 << 10, whole.len() / 2, whole.len() - 1] {
        shorten(rest as u64);
        for result in [
            clone.handle.load("s", 0),
            prepare_revert(&opened.state_dir(), "s", None).map(drop),
            Contents::read(&path).map(drop),
            convert(&path, Format::Raw),
        ] {
            assert_error(result, Code::InvalidDomainSnapshot, path.to_str().unwrap());
        }
        std::fs::write(&path, &whole).unwrap();
    }
    clone.handle.load("s", 0).unwrap();
    clone.guest.wait_ticks(3);
}
