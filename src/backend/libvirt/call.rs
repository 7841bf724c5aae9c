// SPDX-License-Identifier: LGPL-2.1-or-later

//! Calls of libvirt with an end.
//!
//! Each of libvirt's calls on a domain waits for the job of another client's call on it, up to 30
//! seconds. So they are made by a thread of ours, and given up when a deadline passes. The call
//! itself cannot be taken back: it is kept, and whoever undoes what it may yet do waits for its end
//! first ([`Caller::settle`]).

use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::Duration;

use crate::deadline::Deadline;
use crate::error::{Code, Result};
use crate::libvirt::daemon::{Daemon, step};
use crate::libvirt::{Connect, Domain, VirError, VirResult};
use crate::sys;

type Task = Box<dyn FnOnce() + Send>;

/// Why a call gave no result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CallError {
    /// libvirt's error.
    Refused(VirError),
    /// No answer in time. The call goes on.
    Late,
    /// The daemon is gone, and did not come back in time.
    Lost(String),
}

impl CallError {
    /// Whether another call would have to wait too, and nothing is known of what was asked for.
    pub fn is_late(&self) -> bool {
        match self {
            CallError::Late => true,
            // libvirt waits for another client's job, and gives that up itself.
            CallError::Refused(error) => error.is(Code::OperationTimeout),
            CallError::Lost(_) => false,
        }
    }

    fn of_lost_thread() -> CallError {
        CallError::Lost("a thread of ours has ended".into())
    }

    /// The error for a caller: `step` says what was tried on what.
    pub fn into_error(self, step: &str) -> crate::error::Error {
        use crate::error::Error;
        match self {
            CallError::Refused(error) => error.into_error(step),
            CallError::Late => Error::new(
                Code::OperationTimeout,
                format!(
                    "{step}: libvirt did not answer in time; another client's job on the domain \
                     can make it wait"
                ),
            ),
            CallError::Lost(reason) => Error::new(
                Code::Rpc,
                format!("{step}: lost the connection to the libvirt daemon ({reason})"),
            ),
        }
    }
}

/// What is done when the connection is lost in a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// It can be done twice: once more, through a new connection.
    Safe,
    /// It may have been done.
    Never,
}

/// A daemon, and the UUID of a domain of its.
#[derive(Clone, Debug)]
struct Address {
    uri: String,
    uuid: String,
}

/// Connects, and looks the domain up; why not, where it cannot be done. A daemon can accept a
/// connection and not answer: so this is done by a thread of its own, which is left behind when the
/// deadline passes.
fn look_up(address: Address, deadline: Deadline) -> std::result::Result<Domain, String> {
    let (answer, answered) = mpsc::channel();
    let open = move || {
        let connect = Connect::open(&address.uri).map_err(|error| error.message)?;
        // The daemon is there: it may still be looking for its domains.
        connect.and_then(|connect| connect.domain(&address.uuid)).map_err(|error| error.message)
    };
    sys::spawn_quiet("instantsnap-virt", move || {
        let _ = answer.send(open());
    })
    .map_err(|error| error.message)?;
    match answered.recv_timeout(deadline.left().unwrap_or_default()) {
        Ok(result) => result,
        Err(_) => Err("the daemon accepts a connection, and does not answer in time".into()),
    }
}

/// A call that a thread makes.
struct PendingCall<T> {
    answer: Receiver<VirResult<T>>,
    /// Disconnected when it has ended.
    ended: Receiver<()>,
}

/// A domain, called through a thread.
#[derive(Debug)]
pub struct Caller {
    domain: Domain,
    /// How the daemon is reached once more; it is not where it is this process.
    again: Option<Address>,
    worker: Option<Sender<Task>>,
    /// Calls that were given up.
    pending: Vec<Receiver<()>>,
    refused: bool,
}

impl Drop for Caller {
    fn drop(&mut self) {
        // A daemon's call is not over while threads of it are in the driver: more of them than are
        // counted would be there, and when the daemon ends, its domains would go from under them.
        if self.again.is_none() {
            self.join();
        }
    }
}

impl Caller {
    /// Of a domain.
    pub fn new(domain: Domain, uri: String, uuid: String) -> Caller {
        Caller {
            domain,
            again: Some(Address { uri, uuid }),
            worker: None,
            pending: Vec::new(),
            refused: false,
        }
    }

    /// Of a domain of the daemon that this process is.
    pub fn inside(domain: Domain) -> Caller {
        Caller { domain, again: None, worker: None, pending: Vec::new(), refused: false }
    }

    /// Another one of the same domain, by the connection that there is now.
    pub fn another(&self) -> Caller {
        let (domain, again) = (self.domain.clone(), self.again.clone());
        Caller { domain, again, worker: None, pending: Vec::new(), refused: false }
    }

