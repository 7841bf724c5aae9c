// SPDX-License-Identifier: LGPL-2.1-or-later

//! The report of an examination: one finding for each check.

use serde::Serialize;

use crate::error::Error;

/// The result of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// An instant snapshot works, as far as this is concerned.
    Pass,
    /// It works, or may work, but not as well as it could.
    Warn,
    /// It does not work.
    Fail,
    /// It could not be checked.
    Skip,
}

/// What a check has found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The name of the check.
    pub check: &'static str,
    /// The result.
    pub verdict: Verdict,
    /// What was checked: a disk, a path, a user, a version; empty if there is only one such thing.
    pub object: String,
    /// What was found.
    pub message: String,
    /// The command or the change that helps; empty if there is none, or if none is needed.
    pub remedy: String,
}

/// The findings so far.
#[derive(Debug, Default)]
pub struct Report(Vec<Finding>);

impl Report {
    fn add(
        &mut self,
        verdict: Verdict,
        check: &'static str,
        object: impl Into<String>,
        message: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        self.0.push(Finding {
            check,
            verdict,
            object: object.into(),
            message: message.into(),
            remedy: remedy.into(),
        });
    }

    pub fn pass(
        &mut self,
        check: &'static str,
        object: impl Into<String>,
        message: impl Into<String>,
    ) {
        self.add(Verdict::Pass, check, object, message, "");
    }

    pub fn warn(
        &mut self,
        check: &'static str,
        object: impl Into<String>,
        message: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        self.add(Verdict::Warn, check, object, message, remedy);
    }

    pub fn fail(
        &mut self,
        check: &'static str,
        object: impl Into<String>,
        message: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        self.add(Verdict::Fail, check, object, message, remedy);
    }

    pub fn skip(
        &mut self,
        check: &'static str,
        object: impl Into<String>,
        message: impl Into<String>,
    ) {
        self.add(Verdict::Skip, check, object, message, "");
    }

    /// Adds an error of a step of a snapshot. Its message says what to do.
    pub fn error(&mut self, check: &'static str, object: impl Into<String>, error: Error) {
        self.add(Verdict::Fail, check, object, error.message, "");
    }

    pub fn findings(self) -> Vec<Finding> {
        self.0
    }
}
