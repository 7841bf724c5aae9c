# SPDX-License-Identifier: LGPL-2.1-or-later
"""How a blocking call is interrupted, without a library or a QEMU."""

import os
import signal
import threading
import unittest

from instantsnap._guest import _interruptible


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


class Interruptible(unittest.TestCase):
    def test_a_result_comes_back(self):
        self.assertEqual(_interruptible(lambda: 7, self.fail), 7)

    def test_an_exception_comes_back(self):
        with self.assertRaises(ZeroDivisionError):
            _interruptible(lambda: 1 // 0, self.fail)

    def test_work_runs_in_another_thread(self):
        self.assertNotEqual(_interruptible(threading.get_ident, self.fail), threading.get_ident())

    def test_ctrl_c_cancels_waits_and_goes_on(self):
        cancelled = threading.Event()
        ended = []

        def work():
            press_ctrl_c()
            cancelled.wait()
            press_ctrl_c()  # once more, while everything is being undone
            ended.append(True)

        with self.assertRaises(KeyboardInterrupt):
            _interruptible(work, cancelled.set)
        self.assertEqual(ended, [True])

    def test_cancel_is_asked_for_until_it_is_heard(self):
        asked = []
        heard = threading.Event()

        def work():
            press_ctrl_c()
            heard.wait()

        def cancel():
            asked.append(True)
            if len(asked) < 3:
                raise OSError("nothing to cancel yet")
            heard.set()

        with self.assertRaises(KeyboardInterrupt):
            _interruptible(work, cancel)
        self.assertGreaterEqual(len(asked), 3)

    def test_any_exception_of_a_signal_handler_cancels(self):
        def end(number, frame):
            raise SystemExit(3)

        before = signal.signal(signal.SIGUSR1, end)
        self.addCleanup(signal.signal, signal.SIGUSR1, before)
        cancelled = threading.Event()

        def work():
            os.kill(os.getpid(), signal.SIGUSR1)
            cancelled.wait()

        with self.assertRaises(SystemExit):
            _interruptible(work, cancelled.set)


if __name__ == "__main__":
    unittest.main()
