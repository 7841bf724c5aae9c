// SPDX-License-Identifier: LGPL-2.1-or-later

//! Protects a thread from pthread_cancel().
//!
//! pthread_cancel() unwinds the stack of the thread that it ends. Rust functions on that stack
//! would abort the process. So a thread of the caller's is not cancelled while it is in the
//! library, not even in a callback of the caller's. The request stays pending, and the thread ends
//! at its next cancellation point after the call.

use std::ffi::c_int;
use std::marker::PhantomData;

unsafe extern "C" {
    fn pthread_setcancelstate(state: c_int, before: *mut c_int) -> c_int;
}

/// `PTHREAD_CANCEL_DISABLE`, in glibc and in musl.
const DISABLE: c_int = 1;

/// As long as it lives, its thread is not cancelled.
#[derive(Debug)]
pub struct Uncancelled {
    before: c_int,
    /// It must be dropped by the same thread.
    _of_this_thread: PhantomData<*const ()>,
}

impl Uncancelled {
    /// Protects this thread until the returned value is dropped.
    pub fn enter() -> Uncancelled {
        let mut before = DISABLE;
        // SAFETY: `before` is live for the call.
        unsafe { pthread_setcancelstate(DISABLE, &raw mut before) };
        Uncancelled { before, _of_this_thread: PhantomData }
    }
}

impl Drop for Uncancelled {
    fn drop(&mut self) {
        let mut replaced = 0;
        // SAFETY: `replaced` is live for the call, and `before` is a state that this function has
        // returned.
        unsafe { pthread_setcancelstate(self.before, &raw mut replaced) };
    }
}
