// SPDX-License-Identifier: LGPL-2.1-or-later

//! The library refuses or notices what would tear a snapshot: guest memory that another process
//! writes, UEFI variables that change, and disks and devices that another client changes.

use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use common::backend::open_guest;
use common::{
    At, INSTANTLY, Opened, assert_error, assert_untouched, block_of, machine, named, through_proxy,
};
use instantsnap::engine::{Phase, prepare_revert};
use instantsnap::error::Code;
use instantsnap::model::Record;
use instantsnap_testkit::{Binary, DEADLINE, Fault, Format, Machine, test, wait_for};
use serde_json::json;

fn with(machine: Machine, args: &[&str]) -> Machine {
    args.iter().fold(machine, |machine, arg| machine.arg(arg))
}

/// Asserts that a snapshot is refused with these words and changes nothing.
fn refused(opened: &Opened, parts: &[&str]) {
    let before = opened.trace();
    let result = opened.snapshot("s");
    for part in parts.iter().chain(&["another process", "non-live snapshot", "remove the device"]) {
        assert_error(result.clone(), Code::ConfigUnsupported, part);
    }
    assert_untouched(opened, &before);
    opened.guest.wait_ticks(2);
}

/// A vhost-user backend with the minimum that QEMU needs: it replies where it must, and offers the
/// features without which QEMU would not save memory at all.
fn vhost_user_backend(socket: &Path) -> std::thread::JoinHandle<()> {
    const GET_FEATURES: u32 = 1;
    const GET_VRING_BASE: u32 = 11;
    const GET_PROTOCOL_FEATURES: u32 = 15;
    const LOG_ALL_AND_PROTOCOL_FEATURES: u64 = 1 << 26 | 1 << 30;
    const LOG_SHMFD: u64 = 1 << 1;
    let socket = socket.to_owned();
    std::thread::spawn(move || {
        let connect = || UnixStream::connect(&socket).ok();
        let Some(mut stream) =
            instantsnap_testkit::wait_for(instantsnap_testkit::DEADLINE, connect)
        else {
            return;
        };
        let mut header = [0; 12];
        // The loop ends with QEMU.
        while stream.read_exact(&mut header).is_ok() {
            let number = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
            let (request, size) = (number(0), number(8));
            let mut payload = vec![0; size as usize];
            if stream.read_exact(&mut payload).is_err() {
                break;
            }
            let answer = match request {
                GET_FEATURES => LOG_ALL_AND_PROTOCOL_FEATURES,
                GET_PROTOCOL_FEATURES => LOG_SHMFD,
                GET_VRING_BASE => 0,
                _ => continue,
            };
            // The reply has version 1 and eight bytes.
            let mut reply = [request, 1 | 4, 8].map(u32::to_ne_bytes).concat();
            reply.extend(answer.to_ne_bytes());
            let _ = stream.write_all(&reply);
        }
    })
}

/// A machine that has this backend as the chardev `c`.
fn with_backend(binary: &'static Binary, socket: &Path) -> Machine {
    let chardev = format!("socket,id=c,path={},server=on,wait=on", socket.display());
    let memory = [
        "-object",
        "memory-backend-memfd,id=shared0,size=16M,share=on",
        "-numa",
        "node,memdev=shared0",
    ];
    with(with(machine(binary, 1), &memory), &["-chardev", &chardev])
}

#[test]
fn vhost_user_network_card_is_refused() {
    for binary in Binary::some() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("c.sock");
        let backend = vhost_user_backend(&socket);
        let device = ["-netdev", "vhost-user,id=n,chardev=c", "-device", "virtio-net-pci,netdev=n"];
        refused(
            &Opened::start(&with(with_backend(binary, &socket), &device)),
            &["'n'", "vhost-user"],
        );
        backend.join().unwrap();
    }
}

