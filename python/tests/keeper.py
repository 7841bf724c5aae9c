# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs a command until its own standard input ends. Then it ends all processes of the command, and
removes a directory.

    keeper.py DIRECTORY COMMAND [ARGUMENT]...

The QEMUs of a daemon are its children's children, and outlive it. As orphans they become children
of this process, so that nothing is left however the tests end.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time

PR_SET_CHILD_SUBREAPER = 36
# These signals are ignored here. Ctrl-C is for the tests, and this process ends with them. With
# SIGCHLD ignored, an ended child leaves no zombie, for which libvirtd would wait.
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD


def children():
    found = []
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/children") as file:
            found += [int(pid) for pid in file.read().split()]
    return found


def usual_signals():
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def main():
    directory, *command = sys.argv[1:]
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    daemon = subprocess.Popen(command,
                              stdin=subprocess.DEVNULL,
                              start_new_session=True,
                              preexec_fn=usual_signals)
    sys.stdin.readline()
    while pids := children():
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)  # their children become ours
    daemon.poll()
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
