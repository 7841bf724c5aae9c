# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tasks of an asyncio event loop that wait for a descriptor. This module does not know jobs."""

import asyncio
import contextlib
import os
from typing import Optional


class Waiters:
    """Any number of tasks of one event loop that wait until a descriptor is readable, or until
    wake() is called. (asyncio itself allows one callback for each descriptor.)"""

    def __init__(self) -> None:
        self._futures: set["asyncio.Future[None]"] = set()
        self._loop: Optional[asyncio.AbstractEventLoop] = None
        # A duplicate: the owner may close the original at any time, and its number may be reused.
        self._fd = -1

    async def wait(self, fd: int) -> None:
        """Returns when the descriptor may be readable. Raises RuntimeError while tasks of another
        loop wait."""
        loop = asyncio.get_running_loop()
        if not self._futures:
            self._fd = os.dup(fd)
            self._loop = loop
            loop.add_reader(self._fd, self._wake)
        elif self._loop is not loop:
            raise RuntimeError("tasks of another event loop wait for this job")
        future = loop.create_future()
        self._futures.add(future)
        try:
            await future
        finally:
            self._futures.remove(future)
            if not self._futures:
                loop.remove_reader(self._fd)
                os.close(self._fd)
                self._loop = None

    def wake(self) -> None:
        """Wakes all waiting tasks. Any thread may call it."""
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop was closed
                loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        for future in self._futures:
            if not future.done():
                future.set_result(None)