#[test]
fn device_with_a_vhost_user_backend_is_refused() {
    for binary in Binary::some() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("c.sock");
        let backend = vhost_user_backend(&socket);
        let opened = Opened::start(&with_backend(binary, &socket));
        // The device is plugged in later, because the BIOS would wait for its disks forever.
        let arguments = json!({ "driver": "vhost-user-scsi-pci", "chardev": "c", "id": "scsi0" });
        opened.guest.control().execute("device_add", arguments).unwrap();
        refused(&opened, &["device 'scsi0' (vhost-user-scsi-pci)"]);
        drop(opened);
        backend.join().unwrap();
    }
}

#[test]
fn ivshmem_device_supports_non_live_snapshots_only() {
    for binary in Binary::some() {
        for id in [",id=shm0", ""] {
            let device = format!("ivshmem-plain,memdev=hostmem,master=on{id}");
            let args =
                ["-object", "memory-backend-memfd,id=hostmem,size=1M,share=on", "-device", &device];
            let opened = Opened::start(&with(machine(binary, 1), &args));
            refused(&opened, &["ivshmem-plain"]);
            opened.create(&named("plain"), 0).unwrap();
            opened.guest.wait_ticks(2);
        }
    }
}

#[test]
fn block_driver_that_lets_others_write_guest_memory_is_refused() {
    let (opened, proxy) = through_proxy(&machine(&Binary::all()[0], 1));
    // This machine has no such device, so the proxy edits QEMU's reply.
    for driver in [
        "nvme",
        "nvme-io_uring",
        "virtio-blk-vfio-pci",
        "virtio-blk-vhost-user",
        "virtio-blk-vhost-vdpa",
    ] {
        let node = json!({ "node-name": "theirs", "drv": driver, "file": "made up", "image": { "format": driver } });
        let add = move |mut reply: serde_json::Value| {
            reply["return"].as_array_mut().unwrap().push(node);
            reply
        };
        proxy.rule("query-named-block-nodes", 1, Fault::EditReply(Box::new(add)));
        refused(&opened, &["block node 'theirs'", driver]);
    }
    opened.snapshot("s").unwrap();
}

/// The ways to configure pflash.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Given {
    Drive,
    Blockdev,
}

/// A tick guest with SeaBIOS in pflash, and 128 KiB of variables directly below it, in `variables`.
fn pflash(binary: &'static Binary, given: Given, variables: &Path) -> Machine {
    let seabios = Path::new("/usr/share/seabios/bios-256k.bin");
    let code = variables.with_extension("code");
    if !code.exists() {
        std::fs::copy(seabios, &code).unwrap();
    }
    let (code, variables) = (code.display(), variables.display());
    match given {
        Given::Drive => with(
            machine(binary, 1),
            &[
                "-drive",
                &format!("if=pflash,unit=0,format=raw,readonly=on,file={code}"),
                "-drive",
                &format!("if=pflash,unit=1,format=raw,file={variables}"),
            ],
        ),
        Given::Blockdev => with(
            machine(binary, 1),
            &[
                "-blockdev",
                &format!(
                    "driver=raw,node-name=code,read-only=on,file.driver=file,file.filename={code}"
                ),
                "-blockdev",
                &format!("driver=raw,node-name=vars,file.driver=file,file.filename={variables}"),
                "-machine",
                "pflash0=code,pflash1=vars",
            ],
        ),
    }
}

fn variables(directory: &Path) -> PathBuf {
    let file = directory.join("vars.fd");
    // Erased flash with some content.
    let mut content = vec![0xff; 128 << 10];
    content[..9].copy_from_slice(b"variables");
    std::fs::write(&file, content).unwrap();
    file
}

/// A waiting QEMU on this disk and the machine's variables.
fn clone_on(original: &Opened, machine: Machine, disk: &Path) -> Opened {
    let guest = machine.for_revert(&[(disk.to_owned(), Format::Qcow2)]).start();
    let handle = open_guest(&guest, &guest.qmp(), None, &original.state_dir()).unwrap();
    Opened { handle, guest }
}

