//! Full snapshots of running virtual machines, memory and disks, taken at the moment of the call;
//! the guest pauses for milliseconds.
//!
//! The library is a C library: `include/instantsnap.h` is its reference, [`ffi`] its thin adapter.
//! Beneath that, arrows point one way:
//!
//! ```text
//! ffi       extern "C": convert, call, convert back
//!  └ engine   the phases of a snapshot, their undo, jobs, bringing one back
//!     ├ migration  QEMU's migration, used from outside: settings, stream, arming, early start
//!     │  └ backend   who runs the guest: a stock libvirt, or the caller, with a QMP socket
//!     │     ├ libvirt  libvirt's public functions, found at run time
//!     │     └ monitor  QMP: client, typed commands
//!     ├ model    what is asked for and recorded: XML, disk plan, state directory
//!     └ image    the memory image: header, and the threads that move QEMU's stream
//! ```
//!
//! `boundary`, `pointers` and `symbols` are for the floors that meet C: what every function that C
//! calls begins with, what C passes as types, and functions that are found at run time.
//!
//! `cancel`, `deadline` and `error` are below all. A snapshot in one sentence: overlays, memory
//! image and pipe are prepared while the guest runs; the guest is stopped; one transaction switches
//! all disks; QEMU's background snapshot is started and, the moment its write tracking is armed,
//! the guest runs again, while its memory, as it was, flows into the image.

#![warn(missing_docs)]

pub mod backend;
mod boundary;
mod cancel;
pub mod deadline;
pub mod engine;
pub mod error;
pub mod ffi;
pub mod image;
pub mod libvirt;
mod migration;
pub mod model;
pub mod monitor;
mod own_file;
pub mod pointers;
mod symbols;
mod sys;
mod tool;
mod uncancelled;
