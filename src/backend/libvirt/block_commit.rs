// SPDX-License-Identifier: LGPL-2.1-or-later

//! Merges images that a running domain has open, by libvirt's block commit.
//!
//! A merge may take hours. It is waited for as long as it makes progress, but each call of libvirt
//! has a deadline of its own.

use std::time::Duration;

use super::call::{CallError, Caller, Retry};
use crate::backend::guest::DEFAULT_TIMEOUT;
use crate::backend::images::{Id, id};
use crate::backend::progress::{Progress, STALLED};
use crate::deadline::Deadline;
use crate::error::{Code, Error};
use crate::libvirt::{Domain, VirResult, block};
use crate::model::domain::domain_disks;

/// The timeout for starting a merge. libvirt itself waits half as long for another client's job,
/// and then refuses the merge.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// Which images of a disk are merged, into which.
#[derive(Clone, Debug)]
pub struct BlockCommit {
    /// The disk.
    pub target: String,
    /// The image that the others are merged into, as libvirt names it; `None`: the lowest, or, with
    /// `shallow`, the next one below.
    pub base: Option<String>,
    /// The topmost of the others, as libvirt names it; `None`: the active one.
    pub top: Option<String>,
    /// The identity of the topmost one.
    pub top_id: Id,
    /// The topmost one is active: the domain writes to it, and is switched to the base in the end.
    pub active: bool,
    /// The base is the next image below.
    pub shallow: bool,
}

/// A merge that failed.
#[derive(Debug)]
pub struct MergeFailure {
    /// The reason.
    pub error: Error,
    /// The merge may have changed something.
    pub begun: bool,
    /// The domain may have been switched to the base, and may have written to it since.
    pub may_have_pivoted: bool,
}

/// The state of a merge.
enum MergeState {
    /// It is under way: how much is done, and how much there is.
    UnderWay((u64, u64)),
    /// The images have the same content, and the domain can be switched to the base.
    Ready,
    /// There is no block job.
    Ended,
}

impl BlockCommit {
    /// Merges the images. `step` names the operation in errors.
    pub fn run(&self, caller: &mut Caller, step: &str) -> Result<(), MergeFailure> {
        let failed =
            |error, may_have_pivoted| MergeFailure { error, begun: true, may_have_pivoted };
        self.start(caller, step)?;
        let mut progress = Progress::new(STALLED);
        let mut pivoting = false;
        loop {
            let seen = match self.query(caller) {
                Ok(MergeState::Ended) => break,
                Ok(MergeState::Ready) if !pivoting => {
                    pivoting = true;
                    match self.pivot(caller) {
                        Ok(()) => break,
                        // libvirt is switching the domain, for which it gets the whole time anew.
                        Err((CallError::Late, _)) => {
                            progress = Progress::new(STALLED);
                            None
                        }
                        Err((error, given_up)) => {
                            return Err(failed(error.into_error(step), !given_up));
                        }
                    }
                }
                Ok(MergeState::Ready) => None,
                Ok(MergeState::UnderWay(seen)) => Some(seen),
                // Another client makes libvirt wait. The merge may go on meanwhile.
                Err(error) if error.is_late() => None,
                Err(error) => return Err(failed(error.into_error(step), pivoting)),
            };
            if !progress.wait(seen) {
                return Err(failed(self.give_up(caller, step), pivoting));
            }
        }
        if self.is_on_top(caller).map_err(|error| failed(error.into_error(step), pivoting))? {
            let message = format!(
                "{step}: QEMU's block job failed (libvirt's log of the domain has the reason)"
            );
            return Err(failed(Error::new(Code::OperationFailed, message), pivoting));
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
        started.map_err(|error| {
            // A call without an answer may have been carried out.
            let begun = !matches!(error, CallError::Refused(_));
            MergeFailure { error: error.into_error(step), begun, may_have_pivoted: false }
        })
    }

    fn query(&self, caller: &mut Caller) -> Result<MergeState, CallError> {
        let (target, active) = (self.target.clone(), self.active);
        self.call(caller, Retry::Safe, move |domain| {
            let Some(seen) = domain.block_job(&target)? else { return Ok(MergeState::Ended) };
            if !active {
                return Ok(MergeState::UnderWay(seen));
            }
            let disks = domain_disks(&domain.xml(0)?)?;
            let ready = disks.iter().any(|disk| disk.target == target && disk.job_ready);
            Ok(if ready { MergeState::Ready } else { MergeState::UnderWay(seen) })
        })
    }

    /// Switches the domain to the base. If that fails, also returns whether the job was given up
    /// instead. Else the domain may have been switched, and have ended since.
    fn pivot(&self, caller: &mut Caller) -> Result<(), (CallError, bool)> {
        self.end(caller, block::ABORT_PIVOT).map_err(|error| {
            let is_refused = matches!(error, CallError::Refused(_));
            let given_up = is_refused && self.end(caller, 0).is_ok();
            (error, given_up)
        })
    }

    /// Ends a job that makes no progress. Returns the error for the caller.
    fn give_up(&self, caller: &mut Caller, step: &str) -> Error {
        let error = |end: &str| {
            let message = format!("{step}: QEMU's block job makes no progress{end}");
            Error::new(Code::OperationTimeout, message)
        };
        match self.end(caller, 0) {
            Ok(()) => error("; it was ended"),
            Err(end_error) => error("").and(
                end_error
                    .into_error("ending it failed")
                    .and(format!("end it by `virsh blockjob DOMAIN '{}' --abort`", self.target)),
            ),
        }
    }

    fn end(&self, caller: &mut Caller, flags: u32) -> Result<(), CallError> {
        let target = self.target.clone();
        self.call(caller, Retry::Never, move |domain| domain.block_job_abort(&target, flags))
    }

    /// Whether the disk is still on the topmost of the images that were to be merged. A disk that
    /// was detached counts as such: the end of its merge was not observed.
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
        retry: Retry,
        call: impl Fn(&Domain) -> VirResult<T> + Clone + Send + 'static,
    ) -> Result<T, CallError> {
        caller.call(Deadline::after(DEFAULT_TIMEOUT), retry, call)
    }
}
