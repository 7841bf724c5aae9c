// SPDX-License-Identifier: LGPL-2.1-or-later

//! Reverting by a mapping: QEMU has the memory image as its RAM, in private mappings.

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use common::backend::open_guest;
use common::{INSTANTLY, Opened, assert_error, assert_says, first_tick, let_write, machine, named};
use instantsnap::engine::{MemoryBackend, RevertOptions, RevertPlan, prepare_revert_with};
use instantsnap::error::Code;
use instantsnap::image::{Format, convert};
use instantsnap::model::Memory;
use instantsnap::model::flags::revert::PAUSED;
use instantsnap_testkit::compile::workspace;
use instantsnap_testkit::{Binary, Format as DiskFormat, Machine, skip, test};
use serde_json::json;

/// The QEMUs that can map an image.
fn binaries() -> impl Iterator<Item = &'static Binary> {
    let is_new = |binary: &&Binary| binary.version >= (8, 2, 0);
    let all: Vec<_> = Binary::all().iter().filter(is_new).collect();
    if all.is_empty() {
        skip("no QEMU 8.2 or later is here");
    }
    all.into_iter()
}

/// A running guest with a sparse snapshot `s`.
fn original(machine: &Machine) -> Opened {
    let opened = Opened::start(machine);
    let sparse = Some(Format::Sparse);
    opened.handle.create_as(sparse, &named("s"), INSTANTLY, &mut ()).unwrap();
    opened
}

fn plan(opened: &Opened) -> RevertPlan {
    let options = RevertOptions { memory: Memory::Map, ..RevertOptions::default() };
    prepare_revert_with(&opened.state_dir(), "s", options).unwrap()
}

/// Starts a QEMU on the plan's disks, with these arguments.
fn start(opened: &Opened, machine: &Machine, plan: &RevertPlan, arguments: &[&str]) -> Opened {
    let disks: Vec<_> =
        plan.disks.iter().map(|disk| (disk.file.clone(), DiskFormat::Qcow2)).collect();
    let machine =
        arguments.iter().fold(machine.for_revert(&disks), |machine, arg| machine.arg(arg));
    let guest = machine.start();
    let handle = open_guest(&guest, &guest.qmp(), None, &opened.state_dir()).unwrap();
    Opened { handle, guest }
}

/// Starts a QEMU whose RAM is this memory backend.
fn start_on(opened: &Opened, plan: &RevertPlan, object: &str) -> Opened {
    let machine = opened.guest.machine();
    start(opened, machine, plan, &["-object", object, "-machine", "memory-backend=pc.ram"])
}

fn start_mapped(opened: &Opened) -> Opened {
    let plan = plan(opened);
    let [backend] = &plan.memory_backends[..] else { panic!("{:?}", plan.memory_backends) };
    start_on(opened, &plan, &backend.object())
}

fn image(opened: &Opened) -> std::path::PathBuf {
    opened.state_dir().join("s.mem")
}

/// QEMU still waits for a snapshot, and ends as it should.
fn assert_waits_and_ends(clone: &Opened) {
    let mut control = clone.guest.control();
    let status = control.execute("query-status", json!({})).unwrap();
    assert_eq!(status["status"], "inmigrate");
    control.execute("quit", json!({})).unwrap();
}

/// How many bytes of the image's mappings QEMU has copied, because they were written.
fn copied(clone: &Opened) -> u64 {
    let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", clone.guest.pid())).unwrap();
    let (mut of_image, mut sum, mut seen) = (false, 0, false);
    for line in smaps.lines() {
        let mut fields = line.split_ascii_whitespace();
        match fields.next().unwrap_or_default() {
            "Anonymous:" if of_image => {
                sum += fields.next().unwrap().parse::<u64>().unwrap() << 10;
            }
            field if field.contains('-') => {
                of_image = line.ends_with("/s.mem");
                seen |= of_image;
            }
            _ => {}
        }
    }
    assert!(seen, "{smaps}");
    sum
}

#[test]
fn mapped_guest_counts_on_from_the_instant_and_leaves_the_image_as_it_is() {
    for binary in binaries() {
        let opened = original(&machine(binary, 2));
        let before = std::fs::read(image(&opened)).unwrap();
        let (_full, first) = opened.restore_clone("s");
        for wanted in [Memory::Map, Memory::Auto] {
            let clone = start_mapped(&opened);
            let loaded = clone.handle.load_with("s", PAUSED, wanted).unwrap();
            assert_eq!((loaded.memory, loaded.running), (Memory::Map, false));
            // Next to no page was written to it.
            let copied = copied(&clone);
            assert!(copied < 1 << 20, "{copied}");
            clone.guest.control().execute("cont", json!({})).unwrap();
            // Each tick checks every page, every disk and the serial line.
            clone.guest.wait_ticks(5);
            assert_eq!(first_tick(&clone.guest), first);
            assert!(std::fs::read(image(&opened)).unwrap() == before);
        }
        // The plan of another way has no memory backends.
        let options = RevertOptions { memory: Memory::Full, ..RevertOptions::default() };
        let plan = prepare_revert_with(&opened.state_dir(), "s", options).unwrap();
        assert!(plan.memory_backends.is_empty());
    }
}

