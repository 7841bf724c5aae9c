// SPDX-License-Identifier: LGPL-2.1-or-later

//! A QMP proxy that injects faults. It stands between a client and QEMU's monitor, and passes
//! everything on, including file descriptors. At a chosen command it does what a [`Fault`] says.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, BufRead, BufReader, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::qmp::send_with_fds;

/// An edit of a reply of QEMU's.
pub type Edit = Box<dyn FnOnce(Value) -> Value + Send>;

/// A fault at a command.
pub enum Fault {
    /// QEMU does not get the command; the client gets this error (`class` and `desc`).
    Fail(Value),
    /// QEMU does not get the command, and the client gets no reply.
    Drop,
    /// QEMU executes the command; the client gets no reply.
    SwallowReply,
    /// QEMU does not get the command; the client's connection is closed.
    Hangup,
    /// QEMU executes the command; the client's connection is closed in place of the reply.
    HangupAfter,
    /// The process is killed, as by `kill -9`, before QEMU gets the command.
    KillBefore(u32),
    /// The process is killed after QEMU has executed the command, in place of the reply.
    KillAfter(u32),
    /// QEMU executes the command; the client gets the edited reply.
    EditReply(Edit),
    /// QEMU gets the command when the test releases it: see [`Proxy::hold`].
    Hold(Gate),
    /// QEMU executes the command; the reply and all that follows it are held until the test
    /// releases them.
    HoldReply(Gate),
}

impl Fault {
    /// [`Fault::Fail`] with a generic error with this text.
    pub fn fail(text: &str) -> Fault {
        Fault::Fail(json!({"class": "GenericError", "desc": text}))
    }
}

impl fmt::Debug for Fault {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Fault::Fail(_) => "Fail",
            Fault::Drop => "Drop",
            Fault::SwallowReply => "SwallowReply",
            Fault::Hangup => "Hangup",
            Fault::HangupAfter => "HangupAfter",
            Fault::KillBefore(_) => "KillBefore",
            Fault::KillAfter(_) => "KillAfter",
            Fault::EditReply(_) => "EditReply",
            Fault::Hold(_) => "Hold",
            Fault::HoldReply(_) => "HoldReply",
        })
    }
}

/// A gate at which a command waits for the test. Clones are the same gate.
#[derive(Clone, Debug, Default)]
pub struct Gate(Arc<(Mutex<GateState>, Condvar)>);

#[derive(Debug, Default)]
struct GateState {
    arrived: bool,
    released: bool,
}

impl Gate {
    /// Waits until the command has come to the gate. Returns false when the deadline passes.
    pub fn wait_arrived(&self, deadline: Duration) -> bool {
        let (state, changed) = &*self.0;
        let waited = changed.wait_timeout_while(lock(state), deadline, |state| !state.arrived);
        waited.expect("poisoned").0.arrived
    }

    /// Lets the command pass, now or when it comes.
    pub fn release(&self) {
        lock(&self.0.0).released = true;
        self.0.1.notify_all();
    }

    /// Comes to the gate and waits there.
    pub fn pass(&self) {
        let (state, changed) = &*self.0;
        let mut state = lock(state);
        state.arrived = true;
        changed.notify_all();
        drop(changed.wait_while(state, |state| !state.released).expect("poisoned"));
    }
}

#[derive(Debug)]
struct Rule {
    command: String,
    /// How many more of this command must come, including this one, until the rule applies.
    countdown: u32,
    fault: Fault,
}

#[derive(Debug, Default)]
struct State {
    rules: Vec<Rule>,
    /// Commands that always fail, with the text of the error.
    failing: Vec<(String, String)>,
    hidden_events: Vec<String>,
    /// The events that the client gets before each reply.
    flood: String,
    commands: Vec<String>,
    /// All gates that must be opened for the threads to end.
    gates: Vec<Gate>,
    streams: Vec<UnixStream>,
    closing: bool,
}

/// A running proxy. It serves clients one after the other. Dropping it closes all connections.
#[derive(Debug)]
pub struct Proxy {
    listen: PathBuf,
    listener: Arc<UnixListener>,
    state: Arc<Mutex<State>>,
    accepting: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Listens on `listen`. Each client gets a connection of its own to QEMU's socket.
    pub fn start(listen: &Path, qemu: &Path) -> Proxy {
        let listener = UnixListener::bind(listen)
            .unwrap_or_else(|error| panic!("{}: {error}", listen.display()));
        let listener = Arc::new(listener);
        let state = Arc::new(Mutex::new(State::default()));
        let accepting = std::thread::spawn({
            let (listener, state, qemu) = (listener.clone(), state.clone(), qemu.to_owned());
            move || accept(&listener, &qemu, &state)
        });
        Proxy { listen: listen.to_owned(), listener, state, accepting: Some(accepting) }
    }

    /// The socket for the client.
    pub fn path(&self) -> &Path {
        &self.listen
    }

