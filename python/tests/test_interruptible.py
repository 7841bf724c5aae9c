# SPDX-License-Identifier: LGPL-2.1-or-later
"""How a blocking call is interrupted, without a library or a QEMU."""

import os
import signal
import threading
import time
import unittest

from instantsnap._interrupt import interruptible


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


class Interruptible(unittest.TestCase):
    def test_a_result_comes_back(self):
        self.assertEqual(interruptible(lambda: 7, self.fail), 7)

    def test_an_exception_comes_back(self):
        with self.assertRaises(ZeroDivisionError):
            interruptible(lambda: 1 // 0, self.fail)

    def test_work_runs_in_another_thread(self):
        self.assertNotEqual(interruptible(threading.get_ident, self.fail), threading.get_ident())

    def test_ctrl_c_cancels_waits_and_goes_on(self):
        cancelled = threading.Event()
        ended = []

        def work():
            press_ctrl_c()
            cancelled.wait()
            press_ctrl_c()  # once more, while everything is being undone
            ended.append(True)

        with self.assertRaises(KeyboardInterrupt):
            interruptible(work, cancelled.set)
        self.assertEqual(ended, [True])

    def test_a_signal_that_another_thread_gets_cancels_too(self):
        cancelled = threading.Event()

        def work():
            time.sleep(0.2)  # so that the other thread sleeps
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
            cancelled.wait(5)

        with self.assertRaises(KeyboardInterrupt):
            interruptible(work, cancelled.set)
        self.assertTrue(cancelled.is_set(), "it was heard only when the work had ended")

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
            interruptible(work, cancel)
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
            interruptible(work, cancelled.set)


if __name__ == "__main__":
    unittest.main()