    /// Makes a call.
    pub fn call<T: Send + 'static>(
        &mut self,
        deadline: Deadline,
        again: Retry,
        call: impl Fn(&Domain) -> VirResult<T> + Clone + Send + 'static,
    ) -> std::result::Result<T, CallError> {
        let result = self.once(deadline, call.clone());
        match result {
            Err(CallError::Refused(error)) if self.is_lost(&error) => {
                match self.reconnect(deadline) {
                    Ok(()) if again == Retry::Safe => self.once(deadline, call),
                    Ok(()) => Err(CallError::Lost(error.message)),
                    Err(trouble) => Err(trouble),
                }
            }
            other => {
                self.refused |= matches!(other, Err(CallError::Refused(_)));
                other
            }
        }
    }

    /// Makes a call that may take hours: it is given up only where the daemon answers no other one
    /// for so long either.
    pub fn call_while_alive<T: Send + 'static>(
        &mut self,
        silence: Duration,
        call: impl FnOnce(&Domain) -> VirResult<T> + Send + 'static,
    ) -> std::result::Result<T, CallError> {
        let made = self.make(call)?;
        // It has its thread to itself.
        self.worker = None;
        loop {
            match made.answer.recv_timeout(silence) {
                Ok(Err(error)) if self.is_lost(&error) => {
                    self.reconnect(Deadline::after(silence))?;
                    return Err(CallError::Lost(error.message));
                }
                Ok(result) => return result.map_err(CallError::Refused),
                Err(RecvTimeoutError::Disconnected) => return Err(CallError::of_lost_thread()),
                Err(RecvTimeoutError::Timeout) => {
                    let version = |domain: &Domain| domain.connect()?.version();
                    if self.once(Deadline::after(silence), version) == Err(CallError::Late) {
                        self.pending.push(made.ended);
                        return Err(CallError::Late);
                    }
                }
            }
        }
    }

    /// Whether libvirt has refused a call since this was asked last.
    pub fn take_refused(&mut self) -> bool {
        std::mem::take(&mut self.refused)
    }

    fn once<T: Send + 'static>(
        &mut self,
        deadline: Deadline,
        call: impl FnOnce(&Domain) -> VirResult<T> + Send + 'static,
    ) -> std::result::Result<T, CallError> {
        let made = self.make(call)?;
        match made.answer.recv_timeout(deadline.left().unwrap_or_default()) {
            Ok(result) => result.map_err(CallError::Refused),
            Err(RecvTimeoutError::Timeout) => {
                // The next call needs another thread.
                self.worker = None;
                self.pending.push(made.ended);
                Err(CallError::Late)
            }
            Err(RecvTimeoutError::Disconnected) => Err(CallError::of_lost_thread()),
        }
    }

    /// Has the thread make a call.
    fn make<T: Send + 'static>(
        &mut self,
        call: impl FnOnce(&Domain) -> VirResult<T> + Send + 'static,
    ) -> std::result::Result<PendingCall<T>, CallError> {
        let (sender, answer) = mpsc::channel();
        let (end, ended) = mpsc::channel();
        let domain = self.domain.clone();
        self.send(Box::new(move || {
            let result = call(&domain);
            // Whoever has the answer may close the connection, and be told whether somebody else
            // has it still.
            drop(domain);
            let _ = sender.send(result);
            drop(end);
        }))
        .map_err(|error| CallError::Lost(error.message))?;
        Ok(PendingCall { answer, ended })
    }

    fn send(&mut self, task: Task) -> Result<()> {
        let task = match &self.worker {
            Some(worker) => match worker.send(task) {
                Ok(()) => return Ok(()),
                Err(unsent) => unsent.0,
            },
            None => task,
        };
        let (worker, tasks) = mpsc::channel::<Task>();
        // It ends with its sender.
        sys::spawn_quiet("instantsnap-virt", move || {
            let _step = step();
            // A client's thread is its client's; one of ours in a daemon would be nobody's.
            let _itself = Daemon::of_this_process().map(Daemon::itself);
            tasks.into_iter().for_each(|task| task());
        })?;
        let _ = worker.send(task);
        self.worker = Some(worker);
        Ok(())
    }

    /// Waits until calls that were given up have ended; false when the deadline passes first.
    pub fn settle(&mut self, deadline: Deadline) -> bool {
        self.pending.retain(|call| {
            matches!(
                call.recv_timeout(deadline.left().unwrap_or_default()),
                Err(RecvTimeoutError::Timeout)
            )
        });
        self.pending.is_empty()
    }

    /// Waits until they have ended, however long that takes.
    fn join(&mut self) {
        // Nothing is sent: it is an error when the call has ended.
        self.pending.drain(..).for_each(|call| {
            let _ = call.recv();
        });
    }

    /// Whether the connection is what failed.
    fn is_lost(&self, error: &VirError) -> bool {
        if self.again.is_none() {
            return false;
        }
        let alive = self.domain.connect().is_ok_and(|connect| connect.is_alive());
        !alive || error.is(Code::Rpc)
    }

    /// Connects anew, to a daemon that may be starting.
    fn reconnect(&mut self, deadline: Deadline) -> std::result::Result<(), CallError> {
        let Some(address) = &self.again else {
            return Err(CallError::Lost("it is this process".into()));
        };
        let mut nap = Duration::from_millis(20);
        loop {
            let reason = match look_up(address.clone(), deadline) {
                Ok(domain) => {
                    // Letting the old one go can take a word with the daemon; the thread that has
                    // made the calls does it.
                    let old = std::mem::replace(&mut self.domain, domain);
                    if let Some(worker) = self.worker.take() {
                        let _ = worker.send(Box::new(move || drop(old)));
                    }
                    return Ok(());
                }
                Err(reason) => reason,
            };
            let Some(left) = deadline.left() else { return Err(CallError::Lost(reason)) };
            std::thread::sleep(nap.min(left));
            nap = (nap * 2).min(Duration::from_secs(1));
        }
    }
}
