# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest and its snapshots."""

import ctypes
import dataclasses
import enum
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Optional, TypeVar
from xml.etree import ElementTree

from . import _library
from ._errors import Error, ErrorCode, NotFound
from ._library import StrPath, library

_Result = TypeVar("_Result")

_REVERT_RUNNING = 1 << 0
_REVERT_PAUSED = 1 << 1


class Flag(enum.IntFlag):
    """libvirt's flags of a snapshot's creation, without their prefix VIR_DOMAIN_SNAPSHOT_, and INSTANT.

    The rules are in instantsnap.h: a broken one is an Error of INVALID_ARG; a flag that is allowed but not built
    yet is an Error of OPERATION_UNSUPPORTED.
    """
    CREATE_REDEFINE = 1 << 0     #: restore or alter metadata
    CREATE_CURRENT = 1 << 1      #: with REDEFINE, make the snapshot current
    CREATE_NO_METADATA = 1 << 2  #: make the snapshot, do not record it
    CREATE_HALT = 1 << 3         #: end the guest afterwards
    CREATE_DISK_ONLY = 1 << 4    #: disks without memory
    CREATE_REUSE_EXT = 1 << 5    #: use overlay files that exist
    CREATE_QUIESCE = 1 << 6      #: freeze the file systems by the guest's agent
    CREATE_ATOMIC = 1 << 7       #: all disks or none
    CREATE_LIVE = 1 << 8         #: while the guest runs
    CREATE_VALIDATE = 1 << 9     #: validate the XML against the schema
    CREATE_INSTANT = 1 << 10     #: of the moment of the call; the guest runs on while its memory is written


@dataclasses.dataclass(frozen=True)
class Stats:
    """What a snapshot took. Times are whole microseconds of CLOCK_MONOTONIC, 0 where a phase was not reached; the
    phases (the first nine) follow each other without gaps, so that their sum is total_us."""
    validate_us: int          #: flags, XML, connecting, the guest's state and abilities; the guest runs
    plan_us: int              #: disks, names, the domain's XML; the guest runs
    prepare_us: int           #: overlays created, memory image opened, capability set; the guest runs
    pause_us: int             #: vCPUs being stopped
    switch_us: int            #: disks to their overlays, one transaction; the guest is paused
    arm_us: int               #: until the guest runs again (plain: until its memory is saved)
    drain_us: int             #: memory flows into the image; the guest runs (0 for a plain snapshot)
    finish_us: int            #: image completed and synced to disk, metadata recorded; the guest runs
    undo_us: int              #: putting everything back, after a failure
    total_us: int             #: the whole call
    instant_us: int           #: from the call's entry to the instant
    guest_paused_us: int      #: the pause as the guest had it; 0 when it was paused already
    memory_image_bytes: int   #: size of the memory image, bytes
    pause_from_events: bool   #: True: guest_paused_us is by QEMU's own time stamps; False: an upper bound
    disks: int                #: disks switched to an overlay


