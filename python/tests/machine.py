# SPDX-License-Identifier: LGPL-2.1-or-later
"""A real QEMU with an empty machine: no operating system, one disk, two QMP sockets."""

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import unittest
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
QEMU = os.environ.get("INSTANTSNAP_TEST_QEMU", "qemu-system-x86_64")

if "INSTANTSNAP_LIBRARY" not in os.environ:
    built = TOP / "target" / "release" / "libinstantsnap.so"
    if built.exists():
        os.environ["INSTANTSNAP_LIBRARY"] = str(built)


class Monitor:
    """A QMP client of the tests, independent of the library."""

    def __init__(self, path):
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(60)
        deadline = time.monotonic() + 20
        while True:
            try:
                self._socket.connect(str(path))
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        self._file = self._socket.makefile("rw")
        self._events = []
        self._file.readline()
        self.execute("qmp_capabilities")

    def execute(self, command, **arguments):
        self._file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._file.flush()
        while True:
            message = self._read()
            if "event" in message:
                self._events.append(message["event"])
            elif "error" in message:
                raise AssertionError(message["error"])
            else:
                return message["return"]

    def wait_for_event(self, name):
        while name not in self._events:
            message = self._read()
            if "event" in message:
                self._events.append(message["event"])
        self._events.remove(name)

    def _read(self):
        line = self._file.readline()
        if not line:
            raise AssertionError("QEMU has closed the monitor")
        return json.loads(line)

    def close(self):
        self._file.close()
        self._socket.close()


class Machine:
    """A qemu-system-x86_64 with a disk only, and two monitors: `qmp` for the library and `monitor`
    for the test. close() ends and removes it."""

    def __init__(self, directory, name="a", memory=64, disk=None, disk_format="raw", arguments=()):
        self.directory = directory
        self.qmp = directory / f"{name}.qmp"
        if disk is None:
            disk = directory / "disk.raw"
            with open(disk, "wb") as file:
                file.truncate(1 << 20)
        self.disk = disk
        self.process = subprocess.Popen(
            [QEMU, "-accel", "tcg", "-m", str(memory), "-display", "none",
             "-nodefaults", "-no-user-config",
             "-drive", f"if=none,id=disk,file={disk},format={disk_format}",
             "-device", "virtio-blk-pci,id=vda,drive=disk",
             "-qmp", f"unix:{self.qmp},server=on,wait=off",
             "-qmp", f"unix:{self.qmp}.test,server=on,wait=off", *arguments],
            stdin=subprocess.DEVNULL)
        try:
            self.monitor = Monitor(f"{self.qmp}.test")
        except BaseException:
            self.end()
            raise

    def close(self):
        self.monitor.close()
        self.end()

    def end(self):
        self.process.kill()
        self.process.wait()

    def disk_file(self):
        """The disk's active image."""
        return Path(self.monitor.execute("query-block")[0]["inserted"]["file"])

    def status(self):
        return self.monitor.execute("query-status")["status"]


class TestCase(unittest.TestCase):
    """A test with a directory of its own, in which it has a state directory. Its machines end with
    it."""

    def setUp(self):
        self.directory = Path(tempfile.mkdtemp(prefix="instantsnap-test-"))
        self.addCleanup(shutil.rmtree, self.directory)
        self.state = self.directory / "state"
        self.state.mkdir()

    def machine(self, **options):
        machine = Machine(self.directory, **options)
        self.addCleanup(machine.close)
        return machine

    def assert_undone(self, machine, guest):
        """Checks that nothing is left of a snapshot in the machine and in its state directory."""
        self.assertEqual(guest.snapshots(), [])
        state = machine.directory / "state"
        self.assertEqual([path.name for path in state.iterdir() if not path.name.startswith(".")],
                         [])
        self.assertEqual(machine.disk_file(), machine.disk)
        self.assertEqual(machine.status(), "running")
        self.assertFalse([
            capability for capability in machine.monitor.execute("query-migrate-capabilities")
            if capability["capability"] == "background-snapshot" and capability["state"]
        ])
        self.assertEqual(
            [path.name for path in machine.directory.iterdir() if path.name.startswith("disk")],
            ["disk.raw"])