#[test]
fn uefi_variables_are_copied_and_each_clone_gets_its_own() {
    for binary in Binary::some() {
        for given in [Given::Drive, Given::Blockdev] {
            eprintln!("{} {given:?}", binary.name);
            let directory = tempfile::tempdir().unwrap();
            let original = variables(directory.path());
            let content = std::fs::read(&original).unwrap();
            let opened = Opened::start(&pflash(binary, given, &original));
            opened.snapshot("s").unwrap();
            let Record { disks, nvram, .. } = opened.record("s");
            assert_eq!(disks.len(), 1, "the firmware's code and variables get no overlay");
            assert_eq!(nvram.len(), 1);
            assert_eq!(nvram[0].name, if given == Given::Drive { "pflash1" } else { "vars" });
            assert_eq!(nvram[0].original, original.display().to_string());
            assert_eq!(nvram[0].format, "raw");
            assert_eq!(std::fs::read(&nvram[0].copy).unwrap(), content);
            assert_eq!(Path::new(&nvram[0].copy).metadata().unwrap().mode() & 0o7777, 0o600);

            let plan = prepare_revert(&opened.state_dir(), "s", None).unwrap();
            let private = &plan.disks[1];
            assert_eq!(
                (private.name.as_str(), private.format.as_str()),
                (nvram[0].name.as_str(), "raw")
            );
            assert_eq!(private.backing_file, None);
            assert!(private.file != original && private.file != Path::new(&nvram[0].copy));
            assert_eq!(std::fs::read(&private.file).unwrap(), content);
            // The original goes on, and sets a variable.
            opened.guest.kill();
            let mut changed = content.clone();
            changed[100] = 0x17;
            std::fs::write(&original, &changed).unwrap();

            let load_onto = |variables: &Path| {
                let clone =
                    clone_on(&opened, pflash(binary, given, variables), &plan.disks[0].file);
                let loaded = clone.handle.load("s", 0);
                (clone, loaded)
            };
            for (file, part) in [
                (original.as_path(), "original guest"),
                (Path::new(&nvram[0].copy), "snapshot's own"),
            ] {
                assert_error(load_onto(file).1, Code::ConfigUnsupported, part);
            }
            let (clone, loaded) = load_onto(&private.file);
            loaded.unwrap();
            clone.guest.wait_ticks(3);
            assert_eq!(
                std::fs::read(&original).unwrap(),
                changed,
                "the original's variables were touched"
            );
            assert_eq!(std::fs::read(&nvram[0].copy).unwrap(), content);
            assert_eq!(std::fs::read(&private.file).unwrap(), content);
        }
    }
}

#[test]
fn load_into_a_clone_without_uefi_variables_is_refused() {
    let binary = &Binary::all()[0];
    let directory = tempfile::tempdir().unwrap();
    let opened = Opened::start(&pflash(binary, Given::Drive, &variables(directory.path())));
    opened.snapshot("s").unwrap();
    let plan = prepare_revert(&opened.state_dir(), "s", None).unwrap();
    let clone = clone_on(&opened, machine(binary, 1), &plan.disks[0].file);
    assert_error(clone.handle.load("s", 0), Code::ConfigUnsupported, "pflash");
    // A plan creates nothing without the variables, not even the disk's image.
    let before = opened.trace();
    let copy = opened.record("s").nvram.remove(0).copy;
    std::fs::rename(&copy, format!("{copy}.aside")).unwrap();
    assert_error(
        prepare_revert(&opened.state_dir(), "s", None),
        Code::InvalidDomainSnapshot,
        &copy,
    );
    std::fs::rename(format!("{copy}.aside"), &copy).unwrap();
    assert_untouched(&opened, &before);
}

#[test]
fn overlay_for_uefi_variables_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let opened =
        Opened::start(&pflash(&Binary::all()[0], Given::Drive, &variables(directory.path())));
    let before = opened.trace();
    for (name, part) in [("pflash1", "UEFI variables"), ("pflash0", "readonly")] {
        let xml = format!(
            "<domainsnapshot><disks><disk name='{name}' snapshot='external'><source \
             file='/tmp/x'/></disk></disks></domainsnapshot>"
        );
        assert_error(opened.create(&xml, INSTANTLY), Code::ConfigUnsupported, part);
    }
    assert_untouched(&opened, &before);
}

