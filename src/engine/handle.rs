// SPDX-License-Identifier: LGPL-2.1-or-later

//! A guest that was opened, and the operations on it.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::clock::{Observer, Stats};
use super::create::Created;
use super::delete;
use super::doctor::{self, Finding};
use super::job::{Job, Returns};
use super::operation::{Opened, Operation, Taken};
use super::options::SparseReader;
use super::page_server::arrival::{self, MemoryProgress};
use super::recover::{self, Next, Recovered};
use super::revert::load::{self, LoadOptions, Loaded};
use super::revert::prepare::{RevertOptions, RevertPlan, prepare_revert_with};
use super::storage::{StorageCall, StorageHook};
use crate::backend::driver::Driver;
use crate::backend::{Connector, DriverConnector, LibvirtConnector, QmpConnector, SnapshotList};
use crate::error::{Result, fail};
use crate::image::Format;
use crate::migration::early_start::EarlyStart;
use crate::model::Store;
use crate::model::flags::{CreateFlags, DeleteFlags, RevertFlags};
use crate::sys::lock;

/// A guest that was opened.
pub struct Handle {
    opened: Arc<Opened>,
}

impl Handle {
    /// Opens a QEMU by its QMP socket.
    pub fn open_qmp(socket: &Path, domain_xml: Option<&str>, state_dir: &Path) -> Result<Handle> {
        Ok(Handle::new(Arc::new(QmpConnector::open(socket, domain_xml, state_dir)?)))
    }

    /// Opens a domain of a stock libvirt.
    pub fn open_libvirt(connector: Arc<LibvirtConnector>) -> Handle {
        Handle::new(connector)
    }

    /// Opens a domain by a driver's callbacks.
    pub fn open_driver(driver: Arc<dyn Driver>) -> Result<Handle> {
        Ok(Handle::new(Arc::new(DriverConnector::open(driver)?)))
    }

    fn new(connector: Arc<dyn Connector>) -> Handle {
        Handle { opened: Arc::new(Opened::new(connector)) }
    }

    /// Limits the pause of snapshots that begin later.
    pub fn set_pause_limit(&self, limit: Duration) {
        lock(&self.opened.options).pause_limit = limit;
    }

    /// Sets the early start of snapshots that begin later.
    pub fn set_early_start(&self, early_start: EarlyStart) {
        lock(&self.opened.options).early_start = early_start;
    }

    /// Whether snapshots that begin later are refused where no watchdog can be started.
    pub fn set_needs_watchdog(&self, needs: bool) {
        lock(&self.opened.options).needs_watchdog = needs;
    }

    /// Sets who reads a sparse memory image in loads that begin later.
    pub fn set_sparse_reader(&self, reader: SparseReader) {
        lock(&self.opened.options).sparse_reader = reader;
    }

    /// Sets the hook that snapshots disks with `snapshot='manual'`, for snapshots that begin later.
    pub fn set_storage_hook(&self, hook: Option<Arc<dyn StorageHook>>) {
        // The old hook may be dropped here, so the lock on the options is released first.
        let _old = std::mem::replace(&mut lock(&self.opened.options).storage, hook);
    }

    /// Takes a snapshot. Returns when it is complete, and recorded unless the flags say otherwise.
    /// If the flags break a rule, that is reported to the observer like any other failure. `format`
    /// is that of the memory image, if it is not the default.
    pub fn create(
        &self,
        xml: &str,
        flags: Result<CreateFlags>,
        format: Option<Format>,
        observer: &mut dyn Observer,
    ) -> Result<Created> {
        let operation = Operation::begin(&self.opened)?;
        let Taken { result, last, .. } = operation.take(xml, flags, format, observer);
        drop(operation);
        observer.event(&last);
        result
    }

    /// Takes a snapshot on a thread of its own.
    pub fn start(
        &self,
        xml: &str,
        flags: Result<CreateFlags>,
        format: Option<Format>,
        listener: Box<dyn Observer + Send>,
        returns: Returns,
    ) -> Result<Job> {
        Job::start(Operation::begin(&self.opened)?, xml, flags, format, listener, returns)
    }

    /// Recovers the guest, if a snapshot of it was interrupted: finishes or undoes it.
    pub fn recover(&self) -> Result<Vec<Recovered>> {
        recover::recover(&*self.opened.connector)
    }

