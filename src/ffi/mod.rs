//! The C API: convert, call, convert back, and nothing else.
//!
//! One convention for everything that crosses. [`boundary`] keeps panics in and errors for the thread;
//! [`text`] is the one way to take a string, [`Registry`] the one way to take a handle, [`view`] the one way to read a structure
//! of the caller's, and [`fill`] to fill one. What each function promises is written in `include/instantsnap.h`.
//!
//! | C type                    | Rust type                | owned by                                    |
//! |---------------------------|--------------------------|---------------------------------------------|
//! | `instantsnap_guest *`     | `engine::Handle`         | the caller, until `instantsnap_close`       |
//! | `instantsnap_job *`       | `engine::Job`            | the caller, until `instantsnap_job_free`    |
//! | `instantsnap_snapshot *`  | `native::Snapshot`       | the caller, until `instantsnap_snapshot_free` |
//! | `instantsnap_revert_plan *` | `native::Plan`         | the caller, until `instantsnap_revert_plan_free` |
//! | `char *` returned         | `CString`                | the caller, until `instantsnap_free_string` |
//! | `const char *` returned   | `CString` in its object  | that object                                 |

pub mod abi;
pub mod client;
pub mod driver;
mod handles;
mod inside;
pub mod job;
mod last_error;
pub mod libvirt;
pub mod native;
pub mod storage;

use std::ffi::{CStr, CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::error::{Code, Error, Result, fail};
use crate::uncancelled::Uncancelled;
use handles::Registry;

/// The header as bindgen reads it.
#[allow(missing_docs, non_camel_case_types, non_upper_case_globals, non_snake_case, dead_code, clippy::all)]
pub mod header {
    include!(concat!(env!("OUT_DIR"), "/bindings.rs"));
}

/// Runs the body of a C function. Errors are kept for the thread, a panic becomes one, and `failed` is returned for both.
fn boundary<T>(failed: T, body: impl FnOnce() -> Result<T>) -> T {
    let _uncancelled = Uncancelled::enter();
    let error = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(value)) => return value,
        Ok(Err(error)) => error,
        Err(panic) => defect(&*panic),
    };
    last_error::set(error);
    failed
}

/// A panic as an error.
fn defect(panic: &dyn std::any::Any) -> Error {
    let what = panic.downcast_ref::<&str>().copied().map(str::to_owned);
    let what = what.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
    Error::new(Code::InternalError, format!("a defect of instantsnap, please report it: {what}"))
}

/// A string argument.
///
/// # Safety
/// `pointer` is NULL or points to a NUL-terminated string that outlives `'a`.
unsafe fn text<'a>(what: &str, pointer: *const c_char) -> Result<&'a str> {
    // SAFETY: the caller's promise is this function's.
    match unsafe { optional_text(what, pointer) }? {
        Some(text) => Ok(text),
        None => fail!(InvalidArg, "{what} must not be NULL"),
    }
}

/// A string argument that may be NULL.
///
/// # Safety
/// As for [`text`].
unsafe fn optional_text<'a>(what: &str, pointer: *const c_char) -> Result<Option<&'a str>> {
    if pointer.is_null() {
        return Ok(None);
    }
    // SAFETY: not NULL, and NUL-terminated by the caller's promise.
    match unsafe { CStr::from_ptr(pointer) }.to_str() {
        Ok(text) => Ok(Some(text)),
        Err(_) => fail!(InvalidArg, "{what} is not UTF-8"),
    }
}

/// What is in a string that a callback has made for us, which is freed.
///
/// # Safety
/// `string` is NULL, or NUL-terminated, of malloc()'s, and nobody else's.
unsafe fn take_bytes(string: *mut c_char) -> Option<Vec<u8>> {
    if string.is_null() {
        return None;
    }
    // SAFETY: by the caller's promise; it is copied before it is freed, and not used after.
    unsafe {
        let bytes = CStr::from_ptr(string).to_bytes().to_vec();
        libc::free(string.cast());
        Some(bytes)
    }
}

/// A string for C. What we return is made of XML and paths, in which there is no NUL.
fn c_string(text: impl Into<Vec<u8>>) -> Result<CString> {
    CString::new(text).map_err(|_| Error::new(Code::InternalError, "a string holds a NUL"))
}

/// Fills a structure of the caller's, whose first field is the size that the caller knows it by. Fields that are not
/// there yet, or any more, are left out or zeroed.
///
/// # Safety
/// `to` is NULL or valid for reads and writes of as many bytes as its first field says, and of that field at least. `T` is
/// `repr(C)`, begins with a `usize`, and `value` is initialised throughout, padding included (it has none).
unsafe fn fill<T: Copy>(what: &str, to: *mut T, value: T) -> Result<()> {
    // SAFETY: by the caller's promise.
    let size = unsafe { size(what, to) }?;
    let (head, known) = (size_of::<usize>(), size_of::<T>());
    // SAFETY: `to` is writable for `size` bytes, which is not less than `known`; the two do not overlap, as `value` is ours.
    unsafe {
        let bytes = to.cast::<u8>();
        bytes.add(head).copy_from_nonoverlapping((&raw const value).cast::<u8>().add(head), known - head);
        bytes.add(known).write_bytes(0, size - known);
    }
    Ok(())
}

/// Reads a structure of the caller's, whose first field is the size that the caller knows it by. What is in it beyond what is
/// known here must be zero.
///
/// # Safety
/// `from` is NULL or valid for reads of as many bytes as its first field says, and of that field at least. `T` is `repr(C)`,
/// begins with a `usize`, and its other fields are what the caller has put there.
unsafe fn view<T: Copy>(what: &str, from: *const T) -> Result<T> {
    // SAFETY: by the caller's promise.
    let size = unsafe { size(what, from) }?;
    let known = size_of::<T>();
    // SAFETY: readable for `size` bytes, which is not less than the structure's.
    let beyond = unsafe { std::slice::from_raw_parts(from.cast::<u8>().add(known), size - known) };
    if beyond.iter().any(|byte| *byte != 0) {
        fail!(InvalidArg, "a field of {what} is set that is newer than this version of the library");
    }
    // SAFETY: readable throughout; nothing is assumed of its alignment.
    Ok(unsafe { from.read_unaligned() })
}

/// The size that a structure of the caller's says it has: no less than it is known to have.
///
/// # Safety
/// `structure` is NULL, or its first field can be read, which is a `usize`.
unsafe fn size<T>(what: &str, structure: *const T) -> Result<usize> {
    if structure.is_null() {
        fail!(InvalidArg, "{what} must not be NULL");
    }
    // SAFETY: readable by the caller's promise; nothing is assumed of its alignment.
    let size = unsafe { structure.cast::<usize>().read_unaligned() };
    // So far there is one version of each structure, so none can be smaller.
    if size < size_of::<T>() || size > 64 << 10 {
        fail!(InvalidArg, "{what}->size is {size}, it must be set to the structure's size ({}) first", size_of::<T>());
    }
    Ok(size)
}
