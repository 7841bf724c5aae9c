// SPDX-License-Identifier: LGPL-2.1-or-later

//! Reverting to snapshots.
//!
//! A stock libvirt's domain is reverted by libvirt ([`managed`]), by a [`plan`] of what it leaves.
//! Of other guests the caller starts QEMU: on fresh images ([`prepare`]), and then its memory is
//! loaded ([`load`]).

pub mod load;
pub mod managed;
pub mod plan;
pub mod prepare;
