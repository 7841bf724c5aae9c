// SPDX-License-Identifier: LGPL-2.1-or-later

//! A QMP client on a Unix socket: one command at a time, each with a deadline.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown,
    SocketAddrUnix, SocketFlags, SocketType, connect, recv, sendmsg, shutdown, socket_with,
};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::json;

use super::command::{Command, Execute, Failure, read_reply};
use super::events::{Event, Events};
use super::json::{Json, parse};
use super::messages::{Messages, Unreadable};
use crate::deadline::Deadline;
use crate::error::{Code, Error, Result, fail};
use crate::sys;

/// The limit of a message. QEMU's replies are shorter: all nodes of two chains of 150 images, each
/// described with all those below it, take 11 MB.
const LONGEST_MESSAGE: usize = 64 << 20;
/// The limit of QEMU's greeting.
const LONGEST_GREETING: usize = 64 << 10;

/// A connection to QEMU's monitor.
#[derive(Debug)]
pub struct Monitor {
    socket: OwnedFd,
    messages: Messages,
    last_id: u64,
    events: Events,
    /// QEMU's major and minor version.
    pub version: (u64, u64),
    /// QEMU's process, where it is known.
    pub qemu: Option<QemuProcess>,
    handed_over: bool,
}

/// Shuts the connection down, because QEMU serves one client at a time: a process that the caller
/// has forked meanwhile may have the socket too, and closing ours would not end the connection.
impl Drop for Monitor {
    fn drop(&mut self) {
        // After a panic the watchdog uses the connection.
        if !self.handed_over && !std::thread::panicking() {
            let _ = shutdown(&self.socket, Shutdown::Both);
        }
    }
}

/// The QEMU process behind a monitor.
#[derive(Debug)]
pub struct QemuProcess {
    /// The process id.
    pub pid: u32,
    pidfd: OwnedFd,
}

impl QemuProcess {
    /// Finds the process behind a monitor that another process is connected to. None if it cannot
    /// be seen here: QEMU reports the thread ids of its vCPUs, which must be in /proc.
    pub fn by_threads(qemu: &mut dyn Execute, deadline: Deadline) -> Option<QemuProcess> {
        let vcpus = qemu.execute(Command::new("query-cpus-fast", json!({})), deadline).ok()?;
        let threads: Vec<_> =
            vcpus.as_array()?.iter().filter_map(|vcpu| vcpu["thread-id"].as_u64()).collect();
        let status = std::fs::read_to_string(format!("/proc/{}/status", threads.first()?)).ok()?;
        let pid: u32 =
            status.lines().find_map(|line| line.strip_prefix("Tgid:"))?.trim().parse().ok()?;
        let all =
            threads.iter().all(|thread| Path::new(&format!("/proc/{pid}/task/{thread}")).exists());
        open_qemu(pid).filter(|_| all)
    }

    /// Whether the process has ended. A zombie has.
    pub fn has_ended(&self) -> bool {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }
}

impl Monitor {
    /// Connects, waits to be accepted (QEMU serves one client a socket at a time), and agrees on
    /// QMP.
    pub fn connect(path: &Path, deadline: Deadline) -> Result<Monitor> {
        let socket = connect_socket(path, deadline)?;
        let qemu = sys::peer_pid(socket.as_fd()).and_then(open_qemu);
        let mut monitor = Monitor {
            socket,
            messages: Messages::default(),
            last_id: 0,
            events: Events::default(),
            version: (0, 0),
            qemu,
            handed_over: false,
        };
        let not_qmp = |reason: &str| {
            Error::new(
                Code::OperationFailed,
                format!("'{}' is not a QMP socket: {reason}", path.display()),
            )
        };
        let greeting = match monitor.read_message(LONGEST_GREETING, deadline) {
            Ok(greeting) => greeting,
            Err(Failure::Late) => fail!(
                OperationTimeout,
                "no QMP greeting from '{}': another client is connected to it (QEMU serves one at \
                 a time, so give this library a QMP socket of its own), or it is not a QMP socket",
                path.display()
            ),
            Err(Failure::Lost(reason)) => return Err(not_qmp(&reason)),
            Err(Failure::Refused(..)) => unreachable!("reading refuses nothing"),
        };
        let version = &greeting["QMP"]["version"]["qemu"];
        let (Some(major), Some(minor)) = (version["major"].as_u64(), version["minor"].as_u64())
        else {
            return Err(not_qmp("it sends no QMP greeting"));
        };
        monitor.version = (major, minor);
        monitor.run("cannot begin QMP", Command::new("qmp_capabilities", json!({})), deadline)?;
        if monitor.qemu.is_none() {
            // Another process listens on the socket. If that cannot be seen from here, QEMU cannot
            // either.
            monitor.qemu = match sys::peer_pid(monitor.socket.as_fd()) {
                Some(_) => QemuProcess::by_threads(&mut monitor, deadline),
                None => None,
            };
        }
        Ok(monitor)
    }

