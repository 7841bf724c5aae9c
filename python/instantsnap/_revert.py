# SPDX-License-Identifier: LGPL-2.1-or-later
"""Bringing a snapshot back, first step: what the new QEMU must be started with."""

import ctypes
import dataclasses
from pathlib import Path
from typing import Optional

from . import _library
from ._library import StrPath, library
from ._storage import Hook, OnRevert


@dataclasses.dataclass(frozen=True)
class RevertDisk:
    """One disk of a plan."""
    name: str                     #: its name in the snapshot: `vda`, a qdev id, a drive alias or a node name
    file: Path                    #: absolute path of the image that this disk must use: fresh, this plan's own, or what `revert` named
    format: str                   #: "qcow2"; for UEFI variables, and what `revert` named, that of the original
    backing_file: Optional[Path]  #: the snapshot's image beneath it, never to be written; None for those two


@dataclasses.dataclass(frozen=True)
class RevertPlan:
    """What a QEMU that is to continue a snapshot must be started with, besides `-incoming defer`.
    The images it names stay until the caller removes them."""
    disks: list[RevertDisk]
    memory_file: Path  #: absolute path of the memory image
    domain_xml: str    #: the `<domain>` XML of the snapshot


def prepare_revert(state_dir: StrPath, name: str, directory: Optional[StrPath] = None,
                   revert: Optional[OnRevert] = None) -> RevertPlan:
    """Makes a fresh overlay on each disk image of a snapshot, and says what to start QEMU with.

    Then start QEMU with the machine of the original (same machine type, CPU, memory size and
    devices), each disk on the file that the plan names, and `-incoming defer`; then call
    Guest.load(). The snapshot stays as it is, so this can be done any number of times, also while
    the original guest runs on. Needs `qemu-img`.

    state_dir: the state directory with which the snapshot was taken. It must belong to this user or
        to root, and no other user may write to it.
    directory: where the fresh images are made; None: beside each of the snapshot's images.
    revert: for a snapshot with disks that were left to Guest.set_storage_hook(), and needed there:
        called with a StorageCall when everything else has succeeded. Returns, for each disk of it,
        the path of a file or device with what the disk was at the instant, in the disk's own
        format, which the continued guest may write to. They are the last disks of the plan. What it
        raises is raised here.

    Blocks for some 10 ms a disk, where a server of an image below does not answer for 30 s. Raises
    NotFound, or Error with nothing left behind: INVALID_DOMAIN_SNAPSHOT (an image is missing; the
    memory image is incomplete, cut off or damaged), OPERATION_UNSUPPORTED (`revert` is needed),
    ACCESS_DENIED (other users can write to state_dir), OPERATION_TIMEOUT (a server of an image
    below does not answer), SYSTEM_ERROR, OPERATION_FAILED.
    """
    hook = Hook(revert=revert) if revert is not None else None
    plan = library().instantsnap_snapshot_prepare_revert_hooked(
        _library.encode(state_dir, "state_dir"),
        _library.encode(name, "name"),
        _library.encode_optional(directory, "directory"),
        None if hook is None else ctypes.byref(hook.structure))
    if not plan:
        error = _library.last_error()
        raise error if hook is None else hook.reason(error)
    try:
        count = library().instantsnap_revert_plan_disk_count(plan)
        return RevertPlan(
            disks=[_disk(plan, index) for index in range(count)],
            memory_file=Path(_text(library().instantsnap_revert_plan_memory_file(plan))),
            domain_xml=_text(library().instantsnap_revert_plan_domain_xml(plan)))
    finally:
        library().instantsnap_revert_plan_free(plan)


def _disk(plan: int, index: int) -> RevertDisk:
    disk = _library.CRevertDisk(size=ctypes.sizeof(_library.CRevertDisk))
    if library().instantsnap_revert_plan_get_disk(plan, index, ctypes.byref(disk)) < 0:
        raise _library.last_error()
    return RevertDisk(
        name=_text(disk.name),
        file=Path(_text(disk.file)),
        format=_text(disk.format),
        backing_file=None if disk.backing_file is None else Path(_text(disk.backing_file)))


def _text(borrowed: Optional[bytes]) -> str:
    if borrowed is None:
        raise _library.last_error()
    return _library.decode(borrowed)