    /// Injects this fault once, at the `occurrence`-th `command` from now on (1 is the next).
    pub fn rule(&self, command: &str, occurrence: u32, fault: Fault) {
        assert!(occurrence > 0, "occurrences count from 1");
        let mut state = lock(&self.state);
        if let Fault::Hold(gate) | Fault::HoldReply(gate) = &fault {
            state.gates.push(gate.clone());
        }
        state.rules.push(Rule { command: command.to_owned(), countdown: occurrence, fault });
    }

    /// Injects [`Fault::Hold`] with a new gate, at which the test can wait for the command, act,
    /// and let the command pass.
    pub fn hold(&self, command: &str, occurrence: u32) -> Gate {
        let gate = Gate::default();
        self.rule(command, occurrence, Fault::Hold(gate.clone()));
        gate
    }

    /// Injects [`Fault::HoldReply`] with a new gate.
    pub fn hold_reply(&self, command: &str, occurrence: u32) -> Gate {
        let gate = Gate::default();
        self.rule(command, occurrence, Fault::HoldReply(gate.clone()));
        gate
    }

    /// Makes every `command` fail with this text until [`Proxy::mend`].
    pub fn fail_every(&self, command: &str, text: &str) {
        lock(&self.state).failing.push((command.to_owned(), text.to_owned()));
    }

    /// Ends [`Proxy::fail_every`].
    pub fn mend(&self, command: &str) {
        lock(&self.state).failing.retain(|(failing, _)| failing != command);
    }

    /// Hides events of this name from the client.
    pub fn hide_event(&self, name: &str) {
        lock(&self.state).hidden_events.push(name.to_owned());
    }

    /// Sends this many events of this name before each reply.
    pub fn flood(&self, event: &str, count: usize) {
        let event =
            json!({ "event": event, "data": {}, "timestamp": { "seconds": 1, "microseconds": 2 } });
        lock(&self.state).flood = format!("{event}\r\n").repeat(count);
    }

    /// The names of all commands that clients have sent, in order.
    pub fn commands(&self) -> Vec<String> {
        lock(&self.state).commands.clone()
    }

    /// Closes the present connections. New clients can connect.
    pub fn hang_up(&self) {
        lock(&self.state).streams.drain(..).for_each(|stream| hang_up(&stream));
    }

    /// The number of rules that have not applied yet. A test that injects a fault asserts that none
    /// is left.
    pub fn rules_left(&self) -> usize {
        lock(&self.state).rules.len()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        {
            let mut state = lock(&self.state);
            state.closing = true;
            state.gates.iter().for_each(Gate::release);
            state.streams.iter().for_each(hang_up);
        }
        // This wakes the accepting thread, even where the socket's file has been removed.
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
        let _ = std::fs::remove_file(&self.listen);
    }
}

/// A poisoned lock means a panic elsewhere that has been reported already.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn hang_up(stream: &UnixStream) {
    let _ = stream.shutdown(Shutdown::Both);
}

fn accept(listener: &UnixListener, qemu: &Path, state: &Arc<Mutex<State>>) {
    let mut threads = Vec::new();
    while let Ok((client, _)) = listener.accept() {
        // Where QEMU has ended, the client's connection is closed, as it would be without the
        // proxy.
        let server = UnixStream::connect(qemu);
        let mut locked = lock(state);
        if locked.closing {
            break;
        }
        let Ok(server) = server else { continue };
        let connection = Arc::new(Connection::new(client, server, state.clone()));
        locked.streams.extend(
            [&connection.client, &connection.server]
                .map(|stream| stream.try_clone().expect("a file descriptor")),
        );
        drop(locked);
        for direction in [Connection::commands, Connection::replies] {
            let connection = connection.clone();
            threads.push(std::thread::spawn(move || {
                let _ = direction(&connection); // an error ends the connection
                hang_up(&connection.client);
                hang_up(&connection.server);
            }));
        }
    }
    for thread in threads {
        let _ = thread.join();
    }
}

/// The treatment of the reply to a command that QEMU has been given.
enum Expected {
    PassOn,
    Swallow,
    HangUp,
    Kill(u32),
    Edit(Edit),
    Hold(Gate),
}

struct Connection {
    client: UnixStream,
    server: UnixStream,
    /// Both threads write to the client.
    writing: Mutex<()>,
    /// The ids of commands that have no reply yet, oldest first.
    expected: Mutex<VecDeque<(Value, Expected)>>,
    state: Arc<Mutex<State>>,
}

impl Connection {
    fn new(client: UnixStream, server: UnixStream, state: Arc<Mutex<State>>) -> Connection {
        let (writing, expected) = Default::default();
        Connection { client, server, writing, expected, state }
    }

