// SPDX-License-Identifier: LGPL-2.1-or-later

//! The C API. Each function converts its arguments, calls the engine, and converts the result.
//!
//! All functions have the same conventions. Each begins with [`boundary`](crate::boundary), which
//! catches panics, and passes errors to the sink that the function names. Pointers are the types of
//! [`pointers`](crate::pointers), which say what C promises, and handles are looked up in a
//! [`Registry`]. `include/instantsnap.h` has the contract of each function; the build compares the
//! prototypes there with those here.
//!
//! | C type                    | Rust type                | owned by                                    |
//! |---------------------------|--------------------------|---------------------------------------------|
//! | `instantsnap_guest *`     | `engine::Handle`         | the caller, until `instantsnap_close`       |
//! | `instantsnap_job *`       | `engine::Job`            | the caller, until `instantsnap_job_free`    |
//! | `instantsnap_snapshot *`  | `native::Snapshot`       | the caller, until `instantsnap_snapshot_free` |
//! | `instantsnap_revert_plan *` | `native::Plan`         | the caller, until `instantsnap_revert_plan_free` |
//! | `char *` returned         | `CString`                | the caller, until `instantsnap_free_string` |
//! | `const char *` returned   | `CString` in its object  | that object                                 |
//! | `const char *` given      | `Text`                   | the caller                                  |
//! | `T *` given, for a result | `Out<T>`                 | the caller                                  |
//! | a structure with its size | `In<T>`, `Fill<T>`       | the caller                                  |

pub mod abi;
pub mod client;
pub mod driver;
mod handles;
pub mod image;
pub mod job;
mod last_error;
pub mod libvirt;
pub mod native;
pub mod revert;
pub mod storage;

use std::ffi::CString;

use crate::error::{Code, Error, Result};
use crate::pointers::Growing;
use handles::Registry;

/// The declarations that bindgen makes of the header.
#[allow(
    missing_docs,
    non_camel_case_types,
    non_upper_case_globals,
    non_snake_case,
    dead_code,
    clippy::all
)]
pub mod header {
    include!(concat!(env!("OUT_DIR"), "/bindings.rs"));
}

/// A string for C. The strings that we return are XML, names and paths, which contain no NUL.
fn c_string(text: impl Into<Vec<u8>>) -> Result<CString> {
    CString::new(text).map_err(|_| Error::new(Code::InternalError, "a string holds a NUL"))
}

/// Implements [`Growing`] for structures that begin with their size.
macro_rules! growing {
    ($($name:ident),+ $(,)?) => {
        $(
            const _: () = assert!(std::mem::offset_of!(abi::$name, size) == 0);
            // SAFETY: `abi::structures!` makes it `repr(C)` and without padding. Its first field is
            // its size, as asserted above. The others are numbers, pointers, and callbacks that can
            // be NULL.
            unsafe impl Growing for abi::$name {}
        )+
    };
}

growing! {
    instantsnap_stats,
    instantsnap_event,
    instantsnap_job_info,
    instantsnap_create_options,
    instantsnap_storage_hook,
    instantsnap_revert_options,
    instantsnap_revert_disk,
    instantsnap_memory_backend,
    instantsnap_load_options,
    instantsnap_load_stats,
    instantsnap_memory_progress,
    instantsnap_driver_ops,
}
