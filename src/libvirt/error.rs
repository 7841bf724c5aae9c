// SPDX-License-Identifier: LGPL-2.1-or-later

//! libvirt's errors.

use std::ffi::{CString, c_int};
use std::ptr;

use super::table::{Table, virError};
use crate::error::{Code, DOMAIN, Error};
use crate::pointers::Text;

/// An error of libvirt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VirError {
    /// Its `virErrorNumber`.
    pub code: i32,
    /// Its message.
    pub message: String,
}

impl VirError {
    /// The last error of this thread.
    pub fn last(table: &Table) -> VirError {
        // SAFETY: NULL or this thread's error, which no other thread changes; it is copied before
        // the next call.
        match unsafe { (table.virGetLastError)().as_ref() } {
            Some(last) if last.code != 0 => {
                let message =
                    last.message.lossy().unwrap_or_else(|| "libvirt gives no message".into());
                VirError { code: last.code, message }
            }
            _ => VirError {
                code: Code::InternalError as i32,
                message: "libvirt gives no reason".into(),
            },
        }
    }

    /// Whether it has this code.
    pub fn is(&self, code: Code) -> bool {
        self.code == code as i32
    }

    /// The error for a caller; `step` names the step that failed and its object.
    pub fn into_error(self, step: &str) -> Error {
        Error::of_libvirt(self.code, format!("{step}: {}", self.message))
    }
}

impl From<VirError> for Error {
    fn from(error: VirError) -> Error {
        Error::of_libvirt(error.code, error.message)
    }
}

impl From<Error> for VirError {
    fn from(error: Error) -> VirError {
        VirError { code: error.number(), message: error.message }
    }
}

/// Makes an error this thread's last one in libvirt. Returns whether this libvirt supports that.
pub fn set_last(table: &Table, error: &Error) -> bool {
    let Some(set_error) = table.virSetError else { return false };
    const LEVEL_ERROR: c_int = 2;
    let message = CString::new(error.message.replace('\0', "\\0")).unwrap_or_default();
    // In libvirt's own errors the message begins with the text of the code, and str1 is the part
    // that was filled in.
    let mut raw = virError {
        code: error.number(),
        domain: DOMAIN,
        message: Text::from(&message),
        level: LEVEL_ERROR,
        conn: ptr::null_mut(),
        dom: ptr::null_mut(),
        str1: Text::from(&message),
        str2: Text::NULL,
        str3: Text::NULL,
        int1: -1,
        int2: -1,
        net: ptr::null_mut(),
    };
    set_error(&mut raw) == 0
}
