#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Takes instant snapshots of several running QEMUs at the same time, from one event loop, and
prints each event.

    pip install ./python    # or, without installation: export PYTHONPATH=python
    examples/snapshot_many.py --state-dir /tmp/vm/snapshots /tmp/vm/one.qmp /tmp/vm/two.qmp

Each argument is the QMP socket of a guest. Ctrl-C cancels all snapshots; the program ends when
every guest is as it was. Exit status: 0 all snapshots are complete, 1 not all are, 130 some were
cancelled.
"""

import argparse
import asyncio
import signal
import sys
from pathlib import Path

from instantsnap import Error, Event, EventType, Guest

TEXTS: dict[int, str] = {
    EventType.PAUSED: "paused",
    EventType.SWITCHED: "switched: its disks are on their overlays",
    EventType.COMPLETE: "complete",
    EventType.FAILED: "failed",
}


def text_of(event: Event) -> str:
    if event.type == EventType.INSTANT:
        return f"instant; it runs again after {event.paused_us / 1000:.1f} ms"
    if event.type == EventType.PROGRESS:
        total = f" of at most {event.bytes_total >> 20}" if event.bytes_total else ""
        rate = event.bytes_per_second >> 20
        return f"progress: {event.bytes_done >> 20}{total} MiB, {rate} MiB/s"
    return TEXTS.get(event.type, "")


def open_guest(socket: Path, state_dir: Path) -> Guest:
    # Each guest has its own directory for its snapshots.
    directory = state_dir / str(socket.resolve()).strip("/").replace("/", "-")
    directory.mkdir(parents=True, exist_ok=True)
    return Guest.open_qmp(socket, directory)


async def snapshot(socket: Path, state_dir: Path, interval: float) -> bool:
    """Takes a snapshot of one guest. Returns whether it is complete."""
    def report(text: str) -> None:
        print(f"{socket}: {text}", flush=True)

    try:
        # Opening connects to QEMU: it is the only call that blocks.
        guest = await asyncio.to_thread(open_guest, socket, state_dir)
    except (Error, OSError) as error:
        report(f"not opened: {error}")
        return False
    with guest:
        job = guest.start_snapshot(at_once=True, progress_interval=interval)
        try:
            async with job:
                async for event in job:
                    report(text_of(event))
        except Error:
            return False
        finally:  # runs also when this task is cancelled
            try:
                report(f"the snapshot is {job.name}")
            except Error as error:
                report(f"no snapshot: {error}")
    return True


async def main() -> int:
    parser = argparse.ArgumentParser(
        description="Takes instant snapshots of several running QEMUs at the same time.")
    parser.add_argument("--state-dir", type=Path, required=True,
                        help="the directory for the snapshots' records; created if it is missing")
    parser.add_argument("--interval", type=float, default=0.5,
                        help="seconds between two reports of progress")
    parser.add_argument("sockets", type=Path, nargs="+", metavar="SOCKET",
                        help="the QMP socket of a guest")
    arguments = parser.parse_args()

    tasks = [asyncio.ensure_future(snapshot(socket, arguments.state_dir, arguments.interval))
             for socket in arguments.sockets]

    def cancel() -> None:
        for task in tasks:
            task.cancel()

    # Before Python 3.11, Ctrl-C would raise KeyboardInterrupt inside the task that is running.
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, cancel)
    await asyncio.wait(tasks)
    if any(task.cancelled() for task in tasks):
        return 130
    return 0 if all(task.result() for task in tasks) else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