#[test]
fn ten_clones_of_one_snapshot_run_at_once_each_on_its_own() {
    for binary in binaries() {
        let opened = original(&machine(binary, 1));
        let before = std::fs::read(image(&opened)).unwrap();
        let clones: Vec<_> = (0..10).map(|_| start_mapped(&opened)).collect();
        for clone in &clones {
            clone.handle.load_with("s", 0, Memory::Map).unwrap();
        }
        for clone in &clones {
            clone.guest.wait_ticks(3);
        }
        let firsts: Vec<_> = clones.iter().map(|clone| first_tick(&clone.guest)).collect();
        assert!(firsts.iter().all(|first| *first == firsts[0]), "{firsts:?}");
        assert!(std::fs::read(image(&opened)).unwrap() == before);
    }
}

/// `examples/clone.py`.
#[test]
fn example_starts_clones_that_all_count_on_from_the_instant() {
    for binary in binaries() {
        let library = std::env::current_exe().unwrap().with_file_name("libinstantsnap.so");
        let output = Command::new("/usr/bin/python3")
            .arg(workspace().join("examples/clone.py"))
            .args(["--clones", "3", "--qemu"])
            .arg(binary.emulator())
            .env("INSTANTSNAP_LIBRARY", library)
            .env("PYTHONPATH", workspace().join("python"))
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .output()
            .unwrap();
        let [text, errors] =
            [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned());
        assert!(output.status.success(), "{text}{errors}");
        let counted: Vec<&str> = text
            .lines()
            .filter_map(|line| Some(line.strip_prefix("clone ")?.split_once(" counted ")?.1))
            .collect();
        assert_eq!(counted.len(), 3, "{text}");
        assert!(counted.iter().all(|clone| *clone == counted[0]), "{text}");
        // The first number can be the rest of one that was being printed.
        let last: Vec<u32> =
            counted[0].split(' ').skip(1).map(|number| number.parse().unwrap()).collect();
        assert!(last.len() == 2 && last[0] + 1 == last[1], "{text}");
    }
}

#[test]
fn snapshot_is_not_deleted_while_a_guest_maps_its_image() {
    for binary in binaries() {
        let opened = original(&machine(binary, 1));
        let left = |name: &str| {
            let files = opened.state_dir().read_dir().unwrap();
            files.flatten().any(|file| file.file_name().to_string_lossy().contains(name))
        };
        let clones = [start_mapped(&opened), start_mapped(&opened)];
        for clone in &clones {
            clone.handle.load_with("s", 0, Memory::Map).unwrap();
        }
        for clone in &clones {
            let error = opened.handle.delete("s", 0).unwrap_err();
            assert_says(&error, Code::OperationInvalid, &["'s'", "s.mem", "process", "end that"]);
            assert!(image(&opened).exists() && left(".map-"));
            clone.guest.wait_ticks(2);
            clone.guest.kill();
        }
        opened.handle.delete("s", 0).unwrap();
        assert!(!image(&opened).exists());
        // Nothing is left of what was noted of the clones.
        assert!(!left(".map-"));
        opened.assert_well();
    }
}

