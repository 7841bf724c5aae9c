// SPDX-License-Identifier: LGPL-2.1-or-later

//! Guests of a private libvirtd in both modes: they are started, saved and restored, and nothing is
//! left of them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use instantsnap_testkit::program::process;
use instantsnap_testkit::{
    Binary, DEADLINE, Daemon, Format, Machine, MachineType, domain_fingerprint, process, test,
    wait_for,
};

/// libvirt itself saves the guest, and another daemon restores it.
#[test]
fn saved_guest_can_be_restored() {
    for binary in Binary::under_libvirt() {
        for daemon in Daemon::all() {
            for (machine_type, disks) in [(MachineType::Pc, 1), (MachineType::Q35, 3)] {
                let machine = (0..disks)
                    .fold(Machine::new(binary).machine_type(machine_type), |machine, n| {
                        machine.disk(if n % 2 == 0 { Format::Qcow2 } else { Format::Raw })
                    });
                let guest = machine.start_under(&daemon);
                let at = guest.wait_ticks(10);
                assert_ne!(guest.pid(), 0);
                let image = guest.directory().join("image");
                guest.virsh("save", &[image.to_str().unwrap()]);
                assert!(!guest.alive());
                let clone = daemon.another().restore(&guest, &image);
                let clone_at = clone.wait_ticks(100);
                eprintln!(
                    "{} {:?} {disks} disks: {at}, clone {clone_at}",
                    binary.name,
                    daemon.mode()
                );
                assert!(clone_at > at + 100);
                assert_eq!(clone.disks().len(), disks);
                assert!(clone.disks().iter().all(|disk| disk.file.starts_with(clone.directory())));
            }
        }
    }
}

/// The guest notices a disk of another moment.
#[test]
fn torn_image_is_noticed() {
    let daemon = Daemon::session();
    let guest = Machine::new(&Binary::all()[0]).disk(Format::Raw).start_under(&daemon);
    guest.wait_ticks(10);
    let image = guest.directory().join("image");
    guest.virsh("save", &[image.to_str().unwrap()]);
    std::fs::write(&guest.disks()[0].file, vec![0; 16 << 20]).unwrap();
    let clone = daemon.another().restore(&guest, &image);
    let line = clone.try_ticks(5, DEADLINE).expect_err("not noticed");
    assert!(line.starts_with("TORN disk 0 has 0 want "), "{line}");
}

#[test]
fn qemu_outlives_its_daemon() {
    for daemon in Daemon::all() {
        let guest = Machine::new(&Binary::all()[0]).disk(Format::Qcow2).start_under(&daemon);
        guest.wait_ticks(3);
        let before = domain_fingerprint(&guest);
        let pid = guest.pid();
        daemon.kill();
        guest.wait_ticks(10);
        assert!(daemon.try_virsh(&["list"]).is_err());
        daemon.start_again();
        assert_eq!(guest.pid(), pid);
        let after = domain_fingerprint(&guest);
        assert!(before == after, "{}", before.differences(&after));
        guest.wait_ticks(3);
        guest.kill();
        assert!(!guest.alive());
    }
}

#[test]
fn domain_matches_the_requested_machine() {
    let daemon = Daemon::session();
    let machine = Machine::new(&Binary::all()[0])
        .name("extras")
        .disk(Format::Qcow2)
        .disk(Format::Raw)
        .disk_attributes("snapshot='no'")
        .disk_driver("iothread='1'")
        .disk_elements("<serial>second</serial>")
        .domain_elements("<iothreads>1</iothreads>")
        .domain_elements(
            "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>",
        )
        .devices("<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>")
        .append("pages=128")
        .cdrom(None)
        .paused()
        .transient()
        .edit_xml(|xml| xml.replace("<vcpu>1</vcpu>", "<title>edited</title><vcpu>1</vcpu>"));
    let guest = machine.start_under(&daemon);
    assert_eq!(guest.virsh("domstate", &[]).trim(), "paused");
    guest.virsh("resume", &[]);
    guest.wait_ticks(3);
    assert!(!daemon.virsh(&["list", "--persistent", "--all"]).contains("extras"));
    let xml = guest.virsh("dumpxml", &[]);
    for part in [
        "snapshot='no'",
        "iothread='1'",
        "<serial>second</serial>",
        "memfd",
        "'cdrom'",
        "edited",
        "random",
        "pages=128",
    ] {
        assert!(xml.contains(part), "{part} is not in {xml}");
    }
    let shut_off = Machine::new(&Binary::all()[0]).disk(Format::Qcow2).define_under(&daemon);
    assert!(!shut_off.alive());
    let before = domain_fingerprint(&shut_off);
    shut_off.start_domain();
    shut_off.wait_ticks(3);
    assert_ne!(before, domain_fingerprint(&shut_off));
}

