//! Cancelling an operation from another thread.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, eventfd};

use crate::error::{Error, Result, fail};

/// Whether an operation is to end.
#[derive(Debug)]
pub struct Cancel {
    requested: AtomicBool,
    event: OwnedFd,
}

impl Cancel {
    /// Not cancelled.
    pub fn new() -> Result<Cancel> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| Error::system("cannot create an eventfd", error))?;
        Ok(Cancel { requested: AtomicBool::new(false), event })
    }

    /// Cancels.
    pub fn request(&self) {
        self.requested.store(true, Ordering::Release);
        // It refuses only at its highest count: then it is readable, which is all that is wanted.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }

    /// An error once it is cancelled.
    pub fn check(&self) -> Result<()> {
        if self.requested.load(Ordering::Acquire) {
            fail!(OperationAborted, "the snapshot was cancelled");
        }
        Ok(())
    }

    /// Becomes readable when it is cancelled.
    pub fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}
