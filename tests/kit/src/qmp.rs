// SPDX-License-Identifier: LGPL-2.1-or-later

//! A small blocking QMP client, independent of the one in the library under test.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

use crate::daemon::Daemon;
use crate::wait::{DEADLINE, wait_for};

/// An event of QEMU.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    pub name: String,
    pub data: Value,
    /// The time of the event by QEMU's clock, in microseconds since 1970.
    pub timestamp_us: u64,
}

/// A client that gives commands to a QEMU.
#[derive(Debug)]
pub struct Client(Transport);

#[derive(Debug)]
enum Transport {
    Socket(Connection),
    Libvirt(Daemon, String),
}

/// A connection to a QMP socket, after its greeting.
#[derive(Debug)]
struct Connection {
    stream: UnixStream,
    reader: BufReader<UnixStream>,
    /// The beginning of a line that has not arrived completely.
    partial: Vec<u8>,
    events: VecDeque<Event>,
    next_id: u64,
}

impl Client {
    /// Connects to a socket, and enters command mode. Fails after five seconds where QEMU has
    /// another client.
    pub fn connect(path: &Path) -> io::Result<Client> {
        Ok(Client(Transport::Socket(Connection::open(path)?)))
    }

    /// A client that uses `virsh qemu-monitor-command`.
    pub(crate) fn through_libvirt(daemon: Daemon, domain: String) -> Client {
        Client(Transport::Libvirt(daemon, domain))
    }

