// SPDX-License-Identifier: LGPL-2.1-or-later

//! Cancels an operation from another thread.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use crate::error::{Error, Result, fail};

/// A request to cancel an operation.
#[derive(Debug)]
pub struct Cancel {
    requested: AtomicBool,
    event: OwnedFd,
}

impl Cancel {
    /// A new one, which is not requested.
    pub fn new() -> Result<Cancel> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| Error::system("cannot create an eventfd", error))?;
        Ok(Cancel { requested: AtomicBool::new(false), event })
    }

    /// Requests that the operation end.
    pub fn request(&self) {
        self.requested.store(true, Ordering::Release);
        // This fails only at the eventfd's highest count, and then it is readable already.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }

    /// Returns an error once it is requested.
    pub fn check(&self) -> Result<()> {
        if self.requested.load(Ordering::Acquire) {
            fail!(OperationAborted, "the snapshot was cancelled");
        }
        Ok(())
    }

    /// Waits for this time. Returns an error as soon as it is requested.
    pub fn wait(&self, time: Duration) -> Result<()> {
        self.poll(&mut [PollFd::new(&self.event, PollFlags::IN)], time).map(drop)
    }

    /// Waits until the descriptor is readable, at most for this time. Returns whether it is
    /// readable; an error as soon as the cancel is requested.
    pub fn wait_readable(&self, fd: BorrowedFd, time: Duration) -> Result<bool> {
        self.poll(
            &mut [
                PollFd::new(&self.event, PollFlags::IN),
                PollFd::from_borrowed_fd(fd, PollFlags::IN),
            ],
            time,
        )
    }

    /// Waits until one of `fds` after the first is readable. The first must be that of `event`.
    fn poll(&self, fds: &mut [PollFd], time: Duration) -> Result<bool> {
        let end = Instant::now() + time;
        loop {
            self.check()?;
            let left = end.saturating_duration_since(Instant::now());
            match poll(fds, Some(&timeout(left))) {
                Ok(0) => return Ok(false),
                Ok(_) if fds[1..].iter().any(|fd| !fd.revents().is_empty()) => return Ok(true),
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(Error::system("cannot wait", errno)),
            }
        }
    }

    /// Becomes readable when the cancel is requested.
    pub fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// A timeout for `poll`.
pub fn timeout(time: Duration) -> Timespec {
    Timespec { tv_sec: time.as_secs() as i64, tv_nsec: time.subsec_nanos().into() }
}
