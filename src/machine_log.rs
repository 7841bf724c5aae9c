// SPDX-License-Identifier: LGPL-2.1-or-later

//! Reports to the machine's log what no caller is told: what the watchdog of a caller that has
//! ended could not undo, and what an operation has recovered before it began.

use std::path::Path;

use rustix::net::{
    AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sendto, socket_with,
};

/// The socket of the machine's log.
const LOG: &str = "/dev/log";
/// `LOG_DAEMON | LOG_ERR`.
const ERROR: u32 = (3 << 3) | 3;
/// `LOG_DAEMON | LOG_NOTICE`.
const NOTICE: u32 = (3 << 3) | 5;

/// A message to the machine's log, made in advance.
#[derive(Debug)]
pub struct Message {
    log: Option<SocketAddrUnix>,
    datagram: Vec<u8>,
}

impl Message {
    /// Something is left that someone has to look at.
    pub fn error(text: &str) -> Message {
        Message::to(Path::new(LOG), ERROR, text)
    }

    /// Something was done that its user may want to know.
    pub fn notice(text: &str) -> Message {
        Message::to(Path::new(LOG), NOTICE, text)
    }

    fn to(log: &Path, priority: u32, text: &str) -> Message {
        // A message is one line.
        let text: String =
            text.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect();
        let datagram = format!("<{priority}>instantsnap: {text}").into_bytes();
        Message { log: SocketAddrUnix::new(log).ok(), datagram }
    }

    /// Sends the message, if the machine has a log that takes it at once.
    pub fn send(&self) {
        let Some(log) = &self.log else { return };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let Ok(socket) = socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None) else {
            return;
        };
        let _ = sendto(&socket, &self.datagram, SendFlags::NOSIGNAL, log);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::*;

    #[test]
    fn the_log_is_told_in_one_line() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let log = UnixDatagram::bind(&path).unwrap();
        Message::to(&path, ERROR, "the overlay '/a\n<0>b' stays").send();
        let mut buffer = [0; 100];
        let got = log.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..got], b"<27>instantsnap: the overlay '/a <0>b' stays");
        // If there is no log, nothing happens.
        Message::to(&directory.path().join("none"), NOTICE, "lost").send();
    }
}
