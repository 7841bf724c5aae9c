// SPDX-License-Identifier: LGPL-2.1-or-later

//! Domains of many kinds under a stock libvirt, libvirt's own operations after a snapshot, and
//! failures that leave the domain as it was.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::backend::by_client_only;
use common::virt::{self, Clones, OpenedDomain, directory_for};
use common::{ALL_SECTORS, At, INSTANTLY};
use instantsnap::engine::Phase;
use instantsnap::error::{Code, Error};
use instantsnap::model::flags::{HALT, LIVE};
use instantsnap_testkit::{
    Binary, DEADLINE, Daemon, Format, Guest, Machine, missing_package, only_when_thorough, skip,
    test, wait_for,
};
use serde_json::json;
use tempfile::TempDir;

fn machine(binary: &'static Binary) -> Machine {
    Machine::new(binary).disk(Format::Qcow2).disk(Format::Raw)
}

fn with(machine: Machine, args: &[&str]) -> Machine {
    args.iter().fold(machine, |machine, arg| machine.arg(arg))
}

fn status(guest: &Guest) -> String {
    guest.control().execute("query-status", json!({})).unwrap()["status"]
        .as_str()
        .unwrap()
        .to_owned()
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// After a snapshot, libvirt's own operations have the same results as before.
#[test]
fn stock_libvirt_operations_work_after_an_instant_snapshot() {
    let daemon = virt::session();
    let clones = Clones::of(&daemon);
    for binary in Binary::under_libvirt() {
        let opened = OpenedDomain::start(&machine(binary).append("dense=8"), &daemon);
        let guest = &opened.guest;
        opened.snapshot("instant").unwrap();

        let memory = opened.memory_file("stock");
        let spec = format!("file={},snapshot=external", memory.display());
        guest.virsh("snapshot-create-as", &["stock", "--live", "--memspec", &spec]);
        guest.wait_ticks(3);
        assert_eq!(guest.virsh("snapshot-parent", &["stock"]).trim(), "instant");
        clones.check(guest, &memory);

        // What the guest wrote since the snapshot is merged into its images.
        for disk in ["vda", "vdb"] {
            guest.virsh("blockcommit", &[disk, "--active", "--pivot", "--wait"]);
        }
        let xml = guest.virsh("dumpxml", &[]);
        assert!(
            guest
                .disks()
                .iter()
                .all(|disk| xml.contains(&format!("<source file='{}'", disk.file.display()))),
            "{xml}"
        );
        guest.wait_ticks(ALL_SECTORS);

        let saved = opened.memory_file("saved");
        let last = guest.wait_ticks(0);
        guest.virsh("save", &[path(&saved)]);
        assert!(!guest.alive());
        let first = clones.check(guest, &saved);
        assert!(first > last, "{first} after {last}");
        guest.daemon().virsh(&["restore", path(&saved)]);
        guest.wait_ticks(ALL_SECTORS);
    }
}

/// The control experiment for the test above: libvirt does not know of the capability, and
/// snapshots the disks at the end of the migration.
#[test]
fn capability_left_enabled_would_tear_the_next_stock_snapshot() {
    by_client_only();
    let daemon = virt::session();
    let clones = Clones::of(&daemon);
    for binary in Binary::under_libvirt() {
        let opened = OpenedDomain::start(&machine(binary).append("dense=8"), &daemon);
        let guest = &opened.guest;
        let capability = json!([{ "capability": "background-snapshot", "state": true }]);
        guest
            .control()
            .execute("migrate-set-capabilities", json!({ "capabilities": capability }))
            .unwrap();
        let memory = opened.memory_file("stock");
        let spec = format!("file={},snapshot=external", memory.display());
        guest.virsh("snapshot-create-as", &["stock", "--live", "--memspec", &spec]);
        let clone = clones.0.restore(guest, &memory);
        let trouble =
            clone.try_ticks(ALL_SECTORS + 5, DEADLINE).expect_err("memory is as old as the disks");
        assert!(trouble.starts_with("TORN disk "), "{}: {trouble}", binary.name);
        clones.end(clone);
        if binary.version >= (9, 0, 0) {
            continue;
        }
        // A QEMU that resumes its guest by itself does so during a save, too.
        let saved = opened.memory_file("saved");
        guest.virsh("save", &[path(&saved)]);
        let clone = clones.0.restore(guest, &saved);
        let trouble =
            clone.try_ticks(ALL_SECTORS + 5, DEADLINE).expect_err("memory is as old as the disks");
        assert!(trouble.starts_with("TORN disk "), "{}: {trouble}", binary.name);
        clones.end(clone);
    }
}

#[test]
fn transient_domain_can_be_snapshotted_and_halt_is_refused() {
    by_client_only();
    let daemon = virt::session();
    let clones = Clones::of(&daemon);
    let opened = OpenedDomain::start(&machine(&Binary::all()[0]).transient(), &daemon);
    let parts = ["cannot halt transient domain", opened.guest.name()];
    let mut untouched = At(|phase| assert!(phase == Phase::Validate, "{phase:?}"));
    opened.assert_fails_observed(
        &opened.xml("s", ""),
        INSTANTLY | HALT,
        &mut untouched,
        Code::OperationInvalid,
        &parts,
    );
    opened.snapshot("s").unwrap();
    let xml = opened.guest.virsh("snapshot-dumpxml", &["s"]);
    assert!(!xml.contains("<inactiveDomain"), "{xml}");
    opened.guest.wait_ticks(3);
    clones.check(&opened.guest, &opened.memory_file("s"));
    // QEMU is killed in the drain: only the images are left, with everything that the guest wrote.
    let before = common::files_below(opened.guest.directory());
    let error = kill_qemu_in_the_drain(&opened);
    assert!(!error.message.contains("merge"), "{error}");
    let name = opened.guest.name().to_owned();
    wait_for(DEADLINE, || daemon.try_virsh(&["domstate", &name]).is_err().then_some(()))
        .expect("the domain stays");
    assert_eq!(common::files_below(opened.guest.directory()), before);
    check_images(&opened.guest, "s");
}

/// libvirt considers a domain running after its QEMU has ended, until it handles QEMU's event.
#[test]
fn ended_qemu_is_noticed_before_libvirt_knows() {
    by_client_only();
    let daemon = Daemon::with_late_events();
    let opened = OpenedDomain::start(&machine(&Binary::all()[0]), &daemon);
    let before = common::files_below(opened.guest.directory());
    let error = std::thread::scope(|scope| {
        let mut observer = At(|phase| match phase {
            Phase::Drain => {
                opened.guest.wait_ticks(3);
                daemon.hold_events();
                opened.guest.kill();
            }
            Phase::Undo => {
                scope.spawn(|| {
                    // By then an undo that considers QEMU alive would have ended.
                    std::thread::sleep(Duration::from_secs(2));
                    daemon.release_events();
                });
            }
            _ => {}
        });
        opened.snapshot_observed("s", &mut observer).expect_err("QEMU was killed")
    });
    assert!(!error.message.contains("merge"), "{error}");
    assert_eq!(common::files_below(opened.guest.directory()), before);
    assert_eq!(opened.guest.virsh("domstate", &[]).trim(), "shut off");
}

#[test]
fn halt_ends_the_guest_only_after_the_snapshot_is_complete() {
    let daemon = virt::session();
    let clones = Clones::of(&daemon);
    let binary = &Binary::all()[0];
    let opened = OpenedDomain::start(&machine(binary), &daemon);
    let guest = &opened.guest;
    let mut observer = At(|phase| {
        if phase == Phase::Drain || phase == Phase::Finish {
            guest.wait_ticks(3);
        }
    });
    opened.create_observed(&opened.xml("s", ""), INSTANTLY | HALT, &mut observer).unwrap();
    assert_eq!(guest.virsh("domstate", &["--reason"]).trim(), "shut off (destroyed)");
    assert_eq!(guest.virsh("snapshot-current", &["--name"]).trim(), "s");
    clones.check(guest, &opened.memory_file("s"));
    // The domain boots again on its overlays.
    guest.start_domain();
    wait_for(DEADLINE, || guest.serial().tick).expect("the guest does not start");
    guest.wait_ticks(3);
}

#[test]
fn paused_domain_gets_a_stock_snapshot_and_stays_paused() {
    let daemon = virt::session();
    let clones = Clones::of(&daemon);
    for binary in Binary::under_libvirt() {
        let opened = OpenedDomain::start(&machine(binary), &daemon);
        let guest = &opened.guest;
        guest.virsh("suspend", &[]);
        let last = guest.wait_ticks(0);
        opened.snapshot("s").unwrap();
        assert_eq!(opened.taken().unwrap().name(), "s");
        assert_eq!(guest.virsh("domstate", &[]).trim(), "paused");
        assert_eq!(guest.serial().tick, Some(last));
        assert_eq!(guest.virsh("snapshot-current", &["--name"]).trim(), "s");
        let info = guest.virsh("snapshot-info", &["s"]);
        assert!(info.contains("State:          paused"), "{info}");
        let first = clones.check_resumed(guest, &opened.memory_file("s"), |clone| {
            assert_eq!(clone.virsh("domstate", &[]).trim(), "paused");
            clone.virsh("resume", &[]);
        });
        assert!((last..=last + 2).contains(&first), "{first} after {last}");
        // QEMU cannot save the guest again before it has run. libvirt handles that, and the library
        // does not prevent it.
        guest.virsh("resume", &[]);
        guest.wait_ticks(ALL_SECTORS);
        opened.snapshot("t").unwrap();
        guest.wait_ticks(3);
        clones.check(guest, &opened.memory_file("t"));
    }
}

#[test]
fn snapshot_without_instant_is_a_stock_snapshot() {
    let daemon = virt::session();
    let opened = OpenedDomain::start(&machine(&Binary::all()[0]), &daemon);
    for (name, flags) in [("s", 0), ("l", LIVE)] {
        opened.create(&opened.xml(name, ""), flags).unwrap();
        assert_eq!(opened.taken().unwrap().name(), name);
    }
    // libvirt marks a domain to which other commands were passed through its monitor.
    assert!(!opened.guest.virsh("dominfo", &[]).contains("custom monitor"));
    let error = opened.create(&opened.xml("t", "<nonsense"), 0).expect_err("that is no XML");
    assert_eq!(error.code, Code::XmlDetail, "{error}");
    opened.guest.wait_ticks(3);
}

#[test]
fn shut_off_domain_is_refused() {
    let daemon = virt::session();
    let opened = OpenedDomain::open(machine(&Binary::all()[0]).define_under(&daemon));
    let before =
        (common::files_below(opened.guest.directory()), opened.guest.virsh("dumpxml", &[]));
    let error = opened.snapshot("s").expect_err("it does not run");
    assert_eq!(error.code, Code::OperationInvalid, "{error}");
    for part in [opened.guest.name(), "is not running", "without INSTANT"] {
        assert!(error.message.contains(part), "{part:?} is not in {error}");
    }
    assert_eq!(
        (common::files_below(opened.guest.directory()), opened.guest.virsh("dumpxml", &[])),
        before
    );
    // So is an undefined domain.
    opened.guest.virsh("undefine", &[]);
    let error = opened.snapshot("s").expect_err("it is not there");
    assert_eq!(error.code, Code::NoDomain, "{error}");
}

#[test]
fn iothreads_and_shared_memory_are_supported() {
    let daemon = virt::session();
    let clones = Clones::of(&daemon);
    let mut backings = vec!["<source type='memfd'/><access mode='shared'/>"];
    let free = std::fs::read_to_string("/proc/meminfo").unwrap();
    let free = free
        .lines()
        .find_map(|line| line.strip_prefix("HugePages_Free:")?.trim().parse::<u32>().ok());
    match free {
        Some(32..) => backings.push("<hugepages/>"),
        free => eprintln!("skipped: huge pages: {free:?} are free"),
    }
    for binary in Binary::under_libvirt() {
        for backing in &backings {
            eprintln!("{} {backing}", binary.name);
            let machine = Machine::new(binary)
                .disk(Format::Qcow2)
                .disk_driver("iothread='1'")
                .disk(Format::Raw)
                .disk_driver("iothread='1'")
                .domain_elements("<iothreads>1</iothreads>")
                .domain_elements(&format!("<memoryBacking>{backing}</memoryBacking>"));
            let opened = OpenedDomain::start(&machine, &daemon);
            opened.snapshot("s").unwrap();
            opened.guest.wait_ticks(3);
            // The undo works too.
            opened.assert_cancelled_without_a_trace(&opened.xml("t", ""), INSTANTLY, 3);
            opened.guest.wait_ticks(ALL_SECTORS);
            clones.check(&opened.guest, &opened.memory_file("s"));
        }
    }
}

#[test]
fn device_that_cannot_be_migrated_is_refused_with_qemus_reason() {
    let daemon = virt::session();
    let binary = &Binary::all()[0];
    let shared = tempfile::Builder::new().tempdir_in(daemon.directory().join("guests")).unwrap();
    std::os::unix::fs::chown(shared.path(), Some(daemon.user()), None).unwrap();
    let fat = format!("if=none,id=fat,format=raw,file=fat:rw:{}", shared.path().display());
    let opened = OpenedDomain::start(&with(machine(binary), &["-drive", &fat]), &daemon);
    let parts = ["memory cannot be saved", "vvfat (rw) format", "does not support live migration"];
    opened.assert_fails(&opened.xml("s", ""), INSTANTLY, Code::ConfigUnsupported, &parts);
    opened.guest.wait_ticks(ALL_SECTORS);
}

/// The kernel write-protects pages of anonymous memory and of a tmpfs, but not of a file on a disk.
#[test]
fn memory_in_a_shared_file_is_refused_with_qemus_reason() {
    const TMPFS: i64 = 0x0102_1994;
    let daemon = virt::session();
    let backing = "<memoryBacking><source type='file'/><access mode='shared'/></memoryBacking>";
    let opened = OpenedDomain::start(&machine(&Binary::all()[0]).domain_elements(backing), &daemon);
    if rustix::fs::statfs(daemon.directory()).unwrap().f_type == TMPFS {
        opened.snapshot("s").unwrap();
    } else {
        let parts = ["not compatible with guest memory configuration"];
        opened.assert_fails(&opened.xml("s", ""), INSTANTLY, Code::ArgumentUnsupported, &parts);
    }
    opened.guest.wait_ticks(ALL_SECTORS);
}

/// SeaBIOS in pflash, and variables directly below it, which the tick guest can set, as in
/// `tests/qmp/tearing.rs`.
fn pflash(binary: &'static Binary, directory: &Path) -> Machine {
    let (code, variables) = (directory.join("code.fd"), directory.join("vars.fd"));
    std::fs::copy("/usr/share/seabios/bios-256k.bin", &code).unwrap();
    let mut content = vec![0xff; 128 << 10];
    content[..9].copy_from_slice(b"variables");
    std::fs::write(&variables, content).unwrap();
    machine(binary).os(&format!(
        "<os><type arch='x86_64' machine='pc'>hvm</type><loader readonly='yes' \
         type='pflash'>{}</loader><nvram>{}</nvram><kernel>KERNEL</kernel><cmdline>CMDLINE</cmdline></os>",
        code.display(),
        variables.display()
    ))
}

fn give(daemon: &Daemon, directory: &Path) {
    for file in common::files_below(directory) {
        std::os::unix::fs::chown(file, Some(daemon.user()), Some(daemon.user())).unwrap();
    }
}

#[test]
fn unchanged_uefi_variables_are_supported_and_leave_no_copies() {
    only_when_thorough();
    for daemon in virt::daemons() {
        let clones = Clones::of(&daemon);
        let directory = directory_for(&daemon);
        let machine = pflash(&Binary::all()[0], directory.path());
        give(&daemon, directory.path());
        let opened = OpenedDomain::start(&machine, &daemon);
        let variables = std::fs::read(directory.path().join("vars.fd")).unwrap();
        let before = common::files_below(opened.guest.directory()).len();
        opened.snapshot("s").unwrap();
        opened.guest.wait_ticks(3);
        let after = common::files_below(opened.guest.directory());
        // Two overlays and a memory image.
        assert_eq!(after.len(), before + 3, "{after:?}");
        clones.check(&opened.guest, &opened.memory_file("s"));
        assert_eq!(std::fs::read(directory.path().join("vars.fd")).unwrap(), variables);
    }
}

#[test]
fn uefi_variables_changed_in_the_drain_undo_the_snapshot() {
    by_client_only();
    let daemon = virt::session();
    let binary = &Binary::all()[0];
    let directory = directory_for(&daemon);
    let variables = directory.path().join("vars.fd");
    let machine = pflash(binary, directory.path()).append("pflash=fffa0000");
    give(&daemon, directory.path());
    let opened = OpenedDomain::start(&machine, &daemon);
    let content = std::cell::RefCell::new(Vec::new());
    let mut observer = At(|phase| match phase {
        Phase::Prepare => *content.borrow_mut() = std::fs::read(&variables).unwrap(),
        // The guest sets a variable every 64 ticks, and the drain does not end before one is set.
        Phase::Drain => {
            let changed =
                || (std::fs::read(&variables).unwrap() != *content.borrow()).then_some(());
            wait_for(DEADLINE, changed).expect("no variable is set");
        }
        _ => {}
    });
    let parts = ["UEFI variables", path(&variables), "take the snapshot again"];
    opened.assert_fails_observed(
        &opened.xml("s", ""),
        INSTANTLY,
        &mut observer,
        Code::OperationFailed,
        &parts,
    );
    opened.guest.wait_ticks(ALL_SECTORS);
}

#[test]
fn real_uefi_firmware_is_supported() {
    by_client_only();
    only_when_thorough();
    let (code, template) = ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd");
    if !Path::new(code).exists() {
        missing_package(&format!("no {code}"));
    }
    let daemon = virt::session();
    let directory = directory_for(&daemon);
    let variables = directory.path().join("vars.fd");
    let machine = machine(&Binary::all()[0])
        .machine_type(instantsnap_testkit::MachineType::Q35)
        .os(&format!(
            "<os><type arch='x86_64' machine='q35'>hvm</type><loader readonly='yes' \
         type='pflash'>{code}</loader><nvram template='{template}'>{}</nvram></os>",
            variables.display()
        ));
    let opened = OpenedDomain::open(machine.start_under(&daemon));
    // The firmware finds nothing to boot, and sets variables while it looks.
    let settled = wait_for(DEADLINE, || {
        let before = variables.metadata().ok()?.modified().ok()?;
        (before.elapsed().ok()? > Duration::from_secs(5)).then_some(())
    });
    settled.expect("the firmware does not come to rest");
    opened.snapshot("s").unwrap();
    let clone = daemon.another().restore(&opened.guest, &opened.memory_file("s"));
    assert_eq!(status(&clone), "running");
    assert_eq!(clone.virsh("domstate", &[]).trim(), "running");
    let before = (
        instantsnap_testkit::domain_fingerprint(&opened.guest),
        common::files_below(opened.guest.directory()),
    );
    let mut observer = At(|phase| {
        if phase == Phase::Drain {
            use std::os::unix::fs::FileExt;
            let file = std::fs::File::options().write(true).open(&variables).unwrap();
            file.write_all_at(b"a variable", 100).unwrap();
        }
    });
    let error = opened.snapshot_observed("t", &mut observer).expect_err("a variable was set");
    assert_eq!(error.code, Code::OperationFailed, "{error}");
    // The number of event descriptors changes with the drivers that the firmware starts and stops.
    let after = instantsnap_testkit::domain_fingerprint(&opened.guest);
    assert!(before.0 == after, "{}", before.0.differences(&after));
    assert_eq!(common::files_below(opened.guest.directory()), before.1);
}

/// A vhost-user backend with the minimum that QEMU needs, as in `tests/qmp/tearing.rs`.
fn vhost_user_backend(socket: &Path) -> std::thread::JoinHandle<()> {
    use std::io::{Read, Write};
    const GET_FEATURES: u32 = 1;
    const GET_VRING_BASE: u32 = 11;
    const GET_PROTOCOL_FEATURES: u32 = 15;
    const LOG_ALL_AND_PROTOCOL_FEATURES: u64 = 1 << 26 | 1 << 30;
    const LOG_SHMFD: u64 = 1 << 1;
    let listener = std::os::unix::net::UnixListener::bind(socket).unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut header = [0; 12];
        // The loop ends with QEMU.
        while stream.read_exact(&mut header).is_ok() {
            let number = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
            let mut payload = vec![0; number(8) as usize];
            if stream.read_exact(&mut payload).is_err() {
                break;
            }
            let answer = match number(0) {
                GET_FEATURES => LOG_ALL_AND_PROTOCOL_FEATURES,
                GET_PROTOCOL_FEATURES => LOG_SHMFD,
                GET_VRING_BASE => 0,
                _ => continue,
            };
            let mut reply = [number(0), 1 | 4, 8].map(u32::to_ne_bytes).concat();
            reply.extend(answer.to_ne_bytes());
            let _ = stream.write_all(&reply);
        }
    })
}

