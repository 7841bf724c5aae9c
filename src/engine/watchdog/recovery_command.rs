// SPDX-License-Identifier: LGPL-2.1-or-later

//! Recovery commands: programs that the watchdog runs. For a domain of libvirt they use virsh.

use std::os::fd::{AsRawFd, OwnedFd};

use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};

use super::files::{self, Discard};
use super::remaining::Remaining;
use super::reply::{Reader, Reply};
use super::stage::Stage;
use crate::backend;
use crate::machine_log::Message;
use crate::own_file::KnownFile;
use crate::sys::{self, CommandLine, Program, Stdio};
use crate::tool::command_line;

/// The number of tries to resume the guest.
const TRIES: u32 = 10;
const PAUSE_MS: i32 = 1000;

/// A program and its arguments, made in advance.
#[derive(Debug)]
struct RecoveryCommand {
    command_line: Option<CommandLine>,
    /// The file to discard once the program has succeeded.
    then_discard: Option<Discard>,
}

impl RecoveryCommand {
    fn new(command: backend::RecoveryCommand) -> RecoveryCommand {
        RecoveryCommand {
            command_line: command_line(command.arguments),
            then_discard: command.then_discard.as_ref().and_then(Discard::new),
        }
    }

    /// Runs the program. Returns whether it has succeeded.
    fn run(&self, stream: &mut Remaining) -> bool {
        self.run_with(Stdio::Null, stream)
    }

    fn run_with(&self, stdio: Stdio, stream: &mut Remaining) -> bool {
        let Some(command_line) = &self.command_line else { return false };
        let Some(program) = Program::start(command_line, stdio) else { return false };
        // Meanwhile the stream is read, because QEMU may be waiting for that.
        while !program.wait_ended([(!stream.ended).then_some(&stream.pipe), None]) {
            stream.discard();
        }
        program.succeeded()
    }

    /// Runs the program in the same way, but kills it if one of these descriptors becomes readable.
    fn run_unless(&self, readable: [&OwnedFd; 2]) -> bool {
        let Some(command_line) = &self.command_line else { return false };
        let Some(program) = Program::start(command_line, Stdio::Null) else { return false };
        if !program.wait_ended(readable.map(Some)) {
            program.kill();
            return false;
        }
        program.succeeded()
    }

    /// Runs the program, and returns the reply of QEMU that it prints; `None` if it prints none.
    fn ask(&self, stream: &mut Remaining) -> Option<Reply> {
        // The program prints less than a pipe holds.
        let (output, theirs) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).ok()?;
        if !self.run_with(Stdio::Output(theirs.as_raw_fd()), stream) {
            return None;
        }
        let mut reader = Reader::new();
        let mut buffer = [0; 4096];
        loop {
            let got = match rustix::io::read(&output, &mut buffer) {
                Ok(0) => return None,
                Ok(got) => got,
                Err(Errno::INTR) => continue,
                Err(_) => return None,
            };
            let mut replies = buffer.iter().take(got).filter_map(|byte| reader.read(*byte));
            if let Some(reply) = replies.find(|reply| reply.done) {
                return Some(reply);
            }
        }
    }
}

/// The commands that merge an overlay.
#[derive(Debug)]
struct Merge {
    merge: RecoveryCommand,
    is_in_use: RecoveryCommand,
    complaint: Message,
}

impl Merge {
    fn new(command: backend::MergeCommands) -> Merge {
        let backend::MergeCommands { merge, is_in_use, complaint } = command;
        Merge {
            merge: RecoveryCommand::new(merge),
            is_in_use: RecoveryCommand::new(is_in_use),
            complaint: Message::error(&complaint),
        }
    }

    /// Returns whether nothing is left of the overlay.
    fn run(&self, stage: Stage, stream: &mut Remaining) -> bool {
        if !stage.is_switched() || self.merge.run(stream) {
            self.merge.then_discard.iter().for_each(Discard::run);
            return true;
        }
        if self.is_in_use.run(stream) {
            self.complaint.send();
        }
        false
    }
}

