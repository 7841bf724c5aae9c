# SPDX-License-Identifier: LGPL-2.1-or-later
"""Full snapshots of running QEMU guests, memory and disks, taken at the moment of the call.

    import instantsnap

    with instantsnap.Guest.open_qmp("/run/vm/qmp.sock", "/var/lib/vm/snapshots") as guest:
        name = guest.snapshot(description="before the upgrade")
        print(name, guest.stats().guest_paused_us / 1000, "ms paused")

The C library, libinstantsnap.so.0, is loaded at the first call: the file that the environment variable
INSTANTSNAP_LIBRARY names; else libinstantsnap.so or libinstantsnap.so.0 beside this package's files; else by the
system's loader. LibraryNotFound, an ImportError, says where it was looked for.
"""

from ._errors import Cancelled, Error, ErrorCode, LibraryNotFound, NotFound
from ._guest import Flag, Guest, Stats
from ._library import decode as _decode
from ._library import library as _library_
from ._revert import RevertDisk, RevertPlan, prepare_revert

__all__ = ["Cancelled", "Error", "ErrorCode", "Flag", "Guest", "LibraryNotFound", "NotFound", "RevertDisk",
           "RevertPlan", "Stats", "prepare_revert", "version"]


def version() -> str:
    """The C library's version, "MAJOR.MINOR.PATCH". Does not block. Raises LibraryNotFound."""
    return _decode(_library_().instantsnap_version())
