// SPDX-License-Identifier: LGPL-2.1-or-later

//! A command, and who can run it.

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
    /// A descriptor to go with it.
    pub fd: Option<BorrowedFd<'a>>,
}

impl<'a> Command<'a> {
    /// A command with these arguments.
    pub fn new(name: &'a str, arguments: Value) -> Command<'a> {
        Command { name, arguments, fd: None }
    }
}

/// Why a command gave no result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// QEMU's error: class and description.
    Refused(String, String),
    /// No reply in time. A reply that comes later is passed over.
    Late,
    /// The connection is gone; why.
    Lost(String),
}

impl Failure {
    /// The error for a caller: `step` says what was tried on what.
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

/// Who can run a command in QEMU's monitor.
pub trait Execute {
    /// Runs one command and returns its `return`.
    fn execute(
        &mut self,
        command: Command,
        deadline: Deadline,
    ) -> std::result::Result<Json, Failure>;

    /// The same, with an error that says what was being done.
    fn run(&mut self, step: &str, command: Command, deadline: Deadline) -> Result<Json> {
        self.execute(command, deadline).map_err(|failure| failure.into_error(step))
    }
}

/// What a reply says.
pub fn read_reply(mut reply: Json) -> std::result::Result<Json, Failure> {
    if let Some(result) = reply.take("return") {
        return Ok(result);
    }
    match &reply["error"] {
        Value::Null => Err(Failure::Lost("the reply is none".into())),
        error => {
            let text = |part: &str| error[part].as_str().unwrap_or("no reason given").to_owned();
            Err(Failure::Refused(text("class"), text("desc")))
        }
    }
}