#[test]
fn vhost_user_network_card_is_refused() {
    let daemon = virt::session();
    let binary = &Binary::all()[0];
    let directory = directory_for(&daemon);
    let socket = directory.path().join("backend.sock");
    let backend = vhost_user_backend(&socket);
    give(&daemon, directory.path());
    let machine = machine(binary)
        .domain_elements(
            "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>",
        )
        .devices(&format!(
            "<interface type='vhostuser'><mac address='52:54:00:00:00:01'/><source type='unix' \
             path='{}' mode='client'/><model type='virtio'/></interface>",
            socket.display()
        ));
    let opened = OpenedDomain::start(&machine, &daemon);
    let parts = ["vhost-user", "another process", "non-live snapshot"];
    opened.assert_fails(&opened.xml("s", ""), INSTANTLY, Code::ConfigUnsupported, &parts);
    opened.guest.wait_ticks(3);
    drop(opened);
    backend.join().unwrap();
}

/// A small file system that is unmounted when this is dropped.
struct Tmpfs(TempDir);

impl Tmpfs {
    /// Mounts it. Skips the test where this process may not mount.
    fn mount(daemon: &Daemon, size: &str) -> Tmpfs {
        let directory = directory_for(daemon);
        let options = format!("size={size},uid={},mode=755", daemon.user());
        let run = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "tmpfs"])
            .arg(directory.path())
            .output();
        match run {
            Ok(run) if run.status.success() => Tmpfs(directory),
            other => skip(format!("no file system can be mounted here ({other:?})")),
        }
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

