// SPDX-License-Identifier: LGPL-2.1-or-later

//! The operation that a handle has under way, on whatever thread.

use std::sync::{Arc, Mutex};

use super::clock::{Clock, Observer, Stats};
use super::create::{self, Created};
use super::event::Event;
use super::options::Options;
use crate::backend::{Connector, SnapshotList};
use crate::cancel::Cancel;
use crate::error::{Result, fail};
use crate::model::flags::CreateFlags;
use crate::sys::lock;

/// What a handle stands for. Its operation has it too, and can outlive the handle.
pub struct Opened {
    pub connector: Arc<dyn Connector>,
    /// Of operations that begin later.
    pub options: Mutex<Options>,
    /// Of the snapshot that is being taken.
    pub cancel: Mutex<Option<Arc<Cancel>>>,
    /// Of the last one.
    pub last: Mutex<Option<Stats>>,
}

impl Opened {
    pub fn new(connector: Arc<dyn Connector>) -> Opened {
        Opened {
            connector,
            options: Mutex::default(),
            cancel: Mutex::default(),
            last: Mutex::default(),
        }
    }
}

/// The one operation that a handle can have under way; dropping it makes room for the next.
pub struct Operation {
    opened: Arc<Opened>,
    cancel: Arc<Cancel>,
}

/// What an operation came to.
pub struct Taken {
    pub result: Result<Created>,
    /// What is yet to be told to the observer.
    pub last: Event,
    pub stats: Stats,
}

impl Operation {
    /// Begins it; an error where there is one.
    pub fn begin(opened: &Arc<Opened>) -> Result<Operation> {
        let mut current = lock(&opened.cancel);
        if current.is_some() {
            fail!(
                OperationInvalid,
                "another snapshot of this guest is being taken: wait for it to end, or cancel it"
            );
        }
        let cancel = Arc::new(Cancel::new()?);
        *current = Some(Arc::clone(&cancel));
        Ok(Operation { opened: Arc::clone(opened), cancel })
    }

    /// What cancels it.
    pub fn cancel(&self) -> &Arc<Cancel> {
        &self.cancel
    }

    /// The guest's snapshots.
    pub fn snapshot_list(&self) -> &dyn SnapshotList {
        self.opened.connector.snapshot_list()
    }

    /// Takes the snapshot. Flags that break a rule make it one that fails, of which the observer is
    /// told as of any other.
    pub fn take(
        &self,
        xml: &str,
        flags: Result<CreateFlags>,
        observer: &mut dyn Observer,
    ) -> Taken {
        let mut clock = Clock::start(observer);
        let options = lock(&self.opened.options).clone();
        let result = flags.and_then(|flags| {
            let connector = &*self.opened.connector;
            create::create(connector, xml, flags, options, &self.cancel, &mut clock)
        });
        let (last, stats) = clock.stop(&result);
        *lock(&self.opened.last) = Some(stats.clone());
        Taken { result, last, stats }
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        *lock(&self.opened.cancel) = None;
    }
}
