// SPDX-License-Identifier: LGPL-2.1-or-later

//! Why a command failed, and the exit status that says so.

use std::process::ExitCode;

use instantsnap_core::error::{Code, Error};
use instantsnap_core::libvirt::VirResult;
use serde_json::json;

/// The result of a command.
pub type Result<T> = std::result::Result<T, Failure>;

/// Why a command failed.
#[derive(Debug)]
pub enum Failure {
    /// The command line makes no sense. Nothing was done.
    Usage(String),
    /// An operation failed.
    Failed(Error),
    /// Something else than an operation failed.
    Other(String),
    /// The user has interrupted the command by this signal, and everything is undone.
    Interrupted(i32, String),
}

impl Failure {
    /// The status of wrong use, which is clap's too.
    const USAGE: u8 = 2;

    /// There is no such thing; `message` says what there is.
    pub fn not_found(code: Code, message: String) -> Failure {
        Failure::Failed(Error::new(code, message))
    }

    /// The exit status.
    pub fn status(&self) -> ExitCode {
        match self {
            Failure::Usage(_) => ExitCode::from(Failure::USAGE),
            Failure::Failed(_) | Failure::Other(_) => ExitCode::FAILURE,
            // The shells' convention.
            Failure::Interrupted(signal, _) => {
                ExitCode::from(u8::try_from(128 + signal).unwrap_or(u8::MAX))
            }
        }
    }

    /// The message for people.
    pub fn message(&self) -> &str {
        match self {
            Failure::Usage(message) | Failure::Other(message) => message,
            Failure::Failed(error) => &error.message,
            Failure::Interrupted(_, message) => message,
        }
    }

    /// The same for programs.
    pub fn to_json(&self) -> serde_json::Value {
        let code = match self {
            Failure::Usage(_) => Code::InvalidArg as i32,
            Failure::Failed(error) => error.number(),
            Failure::Other(_) => Code::SystemError as i32,
            Failure::Interrupted(..) => Code::OperationAborted as i32,
        };
        json!({ "error": { "code": code, "message": self.message() } })
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure::Failed(error)
    }
}

/// An answer of libvirt's; `step` says what was asked.
pub fn answer<T>(answer: VirResult<T>, step: &str) -> Result<T> {
    answer.map_err(|error| Failure::Failed(error.into_error(step)))
}

/// Of those names, the one that a misspelled name is most like.
pub fn most_like<'a>(name: &str, names: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    /// From there on two names look alike.
    const ALIKE: f64 = 0.75;
    names
        .into_iter()
        .map(|known| (strsim::jaro(name, known), known))
        .filter(|(likeness, _)| *likeness >= ALIKE)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, known)| known)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelled_name_is_recognised_and_another_name_is_not() {
        assert_eq!(
            most_like("befor-upgrade", ["nightly", "before-upgrade"]),
            Some("before-upgrade")
        );
        assert_eq!(most_like("vm1", ["database", "mail"]), None);
    }
}
