# SPDX-License-Identifier: LGPL-2.1-or-later
"""The tests of the package, against real QEMUs and libvirt."""

import signal

# Tests send SIGINT to themselves, which a process that a shell has started in the background would
# ignore.
signal.signal(signal.SIGINT, signal.default_int_handler)
