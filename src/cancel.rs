// SPDX-License-Identifier: LGPL-2.1-or-later

//! Cancelling an operation from another thread.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

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

    /// Waits so long; an error as soon as it is cancelled.
    pub fn wait(&self, time: Duration) -> Result<()> {
        self.poll(&mut [PollFd::new(&self.event, PollFlags::IN)], time).map(drop)
    }

    /// Waits until the descriptor can be read, so long at most: whether it can. An error as soon as
    /// it is cancelled.
    pub fn wait_readable(&self, fd: BorrowedFd, time: Duration) -> Result<bool> {
        self.poll(
            &mut [
                PollFd::new(&self.event, PollFlags::IN),
                PollFd::from_borrowed_fd(fd, PollFlags::IN),
            ],
            time,
        )
    }

    /// The first descriptor is our own.
    fn poll(&self, fds: &mut [PollFd], time: Duration) -> Result<bool> {
        let until = Instant::now() + time;
        loop {
            self.check()?;
            let left = until.saturating_duration_since(Instant::now());
            match poll(fds, Some(&timeout(left))) {
                Ok(0) => return Ok(false),
                Ok(_) if fds[1..].iter().any(|fd| !fd.revents().is_empty()) => return Ok(true),
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(Error::system("cannot wait", errno)),
            }
        }
    }

    /// Becomes readable when it is cancelled.
    pub fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// As `poll` wants it.
pub fn timeout(time: Duration) -> Timespec {
    Timespec { tv_sec: time.as_secs() as i64, tv_nsec: time.subsec_nanos().into() }
}
