// SPDX-License-Identifier: LGPL-2.1-or-later

//! QMP: a socket client, typed commands, events.
//!
//! [`Monitor`] is QEMU's monitor over a Unix socket. The [`commands`] work with any implementation
//! of [`Execute`], so that a backend that uses libvirt's or a driver's monitor has the same
//! commands.

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
