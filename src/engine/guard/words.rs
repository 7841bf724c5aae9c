//! What the guard says on the monitor's socket.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use serde_json::{Value, json};

use super::child::Remaining;
use crate::sys::wait_ready;

/// Made before they are needed.
#[derive(Debug)]
pub struct Words {
    pub resume: String,
    pub restore: String,
}

/// In QEMU's reply to the last command of a script, and nowhere else.
const MARK: &str = "instantsnap-guard-done";

impl Words {
    /// Commands, by name and arguments, that put everything but the guest's state back.
    pub fn new(restore: &[(&str, Value)]) -> Words {
        Words { resume: lines(&[("cont", json!({}))]), restore: lines(restore) }
    }
}

fn lines(commands: &[(&str, Value)]) -> String {
    let last = commands.len().saturating_sub(1);
    let line = |(n, (name, arguments)): (usize, &(&str, Value))| {
        let id = if n == last { MARK } else { "instantsnap-guard" };
        json!({ "execute": name, "arguments": arguments, "id": id }).to_string() + "\n"
    };
    commands.iter().enumerate().map(line).collect()
}

/// Says something, and waits for the reply, however long: what is still unread when the connection ends, QEMU
/// forgets. Meanwhile the stream is read, for which QEMU may be waiting in its turn.
pub fn say(monitor: &OwnedFd, words: &str, stream: &mut Remaining) {
    let mut left = words.as_bytes();
    while !left.is_empty() {
        match send(monitor, left, SendFlags::NOSIGNAL) {
            Ok(sent) => left = left.get(sent..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            // A reader that is that far behind; there is no hurry.
            Err(Errno::AGAIN) => {
                wait_ready([(!stream.ended).then_some(&stream.pipe), None], 10);
                stream.ended = stream.ended || {
                    stream.throw_away();
                    stream.ended
                };
            }
            Err(_) => return,
        }
    }
    let mark = MARK.as_bytes();
    // How much of the mark has been seen: it can come in two pieces.
    let mut seen = 0;
    loop {
        wait_ready([Some(monitor), (!stream.ended).then_some(&stream.pipe)], -1);
        if !stream.ended {
            stream.throw_away();
        }
        if !wait_ready([Some(monitor), None], 0) {
            continue;
        }
        let mut buffer = [0; 4096];
        let got = match rustix::io::read(monitor, &mut buffer) {
            Ok(0) => return,
            Ok(got) => got,
            Err(Errno::AGAIN | Errno::INTR) => continue,
            Err(_) => return,
        };
        for byte in buffer.iter().take(got) {
            let expected = mark.get(seen);
            seen = if expected == Some(byte) { seen + 1 } else { usize::from(mark.first() == Some(byte)) };
            if seen == mark.len() {
                return;
            }
        }
    }
}
