// SPDX-License-Identifier: LGPL-2.1-or-later

//! A queue of bytes between two threads, which holds a limited number of them.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::sys::lock;

/// The bytes that are handed over at once, at most.
const CHUNK: usize = 1 << 20;

/// The queue.
#[derive(Debug)]
pub struct ChunkQueue {
    most: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    chunks: VecDeque<Vec<u8>>,
    bytes: usize,
    end: Option<End>,
    has_no_taker: bool,
}

/// How the bytes have ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Whole,
    GivenUp,
}

/// What comes next out of a queue.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    Bytes(Vec<u8>),
    /// Nothing has come for a while.
    Quiet,
    /// All bytes have come.
    End,
    /// What has come and still comes is not wanted.
    GivenUp,
}

impl ChunkQueue {
    /// Makes a queue that takes no more bytes while it holds this many.
    pub fn new(most: usize) -> ChunkQueue {
        ChunkQueue { most, state: Mutex::default(), changed: Condvar::new() }
    }

    /// Adds bytes. Waits as long as the queue is full. Returns false if no thread takes them any
    /// more.
    pub fn add(&self, bytes: &[u8]) -> bool {
        let state = lock(&self.state);
        let is_full = |state: &mut State| state.bytes >= self.most && !state.has_no_taker;
        let mut state =
            self.changed.wait_while(state, is_full).unwrap_or_else(PoisonError::into_inner);
        if state.has_no_taker {
            return false;
        }
        state.bytes += bytes.len();
        match state.chunks.back_mut() {
            Some(last) if last.len() + bytes.len() <= CHUNK => last.extend_from_slice(bytes),
            _ => {
                let mut chunk = Vec::with_capacity(CHUNK.max(bytes.len()));
                chunk.extend_from_slice(bytes);
                state.chunks.push_back(chunk);
            }
        }
        self.changed.notify_all();
        true
    }

    /// Ends the bytes.
    pub fn end(&self) {
        lock(&self.state).end = Some(End::Whole);
        self.changed.notify_all();
    }

    /// Ends the bytes because they are not wanted.
    pub fn give_up(&self) {
        lock(&self.state).end = Some(End::GivenUp);
        self.changed.notify_all();
    }

    /// The side that takes the bytes out. There must be one only.
    pub fn taker(&self) -> Taker<'_> {
        Taker(self)
    }
}

/// Takes the bytes out of a queue. Dropping it tells the other side.
#[derive(Debug)]
pub struct Taker<'a>(&'a ChunkQueue);

impl Taker<'_> {
    /// Takes bytes. Waits for them no longer than this.
    pub fn next(&self, quiet: Duration) -> Next {
        let Taker(queue) = self;
        let is_empty = |state: &mut State| state.chunks.is_empty() && state.end.is_none();
        let waited = queue.changed.wait_timeout_while(lock(&queue.state), quiet, is_empty);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if state.end == Some(End::GivenUp) {
            return Next::GivenUp;
        }
        let Some(chunk) = state.chunks.pop_front() else {
            return if state.end.is_some() { Next::End } else { Next::Quiet };
        };
        state.bytes -= chunk.len();
        queue.changed.notify_all();
        Next::Bytes(chunk)
    }
}

impl Drop for Taker<'_> {
    fn drop(&mut self) {
        lock(&self.0.state).has_no_taker = true;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn bytes_come_out_as_they_went_in_and_never_more_than_the_limit_are_held() {
        const MOST: usize = 3 << 20;
        let queue = ChunkQueue::new(MOST);
        let piece = |number: usize| vec![number as u8; 1 + number * 7919 % (2 << 20)];
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for number in 0..100 {
                    assert!(queue.add(&piece(number)));
                    assert!(lock(&queue.state).bytes < MOST + (2 << 20) + 1);
                }
                queue.end();
            });
            let taker = queue.taker();
            let mut out = Vec::new();
            loop {
                match taker.next(LONG) {
                    Next::Bytes(bytes) => out.extend(bytes),
                    other => {
                        assert_eq!(other, Next::End);
                        break;
                    }
                }
            }
            assert!(out == (0..100).flat_map(piece).collect::<Vec<_>>());
        });
    }

    #[test]
    fn a_side_that_ends_is_told_to_the_other_one() {
        let queue = ChunkQueue::new(1);
        let taker = queue.taker();
        assert_eq!(taker.next(Duration::ZERO), Next::Quiet);
        assert!(queue.add(b"one"));
        std::thread::scope(|scope| {
            // This waits, because the queue is full.
            let added = scope.spawn(|| queue.add(b"two"));
            drop(taker);
            assert!(!added.join().unwrap());
        });
        queue.give_up();
        assert_eq!(queue.taker().next(LONG), Next::GivenUp);
    }
}
