//! Reverts and deletes of one domain's snapshots, which clients can ask for at once: one after
//! another, as libvirt does it by the domain's job.

use std::collections::BTreeSet;
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use instantsnap_core::error::{Result, fail};
use instantsnap_core::sys;

/// The domains whose turn somebody has.
static TAKEN: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
static GIVEN_BACK: Condvar = Condvar::new();

/// One call's turn with a domain.
#[derive(Debug)]
pub struct Turn {
    domain: String,
}

impl Turn {
    /// Waits for it, so long.
    pub fn wait(domain: &str, patience: Duration) -> Result<Turn> {
        let is_taken = |taken: &mut BTreeSet<String>| taken.contains(domain);
        let waited = GIVEN_BACK.wait_timeout_while(sys::lock(&TAKEN), patience, is_taken);
        let (mut taken, waited) = waited.unwrap_or_else(std::sync::PoisonError::into_inner);
        if waited.timed_out() {
            fail!(
                OperationTimeout,
                "another client's revert or delete of a snapshot of this domain has not ended in \
                 {} s",
                patience.as_secs()
            );
        }
        taken.insert(domain.to_owned());
        Ok(Turn { domain: domain.to_owned() })
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        sys::lock(&TAKEN).remove(&self.domain);
        GIVEN_BACK.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_domain_is_one_callers_at_a_time_and_the_next_gets_it_when_it_is_free() {
        let first = Turn::wait("a", Duration::ZERO).unwrap();
        Turn::wait("b", Duration::ZERO).unwrap();
        assert!(Turn::wait("a", Duration::ZERO).is_err());
        let second = std::thread::spawn(|| Turn::wait("a", Duration::from_secs(60)).map(drop));
        drop(first);
        second.join().unwrap().unwrap();
    }
}
