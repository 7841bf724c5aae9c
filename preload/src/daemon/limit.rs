// SPDX-License-Identifier: LGPL-2.1-or-later

//! The job limit: how many snapshots are taken at once. Each uses one of the daemon's workers until
//! it is complete. If they used all workers, the daemon could not answer any client.

use std::sync::atomic::{AtomicUsize, Ordering};

use instantsnap_core::error::{Error, Result};

/// `VIR_ERR_RESOURCE_BUSY`.
const RESOURCE_BUSY: i32 = 87;

static RUNNING: AtomicUsize = AtomicUsize::new(0);

/// A job within the limit.
#[derive(Debug)]
pub struct Job;

impl Job {
    /// Begins a job, or returns an error if `max_jobs` jobs are under way.
    pub fn begin(max_jobs: usize) -> Result<Job> {
        let next = |running: usize| (running < max_jobs).then_some(running + 1);
        match RUNNING.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next) {
            Ok(_) => Ok(Job),
            Err(running) => Err(Error::of_libvirt(
                RESOURCE_BUSY,
                format!(
                    "{running} instant snapshots are being taken by this daemon, and no more than \
                     {max_jobs} may be at once: try again when one has ended, or set \
                     INSTANTSNAP_MAX_SNAPSHOTS in the daemon's environment, below its max_workers"
                ),
            )),
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        RUNNING.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Whether this is [`Job::begin`]'s error.
pub fn is_refusal(error: &Error) -> bool {
    error.number() == RESOURCE_BUSY
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_so_many_and_each_is_free_again_when_it_is_dropped() {
        let first = Job::begin(2).unwrap();
        let second = Job::begin(2).unwrap();
        assert!(is_refusal(&Job::begin(2).unwrap_err()));
        drop(first);
        drop((Job::begin(2).unwrap(), second));
        assert!(Job::begin(0).is_err());
    }
}
