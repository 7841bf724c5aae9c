// SPDX-License-Identifier: LGPL-2.1-or-later

//! Full snapshots of running virtual machines, memory and disks, taken at the moment of the call;
//! the guest pauses for milliseconds.
//!
//! The library is a C library: `include/instantsnap.h` is its reference, [`ffi`] its thin adapter.
//! Beneath that, arrows point one way:
//!
//! ```text
//! ffi       extern "C": convert, call, convert back
//!  ├ client   what a caller has who knows libvirt's objects and errors
//!  └ engine   the phases of a snapshot, their undo, jobs, bringing one back
//!     ├ migration  QEMU's migration, used from outside: settings, stream, arming, early start
//!     │  └ backend   who runs the guest: a stock libvirt, or the caller, with a QMP socket
//!     │     ├ libvirt  libvirt's public functions, found at run time
//!     │     └ monitor  QMP: client, typed commands
//!     ├ model    what is asked for and recorded: XML, disk plan, state directory
//!     └ image    the memory image: header, and the threads that move QEMU's stream
//! ```
//!
//! All below `ffi` is a crate of its own, `src/core.rs`, because `preload/` is made of it too: the
//! library for LD_PRELOAD, which has all that is there only because a process was started with it.
//!
//! `boundary`, `pointers` and `symbols` are for the floors that meet C: what every function that C
//! calls begins with, what C passes as types, and functions that are found at run time.
//!
//! `cancel`, `deadline` and `error` are below all. A snapshot in one sentence: overlays, memory
//! image and pipe are prepared while the guest runs; the guest is stopped; one transaction switches
//! all disks; QEMU's background snapshot is started and, the moment its write tracking is armed,
//! the guest runs again, while its memory, as it was, flows into the image.

#![warn(missing_docs)]

pub mod ffi;

pub use instantsnap_core::{
    backend, boundary, client, deadline, engine, error, image, libvirt, model, monitor, pointers,
    symbols, sys,
};
