// SPDX-License-Identifier: LGPL-2.1-or-later

//! QEMU's migration, used from outside: the means of saving and loading a guest's memory.

mod arm;
mod backoff;
pub mod early_start;
mod flow;
mod incoming;
mod lazy;
mod leftover;
mod maker;
mod mapped;
mod names;
mod populate;
pub mod post_copy;
mod prefault;
mod reactivate;
pub mod run_state;
mod settings;
mod stream;
mod write_check;

pub use self::arm::{wait_armed, wait_resumable};
pub use self::flow::{Flow, FlowObserver};
pub use self::incoming::{start_incoming, wait_devices, wait_loaded};
pub use self::lazy::{Arrival, Lazy};
pub use self::mapped::PassedImage;
pub use self::names::FD_NAME;
pub use self::populate::PopulateProgress;
pub use self::prefault::prefault;
pub use self::reactivate::reactivate_disks;
pub use self::settings::{Mode, Settings};
pub use self::stream::Stream;
pub use self::write_check::WriteCheck;
