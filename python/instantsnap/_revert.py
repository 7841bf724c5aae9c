# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reverts to a snapshot, first step: prepares the files that the new QEMU must be started with."""

import ctypes
import dataclasses
from pathlib import Path
from typing import Optional, Union

from . import _library
from ._library import StrPath, library
from ._memory import Memory, memory_of
from ._storage import Hook, OnRevert


@dataclasses.dataclass(frozen=True)
class RevertDisk:
    """One disk of a plan."""
    #: its name in the snapshot: `vda`, a qdev id, a drive alias or a node name
    name: str
    #: absolute path of the image that this disk must use: a fresh one, or the one that `revert`
    #: named
    file: Path
    #: "qcow2"; for UEFI variables and for what `revert` named, the format of the original
    format: str
    #: the snapshot's image below it, which must never be written; None for UEFI variables and for
    #: what `revert` named
    backing_file: Optional[Path]


@dataclasses.dataclass(frozen=True)
class MemoryBackend:
    """One memory backend of a plan."""
    id: str      #: the id that the backend must have: the name of the RAM block
    file: Path   #: absolute path of the memory image, which must never be written
    offset: int  #: where the pages of this backend begin in the file
    size: int    #: the size of the backend, bytes
    object: str  #: the whole argument of QEMU's `-object` for it


@dataclasses.dataclass(frozen=True)
class RevertPlan:
    """The files that a QEMU must be started with to continue a snapshot, besides `-incoming defer`.
    The images that the plan names stay until the caller removes them."""
    disks: list[RevertDisk]
    memory_file: Path  #: absolute path of the memory image
    domain_xml: str    #: the `<domain>` XML of the snapshot
    #: the memory backends of a QEMU that maps the memory image; empty unless the plan was made with
    #: memory="map"
    memory_backends: list[MemoryBackend]


def prepare_revert(state_dir: StrPath, name: str, directory: Optional[StrPath] = None,
                   revert: Optional[OnRevert] = None, *,
                   memory: Union[str, Memory] = "auto") -> RevertPlan:
    """Creates a fresh overlay on each disk image of a snapshot, and returns the files to start QEMU
    with.

    Then start QEMU with the machine of the original (same machine type, CPU, memory size and
    devices), each disk on the file that the plan names, and `-incoming defer`; then call
    Guest.load(). The snapshot stays as it is, so this can be done any number of times, also while
    the original guest runs on. Needs `qemu-img`.

    state_dir: the state directory with which the snapshot was taken. It must belong to this user or
        to root, and no other user may write to it.
    directory: where the fresh images are created; None: beside each of the snapshot's images.
    revert: required for a snapshot with disks that were left to Guest.set_storage_hook(), and only
        used for those. Called with a StorageCall after everything else has succeeded. Returns for
        each disk of the call the path of a file or device that has the disk's content at the
        instant, in the disk's own format; the continued guest writes to it. These are the last
        disks of the plan. Its exceptions are raised here.
    memory: how the memory is to come back: see Memory. "auto": as "full". With "map" the plan has
        memory_backends: start QEMU with `-object` and the `object` of each, and with `-machine
        memory-backend=ID` if there is one, else with each where the original has the backend of
        that id (`-numa node,memdev=ID`).

    Blocks for some 10 ms for each disk; for 30 s if the server of an image below does not answer.
    Raises ValueError (an unknown `memory`), NotFound, or Error with nothing left behind:
    INVALID_DOMAIN_SNAPSHOT (an image is missing; the memory image is incomplete, truncated or
    damaged), OPERATION_UNSUPPORTED (`revert` is needed, or this `memory` is not supported),
    CONFIG_UNSUPPORTED ("map", and the image is not sparse: see image_convert()), ACCESS_DENIED
    (other users can write to state_dir), OPERATION_TIMEOUT (a server of an image below does not
    answer), OPERATION_INVALID (an interrupted snapshot that uses the same files is not settled:
    Guest.recover()), SYSTEM_ERROR, OPERATION_FAILED.
    """
    hook = Hook(revert=revert) if revert is not None else None
    options = _library.CRevertOptions(
        size=ctypes.sizeof(_library.CRevertOptions),
        directory=_library.encode_optional(directory, "directory"),
        hook=None if hook is None else ctypes.pointer(hook.structure),
        memory=memory_of(memory))
    plan = library().instantsnap_snapshot_prepare_revert_with(
        _library.encode(state_dir, "state_dir"),
        _library.encode(name, "name"),
        ctypes.byref(options))
    if not plan:
        error = _library.last_error()
        raise error if hook is None else hook.reason(error)
    try:
        count = library().instantsnap_revert_plan_disk_count(plan)
        return RevertPlan(
            disks=[_disk(plan, index) for index in range(count)],
            memory_file=Path(_text(library().instantsnap_revert_plan_memory_file(plan))),
            domain_xml=_text(library().instantsnap_revert_plan_domain_xml(plan)),
            memory_backends=[
                _backend(plan, index)
                for index in range(library().instantsnap_revert_plan_memory_backend_count(plan))
            ])
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


def _backend(plan: int, index: int) -> MemoryBackend:
    backend = _library.CMemoryBackend(size=ctypes.sizeof(_library.CMemoryBackend))
    if library().instantsnap_revert_plan_get_memory_backend(
            plan, index, ctypes.byref(backend)) < 0:
        raise _library.last_error()
    return MemoryBackend(
        id=_text(backend.id),
        file=Path(_text(backend.file)),
        offset=backend.offset,
        size=backend.length,
        object=_text(backend.object))


def _text(borrowed: Optional[bytes]) -> str:
    if borrowed is None:
        raise _library.last_error()
    return _library.decode(borrowed)
