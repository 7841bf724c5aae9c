// SPDX-License-Identifier: LGPL-2.1-or-later

//! Handles: C holds a number of the type of a pointer. The object is looked up by it; the pointer
//! is never dereferenced.
//!
//! So a NULL, a handle that was closed, and a pointer to another object are errors, not crashes;
//! and if one thread closes an object that another one is using, the object lives until the other
//! one is done. The numbers are odd, as no object's address is, and never used again.

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
    /// An empty registry; `what` is the name of its handles in messages.
    pub const fn new(what: &'static str) -> Registry<T> {
        Registry { what, live: Lazy::new(Mutex::default) }
    }

    /// Adds an object, and returns its handle.
    pub fn add<C>(&self, object: T) -> *mut C {
        static LAST: AtomicUsize = AtomicUsize::new(1 << 20);
        let number = LAST.fetch_add(2, Ordering::Relaxed) | 1;
        self.lock().insert(number, Arc::new(object));
        number as *mut C
    }

    /// The object of a handle.
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

    /// The object of a handle; none if the pointer is not an open handle of this registry.
    pub fn find<C>(&self, handle: *const C) -> Option<Arc<T>> {
        self.lock().get(&(handle as usize)).cloned()
    }

    /// Closes a handle. It is an error if it is not open.
    pub fn remove<C>(&self, handle: *const C) -> Result<()> {
        let object = self.get(handle)?;
        self.lock().remove(&(handle as usize));
        // The object is dropped here, while the registry is not locked.
        drop(object);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<usize, Arc<T>>> {
        sys::lock(&self.live)
    }
}

/// Whether a pointer can be a handle of ours, open or closed. It is no object's address then.
pub fn is_handle<C>(pointer: *const C) -> bool {
    pointer as usize % 2 == 1
}
