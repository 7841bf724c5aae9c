// SPDX-License-Identifier: LGPL-2.1-or-later

//! Handles: what C holds is a number in a pointer's clothes, and what is behind it is looked up,
//! never dereferenced.
//!
//! So a NULL, a handle that was closed, and a pointer to something else are errors, not crashes;
//! and an object that is being used by one thread while another closes it lives until it is not.
//! The numbers are odd, as no object's address is, and never used again.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use once_cell::sync::Lazy;

use crate::error::{Code, Error, Result};
use crate::sys;

/// The live handles of one type.
pub struct Registry<T> {
    what: &'static str,
    live: Lazy<Mutex<HashMap<usize, Arc<T>>>>,
}

impl<T> Registry<T> {
    /// None so far.
    pub const fn new(what: &'static str) -> Registry<T> {
        Registry { what, live: Lazy::new(Mutex::default) }
    }

    /// Makes a handle.
    pub fn add<C>(&self, object: T) -> *mut C {
        static LAST: AtomicUsize = AtomicUsize::new(1 << 20);
        let number = LAST.fetch_add(2, Ordering::Relaxed) | 1;
        self.lock().insert(number, Arc::new(object));
        number as *mut C
    }

    /// What is behind a handle.
    pub fn get<C>(&self, handle: *const C) -> Result<Arc<T>> {
        self.find(handle).ok_or_else(|| {
            let what = self.what;
            Error::new(
                Code::InvalidArg,
                match handle.is_null() {
                    true => format!("{what} must not be NULL"),
                    false => format!("{what} is not an open handle of this library"),
                },
            )
        })
    }

    /// The same, where it may be somebody else's.
    pub fn find<C>(&self, handle: *const C) -> Option<Arc<T>> {
        self.lock().get(&(handle as usize)).cloned()
    }

    /// Closes a handle; one that is none already is an error.
    pub fn remove<C>(&self, handle: *const C) -> Result<()> {
        let object = self.get(handle)?;
        self.lock().remove(&(handle as usize));
        // Dropped without the lock held.
        drop(object);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<usize, Arc<T>>> {
        sys::lock(&self.live)
    }
}

/// Whether a pointer can be a handle of ours, open or closed, and nobody else's object.
pub fn is_handle<C>(pointer: *const C) -> bool {
    pointer as usize % 2 == 1
}
