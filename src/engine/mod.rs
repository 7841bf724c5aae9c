//! The phases of a snapshot, their undo, and bringing one back: the same for every way in.
//!
//! [`Handle`] is what the C API and the tests hold: a guest that was opened, with at most one
//! operation under way. A [`Job`] is an operation on a thread of its own.

mod clock;
mod create;
mod durable;
mod event;
mod handle;
mod job;
mod load;
mod nvram;
mod operation;
mod options;
mod revert;
mod storage;
mod watchdog;

pub use crate::cancel::Cancel;
pub use crate::migration::Flow;
pub use crate::migration::early_start::EarlyStart;
pub use clock::{By, Observer, Phase, Stats};
pub use event::{Event, What};
pub use handle::Handle;
pub use job::{Info, Job, Returns};
pub use revert::{RevertDisk, RevertPlan, prepare_revert, prepare_revert_hooked};
pub use storage::{Answer, StorageCall, StorageHook};
