// SPDX-License-Identifier: LGPL-2.1-or-later

//! QEMU's jobs, as we start them: none dismisses itself, so that what became of it can be learnt.

use serde_json::{Value, json};

use crate::backend::guest::DEFAULT_TIMEOUT;
use crate::backend::progress::{Progress, STALLED};
use crate::deadline::Deadline;
use crate::error::{Code, Error, Result, fail};
use crate::monitor::{Command, Execute, Failure};

/// What the ids of all jobs, and of all nodes, begin with that we add.
pub const NODE_PREFIX: &str = "instantsnap-";

/// How far an overlay has been merged into the image below. Once it is, that one is the newer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Merge {
    /// Not at all.
    Not,
    /// QEMU was told to complete it, and has not said yet that it has.
    Completing,
    /// It has.
    Done,
}

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// All can be completed.
    Ready,
    /// All have ended; those that can be are completed.
    Completed,
    /// All have ended, by whatever: they were cancelled.
    Ended,
}

/// Starts to merge an overlay that is active into a node below it.
pub fn start_merge(
    monitor: &mut dyn Execute,
    step: &str,
    job: &str,
    overlay: &str,
    base: &str,
) -> Result<()> {
    let arguments =
        json!({ "job-id": job, "device": overlay, "base-node": base, "auto-dismiss": false });
    monitor
        .run(step, Command::new("block-commit", arguments), Deadline::after(DEFAULT_TIMEOUT))
        .map(drop)
}

/// Waits for jobs, and dismisses those that have ended. `tell` learns how far each has come.
pub fn wait(
    monitor: &mut dyn Execute,
    ids: &[String],
    until: Until,
    mut tell: impl FnMut(&str, Merge),
) -> Result<()> {
    let mut left: Vec<&String> = ids.iter().collect();
    let mut first_error = None;
    let mut progress = Progress::new(STALLED);
    while !left.is_empty() {
        let jobs: Vec<Job> =
            query(monitor)?.into_iter().filter(|job| ids.contains(&job.id)).collect();
        let mut ended = Vec::new();
        let mut ready = 0;
        for &id in &left {
            let Some(job) = jobs.iter().find(|job| job.id == *id) else {
                first_error.get_or_insert(Error::new(
                    Code::OperationFailed,
                    format!("block job '{id}' is gone"),
                ));
                ended.push(id);
                continue;
            };
            match job.status.as_str() {
                "ready" if until == Until::Completed => {
                    tell(id, Merge::Completing);
                    job_command(monitor, "job-complete", id)?;
                }
                "ready" => ready += 1,
                "concluded" if job_command(monitor, "job-dismiss", id)? => {
                    match &job.error {
                        Some(error) => {
                            tell(id, Merge::Not);
                            first_error
                                .get_or_insert(Error::new(Code::OperationFailed, error.clone()));
                        }
                        None => tell(id, Merge::Done),
                    }
                    ended.push(id);
                }
                _ => {}
            }
        }
        left.retain(|id| !ended.contains(id));
        if until == Until::Ended {
            first_error = None;
        }
        if until == Until::Ready && (ready == left.len() || first_error.is_some()) {
            break;
        }
        if !left.is_empty() && !progress.wait(Some(jobs)) {
            for id in &left {
                let _ = job_command(monitor, "job-cancel", id);
            }
            fail!(OperationTimeout, "it makes no progress");
        }
    }
    first_error.map_or(Ok(()), Err)
}

/// Cancels jobs, and waits until they have ended. What they came to is of no interest any more.
pub fn give_up(monitor: &mut dyn Execute, ids: &[String]) -> Result<()> {
    for id in ids {
        job_command(monitor, "job-cancel", id)?;
    }
    wait(monitor, ids, Until::Ended, |_, _| ())
}

/// The jobs of ours that a process left behind which was killed.
pub fn left_over(monitor: &mut dyn Execute) -> Result<Vec<String>> {
    let ids = query(monitor)?.into_iter().map(|job| job.id);
    Ok(ids.filter(|id| id.starts_with(NODE_PREFIX)).collect())
}

/// A job, as far as it matters here.
#[derive(Debug, PartialEq, Eq)]
struct Job {
    id: String,
    status: String,
    error: Option<String>,
    /// Of how much it has done how much.
    progress: [u64; 2],
}

fn query(monitor: &mut dyn Execute) -> Result<Vec<Job>> {
    let command = Command::new("query-jobs", json!({}));
    let jobs =
        monitor.run("cannot ask for block jobs", command, Deadline::after(DEFAULT_TIMEOUT))?;
    let job = |job: &Value| Job {
        id: job["id"].as_str().unwrap_or_default().into(),
        status: job["status"].as_str().unwrap_or_default().into(),
        error: job["error"].as_str().map(str::to_owned),
        progress: ["current-progress", "total-progress"]
            .map(|which| job[which].as_u64().unwrap_or_default()),
    };
    Ok(jobs.as_array().into_iter().flatten().map(job).collect())
}

/// Whether it was done.
fn job_command(monitor: &mut dyn Execute, command: &str, id: &str) -> Result<bool> {
    let step = format!("cannot end block job '{id}' ({command})");
    let command = Command::new(command, json!({ "id": id }));
    match monitor.execute(command, Deadline::after(DEFAULT_TIMEOUT)) {
        Ok(_) => Ok(true),
        // It has moved on since it was asked for; the next look shows where to.
        Err(Failure::Refused(..)) => Ok(false),
        Err(failure) => Err(failure.into_error(&step)),
    }
}
