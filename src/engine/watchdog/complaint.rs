// SPDX-License-Identifier: LGPL-2.1-or-later

//! Reports to the machine's log what the watchdog could not undo. The caller has ended, so the
//! watchdog cannot report it to the caller.

use std::path::Path;

use rustix::net::{
    AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sendto, socket_with,
};

/// The socket of the machine's log.
const LOG: &str = "/dev/log";
/// `LOG_DAEMON | LOG_ERR`.
const PRIORITY: u32 = (3 << 3) | 3;

/// A message to the machine's log, made in advance.
#[derive(Debug)]
pub struct Complaint {
    log: Option<SocketAddrUnix>,
    datagram: Vec<u8>,
}

impl Complaint {
    pub fn new(text: &str) -> Complaint {
        Complaint::to(Path::new(LOG), text)
    }

    fn to(log: &Path, text: &str) -> Complaint {
        // A message is one line.
        let text: String =
            text.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect();
        let datagram = format!("<{PRIORITY}>instantsnap: {text}").into_bytes();
        Complaint { log: SocketAddrUnix::new(log).ok(), datagram }
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
        Complaint::to(&path, "the overlay '/a\n<0>b' stays").send();
        let mut buffer = [0; 100];
        let got = log.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..got], b"<27>instantsnap: the overlay '/a <0>b' stays");
        // If there is no log, nothing happens.
        Complaint::to(&directory.path().join("none"), "lost").send();
    }
}
