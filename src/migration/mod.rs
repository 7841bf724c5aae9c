//! QEMU's migration, used from outside: the means of saving and loading a guest's memory.

mod arm;
mod backoff;
mod flow;
mod incoming;
mod leftover;
mod maker;
mod names;
pub mod overlap;
mod reactivate;
pub mod run_state;
mod settings;
mod still;
mod stream;
mod warm;
mod work;

pub use self::arm::{wait_armed, wait_resumable};
pub use self::flow::{Flow, FlowObserver};
pub use self::incoming::wait_loaded;
pub use self::names::FD_NAME;
pub use self::reactivate::reactivate_disks;
pub use self::settings::{Mode, Settings};
pub use self::still::Still;
pub use self::stream::Stream;
pub use self::warm::warm;
pub use self::work::Work;