class Guest:
    """A guest whose snapshots are taken, listed and loaded: a context manager, closed at its end.

    Its methods may be called from any thread. Two operations that change the same guest do not wait for each other:
    the second raises Error (OPERATION_INVALID) at once. Every method of a closed guest raises Error (INVALID_ARG),
    but close(). Every method that calls the C library may raise LibraryNotFound.
    """

    def __init__(self, handle: int) -> None:
        """Not for callers: use Guest.open_qmp()."""
        self._handle: Optional[int] = handle

    @classmethod
    def open_qmp(cls, socket: StrPath, state_dir: StrPath, domain_xml: Optional[str] = None) -> "Guest":
        """Opens a guest by its QMP socket: the caller itself has started QEMU (6.0 or later).

        socket: path of a Unix socket on which QEMU serves QMP (`-qmp unix:PATH,server=on,wait=off`), not used by
            anybody else.
        state_dir: an existing directory for the metadata of this guest's snapshots, one a guest.
        domain_xml: the guest's libvirt `<domain>` XML. With it disks are named by their target (`vda`).

        Raises Error: INVALID_ARG, XML_DETAIL or XML_ERROR (domain_xml), SYSTEM_ERROR (socket or directory),
        OPERATION_TIMEOUT (another client has the socket), OPERATION_FAILED (not a QMP socket), CONFIG_UNSUPPORTED
        (QEMU too old). Blocks for some milliseconds, at most 5 seconds.
        """
        handle = library().instantsnap_open_qmp(
            _library.encode(socket, "socket"),
            _library.encode_optional(domain_xml, "domain_xml"),
            _library.encode(state_dir, "state_dir"))
        if not handle:
            raise _library.last_error()
        return cls(handle)

    def close(self) -> None:
        """Closes the guest; a second time does nothing. The guest itself is left as it is. A snapshot under way in
        another thread ends as it would have. Does not block. Raises nothing."""
        handle, self._handle = self._handle, None
        if handle:
            library().instantsnap_close(handle)

    def __enter__(self) -> "Guest":
        return self

    def __exit__(self, kind: Optional[type[BaseException]], value: Optional[BaseException],
                 traceback: Optional[TracebackType]) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {'open' if self._handle else 'closed'}>"

    def snapshot(self, xml: Optional[str] = None, *, name: Optional[str] = None, description: Optional[str] = None,
                 memory: Optional[StrPath] = None, instant: bool = True, flags: Optional[int] = None) -> str:
        """Takes a full snapshot, memory and disks, and returns its name.

        xml: libvirt's `<domainsnapshot>`; by default one is made of name, description and memory. What it leaves
            open: the name is the time in seconds, every writable disk gets an overlay beside it, memory goes to
            STATE_DIR/NAME.mem.
        name, description, memory (path of the memory image): instead of xml, each optional.
        instant: True: the snapshot is of the moment of the call, and the guest runs on while its memory is written.
            False: a plain snapshot, through which the guest is paused.
        flags: exactly these Flags, in place of those that `instant` stands for.

        Blocks until the snapshot is complete and on disk: seconds for a guest of some GiB. KeyboardInterrupt, or
        whatever else a signal handler raises, cancels it: everything is undone, then the exception goes on. (A
        snapshot that was complete already stays.)

        Raises ValueError (both xml and parts of it; a NUL character; flags that are no 32-bit number), Cancelled, or Error with everything as it was
        before the call: INVALID_ARG (flags), XML_DETAIL and XML_ERROR, OPERATION_UNSUPPORTED (not built),
        ARGUMENT_UNSUPPORTED (no background snapshots: the message says why and what to do), OPERATION_INVALID
        (busy, wrong state, name exists), CONFIG_UNSUPPORTED (a disk, file or device in the way), SYSTEM_ERROR
        (files), OPERATION_FAILED (QEMU's reason is in the message), OPERATION_TIMEOUT (see pause_limit()).
        """
        if xml is None:
            xml = _snapshot_xml(name, description, memory)
        elif not (name is None and description is None and memory is None):
            raise ValueError("give either xml or name, description and memory, not both")
        if flags is None:
            flags = Flag.CREATE_LIVE | Flag.CREATE_INSTANT if instant else 0
        if not 0 <= flags < 2**32:
            raise ValueError("flags must be 0 or more, and less than 2**32")
        handle, text, bits = self._open(), _library.encode(xml, "xml"), ctypes.c_uint(flags)

        def create() -> str:
            created = ctypes.c_void_p()
            if library().instantsnap_snapshot_create_xml(handle, text, bits, ctypes.byref(created)) < 0:
                raise _library.last_error()
            return _library.take_string(created.value)

        return _interruptible(create, lambda: library().instantsnap_snapshot_cancel(handle))

    def cancel(self) -> None:
        """Cancels the snapshot that another thread is taking of this guest: that call undoes everything and raises
        Cancelled, unless it was complete already. Does not wait for it. Raises Error (OPERATION_INVALID) when there
        is none."""
        _check(library().instantsnap_snapshot_cancel(self._open()))

    def pause_limit(self, seconds: float) -> None:
        """Bounds the time for which a snapshot may pause the guest before its instant: when it passes, everything is
        undone, and snapshot() raises Error (OPERATION_TIMEOUT). Counts in whole milliseconds, 0.001 s or more; 30 s
        by default. Applies to calls that begin later. Does not block. Raises ValueError (below 1 ms, or too large).
        """
        milliseconds = round(seconds * 1000) if 0 < seconds < 2**32 / 1000 else 0
        if not 1 <= milliseconds < 2**32:
            raise ValueError("seconds must be 0.001 or more, and less than 2**32 / 1000")
        _check(library().instantsnap_set_pause_limit(self._open(), milliseconds))

    def stats(self) -> Stats:
        """What the last snapshot taken, or tried, through this object took. Does not block. Raises Error
        (OPERATION_INVALID) when there was none."""
        stats = _library.CStats(size=ctypes.sizeof(_library.CStats))
        _check(library().instantsnap_get_stats(self._open(), ctypes.byref(stats)))
        values = {field.name: getattr(stats, field.name) for field in dataclasses.fields(Stats)}
        values["pause_from_events"] = bool(values["pause_from_events"])
        return Stats(**values)

    def snapshots(self) -> list[str]:
        """The names of the recorded snapshots, oldest first. Reads files only. Raises Error: SYSTEM_ERROR,
        INVALID_DOMAIN_SNAPSHOT."""
        names = ctypes.c_void_p()
        _check(library().instantsnap_snapshot_list(self._open(), ctypes.byref(names)))
        return _library.take_string_list(names.value)

    def xml(self, name: str) -> str:
        """The `<domainsnapshot>` XML of a recorded snapshot. Reads files only. Raises NotFound, or Error:
        SYSTEM_ERROR, INVALID_DOMAIN_SNAPSHOT."""
        pointer = library().instantsnap_snapshot_get_xml(self._open(), _library.encode(name, "name"))
        if not pointer:
            raise _library.last_error()
        return _library.take_string(pointer)

    def current(self) -> Optional[str]:
        """The name of the current snapshot: the one last taken or loaded, the parent of the next; None when there is
        none. Reads files only. Raises Error: SYSTEM_ERROR, INVALID_DOMAIN_SNAPSHOT."""
        pointer = library().instantsnap_snapshot_current(self._open())
        if pointer:
            return _library.take_string(pointer)
        error = _library.last_error()
        if isinstance(error, NotFound):
            return None
        raise error

    def load(self, name: str, running: Optional[bool] = None) -> None:
        """Feeds a snapshot's memory to this QEMU, which was started as prepare_revert() says, with
        `-incoming defer`. The snapshot becomes the current one.

        running: True: the guest runs afterwards; False: it stays paused; None: as it was at the instant.

        Blocks until memory is loaded: seconds for a guest of some GiB. Signals are handled when it is done. Raises
        NotFound, or Error: CONFIG_UNSUPPORTED (a disk is not as the plan says; nothing was loaded),
        INVALID_DOMAIN_SNAPSHOT, OPERATION_INVALID (no `-incoming defer`, or busy), OPERATION_FAILED (QEMU's
        reason). After a failure during the load that QEMU is of no more use: end it, and start it anew.
        """
        flags = 0 if running is None else _REVERT_RUNNING if running else _REVERT_PAUSED
        _check(library().instantsnap_snapshot_load(self._open(), _library.encode(name, "name"), flags))

    def _open(self) -> int:
        if self._handle is None:
            raise Error(ErrorCode.INVALID_ARG, 10, "the guest is closed")
        return self._handle


