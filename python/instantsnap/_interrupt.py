# SPDX-License-Identifier: LGPL-2.1-or-later
"""Blocking calls of the C library that a signal can end: Ctrl-C above all."""

import threading
from collections.abc import Callable
from typing import TypeVar

from ._errors import carry

_Result = TypeVar("_Result")

#: Seconds. The kernel may hand a signal to another thread than the one that is to handle it, and
#: that one sleeps on: so no wait is longer.
SLICE = 0.05


def interruptible(work: Callable[[], _Result], cancel: Callable[[], object]) -> _Result:
    """Runs `work` in a thread of its own, so that signals reach this one meanwhile. An exception
    that one raises here cancels the work, and goes on when the work has ended."""
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
        while not ended.wait(SLICE):
            pass
    except BaseException as raised:
        if not _take(permit):
            # Asked again and again, for the work's first step may be yet to come. Waited for,
            # whatever else is raised here: until it has ended the guest may be paused.
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
