# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is told of a snapshot: its events while it is being taken, where it is, what it took."""

import ctypes
import dataclasses
import enum
from collections.abc import Callable
from typing import Any, Optional, Union

from . import _library
from ._errors import ErrorCode, known


class EventType(enum.IntEnum):
    """What happens to a snapshot that is being taken. Each of the first three comes at most once,
    in this order; PROGRESS any number of times after INSTANT (of a plain snapshot, before it); then
    exactly one of COMPLETE and FAILED, the last. FAILED comes from whichever phase. A guest that
    was paused already has no PAUSED."""
    PAUSED = 1    #: the vCPUs have stopped
    SWITCHED = 2  #: the disks are on their overlays
    INSTANT = 3   #: memory and disks are held; the guest, if it ran, runs again, and may be changed
    PROGRESS = 4  #: memory flows into the image
    COMPLETE = 5  #: the snapshot is complete and on disk
    FAILED = 6    #: it failed or was cancelled, and everything is undone


class Phase(enum.IntEnum):
    """The phases of a snapshot, in their order; each is described at its time in Stats."""
    VALIDATE = 0
    PLAN = 1
    PREPARE = 2
    PAUSE = 3
    SWITCH = 4
    ARM = 5
    DRAIN = 6
    FINISH = 7
    UNDO = 8   #: after a failure or a cancel
    ENDED = 9  #: complete, or failed and undone


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that has happened to a snapshot. Numbers that say nothing of its type are 0."""
    type: Union[EventType, int]        #: what; an int for a type not known here
    error_code: Union[ErrorCode, int]  #: FAILED: why; an int for a number not known here
    time_us: int                       #: when: microseconds of CLOCK_MONOTONIC, the clock of time.monotonic()
    paused_us: int                     #: microseconds for which the guest has been paused so far; final from INSTANT on
    bytes_done: int                    #: size of the memory image so far, bytes
    bytes_total: int                   #: what it is expected to become, at most, before devices' state; 0: not known
    bytes_per_second: int              #: PROGRESS: since the last one, or since the instant
    pages_left: int                    #: pages of guest memory that QEMU has not saved yet; at INSTANT all of them


@dataclasses.dataclass(frozen=True)
class JobInfo:
    """Where a snapshot is. The last four are as of the last progress interval."""
    phase: Union[Phase, int]  #: an int for a phase not known here
    instant: bool             #: the instant has passed
    elapsed_us: int           #: microseconds since the call, until now or until the end
    paused_us: int            #: microseconds for which the guest has been paused so far
    bytes_done: int           #: size of the memory image so far, bytes
    bytes_total: int          #: what it is expected to become, at most, before devices' state, bytes; 0: not known
    bytes_per_second: int     #: since the last progress interval, or since the instant
    pages_left: int           #: pages of guest memory that QEMU has not saved yet


@dataclasses.dataclass(frozen=True)
class Stats:
    """What a snapshot took. Times are whole microseconds of CLOCK_MONOTONIC, 0 where a phase was
    not reached; the phases (the first nine) follow each other without gaps, so that their sum is
    total_us."""
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
    setup_us: int             #: how long QEMU set the background snapshot up (it touches all memory), to whole milliseconds
    lost_pause_us: int        #: for how long lost tries paused the guest, besides guest_paused_us
    lost_tries: int           #: tries to stop the guest just in time that came too late; see Guest.overlap_tries()
    overlapped: bool          #: the guest ran while QEMU touched its memory


#: Told of the events of a snapshot; what it returns does not matter.
OnEvent = Callable[[Event], object]


def event_of(event: _library.CEvent) -> Event:
    values = _values(Event, event)
    values["type"] = known(EventType, event.type)
    values["error_code"] = known(ErrorCode, event.error_code)
    return Event(**values)


def info_of(info: _library.CJobInfo) -> JobInfo:
    values = _values(JobInfo, info)
    values["phase"] = known(Phase, info.phase)
    values["instant"] = bool(info.instant)
    return JobInfo(**values)


def stats_of(stats: _library.CStats) -> Stats:
    values = _values(Stats, stats)
    for name in ("pause_from_events", "overlapped"):
        values[name] = bool(values[name])
    return Stats(**values)


def _values(kind: Any, structure: ctypes.Structure) -> dict[str, Any]:
    return {field.name: getattr(structure, field.name) for field in dataclasses.fields(kind)}


class Listener:
    """A callback of the C library's that tells a Python one. Both must live for as long as the
    library may call.

    The first exception of the Python one cancels the snapshot and is kept in `raised`, for C is no
    place for it; from then on nothing is told.
    """

    def __init__(self, on_event: OnEvent, cancel: Callable[[], object]) -> None:
        self.raised: Optional[BaseException] = None
        self._on_event = on_event
        self._cancel = cancel
        self.callback = _library.EventCallback(self._tell)

    def _tell(self, event: Any, opaque: Optional[int]) -> None:
        if self.raised is not None:
            return
        try:
            self._on_event(event_of(event.contents))
        except BaseException as error:
            self.raised = error
            if event.contents.type not in (EventType.COMPLETE, EventType.FAILED):
                self._cancel()  # not after the end: it would be another snapshot that is cancelled


def create_options(listener: Optional[Listener] = None, progress_interval: Optional[float] = None,
                   at_once: bool = False) -> _library.CCreateOptions:
    """How a snapshot is taken, for the C library. Raises ValueError (progress_interval)."""
    options = _library.CCreateOptions(size=ctypes.sizeof(_library.CCreateOptions))
    if listener is not None:
        options.callback = listener.callback
    if progress_interval is not None:
        options.progress_interval_ms = milliseconds(progress_interval, "progress_interval")
    if at_once:
        options.flags = _library.CREATE_AT_ONCE
    return options


def milliseconds(seconds: float, what: str) -> int:
    """Seconds as the C library counts them. Raises ValueError where it cannot."""
    count = round(seconds * 1000) if 0 < seconds < 2**32 / 1000 else 0
    if not 1 <= count < 2**32:
        raise ValueError(f"{what} must be 0.001 or more, and less than 2**32 / 1000")
    return count
