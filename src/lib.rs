// SPDX-License-Identifier: LGPL-2.1-or-later

//! Full snapshots of running virtual machines, memory and disks, taken at the moment of the call;
//! the guest pauses for milliseconds.
//!
//! The library is a C library: `include/instantsnap.h` is its reference, and [`ffi`] is the thin
//! adapter for it. Each module uses only modules below it:
//!
//! ```text
//! ffi       extern "C": convert, call, convert back
//!  ├ client   the functions for callers that use libvirt's objects and errors
//!  └ engine   the use cases: create, revert, delete, undo, jobs
//!     ├ migration  QEMU's migration, used from outside: settings, stream, arming, early start
//!     │  └ backend   the access to the guest: a stock libvirt, a QMP socket, a driver's callbacks
//!     │     ├ libvirt  libvirt's public functions, found at run time
//!     │     └ monitor  QMP: client, typed commands
//!     ├ model    requests and records: XML, disk plan, state directory
//!     └ image    the memory image: header, and the threads that move QEMU's stream
//! ```
//!
//! All modules below `ffi` are a crate of their own, `src/core.rs`, because `preload/` is made of
//! it too: the library for LD_PRELOAD, with the code for processes that were started with it.
//!
//! `boundary`, `pointers` and `symbols` are for the modules that meet C: the beginning of every
//! function that C calls, the types of pointers that C passes, and functions that are found at run
//! time. All modules use `cancel`, `deadline` and `error`.
//!
//! A snapshot is taken in these steps. Overlays, memory image and pipe are prepared while the guest
//! runs. The guest is stopped. One transaction switches all disks. QEMU's background snapshot is
//! started. As soon as its write tracking is armed, the guest runs again, while its memory of that
//! moment flows into the image.

#![warn(missing_docs)]

pub mod ffi;

pub use instantsnap_core::{
    backend, boundary, client, deadline, engine, error, image, libvirt, model, monitor, pointers,
    symbols, sys,
};
