// SPDX-License-Identifier: LGPL-2.1-or-later

//! Calls of libvirt with a deadline.
//!
//! A call of libvirt on a domain waits for another client's job on it, up to 30 seconds. So a
//! thread of ours makes each call, and the call is given up when its deadline passes. It cannot be
//! taken back then: it stays pending, and an undo waits for its end first ([`Caller::settle`]).

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
    /// libvirt did not answer in time. The call goes on.
    Late,
    /// The connection to the daemon was lost, and could not be made again in time.
    Lost(String),
}

impl CallError {
    /// Whether the result is unknown because libvirt did not answer in time. Another call would
    /// have to wait too.
    pub fn is_late(&self) -> bool {
        match self {
            CallError::Late => true,
            // libvirt itself gives up waiting for another client's job.
            CallError::Refused(error) => error.is(Code::OperationTimeout),
            CallError::Lost(_) => false,
        }
    }

    fn of_lost_thread() -> CallError {
        CallError::Lost("a thread of ours has ended".into())
    }

    /// The error for the caller. `step` names the operation.
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

/// Whether a call is made again after the connection was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// The call is made again, through a new connection: it has the same effect if it is carried
    /// out twice.
    Safe,
    /// The call is not made again: it may have been carried out.
    Never,
}

/// The URI of a daemon, and the UUID of one of its domains.
#[derive(Clone, Debug)]
struct Address {
    uri: String,
    uuid: String,
}

/// Connects, and looks the domain up. Returns the reason if that fails. A daemon can accept a
/// connection and not answer. So a thread does this, which is left behind when the deadline passes.
fn look_up(address: Address, deadline: Deadline) -> std::result::Result<Domain, String> {
    let (answer, answered) = mpsc::channel();
    let open = move || {
        let connect = Connect::open(&address.uri).map_err(|error| error.message)?;
        // The daemon may have just started, and not have loaded its domains yet.
        connect.and_then(|connect| connect.domain(&address.uuid)).map_err(|error| error.message)
    };
    sys::spawn_quiet("instantsnap-virt", move || {
        let _ = answer.send(open());
    })
    .map_err(|error| error.message)?;
    match answered.recv_timeout(deadline.left().unwrap_or_default()) {
        Ok(result) => result,
        Err(_) => Err("the daemon accepts a connection, but does not answer in time".into()),
    }
}

/// A call that a thread is making.
struct PendingCall<T> {
    answer: Receiver<VirResult<T>>,
    /// Disconnected when the call has ended.
    ended: Receiver<()>,
}

/// Calls a domain through a thread.
#[derive(Debug)]
pub struct Caller {
    domain: Domain,
    /// Used to connect anew; `None` in the daemon's own process.
    address: Option<Address>,
    /// Dropping it waits for the calls that were given up.
    waits: bool,
    worker: Option<Sender<Task>>,
    /// The calls that were given up.
    pending: Vec<Receiver<()>>,
    refused: bool,
}

impl Drop for Caller {
    fn drop(&mut self) {
        // In a daemon, its API call must not return while threads of ours are still in the driver.
        // Otherwise there would be more of them than the job limit allows, and when the daemon
        // ends, they would use domains that were freed.
        if self.waits {
            self.join();
        }
    }
}

impl Caller {
    /// A caller of a domain.
    pub fn new(domain: Domain, uri: String, uuid: String) -> Caller {
        Caller::with(domain, Some(Address { uri, uuid }), false)
    }

    /// A caller of a domain whose daemon is this process.
    pub fn inside(domain: Domain) -> Caller {
        Caller::with(domain, None, true)
    }

    /// A caller that does not connect anew: for a connection that is not known yet.
    pub fn without_address(domain: Domain) -> Caller {
        Caller::with(domain, None, Daemon::of_this_process().is_some())
    }

    /// Another caller of the same domain, with the current connection.
    pub fn another(&self) -> Caller {
        Caller::with(self.domain.clone(), self.address.clone(), self.waits)
    }

    fn with(domain: Domain, address: Option<Address>, waits: bool) -> Caller {
        Caller { domain, address, waits, worker: None, pending: Vec::new(), refused: false }
    }

