// SPDX-License-Identifier: LGPL-2.1-or-later

//! The last error of each thread.

use std::cell::RefCell;
use std::ffi::CString;
use std::ptr;

use super::abi::instantsnap_error;
use crate::error::{DOMAIN, Error};

struct LastError {
    shown: instantsnap_error,
    /// What `shown` points to.
    message: CString,
}

thread_local! {
    /// In a box: its address is given out, and stays while the box is replaced by the next error's.
    static LAST: RefCell<Box<LastError>> = RefCell::new(boxed(0, CString::default()));
}

fn boxed(code: i32, message: CString) -> Box<LastError> {
    let mut last = Box::new(LastError {
        shown: instantsnap_error { code, domain: DOMAIN, message: ptr::null() },
        message,
    });
    last.shown.message = last.message.as_ptr();
    last
}

/// What is shown to a thread that is ending, whose own is gone already.
struct Nothing(instantsnap_error);

// SAFETY: it is never changed, and its pointer is to a constant.
unsafe impl Sync for Nothing {}

static NOTHING: Nothing =
    Nothing(instantsnap_error { code: 0, domain: DOMAIN, message: c"".as_ptr() });

/// Keeps an error for this thread.
pub fn set(error: Error) {
    // A message is made of what QEMU and the system say; a NUL in it would be theirs.
    let message = CString::new(error.message.replace('\0', "\\0")).unwrap_or_default();
    let _ = LAST.try_with(|last| *last.borrow_mut() = boxed(error.number(), message));
}

/// The error of this thread; valid until its next one.
pub fn get() -> *const instantsnap_error {
    LAST.try_with(|last| &raw const last.borrow().shown).unwrap_or(&raw const NOTHING.0)
}
