// SPDX-License-Identifier: LGPL-2.1-or-later

//! The owners of files and processes: system and session daemons, an embedded libvirt, and remote
//! connections.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;

use common::virt::{self, OpenedDomain};
use common::{Handle, INSTANTLY};
use instantsnap::backend::LibvirtConnector;
use instantsnap::error::Code;
use instantsnap::libvirt::Connect;
use instantsnap_testkit::compile::tick_guest;
use instantsnap_testkit::machine::make_image;
use instantsnap_testkit::{
    Binary, DEADLINE, Daemon, Disk, Format, Machine, Mode, Serial, missing_package, test, wait_for,
};

fn machine(binary: &'static Binary) -> Machine {
    Machine::new(binary).disk(Format::Qcow2).disk(Format::Raw)
}

#[test]
fn overlays_belong_to_qemu_and_the_memory_image_is_private() {
    for daemon in virt::daemons() {
        let opened = OpenedDomain::start(&machine(&Binary::all()[0]), &daemon);
        let qemu = Path::new("/proc").join(opened.guest.pid().to_string()).metadata().unwrap();
        assert_eq!(qemu.uid(), daemon.user(), "QEMU's user");
        opened.snapshot("s").unwrap();
        // The guest writes to its overlays.
        opened.guest.wait_ticks(common::ALL_SECTORS);
        for disk in opened.guest.disks() {
            let overlay = disk.file.with_extension("s").metadata().unwrap();
            assert_eq!(overlay.uid(), daemon.user(), "{}", disk.device);
            assert_eq!(overlay.mode() & 0o022, 0, "others may write to it");
        }
        let memory = opened.memory_file("s").metadata().unwrap();
        assert_eq!(memory.mode() & 0o7777, 0o600);
        // A session daemon's memory image belongs to its user, who restores it. A system daemon's
        // belongs to root, and QEMU cannot read it.
        let owner = match daemon.mode() {
            Mode::Session => daemon.user(),
            Mode::System => rustix::process::geteuid().as_raw(),
        };
        assert_eq!(memory.uid(), owner);
        assert!(daemon.mode() == Mode::Session || memory.uid() != daemon.user());
        // It can be restored in its own daemon too: libvirt opens it with the rights that it needs.
        opened.guest.virsh("destroy", &[]);
        let (image, overlays) = (opened.memory_file("s"), opened.restore_clone("s"));
        assert_eq!(image.metadata().unwrap().mode() & 0o7777, 0o600);
        drop(overlays);
    }
}

/// A local TCP port that is forwarded to a daemon's socket.
fn forward_tcp_to(socket: &Path) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (port, socket) = (listener.local_addr().unwrap().port(), socket.to_owned());
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let Ok(server) = UnixStream::connect(&socket) else { return };
            let (mut from_client, mut to_server) =
                (client.try_clone().unwrap(), server.try_clone().unwrap());
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut from_client, &mut to_server);
                let _ = to_server.shutdown(std::net::Shutdown::Both);
            });
            std::thread::spawn(move || {
                let (mut server, mut client) = (server, client);
                let _ = std::io::copy(&mut server, &mut client);
                let _ = client.shutdown(std::net::Shutdown::Both);
            });
        }
    });
    port
}

#[test]
fn remote_connection_is_refused_before_anything_is_touched() {
    let daemon = Daemon::session();
    let opened = OpenedDomain::start(&machine(&Binary::all()[0]), &daemon);
    let before = opened.trace();
    let uuid = opened.guest.virsh("domuuid", &[]);
    let uri = format!("qemu+tcp://127.0.0.1:{}/session", forward_tcp_to(&daemon.socket()));
    let domain = Connect::open(&uri).unwrap().unwrap().domain(uuid.trim()).unwrap();
    let error = LibvirtConnector::open(domain).expect_err("it is remote");
    assert_eq!(error.code, Code::OperationUnsupported, "{error}");
    for part in [uri.as_str(), "remote machine", "qemu:///system"] {
        assert!(error.message.contains(part), "{part:?} is not in {error}");
    }
    opened.assert_untouched(&before);
    opened.guest.wait_ticks(3);
}

