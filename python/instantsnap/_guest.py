# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest and its snapshots."""

import ctypes
import enum
import math
import operator
import time
from types import TracebackType
from typing import TYPE_CHECKING, Optional, Union
from xml.etree import ElementTree

from . import _binding, _doctor, _library
from ._doctor import Finding
from ._errors import Error, ErrorCode, NotFound, carry
from ._events import Listener, OnEvent, Stats, create_options, milliseconds, stats_of
from ._interrupt import SLICE, interruptible
from ._job import Job
from ._library import StrPath, check, library
from ._memory import LoadStats, Memory, MemoryProgress, load_stats_of, memory_of
from ._recover import Recovered, recovered
from ._storage import Hook, OnStorage

if TYPE_CHECKING:
    import libvirt

_REVERT_RUNNING = 1 << 0
_REVERT_PAUSED = 1 << 1
_REVERT_FORCE = 1 << 2

#: Hooks are kept for ever: a snapshot may call the hook that it began with, even after its Guest
#: and its Job were deleted.
_hooks: list[Hook] = []


class Flag(enum.IntFlag):
    """libvirt's flags for creating a snapshot, without their prefix VIR_DOMAIN_SNAPSHOT_, and
    INSTANT.

    instantsnap.h has the rules. A broken rule raises Error (INVALID_ARG). A flag that is allowed
    but not implemented raises Error (OPERATION_UNSUPPORTED).
    """
    CREATE_REDEFINE = 1 << 0     #: restore or alter metadata
    CREATE_CURRENT = 1 << 1      #: with REDEFINE, make the snapshot current
    CREATE_NO_METADATA = 1 << 2  #: take the snapshot without recording it
    CREATE_HALT = 1 << 3         #: end the guest afterwards
    CREATE_DISK_ONLY = 1 << 4    #: only disks, without memory
    CREATE_REUSE_EXT = 1 << 5    #: use existing overlay files
    CREATE_QUIESCE = 1 << 6      #: freeze the file systems by the guest agent
    CREATE_ATOMIC = 1 << 7       #: all disks or none
    CREATE_LIVE = 1 << 8         #: keep the guest running
    CREATE_VALIDATE = 1 << 9     #: validate the XML against the schema
    CREATE_INSTANT = 1 << 10     #: a snapshot of the moment of the call; the guest runs on


class DeleteFlag(enum.IntFlag):
    """libvirt's flags for deleting a snapshot, without their prefix VIR_DOMAIN_SNAPSHOT_DELETE_."""
    CHILDREN = 1 << 0       #: also its children
    METADATA_ONLY = 1 << 1  #: only the record
    CHILDREN_ONLY = 1 << 2  #: only its children


