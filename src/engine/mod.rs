//! The phases of a snapshot, their undo, and bringing one back: the same for every way in.
//!
//! [`Handle`] is what the C API and the tests hold: a guest that was opened, with at most one
//! operation under way. A [`Job`] is an operation on a thread of its own.

mod cancel;
mod clock;
mod create;
mod devices;
mod durable;
mod event;
mod handle;
mod job;
mod load;
mod maker;
mod migration;
mod nvram;
mod operation;
mod options;
mod overlap;
mod reactivate;
mod revert;
mod run_state;
mod sizes;
mod still;
mod storage;
mod undo;
mod warm;
mod watchdog;
mod work;

pub use cancel::Cancel;
pub use clock::{By, Observer, Phase, Stats};
pub use event::{Event, Flow, What};
pub use handle::Handle;
pub use job::{Info, Job, Returns};
pub use overlap::Overlap;
pub use revert::{RevertDisk, RevertPlan, prepare_revert, prepare_revert_hooked};
pub use storage::{Answer, StorageCall, StorageDisk, StorageHook};
