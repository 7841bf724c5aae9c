# SPDX-License-Identifier: LGPL-2.1-or-later
"""What can go wrong, with libvirt's error codes."""

import enum
from typing import TypeVar, Union

_Enum = TypeVar("_Enum", bound=enum.IntEnum)


class ErrorCode(enum.IntEnum):
    """libvirt's error numbers (virErrorNumber) that this library gives, without their prefix
    VIR_ERR_."""
    OK = 0
    INTERNAL_ERROR = 1            #: a reply or a file that makes no sense, a defect of ours
    NO_CONNECT = 5                #: no connection to the libvirt daemon
    INVALID_DOMAIN = 7            #: a virDomainPtr that is none, or of another driver than libvirt's QEMU
    INVALID_ARG = 8               #: a bad argument, an unknown flag, flags that exclude each other
    OPERATION_FAILED = 9          #: QEMU refused or failed; the message has its reason
    XML_ERROR = 27                #: XML with a value that cannot be
    OPERATION_DENIED = 29         #: the connection is read-only
    XML_DETAIL = 35               #: XML that is not well-formed, a name that may not be
    SYSTEM_ERROR = 38             #: a system call failed; the message has its errno's text
    RPC = 39                      #: the connection to the libvirt daemon failed
    NO_DOMAIN = 42                #: the domain is gone
    OPERATION_INVALID = 55        #: not in this state: a guest that is busy, a name that exists
    CONFIG_UNSUPPORTED = 67       #: a disk, a file or a device with which it cannot be done
    OPERATION_TIMEOUT = 68        #: a deadline passed, and everything was undone
    INVALID_DOMAIN_SNAPSHOT = 71  #: a snapshot whose metadata or memory image is damaged
    NO_DOMAIN_SNAPSHOT = 72       #: no snapshot of that name
    ARGUMENT_UNSUPPORTED = 74     #: this QEMU or this host has no background snapshots
    SNAPSHOT_REVERT_RISKY = 77    #: an image is not as it was at the snapshot; forced, it is reverted to
    OPERATION_ABORTED = 78        #: cancelled
    OPERATION_UNSUPPORTED = 84    #: allowed, but this way in cannot do it
    AGENT_UNRESPONSIVE = 86       #: the guest's agent does not answer
    ACCESS_DENIED = 88            #: the daemon's access rules forbid it, or others can write to the state directory
    XML_INVALID_SCHEMA = 92       #: XML that libvirt's schema does not allow


class Error(Exception):
    """A call of the library failed.

    code (ErrorCode, or int for a number not known here): why, as libvirt's virErrorNumber.
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
    """The snapshot was cancelled, as by Guest.cancel() or Job.cancel(), and everything was undone
    (ErrorCode.OPERATION_ABORTED)."""


def carry(raised: BaseException, left: BaseException) -> None:
    """Has an exception that cancelled a snapshot tell, as the cause at the end of its own, that the
    undo failed: what is left is in that one's message. A snapshot that was cancelled and undone has
    nothing to tell."""
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
    """libinstantsnap.so.0 could not be loaded; the message says where it was looked for."""


_CLASSES: dict[int, type[Error]] = {
    ErrorCode.OPERATION_ABORTED: Cancelled,
    ErrorCode.NO_DOMAIN_SNAPSHOT: NotFound,
}


def known(kind: type[_Enum], number: int) -> Union[_Enum, int]:
    """A number of the C library's as a member of `kind`; as it is when a newer library knows more
    of them."""
    try:
        return kind(number)
    except ValueError:
        return number


def error_of(number: int, domain: int, message: str) -> Error:
    """The exception for an error of the C library."""
    code = known(ErrorCode, number)
    return _CLASSES.get(code, Error)(code, domain, message)
