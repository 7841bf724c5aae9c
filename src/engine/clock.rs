// SPDX-License-Identifier: LGPL-2.1-or-later

//! Measures the phases of a snapshot, and reports them to an observer.

use std::time::Duration;

use super::event::{Event, EventKind};
use super::watchdog;
use crate::error::{Error, Result};
use crate::image::Format;
use crate::migration::{Flow, FlowObserver};
use crate::sys::now;

/// A phase of a snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    /// Checks the flags, the XML, and the guest's state and abilities.
    #[default]
    Validate,
    /// Reads and plans the disks, the names, and the domain's XML.
    Plan,
    /// Makes the overlays, the memory image and the pipe, and changes QEMU's settings.
    Prepare,
    /// Stops the vCPUs.
    Pause,
    /// Switches the disks to their overlays.
    Switch,
    /// Waits until write tracking is armed and the guest runs again; for a non-live snapshot until
    /// memory is saved.
    Arm,
    /// Memory flows to the image.
    Drain,
    /// Completes the image and the metadata.
    Finish,
    /// Puts everything back after a failure.
    Undo,
}

/// Receives the progress of a snapshot. Called on the thread that takes the snapshot, which holds
/// no lock then. A slow call inside the pause makes the pause longer.
pub trait Observer {
    /// A phase begins.
    fn phase(&mut self, phase: Phase) {
        let _ = phase;
    }

    /// Something has happened.
    fn event(&mut self, event: &Event) {
        let _ = event;
    }

    /// The guest runs again, after a pause of `paused`: just before the instant, or in the undo.
    fn resumed(&mut self, paused: Duration) {
        let _ = paused;
    }

    /// How often the observer wants a report of the progress; `None`: never. Each report costs a
    /// query to QEMU.
    fn interval(&self) -> Option<Duration> {
        None
    }
}

/// An observer that ignores everything.
impl Observer for () {}

/// The statistics of a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    phases: [Duration; Phase::Undo as usize + 1],
    /// How long the whole call took.
    pub total: Duration,
    /// The time from the call to the instant.
    pub instant: Option<Duration>,
    /// The guest's pause, and how it was measured.
    pub paused: Option<(Duration, PauseSource)>,
    /// How long QEMU set the background snapshot up, in whole milliseconds: it touches all of the
    /// guest's memory.
    pub setup: Duration,
    /// The setup was an early start: the guest ran meanwhile.
    pub started_early: bool,
    /// The number of early starts whose stop came too late; see [`EarlyStart`](super::EarlyStart).
    pub lost: u32,
    /// How long these have paused the guest, in all.
    pub lost_pause: Duration,
    /// The size of the memory image.
    pub memory_image_bytes: u64,
    /// The format of the memory image, once it is known.
    pub image_format: Option<Format>,
    /// The number of disks that were switched.
    pub disks: usize,
    /// What would have taken over had the caller been killed.
    pub watchdog: watchdog::Kind,
}

/// How a pause was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PauseSource {
    /// By QEMU's clock, in its STOP and RESUME events.
    Events,
    /// By our clock, around the commands.
    Commands,
}

impl Stats {
    /// How long one phase took.
    pub fn phase(&self, phase: Phase) -> Duration {
        self.phases[phase as usize]
    }
}

/// Reports to the observer, and keeps the statistics.
pub struct Clock<'a> {
    observer: &'a mut dyn Observer,
    started: Duration,
    phase: Phase,
    entered: Duration,
    /// When our pause of the guest began.
    pausing: Option<Duration>,
    /// The vCPUs are known to have stopped.
    stopped: bool,
    /// The last report of the progress.
    flow: Flow,
    /// The size of the memory image, of a sparse one that of a raw one: so the progress does not go
    /// back at the end.
    saved: u64,
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
            stopped: false,
            flow,
            saved: 0,
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

    /// The current phase.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// How long we have paused the guest so far.
    pub fn pause_so_far(&self) -> Duration {
        self.pausing.map_or(Duration::ZERO, |since| now() - since)
    }

    /// The vCPUs have stopped.
    pub fn paused(&mut self) {
        self.stopped = true;
        self.notify(EventKind::Paused, Flow::default());
    }

    /// The disks are on their overlays.
    pub fn switched(&mut self) {
        self.notify(EventKind::Switched, Flow::default());
    }

    /// The pause, if there was one, is over. `by_events` is its length by QEMU's events, where
    /// these are known.
    pub fn resumed(&mut self, by_events: Option<Duration>) {
        let Some(since) = self.pausing.take() else { return };
        let by_commands = self.stopped.then(|| (now() - since, PauseSource::Commands));
        self.stats.paused = by_events.map(|paused| (paused, PauseSource::Events)).or(by_commands);
        if let Some((paused, _)) = self.stats.paused {
            self.observer.resumed(paused);
        }
    }

    /// An early start was lost, and its pause is over.
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

    /// All of memory is in the image, which has this format. A raw one is of this size.
    pub fn saved(&mut self, size: u64, format: Format) {
        self.saved = size;
        self.stats.memory_image_bytes = size;
        self.stats.image_format = Some(format);
    }

    /// The snapshot has ended. Returns its last event, which is not reported to the observer yet,
    /// and its statistics.
    pub fn stop<T>(mut self, result: &Result<T>) -> (Event, Stats) {
        self.leave();
        self.stats.total = self.entered - self.started;
        let (done, total) = (self.saved, self.saved);
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
        let whole_pause = || self.stats.paused.map_or(Duration::ZERO, |(paused, _)| paused);
        let pausing = self.pausing.filter(|_| self.stopped);
        Event { kind, time, paused: pausing.map_or_else(whole_pause, |since| time - since), flow }
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