    /// Examines whether instant snapshots of the guest work. Changes nothing.
    pub fn examine(&self) -> Vec<Finding> {
        doctor::examine_guest(&*self.opened.connector)
    }

    /// Cancels the snapshot that is being taken.
    pub fn cancel(&self) -> Result<()> {
        match &*lock(&self.opened.cancel) {
            Some(cancel) => cancel.request(),
            None => fail!(
                OperationInvalid,
                "no snapshot of this guest is being taken through this handle"
            ),
        }
        Ok(())
    }

    /// Restores a snapshot's memory into a QEMU that waits for it.
    pub fn load(&self, name: &str, flags: RevertFlags, options: LoadOptions) -> Result<Loaded> {
        recover::before_operation(&*self.opened.connector, Next::Load(name))?;
        let reader = lock(&self.opened.options).sparse_reader;
        load::load(&*self.opened.connector, name, flags, options, reader)
    }

    /// How far the memory is of a guest that runs already.
    pub fn memory_progress(&self) -> Result<MemoryProgress> {
        arrival::progress(&*self.opened.connector)
    }

    /// Waits until all of the guest's memory is in. Returns whether it is.
    pub fn wait_memory(&self, timeout: Option<Duration>) -> Result<bool> {
        arrival::wait(&*self.opened.connector, timeout)
    }

    /// Reverts the guest to a snapshot. `restart` ends QEMU, and starts a new one that waits for
    /// the snapshot's memory, on the plan's disks.
    pub fn revert(
        &self,
        name: &str,
        flags: RevertFlags,
        restart: impl FnOnce(&RevertPlan) -> Result<()>,
    ) -> Result<()> {
        load::check_flags(flags)?;
        let Some(store) = self.store() else {
            fail!(
                OperationUnsupported,
                "a snapshot that the driver has recorded itself can be reverted to only by the \
                 driver"
            );
        };
        recover::before_operation(&*self.opened.connector, Next::Load(name))?;
        load::check_frozen(&store.read_to_use(name)?, flags)?;
        let storage = lock(&self.opened.options).storage.clone();
        let options = RevertOptions { hook: storage.as_deref(), ..RevertOptions::default() };
        let plan = prepare_revert_with(store.directory(), name, options)?;
        restart(&plan).inspect_err(|_| plan.discard())?;
        self.load(name, flags, LoadOptions::default()).map(drop)
    }

    /// Deletes a snapshot, with its files unless the flags say otherwise.
    pub fn delete(&self, name: &str, flags: DeleteFlags) -> Result<()> {
        recover::before_operation(&*self.opened.connector, Next::Delete(name))?;
        let left = self.left_to_storage(name, flags)?;
        delete::delete(&*self.opened.connector, name, flags)?;
        // The hook comes last: until then the deletion can fail, and be tried again.
        if let Some((storage, call)) = left {
            storage.undo(&call);
        }
        Ok(())
    }

    /// The storage hook that has a part in the snapshot, with the call that makes it remove that.
    /// None where the snapshot has no such part, or its files stay.
    fn left_to_storage(
        &self,
        name: &str,
        flags: DeleteFlags,
    ) -> Result<Option<(Arc<dyn StorageHook>, StorageCall)>> {
        let files_stay = flags.is_metadata_only() || flags.is_children_only();
        let Some(store) = self.store().filter(|_| !files_stay) else { return Ok(None) };
        let call = StorageCall::of(&store.read_to_use(name)?);
        if call.disks.is_empty() {
            return Ok(None);
        }
        let Some(storage) = lock(&self.opened.options).storage.clone() else {
            fail!(
                OperationUnsupported,
                "the snapshot {} was left to a storage hook, which this guest does not have: set \
                 it, or delete the metadata alone (VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY)",
                call.subject()
            );
        };
        Ok(Some((storage, call)))
    }

    /// The statistics of the last snapshot, also of one that failed.
    pub fn stats(&self) -> Option<Stats> {
        lock(&self.opened.last).clone()
    }

    /// The list of the guest's snapshots.
    pub fn snapshot_list(&self) -> &dyn SnapshotList {
        self.opened.connector.snapshot_list()
    }

    /// The state directory; none where the backend records snapshots elsewhere.
    pub fn store(&self) -> Option<&Store> {
        self.opened.connector.store()
    }
}