class Guest:
    """A guest, for taking, listing and loading its snapshots. A context manager: the end of the
    block closes it.

    Any thread may call its methods. Two operations that change the same guest do not wait for each
    other: the second raises Error (OPERATION_INVALID) at once. Every method of a closed guest,
    except close(), raises Error (INVALID_ARG). Every method that calls the C library may raise
    LibraryNotFound.
    """

    def __init__(self, handle: int) -> None:
        """Not for callers: use Guest.open_qmp() or Guest.open_libvirt()."""
        self._handle: Optional[int] = handle
        self._hook: Optional[Hook] = None

    @classmethod
    def open_qmp(cls, socket: StrPath, state_dir: StrPath,
                 domain_xml: Optional[str] = None) -> "Guest":
        """Opens a guest by its QMP socket. The caller itself has started QEMU (6.0 or later).

        socket: path of a Unix socket on which QEMU serves QMP (`-qmp
            unix:PATH,server=on,wait=off`), and which no other client uses.
        state_dir: an existing directory for the metadata of this guest's snapshots, one for each
            guest. It must belong to this user or to root, and no other user may write to it (the
            owner's private group may, and everyone if it is sticky, like /tmp). Else snapshots can
            be listed and read, but not taken, deleted or reverted to (ACCESS_DENIED).
        domain_xml: the guest's libvirt `<domain>` XML. With it disks are named by their target
            (`vda`).

        Raises Error: INVALID_ARG, XML_DETAIL or XML_ERROR (domain_xml), SYSTEM_ERROR (socket or
        directory), OPERATION_TIMEOUT (another client uses the socket), OPERATION_FAILED (not a QMP
        socket), CONFIG_UNSUPPORTED (QEMU too old). Blocks for some milliseconds, at most 5 seconds.
        """
        handle = library().instantsnap_open_qmp(
            _library.encode(socket, "socket"),
            _library.encode_optional(domain_xml, "domain_xml"),
            _library.encode(state_dir, "state_dir"))
        if not handle:
            raise _library.last_error()
        return cls(handle)

    @classmethod
    def open_libvirt(cls, dom: "libvirt.virDomain") -> "Guest":
        """Opens a domain of a stock libvirt, 8.2 or later. This is only needed for the methods that
        libvirt-python does not have: stats(), cancel() from another thread, pause_limit(). For
        anything else snapshot_create_xml() is enough.

        dom: a libvirt.virDomain of a connection to libvirt's QEMU driver on this machine. The
            library takes its own reference to the domain and to the connection.

        snapshots(), xml() and current() ask libvirt, and return all snapshots in its list of the
        domain. snapshot() needs the path of the memory image, and takes only instant snapshots: its
        flags contain CREATE_INSTANT. Revert by snapshot_revert(), not by load(). delete() does the
        same as snapshot_delete().

        Blocks until libvirt has answered. Raises Error: INVALID_DOMAIN, OPERATION_UNSUPPORTED
        (libvirt older than 8.2, a remote connection, another driver). TypeError (not a
        libvirt.virDomain), ImportError (no libvirt-python).
        """
        handle = library().instantsnap_open_libvirt(_binding.domain_pointer(dom))
        if not handle:
            raise _library.last_error()
        return cls(handle)

    def close(self) -> None:
        """Closes the handle; a second call does nothing. The guest itself stays as it is. A
        snapshot that another thread is taking goes on to its end. Does not block. Raises
        nothing."""
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

    def snapshot(self, xml: Optional[str] = None, *, name: Optional[str] = None,
                 description: Optional[str] = None, memory: Optional[StrPath] = None,
                 instant: bool = True, flags: Optional[int] = None,
                 on_event: Optional[OnEvent] = None,
                 progress_interval: Optional[float] = None,
                 image_format: Optional[str] = None,
                 zstd_level: Optional[int] = None) -> str:
        """Takes a full snapshot, memory and disks, and returns its name.

        xml: libvirt's `<domainsnapshot>`. By default it is made of name, description and memory. If
            it does not say otherwise, the name is the time in seconds, every writable disk gets an
            overlay beside its image, and memory goes to STATE_DIR/NAME.mem.
        name, description, memory (path of the memory image): instead of xml, each optional.
        instant: True: the snapshot is of the moment of the call, and the guest runs on while its
            memory is written. False: a non-live snapshot, which pauses the guest until it is saved.
        flags: exactly these Flags, instead of those that `instant` selects.
        on_event: called with each Event as it happens, one at a time, in a thread of its own; not
            called if the snapshot is refused at once, because of its arguments or because this
            guest is busy. The snapshot goes on when it returns. PAUSED and SWITCHED come inside the
            pause, so the guest is paused meanwhile. If it raises an exception, the snapshot is
            cancelled, and the exception is raised here when everything is undone; on_event is not
            called again. (A snapshot that was complete already, as at COMPLETE, stays.)
        progress_interval: seconds between two PROGRESS events, 0.001 or more, in whole
            milliseconds; by default 0.5.
        image_format: how the memory image holds the guest's memory: "raw", QEMU's stream as it
            comes; "sparse", each page at a place of its own and pages of zeros as holes, which
            libvirt 11.2 and later restores; or "zstd", the stream compressed, which libvirt 10.4
            and later restores. By default "raw" for a domain of a stock libvirt, otherwise
            "sparse". Stats.image_format says what it became.
        zstd_level: with image_format="zstd", how thoroughly it is compressed: from 1, the fastest,
            to 19; by default 3.

        Blocks until the snapshot is complete and on disk: seconds for a guest of some GiB.
        KeyboardInterrupt, or any other exception of a signal handler, cancels the snapshot:
        everything is undone, then the exception goes on. (A snapshot that was complete already
        stays.)

        Raises ValueError (both xml and parts of it; a NUL character; flags that are not a 32-bit
        number; an impossible interval; an unknown image format or level), Cancelled, or Error with
        everything as it was before the call: INVALID_ARG (flags), XML_DETAIL and XML_ERROR,
        OPERATION_UNSUPPORTED (not implemented), ARGUMENT_UNSUPPORTED (no background snapshots: the
        message says why and what to do), OPERATION_INVALID (busy, wrong state, name exists),
        CONFIG_UNSUPPORTED (a disk, file or device prevents it), SYSTEM_ERROR (files),
        OPERATION_FAILED (QEMU's reason is in the message), OPERATION_TIMEOUT (see pause_limit()).
        """
        text, bits = _request(xml, name, description, memory, instant, flags)
        handle = self._open()
        hook = self._hook

        def cancel() -> None:
            library().instantsnap_snapshot_cancel(handle)

        listener = Listener(on_event, cancel) if on_event is not None else None
        options = create_options(
            listener, progress_interval, image_format=image_format, zstd_level=zstd_level)

        def create() -> str:
            created = ctypes.c_void_p()
            try:
                check(library().instantsnap_snapshot_create(
                    handle, text, bits, ctypes.byref(options), ctypes.byref(created)))
                name = _library.take_string(created.value)
            except Error as error:
                if listener is not None and listener.raised is not None:
                    carry(listener.raised, error)
                    raise listener.raised
                raise error if hook is None else hook.reason(error)
            if listener is not None and listener.raised is not None:
                raise listener.raised
            return name

        return interruptible(create, cancel)

    def start_snapshot(self, xml: Optional[str] = None, *, name: Optional[str] = None,
                       description: Optional[str] = None, memory: Optional[StrPath] = None,
                       instant: bool = True, flags: Optional[int] = None,
                       progress_interval: Optional[float] = None, at_once: bool = False,
                       image_format: Optional[str] = None,
                       zstd_level: Optional[int] = None) -> Job:
        """Starts a full snapshot, and returns at the instant: the caller may change the guest at
        once, while its memory is still being written. The Job represents the rest, and has the
        snapshot's name and its errors.

            with guest.start_snapshot() as job:
                ...  # change the guest

        at_once: True: returns before anything is done, and does not block; for event loops. The job
            reports all errors, except OPERATION_INVALID if a snapshot is being taken through this
            object already: this call raises that.
        The other arguments are those of snapshot().

        Blocks until the instant, for tens of milliseconds; for a non-live snapshot, until its
        memory is saved. KeyboardInterrupt, or any other exception of a signal handler, cancels it,
        as for snapshot(). Raises what snapshot() does, with everything as it was before the call.
        """
        text, bits = _request(xml, name, description, memory, instant, flags)
        options = create_options(None, progress_interval, at_once, image_format, zstd_level)
        handle = self._open()
        hook = self._hook
        started: list[Job] = []

        def start() -> None:
            job = library().instantsnap_snapshot_create_start(
                handle, text, bits, ctypes.byref(options))
            if not job:
                error = _library.last_error()
                raise error if hook is None else hook.reason(error)
            started.append(Job(job, hook))

        if at_once:
            start()
            return started[0]
        try:
            interruptible(start, lambda: library().instantsnap_snapshot_cancel(handle))
        except BaseException as raised:
            for job in started:
                job._undo(raised)
            raise
        return started[0]

    async def snapshot_async(self, xml: Optional[str] = None, *, name: Optional[str] = None,
                             description: Optional[str] = None, memory: Optional[StrPath] = None,
                             instant: bool = True, flags: Optional[int] = None,
                             on_event: Optional[OnEvent] = None,
                             progress_interval: Optional[float] = None,
                             image_format: Optional[str] = None,
                             zstd_level: Optional[int] = None) -> str:
        """Takes a full snapshot, memory and disks, and returns its name: snapshot() for asyncio.
        Never blocks the event loop. For more control use start_snapshot(at_once=True), whose Job is
        awaitable.

        on_event: called with each Event in the event loop, soon after it has happened, and outside
            the pause. If it raises an exception, the snapshot is cancelled, and the exception is
            raised here when everything is undone.
        The other arguments and exceptions are those of snapshot().

        Cancelling the task cancels the snapshot; CancelledError goes on when everything is undone.
        (A snapshot that was complete already stays.) From Python 3.11 on, Ctrl-C with asyncio.run()
        does the same. Before 3.11, KeyboardInterrupt can be raised inside any task: if you take
        several snapshots, cancel them on SIGINT, by loop.add_signal_handler().
        """
        async with self.start_snapshot(
                xml, name=name, description=description, memory=memory, instant=instant,
                flags=flags, progress_interval=progress_interval, at_once=True,
                image_format=image_format, zstd_level=zstd_level) as job:
            if on_event is not None:
                async for event in job:
                    on_event(event)
            return await job

    def cancel(self) -> None:
        """Cancels the snapshot that another thread, or a job, is taking of this guest. That
        snapshot is undone and ends with Cancelled, unless it was complete already. Does not wait
        for the undo. Raises Error (OPERATION_INVALID) if no snapshot is being taken."""
        check(library().instantsnap_snapshot_cancel(self._open()))

    def pause_limit(self, seconds: float) -> None:
        """Limits how long a snapshot may pause the guest before its instant. If the limit passes,
        everything is undone, and snapshot() raises Error (OPERATION_TIMEOUT). Whole milliseconds,
        0.001 s or more; 30 s by default. Applies to calls that begin later. Does not block. Raises
        ValueError (below 1 ms, or too large).
        """
        limit = milliseconds(seconds, "seconds")
        check(library().instantsnap_set_pause_limit(self._open(), limit))

    def overlap_tries(self, tries: int) -> None:
        """Limits how many tries to stop the guest just before QEMU has touched all of its memory
        may be too late (QEMU 10.0 or later). After that number the library stops the guest first,
        which pauses it for longer and always works. 0: it always stops the guest first. 3 by
        default. Applies to calls that begin later. Does not block. Raises ValueError (negative, or
        too large)."""
        if not 0 <= tries < 2**32:
            raise ValueError("tries must be 0 or more, and less than 2**32")
        check(library().instantsnap_set_overlap_tries(self._open(), tries))

    def require_watchdog(self, required: bool = True) -> None:
        """Says whether a snapshot is refused, by Error (OPERATION_FAILED), if no watchdog can be
        started for it. By default it is taken without one, and Stats.watchdog says so. Applies to
        calls that begin later. Does not block."""
        check(library().instantsnap_set_watchdog_required(self._open(), bool(required)))

    def set_storage_hook(self, snapshot: Optional[OnStorage], *, undo: Optional[OnStorage] = None,
                         deadline: Optional[float] = None) -> None:
        """Sets the functions that snapshot the disks with snapshot='manual', instead of QEMU. The
        snapshot's XML says which disks these are; for disks that it does not mention, the domain's
        XML does. Without a hook a snapshot with such disks raises Error (OPERATION_UNSUPPORTED).

        snapshot: called with a StorageCall inside the pause, once for all such disks, in a thread
            of its own. It must have snapshotted the disks when it returns; the guest is paused
            until then. If it raises an exception, it must leave nothing behind: the snapshot fails,
            and snapshot(), or the job, raises that exception when everything is undone. None:
            removes the hook.
        undo: removes what `snapshot` has made. Called with the same StorageCall, once, if
            `snapshot` has returned, in time or not, and the snapshot of the guest fails. The guest
            runs again by then. sys.unraisablehook receives its exceptions.
        deadline: seconds that `snapshot` may take, 0.001 or more, in whole milliseconds; None: as
            long as the pause may, see pause_limit(). When they pass, or when the snapshot is
            cancelled, the guest runs on and everything is undone at once; Error (OPERATION_TIMEOUT)
            or Cancelled is raised when the function has returned.

        Applies to calls that begin later. A domain of libvirt must be running, and such a snapshot
        of it needs Flag.CREATE_NO_METADATA. To revert to one: prepare_revert(revert=). The
        functions are kept as long as the process lives. Does not block. Raises ValueError (an
        impossible deadline).
        """
        hook = None if snapshot is None else Hook(snapshot, undo, deadline=deadline)
        handle = self._open()
        if hook is not None:
            _hooks.append(hook)
        structure = None if hook is None else ctypes.byref(hook.structure)
        check(library().instantsnap_set_storage_hook(handle, structure))
        self._hook = hook

    def stats(self) -> Stats:
        """How long the last snapshot through this object took, complete or failed. Does not block.
        Raises Error (OPERATION_INVALID) if there was none."""
        stats = _library.CStats(size=ctypes.sizeof(_library.CStats))
        check(library().instantsnap_get_stats(self._open(), ctypes.byref(stats)))
        return stats_of(stats)

    def snapshots(self) -> list[str]:
        """The names of the recorded snapshots, oldest first. Only reads files. Raises Error:
        SYSTEM_ERROR, INVALID_DOMAIN_SNAPSHOT."""
        names = ctypes.c_void_p()
        check(library().instantsnap_snapshot_list(self._open(), ctypes.byref(names)))
        return _library.take_string_list(names.value)

    def xml(self, name: str) -> str:
        """The `<domainsnapshot>` XML of a recorded snapshot. Only reads files. Raises NotFound, or
        Error: SYSTEM_ERROR, INVALID_DOMAIN_SNAPSHOT."""
        return _library.take_string(
            library().instantsnap_snapshot_get_xml(self._open(), _library.encode(name, "name")))

    def current(self) -> Optional[str]:
        """The name of the current snapshot: the one that was last taken or loaded, the parent of
        the next one; None if there is none. Only reads files. Raises Error: SYSTEM_ERROR,
        INVALID_DOMAIN_SNAPSHOT."""
        try:
            return _library.take_string(library().instantsnap_snapshot_current(self._open()))
        except NotFound:
            return None

    def load(self, name: str, running: Optional[bool] = None, *, force: bool = False,
             memory: Union[str, Memory] = "auto",
             bandwidth: Optional[int] = None) -> LoadStats:
        """Feeds a snapshot's memory to this QEMU, which was started with `-incoming defer`, as
        prepare_revert() says. The snapshot becomes the current one.

        running: True: the guest runs afterwards; False: it stays paused; None: as it was at the
            instant.
        force: accepts images that were written or replaced since the snapshot froze them, which
            otherwise raise Error (SNAPSHOT_REVERT_RISKY). For copies with the same content.
        memory: how the memory comes back: see Memory. What is not possible is an error; the library
            never silently does something else. With "lazy" this returns when the guest runs, and
            its memory follows: see memory_progress() and wait_memory().
        bandwidth: for "lazy": how many bytes in a second come that the guest has not asked for;
            None: as many as can be.

        Returns how long the parts took, and how the memory came. Blocks until memory is loaded:
        with "full", seconds for a guest of some GiB. Signals are handled afterwards. Raises
        ValueError (an unknown `memory`), NotFound, or Error: OPERATION_UNSUPPORTED (this `memory`
        is not supported), CONFIG_UNSUPPORTED (a disk is not as the plan says, or this `memory` is
        not possible with this image or this QEMU as it was started; nothing was loaded),
        INVALID_DOMAIN_SNAPSHOT, OPERATION_INVALID (no `-incoming defer`, or busy), SYSTEM_ERROR,
        OPERATION_FAILED (QEMU's reason). After a failure during the load that QEMU cannot be used
        any more: end it, and start it again.
        """
        flags = 0 if running is None else _REVERT_RUNNING if running else _REVERT_PAUSED
        flags |= _REVERT_FORCE if force else 0
        options = _library.CLoadOptions(
            size=ctypes.sizeof(_library.CLoadOptions), memory=memory_of(memory),
            bandwidth=bandwidth or 0)
        stats = _library.CLoadStats(size=ctypes.sizeof(_library.CLoadStats))
        check(library().instantsnap_snapshot_load_with(
            self._open(), _library.encode(name, "name"), flags,
            ctypes.byref(options), ctypes.byref(stats)))
        return load_stats_of(stats)

    def memory_progress(self) -> MemoryProgress:
        """How far the memory is of a guest that was loaded with memory="lazy", by this process or
        another one. For all other guests nothing is to come.

        While memory is coming, snapshots and deletes of this guest raise Error
        (OPERATION_INVALID), and so does the delete of the snapshot that it comes from. Blocks for
        some queries. Raises Error: OPERATION_INVALID (busy), OPERATION_FAILED, OPERATION_TIMEOUT.
        """
        progress = _library.CMemoryProgress(size=ctypes.sizeof(_library.CMemoryProgress))
        check(library().instantsnap_memory_get_progress(self._open(), ctypes.byref(progress)))
        return MemoryProgress(bytes_in=progress.bytes_in, bytes_total=progress.bytes_total,
                              coming=bool(progress.coming))

    def wait_memory(self, timeout: Optional[float] = None) -> bool:
        """Waits until all memory of a guest is in that was loaded with memory="lazy". Blocks for
        at most `timeout` seconds; None: without limit. Returns whether all memory is in. Raises as
        memory_progress()."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            seconds = min(SLICE, deadline - time.monotonic())
            slice_ms = math.ceil(seconds * 1000) if seconds > 0 else 0
            if check(library().instantsnap_memory_wait(self._open(), slice_ms)):
                return True
            if seconds <= 0:
                return False

    def delete(self, name: str, flags: int = 0) -> None:
        """Deletes a snapshot. What the guest has written since is merged into the images below,
        while the guest runs on; the snapshot's overlays, its memory image and its record are
        removed. instantsnap_snapshot_delete() in instantsnap.h says more.

        flags: DeleteFlag. 0: deletes the snapshot, which must have no children. METADATA_ONLY:
            removes only the record; all files stay as they are, and children become children of the
            parent.

        Blocks until all is merged, which can take long; other threads go on. If a signal handler
        raises an exception meanwhile, for example KeyboardInterrupt, it goes on when the delete is
        done. Raises ValueError (a NUL character, flags that are not a 32-bit number), NotFound, or
        Error: INVALID_ARG (flags), OPERATION_UNSUPPORTED (it has children), OPERATION_INVALID
        (busy, or something prevents it), SYSTEM_ERROR, OPERATION_FAILED (QEMU's reason). If the
        message says so, the snapshot cannot be reverted to any more: remove the cause, and delete
        it again.
        """
        handle, text, bits = self._open(), _library.encode(name, "name"), checked_flags(flags)

        def delete() -> None:
            check(library().instantsnap_snapshot_delete(handle, text, bits))

        interruptible(delete, _nothing)

    def doctor(self) -> list[Finding]:
        """Examines whether instant snapshots of this guest work, and says what to do where they do
        not. Changes nothing. instantsnap_doctor() in instantsnap.h says more; doctor() examines the
        host alone.

        Blocks while QEMU answers, up to 30 seconds for each query; other threads go on. Raises
        Error: INVALID_ARG (the guest is closed).
        """
        return _doctor.examine(self._open())

    def recover(self) -> list[Recovered]:
        """Recovers the guest, if a snapshot of it was interrupted because its process and its
        watchdog were both killed: finishes the snapshot if it is proved to be complete, else undoes
        it. What cannot be proved is left as it is. Returns what was found; an empty list if no
        snapshot was interrupted. instantsnap_recover() in instantsnap.h says more. If QEMU has
        ended too: recover_offline(); a domain of libvirt may be shut off.

        Blocks until the overlays are merged; other threads go on. If a signal handler raises an
        exception meanwhile, for example KeyboardInterrupt, it goes on when the recovery is done.
        Raises Error: OPERATION_INVALID (a snapshot is under way), ACCESS_DENIED, SYSTEM_ERROR,
        OPERATION_FAILED (QEMU's reason).
        """
        handle, report = self._open(), ctypes.c_void_p()

        def recover() -> None:
            check(library().instantsnap_recover(handle, ctypes.byref(report)))

        interruptible(recover, _nothing)
        return recovered(report.value)

    def _open(self) -> int:
        if self._handle is None:
            raise Error(ErrorCode.INVALID_ARG, 10, "the guest is closed")
        return self._handle


def _nothing() -> None:
    """The `cancel` of an operation that cannot be cancelled: interruptible() waits for its end."""


def checked_flags(flags: int) -> int:
    """Flags for the C library. Raises ValueError for flags that ctypes would truncate."""
    bits = operator.index(flags)
    if not 0 <= bits < 2**32:
        raise ValueError("flags must be 0 or more, and less than 2**32")
    return bits


def _request(xml: Optional[str], name: Optional[str], description: Optional[str],
             memory: Optional[StrPath], instant: bool, flags: Optional[int]) -> tuple[bytes, int]:
    """The arguments of snapshot() as XML and flags for the C library."""
    if xml is None:
        xml = _snapshot_xml(name, description, memory)
    elif not (name is None and description is None and memory is None):
        raise ValueError("give either xml or name, description and memory, not both")
    if flags is None:
        flags = Flag.CREATE_LIVE | Flag.CREATE_INSTANT if instant else 0
    return _library.encode(xml, "xml"), checked_flags(flags)


def _snapshot_xml(name: Optional[str], description: Optional[str],
                  memory: Optional[StrPath]) -> str:
    root = ElementTree.Element("domainsnapshot")
    if name is not None:
        ElementTree.SubElement(root, "name").text = name
    if description is not None:
        ElementTree.SubElement(root, "description").text = description
    if memory is not None:
        path = _library.decode(_library.encode(memory, "memory"))
        ElementTree.SubElement(root, "memory", snapshot="external", file=path)
    return ElementTree.tostring(root, encoding="unicode")
