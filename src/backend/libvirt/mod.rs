// SPDX-License-Identifier: LGPL-2.1-or-later

//! The backend for a stock libvirt. The library is a client of the daemon that runs the domain.
//!
//! libvirt does everything that it can do, so that its own view of the domain stays true: it pauses
//! and resumes the domain, switches the disks and merges them back, and records the snapshot. Only
//! the background snapshot, and what belongs to it, goes to QEMU through the monitor passthrough:
//! libvirt has no function for it.

mod adopt;
mod block_commit;
mod call;
mod connector;
mod drives;
mod ended;
pub mod forget;
mod guest;
mod journals;
mod lease;
mod managed_domain;
mod managed_snapshot;
mod opened;
mod overlays;
mod recovery;
mod session;
pub mod snapshot_def;
mod snapshot_tree;
mod survey;
pub mod volumes;

pub use self::block_commit::{BlockCommit, MergeFailure};
pub use self::call::CallError;
pub use self::managed_domain::{ManagedDomain, OtherDomain};
pub use self::managed_snapshot::ManagedSnapshot;
pub use self::opened::LibvirtConnector;
pub use self::snapshot_tree::SnapshotTree;
