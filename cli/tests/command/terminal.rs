// SPDX-License-Identifier: LGPL-2.1-or-later

//! A terminal in which a program runs, with the keys that a user presses.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::mpsc::{Receiver, channel};
use std::thread;

use instantsnap_testkit::DEADLINE;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

/// A terminal, and the program in it, which is ended with it.
pub struct Terminal {
    keys: File,
    shown: Receiver<String>,
    text: String,
    child: Child,
}

impl Terminal {
    /// Runs a program in a terminal of its own.
    pub fn run(program: &Path, words: &[&str], set: impl FnOnce(&mut Command)) -> Terminal {
        let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&terminal).unwrap();
        unlockpt(&terminal).unwrap();
        let name = ptsname(&terminal, Vec::new()).unwrap();
        let open = || {
            let path = name.to_str().unwrap();
            File::options().read(true).write(true).open(path).unwrap()
        };
        let inside = open();
        let size = Winsize { ws_row: 24, ws_col: 120, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&inside, size).unwrap();
        // A program of its own session can have the terminal's signals.
        let mut command = Command::new("setsid");
        command.arg("--ctty");
        // A shell without job control has its background programs ignore SIGINT, and a program
        // leaves a signal ignored that it was started with so.
        command.args(["env", "--default-signal=INT,QUIT,TERM,HUP"]).arg(program).args(words);
        command.stdin(inside.try_clone().unwrap()).stdout(inside.try_clone().unwrap());
        command.stderr(inside);
        super::run::clean(&mut command);
        set(&mut command);
        let child = command.spawn().unwrap();
        // Its copies of the terminal are the program's only from now on.
        drop(command);
        let keys = File::from(terminal);
        let shown = listen(keys.try_clone().unwrap().into());
        Terminal { keys, shown, text: String::new(), child }
    }

    /// Presses keys.
    pub fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits until the terminal shows this, after what was waited for before.
    #[track_caller]
    pub fn wait(&mut self, part: &str) {
        self.wait_for(part, |text| text.find(part).map(|at| at + part.len()));
    }

    #[track_caller]
    fn wait_for(&mut self, what: &str, end: impl Fn(&str) -> Option<usize>) {
        loop {
            if let Some(end) = end(&self.text) {
                self.text.drain(..end);
                return;
            }
            match self.shown.recv_timeout(DEADLINE) {
                Ok(more) => self.text.push_str(&more),
                Err(error) => panic!("'{what}' is not shown ({error}):\n{}", self.text),
            }
        }
    }

    /// Waits until the program has ended. Returns its status, and what was shown since the last
    /// wait.
    #[track_caller]
    pub fn end(mut self) -> (Option<i32>, String) {
        // The terminal ends with the last program in it.
        while let Ok(more) = self.shown.recv_timeout(DEADLINE) {
            self.text.push_str(&more);
        }
        let status = self.child.wait().unwrap();
        (status.code(), std::mem::take(&mut self.text))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a terminal shows, as it comes.
fn listen(terminal: OwnedFd) -> Receiver<String> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        let (mut terminal, mut bytes) = (File::from(terminal), [0; 4096]);
        while let Ok(count @ 1..) = terminal.read(&mut bytes) {
            let text = String::from_utf8_lossy(&bytes[..count]).into_owned();
            if sender.send(text).is_err() {
                break;
            }
        }
    });
    receiver
}
