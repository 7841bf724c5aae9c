# SPDX-License-Identifier: LGPL-2.1-or-later
"""The interruption of a blocking call, without the library and QEMU."""

import os
import signal
import threading
import time
import unittest

from instantsnap._interrupt import interruptible


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


class Interruptible(unittest.TestCase):
    def test_result_is_returned(self):
        self.assertEqual(interruptible(lambda: 7, self.fail), 7)

    def test_exception_is_raised(self):
        with self.assertRaises(ZeroDivisionError):
            interruptible(lambda: 1 // 0, self.fail)

    def test_work_runs_in_another_thread(self):
        self.assertNotEqual(interruptible(threading.get_ident, self.fail), threading.get_ident())

    def test_ctrl_c_cancels_waits_and_propagates(self):
        cancelled = threading.Event()
        ended = []

        def work():
            press_ctrl_c()
            cancelled.wait()
            press_ctrl_c()  # again, during the undo
            ended.append(True)

        with self.assertRaises(KeyboardInterrupt):
            interruptible(work, cancelled.set)
        self.assertEqual(ended, [True])

    def test_signal_to_another_thread_cancels_too(self):
        cancelled = threading.Event()

        def work():
            time.sleep(0.2)  # so that the other thread is waiting
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
            cancelled.wait(5)

        with self.assertRaises(KeyboardInterrupt):
            interruptible(work, cancelled.set)
        self.assertTrue(cancelled.is_set(), "it was heard only when the work had ended")

    def test_cancel_is_repeated_until_it_takes_effect(self):
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

    def test_any_exception_from_a_signal_handler_cancels(self):
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
