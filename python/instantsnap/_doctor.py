# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an examination finds: whether instant snapshots work, and what to do where they do not."""

import ctypes
import json
from dataclasses import dataclass
from typing import Optional

from . import _library
from ._library import check, library


@dataclass(frozen=True)
class Finding:
    """What one check has found.

    check: the name of the check; instantsnap_doctor() in instantsnap.h lists them.
    verdict: "pass"; "warn" (snapshots work, but may fail in some case or could be better); "fail"
        (they do not work); or "skip" (it could not be checked).
    object: the disk, user, path or version that was checked; "" if there is only one.
    message: for people.
    remedy: the command or the change that helps; "" if the message says it, or if nothing need be
        done.
    """

    check: str
    verdict: str
    object: str
    message: str
    remedy: str


def doctor() -> list[Finding]:
    """Examines whether instant snapshots work on this host, for QEMUs of this user and of libvirt.
    Changes nothing. Guest.doctor() examines a guest.

    Blocks while libvirt answers. Raises LibraryNotFound.
    """
    return examine(None)


def examine(guest: Optional[int]) -> list[Finding]:
    """Examines a guest by its handle, or this host."""
    report = ctypes.c_void_p()
    check(library().instantsnap_doctor(guest, ctypes.byref(report)))
    return findings(report.value)


def findings(report: Optional[int]) -> list[Finding]:
    """Reads a report of the C library, and frees it."""
    fields = Finding.__dataclass_fields__
    found = json.loads(_library.take_string(report))
    return [Finding(**{name: item[name] for name in fields}) for item in found]
