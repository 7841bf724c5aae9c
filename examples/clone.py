#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Takes one snapshot of a running guest, and starts clones of it, which run at once: each maps the
snapshot's memory image, and has an overlay of its own for the disk.

    pip install ./python    # or, without installation: export PYTHONPATH=python
    examples/clone.py --clones 10

The guest is a boot sector that counts on its serial line. Each clone counts on from the instant.
Needs QEMU 8.2 or later.
"""

import argparse
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from instantsnap import Error, ErrorCode, Guest, prepare_revert

# for (n = 0;;) { sti; hlt; print(++n); }: the timer of a PC wakes it 18 times a second.
COUNT = bytes.fromhex("31c9fbf44189c8bb0a0031ff31d2f7f3524785c075f6baf803580430ee4f75f9b00aeeebdd")


class Machine:
    """A QEMU with one disk and a serial line, which ends with the block."""

    def __init__(self, program: str, directory: Path, disk: Path, disk_format: str, *more: str):
        self.qmp, self.serial = directory / "qmp", directory / "serial"
        self.process = subprocess.Popen([
            program, "-nodefaults", "-display", "none", "-m", "64",
            "-serial", f"file:{self.serial}",
            "-drive", f"if=none,id=disk,file={disk},format={disk_format}",
            "-device", "virtio-blk-pci,drive=disk",
            "-qmp", f"unix:{self.qmp},server=on,wait=off", *more])

    def __enter__(self) -> "Machine":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def wait(self) -> None:
        if self.process.poll() is not None:
            raise SystemExit("QEMU has ended")
        time.sleep(0.005)

    def open(self, state: Path) -> Guest:
        """Opens the guest, as soon as QEMU listens."""
        while True:
            try:
                return Guest.open_qmp(self.qmp, state)
            except Error as error:
                if error.code != ErrorCode.SYSTEM_ERROR:
                    raise
            self.wait()

    def counted(self, count: int) -> list[str]:
        """Waits until the guest has counted so often, and returns all its numbers."""
        while not self.serial.exists() or self.serial.read_text().count("\n") < count:
            self.wait()
        return self.serial.read_text().splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description="Takes a snapshot, and starts clones of it.")
    parser.add_argument("--clones", type=int, default=10, help="how many")
    parser.add_argument("--qemu", default="qemu-system-x86_64", help="the QEMU to run")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        directory = Path(name)
        state = directory / "snapshots"
        state.mkdir()
        disk = directory / "disk.raw"
        disk.write_bytes(COUNT.ljust(510, b"\0") + b"\x55\xaa" + bytes(1 << 20))
        original = stack.enter_context(Machine(options.qemu, directory, disk, "raw"))
        original.counted(10)
        with original.open(state) as guest:
            guest.snapshot(name="s", image_format="sparse")
        print(f"the snapshot is of some moment before {original.counted(1)[-1]}")

        def clone(number: int) -> str:
            own = directory / str(number)
            own.mkdir()
            begin = time.monotonic()
            plan = prepare_revert(state, "s", own, memory="map")
            backend = plan.memory_backends[0]
            machine = stack.enter_context(Machine(
                options.qemu, own, plan.disks[0].file, plan.disks[0].format, "-incoming", "defer",
                "-object", backend.object, "-machine", f"memory-backend={backend.id}"))
            with machine.open(state) as guest:
                stats = guest.load("s", memory="map")
            runs = time.monotonic() - begin
            counted = machine.counted(3)
            return (f"clone {number} ran after {runs * 1000:.0f} ms, of which the load took "
                    f"{stats.total_us / 1000:.0f} ms, and counted {' '.join(counted[:3])}")

        with ThreadPoolExecutor(options.clones) as pool:
            for line in pool.map(clone, range(1, options.clones + 1)):
                print(line)


if __name__ == "__main__":
    main()
