// SPDX-License-Identifier: LGPL-2.1-or-later

//! Every example of the help texts and of the man page is run, in a pipe and in a terminal.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use instantsnap_testkit::test;

use super::run::{Direct, PROGRAM, Vm, clean, end, instantsnap};
use super::terminal::Terminal;

/// The commands that a help text lists.
fn commands(path: &[&str]) -> Vec<String> {
    let help = instantsnap(&[path, &["--help"]].concat()).succeeded();
    let list = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let names = list.take_while(|line| !line.is_empty());
    let names = names.filter_map(|line| line.split_whitespace().next());
    names.filter(|name| *name != "help").map(str::to_owned).collect()
}

/// The examples in the help texts.
fn in_help_texts() -> Vec<String> {
    let mut found = Vec::new();
    for name in commands(&[]) {
        let mut paths = vec![vec![name.clone()]];
        paths.extend(commands(&[&name]).into_iter().map(|sub| vec![name.clone(), sub]));
        for path in paths {
            let words: Vec<&str> = path.iter().map(String::as_str).chain(["--help"]).collect();
            let help = instantsnap(&words).succeeded();
            let lines = help.lines().skip_while(|line| *line != "Examples:");
            let lines = lines.filter_map(|line| line.strip_prefix("    "));
            found.extend(lines.filter(|line| line.starts_with("instantsnap ")).map(str::to_owned));
        }
    }
    found
}

/// The examples in the man page, in its order, in which each finds what it needs.
fn in_man_page() -> Vec<String> {
    let page = instantsnap(&["man"]).succeeded();
    let (_, examples) = page.split_once(".SH EXAMPLES").unwrap();
    let line = |line: &str| {
        let line = line.strip_prefix("\\fB")?.strip_suffix("\\fR")?.replace("\\-", "-");
        let line = line.replace("\\*(Aq", "'").replace("\\\\", "\\");
        line.starts_with("instantsnap ").then_some(line)
    };
    examples.lines().filter_map(line).collect()
}

/// Where the examples are run: their guests, and their files.
struct Stage {
    vm1: Vm,
    vm2: Direct,
    backup: PathBuf,
}

impl Stage {
    fn set() -> Stage {
        let (vm1, vm2) = (Vm::start("vm1"), Direct::start());
        let backup = vm1.guest.directory().join("backup");
        fs::create_dir(&backup).unwrap();
        vm1.guest.daemon().give(&backup);
        let xml = "<domainsnapshot><name>of-file</name></domainsnapshot>";
        fs::write(vm1.guest.directory().join("snapshot.xml"), xml).unwrap();
        Stage { vm1, vm2, backup }
    }

    /// An example with the paths of this stage.
    fn line(&self, example: &str) -> String {
        let at = |path: &Path| path.to_str().unwrap().to_owned();
        example
            .replace("/backup", &at(&self.backup))
            .replace("/run/vm2/qmp.sock", &at(&self.vm2.guest.qmp()))
            .replace("/var/lib/vm2", &at(&self.vm2.state))
    }

    fn prepare(&self, command: &mut Command) {
        let programs = Path::new(PROGRAM).parent().unwrap().display();
        clean(command);
        command
            .env("PATH", format!("{programs}:{}", std::env::var("PATH").unwrap()))
            .env("LIBVIRT_DEFAULT_URI", &self.vm1.uri)
            .current_dir(self.vm1.guest.directory());
    }
}

#[test]
fn every_example_runs_in_a_pipe() {
    let examples = in_man_page();
    let (mut shown, mut listed) = (in_help_texts(), examples.clone());
    shown.sort();
    listed.sort();
    assert!(listed.len() >= 20, "{listed:?}");
    assert_eq!(shown, listed, "the help texts and the man page have the same examples");
    let stage = Stage::set();
    for example in examples {
        let mut command = Command::new("sh");
        command.args(["-c", &stage.line(&example)]);
        stage.prepare(&mut command);
        let output = end(command).succeeded();
        assert!(!output.contains('\x1b'), "{example}: {output}");
    }
    stage.vm1.guest.wait_ticks(2);
    stage.vm2.guest.wait_ticks(2);
}

#[test]
fn every_example_runs_in_a_terminal_and_shows_the_progress_there() {
    let stage = Stage::set();
    for example in in_man_page() {
        let line = stage.line(&example);
        let terminal = Terminal::run("/bin/sh".as_ref(), &["-c", &line], |command| {
            stage.prepare(command);
        });
        let (status, text) = terminal.end();
        assert_eq!(status, Some(0), "{example}: {text}");
        let is_followed = example.contains("snapshot-create")
            && !example.contains("--print-xml")
            && !example.contains("--json");
        assert_eq!(text.contains('%'), is_followed, "{example}: {text:?}");
    }
    stage.vm1.guest.wait_ticks(2);
    stage.vm2.guest.wait_ticks(2);
}

#[test]
fn the_man_page_has_every_command_and_no_error() {
    let page = instantsnap(&["man"]).succeeded();
    for name in commands(&[]) {
        let subs = commands(&[&name]);
        let names = match subs.is_empty() {
            true => vec![name],
            false => subs.iter().map(|sub| format!("{name} {sub}")).collect(),
        };
        for name in names {
            let quoted = format!(".SS \"{name}\"\n");
            let section = if name.contains(' ') { quoted } else { format!(".SS {name}\n") };
            assert!(page.contains(&section), "{section}");
        }
    }
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("instantsnap.1");
    fs::write(&file, page).unwrap();
    let mut man = Command::new("man");
    man.args(["--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z"]).arg(&file);
    man.env("LC_ALL", "C.UTF-8");
    match man.output() {
        Ok(output) => assert_eq!(String::from_utf8(output.stderr).unwrap(), ""),
        Err(error) => instantsnap_testkit::skip(format!("no man: {error}")),
    }
}
