# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs the demo: count, snapshot, ruin, bring back, check.

Started by scripts/demo, which brings kernel, guest and library. Everything it makes is in one
directory, and every QEMU it starts ends with it.
"""

import argparse
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import instantsnap

DISK_MIB = 64
TICK_MS = 50
PATIENCE = 120  # seconds: a guest that needs longer for one step hangs


class Failed(Exception):
    """The demo did not show what it should."""


class Machine:
    """A QEMU with the demo's guest, and the lines of its serial line with their time of arrival."""

    def __init__(self, options, directory, name, disk, disk_format, incoming=False):
        self.qmp = directory / f"{name}.qmp"
        self.log = directory / f"{name}.log"
        self.lines = []  # (time.monotonic(), line)
        self._arrived = threading.Condition()
        serial = directory / f"{name}.serial"
        command = [
            "setpriv", "--pdeathsig", "KILL",  # QEMU ends with this process
            options.qemu, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-machine", f"pc,accel={options.accel}", "-m", str(options.memory),
            "-kernel", options.kernel, "-initrd", options.initrd,
            "-append", "console=ttyS0 loglevel=3 panic=-1 mitigations=off",
            "-drive", f"if=none,id=disk,file={_escaped(disk)},format={disk_format}",
            "-device", "virtio-blk-pci,id=vda,drive=disk",
            "-chardev", f"socket,id=serial,path={_escaped(serial)},server=on,wait=off",
            "-serial", "chardev:serial",
            "-qmp", f"unix:{_escaped(self.qmp)},server=on,wait=off"]
        if options.accel == "kvm":
            command += ["-cpu", "host"]
        if incoming:
            command += ["-incoming", "defer"]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True)  # Ctrl-C ends only this process
        try:
            self._serial = self._connect(serial)
        except BaseException:
            self.end()
            raise
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end()

    def _connect(self, path):
        line = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + 20
        while True:
            try:
                line.connect(str(path))
                return line
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise Failed("QEMU did not start") from None
                time.sleep(0.02)

    def _read(self):
        rest = b""
        while True:
            try:
                data = self._serial.recv(65536)
            except OSError:
                data = b""
            now = time.monotonic()
            *lines, rest = (rest + data).split(b"\n")
            with self._arrived:
                self.lines += [(now, line.decode("ascii", "replace").strip()) for line in lines]
                if not data:
                    self.lines.append((now, None))
                self._arrived.notify_all()
            if not data:
                return

    def wait(self, wanted, seen=0):
        """Waits for a line that satisfies `wanted`, from number `seen` on, and returns it."""
        deadline = time.monotonic() + PATIENCE
        with self._arrived:
            while True:
                while seen < len(self.lines):
                    line = self.lines[seen][1]
                    seen += 1
                    if line is None:
                        raise Failed("QEMU ended")
                    if line.startswith("failed") or "Kernel panic" in line:
                        raise Failed(f"the guest says: {line}")
                    if wanted(line):
                        return line
                left = deadline - time.monotonic()
                if left <= 0:
                    raise Failed(f"the guest did not answer within {PATIENCE} s")
                self._arrived.wait(left)

    def ask(self, command, answer):
        seen = len(self.lines)
        self._serial.sendall(command.encode() + b"\n")
        return self.wait(lambda line: line.startswith(answer), seen)

    def wait_for_count(self, count):
        self.wait(lambda line: (count_of(line) or 0) >= count, max(0, len(self.lines) - 1))

    def counts(self, begin=0.0, end=float("inf")):
        """Returns the counts that arrived between two times."""
        return [
            count for at, line in list(self.lines)
            if begin <= at <= end and (count := count_of(line))
        ]

    def longest_silence(self, begin, end):
        """Returns the longest time, in seconds, between two lines of which at least one arrived
        between the two times."""
        times = [at for at, line in list(self.lines) if count_of(line)]
        return max((after - before
                    for before, after in zip(times, times[1:]) if after >= begin and before <= end),
                   default=0.0)

    def end(self):
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def count_of(line):
    found = re.fullmatch(r"count (\d+)", line or "")
    return int(found[1]) if found else None