/// All recovery commands of a snapshot.
#[derive(Debug)]
pub struct RecoveryCommands {
    look: RecoveryCommand,
    tries: u32,
    resume: [RecoveryCommand; 2],
    query_migrate: RecoveryCommand,
    query_status: RecoveryCommand,
    restore: Vec<RecoveryCommand>,
    forget: RecoveryCommand,
    merge: Vec<Merge>,
    files: Vec<Discard>,
}

impl RecoveryCommands {
    /// Makes the commands. `files` are removed with the overlays.
    pub fn new(commands: backend::RecoveryCommands, files: &[KnownFile]) -> RecoveryCommands {
        let all = |commands: Vec<backend::RecoveryCommand>| {
            commands.into_iter().map(RecoveryCommand::new).collect()
        };
        RecoveryCommands {
            look: RecoveryCommand::new(commands.look),
            tries: commands.tries,
            resume: [commands.resume, commands.resume_all_the_same].map(RecoveryCommand::new),
            query_migrate: RecoveryCommand::new(commands.query_migrate),
            query_status: RecoveryCommand::new(commands.query_status),
            restore: all(commands.restore),
            forget: RecoveryCommand::new(commands.forget),
            merge: commands.merge.into_iter().map(Merge::new).collect(),
            files: files.iter().filter_map(Discard::new).collect(),
        }
    }

    /// Resumes the guest. A daemon that is restarted between two tries is waited for again. Returns
    /// whether the guest was resumed.
    pub fn resume(&self, stream: &mut Remaining) -> bool {
        (0..TRIES).any(|_| {
            self.wait_for_daemon(stream);
            repeat(&self.resume, 1, stream)
        })
    }

    /// Tries once to resume the guest of a stopped caller. Gives up if one of these becomes
    /// readable: the caller's lifeline, because the caller goes on, and a descriptor of the
    /// caller's process, because that has ended. Returns whether the guest was resumed.
    pub fn resume_late(&self, caller: [&OwnedFd; 2]) -> bool {
        self.resume.iter().any(|command| command.run_unless(caller))
    }

    /// Whether a migration is under way; `None` if that cannot be learnt now.
    pub fn is_migrating(&self, stream: &mut Remaining) -> Option<bool> {
        self.query_migrate.ask(stream).map(|reply| reply.migrating)
    }

    /// Whether the end of a migration has stopped the guest.
    pub fn is_stopped_by_migration(&self, stream: &mut Remaining) -> bool {
        self.query_status.ask(stream).is_some_and(|reply| reply.stopped_by_migration)
    }

    /// Waits until the daemon answers, because it may be restarting. Returns whether it does.
    fn wait_for_daemon(&self, stream: &mut Remaining) -> bool {
        repeat(std::slice::from_ref(&self.look), self.tries, stream)
    }

    /// Puts the settings back, and removes the record and the files. Then undoes the switch: merges
    /// the overlays that may be in use. `is_noted`: the journal on disk says so. Returns whether
    /// the daemon answered, and no overlay is left.
    pub fn undo(&self, stage: Stage, is_noted: bool, stream: &mut Remaining) -> bool {
        let mut done = self.wait_for_daemon(stream);
        for command in self.restore.iter().filter(|_| !stage.is_restored()) {
            command.run(stream);
        }
        self.forget.run(stream);
        // As in the QMP script.
        let is_spoilt = files::discard_for_good(&self.files) || !stage.is_restored();
        if !is_spoilt && !is_noted {
            self.merge.iter().for_each(|merge| merge.complaint.send());
            return false;
        }
        for merge in &self.merge {
            done &= merge.run(stage, stream);
        }
        done
    }
}

/// Runs the commands in order, once a second, until one of them succeeds. Stops after `tries`
/// times. Returns whether one has succeeded.
fn repeat(commands: &[RecoveryCommand], tries: u32, stream: &mut Remaining) -> bool {
    for _ in 0..tries {
        if commands.iter().any(|command| command.run(stream)) {
            return true;
        }
        if stream.ended {
            sys::wait_ready([None, None], PAUSE_MS);
        } else {
            sys::wait_ready([Some(&stream.pipe), None], PAUSE_MS);
            stream.discard();
        }
    }
    false
}