#[test]
fn domain_of_another_driver_is_refused() {
    let connect = Connect::open("test:///default").unwrap().unwrap();
    let domain = connect.domain("6695eb01-f6a4-8304-79aa-97f2502e193f").unwrap();
    let error = LibvirtConnector::open(domain).expect_err("it is no QEMU");
    assert_eq!(error.code, Code::OperationUnsupported, "{error}");
    for part in ["test:///default", "only QEMU's"] {
        assert!(error.message.contains(part), "{part:?} is not in {error}");
    }
}

/// A second connection by the daemon's plain URI reaches the same domain.
#[test]
fn two_connections_exclude_each_other_on_one_domain() {
    let daemon = Daemon::session();
    let opened = OpenedDomain::start(&machine(&Binary::all()[0]), &daemon);
    let other = Handle::open_libvirt(Arc::new(
        LibvirtConnector::open(common::virt::domain(&opened.guest)).unwrap(),
    ));
    let mut refused = None;
    let mut observer = common::At(|phase| {
        if phase == instantsnap::engine::Phase::Drain {
            let xml = opened.xml("other", "");
            refused = Some(other.create(&xml, INSTANTLY, &mut ()));
        }
    });
    opened.snapshot_observed("s", &mut observer).unwrap();
    let error = refused.unwrap().expect_err("the domain is taken");
    assert_eq!(error.code, Code::OperationInvalid, "{error}");
    other.create(&opened.xml("other", ""), INSTANTLY, &mut ()).unwrap();
    opened.guest.wait_ticks(3);
}

/// A program that embeds libvirt's QEMU driver, executes commands and prints their results.
const EMBEDDER: &str = r#"
import ctypes, sys, threading
import libvirt

library, root, definition = sys.argv[1:]
libvirt.virEventRegisterDefaultImpl()

def run_events():
    while True:
        libvirt.virEventRunDefaultImpl()

threading.Thread(target=run_events, daemon=True).start()
connect = libvirt.open("qemu:///embed?root=" + root)
with open(definition) as file:
    domain = connect.defineXML(file.read())
domain.create()
instantsnap = ctypes.CDLL(library)
create = instantsnap.qemuSnapshotCreateXML
create.restype = ctypes.c_void_p
create.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint]
pointer = ctypes.pythonapi.PyCapsule_GetPointer
pointer.restype = ctypes.c_void_p
pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
print("started", flush=True)
delete = instantsnap.qemuSnapshotDelete
delete.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint]
for line in sys.stdin:
    what, flags, word = line.split()
    if what == "delete":
        snapshot = domain.snapshotLookupByName(word)
        done = delete(None, pointer(snapshot._o, b"virDomainSnapshotPtr"), int(flags)) == 0
    else:
        with open(word) as file:
            done = create(pointer(domain._o, b"virDomainPtr"), None, file.read().encode(), int(flags))
    if done:
        print("done", ",".join(sorted(domain.snapshotListNames())), domain.state()[0], flush=True)
    else:
        print("failed", libvirt.virGetLastError()[0], libvirt.virGetLastErrorMessage(), flush=True)
domain.destroy()
"#;

