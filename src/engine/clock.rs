// SPDX-License-Identifier: LGPL-2.1-or-later

//! When which phase began, what each took, and who is told of it.

use std::time::Duration;

use super::event::{Event, EventKind};
use crate::error::{Error, Result};
use crate::migration::{Flow, FlowObserver};
use crate::sys::now;

/// A phase of a snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    /// Flags, XML, the guest's state and abilities.
    #[default]
    Validate,
    /// Disks, names, the domain's XML.
    Plan,
    /// Overlays, memory image, pipe, capability.
    Prepare,
    /// vCPUs are being stopped.
    Pause,
    /// Disks to their overlays.
    Switch,
    /// Until write tracking is armed and the guest runs again; for a plain snapshot until memory is
    /// saved.
    Arm,
    /// Memory flows to the image.
    Drain,
    /// Image, metadata.
    Finish,
    /// After a failure.
    Undo,
}

/// Who wants to know how far a snapshot is. Called on the thread that takes it, without a lock
/// held: what takes long inside the pause makes the pause longer.
pub trait Observer {
    /// A phase begins.
    fn phase(&mut self, phase: Phase) {
        let _ = phase;
    }

    /// Something has happened.
    fn event(&mut self, event: &Event) {
        let _ = event;
    }

    /// The guest runs again after a pause of so long: just before the instant, or in the undo.
    fn resumed(&mut self, paused: Duration) {
        let _ = paused;
    }

    /// How often to be told of progress; not at all, unless it says so: QEMU must be asked for it.
    fn interval(&self) -> Option<Duration> {
        None
    }
}

/// Nobody.
impl Observer for () {}

/// What a snapshot took.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    phases: [Duration; Phase::Undo as usize + 1],
    /// The whole call.
    pub total: Duration,
    /// From the call to the instant.
    pub instant: Option<Duration>,
    /// The guest's pause; by its own time stamps, or by our clock.
    pub paused: Option<(Duration, PauseSource)>,
    /// How long QEMU set the background snapshot up, to whole milliseconds: it touches all of the
    /// guest's memory.
    pub setup: Duration,
    /// The guest ran meanwhile.
    pub started_early: bool,
    /// Tries to begin while the guest ran that came too late; see
    /// [`EarlyStart`](super::EarlyStart).
    pub lost: u32,
    /// What they have paused the guest for, in all.
    pub lost_pause: Duration,
    /// Size of the memory image.
    pub memory_image_bytes: u64,
    /// How many were switched.
    pub disks: usize,
}

/// Whose clock a pause was measured by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PauseSource {
    /// QEMU's, in its STOP and RESUME events.
    Events,
    /// Ours, around the commands.
    Commands,
}

impl Stats {
    /// What one phase took.
    pub fn phase(&self, phase: Phase) -> Duration {
        self.phases[phase as usize]
    }
}

/// Tells the observer, and keeps the figures.
pub struct Clock<'a> {
    observer: &'a mut dyn Observer,
    started: Duration,
    phase: Phase,
    entered: Duration,
    /// Since when the guest is paused by us, or is being.
    pausing: Option<Duration>,
    /// It is known to stand.
    stands: bool,
    /// As it was told last.
    flow: Flow,
    pub stats: Stats,
}

impl<'a> Clock<'a> {
    pub fn start(observer: &'a mut dyn Observer) -> Clock<'a> {
        let now = now();
        observer.phase(Phase::Validate);
        let (phase, flow, stats) = (Phase::Validate, Flow::default(), Stats::default());
        Clock {
            observer,
            started: now,
            phase,
            entered: now,
            pausing: None,
            stands: false,
            flow,
            stats,
        }
    }

    pub fn enter(&mut self, phase: Phase) {
        self.leave();
        self.phase = phase;
        self.observer.phase(phase);
        if phase == Phase::Pause {
            self.pausing = Some(now());
        }
    }

    /// The phase.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// For how long the guest has been paused by us so far.
    pub fn pause_so_far(&self) -> Duration {
        self.pausing.map_or(Duration::ZERO, |since| now() - since)
    }

    /// The vCPUs have stopped.
    pub fn paused(&mut self) {
        self.stands = true;
        self.notify(EventKind::Paused, Flow::default());
    }

    /// The disks are on their overlays.
    pub fn switched(&mut self) {
        self.notify(EventKind::Switched, Flow::default());
    }

    /// The pause, if there was one, is over; and how long it was, where QEMU tells.
    pub fn resumed(&mut self, by_events: Option<Duration>) {
        let Some(since) = self.pausing.take() else { return };
        let by_commands = self.stands.then(|| (now() - since, PauseSource::Commands));
        self.stats.paused = by_events.map(|paused| (paused, PauseSource::Events)).or(by_commands);
        if let Some((paused, _)) = self.stats.paused {
            self.observer.resumed(paused);
        }
    }

    /// The pause was for nothing, and is over.
    pub fn lost(&mut self) {
        self.stats.lost += 1;
        self.stats.lost_pause += self.pausing.take().map_or(Duration::ZERO, |since| now() - since);
    }

    /// The instant has passed.
    pub fn instant(&mut self, flow: Flow) {
        self.stats.instant = Some(now() - self.started);
        self.flow = flow;
        self.notify(EventKind::Instant, flow);
    }

    /// The snapshot has ended. Its last event, which nobody has been told of yet, and its figures.
    pub fn stop<T>(mut self, result: &Result<T>) -> (Event, Stats) {
        self.leave();
        self.stats.total = self.entered - self.started;
        let (done, total) = (self.stats.memory_image_bytes, self.stats.memory_image_bytes);
        let last = match result {
            Ok(_) => self.event(EventKind::Complete, Flow { done, total, ..Flow::default() }),
            Err(error) => self.event(EventKind::Failed(Error::number(error)), Flow::default()),
        };
        (last, self.stats)
    }

    fn notify(&mut self, kind: EventKind, flow: Flow) {
        let event = self.event(kind, flow);
        self.observer.event(&event);
    }

    fn event(&self, kind: EventKind, flow: Flow) -> Event {
        let time = now();
        let over = || self.stats.paused.map_or(Duration::ZERO, |(paused, _)| paused);
        let pausing = self.pausing.filter(|_| self.stands);
        Event { kind, time, paused: pausing.map_or_else(over, |since| time - since), flow }
    }

    fn leave(&mut self) {
        let now = now();
        self.stats.phases[self.phase as usize] += now - self.entered;
        self.entered = now;
    }
}

impl FlowObserver for Clock<'_> {
    fn interval(&self) -> Option<Duration> {
        self.observer.interval()
    }

    fn flow(&self) -> Flow {
        self.flow
    }

    fn progress(&mut self, flow: Flow) {
        self.flow = flow;
        self.notify(EventKind::Progress, flow);
    }
}
