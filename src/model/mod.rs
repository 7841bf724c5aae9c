// SPDX-License-Identifier: LGPL-2.1-or-later

//! The requests and the records of snapshots: `<domainsnapshot>` and `<domain>` XML, the disk plan,
//! the state directory.
//!
//! Nothing here calls a guest. A backend describes its drives as [`Drive`]s, [`plan`] matches them
//! with the caller's request, and the engine carries the plan out.

pub mod domain;
pub mod drive;
pub mod flags;
pub mod frozen;
pub mod journal;
mod journals;
pub mod lease;
mod memory;
mod names;
pub mod nbd;
pub mod notes;
pub mod nvram;
pub mod plan;
pub mod record;
pub mod request;
pub mod snapshot_writer;
pub mod snapshot_xml;
pub mod store;
pub mod upgrade;
mod validate;
pub mod xml;

pub use domain::Domain;
pub use drive::{Bitmap, Drive, Role};
pub use frozen::Frozen;
pub use journals::Journals;
pub use memory::Memory;
pub use names::{check_name, check_path, generated_names};
pub use notes::{Compared, NotedMemory, Notes};
pub use plan::{DiskPlan, Plan, generated_name, manual, plan};
pub use record::{ManualDisk, Record, RecordedDisk, RecordedNvram, State};
pub use request::{DiskRequest, Location, MemoryRequest, Request};
pub use store::{Reservation, Store};
pub use validate::validate;
