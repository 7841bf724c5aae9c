// SPDX-License-Identifier: LGPL-2.1-or-later

//! Merging images that a running domain has open, by libvirt's block commit.
//!
//! A merge may take hours: it is waited for as long as it makes progress. Each call of libvirt on
//! the way has a deadline of its own.

use std::time::Duration;

use super::call::{CallError, Caller, Retry};
use crate::backend::guest::DEFAULT_TIMEOUT;
use crate::backend::images::{Id, id};
use crate::backend::progress::{Progress, STALLED};
use crate::deadline::Deadline;
use crate::error::{Code, Error};
use crate::libvirt::{Domain, VirResult, block};
use crate::model::domain::domain_disks;

/// libvirt itself waits half as long for another client's job, and then refuses the merge.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// Which images of a disk become one.
#[derive(Clone, Debug)]
pub struct BlockCommit {
    /// The disk.
    pub target: String,
    /// The image that takes in the others, as libvirt calls it; `None` is the lowest, or, with
    /// `shallow`, the one below.
    pub base: Option<String>,
    /// The uppermost of the others, as libvirt calls it; `None` is the one that is written.
    pub top: Option<String>,
    /// The same one.
    pub top_id: Id,
    /// The domain writes to it, and is put on the base in the end.
    pub active: bool,
    /// Into the next image only.
    pub shallow: bool,
}

/// A merge that failed.
#[derive(Debug)]
pub struct MergeFailure {
    /// Why.
    pub error: Error,
    /// It may have changed something.
    pub begun: bool,
}

/// How a merge is.
enum Look {
    /// Of so much so much is done.
    UnderWay((u64, u64)),
    /// The images have the same content, and the domain can be put on the base.
    Ready,
    /// There is no block job.
    Ended,
}

impl BlockCommit {
    /// Merges them. `step` says what for.
    pub fn run(&self, caller: &mut Caller, step: &str) -> Result<(), MergeFailure> {
        let begun = |error| MergeFailure { error, begun: true };
        self.start(caller, step)?;
        let mut progress = Progress::new(STALLED);
        let mut pivoting = false;
        loop {
            let seen = match self.look(caller) {
                Ok(Look::Ended) => break,
                Ok(Look::Ready) if !pivoting => match self.pivot(caller) {
                    Ok(()) => break,
                    // It is being done, and has its own time for that.
                    Err(CallError::Late) => {
                        pivoting = true;
                        progress = Progress::new(STALLED);
                        None
                    }
                    Err(trouble) => return Err(begun(trouble.into_error(step))),
                },
                Ok(Look::Ready) => None,
                Ok(Look::UnderWay(seen)) => Some(seen),
                // Another client has libvirt wait, and the merge may go on all the same.
                Err(trouble) if trouble.is_late() => None,
                Err(trouble) => return Err(begun(trouble.into_error(step))),
            };
            if !progress.wait(seen) {
                return Err(begun(self.give_up(caller, step)));
            }
        }
        if self.is_on_top(caller).map_err(|trouble| begun(trouble.into_error(step)))? {
            let message = format!(
                "{step}: QEMU's block job failed (libvirt's log of the domain has the reason)"
            );
            return Err(begun(Error::new(Code::OperationFailed, message)));
        }
        Ok(())
    }

    fn start(&self, caller: &mut Caller, step: &str) -> Result<(), MergeFailure> {
        let active = if self.active { block::COMMIT_ACTIVE } else { 0 };
        let flags = active | if self.shallow { block::COMMIT_SHALLOW } else { 0 };
        let BlockCommit { target, base, top, .. } = self.clone();
        let started = caller.call(Deadline::after(START_TIMEOUT), Retry::Never, move |domain| {
            domain.block_commit(&target, base.as_deref(), top.as_deref(), flags)
        });
        started.map_err(|trouble| {
            // What was not answered may have been done.
            let begun = !matches!(trouble, CallError::Refused(_));
            MergeFailure { error: trouble.into_error(step), begun }
        })
    }

    fn look(&self, caller: &mut Caller) -> Result<Look, CallError> {
        let (target, active) = (self.target.clone(), self.active);
        self.call(caller, Retry::Safe, move |domain| {
            let Some(seen) = domain.block_job(&target)? else { return Ok(Look::Ended) };
            if !active {
                return Ok(Look::UnderWay(seen));
            }
            let disks = domain_disks(&domain.xml(0)?)?;
            let ready = disks.iter().any(|disk| disk.target == target && disk.job_ready);
            Ok(if ready { Look::Ready } else { Look::UnderWay(seen) })
        })
    }

    fn pivot(&self, caller: &mut Caller) -> Result<(), CallError> {
        let pivoted = self.end(caller, block::ABORT_PIVOT);
        if matches!(pivoted, Err(CallError::Refused(_))) {
            let _ = self.end(caller, 0);
        }
        pivoted
    }

    /// Ends a job that makes no progress. What the caller must know.
    fn give_up(&self, caller: &mut Caller, step: &str) -> Error {
        let error = |end: &str| {
            let message = format!("{step}: QEMU's block job makes no progress{end}");
            Error::new(Code::OperationTimeout, message)
        };
        match self.end(caller, 0) {
            Ok(()) => error("; it was ended"),
            Err(left) => error("").and(
                left.into_error("ending it failed")
                    .and(format!("end it by `virsh blockjob DOMAIN '{}' --abort`", self.target)),
            ),
        }
    }

    fn end(&self, caller: &mut Caller, flags: u32) -> Result<(), CallError> {
        let target = self.target.clone();
        self.call(caller, Retry::Never, move |domain| domain.block_job_abort(&target, flags))
    }

    /// Whether the disk is still on the uppermost of the images that were to be merged. A disk that
    /// has gone from the domain counts as being there: nobody has seen its merge come to its end.
    fn is_on_top(&self, caller: &mut Caller) -> Result<bool, CallError> {
        let BlockCommit { target, top_id, .. } = self.clone();
        self.call(caller, Retry::Safe, move |domain| {
            let disks = domain_disks(&domain.xml(0)?)?;
            let disk = disks.iter().find(|disk| disk.target == target);
            Ok(disk.is_none_or(|disk| disk.layers().iter().any(|layer| id(layer) == top_id)))
        })
    }

    fn call<T: Send + 'static>(
        &self,
        caller: &mut Caller,
        again: Retry,
        call: impl Fn(&Domain) -> VirResult<T> + Clone + Send + 'static,
    ) -> Result<T, CallError> {
        caller.call(Deadline::after(DEFAULT_TIMEOUT), again, call)
    }
}
