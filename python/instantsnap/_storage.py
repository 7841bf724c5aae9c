# SPDX-License-Identifier: LGPL-2.1-or-later
"""Storage hooks: the caller's storage snapshots disks instead of QEMU."""

import ctypes
import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, Optional

from . import _library
from ._errors import Error
from ._events import milliseconds
from ._library import StrPath


@dataclasses.dataclass(frozen=True)
class StorageDisk:
    """A disk that is left to a storage hook."""
    name: str    #: its name: `vda`, a qdev id, a drive alias or a node name
    #: its image or device, usually a path, with QEMU's name; for a domain of libvirt, with that of
    #: its XML
    source: str
    format: str  #: the format of the image: "raw", "qcow2"


@dataclasses.dataclass(frozen=True)
class StorageCall:
    """The arguments of a storage hook."""
    snapshot: str             #: the snapshot's name
    disks: list[StorageDisk]  #: the disks with snapshot='manual'
    paused_us: int            #: how long the guest was paused so far; 0: it was paused already
    deadline_us: int          #: how long the hook may take, microseconds; 0: no limit


#: Snapshots the storage of the disks, or removes that snapshot. Its result is ignored.
OnStorage = Callable[[StorageCall], object]
#: Names the files or devices for the disks, one for each.
OnRevert = Callable[[StorageCall], Sequence[StrPath]]


class Hook:
    """A hook for the C library that calls Python functions. It must live as long as the library may
    call it.

    The hook keeps the last exception of one of the functions, and returns a number to C instead.
    reason() recognises the exception by that number.
    """

    def __init__(self, snapshot: Optional[OnStorage] = None, undo: Optional[OnStorage] = None,
                 revert: Optional[OnRevert] = None, deadline: Optional[float] = None) -> None:
        self._snapshot = snapshot
        self._undo = undo
        self._revert = revert
        self._raised: Optional[BaseException] = None
        self._number = 0
        self.structure = _library.CStorageHook(size=ctypes.sizeof(_library.CStorageHook))
        if snapshot is not None:
            self.structure.snapshot = _library.StorageSnapshot(self._call_snapshot)
        if undo is not None:
            self.structure.undo = _library.StorageUndo(self._call_undo)
        if revert is not None:
            self.structure.revert = _library.StorageRevert(self._call_revert)
        if deadline is not None:
            self.structure.deadline_ms = milliseconds(deadline, "deadline")

    def reason(self, error: Error) -> BaseException:
        """The exception of a function if it made the library fail; else the error itself."""
        number = re.search(r"it returned (\d+)", error.message)
        if self._raised is not None and number is not None and int(number[1]) == self._number:
            return self._raised
        return error

    def _call_snapshot(self, call: Any, opaque: Optional[int]) -> int:
        assert self._snapshot is not None
        try:
            self._snapshot(_call_of(call.contents))
            return 0
        except BaseException as error:
            return self._keep(error)

    def _call_undo(self, call: Any, opaque: Optional[int]) -> None:
        assert self._undo is not None
        # ctypes passes its exceptions to sys.unraisablehook.
        self._undo(_call_of(call.contents))

    def _call_revert(self, call: Any, files: Any, opaque: Optional[int]) -> int:
        assert self._revert is not None
        try:
            request = _call_of(call.contents)
            named = [_library.encode(file, "the path of a disk")
                     for file in self._revert(request)]
            if len(named) != len(request.disks):
                raise ValueError(f"{len(named)} paths for {len(request.disks)} disks")
            for index, path in enumerate(named):
                files[index] = _strdup(path)
            return 0
        except BaseException as error:
            return self._keep(error)

    def _keep(self, error: BaseException) -> int:
        self._raised = error
        self._number = self._number % (2**31 - 1) + 1
        return self._number


def _call_of(call: _library.CStorageCall) -> StorageCall:
    disks = [call.disks[index].contents for index in range(call.disk_count)]
    return StorageCall(
        snapshot=_library.decode(call.snapshot),
        disks=[StorageDisk(*map(_library.decode, (disk.name, disk.source, disk.format)))
               for disk in disks],
        paused_us=call.paused_us,
        deadline_us=call.deadline_us)


def _strdup(text: bytes) -> int:
    """A copy from malloc(), which the C library frees."""
    strdup = ctypes.CDLL(None).strdup
    strdup.restype, strdup.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
    copy = strdup(text)
    if not copy:
        raise MemoryError
    assert isinstance(copy, int)
    return copy