    /// Executes a command. The error is QEMU's (`class`, `desc`), or has the class `Disconnected`.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, Value> {
        match &mut self.0 {
            Transport::Socket(connection) => connection.request(command, arguments, &[]),
            Transport::Libvirt(daemon, domain) => {
                through_virsh(daemon, domain, command, &arguments)
            }
        }
    }

    /// Executes commands that cannot fail here.
    pub(crate) fn ask_all(&mut self, commands: &[(&'static str, Value)]) -> Vec<Value> {
        let ended = |command: &str, error: Value| -> Value { panic!("{command}: {error}") };
        match &mut self.0 {
            Transport::Socket(connection) => commands
                .iter()
                .map(|(command, arguments)| {
                    let answer = connection.request(command, arguments.clone(), &[]);
                    answer.unwrap_or_else(|error| ended(command, error))
                })
                .collect(),
            Transport::Libvirt(daemon, domain) => {
                let lines: Vec<_> =
                    commands.iter().map(|(command, arguments)| line(command, arguments)).collect();
                let words: Vec<_> =
                    lines.iter().map(|line| ["qemu-monitor-command", domain, line]).collect();
                let words: Vec<&[&str]> = words.iter().map(<[_; 3]>::as_slice).collect();
                let replies = daemon.virsh_each(&words);
                let reply = |((command, _), reply): (&(&str, Value), String)| {
                    value_of(&reply).unwrap_or_else(|error| ended(command, error))
                };
                commands.iter().zip(replies).map(reply).collect()
            }
        }
    }

    /// Executes a command that takes a file descriptor: `getfd`, `add-fd`.
    pub fn execute_with_fd(
        &mut self,
        command: &str,
        arguments: Value,
        fd: BorrowedFd,
    ) -> Result<Value, Value> {
        self.connection().request(command, arguments, &[fd])
    }

    /// Takes the events that have arrived so far.
    pub fn events(&mut self) -> Vec<Event> {
        let connection = self.connection();
        let _ = connection.collect(Duration::ZERO);
        connection.events.drain(..).collect()
    }

    /// Waits for an event. Takes it and those before it.
    pub fn wait_event(&mut self, name: &str) -> Option<Event> {
        let connection = self.connection();
        wait_for(DEADLINE, || {
            while let Some(event) = connection.events.pop_front() {
                if event.name == name {
                    return Some(event);
                }
            }
            let _ = connection.collect(Duration::from_millis(100));
            None
        })
    }

    fn connection(&mut self) -> &mut Connection {
        match &mut self.0 {
            Transport::Socket(connection) => connection,
            Transport::Libvirt(..) => panic!("virsh passes on neither events nor file descriptors"),
        }
    }
}

fn through_virsh(
    daemon: &Daemon,
    domain: &str,
    command: &str,
    arguments: &Value,
) -> Result<Value, Value> {
    let reply = daemon.try_virsh(&["qemu-monitor-command", domain, &line(command, arguments)]);
    value_of(&reply.map_err(|error| json!({"class": "Disconnected", "desc": error}))?)
}

fn line(command: &str, arguments: &Value) -> String {
    json!({"execute": command, "arguments": arguments}).to_string()
}

/// The result in a reply of QEMU's.
fn value_of(reply: &str) -> Result<Value, Value> {
    let mut reply: Value =
        serde_json::from_str(reply).unwrap_or_else(|error| panic!("{error}: {reply}"));
    if reply.get("error").is_some() {
        Err(reply["error"].take())
    } else {
        Ok(reply["return"].take())
    }
}

impl Connection {
    fn open(path: &Path) -> io::Result<Connection> {
        let stream = UnixStream::connect(path)?;
        let reader = BufReader::new(stream.try_clone()?);
        let mut connection =
            Connection { stream, reader, partial: Vec::new(), events: VecDeque::new(), next_id: 1 };
        connection.read(Duration::from_secs(5))?;
        let entered = connection.request("qmp_capabilities", json!({}), &[]);
        entered.map_err(|error| io::Error::other(error.to_string()))?;
        Ok(connection)
    }

    fn request(
        &mut self,
        command: &str,
        arguments: Value,
        fds: &[BorrowedFd],
    ) -> Result<Value, Value> {
        let disconnected =
            |error: io::Error| json!({"class": "Disconnected", "desc": error.to_string()});
        let id = self.next_id;
        self.next_id += 1;
        let mut line = json!({"execute": command, "arguments": arguments, "id": id}).to_string();
        line.push('\n');
        send_with_fds(&self.stream, line.as_bytes(), fds).map_err(disconnected)?;
        loop {
            let mut reply = self.read(DEADLINE).map_err(disconnected)?;
            if reply["id"] != id {
                self.keep_event(&reply);
            } else if reply.get("error").is_some() {
                return Err(reply["error"].take());
            } else {
                return Ok(reply["return"].take());
            }
        }
    }

    /// Reads what is there, and what arrives within `patience`, up to the first event.
    fn collect(&mut self, patience: Duration) -> io::Result<()> {
        let mut patience = patience;
        loop {
            let message = self.read(patience)?;
            self.keep_event(&message);
            patience = Duration::ZERO;
        }
    }

    fn keep_event(&mut self, message: &Value) {
        let Some(name) = message["event"].as_str() else {
            return;
        };
        let part = |key: &str| message["timestamp"][key].as_u64().unwrap_or(0);
        self.events.push_back(Event {
            name: name.to_owned(),
            data: message["data"].clone(),
            timestamp_us: part("seconds") * 1_000_000 + part("microseconds"),
        });
    }

    fn read(&mut self, patience: Duration) -> io::Result<Value> {
        let end = Instant::now() + patience;
        loop {
            // A timeout of zero would mean no timeout.
            let left = end.saturating_duration_since(Instant::now());
            self.stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
            // The part of a line that was read before a timeout stays in `partial`.
            if self.reader.read_until(b'\n', &mut self.partial)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if self.partial.ends_with(b"\n") {
                let value = serde_json::from_slice(&self.partial)?;
                self.partial.clear();
                return Ok(value);
            }
        }
    }
}

/// Writes all of `bytes`, with the file descriptors at the first of them.
pub(crate) fn send_with_fds(
    stream: &UnixStream,
    bytes: &[u8],
    fds: &[BorrowedFd],
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)), "too many file descriptors");
    }
    let data = [IoSlice::new(bytes)];
    let sent =
        rustix::io::retry_on_intr(|| sendmsg(stream, &data, &mut control, SendFlags::NOSIGNAL))?;
    io::Write::write_all(&mut &*stream, &bytes[sent..])
}
