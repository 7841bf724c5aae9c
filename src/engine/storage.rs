// SPDX-License-Identifier: LGPL-2.1-or-later

//! The storage hook: the caller's code snapshots disks that QEMU does not, while the guest is
//! paused.
//!
//! The caller's code can take any time, but the guest must not wait for it for ever. So the hook
//! runs on a thread of its own. When its time has passed, or the snapshot is cancelled, the guest
//! is resumed and everything else is undone at once. A snapshot that the hook makes nevertheless is
//! undone when the hook has returned.

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

/// A hook's answer: its result, or the reason why it failed.
pub type Answer<T> = std::result::Result<T, String>;

/// The caller's storage.
pub trait StorageHook: Send + Sync {
    /// Snapshots the storage of the disks, while the guest is paused. If it fails, it must leave
    /// nothing behind.
    fn snapshot(&self, call: &StorageCall) -> Answer<()>;

    /// Removes the storage snapshot that [`StorageHook::snapshot`] has made: the snapshot of the
    /// guest has failed, or was deleted.
    fn undo(&self, call: &StorageCall) {
        let _ = call;
    }

    /// Returns the image that a new QEMU has to use for each of the disks, in their order.
    fn revert(&self, call: &StorageCall) -> Answer<Vec<PathBuf>>;

    /// How long [`StorageHook::snapshot`] may take, within the limit of the pause.
    fn deadline(&self) -> Option<Duration> {
        None
    }
}

/// The arguments of a call of the hook.
#[derive(Clone, Debug)]
pub struct StorageCall {
    /// The name of the snapshot.
    pub snapshot: String,
    /// The disks that are left to the hook.
    pub disks: Vec<ManualDisk>,
    /// How long the guest has been paused so far.
    pub paused: Duration,
    /// How long the hook may take.
    pub left: Duration,
}

impl StorageCall {
    /// The call for a snapshot that is recorded.
    pub fn of(record: &Record) -> StorageCall {
        StorageCall {
            snapshot: record.name.clone(),
            disks: record.manual.clone(),
            paused: Duration::ZERO,
            left: Duration::ZERO,
        }
    }

    /// The part of a message like "of disks 'vdb', 'vdc' for snapshot 's'".
    pub fn subject(&self) -> String {
        let names: Vec<_> = self.disks.iter().map(|disk| format!("'{}'", disk.name)).collect();
        let disks = if names.len() == 1 { "disk" } else { "disks" };
        format!("of {disks} {} for snapshot '{}'", names.join(", "), self.snapshot)
    }
}

/// A call of the hook for a snapshot, which runs or has returned.
pub struct Called {
    hook: Arc<dyn StorageHook>,
    call: Arc<StorageCall>,
    /// Readable once the hook has returned.
    returned: Arc<OwnedFd>,
    thread: Option<JoinHandle<Answer<()>>>,
    answer: Answer<()>,
}

impl Called {
    /// Starts a thread that writes the host's dirty pages of the disks out, and then calls the
    /// hook. The hook's time includes the writing.
    pub fn begin(
        hook: Arc<dyn StorageHook>,
        call: StorageCall,
        unflushed: Unflushed,
    ) -> Result<Called> {
        let returned = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let returned =
            Arc::new(returned.map_err(|error| Error::system("cannot create an eventfd", error))?);
        let call = Arc::new(call);
        let thread = sys::spawn_quiet("instantsnap", {
            let (hook, call, returned) =
                (Arc::clone(&hook), Arc::clone(&call), Arc::clone(&returned));
            move || {
                let snapshot = || unflushed.sync().and_then(|()| hook.snapshot(&call));
                let answer = catch_unwind(AssertUnwindSafe(snapshot));
                // This fails only at the eventfd's highest count.
                let _ = rustix::io::write(&*returned, &1u64.to_ne_bytes());
                answer.unwrap_or_else(|_| Err("it panicked".into()))
            }
        })?;
        Ok(Called { hook, call, returned, thread: Some(thread), answer: Ok(()) })
    }

    /// Waits for the hook, at most for its time.
    pub fn wait(&mut self, cancel: &Cancel) -> Result<()> {
        if !cancel.wait_readable(self.returned.as_fd(), self.call.left)? {
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

    /// Waits until the hook has returned, and makes it undo its snapshot. A hook that failed has
    /// left nothing to undo.
    pub fn undo(mut self) -> Result<()> {
        if self.answer().is_ok()
            && catch_unwind(AssertUnwindSafe(|| self.hook.undo(&self.call))).is_err()
        {
            let step = format!(
                "the storage hook panicked while it undid its snapshot {}",
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
