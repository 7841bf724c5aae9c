# SPDX-License-Identifier: LGPL-2.1-or-later
"""The exceptions, with libvirt's error codes."""

import enum
from typing import TypeVar, Union

_Enum = TypeVar("_Enum", bound=enum.IntEnum)


class ErrorCode(enum.IntEnum):
    """libvirt's error numbers (virErrorNumber) that this library gives, without their prefix
    VIR_ERR_."""
    OK = 0
    INTERNAL_ERROR = 1            #: an invalid reply or file, or a defect of the library
    NO_CONNECT = 5                #: no connection to the libvirt daemon
    INVALID_DOMAIN = 7            #: a virDomainPtr that is invalid, or not of libvirt's QEMU driver
    INVALID_ARG = 8               #: a bad argument, an unknown flag, flags that exclude each other
    OPERATION_FAILED = 9          #: QEMU refused or failed; the message has QEMU's reason
    XML_ERROR = 27                #: XML with an impossible value
    OPERATION_DENIED = 29         #: the connection is read-only
    XML_DETAIL = 35               #: XML that is not well-formed, a name that is not allowed
    SYSTEM_ERROR = 38             #: a system call failed; the message has its errno's text
    RPC = 39                      #: the connection to the libvirt daemon failed
    NO_DOMAIN = 42                #: the domain does not exist any more
    OPERATION_INVALID = 55        #: impossible now: the guest is busy, the name exists
    CONFIG_UNSUPPORTED = 67       #: a disk, a file or a device prevents it
    OPERATION_TIMEOUT = 68        #: a deadline passed, and everything was undone
    INVALID_DOMAIN_SNAPSHOT = 71  #: a snapshot whose metadata or memory image is damaged
    NO_DOMAIN_SNAPSHOT = 72       #: there is no snapshot of that name
    ARGUMENT_UNSUPPORTED = 74     #: this QEMU or this host has no background snapshots
    SNAPSHOT_REVERT_RISKY = 77    #: an image has changed since the snapshot; `force` reverts
    OPERATION_ABORTED = 78        #: cancelled
    OPERATION_UNSUPPORTED = 84    #: allowed, but this backend does not support it
    AGENT_UNRESPONSIVE = 86       #: the guest agent does not answer
    #: the daemon's access rules forbid it, or other users can write to the state directory
    ACCESS_DENIED = 88
    XML_INVALID_SCHEMA = 92       #: XML that does not conform to libvirt's schema


class Error(Exception):
    """A call of the library failed.

    code (ErrorCode, or int for an unknown number): the reason, as libvirt's virErrorNumber.
    domain (int): libvirt's virErrorDomain; 10 is VIR_FROM_QEMU.
    message (str): names the step, the object and what to do. It is also str() of the exception.
    """

    def __init__(self, code: Union[ErrorCode, int], domain: int, message: str) -> None:
        super().__init__(code, domain, message)
        self.code = code
        self.domain = domain
        self.message = message

    def __str__(self) -> str:
        return self.message


class Cancelled(Error):
    """The snapshot was cancelled, for example by Guest.cancel() or Job.cancel(), and everything was
    undone (ErrorCode.OPERATION_ABORTED)."""


def carry(raised: BaseException, left: BaseException) -> None:
    """Attaches the error of a failed undo (`left`) to the exception that cancelled the snapshot
    (`raised`), at the end of its chain of causes. The error's message says what is left. If the
    snapshot was undone (`left` is Cancelled), does nothing."""
    if isinstance(left, Cancelled):
        return
    seen = {id(left)}
    while raised.__cause__ is not None and id(raised) not in seen:
        seen.add(id(raised))
        raised = raised.__cause__
    if id(raised) not in seen:
        raised.__cause__ = left


class NotFound(Error):
    """There is no such snapshot (ErrorCode.NO_DOMAIN_SNAPSHOT)."""


class LibraryNotFound(ImportError):
    """libinstantsnap.so.0 could not be loaded. The message names the places that were tried."""


_CLASSES: dict[int, type[Error]] = {
    ErrorCode.OPERATION_ABORTED: Cancelled,
    ErrorCode.NO_DOMAIN_SNAPSHOT: NotFound,
}


def known(kind: type[_Enum], number: int) -> Union[_Enum, int]:
    """A number from the C library as a member of `kind`; the number itself if a newer library knows
    more members."""
    try:
        return kind(number)
    except ValueError:
        return number


def error_of(number: int, domain: int, message: str) -> Error:
    """The exception for an error of the C library."""
    code = known(ErrorCode, number)
    return _CLASSES.get(code, Error)(code, domain, message)
