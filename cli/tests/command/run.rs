// SPDX-License-Identifier: LGPL-2.1-or-later

//! Runs the command, and looks at what it says.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use instantsnap_testkit::{Binary, Daemon, Format, Guest, Machine};
use serde_json::Value;

/// The command's file.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_instantsnap");

/// How a command has ended.
#[derive(Debug)]
pub struct Ended {
    /// Its exit status; `None` if a signal has ended it.
    pub status: Option<i32>,
    /// What it has written to standard output.
    pub output: String,
    /// What it has written to standard error.
    pub errors: String,
}

impl Ended {
    /// The output of a command that must succeed, and say nothing else.
    #[track_caller]
    pub fn succeeded(self) -> String {
        assert_eq!((self.status, self.errors.as_str()), (Some(0), ""), "{self:?}");
        self.output
    }

    /// The message of a command that must fail with this status.
    #[track_caller]
    pub fn failed(self, status: i32) -> String {
        assert_eq!(self.status, Some(status), "{self:?}");
        self.errors
    }

    /// The JSON of a command that must succeed.
    #[track_caller]
    pub fn json(self) -> Value {
        let output = self.succeeded();
        serde_json::from_str(&output).unwrap_or_else(|error| panic!("{error}: {output}"))
    }
}

/// The command with no setting of the user's.
pub fn command(words: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    command.args(words).stdin(Stdio::null());
    clean(&mut command);
    command
}

/// Removes the user's settings from a command's environment.
pub fn clean(command: &mut Command) {
    for name in ["LIBVIRT_DEFAULT_URI", "NO_COLOR", "XDG_CONFIG_HOME", "LD_PRELOAD"] {
        command.env_remove(name);
    }
    command.env("TERM", "xterm").env("LC_ALL", "C.UTF-8");
}

/// Runs a command with its output in pipes.
pub fn end(mut command: Command) -> Ended {
    let output = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Ended { status: output.status.code(), output: text(output.stdout), errors: text(output.stderr) }
}

/// Runs the command with these words.
pub fn instantsnap(words: &[&str]) -> Ended {
    end(command(words))
}

/// A domain of a private libvirt.
pub struct Vm {
    pub guest: Guest,
    pub uri: String,
}

impl Vm {
    /// Starts a domain of this name, with a disk, and waits until it counts.
    pub fn start(name: &str) -> Vm {
        Vm::of(Machine::new(&Binary::under_libvirt()[0]).disk(Format::Qcow2).name(name))
    }

    /// Starts a machine as a domain, and waits until it counts.
    pub fn of(machine: Machine) -> Vm {
        let daemon = Daemon::session();
        let guest = machine.start_under(&daemon);
        guest.wait_ticks(2);
        Vm { uri: daemon.uri(), guest }
    }

    /// Runs the command with these words, on the domain's libvirt.
    pub fn run(&self, words: &[&str]) -> Ended {
        let mut command = command(words);
        command.env("LIBVIRT_DEFAULT_URI", &self.uri);
        end(command)
    }
}

/// A QEMU with a QMP socket, and the directory for its snapshots' metadata.
pub struct Direct {
    pub guest: Guest,
    pub state: PathBuf,
    pub uri: String,
}

impl Direct {
    /// Starts a QEMU with a disk, and waits until its guest counts.
    pub fn start() -> Direct {
        Direct::of(Machine::new(&Binary::some()[0]).disk(Format::Qcow2))
    }

    /// Starts a machine, and waits until it counts.
    pub fn of(machine: Machine) -> Direct {
        let guest = machine.start();
        guest.wait_ticks(2);
        let state = guest.directory().join("state");
        std::fs::create_dir(&state).unwrap();
        Direct { uri: uri(&guest, &state), state, guest }
    }

    /// Runs the command with these words, on this guest.
    pub fn run(&self, words: &[&str]) -> Ended {
        instantsnap(&[&["-c", &self.uri], words].concat())
    }
}

/// The URI of a guest.
pub fn uri(guest: &Guest, state: &Path) -> String {
    format!("qmp://{}?state={}", guest.qmp().display(), state.display())
}