def in_mib(answer):
    """Converts `ruined memory BYTES disk BYTES`, or `intact ...`, to MiB for the reader."""
    _, _, memory, _, disk = answer.split()
    return f"{int(memory) >> 20} MiB of memory and {int(disk) >> 20} MiB of disk"


def _escaped(path):
    return str(path).replace(",", ",,")  # QEMU's options escape a comma so


class Timeline:
    """Prints each step, with the seconds since the demo began."""

    def __init__(self):
        self.begin = time.monotonic()

    def step(self, text):
        print(f"{time.monotonic() - self.begin:6.1f} s  {text}", flush=True)

    @staticmethod
    def detail(what, text):
        print(f"            {what:<16}{text}", flush=True)


def take(timeline, machine, guest, name, instant):
    """Takes a snapshot of the counting guest, and prints how long it took. Returns (time of the
    call, Stats)."""
    called = time.monotonic()
    guest.snapshot(name=name, instant=instant)
    stats = guest.stats()
    done = called + stats.total_us / 1e6
    seen = len(machine.lines)
    machine.wait(count_of, seen)  # so that a silence at the end counts, too
    before, meanwhile = machine.counts(end=called), machine.counts(called, done)
    timeline.detail("called", f"at count {before[-1]}")
    if instant:
        timeline.detail("the instant", f"{stats.instant_us / 1000:.1f} ms after the call")
    timeline.detail("memory on disk", f"{stats.total_us / 1000:.0f} ms after the call "
                                      f"({stats.memory_image_bytes / 2**20:.0f} MiB)")
    timeline.detail("guest paused", f"{stats.guest_paused_us / 1000:.1f} ms; counted "
                                    f"{len(meanwhile)} times during the call")
    timeline.detail(
        "serial line", f"silent for {machine.longest_silence(called, done) * 1000:.0f} ms at most "
        f"(a count is due every {TICK_MS} ms, and waits for the disk)")
    return called, stats


