// SPDX-License-Identifier: LGPL-2.1-or-later

//! A snapshot that is taken on a thread of its own.
//!
//! The thread does the work of [`Handle::create`](super::Handle::create). The caller holds a
//! [`Job`], which it can drop at any time: the thread has all that it needs, and goes on.

pub mod shared;
pub mod sync;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};

use self::shared::{News, Shared, Signal};
use super::clock::{Observer, Phase, Stats};
use super::event::{Event, EventKind};
use super::operation::{Operation, Taken};
use crate::cancel::Cancel;
use crate::error::{Code, Error, Result, fail};
use crate::image::Format;
use crate::migration::Flow;
use crate::model::flags::CreateFlags;
use crate::sys::{self, lock, now};

/// The default interval between reports of the progress.
const INTERVAL: Duration = Duration::from_millis(500);

/// When [`Handle::start`](super::Handle::start) returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Returns {
    /// When the instant has passed.
    AtInstant,
    /// When the thread has been started.
    AtOnce,
}

/// A snapshot that is being taken, or has ended.
pub struct Job {
    state: Arc<State>,
}

struct State {
    shared: Shared<Event, Outcome, Readable>,
    position: Mutex<Position>,
    cancel: Arc<Cancel>,
    started: Duration,
}

struct Outcome {
    result: Result<Complete>,
    stats: Stats,
}

/// A snapshot that is complete.
struct Complete {
    name: String,
    xml: Result<String>,
}

/// The progress of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    /// The phase; none once the job has ended.
    pub phase: Option<Phase>,
    /// The instant has passed.
    pub instant: bool,
    /// The time since the call, until now or until the job's end.
    pub elapsed: Duration,
    /// How long the guest has been paused so far.
    pub paused: Duration,
    /// The last report of how much memory is saved.
    pub flow: Flow,
}

#[derive(Debug, Default)]
struct Position {
    phase: Phase,
    instant: bool,
    /// When the guest's pause began, while it is paused.
    pausing: Option<Duration>,
    paused: Duration,
    flow: Flow,
    ended: Option<Duration>,
}

impl Position {
    fn event(&mut self, event: &Event) {
        match event.kind {
            EventKind::Paused => self.pausing = Some(event.time - event.paused),
            EventKind::Switched => {}
            EventKind::Instant | EventKind::Progress | EventKind::Complete => {
                self.instant |= event.kind == EventKind::Instant;
                self.flow = event.flow;
            }
            EventKind::Failed(_) => {}
        }
    }

    fn end(&mut self, last: &Event) {
        self.event(last);
        self.ended = Some(last.time);
        self.resumed(last.paused);
    }

    fn resumed(&mut self, paused: Duration) {
        (self.pausing, self.paused) = (None, paused);
    }
}

impl News for Event {
    fn is_instant(&self) -> bool {
        self.kind == EventKind::Instant
    }

    fn replaces(&self, earlier: &Event) -> bool {
        self.kind == EventKind::Progress && earlier.kind == EventKind::Progress
    }
}

/// A descriptor that is readable while events are pending.
struct Readable(OwnedFd);

impl Readable {
    fn new() -> Result<Readable> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        Ok(Readable(event.map_err(|error| Error::system("cannot create an eventfd", error))?))
    }
}

