// SPDX-License-Identifier: LGPL-2.1-or-later

//! QMP: a socket client, typed commands, events.
//!
//! [`Monitor`] is QEMU's monitor over a Unix socket. [`commands`] speak through anything that
//! [`Execute`]s, so that a backend whose monitor is somebody else's (libvirt's, a driver's) uses the
//! same commands.

mod client;
mod command;
pub mod commands;
mod events;
#[cfg(test)]
mod generated;
pub mod json;
mod messages;

pub use client::{Monitor, QemuProcess};
pub use command::{Command, Execute, Failure, read_reply};
pub use events::{Event, Events};