/// A `<domainsnapshot>` with this memory image, and this overlay of the second disk.
fn with_files(memory: &Path, overlay: Option<&Path>) -> String {
    let disk = |file: &Path| format!("<disk name='vdb'><source file='{}'/></disk>", file.display());
    format!(
        "<domainsnapshot><name>s</name><memory snapshot='external' \
         file='{}'/><disks>{}</disks></domainsnapshot>",
        memory.display(),
        overlay.map_or(String::new(), disk)
    )
}

#[test]
fn error_names_the_file_that_cannot_be_created_and_nothing_is_left() {
    only_when_thorough();
    let daemon = virt::session();
    let opened = OpenedDomain::start(&machine(&Binary::all()[0]), &daemon);
    let directory = opened.guest.directory().to_owned();
    let memory = opened.memory_file("s");
    let taken = directory.join("taken");
    std::fs::write(&taken, "a user's file").unwrap();
    let missing = directory.join("no-such-directory/file");
    let before = opened.trace();
    let cases = [
        (
            with_files(&taken, None),
            Code::ConfigUnsupported,
            [path(&taken), "memory snapshot file", "already exists"],
        ),
        (
            with_files(&memory, Some(&taken)),
            Code::ConfigUnsupported,
            [path(&taken), "'vdb'", "already exists"],
        ),
        (
            with_files(&missing, None),
            Code::SystemError,
            [path(&missing), "memory snapshot file", "No such file"],
        ),
        (
            with_files(&memory, Some(&missing)),
            Code::SystemError,
            [path(&missing), "'vdb'", "No such file"],
        ),
        (
            with_files(&memory, Some(&memory)),
            Code::ConfigUnsupported,
            [path(&memory), "'vdb' and memory", "same"],
        ),
    ];
    for (xml, code, parts) in cases {
        let error = opened.create(&xml, INSTANTLY).expect_err(&xml);
        assert_eq!(error.code, code, "{error}");
        for part in parts {
            assert!(error.message.contains(part), "{part:?} is not in {error}");
        }
    }
    opened.assert_untouched(&before);
    assert_eq!(std::fs::read(&taken).unwrap(), b"a user's file");
    opened.guest.wait_ticks(ALL_SECTORS);
}

