// SPDX-License-Identifier: LGPL-2.1-or-later

//! A user who interrupts a snapshot: it is undone.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;

use instantsnap_testkit::{
    Binary, Client, DEADLINE, Format, Guest, Machine, Proxy, fingerprint, test, wait_for,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use super::run::{Direct, PROGRAM, Vm, command};
use super::terminal::Terminal;

/// The names in a directory.
fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    // The state directory's lock stays.
    names.retain(|name| name != ".lock");
    names.sort();
    names
}

/// A machine whose memory takes QEMU a quarter of a second.
fn machine(binary: &'static Binary) -> Machine {
    Machine::new(binary).disk(Format::Qcow2).memory(64)
}

/// Makes QEMU send memory slowly, once it sends it. A drain that begins forgets the limit of
/// before.
fn slow_down(client: &mut Client) {
    let sends = || {
        let ram = client.execute("query-migrate", json!({})).unwrap()["ram"].clone();
        let has_pages = |kind: &str| ram[kind].as_u64().unwrap_or(0) > 0;
        (has_pages("normal") || has_pages("duplicate")).then_some(())
    };
    wait_for(DEADLINE, sends).expect("QEMU sends no memory");
    client.execute("migrate-set-parameters", json!({ "max-bandwidth": 1 << 18 })).unwrap();
}

/// Lets QEMU send the rest, which an older one does before it ends the migration.
fn speed_up(client: &mut Client) {
    const USUAL: u64 = 128 << 20;
    client.execute("migrate-set-parameters", json!({ "max-bandwidth": USUAL })).unwrap();
}

/// What a snapshot that is undone must leave as it was.
fn trace(
    guest: &Guest,
    more: &Path,
) -> (instantsnap_testkit::Fingerprint, Vec<String>, Vec<String>) {
    (fingerprint(&mut guest.control()), names(guest.directory()), names(more))
}

#[test]
fn ctrl_c_in_the_drain_undoes_the_snapshot_and_says_so() {
    let direct = Direct::of(machine(&Binary::some()[0]));
    let before = trace(&direct.guest, &direct.state);
    let mut client = direct.guest.control();
    let words = ["-c", &direct.uri, "snapshot-create-as", "vm", "a"];
    let mut terminal = Terminal::run(PROGRAM.as_ref(), &words, |_| ());
    slow_down(&mut client);
    terminal.wait("The guest may be changed now; it was paused ");
    // The bar, with how much is saved, how fast, and how long it takes still.
    terminal.wait("%");
    terminal.wait(" of ");
    terminal.wait("/s");
    terminal.wait("left");
    terminal.press("\x03");
    terminal.wait("interrupted: the snapshot is being undone");
    terminal.press("\x03");
    terminal.wait("still being undone");
    speed_up(&mut client);
    drop(client);
    let (status, text) = terminal.end();
    assert_eq!(status, Some(130), "{text}");
    assert!(text.contains("the snapshot is undone, and the guest is as before"), "{text}");
    direct.guest.wait_ticks(2);
    assert_eq!(trace(&direct.guest, &direct.state), before);
    // And the next one succeeds.
    direct.run(&["snapshot-create-as", "vm", "a"]).succeeded();
}

#[test]
fn a_deletion_says_that_it_goes_on_to_its_end() {
    let direct = Direct::start();
    direct.run(&["-q", "snapshot-create-as", "vm", "a"]).succeeded();
    let proxy = Proxy::start(&direct.guest.directory().join("proxy.sock"), &direct.guest.qmp());
    let gate = proxy.hold("block-commit", 1);
    let uri = format!("qmp://{}?state={}", proxy.path().display(), direct.state.display());
    let words = ["-c", &uri, "snapshot-delete", "vm", "--current"];
    let mut terminal = Terminal::run(PROGRAM.as_ref(), &words, |_| ());
    assert!(gate.wait_arrived(DEADLINE));
    terminal.press("\x03");
    terminal.wait("a deletion cannot be interrupted safely");
    gate.release();
    let (status, text) = terminal.end();
    assert_eq!(status, Some(0), "{text}");
    assert!(text.contains("Domain snapshot a deleted"), "{text}");
    direct.guest.wait_ticks(2);
    assert_eq!(direct.run(&["snapshot-list", "vm", "--name"]).succeeded(), "");
}

#[test]
fn sigterm_undoes_a_domains_snapshot_and_the_events_say_so() {
    let vm = Vm::of(machine(&Binary::under_libvirt()[0]).name("vm1"));
    let disk = vm.guest.disks()[0].file.clone();
    let directory = disk.parent().unwrap();
    let before = names(directory);
    let mut command = command(&["--json", "snapshot-create-as", "vm1", "a"]);
    command.env("LIBVIRT_DEFAULT_URI", &vm.uri).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.any(|line| line.contains("\"instant\"")), "no instant");
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    let said: Vec<String> = lines.collect();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(143), "{said:?}");
    let last: serde_json::Value = serde_json::from_str(said.last().unwrap()).unwrap();
    assert_eq!(last["event"], "failed");
    const ABORTED: i32 = 78;
    assert_eq!(last["error"]["code"], ABORTED);
    vm.guest.wait_ticks(2);
    assert_eq!(names(directory), before);
    assert_eq!(vm.guest.virsh("snapshot-list", &["--name"]).trim(), "");
}
