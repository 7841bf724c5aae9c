// SPDX-License-Identifier: LGPL-2.1-or-later

//! The one error type: a libvirt error code, and a message that names the step, the object and what
//! to do.
//!
//! The build reads the numbers here (`build-script/`): the C compiler compares them with the
//! header's, and with libvirt's own where its headers are installed.

use std::fmt;

/// `virErrorDomain` of every error of this library: `VIR_FROM_QEMU`.
pub const DOMAIN: i32 = 10;

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident = $name:ident = $number:literal),+ $(,)?) => {
        /// The `virErrorNumber`s that this library uses.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Code {
            $($(#[$doc])* $variant = $number),+
        }

        impl Code {
            /// The code of this number, if it is one of these.
            pub fn from_number(number: i32) -> Option<Code> {
                [$(Code::$variant),+].into_iter().find(|code| *code as i32 == number)
            }
        }
    };
}

codes! {
    /// A reply or a file that makes no sense; a defect of ours.
    InternalError = VIR_ERR_INTERNAL_ERROR = 1,
    /// A bad pointer, an unknown flag, flags that exclude each other.
    InvalidArg = VIR_ERR_INVALID_ARG = 8,
    /// QEMU refused or failed; the message has its reason.
    OperationFailed = VIR_ERR_OPERATION_FAILED = 9,
    /// libvirt was passed an object of another kind, or one that does not exist any more.
    InvalidDomain = VIR_ERR_INVALID_DOMAIN = 7,
    /// No connection to the daemon.
    NoConnect = VIR_ERR_NO_CONNECT = 5,
    /// XML with an invalid value.
    XmlError = VIR_ERR_XML_ERROR = 27,
    /// XML that is not well-formed; a name that is not allowed.
    XmlDetail = VIR_ERR_XML_DETAIL = 35,
    /// A system call failed; the message has its errno's text.
    SystemError = VIR_ERR_SYSTEM_ERROR = 38,
    /// The connection to the daemon failed.
    Rpc = VIR_ERR_RPC = 39,
    /// No such domain.
    NoDomain = VIR_ERR_NO_DOMAIN = 42,
    /// The daemon does not allow the operation to this client.
    OperationDenied = VIR_ERR_OPERATION_DENIED = 29,
    /// Not possible in this state: a guest that is busy, a name that exists.
    OperationInvalid = VIR_ERR_OPERATION_INVALID = 55,
    /// A disk, a file or a device that is not supported.
    ConfigUnsupported = VIR_ERR_CONFIG_UNSUPPORTED = 67,
    /// A deadline passed, and everything was undone.
    OperationTimeout = VIR_ERR_OPERATION_TIMEOUT = 68,
    /// A snapshot whose metadata or memory image is damaged.
    InvalidDomainSnapshot = VIR_ERR_INVALID_DOMAIN_SNAPSHOT = 71,
    /// No snapshot of that name.
    NoDomainSnapshot = VIR_ERR_NO_DOMAIN_SNAPSHOT = 72,
    /// This QEMU or this host has no background snapshots.
    ArgumentUnsupported = VIR_ERR_ARGUMENT_UNSUPPORTED = 74,
    /// XML that does not conform to libvirt's schema.
    XmlInvalidSchema = VIR_ERR_XML_INVALID_SCHEMA = 92,
    /// An image has changed since the snapshot: the caller must force the revert.
    SnapshotRevertRisky = VIR_ERR_SNAPSHOT_REVERT_RISKY = 77,
    /// Cancelled by the caller.
    OperationAborted = VIR_ERR_OPERATION_ABORTED = 78,
    /// The guest's agent does not answer.
    AgentUnresponsive = VIR_ERR_AGENT_UNRESPONSIVE = 86,
    /// The daemon's policy denies the operation.
    AccessDenied = VIR_ERR_ACCESS_DENIED = 88,
    /// The operation is valid, but this backend does not support it.
    OperationUnsupported = VIR_ERR_OPERATION_UNSUPPORTED = 84,
}

/// An error, with a code of libvirt's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// libvirt's code.
    pub code: Code,
    /// Names the step, the object, and what to do.
    pub message: String,
    /// libvirt's code, if it is not among [`Code`].
    other_number: Option<i32>,
}

/// The result of this crate's functions that can fail.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of this code with this message.
    pub fn new(code: Code, message: impl Into<String>) -> Error {
        Error { code, message: message.into(), other_number: None }
    }

    /// An error of libvirt. Its code is reported even if it is not among [`Code`].
    pub fn of_libvirt(number: i32, message: impl Into<String>) -> Error {
        let code = Code::from_number(number);
        let other_number = if code.is_none() { Some(number) } else { None };
        Error { code: code.unwrap_or(Code::OperationFailed), message: message.into(), other_number }
    }

    /// The `virErrorNumber` to report.
    pub fn number(&self) -> i32 {
        self.other_number.unwrap_or(self.code as i32)
    }

    /// The error of a failed system call; `step` names the step and its object.
    pub fn system(step: impl fmt::Display, error: impl Into<std::io::Error>) -> Error {
        Error::new(Code::SystemError, format!("{step}: {}", error.into()))
    }

    /// This error, with `more` at the end of its message.
    pub fn and(mut self, more: impl fmt::Display) -> Error {
        self.message = format!("{}; {more}", self.message);
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

/// Returns an `Err(Error)` of a code with a formatted message.
#[doc(hidden)]
#[macro_export]
macro_rules! __fail {
    ($code:ident, $($message:tt)+) => {
        return Err($crate::error::Error::new($crate::error::Code::$code, format!($($message)+)))
    };
}
pub use __fail as fail;
