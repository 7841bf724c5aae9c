// SPDX-License-Identifier: LGPL-2.1-or-later

//! The operation that a handle has under way, on the caller's thread or on a job's.

use std::sync::{Arc, Mutex};

use super::clock::{Clock, Observer, Stats};
use super::create::{self, Created};
use super::event::Event;
use super::options::Options;
use crate::backend::{Connector, SnapshotList};
use crate::cancel::Cancel;
use crate::error::{Result, fail};
use crate::image::Format;
use crate::model::flags::CreateFlags;
use crate::sys::lock;

/// The state of a handle. The handle's operation shares it, and can outlive the handle.
pub struct Opened {
    pub connector: Arc<dyn Connector>,
    /// The options of operations that begin later.
    pub options: Mutex<Options>,
    /// Cancels the snapshot that is being taken.
    pub cancel: Mutex<Option<Arc<Cancel>>>,
    /// The statistics of the last snapshot.
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

/// The one operation that a handle can have under way. The next one can begin when it is dropped.
pub struct Operation {
    opened: Arc<Opened>,
    cancel: Arc<Cancel>,
}

/// The result of an operation.
pub struct Taken {
    pub result: Result<Created>,
    /// The last event, which the caller has to report to the observer.
    pub last: Event,
    pub stats: Stats,
}

impl Operation {
    /// Begins an operation. It is an error if one is under way.
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

    /// Cancels the operation.
    pub fn cancel(&self) -> &Arc<Cancel> {
        &self.cancel
    }

    /// The list of the guest's snapshots.
    pub fn snapshot_list(&self) -> &dyn SnapshotList {
        self.opened.connector.snapshot_list()
    }

    /// Takes the snapshot. If the flags break a rule, it fails, and that is reported to the
    /// observer like any other failure. `format` is that of the memory image, if it is not the
    /// default.
    pub fn take(
        &self,
        xml: &str,
        flags: Result<CreateFlags>,
        format: Option<Format>,
        observer: &mut dyn Observer,
    ) -> Taken {
        let mut clock = Clock::start(observer);
        let mut options = lock(&self.opened.options).clone();
        options.image_format = format.or(options.image_format);
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