#[test]
fn error_names_a_full_file_system_and_guest_writes_are_kept() {
    let daemon = virt::session();
    let tmpfs = Tmpfs::mount(&daemon, "4m");
    let memory = tmpfs.0.path().join("memory");
    let binary = &Binary::all()[0];
    let opened = OpenedDomain::start(&machine(binary).append("dense=16"), &daemon);
    let mut observer = At(|phase| {
        if phase == Phase::Drain {
            opened.guest.wait_ticks(5);
        }
    });
    let parts = ["No space left on device", path(&memory)];
    opened.assert_fails_observed(
        &with_files(&memory, None),
        INSTANTLY,
        &mut observer,
        Code::SystemError,
        &parts,
    );
    assert!(common::files_below(tmpfs.0.path()).is_empty());
    opened.guest.wait_ticks(ALL_SECTORS);
}

/// The memory image and the overlay fill one file system, and QEMU stops the guest at a write that
/// finds no space. The guest must run again.
#[test]
fn guest_stopped_by_a_full_file_system_runs_again() {
    only_when_thorough();
    let daemon = virt::session();
    let tmpfs = Tmpfs::mount(&daemon, "2m");
    let (memory, overlay) = (tmpfs.0.path().join("memory"), tmpfs.0.path().join("overlay"));
    for binary in Binary::under_libvirt() {
        let machine = machine(binary).append("dense=16").disk_driver("error_policy='enospace'");
        let opened = OpenedDomain::start(&machine, &daemon);
        let mut observer = At(|phase| {
            if phase == Phase::Drain {
                let stopped = || (status(&opened.guest) == "io-error").then_some(());
                wait_for(DEADLINE, stopped).expect("the guest must run into the full file system");
            }
        });
        let parts = ["No space left on device", path(&memory)];
        let xml = with_files(&memory, Some(&overlay));
        opened.assert_fails_observed(&xml, INSTANTLY, &mut observer, Code::SystemError, &parts);
        assert!(common::files_below(tmpfs.0.path()).is_empty());
        opened.guest.wait_ticks(ALL_SECTORS);
    }
}

