// SPDX-License-Identifier: LGPL-2.1-or-later

//! Disks that QEMU does not snapshot: the caller's storage does, by a hook, while the guest stands
//! still.
//!
//! A hook is the caller's code and takes as long as it takes, and the guest does not wait for it
//! without end. So it runs on a thread of its own. When its time has passed, or the snapshot is
//! cancelled, the guest runs on and everything is undone at once; what the hook may have made all
//! the same is undone when it has come back.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};

use super::durable::Unflushed;
use crate::cancel::Cancel;
use crate::error::{Code, Error, Result, fail};
use crate::model::{ManualDisk, Record};
use crate::sys;

/// What a hook has to say: what it was asked for, or why it could not.
pub type Answer<T> = std::result::Result<T, String>;

/// The caller's storage.
pub trait StorageHook: Send + Sync {
    /// Snapshots the storage of the disks, while the guest stands still. Where it cannot, nothing
    /// of it may be left.
    fn snapshot(&self, call: &StorageCall) -> Answer<()>;

    /// Removes what [`StorageHook::snapshot`] has made: the snapshot of the guest has failed, or
    /// was deleted.
    fn undo(&self, call: &StorageCall) {
        let _ = call;
    }

    /// Says what a new QEMU is to use for each of the disks, in their order.
    fn revert(&self, call: &StorageCall) -> Answer<Vec<PathBuf>>;

    /// How long [`StorageHook::snapshot`] may take, within the limit of the pause.
    fn deadline(&self) -> Option<Duration> {
        None
    }
}

/// What a hook is called for.
#[derive(Clone, Debug)]
pub struct StorageCall {
    /// The name of the snapshot.
    pub snapshot: String,
    /// The disks that are left to the hook.
    pub disks: Vec<ManualDisk>,
    /// For how long the guest has been paused so far.
    pub paused: Duration,
    /// How long the hook may take.
    pub left: Duration,
}

impl StorageCall {
    /// For a snapshot that is recorded.
    pub fn of(record: &Record) -> StorageCall {
        StorageCall {
            snapshot: record.name.clone(),
            disks: record.manual.clone(),
            paused: Duration::ZERO,
            left: Duration::ZERO,
        }
    }

    /// "of disks 'vdb', 'vdc' for snapshot 's'".
    pub fn subject(&self) -> String {
        let names: Vec<_> = self.disks.iter().map(|disk| format!("'{}'", disk.name)).collect();
        let disks = if names.len() == 1 { "disk" } else { "disks" };
        format!("of {disks} {} for snapshot '{}'", names.join(", "), self.snapshot)
    }
}

/// A hook at work on a snapshot, or done with it.
pub struct Called {
    hook: Arc<dyn StorageHook>,
    call: Arc<StorageCall>,
    /// Can be read once the hook has come back.
    back: Arc<OwnedFd>,
    thread: Option<JoinHandle<Answer<()>>>,
    answer: Answer<()>,
}

impl Called {
    /// Calls it, once what the host still has of its disks is written out: within its time, as that
    /// can take some.
    pub fn begin(
        hook: Arc<dyn StorageHook>,
        call: StorageCall,
        unflushed: Unflushed,
    ) -> Result<Called> {
        let back = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let back =
            Arc::new(back.map_err(|error| Error::system("cannot create an eventfd", error))?);
        let call = Arc::new(call);
        let thread = sys::spawn_quiet("instantsnap", {
            let (hook, call, back) = (Arc::clone(&hook), Arc::clone(&call), Arc::clone(&back));
            move || {
                let snapshot = || unflushed.sync().and_then(|()| hook.snapshot(&call));
                let answer = catch_unwind(AssertUnwindSafe(snapshot));
                // It refuses only at its highest count.
                let _ = rustix::io::write(&*back, &1u64.to_ne_bytes());
                answer.unwrap_or_else(|_| Err("it panicked".into()))
            }
        })?;
        Ok(Called { hook, call, back, thread: Some(thread), answer: Ok(()) })
    }

    /// Waits for it as long as it may take.
    pub fn wait(&mut self, cancel: &Cancel) -> Result<()> {
        if !cancel.wait_readable(self.back.as_fd(), self.call.left)? {
            fail!(
                OperationTimeout,
                "the storage hook took longer than {} ms for its snapshot {}: give it more time \
                 (its own deadline, or the pause limit)",
                self.call.left.as_millis(),
                self.call.subject()
            );
        }
        match self.answer().clone() {
            Ok(()) => Ok(()),
            Err(reason) => {
                fail!(
                    OperationFailed,
                    "the storage hook could not make its snapshot {}: {reason}",
                    self.call.subject()
                )
            }
        }
    }

    /// Has undone what it has made, once it is back, which is waited for. One that failed has left
    /// nothing.
    pub fn undo(mut self) -> Result<()> {
        if self.answer().is_ok()
            && catch_unwind(AssertUnwindSafe(|| self.hook.undo(&self.call))).is_err()
        {
            let step = format!(
                "the storage hook panicked when it was to undo its snapshot {}",
                self.call.subject()
            );
            return Err(Error::new(Code::OperationFailed, step));
        }
        Ok(())
    }

    fn answer(&mut self) -> &Answer<()> {
        if let Some(thread) = self.thread.take() {
            self.answer = thread.join().unwrap_or_else(|_| Err("it panicked".into()));
        }
        &self.answer
    }
}

impl fmt::Debug for Called {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.debug_struct("Called").field("call", &self.call).finish_non_exhaustive()
    }
}
