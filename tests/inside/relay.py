#!/usr/bin/python3
"""Acts as ssh does for a client of qemu+ssh: it copies data in both directions between its standard
streams and a socket.

    relay.py SOCKET
"""

import os
import socket
import sys
import threading

daemon = socket.socket(socket.AF_UNIX)
daemon.connect(sys.argv[1])


def upwards():
    while data := os.read(0, 65536):
        daemon.sendall(data)
    daemon.shutdown(socket.SHUT_WR)


threading.Thread(target=upwards, daemon=True).start()
while data := daemon.recv(65536):
    os.write(1, data)
