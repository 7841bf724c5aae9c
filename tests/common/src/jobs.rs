// SPDX-License-Identifier: LGPL-2.1-or-later

//! Functions that follow a job.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use instantsnap::engine::{Event, EventKind, Job, Observer, Phase, Returns};
use instantsnap::error::Error;
use instantsnap::image::Format;
use instantsnap::model::flags::CreateFlags;
use instantsnap_testkit::{Client, DEADLINE, Gate, Guest};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::json;

use super::{Opened, image_format};

type Action = Box<dyn FnMut() + Send>;

/// Keeps the events that it receives, and acts at the start of phases.
#[derive(Default)]
pub struct Listener {
    heard: Heard,
    actions: Vec<(Phase, Action)>,
    at_instant: Option<Action>,
    interval: Option<Duration>,
}

/// The events that a listener has received.
#[derive(Clone, Debug, Default)]
pub struct Heard(Arc<Mutex<Vec<Event>>>);

impl Heard {
    pub fn events(&self) -> Vec<Event> {
        self.0.lock().unwrap().clone()
    }
}

impl Listener {
    /// Runs `action` when a phase begins.
    pub fn at(mut self, phase: Phase, action: impl FnMut() + Send + 'static) -> Listener {
        self.actions.push((phase, Box::new(action)));
        self
    }

    /// Waits at the gate when a phase begins.
    pub fn hold(self, phase: Phase, gate: &Gate) -> Listener {
        let gate = gate.clone();
        self.at(phase, move || gate.pass())
    }

    /// Asks for progress events at this interval.
    pub fn every(mut self, interval: Duration) -> Listener {
        self.interval = Some(interval);
        self
    }

    pub fn heard(&self) -> Heard {
        self.heard.clone()
    }
}

impl Observer for Listener {
    fn phase(&mut self, phase: Phase) {
        self.actions.iter_mut().filter(|(at, _)| *at == phase).for_each(|(_, action)| action());
    }

    fn event(&mut self, event: &Event) {
        if let (EventKind::Instant, Some(action)) = (event.kind, &mut self.at_instant) {
            action();
        }
        self.heard.0.lock().unwrap().push(*event);
    }

    fn interval(&self) -> Option<Duration> {
        self.interval
    }
}

impl Opened {
    /// Starts a job without waiting for the instant.
    pub fn start_at_once(&self, xml: &str, flags: u32, listener: Listener) -> Job {
        self.start_job(xml, flags, listener, Returns::AtOnce).unwrap()
    }

    /// Starts a job.
    pub fn start_job(
        &self,
        xml: &str,
        flags: u32,
        listener: Listener,
        returns: Returns,
    ) -> Result<Job, Error> {
        self.start_job_as(image_format(), xml, flags, listener, returns)
    }

    /// Starts a job with a memory image of this format.
    pub fn start_job_as(
        &self,
        format: Option<Format>,
        xml: &str,
        flags: u32,
        listener: Listener,
        returns: Returns,
    ) -> Result<Job, Error> {
        let flags = CreateFlags::parse(flags);
        self.handle.0.start(xml, flags, format, Box::new(listener), returns)
    }
}

/// The kinds of the events, without progress.
pub fn steps(events: &[Event]) -> Vec<EventKind> {
    events.iter().map(|event| event.kind).filter(|what| *what != EventKind::Progress).collect()
}

/// Whether a job's descriptor becomes readable within that time.
pub fn readable(job: &Job, within: Duration) -> bool {
    let within =
        Timespec { tv_sec: within.as_secs() as i64, tv_nsec: within.subsec_nanos().into() };
    let mut fds = [PollFd::from_borrowed_fd(job.readable(), PollFlags::IN)];
    poll(&mut fds, Some(&within)).unwrap() > 0
}

/// The next event, awaited by the job's descriptor.
#[track_caller]
pub fn next(job: &Job) -> Event {
    assert!(readable(job, DEADLINE), "no event comes");
    job.next_event().expect("readable, and there is no event")
}

/// All events up to the last one.
#[track_caller]
pub fn rest(job: &Job) -> Vec<Event> {
    let mut all = Vec::new();
    loop {
        all.push(next(job));
        if matches!(all.last().unwrap().kind, EventKind::Complete | EventKind::Failed(_)) {
            return all;
        }
    }
}

/// Slows the drain of a background snapshot down, until it is dropped.
pub struct SlowDrain<'a> {
    guest: &'a Guest,
    before: serde_json::Value,
}

impl SlowDrain<'_> {
    /// QEMU begins a background snapshot without a bandwidth limit, so the listener sets it at the
    /// instant.
    pub fn new(
        guest: &Guest,
        bytes_per_second: u64,
        listener: Listener,
    ) -> (SlowDrain<'_>, Listener) {
        let parameters = guest.control().execute("query-migrate-parameters", json!({})).unwrap();
        let slow = SlowDrain { guest, before: parameters["max-bandwidth"].clone() };
        let control = guest.directory().join("control.sock");
        let set = move || {
            let mut control = Client::connect(&control).unwrap();
            control
                .execute("migrate-set-parameters", json!({ "max-bandwidth": bytes_per_second }))
                .unwrap();
        };
        (slow, Listener { at_instant: Some(Box::new(set)), ..listener })
    }
}

impl Drop for SlowDrain<'_> {
    fn drop(&mut self) {
        if self.guest.alive() && !std::thread::panicking() {
            let bandwidth = json!({ "max-bandwidth": self.before });
            self.guest.control().execute("migrate-set-parameters", bandwidth).unwrap();
        }
    }
}