    /// Passes commands from the client to QEMU.
    fn commands(&self) -> io::Result<()> {
        let mut line = Vec::new();
        let mut fds_of_line = Vec::new();
        loop {
            let mut buffer = [0; 16384];
            let mut fds = Vec::new();
            let length = receive(&self.client, &mut buffer, &mut fds)?;
            if length == 0 {
                return Ok(());
            }
            // File descriptors belong to the last line of what was received.
            let earlier = buffer[..length - 1].iter().rposition(|byte| *byte == b'\n');
            let last_line = earlier.map_or(0, |newline| newline + 1);
            for (index, byte) in buffer[..length].iter().enumerate() {
                if index == last_line {
                    fds_of_line.append(&mut fds);
                }
                line.push(*byte);
                if *byte == b'\n' {
                    self.command(&line, &std::mem::take(&mut fds_of_line))?;
                    line.clear();
                }
            }
        }
    }

    fn command(&self, line: &[u8], fds: &[OwnedFd]) -> io::Result<()> {
        let command: Value = serde_json::from_slice(line).unwrap_or_default();
        let id = command["id"].clone();
        let name = command["execute"].as_str().or(command["exec-oob"].as_str()).unwrap_or("");
        let expected = match self.fault_for(name) {
            None => Expected::PassOn,
            Some(Fault::Fail(error)) => {
                let mut reply = json!({"error": error});
                if !id.is_null() {
                    reply["id"] = id;
                }
                return self.to_client(format!("{reply}\r\n").as_bytes());
            }
            Some(Fault::Drop) => return Ok(()),
            Some(Fault::Hangup) => return Err(io::ErrorKind::ConnectionAborted.into()),
            Some(Fault::KillBefore(pid)) => {
                kill(pid);
                Expected::PassOn
            }
            Some(Fault::Hold(gate)) => {
                gate.pass();
                Expected::PassOn
            }
            Some(Fault::SwallowReply) => Expected::Swallow,
            Some(Fault::HangupAfter) => Expected::HangUp,
            Some(Fault::KillAfter(pid)) => Expected::Kill(pid),
            Some(Fault::EditReply(edit)) => Expected::Edit(edit),
            Some(Fault::HoldReply(gate)) => Expected::Hold(gate),
        };
        lock(&self.expected).push_back((id, expected));
        let fds: Vec<BorrowedFd> = fds.iter().map(OwnedFd::as_fd).collect();
        send_with_fds(&self.server, line, &fds)
    }

    /// Records the command, and finds the fault that applies to it now.
    fn fault_for(&self, name: &str) -> Option<Fault> {
        let mut state = lock(&self.state);
        state.commands.push(name.to_owned());
        for rule in state.rules.iter_mut().filter(|rule| rule.command == name) {
            rule.countdown = rule.countdown.saturating_sub(1);
        }
        let applies = |rule: &Rule| rule.command == name && rule.countdown == 0;
        if let Some(index) = state.rules.iter().position(applies) {
            return Some(state.rules.remove(index).fault);
        }
        let failing = state.failing.iter().find(|(command, _)| command == name)?;
        Some(Fault::fail(&failing.1))
    }

    /// Passes replies from QEMU to the client.
    fn replies(&self) -> io::Result<()> {
        let mut server = BufReader::new(&self.server);
        let mut line = Vec::new();
        while server.read_until(b'\n', &mut line)? > 0 {
            let message: Value = serde_json::from_slice(&line).unwrap_or_default();
            if message.get("return").is_some() || message.get("error").is_some() {
                let flood = lock(&self.state).flood.clone();
                self.to_client(flood.as_bytes())?;
                match self.expected_reply(&message["id"]) {
                    Expected::PassOn => self.to_client(&line)?,
                    Expected::Swallow => {}
                    Expected::HangUp => return Ok(()),
                    Expected::Kill(pid) => kill(pid),
                    Expected::Hold(gate) => {
                        gate.pass();
                        self.to_client(&line)?;
                    }
                    Expected::Edit(edit) => {
                        self.to_client(format!("{}\r\n", edit(message)).as_bytes())?;
                    }
                }
            } else if !self.hidden(&message) {
                self.to_client(&line)?;
            }
            line.clear();
        }
        Ok(())
    }

    fn hidden(&self, message: &Value) -> bool {
        let hidden = &lock(&self.state).hidden_events;
        message["event"].as_str().is_some_and(|name| hidden.iter().any(|event| event == name))
    }

    /// The treatment of the reply with this id. Replies without an id come in order.
    fn expected_reply(&self, id: &Value) -> Expected {
        let mut expected = lock(&self.expected);
        let index = expected.iter().position(|(other, _)| other == id).unwrap_or(0);
        expected.remove(index).map_or(Expected::PassOn, |(_, expected)| expected)
    }

    fn to_client(&self, bytes: &[u8]) -> io::Result<()> {
        let _one_at_a_time = lock(&self.writing);
        (&self.client).write_all(bytes)
    }
}

fn kill(pid: u32) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a process id");
    let _ = kill_process(pid, Signal::KILL); // gone already is fine
}

/// Reads some bytes, and appends the file descriptors that arrive with them.
fn receive(stream: &UnixStream, buffer: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| {
        let mut data = [IoSliceMut::new(buffer)];
        recvmsg(stream, &mut data, &mut control, RecvFlags::CMSG_CLOEXEC)
    })?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    Ok(received.bytes)
}
