// SPDX-License-Identifier: LGPL-2.1-or-later

//! The lock of [`Shared`](super::shared::Shared), for which the test of its model has another one.

use std::ops::DerefMut;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// A value behind a lock. Threads can wait until it changes.
pub trait Guarded<T> {
    /// The locked value.
    type Guard<'a>: DerefMut<Target = T>
    where
        Self: 'a;

    /// Puts a value behind a lock.
    fn new(value: T) -> Self;

    /// Locks the value.
    fn lock(&self) -> Self::Guard<'_>;

    /// Wakes the threads that wait for a change.
    fn notify_all(&self);

    /// Unlocks the value, waits for a change, at most for `timeout`, and locks the value again.
    fn wait<'a>(&'a self, guard: Self::Guard<'a>, timeout: Option<Duration>) -> Self::Guard<'a>;
}

/// The standard library's lock. The value is consistent even after a panic of a thread that had
/// locked it.
#[derive(Debug)]
pub struct Locked<T> {
    value: Mutex<T>,
    changed: Condvar,
}

impl<T> Guarded<T> for Locked<T> {
    type Guard<'a>
        = MutexGuard<'a, T>
    where
        T: 'a;

    fn new(value: T) -> Locked<T> {
        Locked { value: Mutex::new(value), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, T> {
        self.value.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn notify_all(&self) {
        self.changed.notify_all();
    }

    fn wait<'a>(
        &'a self,
        guard: MutexGuard<'a, T>,
        timeout: Option<Duration>,
    ) -> MutexGuard<'a, T> {
        match timeout {
            None => self.changed.wait(guard).unwrap_or_else(PoisonError::into_inner),
            Some(timeout) => {
                let waited = self.changed.wait_timeout(guard, timeout);
                waited.unwrap_or_else(PoisonError::into_inner).0
            }
        }
    }
}