struct Embedder {
    child: Child,
    commands: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Embedder {
    /// Starts it as this user where this process is root: root's driver would need users and groups
    /// that not every machine has.
    fn start(root: &Path, definition: &Path, user: u32) -> Embedder {
        let library = std::env::current_exe().unwrap().with_file_name("libinstantsnap.so");
        assert!(library.exists(), "{}", library.display());
        let mut command = Command::new("/usr/bin/python3");
        command.args(["-c", EMBEDDER]).arg(&library).args([root, definition]);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .env("LC_ALL", "C.UTF-8")
            .env("HOME", root)
            .env("INSTANTSNAP_STATE_DIRECTORY", root.join("journals"));
        // As in a program that is linked with the library: the dynamic linker resolves the driver's
        // calls to the library first.
        command.env("LD_PRELOAD", &library);
        if rustix::process::geteuid().is_root() {
            command.uid(user).gid(user);
        }
        let mut child = command.spawn().unwrap();
        let commands = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().unwrap());
        let mut embedder = Embedder { child, commands, answers };
        assert_eq!(embedder.answer(), "started");
        embedder
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    fn create(&mut self, directory: &Path, name: &str, memory: &Path) -> String {
        let file = directory.join("request.xml");
        let xml = format!(
            "<domainsnapshot><name>{name}</name><memory snapshot='external' \
             file='{}'/></domainsnapshot>",
            memory.display()
        );
        std::fs::write(&file, xml).unwrap();
        writeln!(self.commands.as_ref().unwrap(), "create {INSTANTLY} {}", file.display()).unwrap();
        self.answer()
    }

    fn delete(&mut self, name: &str) -> String {
        writeln!(self.commands.as_ref().unwrap(), "delete 0 {name}").unwrap();
        self.answer()
    }
}

impl Drop for Embedder {
    fn drop(&mut self) {
        // The program destroys its domain, and ends.
        drop(self.commands.take());
        let ended = wait_for(DEADLINE, || self.child.try_wait().ok().flatten());
        if ended.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

#[test]
fn embedded_libvirt_driver_is_supported() {
    let has_module = Command::new("/usr/bin/python3").args(["-c", "import libvirt"]).status();
    if !has_module.is_ok_and(|status| status.success()) {
        missing_package("no libvirt for /usr/bin/python3");
    }
    let clones = Daemon::session();
    let binary = &Binary::all()[0];
    // The path is short because sockets are created below it.
    let directory = tempfile::Builder::new().prefix("ise-").tempdir().unwrap();
    let directory = directory.path();
    std::fs::set_permissions(directory, PermissionsExt::from_mode(0o755)).unwrap();
    let root = directory.join("root");
    std::fs::create_dir_all(root.join("etc")).unwrap();
    std::fs::write(root.join("etc/qemu.conf"), "stdio_handler = \"file\"\n").unwrap();
    // libvirt's cache of QEMU's capabilities, which takes seconds to create.
    let (known, own) = (
        clones.directory().join("cache/libvirt/qemu/cache/capabilities"),
        root.join("cache/qemu/capabilities"),
    );
    std::fs::create_dir_all(&own).unwrap();
    for file in common::files_below(&known) {
        std::fs::copy(&file, own.join(file.file_name().unwrap())).unwrap();
    }
    std::fs::copy(tick_guest(), directory.join("tick.elf")).unwrap();
    let (image, serial) = (directory.join("disk.qcow2"), directory.join("serial.log"));
    make_image(&image, Format::Qcow2, None);
    let disk = Disk {
        device: "vda".into(),
        backend: String::new(),
        file: image.clone(),
        format: Format::Qcow2,
    };
    let machine = Machine::new(binary).disk_on(&image, Format::Qcow2);
    let definition = directory.join("domain.xml");
    std::fs::write(&definition, machine.domain_xml("embedded", directory, &[disk])).unwrap();

    let user = clones.user();
    common::run("chown", &["-R", &user.to_string(), directory.to_str().unwrap()]);
    let mut embedder = Embedder::start(&root, &definition, user);
    let wait_ticks = |more: u32| {
        let start =
            wait_for(DEADLINE, || Serial::read(&serial).tick).expect("the guest does not count");
        let counted = wait_for(DEADLINE, || {
            let now = Serial::read(&serial);
            assert_eq!(now.trouble, None);
            now.tick.filter(|tick| *tick >= start + more)
        });
        counted.expect("the guest does not count on")
    };
    wait_ticks(2);
    let memory = directory.join("s.mem");
    assert_eq!(embedder.create(directory, "s", &memory), "done s 1");
    wait_ticks(common::ALL_SECTORS);
    let expected = format!("failed {} ", Code::OperationInvalid as i32);
    let answer = embedder.create(directory, "s", &directory.join("other.mem"));
    assert!(answer.starts_with(&expected) && answer.contains("already exists"), "{answer}");
    assert!(!directory.join("other.mem").exists());
    let clone = clones.restore_edited(&machine, &memory, |xml| xml);
    clone.wait_ticks(5);
    wait_ticks(3);
    drop(clone);
    assert_eq!(embedder.create(directory, "t", &directory.join("t.mem")), "done s,t 1");
    assert_eq!(embedder.delete("s"), "done t 1");
    assert!(!memory.exists());
    wait_ticks(3);
    let gone =
        wait_for(DEADLINE, || clones.try_virsh(&["domstate", "embedded"]).is_err().then_some(()));
    gone.expect("the clone does not go");
}
