// SPDX-License-Identifier: LGPL-2.1-or-later

//! The programs that run guests, behind two traits: the only part in which the backends differ.
//!
//! A [`Connector`] is a guest that was opened. It hands out a [`Guest`], which holds the guest
//! exclusively for one operation. The engine does everything else, and uses only these two traits.

mod busy;
pub mod driver;
pub mod exclusive;
mod guest;
pub mod images;
pub mod libvirt;
pub mod locks;
mod open_images;
pub mod overlay_file;
mod progress;
pub mod qmp;
pub mod revert_file;
mod shared_memory;
pub mod write_access;

pub use busy::is_block_of;
pub use driver::DriverConnector;
pub use guest::{
    Capabilities, Connector, DEFAULT_TIMEOUT, Description, Guest, Liveness, MakeRecoveryCommands,
    MergeCommands, MonitorOverlay, Place, RecoveryChannel, RecoveryCommand, RecoveryCommands,
    Reserved, SnapshotList, Survey,
};
pub use libvirt::LibvirtConnector;
pub use qmp::QmpConnector;
pub use shared_memory::find_other_writer;
