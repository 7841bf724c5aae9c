// SPDX-License-Identifier: LGPL-2.1-or-later

//! A driver in Rust. It uses QEMU's monitor during an operation, and injects faults.

use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

use instantsnap::backend::driver::{Answer, Driver, RunState};
use instantsnap::backend::qmp::Switch;
use instantsnap::monitor::Event;
use instantsnap_testkit::{Client, Guest};
use serde_json::{Value, json};

use super::backend::domain_of;

/// The fault at the next command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DriverFault {
    /// QEMU does not get it.
    Fails,
    /// QEMU executes the command, and the driver fails after that.
    FailsAfterExecution,
}

/// A domain of the driver, which is a guest of the kit that is opened by the library's socket.
pub struct TestDriver {
    socket: PathBuf,
    /// Present during an operation.
    client: Mutex<Option<Client>>,
    next: Mutex<Option<DriverFault>>,
    state_dir: PathBuf,
    domain_xml: String,
    pauses: bool,
}

impl TestDriver {
    /// With `pauses` the driver stops and starts the vCPUs itself.
    pub fn new(guest: &Guest, state_dir: PathBuf, pauses: bool) -> TestDriver {
        TestDriver {
            socket: guest.qmp(),
            client: Mutex::default(),
            next: Mutex::default(),
            state_dir,
            domain_xml: domain_of(guest.disks()),
            pauses,
        }
    }

    /// Injects the fault at the next command.
    pub fn inject(&self, fault: DriverFault) {
        *self.next.lock().unwrap() = Some(fault);
    }

    /// Uses QEMU's monitor, which is possible during an operation only.
    fn with<T>(&self, what: impl FnOnce(&mut Client) -> T) -> T {
        what(self.client.lock().unwrap().as_mut().expect("an operation is under way"))
    }

    fn does(&self, command: &str) -> Option<Answer<()>> {
        self.pauses.then(|| match self.with(|client| client.execute(command, json!({}))) {
            Ok(_) => Ok(()),
            Err(error) => Err(format!(": {error}")),
        })
    }
}

impl Driver for TestDriver {
    fn identity(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }

    fn run(&self, command: &str, fd: Option<BorrowedFd>, _: Duration) -> Answer<String> {
        let fault = self.next.lock().unwrap().take();
        if fault == Some(DriverFault::Fails) {
            return Err(": not today".into());
        }
        let command: Value = serde_json::from_str(command).unwrap();
        let (name, arguments) =
            (command["execute"].as_str().unwrap(), command["arguments"].clone());
        let result = self.with(|client| match fd {
            Some(fd) => client.execute_with_fd(name, arguments, fd),
            None => client.execute(name, arguments),
        });
        if fault.is_some() {
            return Err(": not today".into());
        }
        let reply = match result {
            Ok(value) => json!({ "return": value }),
            Err(error) => json!({ "error": error }),
        };
        Ok(reply.to_string())
    }

    fn state(&self) -> Answer<RunState> {
        match self.with(|client| client.execute("query-status", json!({}))) {
            Ok(status) if status["running"] == true => Ok(RunState::Running),
            Ok(_) => Ok(RunState::Paused),
            Err(_) => Ok(RunState::Off),
        }
    }

    fn domain_xml(&self) -> Answer<String> {
        Ok(self.domain_xml.clone())
    }

    fn state_dir(&self) -> Answer<Option<PathBuf>> {
        Ok(Some(self.state_dir.clone()))
    }

    fn watchdog_socket(&self) -> Option<PathBuf> {
        None
    }

    fn pause(&self, _: Duration) -> Option<Answer<()>> {
        self.does("stop")
    }

    fn resume(&self, _: Duration) -> Option<Answer<()>> {
        self.does("cont")
    }

    fn switch_disks(&self, _: &[Switch], _: Duration) -> Option<Answer<()>> {
        None
    }

    fn disks_merged(&self, _: &[Switch]) {}

    fn begin_job(&self) -> Answer<()> {
        let client = Client::connect(&self.socket).map_err(|error| format!(": {error}"))?;
        let before = self.client.lock().unwrap().replace(client);
        assert!(before.is_none(), "two operations at once");
        Ok(())
    }

    fn end_job(&self) {
        self.client.lock().unwrap().take().expect("an operation was under way");
    }

    fn record(&self, name: &str, _: &str) -> Answer<()> {
        unreachable!("{name} is recorded in the state directory")
    }

    fn forget(&self, name: &str) -> Answer<()> {
        unreachable!("{name} is recorded in the state directory")
    }

    fn snapshot_xml(&self, name: &str) -> Answer<Option<String>> {
        unreachable!("{name} is recorded in the state directory")
    }

    fn current(&self) -> Answer<Option<String>> {
        unreachable!("it is recorded in the state directory")
    }

    fn take_events(&self) -> Vec<Event> {
        let event = |event: instantsnap_testkit::Event| {
            Event::read(
                &json!({ "event": event.name, "timestamp": { "microseconds": event.timestamp_us } }),
            )
        };
        self.with(Client::events).into_iter().filter_map(event).collect()
    }
}
