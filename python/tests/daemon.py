# SPDX-License-Identifier: LGPL-2.1-or-later
"""A private libvirtd for the tests, with domains that run the tick guest (tests/guest/tick.c)."""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from pathlib import Path
from xml.etree import ElementTree

from .machine import QEMU, TOP

try:
    import libvirt
    import libvirt_qemu
except ImportError:
    libvirt = libvirt_qemu = None

LIBVIRTD = shutil.which("libvirtd", path="/usr/sbin:/usr/bin:/sbin:" + os.environ.get("PATH", ""))
SETPRIV = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]  # nobody

if libvirt is None:
    MISSING = "libvirt-python is not there: install python3-libvirt"
elif LIBVIRTD is None:
    MISSING = "there is no libvirtd: install libvirt-daemon"
else:
    MISSING = None
    # libvirt must not print errors that the tests expect.
    libvirt.registerErrorHandler(lambda context, error: None, None)

if MISSING and "INSTANTSNAP_CI" in os.environ:
    raise RuntimeError(f"{MISSING} (where INSTANTSNAP_CI is set nothing may be missing)")
needs_libvirt = unittest.skipIf(MISSING, MISSING)


def wait_for(what, condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds} s in vain for {what}")
        time.sleep(0.002)
    return result


class Daemon:
    """A libvirtd with `qemu:///session`, as the tests' user, or as nobody when that is root. All
    its files are in one directory. It ends with close(), or with this process."""

    def __init__(self):
        # The path must be short, because it contains Unix sockets.
        self.directory = Path(tempfile.mkdtemp(prefix="isp-", dir="/tmp"))
        self.journals = self.directory / "journals"
        os.environ["INSTANTSNAP_STATE_DIRECTORY"] = str(self.journals)
        self._keeper = None
        self.log = self.directory / "libvirtd.log"
        self.socket = self.directory / "run/libvirt/libvirt-sock"
        self.uri = f"qemu+unix:///session?socket={self.socket}"
        try:
            self._prepare()
            self._start()
        except BaseException:
            if self.log.exists():
                print(self.log.read_text(), file=sys.stderr)
            self.close()
            raise

    def _prepare(self):
        for name in ("config/libvirt", "run", "cache", "data", "guests"):
            (self.directory / name).mkdir(parents=True)
        (self.directory / "run").chmod(0o700)
        (self.directory / "config/libvirt/qemu.conf").write_text('stdio_handler = "file"\n')
        self.emulator = self._find_emulator()
        self._build_guest()
        self.give(self.directory)

    def _start(self):
        environment = {"PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8",
                       "HOME": str(self.directory), "XDG_RUNTIME_DIR": str(self.directory / "run"),
                       "XDG_CONFIG_HOME": str(self.directory / "config"),
                       "XDG_CACHE_HOME": str(self.directory / "cache"),
                       "XDG_DATA_HOME": str(self.directory / "data")}
        as_user = SETPRIV if os.geteuid() == 0 else []
        with open(self.log, "w") as log:
            self._keeper = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("keeper.py")), str(self.directory),
                 *as_user, LIBVIRTD],
                stdin=subprocess.PIPE, stdout=log, stderr=log, cwd="/", env=environment)
        wait_for("libvirtd", self._answers)

    def _find_emulator(self):
        """The QEMU under test, in a form that libvirt can run. When libvirt probes a QEMU, the QEMU
        loads all modules, including those of the system's QEMU, and aborts at a module of another
        version. So a QEMU that scripts/deps has unpacked gets a module directory in which those
        modules are empty files, which it ignores."""
        program = Path(shutil.which(QEMU)).resolve()
        tree, modules = program.parent, "usr/lib/x86_64-linux-gnu/qemu"
        if not (tree / modules).is_dir():
            return program
        own, script = self.directory / "modules", self.directory / program.name
        own.mkdir()
        for module in (tree / modules).iterdir():
            (own / module.name).symlink_to(module)
        for module in Path("/", modules).iterdir():
            if not (own / module.name).exists():
                (own / module.name).touch()
        script.write_text(
            f"#!/bin/sh\n"
            f"QEMU_MODULE_DIR='{own}' exec '{tree}/usr/bin/{program.name}' "
            f"-L '{tree}/usr/share/qemu' -L /usr/share/seabios -L /usr/share/qemu \"$@\"\n")
        script.chmod(0o755)
        return script

    def _answers(self):
        with socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect(str(self.socket))
                return True
            except OSError:
                return False

    def _build_guest(self):
        self.kernel = self.directory / "tick.elf"
        subprocess.run([
            "gcc", "-std=gnu11", "-O2", "-m32", "-march=i686", "-mno-sse", "-ffreestanding",
            "-fno-pic", "-fno-stack-protector", "-fno-asynchronous-unwind-tables",
            "-fno-tree-loop-distribute-patterns", "-fcf-protection=none", "-nostdlib", "-static",
            "-no-pie", "-Wl,-N,-Ttext=0x100000,--build-id=none,--no-warn-rwx-segments",
            "-o", self.kernel, TOP / "tests/guest/tick.c"
        ], check=True)

    def give(self, path):
        """Gives a file, or a directory and the files in it, to the user that QEMU runs as."""
        if os.geteuid() == 0:
            for entry in [path, *path.rglob("*")]:
                os.chown(entry, 65534, 65534, follow_symlinks=False)  # not through a link

    def close(self):
        """Ends libvirtd and its QEMUs, and removes their files."""
        if self._keeper is None:
            shutil.rmtree(self.directory)
            return
        self._keeper.communicate(b"\n")
        if self.directory.exists():
            raise AssertionError(f"{self.directory} is not removed")

    def connect(self):
        return libvirt.open(self.uri)