    /// The events that have come since the last call.
    pub fn take_events(&mut self) -> Vec<Event> {
        self.events.take()
    }

    /// Keeps the connection open when this is dropped, for another process that has the socket.
    pub fn leave(&mut self) {
        self.handed_over = true;
    }

    /// The socket, for a process that continues when this one ends.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn send(
        &self,
        bytes: &[u8],
        fd: Option<BorrowedFd>,
        deadline: Deadline,
    ) -> std::result::Result<(), Failure> {
        let mut left = bytes;
        let mut fd = fd;
        while !left.is_empty() {
            self.wait(PollFlags::OUT, deadline).map_err(|failure| match failure {
                // A part of the command is sent, so QEMU would take the next one for the rest.
                Failure::Late if left.len() < bytes.len() => {
                    Failure::Lost("it accepts no more data".into())
                }
                failure => failure,
            })?;
            let fds = fd.as_slice();
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() {
                ancillary.push(SendAncillaryMessage::ScmRights(fds));
            }
            match sendmsg(&self.socket, &[IoSlice::new(left)], &mut ancillary, SendFlags::NOSIGNAL)
            {
                Ok(sent) => {
                    left = &left[sent..];
                    // The descriptor went with the first byte.
                    fd = None;
                }
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => return Err(Failure::Lost(error.to_string())),
            }
        }
        Ok(())
    }

    fn read_message(
        &mut self,
        longest: usize,
        deadline: Deadline,
    ) -> std::result::Result<Json, Failure> {
        let lost = |reason: &str| Failure::Lost(reason.into());
        loop {
            let message = self.messages.next(longest).map_err(|unreadable| match unreadable {
                Unreadable::NotJson => lost("its message is not JSON"),
                Unreadable::TooLong => lost("its message is too long"),
            })?;
            if let Some(message) = message {
                return parse(&message)
                    .map_err(|error| lost(&format!("its message is not JSON: {error}")));
            }
            // Checks the deadline first, so that messages that never end cannot extend it.
            self.wait(PollFlags::IN, deadline)?;
            let mut buffer = [MaybeUninit::uninit(); 16 << 10];
            match recv(&self.socket, &mut buffer, RecvFlags::empty()) {
                Ok(((received, _), _)) if !received.is_empty() => self.messages.add(received),
                Ok(_) => return Err(lost("it was closed")),
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => return Err(lost(&error.to_string())),
            }
        }
    }

    fn wait(&self, readiness: PollFlags, deadline: Deadline) -> std::result::Result<(), Failure> {
        loop {
            let left = deadline.left().ok_or(Failure::Late)?;
            let left =
                Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            match poll(&mut [PollFd::new(&self.socket, readiness)], Some(&left)) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(error) => return Err(Failure::Lost(error.to_string())),
            }
        }
    }
}

impl Execute for Monitor {
    fn execute(
        &mut self,
        command: Command,
        deadline: Deadline,
    ) -> std::result::Result<Json, Failure> {
        self.last_id += 1;
        let id = self.last_id;
        let mut line = json!({ "execute": command.name, "arguments": command.arguments, "id": id })
            .to_string();
        line.push('\n');
        self.send(line.as_bytes(), command.fd, deadline)?;
        loop {
            let message = self.read_message(LONGEST_MESSAGE, deadline)?;
            if message["id"] == json!(id) {
                return read_reply(message);
            }
            // An event, or the reply to a command that was given up on.
            Event::read(&message).into_iter().for_each(|event| self.events.keep(event));
        }
    }
}

/// Opens a process if it is called QEMU. The process that listens on the socket may be a proxy, or
/// a service manager that handed the socket over, and its end would not be QEMU's end.
fn open_qemu(pid: u32) -> Option<QemuProcess> {
    let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let exe = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
    if !comm.starts_with("qemu")
        && !exe.file_name().is_some_and(|name| name.to_string_lossy().contains("qemu"))
    {
        return None;
    }
    let pidfd = pidfd_open(Pid::from_raw(pid.try_into().ok()?)?, PidfdFlags::empty()).ok()?;
    Some(QemuProcess { pid, pidfd })
}

/// Connects to the socket by the deadline, even if QEMU's backlog is full.
fn connect_socket(path: &Path, deadline: Deadline) -> Result<OwnedFd> {
    let step = format!("cannot connect to QMP socket '{}'", path.display());
    let system = |errno: Errno| Error::system(&step, errno);
    let address = SocketAddrUnix::new(path).map_err(system)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket =
        socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(system)?;
    loop {
        match connect(socket.as_fd(), &address) {
            Ok(()) => return Ok(socket),
            Err(Errno::AGAIN | Errno::INTR) if deadline.left().is_some() => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(Errno::AGAIN) => {
                fail!(OperationTimeout, "{step}: too many clients wait for it already")
            }
            Err(error) => return Err(system(error)),
        }
    }
}