#[test]
fn snapshot_cancelled_in_any_phase_leaves_nothing() {
    by_client_only();
    use Phase::{Arm, Drain, Finish, Pause, Plan, Prepare, Switch, Validate};
    let daemon = virt::session();
    for binary in Binary::under_libvirt() {
        let opened = OpenedDomain::start(&machine(binary).append("dense=8"), &daemon);
        let before = opened.trace();
        for at in [Validate, Plan, Prepare, Pause, Switch, Arm, Drain, Finish] {
            let mut observer = At(|phase| {
                if phase == at {
                    opened.handle.cancel().unwrap();
                }
            });
            let error = opened.snapshot_observed("s", &mut observer).expect_err("it was cancelled");
            assert_eq!(error.code, Code::OperationAborted, "{at:?}: {error}");
            assert!(!error.message.contains(';'), "{at:?}: {error}");
            opened.guest.wait_ticks(3);
        }
        opened.assert_untouched(&before);
        opened.guest.wait_ticks(ALL_SECTORS);
        opened.snapshot("s").unwrap();
        opened.guest.wait_ticks(3);
    }
}

#[test]
fn pause_beyond_its_limit_is_ended_and_undone() {
    by_client_only();
    let daemon = virt::session();
    for binary in Binary::under_libvirt() {
        let opened = OpenedDomain::start(&machine(binary).append("dense=8"), &daemon);
        let before = opened.trace();
        for limit in [0, 1, 3] {
            opened.handle.set_pause_limit(Duration::from_millis(limit));
            let error = opened.snapshot("s").expect_err("it takes longer");
            assert_eq!(error.code, Code::OperationTimeout, "{error}");
            opened.guest.wait_ticks(3);
        }
        opened.assert_untouched(&before);
        opened.guest.wait_ticks(ALL_SECTORS);
        opened.handle.set_pause_limit(Duration::from_secs(30));
        opened.snapshot("s").unwrap();
    }
}

