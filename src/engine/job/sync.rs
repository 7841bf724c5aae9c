// SPDX-License-Identifier: LGPL-2.1-or-later

//! What [`Shared`](super::shared::Shared) waits with: another one where its model is checked.

pub use std::sync::{Condvar, Mutex, MutexGuard};
