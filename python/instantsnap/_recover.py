# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a recovery finds of a snapshot that was interrupted."""

import ctypes
import json
from dataclasses import dataclass
from typing import Optional

from . import _library
from ._library import StrPath, check, library


@dataclass(frozen=True)
class Recovered:
    """One thing that a recovery has found.

    snapshot: the name of the snapshot that was interrupted; "" if it is not known.
    what: "snapshot", "guest", "settings", "overlay", "memory", "firmware" (a copy of UEFI
        variables) or "storage" (a disk that was left to the storage hook).
    object: a path, a name or a word.
    action: "finished", "undone" or "left".
    why: for people.
    blocks: the guest's next operation is refused until this is settled.
    """

    snapshot: str
    what: str
    object: str
    action: str
    why: str
    blocks: bool


def recover_offline(state_dir: StrPath) -> list[Recovered]:
    """Like Guest.recover(), for a guest whose QEMU has ended, before it is started again. Does not
    change anything if QEMU still runs, or if it is not proved that the images below the overlays
    were not written since; nor the overlays of a guest that a driver had opened.

    state_dir: the guest's state directory, as for Guest.open_qmp().

    Blocks until the overlays are merged. Raises ValueError (a NUL character), or Error:
    OPERATION_INVALID (the snapshot is under way), ACCESS_DENIED, SYSTEM_ERROR.
    """
    report = ctypes.c_void_p()
    path = _library.encode(state_dir, "state_dir")
    check(library().instantsnap_recover_offline(path, ctypes.byref(report)))
    return recovered(report.value)


def recovered(report: Optional[int]) -> list[Recovered]:
    """Reads a report of the C library, and frees it."""
    fields = Recovered.__dataclass_fields__
    found = json.loads(_library.take_string(report))
    return [Recovered(**{name: item[name] for name in fields}) for item in found]