    /// Makes a call.
    pub fn call<T: Send + 'static>(
        &mut self,
        deadline: Deadline,
        retry: Retry,
        call: impl Fn(&Domain) -> VirResult<T> + Clone + Send + 'static,
    ) -> std::result::Result<T, CallError> {
        let result = self.once(deadline, call.clone());
        match result {
            Err(CallError::Refused(error)) if self.is_lost(&error) => {
                match self.reconnect(deadline) {
                    Ok(()) if retry == Retry::Safe => self.once(deadline, call),
                    Ok(()) => Err(CallError::Lost(error.message)),
                    Err(error) => Err(error),
                }
            }
            other => {
                self.refused |= matches!(other, Err(CallError::Refused(_)));
                other
            }
        }
    }

    /// Makes a call that may take hours. It is given up only if the daemon does not answer another
    /// call either, for `silence`.
    pub fn call_while_alive<T: Send + 'static>(
        &mut self,
        silence: Duration,
        call: impl FnOnce(&Domain) -> VirResult<T> + Send + 'static,
    ) -> std::result::Result<T, CallError> {
        let made = self.make(call)?;
        // The thread is used for this call only.
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

    /// Makes the thread start a call.
    fn make<T: Send + 'static>(
        &mut self,
        call: impl FnOnce(&Domain) -> VirResult<T> + Send + 'static,
    ) -> std::result::Result<PendingCall<T>, CallError> {
        let (sender, answer) = mpsc::channel();
        let (end, ended) = mpsc::channel();
        let domain = self.domain.clone();
        self.send(Box::new(move || {
            let result = call(&domain);
            // Dropped first: the receiver may close the connection, and libvirt tells it whether
            // references to it are left.
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
        // The thread ends when the sender is dropped.
        sys::spawn_quiet("instantsnap-virt", move || {
            let _step = step();
            // In a daemon, a client's call runs in a thread with the client's identity. Our thread
            // has none, and gets that of the daemon.
            let _itself = Daemon::of_this_process().map(Daemon::itself);
            tasks.into_iter().for_each(|task| task());
        })?;
        let _ = worker.send(task);
        self.worker = Some(worker);
        Ok(())
    }

    /// Waits until the calls that were given up have ended. Returns false if the deadline passes
    /// first.
    pub fn settle(&mut self, deadline: Deadline) -> bool {
        self.pending.retain(|call| {
            matches!(
                call.recv_timeout(deadline.left().unwrap_or_default()),
                Err(RecvTimeoutError::Timeout)
            )
        });
        self.pending.is_empty()
    }

    /// Waits without a deadline until the calls that were given up have ended.
    fn join(&mut self) {
        // Nothing is ever sent: `recv` fails when the call has ended.
        self.pending.drain(..).for_each(|call| {
            let _ = call.recv();
        });
    }

    /// Whether the call failed because the connection was lost.
    fn is_lost(&self, error: &VirError) -> bool {
        if self.address.is_none() {
            return false;
        }
        let alive = self.domain.connect().is_ok_and(|connect| connect.is_alive());
        !alive || error.is(Code::Rpc)
    }

    /// Connects anew, to a daemon that may be starting. Tries until the deadline.
    fn reconnect(&mut self, deadline: Deadline) -> std::result::Result<(), CallError> {
        let Some(address) = &self.address else {
            return Err(CallError::Lost("the daemon is this process".into()));
        };
        let mut backoff = Duration::from_millis(20);
        loop {
            let reason = match look_up(address.clone(), deadline) {
                Ok(domain) => {
                    // Dropping the old one can call the daemon. The thread that makes the calls
                    // does it.
                    let old = std::mem::replace(&mut self.domain, domain);
                    if let Some(worker) = self.worker.take() {
                        let _ = worker.send(Box::new(move || drop(old)));
                    }
                    return Ok(());
                }
                Err(reason) => reason,
            };
            let Some(left) = deadline.left() else { return Err(CallError::Lost(reason)) };
            std::thread::sleep(backoff.min(left));
            backoff = (backoff * 2).min(Duration::from_secs(1));
        }
    }
}
