// SPDX-License-Identifier: LGPL-2.1-or-later

//! Checks that the guest is in a state in which QEMU can capture it.
//!
//! QEMU captures a background snapshot in the state `paused`. It cannot get there from another
//! state of a guest that does not run, and ends by abort(). A reset makes a paused guest
//! `prelaunch`: another client's reset, or the guest's own reboot, which QEMU carries out after it
//! has answered `stop`. And a guest can have suspended itself, panicked, or met an I/O error just
//! before the `stop`. So QEMU is asked for the state right before `migrate`, and again as long as
//! the migration sets up, which can take a while. A guest that is found in such a state then is
//! resumed. That saves QEMU, which stops and captures a running guest by itself. One case remains:
//! a reset in the last moment before the capture, between two queries.

use crate::backend::Guest;
use crate::deadline::Deadline;
use crate::error::{Error, Result, fail};
use crate::monitor::commands::{self, Status};

/// The state of a guest that was paused.
pub const PAUSED: &str = "paused";
/// The state of a guest that was never started, or was reset while it was paused.
pub const PRELAUNCH: &str = "prelaunch";

/// Refuses a guest that is not in the state in which it is to be saved.
pub fn check(guest: &mut dyn Guest, expected: &str, deadline: Deadline) -> Result<()> {
    let status = commands::query_status(guest, deadline)?;
    check_text(&status.status, expected)
}

/// Like [`check`], for a state that QEMU has reported already.
pub fn check_text(state: &str, expected: &str) -> Result<()> {
    match state {
        state if state == expected => Ok(()),
        "running" => fail!(
            OperationFailed,
            "another client has resumed the guest in the pause of its snapshot: take the snapshot \
             again"
        ),
        PRELAUNCH => fail!(
            OperationFailed,
            "the guest was reset in the pause of its snapshot, by another client or by its own \
             reboot: take the snapshot again"
        ),
        PAUSED => fail!(
            OperationFailed,
            "another client has started the guest, and paused it, while its snapshot was being \
             taken: take the snapshot again"
        ),
        other => fail!(
            OperationFailed,
            "the guest has stopped by itself as its snapshot was being taken (its state is \
             '{other}'): no snapshot can be taken of it in this state"
        ),
    }
}

/// Checks a guest while the migration that will capture it sets up. Where QEMU could not capture
/// the guest, resumes it, and returns an error.
pub fn keep_capturable(guest: &mut dyn Guest, deadline: Deadline) -> Result<()> {
    let status = commands::query_status(guest, deadline)?;
    if is_capturable(&status) {
        return Ok(());
    }
    Err(rescue(guest, &status, deadline))
}

/// Whether a guest that was just stopped does not run, and the migration that has begun can capture
/// it. A guest that QEMU could not capture is resumed.
pub fn is_stopped(guest: &mut dyn Guest, deadline: Deadline) -> Result<bool> {
    let status = commands::query_status(guest, deadline)?;
    if status.status == PRELAUNCH {
        let _ = rescue(guest, &status, deadline);
        return Ok(false);
    }
    match is_capturable(&status) {
        true => Ok(!status.running),
        false => Err(rescue(guest, &status, deadline)),
    }
}

fn is_capturable(status: &Status) -> bool {
    status.running || matches!(status.status.as_str(), PAUSED | "postmigrate" | "finish-migrate")
}

/// Resumes the guest at once. Returns why that was necessary.
fn rescue(guest: &mut dyn Guest, status: &Status, deadline: Deadline) -> Error {
    let cause = check_text(&status.status, PAUSED).expect_err("it is not paused");
    match commands::cont(guest, deadline) {
        Ok(()) => cause,
        Err(error) => cause.and(error.message),
    }
}
