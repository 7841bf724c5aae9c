// SPDX-License-Identifier: LGPL-2.1-or-later

//! The locks of [`Shared`](super::shared::Shared). The test of its model replaces this module.

pub use std::sync::{Condvar, Mutex, MutexGuard};
