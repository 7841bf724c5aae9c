// SPDX-License-Identifier: LGPL-2.1-or-later

//! All of instantsnap except the C API. It is a crate of its own (`core/Cargo.toml`), because two
//! libraries are made of it: `libinstantsnap.so` adds the C API, and `libinstantsnap-preload.so`
//! the functions of libvirt that it replaces. By itself it exports nothing to C.
//!
//! `src/lib.rs` has the map.

#![warn(missing_docs)]

pub mod backend;
pub mod boundary;
mod cancel;
pub mod client;
pub mod deadline;
pub mod engine;
pub mod error;
pub mod image;
pub mod libvirt;
mod machine_log;
mod migration;
pub mod model;
pub mod monitor;
mod own_file;
pub mod pointers;
mod procfs;
#[cfg(test)]
mod random;
pub mod symbols;
pub mod sys;
mod tool;
mod uncancelled;