#[test]
fn uefi_variables_changed_in_the_drain_fail_the_snapshot() {
    for binary in Binary::some() {
        for given in [Given::Drive, Given::Blockdev] {
            let directory = tempfile::tempdir().unwrap();
            let file = variables(directory.path());
            let opened = Opened::start(&pflash(binary, given, &file).append("pflash=fffa0000"));
            let before = opened.trace();
            // The guest sets a variable every 64 ticks, and the drain does not end before one is
            // set.
            let start = std::cell::RefCell::new(Vec::new());
            let mut observer = At(|phase| {
                if phase == Phase::Prepare {
                    *start.borrow_mut() = std::fs::read(&file).unwrap();
                }
                if phase == Phase::Drain {
                    let changed =
                        || (std::fs::read(&file).unwrap() != *start.borrow()).then_some(());
                    instantsnap_testkit::wait_for(instantsnap_testkit::DEADLINE, changed)
                        .expect("no variable is set");
                }
            });
            let result = opened.handle.create(&named("s"), INSTANTLY, &mut observer).map(drop);
            assert_error(result.clone(), Code::OperationFailed, "UEFI variables");
            assert_error(result, Code::OperationFailed, "take the snapshot again");
            assert_untouched(&opened, &before);
            assert!(opened.handle.store().unwrap().list().unwrap().is_empty());
            opened.guest.wait_ticks(70);
        }
    }
}

#[test]
fn uefi_variables_changed_and_changed_back_fail_the_snapshot() {
    let directory = tempfile::tempdir().unwrap();
    let file = variables(directory.path());
    let opened = Opened::start(&pflash(&Binary::all()[0], Given::Drive, &file));
    let before = opened.trace();
    let mut observer = At(|phase| {
        if phase == Phase::Drain {
            let content = std::fs::read(&file).unwrap();
            let mut changed = content.clone();
            changed[50] = 0;
            std::fs::write(&file, changed).unwrap();
            std::fs::write(&file, content).unwrap();
        }
    });
    let result = opened.handle.create(&named("s"), INSTANTLY, &mut observer);
    assert_error(result, Code::OperationFailed, "UEFI variables");
    assert_untouched(&opened, &before);
}

/// The size of a disk as the guest sees it, and of its active image.
fn sizes(opened: &Opened, disk: &str) -> (u64, u64) {
    let block = block_of(&opened.guest, disk);
    let inserted = &block["inserted"];
    let file = std::fs::File::open(inserted["file"].as_str().unwrap()).unwrap();
    let in_file = match inserted["drv"].as_str() {
        Some("qcow2") => {
            let mut size = [0; 8];
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut size, 24).unwrap();
            u64::from_be_bytes(size)
        }
        _ => file.metadata().unwrap().len(),
    };
    (inserted["image"]["virtual-size"].as_u64().unwrap(), in_file)
}

fn resize(opened: &Opened, disk: &str, size: u64) {
    let node = block_of(&opened.guest, disk)["inserted"]["node-name"].clone();
    opened
        .guest
        .control()
        .execute("block_resize", json!({ "node-name": node, "size": size }))
        .unwrap();
}

/// Asserts that the snapshot has failed, that the disk kept its new size, and that nothing else is
/// left.
fn assert_resized(
    opened: &Opened,
    disk: &str,
    size: u64,
    result: Result<String, instantsnap::error::Error>,
    image: &str,
) {
    assert_error(result.clone(), Code::OperationFailed, &format!("resized disk '{disk}'"));
    assert_error(result, Code::OperationFailed, "take the snapshot again");
    assert_eq!(sizes(opened, disk), (size, size));
    assert_eq!(opened.active_image(disk), image);
    opened.guest.wait_ticks(3);
}

