//! What [`Shared`](super::shared::Shared) waits with: another one where its model is checked.

pub use std::sync::{Condvar, Mutex, MutexGuard};
