// SPDX-License-Identifier: LGPL-2.1-or-later

//! The per-domain job queue. Clients can ask at once for reverts and deletes of one domain's
//! snapshots. These run one after another, as libvirt's own do by the domain's job.

use std::collections::BTreeSet;
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use instantsnap_core::error::{Result, fail};
use instantsnap_core::sys;

/// The domains that have a job under way.
static BUSY: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
static ENDED: Condvar = Condvar::new();

/// A job on a domain. The next job waits until it is dropped.
#[derive(Debug)]
pub struct Job {
    domain: String,
}

impl Job {
    /// Begins a job as soon as no other is under way on this domain. Returns an error after the
    /// timeout.
    pub fn begin(domain: &str, timeout: Duration) -> Result<Job> {
        let is_busy = |busy: &mut BTreeSet<String>| busy.contains(domain);
        let waited = ENDED.wait_timeout_while(sys::lock(&BUSY), timeout, is_busy);
        let (mut busy, waited) = waited.unwrap_or_else(std::sync::PoisonError::into_inner);
        if waited.timed_out() {
            fail!(
                OperationTimeout,
                "another client's revert or delete of a snapshot of this domain has not ended in \
                 {} s",
                timeout.as_secs()
            );
        }
        busy.insert(domain.to_owned());
        Ok(Job { domain: domain.to_owned() })
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        sys::lock(&BUSY).remove(&self.domain);
        ENDED.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_domain_is_one_callers_at_a_time_and_the_next_gets_it_when_it_is_free() {
        let first = Job::begin("a", Duration::ZERO).unwrap();
        Job::begin("b", Duration::ZERO).unwrap();
        assert!(Job::begin("a", Duration::ZERO).is_err());
        let second = std::thread::spawn(|| Job::begin("a", Duration::from_secs(60)).map(drop));
        drop(first);
        second.join().unwrap().unwrap();
    }
}
