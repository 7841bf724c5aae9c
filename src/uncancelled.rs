// SPDX-License-Identifier: LGPL-2.1-or-later

//! A thread that is not cancelled.
//!
//! pthread_cancel() unwinds the stack of the thread that it ends, which Rust's functions cannot be
//! part of: the process would be aborted. So a thread of the caller's is not cancelled while it is
//! in the library, callbacks of the caller's included; the request stays pending, and is carried
//! out at the thread's next cancellation point after the call.

use std::ffi::c_int;
use std::marker::PhantomData;

unsafe extern "C" {
    fn pthread_setcancelstate(state: c_int, before: *mut c_int) -> c_int;
}

/// `PTHREAD_CANCEL_DISABLE`, of glibc and of musl.
const DISABLE: c_int = 1;

/// As long as it lives, its thread is not cancelled.
#[derive(Debug)]
pub struct Uncancelled {
    before: c_int,
    /// It is of its thread.
    _here: PhantomData<*const ()>,
}

impl Uncancelled {
    /// This thread, from here on.
    pub fn enter() -> Uncancelled {
        let mut before = DISABLE;
        // SAFETY: `before` is live for the call.
        unsafe { pthread_setcancelstate(DISABLE, &raw mut before) };
        Uncancelled { before, _here: PhantomData }
    }
}

impl Drop for Uncancelled {
    fn drop(&mut self) {
        let mut ours = 0;
        // SAFETY: `ours` is live for the call, and the other is a state that this function has
        // given.
        unsafe { pthread_setcancelstate(self.before, &raw mut ours) };
    }
}
