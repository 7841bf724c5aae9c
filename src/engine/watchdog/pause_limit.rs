// SPDX-License-Identifier: LGPL-2.1-or-later

//! The limit of the pause, for a caller that is stopped inside it.
//!
//! A caller that runs keeps the limit itself: when the limit has passed, the caller begins no step
//! of the pause any more, and undoes everything. The watchdog's limit passes one second later. If
//! the guest is still paused by then, the caller is stopped (SIGSTOP, a debugger, a frozen cgroup).
//! When such a caller goes on, it finds that its own limit has passed, and a snapshot that was not
//! armed before that fails. So the watchdog can resume the guest. The caller undoes the snapshot
//! when it goes on; if the caller is killed instead, the watchdog undoes it.

use std::ffi::c_int;
use std::time::Duration;

use super::stage::Stage;
use crate::sys::now;

/// How much later the watchdog's limit passes. By then a running caller has noticed that its own
/// limit has passed.
const LATER: Duration = Duration::from_secs(1);
/// The time between two checks whether QEMU has armed write tracking.
const SOON: Duration = Duration::from_millis(20);
/// The time between two tries to resume the guest.
const AGAIN: Duration = Duration::from_secs(1);
/// The number of tries to resume the guest. A daemon that is being restarted can take minutes.
const TRIES: u32 = 300;
/// After a resume that a daemon has carried out, the guest is resumed once more after each of these
/// times: a suspend that the stopped caller had asked for may come later, because libvirt lets a
/// call wait for another one's end for 30 seconds.
const LATE_SUSPEND: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(31)];
/// The watchdog leaves the guest to a caller that runs and undoes the snapshot, but for no longer
/// than this: longer than that caller tries to resume the guest.
const UNDO: Duration = Duration::from_secs(600);

/// Decides when the watchdog resumes the guest in the caller's place.
#[derive(Debug)]
pub struct PauseLimit {
    limit: Option<Duration>,
    due: Option<Duration>,
    /// Whether the caller has paused the guest, and not resumed it.
    paused: bool,
    /// The number of tries that are left.
    left: u32,
    /// Whether the watchdog has resumed the guest in this pause.
    resumed: bool,
    /// Until when the guest is left to a caller that runs.
    left_to_caller: Option<Duration>,
    /// How often a daemon has resumed the guest.
    looks: usize,
}

/// The outcome of a try to resume the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tried {
    /// The guest runs.
    Resumed,
    /// The guest runs, but a daemon may yet carry out a suspend of the caller.
    ResumedForNow,
    /// The guest runs, and must be resumed once more when QEMU has armed.
    UntilArmed,
    /// QEMU has not armed yet, and would overlook the resume.
    TooEarly,
    /// Nothing was tried, because the caller runs, and undoes the snapshot.
    LeftToCaller,
    Failed,
}

impl PauseLimit {
    pub fn new(limit: Option<Duration>) -> PauseLimit {
        PauseLimit {
            limit: limit.map(|limit| limit + LATER),
            due: None,
            paused: false,
            left: 0,
            resumed: false,
            left_to_caller: None,
            looks: 0,
        }
    }

    /// Notes that the snapshot has gone from one stage to another.
    pub fn report(&mut self, before: Stage, stage: Stage) {
        if !stage.is_paused() {
            self.end_pause();
        } else if !before.is_paused() {
            self.begin();
            self.resumed = false;
        }
    }

    fn begin(&mut self) {
        self.due = self.limit.map(|limit| now() + limit);
        (self.left, self.looks) = (TRIES, 0);
        self.paused = true;
    }

    /// Notes that the caller has begun the undo, which resumes the guest. A caller that is stopped
    /// in the undo has the same limit once more.
    pub fn leave_to_caller(&mut self) {
        if self.paused {
            self.begin();
            self.left_to_caller = Some(now() + UNDO);
        }
    }

    /// Whether the guest is left to the caller, if the caller runs.
    pub fn is_left_to_caller(&self) -> bool {
        self.left_to_caller.is_some_and(|end| now() < end)
    }

    /// Notes that the caller has resumed the guest.
    pub fn end_pause(&mut self) {
        self.due = None;
        self.paused = false;
    }

