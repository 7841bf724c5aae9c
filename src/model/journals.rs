// SPDX-License-Identifier: LGPL-2.1-or-later

//! The durable journals of one guest's snapshots.

use super::store::Store;
use crate::error::Result;
use crate::sys;

/// The journals of one guest's snapshots, in a directory.
#[derive(Clone, Debug)]
pub struct Journals {
    /// The directory.
    pub store: Store,
    /// The only one that is the guest's. `None`: all are.
    only: Option<String>,
}

impl Journals {
    /// The journals in the state directory of one guest.
    pub fn all(store: Store) -> Journals {
        Journals { store, only: None }
    }

    /// The journal of this name, in a directory that other guests have theirs in too.
    pub fn one(store: Store, name: String) -> Journals {
        Journals { store, only: Some(name) }
    }

    /// Whether no other guest has one of them.
    pub fn are_own(&self) -> bool {
        self.only.is_some()
    }

    /// The names of those that exist: their snapshots are being taken, or were interrupted.
    pub fn names(&self) -> Result<Vec<String>> {
        match &self.only {
            None => self.store.journals(),
            // A file of another user is no journal.
            Some(name) => {
                let is_there = sys::open_trusted(&self.store.journal_path(name)).is_ok();
                Ok(is_there.then(|| name.clone()).into_iter().collect())
            }
        }
    }
}
