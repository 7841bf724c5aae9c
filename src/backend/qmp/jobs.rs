// SPDX-License-Identifier: LGPL-2.1-or-later

//! QEMU's jobs. They are started without `auto-dismiss`, so that their results can be read.

use serde_json::{Value, json};

use crate::backend::guest::DEFAULT_TIMEOUT;
use crate::backend::progress::{Progress, STALLED};
use crate::deadline::Deadline;
use crate::error::{Code, Error, Result, fail};
use crate::monitor::{Command, Execute, Failure};

/// The prefix of the ids of all jobs and nodes that the library adds.
pub const NODE_PREFIX: &str = "instantsnap-";

/// The progress of the merge of an overlay into the image below. After the merge, the image is the
/// newer one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Merge {
    /// It has not been merged.
    Not,
    /// QEMU was told to complete the merge, and has not reported yet that it has.
    Completing,
    /// QEMU has completed the merge.
    Done,
}

/// The state that [`wait`] waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// All jobs can be completed.
    Ready,
    /// All jobs have ended. Those that are ready are completed.
    Completed,
    /// All jobs have ended, in any way: they were cancelled.
    Ended,
}

/// Starts to merge an active overlay into a node below it.
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

/// Waits for jobs, and dismisses those that have ended. `report` receives the progress of each.
pub fn wait(
    monitor: &mut dyn Execute,
    ids: &[String],
    until: Until,
    mut report: impl FnMut(&str, Merge),
) -> Result<()> {
    let mut pending: Vec<&String> = ids.iter().collect();
    let mut first_error = None;
    let mut progress = Progress::new(STALLED);
    while !pending.is_empty() {
        let jobs: Vec<Job> =
            query(monitor)?.into_iter().filter(|job| ids.contains(&job.id)).collect();
        let mut ended = Vec::new();
        let mut ready = 0;
        for &id in &pending {
            let Some(job) = jobs.iter().find(|job| job.id == *id) else {
                first_error.get_or_insert(Error::new(
                    Code::OperationFailed,
                    format!("block job '{id}' does not exist any more"),
                ));
                ended.push(id);
                continue;
            };
            match job.status.as_str() {
                "ready" if until == Until::Completed => {
                    report(id, Merge::Completing);
                    job_command(monitor, "job-complete", id)?;
                }
                "ready" => ready += 1,
                "concluded" if job_command(monitor, "job-dismiss", id)? => {
                    match &job.error {
                        Some(error) => {
                            report(id, Merge::Not);
                            first_error
                                .get_or_insert(Error::new(Code::OperationFailed, error.clone()));
                        }
                        None => report(id, Merge::Done),
                    }
                    ended.push(id);
                }
                _ => {}
            }
        }
        pending.retain(|id| !ended.contains(id));
        if until == Until::Ended {
            first_error = None;
        }
        if until == Until::Ready && (ready == pending.len() || first_error.is_some()) {
            break;
        }
        if !pending.is_empty() && !progress.wait(Some(jobs)) {
            for id in &pending {
                let _ = job_command(monitor, "job-cancel", id);
            }
            fail!(OperationTimeout, "it makes no progress");
        }
    }
    first_error.map_or(Ok(()), Err)
}

/// Cancels jobs, and waits until they have ended. Their results are ignored.
pub fn give_up(monitor: &mut dyn Execute, ids: &[String]) -> Result<()> {
    for id in ids {
        job_command(monitor, "job-cancel", id)?;
    }
    wait(monitor, ids, Until::Ended, |_, _| ())
}

/// The ids of the library's jobs that a killed process has left behind.
pub fn left_over(monitor: &mut dyn Execute) -> Result<Vec<String>> {
    let ids = query(monitor)?.into_iter().map(|job| job.id);
    Ok(ids.filter(|id| id.starts_with(NODE_PREFIX)).collect())
}

/// The fields of a job that are used here.
#[derive(Debug, PartialEq, Eq)]
struct Job {
    id: String,
    status: String,
    error: Option<String>,
    /// The current and the total progress.
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

/// Runs a command on a job. Returns false if QEMU refused it.
fn job_command(monitor: &mut dyn Execute, command: &str, id: &str) -> Result<bool> {
    let step = format!("cannot end block job '{id}' ({command})");
    let command = Command::new(command, json!({ "id": id }));
    match monitor.execute(command, Deadline::after(DEFAULT_TIMEOUT)) {
        Ok(_) => Ok(true),
        // The job's state has changed since the query; the next query shows it.
        Err(Failure::Refused(..)) => Ok(false),
        Err(failure) => Err(failure.into_error(&step)),
    }
}
