//! How many snapshots are taken at once. Each has one of the daemon's workers to itself until it is
//! complete; with all of them taken, no client of the daemon would be answered.

use std::sync::atomic::{AtomicUsize, Ordering};

use instantsnap_core::error::{Error, Result};

/// `VIR_ERR_RESOURCE_BUSY`.
const RESOURCE_BUSY: i32 = 87;

static TAKEN: AtomicUsize = AtomicUsize::new(0);

/// One snapshot's place.
#[derive(Debug)]
pub struct Slot;

impl Slot {
    /// Takes one of so many; an error where there is none.
    pub fn take(most: usize) -> Result<Slot> {
        let next = |taken: usize| (taken < most).then_some(taken + 1);
        match TAKEN.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next) {
            Ok(_) => Ok(Slot),
            Err(taken) => Err(Error::of_libvirt(
                RESOURCE_BUSY,
                format!(
                    "{taken} instant snapshots are being taken by this daemon, and no more than \
                     {most} may be at once: try again when one has ended, or set \
                     INSTANTSNAP_MAX_SNAPSHOTS in the daemon's environment, below its max_workers"
                ),
            )),
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        TAKEN.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Whether this is [`Slot::take`]'s error.
pub fn is_refusal(error: &Error) -> bool {
    error.number() == RESOURCE_BUSY
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_so_many_and_each_is_free_again_when_it_is_dropped() {
        let first = Slot::take(2).unwrap();
        let second = Slot::take(2).unwrap();
        assert!(is_refusal(&Slot::take(2).unwrap_err()));
        drop(first);
        drop((Slot::take(2).unwrap(), second));
        assert!(Slot::take(0).is_err());
    }
}