#[test]
fn fingerprint_of_an_unchanged_domain_is_stable() {
    for binary in Binary::under_libvirt() {
        let daemon = Daemon::session();
        let guest = Machine::new(binary).disk(Format::Qcow2).start_under(&daemon);
        guest.wait_ticks(3);
        let before = domain_fingerprint(&guest);
        guest.wait_ticks(10);
        guest.virsh("suspend", &[]);
        guest.virsh("resume", &[]);
        let after = domain_fingerprint(&guest);
        assert!(before == after, "{}", before.differences(&after));
        guest.virsh("snapshot-create-as", &["one", "--disk-only"]);
        let changed = before.differences(&domain_fingerprint(&guest));
        for key in ["snapshots:", "current snapshot:", "domain:", "nodes:", "devices:"] {
            assert!(changed.contains(key), "{key} is not in {changed}");
        }
    }
}

/// Whether a process with this text in its command line exists.
fn runs(text: &str) -> bool {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    processes.into_iter().any(|process| {
        let command_line = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&command_line).contains(text)
    })
}

fn gone(directory: &Path) -> bool {
    !directory.exists() && !runs(&format!("{}/", directory.display()))
}

#[test]
fn failing_test_leaves_nothing() {
    for daemon in Daemon::all() {
        let directory: PathBuf = daemon.directory().to_owned();
        let failed = std::panic::catch_unwind(|| {
            let guest = Machine::new(&Binary::all()[0]).disk(Format::Raw).start_under(&daemon);
            guest.wait_ticks(1);
            assert!(runs(&format!("{}/", directory.display())));
            let daemon = daemon; // the last clone of it
            guest.fail(&format!("as it should {daemon:?}"));
        });
        assert!(failed.is_err());
        assert!(gone(&directory), "{}", directory.display());
    }
}

/// Starts guests, prints their directories, and waits to be killed.
#[process]
fn victim() {
    let daemons = Daemon::all();
    let machine = Machine::new(&Binary::all()[0]).disk(Format::Raw);
    let guests: Vec<_> = daemons.iter().map(|daemon| machine.start_under(daemon)).collect();
    for (daemon, guest) in daemons.iter().zip(&guests) {
        guest.wait_ticks(1);
        println!("victim {}", daemon.directory().display());
    }
    println!("victim ready");
    loop {
        std::thread::park();
    }
}

#[test]
fn killed_test_leaves_nothing() {
    let mut victim =
        process(module_path!(), "victim").stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut directories: Vec<PathBuf> = Vec::new();
    for line in std::io::BufRead::lines(std::io::BufReader::new(victim.stdout.take().unwrap())) {
        match line.unwrap().split_once("victim ") {
            Some((_, "ready")) => break,
            Some((_, directory)) => directories.push(directory.into()),
            None => {}
        }
    }
    assert!(!directories.is_empty());
    assert!(directories.iter().all(|directory| directory.exists()));
    victim.kill().unwrap();
    victim.wait().unwrap();
    let all_gone =
        wait_for(Duration::from_secs(20), || directories.iter().all(|one| gone(one)).then_some(()));
    assert!(all_gone.is_some(), "{directories:?}");
}