class Guest:
    """A persistent domain that runs the tick guest."""

    def __init__(self, daemon, connection, name, memory=16, parameters="pages=64 rest=2500"):
        self.directory = daemon.directory / "guests" / name
        self.domain = None
        self.disk = self.directory / "disk.qcow2"
        self.serial = self.directory / "serial.log"
        self.directory.mkdir()
        try:
            self._start(daemon, connection, name, memory, parameters)
        except BaseException:
            self.close()
            raise

    def _start(self, daemon, connection, name, memory, parameters):
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", self.disk, "16M"], check=True)
        daemon.give(self.directory)
        self.domain = connection.defineXML(f"""
            <domain type='qemu'>
              <name>{name}</name>
              <memory unit='MiB'>{memory}</memory>
              <vcpu>1</vcpu>
              <os>
                <type arch='x86_64' machine='pc'>hvm</type>
                <kernel>{daemon.kernel}</kernel>
                <cmdline>tick {parameters}</cmdline>
              </os>
              <features><acpi/></features>
              <devices>
                <emulator>{daemon.emulator}</emulator>
                <disk type='file' device='disk'>
                  <driver name='qemu' type='qcow2'/>
                  <source file='{self.disk}'/>
                  <target dev='vda' bus='virtio'/>
                  <address type='pci' domain='0x0000' bus='0x00' slot='0x10' function='0x0'/>
                </disk>
                <controller type='usb' model='none'/>
                <serial type='file'><source path='{self.serial}'/><target port='0'/></serial>
                <memballoon model='none'/>
              </devices>
            </domain>""")
        self.domain.create()
        self.wait_ticks()

    def close(self):
        if self.domain is not None:
            if self.domain.isActive():
                self.domain.destroy()
            self.domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA)
        shutil.rmtree(self.directory)

    def tick(self):
        """The last number that the guest has counted to; None before the first. Fails when its
        memory and its disk are not of one moment."""
        text = self.serial.read_text(errors="replace") if self.serial.exists() else ""
        if trouble := re.search(r"^(TORN|FAIL).*", text, re.MULTILINE):
            raise AssertionError(trouble[0])
        ticks = re.findall(r"^T (\d+)\n", text, re.MULTILINE)
        return int(ticks[-1]) if ticks else None

    def wait_ticks(self, more=2):
        """Waits until the guest has counted `more` further."""
        start = wait_for("a first tick", self.tick)
        wait_for("more ticks", lambda: self.tick() >= start + more)

    def xml(self):
        return ElementTree.fromstring(self.domain.XMLDesc())

    def disk_file(self):
        """The disk's active image."""
        return Path(self.xml().find("devices/disk/source").get("file"))

    def is_running(self):
        return self.domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING


class LibvirtTestCase(unittest.TestCase):
    """A test with a libvirtd, which all tests of the class share, and a connection of its own."""

    @classmethod
    def setUpClass(cls):
        cls.daemon = Daemon()
        cls.addClassCleanup(cls.daemon.close)

    def setUp(self):
        self.connection = self.daemon.connect()
        self.addCleanup(self.connection.close)

    def guest(self, name="one", **options):
        guest = Guest(self.daemon, self.connection, name, **options)
        self.addCleanup(guest.close)
        return guest
