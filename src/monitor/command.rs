// SPDX-License-Identifier: LGPL-2.1-or-later

//! QMP commands, and the trait of monitors that run them.

use std::os::fd::BorrowedFd;

use serde_json::Value;

use super::json::Json;
use crate::deadline::Deadline;
use crate::error::{Code, Error, Result};

/// One command for QEMU.
#[derive(Debug)]
pub struct Command<'a> {
    /// `execute`.
    pub name: &'a str,
    /// `arguments`.
    pub arguments: Value,
    /// A descriptor that is sent with the command.
    pub fd: Option<BorrowedFd<'a>>,
}

impl<'a> Command<'a> {
    /// A command with these arguments.
    pub fn new(name: &'a str, arguments: Value) -> Command<'a> {
        Command { name, arguments, fd: None }
    }
}

/// The reason why a command gave no result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// QEMU replied with an error: its class and description.
    Refused(String, String),
    /// QEMU did not reply in time. A later reply is ignored.
    Late,
    /// The connection is lost, for this reason.
    Lost(String),
}

impl Failure {
    /// The error for a caller; `step` names the step that failed and its object.
    pub fn into_error(self, step: &str) -> Error {
        match self {
            Failure::Refused(_, reason) => {
                Error::new(Code::OperationFailed, format!("{step}: {reason}"))
            }
            Failure::Late => {
                Error::new(Code::OperationTimeout, format!("{step}: QEMU did not answer in time"))
            }
            Failure::Lost(reason) => Error::new(
                Code::OperationFailed,
                format!("{step}: lost the connection to QEMU ({reason})"),
            ),
        }
    }
}

/// Runs commands in QEMU's monitor.
pub trait Execute {
    /// Runs one command and returns its `return`.
    fn execute(
        &mut self,
        command: Command,
        deadline: Deadline,
    ) -> std::result::Result<Json, Failure>;

    /// Like [`Execute::execute`], with an error that names the step.
    fn run(&mut self, step: &str, command: Command, deadline: Deadline) -> Result<Json> {
        self.execute(command, deadline).map_err(|failure| failure.into_error(step))
    }
}

/// The result that a reply contains.
pub fn read_reply(mut reply: Json) -> std::result::Result<Json, Failure> {
    if let Some(result) = reply.take("return") {
        return Ok(result);
    }
    match &reply["error"] {
        Value::Null => Err(Failure::Lost("its reply has neither a result nor an error".into())),
        error => {
            let text = |name: &str| error[name].as_str().unwrap_or("no reason given").to_owned();
            Err(Failure::Refused(text("class"), text("desc")))
        }
    }
}
