// SPDX-License-Identifier: LGPL-2.1-or-later

//! Examines whether instant snapshots work: on this host, or of one guest.
//!
//! The checks are those that a snapshot itself makes (their errors are the findings), and some for
//! what QEMU would refuse in the middle. Nothing is changed. The examination goes on after a check
//! that fails, so that the user learns everything at once.

mod guest;
mod host;
mod report;
mod userfaultfd;

use self::report::Report;
pub use self::report::{Finding, Verdict};
use crate::backend::Connector;
use crate::error::{Code, Error};

/// Examines this host, for this user and for the users that QEMU usually has.
pub fn examine_host() -> Vec<Finding> {
    let mut report = Report::default();
    host::kernel(&mut report);
    host::users(&mut report);
    host::programs(&mut report);
    host::libvirt(&mut report);
    report.findings()
}

/// Examines a guest, and what of this host concerns it.
pub fn examine_guest(connector: &dyn Connector) -> Vec<Finding> {
    let mut report = Report::default();
    host::kernel(&mut report);
    host::programs(&mut report);
    match connector.begin() {
        Ok(mut guest) => guest::examine(connector, &mut *guest, &mut report),
        Err(error) => report.error("guest", "", busy_or_not(error)),
    }
    match connector.journals() {
        Ok(Some(journals)) => guest::interrupted(&journals, &mut report),
        Ok(None) => {}
        Err(error) => report.error("leftovers", "", error),
    }
    report.findings()
}

/// An examination as JSON.
pub fn doctor_report(findings: &[Finding]) -> String {
    serde_json::json!(findings).to_string()
}

fn busy_or_not(error: Error) -> Error {
    match error.code {
        Code::OperationInvalid => error.and("examine it again when that has ended"),
        _ => error,
    }
}
