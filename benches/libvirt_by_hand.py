#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The sequence of libvirt calls that benches/libvirt.rs compares the library with.

libvirt_by_hand.py snapshot URI DOMAIN reads lines `BASE OVERLAY MEMORY USER` from standard input.
    For each line it takes an instant snapshot by the shortest sequence of libvirt's own functions,
    and prints the times of the steps of the pause, as a line of JSON, in microseconds
libvirt_by_hand.py events URI DOMAIN prints when QEMU has stopped and resumed the domain, by QEMU's
    own time stamps, as lines "STOP MICROSECONDS"
"""

import json
import os
import subprocess
import sys
import time

import libvirt
import libvirt_qemu

SWITCH = """<domainsnapshot><disks><disk name='vda' snapshot='external'>
  <driver type='qcow2'/><source file='{}'/>
</disk></disks></domainsnapshot>"""
SWITCH_FLAGS = (libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
                | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
                | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT
                | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC)


def snapshot(domain, base, overlay, memory, user):
    def run(command, files=(), **arguments):
        text = json.dumps({"execute": command, "arguments": arguments})
        reply = json.loads(libvirt_qemu.qemuMonitorCommandWithFiles(domain, text, list(files))[0])
        if "error" in reply:
            sys.exit(f"{command}: {reply['error']['desc']}")
        return reply["return"]

    def set_background(state):
        run("migrate-set-capabilities",
            capabilities=[{"capability": "background-snapshot", "state": state}])

    size = str(domain.blockInfo("vda")[0])
    create = [
        "qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", base, overlay, size
    ]
    subprocess.run(create, check=True)
    os.chown(overlay, int(user), int(user))
    read, write = os.pipe()
    with open(memory, "wb") as file:
        cat = subprocess.Popen(["cat"], stdin=read, stdout=file)
    os.close(read)
    run("getfd", [write], fdname="by-hand")
    os.close(write)
    set_background(True)

    times = [time.monotonic()]
    domain.suspend()
    times.append(time.monotonic())
    domain.snapshotCreateXML(SWITCH.format(overlay), SWITCH_FLAGS)
    times.append(time.monotonic())
    run("migrate", uri="fd:by-hand")
    while True:
        migration = run("query-migrate")
        if migration["status"] == "completed" or any(
                migration.get("ram", {}).get(k) for k in ("normal", "duplicate")):
            break
    times.append(time.monotonic())
    if domain.state()[0] != libvirt.VIR_DOMAIN_RUNNING:  # QEMU before 9 resumes by itself
        domain.resume()
    times.append(time.monotonic())

    cat.wait()
    while run("query-migrate")["status"] != "completed":
        time.sleep(0.0005)
    set_background(False)
    steps = ("stop", "switch", "arm", "resume")
    return {step: round(1e6 * (end - start)) for step, start, end in zip(steps, times, times[1:])}


def watch(connect, domain):
    def told(_connect, _domain, event, seconds, microseconds, _details, _opaque):
        print(event, seconds * 1000000 + microseconds, flush=True)

    # Standard input ends with the process that reads the results.
    libvirt.virEventAddHandle(sys.stdin.fileno(), libvirt.VIR_EVENT_HANDLE_HANGUP,
                              lambda *_: os._exit(0), None)
    for event in ("STOP", "RESUME"):
        libvirt_qemu.qemuMonitorEventRegister(connect, domain, event, told, None)
    print("ready", flush=True)
    while True:
        libvirt.virEventRunDefaultImpl()


def main():
    what, uri, name = sys.argv[1:]
    if what == "events":
        libvirt.virEventRegisterDefaultImpl()
    connect = libvirt.open(uri)
    domain = connect.lookupByName(name)
    if what == "events":
        watch(connect, domain)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(snapshot(domain, *line.split())), flush=True)


main()
