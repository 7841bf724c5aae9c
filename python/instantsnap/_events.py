# SPDX-License-Identifier: LGPL-2.1-or-later
"""The events of a snapshot, the state of a job, and how long a snapshot took."""

import ctypes
import dataclasses
import enum
from collections.abc import Callable
from typing import Any, Optional, Union

from . import _library
from ._errors import ErrorCode, known


class EventType(enum.IntEnum):
    """The events of a snapshot that is being taken. PAUSED, SWITCHED and INSTANT come in this
    order, each at most once. PROGRESS comes any number of times after INSTANT (before it for a
    non-live snapshot). Exactly one of COMPLETE and FAILED comes last. FAILED can come in any phase.
    If the guest was paused already, there is no PAUSED."""
    PAUSED = 1    #: the vCPUs have stopped
    SWITCHED = 2  #: the disks are on their overlays
    INSTANT = 3   #: memory and disks are held; a guest that ran runs again, and may be changed
    PROGRESS = 4  #: memory flows into the image
    COMPLETE = 5  #: the snapshot is complete and on disk
    FAILED = 6    #: it failed or was cancelled, and everything is undone


class Phase(enum.IntEnum):
    """The phases of a snapshot, in order. The fields of Stats describe them."""
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


class Watchdog(enum.IntEnum):
    """What the watchdog of a snapshot was: the process that resumes the guest, and undoes the
    snapshot, if this process is killed."""
    NONE = 0     #: no process could be started, or none was needed yet
    FORK = 1     #: a fork: the program was not found, or could not be started
    PROGRAM = 2  #: the program instantsnap-watchdog


class ImageFormat(enum.IntEnum):
    """How a memory image holds the guest's memory."""
    DEFAULT = 0  #: not known yet
    RAW = 1      #: QEMU's stream as it came
    SPARSE = 2   #: each page at a place of its own, pages of zeros as holes of the file
    ZSTD = 3     #: QEMU's stream, compressed


@dataclasses.dataclass(frozen=True)
class Event:
    """An event of a snapshot. Numbers that do not apply to its type are 0."""
    type: Union[EventType, int]        #: an int for an unknown type
    error_code: Union[ErrorCode, int]  #: FAILED: the reason; an int for an unknown number
    time_us: int                       #: microseconds of CLOCK_MONOTONIC, as time.monotonic()
    paused_us: int                     #: how long the guest was paused so far; final at INSTANT
    #: size of the memory image so far, bytes; if it is not raw, that which a raw one would have
    bytes_done: int
    bytes_total: int                   #: its expected size, at most, without devices; 0: not known
    bytes_per_second: int              #: PROGRESS: since the last PROGRESS, or since the instant
    pages_left: int                    #: pages that QEMU has not saved yet; at INSTANT all pages


@dataclasses.dataclass(frozen=True)
class JobInfo:
    """The state of a job. The last four fields are as of the last progress interval."""
    phase: Union[Phase, int]  #: an int for an unknown phase
    instant: bool             #: the instant has passed
    elapsed_us: int           #: microseconds from the call until now, or until the job's end
    paused_us: int            #: microseconds for which the guest has been paused so far
    #: size of the memory image so far, bytes; if it is not raw, that which a raw one would have
    bytes_done: int
    bytes_total: int          #: its expected size, at most, without devices, bytes; 0: not known
    bytes_per_second: int     #: since the last progress interval, or since the instant
    pages_left: int           #: pages of guest memory that QEMU has not saved yet


@dataclasses.dataclass(frozen=True)
class Stats:
    """How long each phase of a snapshot took. Times are whole microseconds of CLOCK_MONOTONIC; 0 if
    the phase was not reached. The phases (the first nine fields) follow each other without gaps, so
    their sum is total_us."""
    validate_us: int          #: flags, XML, the guest's state, connecting; the guest runs
    plan_us: int              #: disks, names, the domain's XML; the guest runs
    prepare_us: int           #: overlays, memory image, capability; the guest runs
    pause_us: int             #: the vCPUs are being stopped
    switch_us: int            #: disks switched to their overlays, hook; the guest is paused
    arm_us: int               #: until the guest runs again (non-live: until memory is saved)
    drain_us: int             #: memory flows into the image; the guest runs (non-live: 0)
    finish_us: int            #: image completed and synced, metadata recorded; the guest runs
    undo_us: int              #: everything is undone, after a failure
    total_us: int             #: the whole call
    instant_us: int           #: from the call's entry to the instant
    guest_paused_us: int      #: the pause of the guest; 0 if it was paused already
    memory_image_bytes: int   #: size of the memory image; of one that is not raw, its space on disk; bytes
    pause_from_events: bool   #: guest_paused_us is by QEMU's own time stamps; else an upper bound
    disks: int                #: number of disks that were switched to an overlay
    setup_us: int             #: how long QEMU set up the background snapshot, in whole milliseconds
    lost_pause_us: int        #: how long lost tries paused the guest; not in guest_paused_us
    lost_tries: int           #: tries to stop the guest that were too late: Guest.overlap_tries()
    overlapped: bool          #: the guest ran while QEMU touched its memory
    watchdog: Union[Watchdog, int]  #: what would have taken over if this process had been killed
    #: the format of the memory image; RAW although another was asked for if QEMU's stream has,
    #: before its first page, what this version does not know
    image_format: Union[ImageFormat, int]


#: Receives the events of a snapshot. Its result is ignored.
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
    values["watchdog"] = known(Watchdog, stats.watchdog)
    values["image_format"] = known(ImageFormat, stats.image_format)
    return Stats(**values)


def _values(kind: Any, structure: ctypes.Structure) -> dict[str, Any]:
    return {field.name: getattr(structure, field.name) for field in dataclasses.fields(kind)}


class Listener:
    """A callback for the C library that calls a Python function. Both must live as long as the
    library may call them.

    The first exception of the Python function cancels the snapshot. It is kept in `raised`, because
    it cannot pass through C. From then on the function is not called any more.
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
                self._cancel()  # after the end this would cancel another snapshot


def create_options(listener: Optional[Listener] = None, progress_interval: Optional[float] = None,
                   at_once: bool = False,
                   image_format: Optional[str] = None,
                   zstd_level: Optional[int] = None) -> _library.CCreateOptions:
    """The options for the C library. Raises ValueError (progress_interval, image_format,
    zstd_level)."""
    options = _library.CCreateOptions(size=ctypes.sizeof(_library.CCreateOptions))
    if listener is not None:
        options.callback = listener.callback
    if progress_interval is not None:
        options.progress_interval_ms = milliseconds(progress_interval, "progress_interval")
    if at_once:
        options.flags = _library.CREATE_AT_ONCE
    if image_format is not None:
        try:
            options.image_format = ImageFormat[str(image_format).upper()]
        except KeyError:
            raise ValueError(
                f"image_format must be 'raw', 'zstd' or 'sparse', not {image_format!r}") from None
    if zstd_level is not None:
        if image_format != "zstd" or zstd_level not in range(1, 20):
            raise ValueError(
                f"zstd_level must be 1 to 19, with image_format='zstd', not {zstd_level!r}")
        options.zstd_level = zstd_level
    return options


def milliseconds(seconds: float, what: str) -> int:
    """Seconds as whole milliseconds, for the C library. Raises ValueError if that is impossible."""
    count = round(seconds * 1000) if 0 < seconds < 2**32 / 1000 else 0
    if not 1 <= count < 2**32:
        raise ValueError(f"{what} must be 0.001 or more, and less than 2**32 / 1000")
    return count
