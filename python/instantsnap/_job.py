# SPDX-License-Identifier: LGPL-2.1-or-later
"""A snapshot that is being taken."""

import asyncio
import collections
import ctypes
import math
import select
import threading
import time
from collections.abc import AsyncIterator, Generator, Iterator
from types import TracebackType
from typing import Any, Optional

from . import _library
from ._errors import Error, ErrorCode, carry
from ._events import Event, EventType, JobInfo, Stats, event_of, info_of, stats_of
from ._interrupt import SLICE
from ._library import check, library, take_string
from ._storage import Hook
from ._waiters import Waiters


class Job:
    """A snapshot that is being taken, started by Guest.start_snapshot().

    A context manager: the end of the block waits for the end of the job, and raises the job's Error
    if it failed. If an exception leaves the block, also KeyboardInterrupt, the snapshot is
    cancelled and undone; then the exception goes on. (A snapshot that was complete already stays.)
    The job can be queried after the block too.

    With asyncio:

    - `async with job` does the same without blocking the event loop.
    - `await job` is result(). If its task is cancelled, the snapshot is cancelled too, and
      CancelledError is raised when everything is undone. (asyncio.shield(job) only stops waiting.)
    - `async for event in job` is events(), and cancels nothing.

    Only one event loop at a time may do this. It may also use the other methods, except those that
    block.

    Any thread may call the methods. Signals are handled at once while a method waits: an exception
    of a handler, for example KeyboardInterrupt, goes on, and so does the snapshot, unless the
    method is called inside such a block. Every method of a closed job, except close(), raises Error
    (INVALID_ARG).

    A job goes on if it is closed, if it is deleted, and if its guest is closed. The end of the
    process interrupts it: see "Processes" in instantsnap.h.
    """

    def __init__(self, handle: int, hook: Optional[Hook] = None) -> None:
        """Not for callers: use Guest.start_snapshot()."""
        self._handle: Optional[int] = handle
        self._hook = hook
        self._lock = threading.Lock()  # keeps the order of the events that are taken
        # Events that a task took from the library while it waited for the end.
        self._events: collections.deque[Event] = collections.deque()
        self._waiters = Waiters()

    def done(self) -> bool:
        """Whether the job has ended, with success or with an error. Does not block."""
        return self.wait(0)

    def wait(self, timeout: Optional[float] = None) -> bool:
        """Waits until the job has ended, with success or with an error. Blocks for at most
        `timeout` seconds; None: without limit. Returns whether the job has ended."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            seconds = min(SLICE, deadline - time.monotonic())
            milliseconds = math.ceil(seconds * 1000) if seconds > 0 else 0
            if check(library().instantsnap_job_wait(self._open(), milliseconds)):
                return True
            if seconds <= 0:
                return False

    def result(self, timeout: Optional[float] = None) -> str:
        """Waits until the snapshot is complete, and returns its name. Blocks for at most `timeout`
        seconds; None: without limit.

        Raises TimeoutError, Cancelled, or the Error that Guest.snapshot() would have raised, with
        everything as it was before the call.
        """
        if not self.wait(timeout):
            raise TimeoutError("the snapshot is still being taken")
        return self.name

    @property
    def name(self) -> str:
        """The snapshot's name, once it is complete. Does not block. Raises the Error of result(),
        or OPERATION_INVALID if the job has not ended yet."""
        try:
            return take_string(library().instantsnap_job_get_name(self._open()))
        except Error as error:
            raise error if self._hook is None else self._hook.reason(error)

    def xml(self) -> str:
        """The snapshot's `<domainsnapshot>` XML, once it is complete, as it was recorded, or, with
        CREATE_NO_METADATA, as it would have been recorded. Does not block. Raises the same as
        `name`."""
        return take_string(library().instantsnap_job_get_xml(self._open()))

    def stats(self) -> Stats:
        """How long the snapshot took, once the job has ended. Does not block. Raises Error
        (OPERATION_INVALID) if it has not ended yet."""
        stats = _library.CStats(size=ctypes.sizeof(_library.CStats))
        check(library().instantsnap_job_get_stats(self._open(), ctypes.byref(stats)))
        return stats_of(stats)

    def info(self) -> JobInfo:
        """The job's state. Does not block."""
        info = _library.CJobInfo(size=ctypes.sizeof(_library.CJobInfo))
        check(library().instantsnap_job_get_info(self._open(), ctypes.byref(info)))
        return info_of(info)

    def cancel(self) -> None:
        """Cancels the job, in any phase: everything is undone, and the job ends with Cancelled,
        unless it was complete already. Does not wait for that."""
        check(library().instantsnap_job_cancel(self._open()))

    def fileno(self) -> int:
        """A file descriptor that is readable while next_event() has an event to give, for select,
        selectors and event loops: the job itself can be passed to them. Valid until close(). The
        caller must not read or close it."""
        return check(library().instantsnap_job_get_fd(self._open()))

    def next_event(self) -> Optional[Event]:
        """Takes the oldest event that was not taken yet; None: there is none now. A new PROGRESS
        event replaces one that was not taken. Does not block."""
        with self._lock:
            return self._events.popleft() if self._events else self._take()

    def events(self) -> Iterator[Event]:
        """Takes the events one by one, from the oldest that was not taken yet to the last, COMPLETE
        or FAILED. Blocks until the next event has happened. Raises nothing if the snapshot fails:
        result() does."""
        while True:
            done = self.done()  # asked first: once the job has ended, its last event is pending
            event = self.next_event()
            if event is not None:
                yield event
            elif done:
                return
            else:
                poll = select.poll()
                poll.register(self, select.POLLIN)
                poll.poll(SLICE * 1000)

    def close(self) -> None:
        """Frees the job without cancelling it; a second call does nothing. Does not block. Raises
        nothing."""
        handle, self._handle = self._handle, None
        if handle:
            self._waiters.wake()
            library().instantsnap_job_free(handle)

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, kind: Optional[type[BaseException]], value: Optional[BaseException],
                 traceback: Optional[TracebackType]) -> None:
        if self._handle is None:
            return
        if value is not None:
            self._undo(value)
            return
        try:
            self.wait()
        except BaseException as raised:
            self._undo(raised)
            raise
        self.result()

    async def __aenter__(self) -> "Job":
        return self

    async def __aexit__(self, kind: Optional[type[BaseException]], value: Optional[BaseException],
                        traceback: Optional[TracebackType]) -> None:
        if self._handle is None:
            return
        if kind is None:
            await self
        elif kind is GeneratorExit:
            self.cancel()  # the coroutine is being closed, and cannot wait any more
        else:
            await self._undo_async(value)

    def __await__(self) -> Generator[Any, None, str]:
        return self._result_async().__await__()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self._events_async()

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {'open' if self._handle else 'closed'}>"

    def _undo(self, raised: BaseException) -> None:
        """Cancels the job, and waits until it has ended, whatever else is raised meanwhile. An
        error of the undo is attached to `raised`."""
        while True:
            try:
                self.cancel()
                self.wait()
                self._attach_failure(raised)
                return
            except Error:
                return  # closed by another thread
            except BaseException:
                continue

    def _attach_failure(self, raised: Optional[BaseException]) -> None:
        """Attaches the error of a failed undo to an exception, once the job has ended."""
        try:
            self.name
        except Exception as error:
            if raised is not None:
                carry(raised, error)

    async def _undo_async(self, raised: Optional[BaseException]) -> None:
        """Cancels the job, and waits until it has ended, however often the task is cancelled
        meanwhile. An error of the undo is attached to `raised`."""
        self.cancel()
        cancelled = None
        while True:
            try:
                await self._wait_async()
                break
            except asyncio.CancelledError as error:
                cancelled = error
        self._attach_failure(raised if cancelled is None else cancelled)
        if cancelled is not None:
            raise cancelled

    async def _result_async(self) -> str:
        try:
            await self._wait_async()
        except asyncio.CancelledError as raised:
            await self._undo_async(raised)
            raise
        return self.result(0)

    async def _wait_async(self) -> None:
        while True:
            # The descriptor stays readable until events are taken; they are kept for next_event().
            with self._lock:
                while (event := self._take()) is not None:
                    _append(self._events, event)
            if self.done():
                return
            await self._waiters.wait(self.fileno())

    async def _events_async(self) -> AsyncIterator[Event]:
        while True:
            done = self.done()
            event = self.next_event()
            if event is not None:
                yield event
            elif done:
                return
            else:
                await self._waiters.wait(self.fileno())

    def _take(self) -> Optional[Event]:
        """The library's next event; with self._lock held."""
        event = _library.CEvent(size=ctypes.sizeof(_library.CEvent))
        if not check(library().instantsnap_job_next_event(self._open(), ctypes.byref(event))):
            return None
        self._waiters.wake()  # the event is not pending any more, so it cannot wake them
        return event_of(event)

    def _open(self) -> int:
        if self._handle is None:
            raise Error(ErrorCode.INVALID_ARG, 10, "the job is closed")
        return self._handle


def _append(events: "collections.deque[Event]", event: Event) -> None:
    """Appends an event as the library does: PROGRESS replaces PROGRESS."""
    if events and events[-1].type == event.type == EventType.PROGRESS:
        events.pop()
    events.append(event)
