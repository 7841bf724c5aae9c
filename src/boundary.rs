// SPDX-License-Identifier: LGPL-2.1-or-later

//! The boundary between C and Rust: the first line of every `extern "C"` function.
//!
//! [`boundary`] runs the body of such a function: the thread is not cancelled meanwhile, a panic
//! becomes an error, and an error goes to the sink that the function names.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

use crate::error::{Code, Error, Result};
use crate::uncancelled::Uncancelled;

#[cfg(panic = "abort")]
compile_error!(
    "instantsnap must be built with panic = \"unwind\": it turns panics into errors where C calls \
     it, and a guest that is paused is resumed as the stack unwinds"
);

/// A type that a C function returns.
pub trait Returned {
    /// The value that means an error.
    const FAILED: Self;
}

impl Returned for () {
    const FAILED: () = ();
}

impl Returned for i32 {
    const FAILED: i32 = -1;
}

impl Returned for usize {
    const FAILED: usize = 0;
}

impl<T> Returned for *const T {
    const FAILED: *const T = ptr::null();
}

impl<T> Returned for *mut T {
    const FAILED: *mut T = ptr::null_mut();
}

/// Runs the body of a C function. Passes its error to `sink`; a panic becomes an error.
pub fn boundary<T: Returned>(sink: impl FnOnce(Error), body: impl FnOnce() -> Result<T>) -> T {
    let _uncancelled = Uncancelled::enter();
    let error = match caught(body) {
        Ok(value) => return value,
        Err(error) => error,
    };
    // A panic of the sink cannot be reported anywhere.
    let _ = caught(|| {
        sink(error);
        Ok(())
    });
    T::FAILED
}

/// Runs `body`, and turns a panic into an error.
pub fn caught<T>(body: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| Err(defect(&*panic)))
}

/// The error of a panic.
fn defect(panic: &dyn Any) -> Error {
    let text = panic.downcast_ref::<&str>().copied().map(str::to_owned);
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
    Error::new(Code::InternalError, format!("a defect of instantsnap, please report it: {text}"))
}