def _check(result: int) -> int:
    if result < 0:
        raise _library.last_error()
    return result


def _snapshot_xml(name: Optional[str], description: Optional[str], memory: Optional[StrPath]) -> str:
    root = ElementTree.Element("domainsnapshot")
    if name is not None:
        ElementTree.SubElement(root, "name").text = name
    if description is not None:
        ElementTree.SubElement(root, "description").text = description
    if memory is not None:
        path = _library.decode(_library.encode(memory, "memory"))
        ElementTree.SubElement(root, "memory", snapshot="external", file=path)
    return ElementTree.tostring(root, encoding="unicode")


def _interruptible(work: Callable[[], _Result], cancel: Callable[[], object]) -> _Result:
    """Runs `work` in a thread of its own, so that signals reach this one meanwhile. An exception that one raises here
    cancels the work, and goes on when the work has ended."""
    results: list[_Result] = []
    failures: list[BaseException] = []
    ended = threading.Event()
    permit = [True]  # taken by one of the two threads, as one step: whether the work begins

    def run() -> None:
        try:
            if _take(permit):
                results.append(work())
        except BaseException as failure:
            failures.append(failure)
        finally:
            ended.set()

    try:
        threading.Thread(target=run, name="instantsnap").start()
        ended.wait()
    except BaseException:
        if not _take(permit):
            # Asked again and again, for the work's first step may be yet to come. Waited for, whatever else is
            # raised here: until it has ended the guest may be paused.
            while not ended.is_set():
                try:
                    cancel()
                    ended.wait(0.01)
                except BaseException:
                    continue
        raise
    if failures:
        raise failures[0]
    return results[0]


def _take(permit: list[bool]) -> bool:
    try:
        return permit.pop()
    except IndexError:
        return False