def disk_count(image, directory):
    """Returns the count on a disk image, read without a guest."""
    block = directory / "block"
    subprocess.run(
        ["qemu-img", "dd", "-f", "qcow2", "-O", "raw", "bs=512", "count=1", f"if={image}",
         f"of={block}"],
        check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return int.from_bytes(block.read_bytes()[:8], "little")


def expect(condition, text):
    if not condition:
        raise Failed(text)


def run(options, directory):
    timeline = Timeline()
    state = directory / "snapshots"
    state.mkdir()
    disk = directory / "disk.raw"
    with open(disk, "wb") as file:
        file.truncate(DISK_MIB << 20)
    answer = subprocess.run([options.qemu, "--version"], check=True, capture_output=True, text=True)
    version = answer.stdout.split()[3]
    print(f"\nA Linux guest of {options.memory} MiB on QEMU {version} ({options.accel}), "
          f"instantsnap {instantsnap.version()}\n")

    timeline.step("the guest boots, fills half of its memory and its disk, and counts "
                  f"{1000 // TICK_MS} times a second:")
    timeline.detail("each count",
                    "goes to 256 pages of its memory, then to its disk, then to its serial line")
    with Machine(options, directory, "original", disk, "raw") as machine:
        machine.wait_for_count(20)
        with instantsnap.Guest.open_qmp(machine.qmp, state) as guest:
            timeline.step("a non-live snapshot, for comparison: the guest is paused while its "
                          "memory is written")
            _, plain = take(timeline, machine, guest, "plain", instant=False)
            machine.wait_for_count(machine.counts()[-1] + 20)

            timeline.step("an instant snapshot")
            called, instant = take(timeline, machine, guest, "instant", instant=True)
            machine.wait_for_count(machine.counts()[-1] + 20)
        before = machine.counts(end=called)[-1]
        after = machine.counts(end=called + instant.instant_us / 1e6 + 2 * TICK_MS / 1000)[-1]
        timeline.step(f"the guest has counted on, to {machine.counts()[-1]}; now it overwrites its "
                      "memory and its disk")
        timeline.detail("ruined", in_mib(machine.ask("ruin", "ruined")) + ", as the guest says")
    timeline.step("that QEMU has ended; a new one is given the snapshot")

    plan = instantsnap.prepare_revert(state, "instant", directory)
    expect(len(plan.disks) == 1, f"the plan has {len(plan.disks)} disks, not 1")
    on_disk = disk_count(plan.disks[0].backing_file, directory)
    with Machine(options,
                 directory,
                 "restored",
                 plan.disks[0].file,
                 plan.disks[0].format,
                 incoming=True) as machine:
        with instantsnap.Guest.open_qmp(machine.qmp, state) as guest:
            loading = time.monotonic()
            guest.load("instant")
            timeline.detail("loaded",
                            f"in {(time.monotonic() - loading) * 1000:.0f} ms; the guest runs")
        machine.wait(count_of)
        first = machine.counts()[0]
        machine.wait_for_count(first + 20)
        intact = machine.ask("check", "intact")
        counts = machine.counts()

    # If the instant was between the guest's disk and its serial line, the next count is on disk.
    expect(before <= first - 1 <= after,
           f"the serial line goes on with {first}, but the instant lay between counts {before} "
           f"and {after}")
    expect(on_disk in (first - 1, first),
           f"the serial line goes on with {first}, but the disk has {on_disk}")
    expect(counts == list(range(first, first + len(counts))),
           f"the guest miscounts after the load: {counts}")
    timeline.detail("intact", in_mib(intact) + ": the guest has read back every byte")
    timeline.detail("memory",
                    "256 pages agree on the count: the guest looks at each before it goes on")
    timeline.detail("disk", f"the snapshot's image has count {on_disk}")
    timeline.detail("serial line",
                    f"goes on with {counts[0]}, {counts[1]}, {counts[2]}, ... {counts[-1]}")
    timeline.step(f"memory, disk and serial line are of one moment: after count {first - 1}\n")
    plain_ms, instant_ms = plain.guest_paused_us / 1000, instant.guest_paused_us / 1000
    print(f"The guest was paused for {plain_ms:.1f} ms by the non-live snapshot, for "
          f"{instant_ms:.1f} ms by the instant one: "
          f"{plain_ms / max(instant_ms, 0.001):.0f} times less.")


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kernel", required=True)
    parser.add_argument("--initrd", required=True)
    parser.add_argument("--memory", type=int, required=True)
    parser.add_argument("--accel", required=True)
    parser.add_argument("--qemu", required=True)
    parser.add_argument("--keep", type=Path)
    return parser.parse_args()


def main():
    options = arguments()

    def end(number, _frame):
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    if options.keep:
        directory = options.keep.absolute()
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            sys.exit(f"demo: {directory} is not empty")
    else:
        directory = Path(tempfile.mkdtemp(prefix="instantsnap-demo-"))
    code = 1
    try:
        run(options, directory)
        code = 0
    except KeyboardInterrupt:
        print("\ndemo: interrupted", file=sys.stderr)
        code = 130
    except (Failed, instantsnap.Error, ImportError, OSError,
            subprocess.CalledProcessError) as error:
        print(f"\ndemo: failed: {error}", file=sys.stderr)
        for log in sorted(directory.glob("*.log")):
            if said := log.read_text(errors="replace").strip():
                print(f"QEMU ({log.stem}) says: {said}", file=sys.stderr)
    finally:
        if options.keep:
            print(f"Disks, snapshots and logs are in {directory}.")
        else:
            shutil.rmtree(directory, ignore_errors=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
