// SPDX-License-Identifier: LGPL-2.1-or-later

//! Reverts to snapshots.
//!
//! A domain of a stock libvirt is reverted by libvirt ([`managed`]); a [`plan`] tells which
//! overlays are unneeded then. For other guests the caller starts a new QEMU on fresh images
//! ([`prepare`]), and then the snapshot's memory is loaded into it ([`load`]).

mod lazy;
pub mod load;
pub mod managed;
pub mod map;
mod mapped_load;
pub mod memory;
pub mod plan;
pub mod prepare;