/// A mapping of wrong memory would corrupt the guest, a shared one the snapshot.
#[test]
fn wrong_mappings_are_refused_by_name_before_qemu_is_given_a_byte() {
    for binary in binaries() {
        let opened = original(&machine(binary, 1));
        opened.handle.create_as(Some(Format::Sparse), &named("t"), INSTANTLY, &mut ()).unwrap();
        let before = std::fs::read(image(&opened)).unwrap();
        // Nobody but root could start QEMU with most of these otherwise.
        let_write(&image(&opened));
        let plan = plan(&opened);
        let MemoryBackend { offset, .. } = plan.memory_backends[0];
        let object = plan.memory_backends[0].object();
        let change = |what: &str, with: &str| {
            assert!(object.contains(what), "{object}");
            object.replace(what, with)
        };
        let other = opened.state_dir().join("t.mem");
        for (object, part) in [
            (change(&format!("offset={offset}"), "offset=0"), "offset=0, and needs offset="),
            (change("readonly=on,rom=off", "readonly=off,rom=off"), "readonly=off, and needs"),
            (change("share=off,readonly=on", "share=on,readonly=off"), "share=on, and needs"),
            (
                change(image(&opened).to_str().unwrap(), other.to_str().unwrap()),
                "is not the snapshot's memory image",
            ),
            ("memory-backend-ram,id=pc.ram,size=16M".into(), "is a memory-backend-ram"),
        ] {
            let clone = start_on(&opened, &plan, &object);
            let error = clone.handle.load_with("s", 0, Memory::Map).unwrap_err();
            assert_says(&error, Code::ConfigUnsupported, &["'pc.ram'", part, "-object"]);
            assert_waits_and_ends(&clone);
        }
        // The library does not choose to load all of it where the image is mapped wrongly.
        let clone = start_on(&opened, &plan, &change("readonly=on,rom=off", "rom=off"));
        for memory in [Memory::Auto, Memory::Full] {
            let error = clone.handle.load_with("s", 0, memory).unwrap_err();
            assert_says(&error, Code::ConfigUnsupported, &["'pc.ram'"]);
        }
        assert!(std::fs::read(image(&opened)).unwrap() == before);
        // A QEMU without a mapping can still be given all of the memory.
        let clone = opened.start_clone("s");
        let error = clone.handle.load_with("s", 0, Memory::Map).unwrap_err();
        assert_says(&error, Code::ConfigUnsupported, &["'pc.ram'", "-object", "'full'"]);
        let loaded = clone.handle.load_with("s", 0, Memory::Auto).unwrap();
        assert_eq!(loaded.memory, Memory::Full);
        clone.guest.wait_ticks(3);
    }
}

#[test]
fn smaller_memory_than_the_snapshots_is_refused() {
    for binary in binaries() {
        let opened = original(&machine(binary, 1));
        let plan = plan(&opened);
        let object = plan.memory_backends[0].object();
        let object = object.replace(&format!("size={}", 16 << 20), &format!("size={}", 8 << 20));
        let arguments = ["-object", &object, "-machine", "memory-backend=pc.ram", "-m", "8"];
        let clone = start(&opened, opened.guest.machine(), &plan, &arguments);
        let error = clone.handle.load_with("s", 0, Memory::Map).unwrap_err();
        assert_says(&error, Code::ConfigUnsupported, &["size=8388608, and needs size=16777216"]);
        assert_waits_and_ends(&clone);
    }
}

#[test]
fn image_that_was_replaced_or_holds_old_content_is_refused() {
    for binary in binaries() {
        // An image has all pages of smaller blocks.
        let opened = original(&machine(binary, 1).memory(64));
        let clone = start_mapped(&opened);
        convert(&image(&opened), Format::Raw).unwrap();
        let error = clone.handle.load_with("s", 0, Memory::Map).unwrap_err();
        assert_says(&error, Code::ConfigUnsupported, &["'raw'", "instantsnap_image_convert()"]);
        let options = RevertOptions { memory: Memory::Map, ..RevertOptions::default() };
        let prepared = prepare_revert_with(&opened.state_dir(), "s", options);
        assert_error(prepared, Code::ConfigUnsupported, "instantsnap_image_convert()");
        convert(&image(&opened), Format::Sparse).unwrap();
        // QEMU has the file that was replaced.
        let error = clone.handle.load_with("s", 0, Memory::Map).unwrap_err();
        assert_says(&error, Code::ConfigUnsupported, &["was replaced since QEMU was started"]);
        assert_waits_and_ends(&clone);

        let clone = start_mapped(&opened);
        let_write(&image(&opened));
        let file = std::fs::OpenOptions::new().write(true).open(image(&opened)).unwrap();
        let MemoryBackend { offset, size, .. } = plan(&opened).memory_backends[0];
        // The last page of the guest's memory, which it has never used.
        let last = offset + size - 4096;
        file.write_all_at(b"old", last).unwrap();
        let error = clone.handle.load_with("s", 0, Memory::Map).unwrap_err();
        assert_says(&error, Code::InvalidDomainSnapshot, &["'pc.ram'", "old content"]);
        file.write_all_at(b"\0\0\0", last).unwrap();
        clone.handle.load_with("s", 0, Memory::Map).unwrap();
        clone.guest.wait_ticks(3);
    }
}

#[test]
fn complete_image_cannot_be_written_and_is_as_long_as_its_blocks() {
    for binary in binaries() {
        let opened = original(&machine(binary, 1));
        let metadata = image(&opened).metadata().unwrap();
        assert_eq!(metadata.mode() & 0o7777, 0o400);
        for MemoryBackend { offset, size, .. } in plan(&opened).memory_backends {
            assert!(offset + size <= metadata.len());
        }
        convert(&image(&opened), Format::Raw).unwrap();
        assert_eq!(image(&opened).metadata().unwrap().mode() & 0o7777, 0o400);
    }
}