impl Signal for Readable {
    fn raise(&self) {
        // This fails only at the eventfd's highest count, and then it is readable already.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    fn lower(&self) {
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

impl Job {
    /// Starts the job. With [`Returns::AtInstant`], an error before the instant is returned by this
    /// call, otherwise by [`Job::result`].
    pub(super) fn start(
        operation: Operation,
        xml: &str,
        flags: Result<CreateFlags>,
        format: Option<Format>,
        listener: Box<dyn Observer + Send>,
        returns: Returns,
    ) -> Result<Job> {
        let state = Arc::new(State {
            shared: Shared::new(Readable::new()?),
            position: Mutex::default(),
            cancel: Arc::clone(operation.cancel()),
            started: now(),
        });
        let (thread_state, xml) = (Arc::clone(&state), xml.to_owned());
        let run = move || thread_state.run(operation, &xml, flags, format, listener);
        sys::spawn_quiet("instantsnap-job", run)?;
        let job = Job { state };
        if returns == Returns::AtInstant && !job.state.shared.wait_instant() {
            job.result()?;
        }
        Ok(job)
    }

    /// Waits until the job has ended, at most for `timeout`. Returns whether it has ended. By then
    /// the listener has received all events, and is not called any more.
    pub fn wait(&self, timeout: Option<Duration>) -> bool {
        self.state.shared.wait_ended(timeout)
    }

    /// Readable while events are pending.
    pub fn readable(&self) -> BorrowedFd<'_> {
        self.state.shared.signal().0.as_fd()
    }

    /// The oldest event that was not taken yet.
    pub fn next_event(&self) -> Option<Event> {
        self.state.shared.take()
    }

    /// The job's progress.
    pub fn info(&self) -> Info {
        let position = lock(&self.state.position);
        let now = position.ended.unwrap_or_else(now);
        Info {
            phase: position.ended.is_none().then_some(position.phase),
            instant: position.instant,
            elapsed: now - self.state.started,
            paused: position.pausing.map_or(position.paused, |since| now - since),
            flow: position.flow,
        }
    }

    /// The job's result: the snapshot's name, or the error. Another error if it has not ended.
    pub fn result(&self) -> Result<String> {
        let outcome = self.outcome()?;
        outcome.result.as_ref().map(|complete| complete.name.clone()).map_err(Clone::clone)
    }

    /// The snapshot's `<domainsnapshot>`, where [`Job::result`] gives its name.
    pub fn xml(&self) -> Result<String> {
        let outcome = self.outcome()?;
        outcome.result.as_ref().map_err(Clone::clone).and_then(|complete| complete.xml.clone())
    }

    /// The snapshot's statistics.
    pub fn stats(&self) -> Result<Stats> {
        Ok(self.outcome()?.stats.clone())
    }

    /// Cancels the snapshot.
    pub fn cancel(&self) {
        self.state.cancel.request();
    }

    fn outcome(&self) -> Result<Arc<Outcome>> {
        match self.state.shared.outcome() {
            Some(outcome) => Ok(outcome),
            None => fail!(
                OperationInvalid,
                "the snapshot is still being taken: wait for its job to end first"
            ),
        }
    }
}

impl State {
    /// The body of the job's thread.
    fn run(
        &self,
        operation: Operation,
        xml: &str,
        flags: Result<CreateFlags>,
        format: Option<Format>,
        listener: Box<dyn Observer + Send>,
    ) {
        let mut listener = Listener { state: self, listener };
        let taken = catch_unwind(AssertUnwindSafe(|| {
            let Taken { result, last, stats } = operation.take(xml, flags, format, &mut listener);
            let result = result.map(|created| Complete {
                xml: created.xml(operation.snapshot_list()),
                name: created.name,
            });
            (Outcome { result, stats }, last)
        }));
        // The operation ends before the end is reported, so that a listener can take the next
        // snapshot.
        drop(operation);
        let (outcome, last) = taken.unwrap_or_else(|_| defect());
        lock(&self.position).end(&last);
        self.shared.decide(outcome);
        let _ = catch_unwind(AssertUnwindSafe(|| listener.listener.event(&last)));
        self.shared.end(last);
    }
}

fn defect() -> (Outcome, Event) {
    let error = Error::new(Code::InternalError, "a defect of instantsnap, please report it");
    let kind = EventKind::Failed(error.number());
    let last = Event { kind, time: now(), paused: Duration::ZERO, flow: Flow::default() };
    (Outcome { result: Err(error), stats: Stats::default() }, last)
}

/// Keeps the progress for [`Job::info`], and passes it on to the caller's listener.
struct Listener<'a> {
    state: &'a State,
    listener: Box<dyn Observer + Send>,
}

impl Observer for Listener<'_> {
    fn phase(&mut self, phase: Phase) {
        lock(&self.state.position).phase = phase;
        self.listener.phase(phase);
    }

    fn event(&mut self, event: &Event) {
        lock(&self.state.position).event(event);
        self.state.shared.publish(*event);
        self.listener.event(event);
    }

    fn resumed(&mut self, paused: Duration) {
        lock(&self.state.position).resumed(paused);
        self.listener.resumed(paused);
    }

    fn interval(&self) -> Option<Duration> {
        Some(self.listener.interval().unwrap_or(INTERVAL))
    }
}
