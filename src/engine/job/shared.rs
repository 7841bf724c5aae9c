// SPDX-License-Identifier: LGPL-2.1-or-later

//! The state that a job's thread shares with its callers: the pending news, the signal that is up
//! while there are some, and the job's outcome.
//!
//! The threads lock the state by a [`Guarded`], which is the standard library's or a model checker's:
//! `tests/models/job.rs` checks all interleavings of the threads.

use std::collections::VecDeque;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::sync::{Guarded, Locked};

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
pub struct Shared<N, O, S, G = Locked<State<N, O>>> {
    state: G,
    signal: S,
    of: PhantomData<(N, O)>,
}

/// What is behind the lock.
#[derive(Debug)]
pub struct State<N, O> {
    news: VecDeque<N>,
    instant: bool,
    outcome: Option<Arc<O>>,
    ended: bool,
}

impl<N: News, O, S: Signal, G: Guarded<State<N, O>>> Shared<N, O, S, G> {
    /// The state of a job of which there are no news yet. The signal must be down.
    pub fn new(signal: S) -> Shared<N, O, S, G> {
        let state = State { news: VecDeque::new(), instant: false, outcome: None, ended: false };
        Shared { state: G::new(state), signal, of: PhantomData }
    }

    /// The signal.
    pub fn signal(&self) -> &S {
        &self.signal
    }

    /// Adds an event.
    pub fn publish(&self, news: N) {
        let mut state = self.state.lock();
        state.instant |= news.is_instant();
        self.push(&mut state, news);
        self.state.notify_all();
    }

    /// Sets the outcome, before the job ends.
    pub fn decide(&self, outcome: O) {
        self.state.lock().outcome = Some(Arc::new(outcome));
    }

    /// Marks the job as ended, with its last event. The outcome has been set.
    pub fn end(&self, last: N) {
        let mut state = self.state.lock();
        state.ended = true;
        self.push(&mut state, last);
        self.state.notify_all();
    }

    /// Takes the oldest pending event.
    pub fn take(&self) -> Option<N> {
        let mut state = self.state.lock();
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
        self.state.lock().outcome.clone()
    }

    /// Waits until the instant has passed or the job has ended. Returns whether the instant has
    /// passed.
    pub fn wait_instant(&self) -> bool {
        let mut state = self.state.lock();
        while !state.instant && !state.ended {
            state = self.state.wait(state, None);
        }
        state.instant
    }

    /// Waits until the job has ended, at most for `timeout`. Returns whether it has ended.
    pub fn wait_ended(&self, timeout: Option<Duration>) -> bool {
        // A timeout beyond the clock's range means to wait for ever.
        let deadline = timeout.map(|timeout| Instant::now().checked_add(timeout));
        let mut state = self.state.lock();
        while !state.ended {
            let left = deadline
                .flatten()
                .map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return false;
            }
            state = self.state.wait(state, left);
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
}
