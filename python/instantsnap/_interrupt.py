# SPDX-License-Identifier: LGPL-2.1-or-later
"""Lets a signal, above all Ctrl-C, interrupt a blocking call of the C library."""

import threading
from collections.abc import Callable
from typing import TypeVar

from ._errors import carry

_Result = TypeVar("_Result")

#: The longest wait, in seconds. The kernel may deliver a signal to another thread than the one that
#: handles it; the handling thread then sleeps until its wait ends.
SLICE = 0.05


def interruptible(work: Callable[[], _Result], cancel: Callable[[], object]) -> _Result:
    """Runs `work` in a new thread, so that this thread handles signals meanwhile. An exception that
    a signal handler raises here cancels the work, and goes on when the work has ended."""
    results: list[_Result] = []
    failures: list[BaseException] = []
    ended = threading.Event()
    permit = [True]  # one of the two threads takes it, atomically: it decides whether work begins

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
        while not ended.wait(SLICE):
            pass
    except BaseException as raised:
        if not _take(permit):
            # Cancels again and again, because the work may not have begun its first step. Waits
            # whatever else is raised here, because the guest may be paused until the work ends.
            while not ended.is_set():
                try:
                    cancel()
                    ended.wait(0.01)
                except BaseException:
                    continue
        if failures:
            carry(raised, failures[0])
        raise
    if failures:
        raise failures[0]
    return results[0]


def _take(permit: list[bool]) -> bool:
    try:
        return permit.pop()
    except IndexError:
        return False
