// SPDX-License-Identifier: LGPL-2.1-or-later

//! The last error of each thread.

use std::cell::RefCell;
use std::ffi::CString;
use std::ptr;

use super::abi::instantsnap_error;
use crate::error::{DOMAIN, Error};

struct LastError {
    raw: instantsnap_error,
    /// The string that `raw` points to.
    message: CString,
}

thread_local! {
    /// C gets the address of the box's content, so it must not move until the next error.
    static LAST: RefCell<Box<LastError>> = RefCell::new(boxed(0, CString::default()));
}

fn boxed(code: i32, message: CString) -> Box<LastError> {
    let mut last = Box::new(LastError {
        raw: instantsnap_error { code, domain: DOMAIN, message: ptr::null() },
        message,
    });
    last.raw.message = last.message.as_ptr();
    last
}

/// The error of a thread that is ending, whose [`LAST`] is gone already.
struct Nothing(instantsnap_error);

// SAFETY: it is never changed, and its pointer is to a constant.
unsafe impl Sync for Nothing {}

static NOTHING: Nothing =
    Nothing(instantsnap_error { code: 0, domain: DOMAIN, message: c"".as_ptr() });

/// Makes an error this thread's last one.
pub fn set(error: Error) {
    // Messages contain texts of QEMU and the system, which may contain a NUL.
    let message = CString::new(error.message.replace('\0', "\\0")).unwrap_or_default();
    let _ = LAST.try_with(|last| *last.borrow_mut() = boxed(error.number(), message));
}

/// The error of this thread; valid until its next one.
pub fn get() -> *const instantsnap_error {
    LAST.try_with(|last| &raw const last.borrow().raw).unwrap_or(&raw const NOTHING.0)
}
