# SPDX-License-Identifier: LGPL-2.1-or-later
"""The tests of the package, against real QEMUs and libvirt."""

import signal

# Tests interrupt themselves. What a shell has started in the background would ignore that.
signal.signal(signal.SIGINT, signal.default_int_handler)
