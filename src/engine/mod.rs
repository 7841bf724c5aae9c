//! The phases of a snapshot, their undo, and bringing one back: the same for every way in.
//!
//! [`Handle`] is what the C API and the tests hold: a guest that was opened, with at most one operation under way.

mod cancel;
mod clock;
mod create;
mod guard;
mod load;
mod migration;
mod nvram;
mod reactivate;
mod revert;
mod undo;

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub use cancel::Cancel;
pub use clock::{By, Observer, Phase, Stats};
pub use revert::{RevertDisk, RevertPlan, prepare_revert};

use crate::error::{Result, fail};
use crate::guest::{Connector, QmpConnector};
use crate::snapshot::{Record, Store};
use clock::Clock;

/// For how long a snapshot may pause the guest, unless the caller says otherwise.
const PAUSE_LIMIT: Duration = Duration::from_secs(30);

/// A guest that was opened.
pub struct Handle {
    connector: Box<dyn Connector>,
    pause_limit: Mutex<Duration>,
    /// Of the snapshot that is being taken.
    cancel: Mutex<Option<Arc<Cancel>>>,
    last: Mutex<Option<Stats>>,
}

impl Handle {
    /// Opens a QEMU by its QMP socket.
    pub fn open_qmp(socket: &Path, domain_xml: Option<&str>, state_dir: &Path) -> Result<Handle> {
        Ok(Handle::new(Box::new(QmpConnector::open(socket, domain_xml, state_dir)?)))
    }

    fn new(connector: Box<dyn Connector>) -> Handle {
        Handle { connector, pause_limit: Mutex::new(PAUSE_LIMIT), cancel: Mutex::default(), last: Mutex::default() }
    }

    /// Bounds the pause of snapshots that begin later.
    pub fn set_pause_limit(&self, limit: Duration) {
        *lock(&self.pause_limit) = limit;
    }

    /// Takes a snapshot; returns when it is complete, and recorded unless the flags say otherwise.
    pub fn create(&self, xml: &str, flags: u32, observer: &mut dyn Observer) -> Result<Record> {
        let (cancel, _guard) = self.begin()?;
        let mut clock = Clock::start(observer);
        let limit = *lock(&self.pause_limit);
        let result = create::create(&*self.connector, xml, flags, limit, &cancel, &mut clock);
        *lock(&self.last) = Some(clock.stop());
        result
    }

    /// Cancels the snapshot that is being taken.
    pub fn cancel(&self) -> Result<()> {
        match &*lock(&self.cancel) {
            Some(cancel) => cancel.request(),
            None => fail!(OperationInvalid, "no snapshot of this guest is being taken through this handle"),
        }
        Ok(())
    }

    /// Feeds a snapshot's memory to a QEMU that waits for it.
    pub fn load(&self, name: &str, flags: u32) -> Result<()> {
        load::load(&*self.connector, name, flags)
    }

    /// Figures of the last snapshot taken, or tried.
    pub fn stats(&self) -> Option<Stats> {
        lock(&self.last).clone()
    }

    /// Its snapshots' metadata.
    pub fn store(&self) -> &Store {
        self.connector.store()
    }

    fn begin(&self) -> Result<(Arc<Cancel>, OperationGuard<'_>)> {
        let mut current = lock(&self.cancel);
        if current.is_some() {
            fail!(OperationInvalid, "another snapshot of this guest is being taken: wait for it to end, or cancel it");
        }
        let cancel = Arc::new(Cancel::new()?);
        *current = Some(Arc::clone(&cancel));
        Ok((cancel, OperationGuard(self)))
    }
}

struct OperationGuard<'a>(&'a Handle);

impl Drop for OperationGuard<'_> {
    fn drop(&mut self) {
        *lock(&self.0.cancel) = None;
    }
}

/// What is behind these locks is whole at any time, a panic of its holder included.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
