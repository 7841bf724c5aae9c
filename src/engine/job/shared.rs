// SPDX-License-Identifier: LGPL-2.1-or-later

//! The state that a job's thread shares with its callers: the pending news, the signal that is up
//! while there are some, and the job's outcome.
//!
//! The types of `super::sync` are the standard library's, or a model checker's:
//! `tests/models/job.rs` includes this file, and checks all interleavings of the threads. Therefore
//! this file uses nothing of the rest of the crate.

use std::collections::VecDeque;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::sync::{Condvar, Mutex, MutexGuard};

/// An event of a job.
pub trait News: Clone {
    /// Whether the instant has passed with this event, so that callers need not wait for it any
    /// longer.
    fn is_instant(&self) -> bool;

    /// Whether it makes the event before it obsolete.
    fn replaces(&self, earlier: &Self) -> bool;
}

/// Readable while events are pending. Never blocks.
pub trait Signal {
    /// Makes it readable. It can be readable already.
    fn raise(&self);

    /// Makes it unreadable.
    fn lower(&self);
}

/// The shared state, with news of type `N` and an outcome of type `O`.
#[derive(Debug)]
pub struct Shared<N, O, S> {
    state: Mutex<State<N, O>>,
    /// The instant has passed, or the job has ended.
    changed: Condvar,
    signal: S,
}

#[derive(Debug)]
struct State<N, O> {
    news: VecDeque<N>,
    instant: bool,
    outcome: Option<Arc<O>>,
    ended: bool,
}

impl<N: News, O, S: Signal> Shared<N, O, S> {
    /// The state of a job of which there are no news yet. The signal must be down.
    pub fn new(signal: S) -> Shared<N, O, S> {
        let state = State { news: VecDeque::new(), instant: false, outcome: None, ended: false };
        Shared { state: Mutex::new(state), changed: Condvar::new(), signal }
    }

    /// The signal.
    pub fn signal(&self) -> &S {
        &self.signal
    }

    /// Adds an event.
    pub fn publish(&self, news: N) {
        let mut state = self.lock();
        state.instant |= news.is_instant();
        self.push(&mut state, news);
        self.changed.notify_all();
    }

    /// Sets the outcome, before the job ends.
    pub fn decide(&self, outcome: O) {
        self.lock().outcome = Some(Arc::new(outcome));
    }

    /// Marks the job as ended, with its last event. The outcome has been set.
    pub fn end(&self, last: N) {
        let mut state = self.lock();
        state.ended = true;
        self.push(&mut state, last);
        self.changed.notify_all();
    }

    /// Takes the oldest pending event.
    pub fn take(&self) -> Option<N> {
        let mut state = self.lock();
        let taken = state.news.pop_front();
        if state.news.is_empty() {
            // The state is locked here, as it is for `raise`, so that the two cannot overtake each
            // other.
            self.signal.lower();
        }
        taken
    }

    /// The outcome; none before it is set.
    pub fn outcome(&self) -> Option<Arc<O>> {
        self.lock().outcome.clone()
    }

    /// Waits until the instant has passed or the job has ended. Returns whether the instant has
    /// passed.
    pub fn wait_instant(&self) -> bool {
        let mut state = self.lock();
        while !state.instant && !state.ended {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.instant
    }

    /// Waits until the job has ended, at most for `timeout`. Returns whether it has ended.
    pub fn wait_ended(&self, timeout: Option<Duration>) -> bool {
        // A timeout beyond the clock's range means to wait for ever.
        let deadline = timeout.map(|timeout| Instant::now().checked_add(timeout));
        let mut state = self.lock();
        while !state.ended {
            state = match deadline.flatten() {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return false;
                    }
                    self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        true
    }

    fn push(&self, state: &mut State<N, O>, news: N) {
        match state.news.back_mut() {
            Some(last) if news.replaces(last) => *last = news,
            _ => state.news.push_back(news),
        }
        self.signal.raise();
    }

    /// Locks the state. It is consistent even after a panic of a thread that had locked it.
    fn lock(&self) -> MutexGuard<'_, State<N, O>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
