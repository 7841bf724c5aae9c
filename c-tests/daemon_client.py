#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""daemon_client.py SOCKET REQUEST...: sends these requests to c-tests/daemon.c, all at once, and
prints the answers.

    daemon_client.py daemon.sock "snapshot web before" "snapshot db before"
    daemon_client.py daemon.sock "list web" stats
    daemon_client.py daemon.sock "revert web before"

Ends when each request has its last answer. Exit status 1: an answer is an error.
"""

import socket
import sys


def main():
    path, *requests = sys.argv[1:]
    left, failed = len(requests), False
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        connection.sendall("".join(f"{request}\n" for request in requests).encode())
        answers = connection.makefile(encoding="utf-8")
        while left and (answer := answers.readline()):
            print(answer, end="", flush=True)
            # `instant` is not the last answer: the snapshot is still being saved.
            left -= answer.split()[0] in ("ok", "done", "error")
            failed |= answer.startswith("error")
    if left:
        sys.exit("the daemon has hung up")
    sys.exit(failed)


main()
