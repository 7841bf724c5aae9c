# SPDX-License-Identifier: LGPL-2.1-or-later
"""Full snapshots of running QEMU guests, memory and disks, taken at the moment of the call.

    import instantsnap

    with instantsnap.Guest.open_qmp("/run/vm/qmp.sock", "/var/lib/vm/snapshots") as guest:
        name = guest.snapshot(description="before the upgrade")
        print(name, guest.stats().guest_paused_us / 1000, "ms paused")

start_snapshot() returns at the instant, while the guest's memory is still being written:

        with guest.start_snapshot() as job:
            ...  # change the guest; the end of the block waits for the snapshot
        print(job.name)

In an event loop of asyncio: `name = await guest.snapshot_async()`.

For a domain of libvirt, with libvirt-python (the package imports it when it is needed, and
everything else works without it):

    import instantsnap, libvirt

    dom = libvirt.open("qemu:///system").lookupByName("vm")
    snapshot = instantsnap.snapshot_create_xml(
        dom,
        "<domainsnapshot><memory snapshot='external' file='/var/lib/vm/mem'/></domainsnapshot>")
    print(snapshot.getName())

The package loads the C library, libinstantsnap.so.0, at the first call. It uses the file that the
environment variable INSTANTSNAP_LIBRARY names; else libinstantsnap.so or libinstantsnap.so.0 beside
this package's files; else the library that the system's loader finds. If there is none,
LibraryNotFound, an ImportError, names these places.
"""

from ._doctor import Finding, doctor
from ._errors import Cancelled, Error, ErrorCode, LibraryNotFound, NotFound
from ._events import Event, EventType, ImageFormat, JobInfo, Phase, Stats, Watchdog
from ._guest import DeleteFlag, Flag, Guest
from ._image import (ImageInfo, ImageNotes, MemoryBlock, image_convert, image_index, image_info,
                     image_verify)
from ._job import Job
from ._library import decode as _decode
from ._library import library as _library_
from ._libvirt import snapshot_create_xml, snapshot_delete, snapshot_revert
from ._memory import LoadStats, Memory, MemoryProgress
from ._recover import Recovered, recover_offline
from ._revert import MemoryBackend, RevertDisk, RevertPlan, prepare_revert
from ._storage import StorageCall, StorageDisk

__all__ = ["Cancelled", "DeleteFlag", "Error", "ErrorCode", "Event", "EventType", "Finding", "Flag",
           "Guest", "ImageFormat", "ImageInfo", "ImageNotes", "Job", "JobInfo", "LibraryNotFound",
           "LoadStats", "Memory", "MemoryBackend", "MemoryBlock", "MemoryProgress", "NotFound",
           "Phase", "Recovered", "RevertDisk", "RevertPlan", "Stats", "StorageCall", "StorageDisk",
           "Watchdog", "doctor", "image_convert", "image_index", "image_info", "image_verify",
           "prepare_revert", "recover_offline", "snapshot_create_xml", "snapshot_delete",
           "snapshot_revert", "version"]


def version() -> str:
    """The C library's version, "MAJOR.MINOR.PATCH". Does not block. Raises LibraryNotFound."""
    return _decode(_library_().instantsnap_version())