    /// The milliseconds until the limit passes, or until the next try; -1 if there is neither.
    pub fn wait(&self) -> c_int {
        let left = |due: Duration| due.saturating_sub(now()).as_millis() + 1;
        self.due.map_or(-1, |due| left(due).try_into().unwrap_or(c_int::MAX))
    }

    /// Whether the watchdog has to resume the guest now.
    pub fn has_passed(&self) -> bool {
        self.due.is_some_and(|due| due <= now())
    }

    /// Whether the watchdog has resumed the guest in this pause.
    pub fn has_resumed(&self) -> bool {
        self.resumed
    }

    /// Notes the outcome of a try.
    pub fn tried(&mut self, tried: Tried) {
        self.resumed |= matches!(tried, Tried::Resumed | Tried::ResumedForNow | Tried::UntilArmed);
        self.left = self.left.saturating_sub(u32::from(tried == Tried::Failed));
        let wait = match tried {
            Tried::Resumed => None,
            Tried::ResumedForNow => {
                let look = LATE_SUSPEND.get(self.looks).copied();
                self.looks += 1;
                look
            }
            Tried::UntilArmed | Tried::TooEarly => Some(SOON),
            Tried::LeftToCaller => Some(AGAIN),
            Tried::Failed => (self.left > 0).then_some(AGAIN),
        };
        self.due = wait.map(|wait| now() + wait);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_that_of_a_pause_that_the_caller_does_not_end() {
        let mut limit = PauseLimit::new(Some(Duration::ZERO));
        limit.report(Stage::Prepared, Stage::Begun);
        assert_eq!(limit.wait(), -1);
        limit.report(Stage::Begun, Stage::Racing);
        let due = limit.due;
        assert!(limit.wait() > 0);
        limit.report(Stage::Racing, Stage::Migrating);
        assert_eq!(limit.due, due, "it is one pause");
        limit.report(Stage::Migrating, Stage::Draining);
        assert_eq!(limit.wait(), -1);
        limit.leave_to_caller();
        assert_eq!(limit.wait(), -1, "the guest runs");
        let mut unlimited = PauseLimit::new(None);
        unlimited.report(Stage::Prepared, Stage::Paused);
        assert_eq!(unlimited.wait(), -1);
    }

    #[test]
    fn a_caller_that_undoes_has_the_limit_again_until_it_has_resumed_the_guest() {
        let mut limit = PauseLimit::new(Some(Duration::ZERO));
        limit.report(Stage::Prepared, Stage::Paused);
        limit.tried(Tried::Resumed);
        assert_eq!((limit.wait(), limit.is_left_to_caller()), (-1, false));
        limit.leave_to_caller();
        assert!(limit.wait() > 0 && limit.is_left_to_caller());
        limit.end_pause();
        assert_eq!(limit.wait(), -1);
    }

    #[test]
    fn a_daemon_that_suspends_late_is_expected_for_some_time() {
        let mut limit = PauseLimit::new(Some(Duration::ZERO));
        limit.report(Stage::Prepared, Stage::Paused);
        for _ in LATE_SUSPEND {
            limit.tried(Tried::ResumedForNow);
            assert!(limit.wait() > 0 && limit.has_resumed());
        }
        limit.tried(Tried::ResumedForNow);
        assert_eq!(limit.wait(), -1);
    }

    #[test]
    fn a_guest_that_cannot_be_resumed_is_given_up_after_some_tries() {
        let mut limit = PauseLimit::new(Some(Duration::ZERO));
        limit.report(Stage::Prepared, Stage::Paused);
        for _ in 1..TRIES {
            limit.tried(Tried::Failed);
            assert!(limit.wait() > 0);
        }
        limit.tried(Tried::Failed);
        assert_eq!((limit.wait(), limit.has_resumed()), (-1, false));
        limit.report(Stage::Draining, Stage::Migrating);
        limit.tried(Tried::UntilArmed);
        assert!(limit.wait() > 0 && limit.has_resumed());
        limit.tried(Tried::Resumed);
        assert_eq!(limit.wait(), -1);
    }
}
