//! When which phase began, and what each took.

use std::time::{Duration, Instant};

/// A phase of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Flags, XML, the guest's state and abilities.
    Validate,
    /// Disks, names, the domain's XML.
    Plan,
    /// Overlays, memory image, pipe, capability.
    Prepare,
    /// vCPUs are being stopped.
    Pause,
    /// Disks to their overlays.
    Switch,
    /// Until write tracking is armed and the guest runs again; for a plain snapshot until memory is saved.
    Arm,
    /// Memory flows to the image.
    Drain,
    /// Image, metadata.
    Finish,
    /// After a failure.
    Undo,
}

/// Who wants to know how far a snapshot is. Called on the thread that takes it, without a lock held: what takes long
/// inside the pause makes the pause longer.
pub trait Observer {
    /// A phase begins.
    fn phase(&mut self, phase: Phase) {
        let _ = phase;
    }

    /// The instant has passed, and the guest runs if it ran: it may be changed now.
    fn instant(&mut self) {}
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
    pub paused: Option<(Duration, By)>,
    /// Size of the memory image.
    pub memory_image_bytes: u64,
    /// How many were switched.
    pub disks: usize,
}

/// Whose clock a pause was measured by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
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
    started: Instant,
    phase: Phase,
    entered: Instant,
    pub stats: Stats,
}

impl<'a> Clock<'a> {
    pub fn start(observer: &'a mut dyn Observer) -> Clock<'a> {
        let now = Instant::now();
        observer.phase(Phase::Validate);
        Clock { observer, started: now, phase: Phase::Validate, entered: now, stats: Stats::default() }
    }

    pub fn enter(&mut self, phase: Phase) {
        self.leave();
        self.phase = phase;
        self.observer.phase(phase);
    }

    pub fn instant(&mut self) {
        self.stats.instant = Some(self.started.elapsed());
        self.observer.instant();
    }

    pub fn stop(mut self) -> Stats {
        self.leave();
        self.stats.total = self.entered - self.started;
        self.stats
    }

    fn leave(&mut self) {
        let now = Instant::now();
        self.stats.phases[self.phase as usize] += now - self.entered;
        self.entered = now;
    }
}
