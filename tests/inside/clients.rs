// SPDX-License-Identifier: LGPL-2.1-or-later

//! Unmodified clients of a stock libvirtd with the library in it, over every transport. Calls that
//! do not concern instant snapshots behave as without the library.

use std::fs::Permissions;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use common::inside::{CREATE, INSTANT, LIVE, Subject, answer, library, session};
use common::machine;
use common::sshd::Sshd;
use common::tree::{Maker, Tree};
use instantsnap::model::flags::delete::CHILDREN;
use instantsnap_testkit::compile::{gcc, workspace};
use instantsnap_testkit::{Binary, Daemon, Machine, Mode, missing_package, test};

const UPGRADE: (&str, &str) = ("INSTANTSNAP_UPGRADE_LIVE", "1");

fn one_disk() -> Machine {
    machine(&Binary::under_libvirt()[0], 1)
}

fn start(variables: &[(&'static str, &str)]) -> Subject {
    Subject::start(&one_disk(), &session(variables))
}

/// `virsh snapshot-create-as --live` with the memory in a file.
fn create_live(subject: &Subject, name: &str) {
    let memory = format!("file={}", subject.memory(name).display());
    subject.guest.virsh("snapshot-create-as", &["--name", name, "--live", "--memspec", &memory]);
}

#[test]
fn c_client_can_request_instant() {
    if !Path::new("/usr/include/libvirt/libvirt.h").exists() {
        missing_package("libvirt's headers are not installed");
    }
    let subject = start(&[]);
    let program = gcc(
        &workspace().join("c-tests/plain_client.c"),
        "plain_client",
        "-Wl,--no-as-needed -lvirt",
    );
    let output = Command::new(&program)
        .args([
            &subject.guest.daemon().uri(),
            subject.guest.name(),
            &subject.xml("c"),
            &INSTANT.to_string(),
        ])
        .env_clear()
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "c\n", "{output:?}");
    subject.guest.wait_ticks(3);
    subject.restore_clone("c", &Daemon::session());
}

#[test]
fn perl_client_can_request_instant() {
    let perl = |script: &str| {
        let mut command = Command::new("perl");
        command.args(["-MSys::Virt", "-e", script]).env_clear().env("PATH", "/usr/bin:/bin");
        command
    };
    if !perl("1").output().is_ok_and(|output| output.status.success()) {
        missing_package("Perl's Sys::Virt is not installed");
    }
    let subject = start(&[]);
    let script = "my ($uri, $name, $xml, $flags) = @ARGV;
        my $domain = Sys::Virt->new(uri => $uri)->get_domain_by_name($name);
        print $domain->create_snapshot($xml, $flags)->get_name();";
    let output = perl(script)
        .args([
            &subject.guest.daemon().uri(),
            subject.guest.name(),
            &subject.xml("perl"),
            &INSTANT.to_string(),
        ])
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "perl", "{output:?}");
    subject.guest.wait_ticks(3);
    subject.restore_clone("perl", &Daemon::session());
}

/// An external program that forwards the connection, as ssh does, forwards the flag.
#[test]
fn client_over_an_external_program_can_request_instant() {
    let subject = start(&[]);
    let daemon = subject.guest.daemon();
    let relay = subject.guest.directory().join("relay");
    let own = workspace().join("tests/inside/relay.py");
    let text = format!("#!/bin/sh\nexec '{}' '{}'\n", own.display(), daemon.socket().display());
    std::fs::write(&relay, text).unwrap();
    std::fs::set_permissions(&relay, Permissions::from_mode(0o755)).unwrap();
    let uri = format!("qemu+ext:///session?command={}", relay.display());
    let mut client =
        subject.client_of(&uri, CREATE, &[&subject.xml("relayed"), &INSTANT.to_string()]);
    assert_eq!(answer(client.output().unwrap()), Ok("relayed".into()));
    assert_eq!(subject.snapshots(), ["relayed"]);
    subject.guest.wait_ticks(3);
    subject.restore_clone("relayed", &Daemon::session());
}

#[test]
fn client_over_tcp_can_request_instant() {
    // Another process may take the port before the daemon does. Then the daemon does not start, and
    // the test fails with that reason.
    let port = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
    let conf = format!(
        "listen_tls = 0\nlisten_tcp = 1\nauth_tcp = \"none\"\nlisten_addr = \
         \"127.0.0.1\"\ntcp_port = \"{port}\"\n"
    );
    let daemon = Daemon::configured(Mode::Session, &[&library()], &[], &conf).unwrap();
    let subject = Subject::start(&one_disk(), &daemon);
    let uri = format!("qemu+tcp://127.0.0.1:{port}/session");
    let mut client = subject.client_of(&uri, CREATE, &[&subject.xml("tcp"), &INSTANT.to_string()]);
    assert_eq!(answer(client.output().unwrap()), Ok("tcp".into()));
    subject.guest.wait_ticks(3);
    subject.restore_clone("tcp", &Daemon::session());
}

#[test]
fn client_over_ssh_can_request_instant() {
    let subject = start(&[]);
    let daemon = subject.guest.daemon();
    let sshd = Sshd::start(daemon);
    let by_name = format!("proxy=netcat&socket={}", daemon.socket().display());
    // The helper on the server: a generic program that connects to the named socket, or libvirt's
    // helper, which finds the daemon's socket.
    for (name, program, parameters) in
        [("nc", "/usr/bin/nc", &*by_name), ("helper", "/usr/bin/virt-ssh-helper", "proxy=native")]
    {
        if !Path::new(program).exists() {
            missing_package(&format!("no {program}"));
        }
        let mut client = subject.client_of(
            &sshd.uri(parameters),
            CREATE,
            &[&subject.xml(name), &INSTANT.to_string()],
        );
        assert_eq!(answer(client.output().unwrap()), Ok(name.into()));
        subject.guest.wait_ticks(3);
        subject.restore_clone(name, &Daemon::session());
    }
}

