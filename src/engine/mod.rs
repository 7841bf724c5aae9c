// SPDX-License-Identifier: LGPL-2.1-or-later

//! Creates, reverts and deletes snapshots, in the same way for every backend.
//!
//! The C API and the tests hold a [`Handle`]: a guest that was opened, with at most one operation
//! under way. A [`Job`] is an operation on a thread of its own.

mod clock;
mod create;
mod delete;
mod doctor;
mod durable;
mod event;
mod handle;
#[doc(hidden)] // For tests/models/job.rs.
pub mod job;
mod managed;
mod nvram;
mod operation;
mod options;
mod page_server;
mod program;
mod recover;
mod revert;
mod run_program;
mod storage;
mod users;
mod watchdog;

pub use crate::backend::libvirt::ManagedSnapshot;
pub use crate::cancel::Cancel;
pub use crate::migration::Flow;
pub use crate::migration::early_start::EarlyStart;
pub use clock::{Observer, PauseSource, Phase, Stats};
pub use create::Created;
pub use doctor::{Finding, Verdict, doctor_report, examine_host};
pub use event::{Event, EventKind};
pub use handle::Handle;
pub use job::{Info, Job, Returns};
pub use managed::{Operation, delete_managed, hold_unless_it_is_a_step, revert_managed};
pub use options::SparseReader;
pub use page_server::arrival::MemoryProgress;
pub use recover::{Action, Recovered, What, recover_offline, recovery_report};
pub use revert::load::{LoadOptions, Loaded};
pub use revert::memory::MemoryBackend;
pub use revert::prepare::{
    RevertDisk, RevertOptions, RevertPlan, prepare_revert, prepare_revert_with,
};
pub use run_program::run_program;
pub use storage::{Answer, StorageCall, StorageHook};
pub use watchdog::Kind as WatchdogKind;
