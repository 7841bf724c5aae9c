#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""symbols.py LIBRARY SONAME HEADER...: checks that the library exports exactly the functions that
the headers declare. symbols.py --names LIBRARY NAME...: that it exports these, and has no soname."""

import re
import subprocess
import sys


def declared(header):
    with open(header, encoding="utf-8") as file:
        text = re.sub(r"/\*.*?\*/", "", file.read(), flags=re.DOTALL)
    return set(re.findall(r"\b((?:instantsnap_|qemuSnapshot)\w+)\s*\(", text))


def output(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main():
    if sys.argv[1] == "--names":
        library, *names = sys.argv[2:]
        sonames, wanted = [], set(names)
    else:
        library, soname, *headers = sys.argv[1:]
        sonames, wanted = [soname], set().union(*map(declared, headers))
    symbols = output("nm", "-D", "--defined-only", library).splitlines()
    exported = {line.split()[-1] for line in symbols}
    found = re.findall(r"\(SONAME\).*\[(.*)\]", output("readelf", "-d", library))

    complaints = [f"declared, but not exported: {name}" for name in sorted(wanted - exported)]
    complaints += [f"exported, but not declared: {name}" for name in sorted(exported - wanted)]
    if found != sonames:
        complaints.append(f"the soname is {found}, not {sonames}")
    sys.exit("\n".join(complaints) or None)


main()