#[test]
fn paused_guest_gets_a_stock_snapshot_and_stays_paused() {
    let subject = start(&[]);
    subject.guest.virsh("suspend", &[]);
    assert_eq!(subject.snapshot("paused"), Ok("paused".into()));
    assert_eq!(subject.guest.virsh("domstate", &[]).trim(), "paused");
    subject.guest.virsh("resume", &[]);
    subject.guest.wait_ticks(3);
}

#[test]
fn stock_revert_and_delete_functions_work_on_instant_snapshots() {
    let subject = start(&[]);
    for name in ["a", "b"] {
        assert_eq!(subject.snapshot(name).as_deref(), Ok(name));
        subject.guest.wait_ticks(5);
    }
    assert_eq!(subject.revert("a"), Ok("0".into()));
    subject.guest.wait_ticks(5);
    assert!(subject.guest.virsh("snapshot-current", &["--name"]).trim() == "a");
    assert_eq!(subject.on_snapshot("b", "delete(0)"), Ok("0".into()));
    assert!(!subject.memory("b").exists());
    assert_eq!(subject.snapshots(), ["a"]);
    assert_eq!(subject.on_snapshot("a", "delete(0)"), Ok("0".into()));
    assert!(!subject.memory("a").exists());
    assert_eq!(subject.snapshots(), [""; 0]);
    subject.guest.wait_ticks(5);
    // A new snapshot can be taken afterwards.
    assert_eq!(subject.snapshot("c"), Ok("c".into()));
}

#[test]
fn upgrade_setting_makes_live_snapshots_instant_where_supported() {
    let subject = start(&[]);
    create_live(&subject, "stock");
    assert!(!subject.was_instant());

    let subject = start(&[UPGRADE]);
    create_live(&subject, "upgraded");
    assert!(subject.was_instant());
    // The setting concerns only LIVE snapshots with memory.
    subject.guest.virsh("snapshot-create-as", &["--name", "disks", "--disk-only"]);
    assert_eq!(subject.snapshots(), ["upgraded", "disks"]);
    subject.guest.wait_ticks(3);
    subject.restore_clone("upgraded", &Daemon::session());

    let subject = start(&[UPGRADE, ("INSTANTSNAP_MAX_SNAPSHOTS", "0")]);
    create_live(&subject, "full");
    assert!(!subject.was_instant());
    assert_eq!(answer(subject.create("asked", INSTANT).output().unwrap()).unwrap_err().code, 87);
    // For a shut off domain libvirt reports its own error.
    subject.guest.virsh("destroy", &[]);
    let [ours, theirs] = [&[UPGRADE][..], &[]].map(|variables| {
        let subject = start(variables);
        subject.guest.virsh("destroy", &[]);
        answer(subject.create("off", LIVE).output().unwrap()).unwrap_err()
    });
    assert_eq!(ours, theirs);
}

/// The daemon handles its steps like the calls of any other client.
#[test]
fn client_with_the_library_supports_every_operation() {
    let daemon = session(&[UPGRADE]);
    let mut tree = Tree::start(&one_disk(), &daemon, Maker::Instant);
    for name in ["a", "b", "c", "d"] {
        tree.snapshot(name);
    }
    tree.delete("b", 0);
    tree.revert("a");
    tree.snapshot("e");
    tree.delete("d", 0);
    tree.revert("c");
    tree.delete("a", CHILDREN);
    assert_eq!(tree.opened.guest.virsh("snapshot-list", &["--name"]).trim(), "");
    tree.opened.guest.wait_ticks(3);
}

/// The answers to the calls of `inside/calls.py`.
fn answers(daemon: &Daemon) -> Vec<String> {
    const UUID: &str = "5f0c0a0e-7a4c-4d57-9a54-0e6f3f2f1d11";
    let with_uuid =
        |xml: String| xml.replacen("</name>", &format!("</name><uuid>{UUID}</uuid>"), 1);
    let machine = machine(&Binary::under_libvirt()[0], 2).name("same").edit_xml(with_uuid);
    let guest = machine.start_under(daemon);
    guest.wait_ticks(2);
    let script = workspace().join("tests/inside/calls.py");
    let output = Command::new("/usr/bin/python3")
        .arg(script)
        .args([&daemon.uri(), "same", guest.directory().to_str().unwrap()])
        .env_clear()
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let text = text.replace(guest.directory().to_str().unwrap(), "GUEST");
    let text = text.replace(daemon.directory().to_str().unwrap(), "DAEMON");
    text.lines().map(str::to_owned).collect()
}

#[test]
fn hundreds_of_unrelated_calls_are_answered_as_without_the_library() {
    let (with, without) = (answers(&session(&[])), answers(&Daemon::session()));
    assert!(with.len() >= 200);
    assert_eq!(with.len(), without.len());
    let differ = |(with, without): &(&String, &String)| with != without;
    let different: Vec<_> = with.iter().zip(&without).filter(differ).collect();
    assert!(different.is_empty(), "{different:#?}");
    eprintln!("{} calls", with.len());
}
