// SPDX-License-Identifier: LGPL-2.1-or-later

//! What the shells offer, when the user presses Tab.

use std::fs;
use std::path::Path;
use std::process::Command;

use instantsnap_testkit::{skip, test};

use super::run::{Direct, PROGRAM, Vm, command, end};
use super::terminal::Terminal;

const SCRIPTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/completions");

/// A shell in a terminal, whose user has this directory and the default URI.
fn shell(name: &str, words: &[&str], home: &Path, uri: &str) -> Terminal {
    if Command::new(name).arg("-c").arg(":").output().is_err() {
        skip(format!("no {name}"));
    }
    let programs = Path::new(PROGRAM).parent().unwrap().display();
    Terminal::run(name.as_ref(), words, |command| {
        command
            .env("PATH", format!("{programs}:{}", std::env::var("PATH").unwrap()))
            .env("HOME", home)
            .env("XDG_CONFIG_HOME", home)
            .env("TERM", "dumb")
            .env("LIBVIRT_DEFAULT_URI", uri);
    })
}

/// Completes a command, a domain and a snapshot, and runs the command. `set_up` makes the shell
/// offer them, and shows `ready`.
fn complete_in(mut shell: Terminal, set_up: &str) {
    shell.press(&format!("{set_up}; echo re''ady\n"));
    shell.wait("\nready");
    shell.press("instantsnap snapshot-inf\t");
    shell.wait("snapshot-info ");
    shell.press("mai\t");
    shell.wait("mail-server ");
    shell.press("bef\t");
    shell.wait("before-upgrade");
    shell.press("\n");
    shell.wait("Location:       external");
    shell.press("exit\n");
    shell.end();
}

#[test]
fn bash_completes_the_names_of_libvirts_domains_and_snapshots() {
    let vm = Vm::start("mail-server");
    vm.run(&["-q", "snapshot-create-as", "mail-server", "before-upgrade"]).succeeded();
    let shell = shell("bash", &["--norc", "-i"], vm.guest.directory(), &vm.uri);
    complete_in(shell, &format!("source {SCRIPTS}/instantsnap.bash"));
}

/// A guest by QMP that has a name and a snapshot.
fn direct() -> (Direct, String) {
    let direct = Direct::start();
    let file = direct.guest.directory().join("domain.xml");
    fs::write(&file, "<domain type='qemu'><name>mail-server</name></domain>").unwrap();
    direct.run(&["-q", "snapshot-create-as", "mail-server", "before-upgrade"]).succeeded();
    let uri = format!("{}&domain={}", direct.uri, file.display());
    (direct, uri)
}

#[test]
fn zsh_completes_names_by_a_qmp_uri() {
    let (direct, uri) = direct();
    let shell = shell("zsh", &["-f", "-i"], direct.guest.directory(), &uri);
    let set_up = format!("fpath=({SCRIPTS} $fpath); autoload -U compinit; compinit -D -u");
    complete_in(shell, &set_up);
}

#[test]
fn fish_completes_names_by_a_qmp_uri() {
    let (direct, uri) = direct();
    let words = ["--private", "--no-config"];
    let shell = shell("fish", &words, direct.guest.directory(), &uri);
    complete_in(shell, &format!("source {SCRIPTS}/instantsnap.fish"));
}

/// What is offered for the last word.
fn offered(uri: &str, words: &[&str]) -> Vec<String> {
    let index = words.len().to_string();
    let mut command =
        command(&[&["complete", "fish", &index, "--", "instantsnap"], words].concat());
    command.env("LIBVIRT_DEFAULT_URI", uri);
    let lines = end(command).succeeded();
    lines.lines().map(|line| line.split('\t').next().unwrap().to_owned()).collect()
}

#[test]
fn names_are_offered_by_every_kind_of_connection_that_asks_for_no_password() {
    let direct = Direct::start();
    direct.run(&["-q", "snapshot-create-as", "vm", "by-qmp"]).succeeded();
    let other = "qemu+ssh://nowhere.invalid/system";
    let by_qmp = ["-c", &direct.uri, "snapshot-revert", "vm", ""];
    assert!(offered(other, &by_qmp).contains(&"by-qmp".to_owned()));
    let by_option = ["-c", &direct.uri, "snapshot-revert", "--domain", "vm", "by"];
    assert_eq!(offered(other, &by_option), ["by-qmp"]);
    let from = ["-c", &direct.uri, "snapshot-list", "vm", "--from", "by"];
    assert_eq!(offered(other, &from), ["by-qmp"]);
    // Another machine is not asked.
    assert_eq!(offered(other, &["snapshot-list", "x"]), [""; 0]);
    assert_eq!(offered("test:///default", &["snapshot-list", "te"]), ["test"]);
    assert_eq!(offered("", &["image", "con"]), ["convert"]);
}