/// Kills QEMU while memory is being saved.
fn kill_qemu_in_the_drain(opened: &OpenedDomain) -> Error {
    let mut observer = At(|phase| {
        if phase == Phase::Drain {
            opened.guest.wait_ticks(5);
            // A pause makes QEMU flush the overlays.
            opened.guest.virsh("suspend", &[]);
            opened.guest.kill();
        }
    });
    let error = opened.snapshot_observed("killed", &mut observer).expect_err("QEMU was killed");
    eprintln!("{error}");
    error
}

/// Asserts that the guest's images hold the last number that it wrote.
#[track_caller]
fn check_images(guest: &Guest, suffix: &str) {
    let last = guest.serial().tick.unwrap();
    for disk in guest.disks() {
        let (image, raw) = (disk.file.with_extension(suffix), guest.directory().join("as-raw"));
        common::run("qemu-img", &["convert", "-O", "raw", path(&image), path(&raw)]);
        let content = std::fs::read(&raw).unwrap();
        std::fs::remove_file(&raw).unwrap();
        let number = u32::from_le_bytes(content[4096..4100].try_into().unwrap());
        assert!(
            (last..=last + 1).contains(&number),
            "{} holds {number}, not {last}",
            image.display()
        );
    }
}

/// Removes the `<backingStore>` elements, which libvirt derives from the images.
fn without_backing_stores(xml: String) -> String {
    let mut depth = 0i32;
    let outside = |line: &&str| {
        let before = depth;
        depth += i32::from(line.contains("<backingStore "))
            - i32::from(line.contains("</backingStore>"));
        before + depth == 0
    };
    xml.lines().filter(outside).collect::<Vec<_>>().join("\n")
}

#[test]
fn killed_qemu_leaves_the_definition_and_all_guest_writes() {
    by_client_only();
    let daemon = virt::session();
    for binary in Binary::under_libvirt() {
        let opened = OpenedDomain::start(&machine(binary).append("dense=8"), &daemon);
        opened.snapshot("s").unwrap();
        let guest = &opened.guest;
        let inactive = || without_backing_stores(guest.virsh("dumpxml", &["--inactive"]));
        let (definition, files) = (inactive(), common::files_below(guest.directory()));
        kill_qemu_in_the_drain(&opened);
        wait_for(DEADLINE, || (guest.virsh("domstate", &[]).trim() == "shut off").then_some(()))
            .expect("it is not gone");
        assert_eq!(inactive(), definition);
        assert_eq!(common::files_below(guest.directory()), files);
        assert_eq!(guest.virsh("snapshot-list", &["--name"]).trim(), "s");
        assert_eq!(guest.virsh("snapshot-current", &["--name"]).trim(), "s");
        check_images(guest, "s");
        guest.start_domain();
        wait_for(DEADLINE, || guest.serial().tick).expect("the guest does not start");
        opened.snapshot("t").unwrap();
        guest.wait_ticks(ALL_SECTORS);
    }
}