#[test]
fn disk_resized_during_a_snapshot_keeps_its_new_size() {
    for binary in Binary::any() {
        let opened = Opened::start(&machine(binary, 2));
        let mut mib = 16;
        for disk in ["vd0", "vd1"] {
            let image = opened.active_image(disk);
            // To a larger and a smaller size, before the switch and between the switch and the
            // instant.
            for (phase, change) in [(Phase::Switch, 8), (Phase::Arm, 8), (Phase::Switch, -4)] {
                mib += change;
                let size = (mib as u64) << 20;
                let mut observer = At(|at| {
                    if at == phase {
                        resize(&opened, disk, size);
                    }
                });
                let result = opened.handle.create(&named("s"), INSTANTLY, &mut observer);
                assert_resized(&opened, disk, size, result, &image);
            }
        }
        opened.assert_well();
    }
}

#[test]
fn disk_resized_at_the_switch_keeps_its_new_size() {
    for binary in Binary::any() {
        let (opened, proxy) = through_proxy(&machine(binary, 2));
        for (disk, mib) in [("vd0", 24), ("vd1", 12)] {
            let image = opened.active_image(disk);
            let gate = proxy.hold("transaction", 1);
            let result = std::thread::scope(|scope| {
                let snapshot = scope.spawn(|| opened.snapshot("s"));
                assert!(gate.wait_arrived(DEADLINE));
                resize(&opened, disk, mib << 20);
                gate.release();
                snapshot.join().unwrap()
            });
            assert_resized(&opened, disk, mib << 20, result, &image);
        }
        opened.assert_well();
    }
}

/// A machine with a CD-ROM drive that can be unplugged without the guest's cooperation.
fn with_drive(binary: &'static Binary) -> Machine {
    with(
        machine(binary, 1),
        &["-device", "virtio-scsi-pci,id=scsi", "-device", "scsi-cd,id=cd,bus=scsi.0"],
    )
}

#[test]
fn device_attached_or_detached_during_a_snapshot_fails_it() {
    for binary in Binary::any() {
        let opened = Opened::start(&with_drive(binary));
        let medium = opened.guest.directory().join("medium.iso");
        std::fs::write(&medium, [0; 2048]).unwrap();
        let change = |what: &str| {
            let (command, arguments) = match what {
                "rng" => ("device_add", json!({ "driver": "virtio-rng-pci" })),
                "medium" => (
                    "blockdev-change-medium",
                    json!({ "id": "cd", "filename": medium, "format": "raw" }),
                ),
                "cd" => ("device_del", json!({ "id": "cd" })),
                id => ("device_add", json!({ "driver": "virtio-rng-pci", "id": id })),
            };
            opened.guest.control().execute(command, arguments).unwrap();
        };
        for (flags, phase, what, says) in [
            (INSTANTLY, Phase::Prepare, "rng0", "device 'rng0' (virtio-rng-pci) was attached"),
            (INSTANTLY, Phase::Switch, "rng", "(virtio-rng-pci) was attached"),
            (INSTANTLY, Phase::Arm, "rng1", "device 'rng1' (virtio-rng-pci) was attached"),
            (0, Phase::Prepare, "rng2", "device 'rng2' (virtio-rng-pci) was attached"),
            (0, Phase::Arm, "medium", "medium.iso' of drive"),
            (INSTANTLY, Phase::Switch, "cd", "device 'cd' (scsi-cd) was detached"),
        ] {
            let image = opened.active_image("vd0");
            let mut observer = At(|at| {
                if at == phase {
                    change(what);
                }
            });
            let result = opened.handle.create(&named("s"), flags, &mut observer);
            assert_error(result, Code::OperationFailed, says);
            assert_eq!(opened.active_image("vd0"), image);
            opened.guest.wait_ticks(2);
        }
        // QEMU frees the detached device a moment later.
        let is_gone = || {
            let blocks = opened.guest.control().execute("query-block", json!({})).unwrap();
            (!blocks.to_string().contains("medium.iso")).then_some(())
        };
        wait_for(DEADLINE, is_gone).expect("the medium is closed");
        // A snapshot of the present devices succeeds.
        opened.snapshot("s").unwrap();
    }
}