#[test]
fn qemu_that_cannot_map_an_image_is_refused_by_its_version() {
    let Some(old) = Binary::all().iter().find(|binary| binary.version < (8, 2, 0)) else {
        skip("no old QEMU is here");
    };
    let opened = original(&machine(old, 1));
    let clone = opened.start_clone("s");
    let error = clone.handle.load_with("s", 0, Memory::Map).unwrap_err();
    assert_says(
        &error,
        Code::ConfigUnsupported,
        &[&format!("QEMU {}", old.name), "8.2 or later", "'full'"],
    );
    clone.handle.load_with("s", 0, Memory::Auto).unwrap();
    clone.guest.wait_ticks(3);
}

#[test]
fn memory_of_two_numa_nodes_is_mapped_node_by_node() {
    /// The arguments of a guest with these two backends.
    fn nodes(objects: [&str; 2]) -> [&str; 8] {
        let [first, second] = objects;
        let [zero, one] =
            ["node,nodeid=0,memdev=ram-node0", "node,nodeid=1,cpus=0,memdev=ram-node1"];
        ["-object", first, "-object", second, "-numa", zero, "-numa", one]
    }
    for binary in binaries() {
        let bare = machine(binary, 1);
        let ram =
            ["ram-node0", "ram-node1"].map(|id| format!("memory-backend-ram,id={id},size=8M"));
        let arguments = nodes([&ram[0], &ram[1]]);
        let opened = original(&arguments.iter().fold(bare.clone(), |bare, arg| bare.arg(arg)));
        let (_full, first) = opened.restore_clone("s");
        let before = std::fs::read(image(&opened)).unwrap();
        let plan = plan(&opened);
        let ids: Vec<_> = plan.memory_backends.iter().map(|backend| &*backend.id).collect();
        assert_eq!(ids, ["ram-node0", "ram-node1"]);
        let objects: Vec<_> = plan.memory_backends.iter().map(MemoryBackend::object).collect();
        let clone = start(&opened, &bare, &plan, &nodes([&objects[0], &objects[1]]));
        clone.handle.load_with("s", 0, Memory::Map).unwrap();
        clone.guest.wait_ticks(5);
        assert_eq!(first_tick(&clone.guest), first);
        assert!(std::fs::read(image(&opened)).unwrap() == before);
        // One of them alone is refused.
        let clone = start(&opened, &bare, &plan, &nodes([&objects[0], &ram[1]]));
        let error = clone.handle.load_with("s", 0, Memory::Map).unwrap_err();
        assert_says(&error, Code::ConfigUnsupported, &["'ram-node1'", "memory-backend-ram"]);
    }
}

#[test]
fn clone_is_snapshotted_in_turn_if_its_image_is_on_tmpfs_and_else_told_the_way_out() {
    const TMPFS: &str = "/dev/shm";
    if !Path::new(TMPFS).is_dir() {
        skip("there is no tmpfs");
    }
    for binary in binaries() {
        let opened = original(&machine(binary, 1));
        // The directory for temporary files can be a tmpfs too.
        if !is_tmpfs(opened.guest.directory()) {
            let clone = start_mapped(&opened);
            clone.handle.load_with("s", 0, Memory::Map).unwrap();
            clone.guest.wait_ticks(2);
            let error = clone.snapshot("again").unwrap_err();
            assert_says(&error, Code::ArgumentUnsupported, &["memory 'map'", "'full'", "tmpfs"]);
            clone.guest.wait_ticks(2);
            // A non-live snapshot copies no page behind the guest's back.
            clone.create(&named("again"), 0).unwrap();
        }

        let tmpfs = tempfile::tempdir_in(TMPFS).unwrap();
        let memory = tmpfs.path().join("m.mem");
        let opened = Opened::start(&machine(binary, 1));
        let memory_xml = format!("<memory snapshot='external' file='{}'/>", memory.display());
        let xml = format!("<domainsnapshot><name>s</name>{memory_xml}</domainsnapshot>");
        opened.handle.create_as(Some(Format::Sparse), &xml, INSTANTLY, &mut ()).unwrap();
        let clone = start_mapped(&opened);
        clone.handle.load_with("s", 0, Memory::Map).unwrap();
        clone.guest.wait_ticks(2);
        let before = std::fs::read(&memory).unwrap();
        clone.snapshot("again").unwrap();
        clone.guest.wait_ticks(2);
        assert!(std::fs::read(&memory).unwrap() == before);
        let (_again, _) = clone_of(&opened, "again");
    }
}

fn is_tmpfs(path: &Path) -> bool {
    const MAGIC: i64 = 0x0102_1994;
    rustix::fs::statfs(path).unwrap().f_type == MAGIC
}

/// Loads all of the memory of a snapshot that a clone took.
fn clone_of(opened: &Opened, name: &str) -> (Opened, u32) {
    opened.restore_clone(name)
}
