// SPDX-License-Identifier: LGPL-2.1-or-later

//! What the thread of a job and those who follow it share: the news not taken yet, the signal that
//! says that there are some, and what became of the job.
//!
//! The types of `super::sync` are the standard library's, or a model checker's:
//! `tests/models/job.rs` includes this file, and goes through all the ways in which threads can
//! meet here. It therefore knows nothing of the rest of the crate.

use std::collections::VecDeque;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::sync::{Condvar, Mutex, MutexGuard};

/// Something that happens to a job.
pub trait News: Clone {
    /// The caller need not wait any longer.
    fn is_instant(&self) -> bool;

    /// It makes the one before it obsolete.
    fn replaces(&self, earlier: &Self) -> bool;
}

/// What is up as long as there are news. Neither call blocks.
pub trait Signal {
    /// Puts it up, also where it is.
    fn raise(&self);

    /// Takes it down.
    fn lower(&self);
}

/// News of type `N`, an outcome of type `O`.
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
    /// Nothing has happened. The signal is down.
    pub fn new(signal: S) -> Shared<N, O, S> {
        let state = State { news: VecDeque::new(), instant: false, outcome: None, ended: false };
        Shared { state: Mutex::new(state), changed: Condvar::new(), signal }
    }

    /// The signal.
    pub fn signal(&self) -> &S {
        &self.signal
    }

    /// Something has happened.
    pub fn publish(&self, news: N) {
        let mut state = self.lock();
        state.instant |= news.is_instant();
        self.push(&mut state, news);
        self.changed.notify_all();
    }

    /// What will have become of the job when it has ended is known.
    pub fn decide(&self, outcome: O) {
        self.lock().outcome = Some(Arc::new(outcome));
    }

    /// It has ended, as was decided; these are the last news.
    pub fn end(&self, last: N) {
        let mut state = self.lock();
        state.ended = true;
        self.push(&mut state, last);
        self.changed.notify_all();
    }

    /// The oldest news, once.
    pub fn take(&self) -> Option<N> {
        let mut state = self.lock();
        let taken = state.news.pop_front();
        if state.news.is_empty() {
            // Under the lock, as the raising is, so that the two cannot overtake each other.
            self.signal.lower();
        }
        taken
    }

    /// What has become of it, or will have.
    pub fn outcome(&self) -> Option<Arc<O>> {
        self.lock().outcome.clone()
    }

    /// Waits until the instant has passed or the job has ended: true if it has passed.
    pub fn wait_instant(&self) -> bool {
        let mut state = self.lock();
        while !state.instant && !state.ended {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.instant
    }

    /// Waits until the job has ended, for so long at most, or for ever; whether it has.
    pub fn wait_ended(&self, timeout: Option<Duration>) -> bool {
        // What is beyond the clock's end is for ever.
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

    /// What is behind the lock is whole at any time, a panic of its holder included.
    fn lock(&self) -> MutexGuard<'_, State<N, O>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
