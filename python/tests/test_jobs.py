# SPDX-License-Identifier: LGPL-2.1-or-later
"""Events of a snapshot, and snapshots that are taken while the caller does something else, with
real QEMUs."""

import asyncio
import dataclasses
import gc
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import unittest
from xml.etree import ElementTree

from instantsnap import (Cancelled, Error, ErrorCode, Event, EventType, Flag, Guest, Job, JobInfo,
                         Phase, Stats, snapshot_create_xml)

from .daemon import LibvirtTestCase, libvirt, needs_libvirt, wait_for
from .machine import TOP, Machine, TestCase

# MiB: with this much, memory still flows after the instant, and when a cancel arrives.
LARGE = 1024
# The events of a successful snapshot, without PROGRESS.
ALL = [EventType.PAUSED, EventType.SWITCHED, EventType.INSTANT, EventType.COMPLETE]


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def types(events):
    return [event.type for event in events if event.type != EventType.PROGRESS]


class JobTestCase(TestCase):
    def open(self, name="a", memory=64):
        """Starts a machine in its own directory, and opens its guest."""
        directory = self.directory / name
        (directory / "state").mkdir(parents=True)
        machine = Machine(directory, memory=memory)
        self.addCleanup(machine.close)
        guest = Guest.open_qmp(machine.qmp, directory / "state")
        self.addCleanup(guest.close)
        return machine, guest

    def assert_error(self, code, call, *arguments, **options):
        with self.assertRaises(Error) as caught:
            call(*arguments, **options)
        self.assertEqual(caught.exception.code, code, caught.exception.message)
        self.assertTrue(caught.exception.message)

    def wait_until_free(self, guest, name):
        """Waits until no other snapshot of the guest is under way, by taking one with this name."""
        def take():
            try:
                return guest.snapshot(name=name)
            except Error as error:
                self.assertEqual(error.code, ErrorCode.OPERATION_INVALID, error)
                return None

        wait_for("another snapshot's end", take)


class Callback(JobTestCase):
    def test_events_arrive_in_order_with_their_numbers(self):
        machine, guest = self.open()
        events, seen, threads = [], {}, set()

        def on_event(event):
            events.append(event)
            threads.add(threading.get_ident())
            seen[event.type] = machine.status(), machine.disk_file().name

        before = time.monotonic()
        guest.snapshot(name="one", on_event=on_event)
        after = time.monotonic()
        self.assertEqual(types(events), ALL)
        self.assertIsInstance(events[0], Event)
        self.assertIs(events[0].type, EventType.PAUSED)
        # The first two events come within the pause.
        self.assertEqual(seen[EventType.PAUSED], ("paused", "disk.raw"))
        self.assertEqual(seen[EventType.SWITCHED], ("paused", "disk.one"))
        self.assertEqual(seen[EventType.INSTANT], ("running", "disk.one"))
        times = [event.time_us for event in events]
        self.assertEqual(times, sorted(times))
        self.assertLessEqual(int(before * 1e6), times[0])
        self.assertLessEqual(times[-1], after * 1e6)
        pauses = [event.paused_us for event in events]
        instant = types(events).index(EventType.INSTANT)
        self.assertGreater(pauses[instant], 0)
        self.assertEqual(set(pauses[instant:]), {pauses[instant]})
        self.assertEqual({event.error_code for event in events}, {ErrorCode.OK})
        self.assertEqual(len(threads), 1)
        self.assertNotIn(threading.get_ident(), threads)
        with self.assertRaises(dataclasses.FrozenInstanceError):
            events[0].type = 2

    def test_progress(self):
        _, guest = self.open(memory=LARGE)
        events = []
        guest.snapshot(name="one", on_event=events.append, progress_interval=0.02)
        progress = [event for event in events if event.type == EventType.PROGRESS]
        self.assertTrue(progress)
        self.assertEqual(events[3:-1], progress)
        for earlier, later in zip(progress, progress[1:]):
            self.assertLessEqual(earlier.bytes_done, later.bytes_done)
            self.assertGreaterEqual(earlier.pages_left, later.pages_left)
        for event in progress:
            self.assertLessEqual(event.bytes_done, event.bytes_total)

    def test_exception_in_the_callback_cancels_and_propagates(self):
        machine, guest = self.open()
        for kind in (EventType.PAUSED, EventType.SWITCHED, EventType.INSTANT):
            with self.subTest(kind):
                events = []

                def on_event(event):
                    events.append(event)
                    if event.type == kind:
                        raise ZeroDivisionError

                with self.assertRaises(ZeroDivisionError):
                    guest.snapshot(name="one", on_event=on_event)
                self.assertEqual(events[-1].type, kind, "nothing more is told")
                self.assert_undone(machine, guest)
        self.assertEqual(guest.snapshot(name="two"), "two")

    def test_exception_at_completion_keeps_the_snapshot(self):
        machine, guest = self.open()

        def on_event(event):
            if event.type == EventType.COMPLETE:
                raise SystemExit

        with self.assertRaises(SystemExit):
            guest.snapshot(name="one", on_event=on_event)
        self.assertEqual(guest.snapshots(), ["one"])
        self.assertEqual(machine.status(), "running")

    def test_cancel_is_reported_after_the_undo(self):
        machine, guest = self.open()
        events, disks = [], []

        def on_event(event):
            events.append(event)
            disks.append(machine.disk_file().name)
            if event.type == EventType.SWITCHED:
                guest.cancel()

        with self.assertRaises(Cancelled):
            guest.snapshot(name="one", on_event=on_event)
        self.assertEqual(types(events), [EventType.PAUSED, EventType.SWITCHED, EventType.FAILED])
        self.assertEqual(events[-1].error_code, ErrorCode.OPERATION_ABORTED)
        self.assertEqual(disks, ["disk.raw", "disk.one", "disk.raw"])
        self.assert_undone(machine, guest)

    def test_ctrl_c_in_the_callback_cancels(self):
        machine, guest = self.open(memory=LARGE)

        def on_event(event):
            if event.type == EventType.INSTANT:
                press_ctrl_c()

        with self.assertRaises(KeyboardInterrupt):
            guest.snapshot(name="one", on_event=on_event)
        self.assert_undone(machine, guest)

    def test_failure_before_the_pause(self):
        _, guest = self.open()
        guest.snapshot(name="one")
        events = []
        self.assert_error(ErrorCode.OPERATION_INVALID,
                          guest.snapshot,
                          name="one",
                          on_event=events.append)
        self.assertEqual([(event.type, event.error_code) for event in events],
                         [(EventType.FAILED, ErrorCode.OPERATION_INVALID)])

    def test_call_refused_at_once_has_no_events(self):
        _, guest = self.open(memory=LARGE)
        with guest.start_snapshot(name="one") as job:
            for options in ({}, {"flags": 1 << 20}):
                with self.assertRaises(Error):
                    guest.snapshot(name="two", on_event=self.fail, **options)
        self.assertEqual(job.result(), "one")

    def test_exception_at_a_failure(self):
        _, guest = self.open()
        guest.snapshot(name="one")
        with self.assertRaises(ZeroDivisionError) as caught:
            guest.snapshot(name="one", on_event=lambda event: 1 // 0)
        self.assertEqual(caught.exception.__context__.code, ErrorCode.OPERATION_INVALID)

    def test_exception_reports_a_failed_undo(self):
        # QEMU cannot open the image for writing again, which the merge of the overlay needs.
        arguments, user = (), os.geteuid()
        image = self.directory / "disk.raw"
        image.write_bytes(bytes(1 << 20))
        if user == 0:
            arguments, user = ("-runas", "nobody"), 65534
            self.directory.chmod(0o755)
            os.chown(image, user, -1)
        machine = self.machine(disk=image, arguments=arguments)
        guest = Guest.open_qmp(machine.qmp, self.state)
        self.addCleanup(guest.close)

        def forbid_and_raise(event):
            if event.type == EventType.INSTANT:
                image.chmod(0o444)
                raise ZeroDivisionError

        with self.assertRaises(ZeroDivisionError) as caught:
            guest.snapshot(name="one", on_event=forbid_and_raise)
        left = caught.exception.__cause__
        self.assertEqual(left.code, ErrorCode.OPERATION_FAILED)
        for part in ("cancelled", "'vda'", f"'{self.directory / 'disk.one'}'",
                     "must not be removed"):
            self.assertIn(part, left.message)
        self.assertEqual(machine.disk_file(), self.directory / "disk.one")
        self.assertEqual(machine.status(), "running")
        # A successful undo attaches no error.
        with self.assertRaises(ZeroDivisionError) as caught, guest.start_snapshot(name="two"):
            raise ZeroDivisionError
        self.assertIsNone(caught.exception.__cause__)

    def test_non_live_snapshot_has_events(self):
        _, guest = self.open()
        events = []
        guest.snapshot(name="one", instant=False, on_event=events.append)
        self.assertEqual(types(events)[-2:], [EventType.INSTANT, EventType.COMPLETE])

    def test_invalid_intervals_are_refused(self):
        _, guest = self.open()
        for interval in (0, -1, 0.0001, 2**32, float("nan")):
            with self.subTest(interval), self.assertRaisesRegex(ValueError, "progress_interval"):
                guest.snapshot(on_event=self.fail, progress_interval=interval)


class Jobs(JobTestCase):
    def test_start_returns_at_the_instant(self):
        machine, guest = self.open(memory=LARGE)
        job = guest.start_snapshot(name="one")
        self.assertIsInstance(job, Job)
        info = job.info()
        self.assertIsInstance(info, JobInfo)
        self.assertIs(info.instant, True)
        self.assertGreater(info.paused_us, 0)
        self.assertIn(info.phase, (Phase.ARM, Phase.DRAIN, Phase.FINISH))
        self.assertEqual(machine.status(), "running")
        self.assertEqual(machine.disk_file().name, "disk.one")

        # The snapshot is still under way.
        self.assertFalse(job.done())
        self.assertFalse(job.wait(0.001))
        with self.assertRaises(TimeoutError):
            job.result(0)
        for call in (lambda: job.name, job.xml, job.stats):
            self.assert_error(ErrorCode.OPERATION_INVALID, call)
        for call in (guest.snapshot, guest.start_snapshot,
                     lambda **o: guest.start_snapshot(at_once=True, **o)):
            self.assert_error(ErrorCode.OPERATION_INVALID, call, name="two")

        self.assertEqual(job.result(600), "one")
        self.assertTrue(job.wait() and job.wait(0) and job.done())
        self.assertEqual(job.name, "one")
        self.assertEqual(job.xml(), guest.xml("one"))
        self.assertEqual(ElementTree.fromstring(job.xml()).findtext("name"), "one")
        self.assertIsInstance(job.stats(), Stats)
        self.assertEqual(job.stats(), guest.stats())
        self.assertLessEqual(info.elapsed_us, job.stats().total_us)
        self.assertIs(job.info().phase, Phase.ENDED)
        job.cancel()  # too late: the snapshot is complete
        self.assertEqual(job.result(), "one")
        self.assertEqual(guest.snapshots(), ["one"])

    def test_events_can_be_taken_one_by_one(self):
        _, guest = self.open()
        for at_once in (False, True):
            with self.subTest(at_once=at_once):
                job = guest.start_snapshot(at_once=at_once, name=f"{at_once}")
                self.assertEqual(types(job.events()), ALL)
                self.assertEqual(job.result(0), f"{at_once}")
                self.assertIsNone(job.next_event())
                self.assertEqual(list(job.events()), [])

    def test_events_of_a_failed_snapshot(self):
        machine, guest = self.open()
        job = guest.start_snapshot(name="one", at_once=True)
        job.cancel()
        events = list(job.events())
        self.assertEqual(events[-1].type, EventType.FAILED)
        self.assertEqual(events[-1].error_code, ErrorCode.OPERATION_ABORTED)
        with self.assertRaises(Cancelled):
            job.result()
        self.assert_undone(machine, guest)

    def test_job_in_a_custom_event_loop(self):
        guests = [self.open(name)[1] for name in ("a", "b")]
        events = {}
        with selectors.DefaultSelector() as selector:
            for guest in guests:
                job = guest.start_snapshot(name="one", at_once=True)
                events[job] = []
                selector.register(job, selectors.EVENT_READ)
            while not all(job.done() for job in events):
                for key, _ in selector.select():
                    event = key.fileobj.next_event()
                    self.assertIsNotNone(event, "readable for nothing")
                    events[key.fileobj].append(event)
            for job in events:
                events[job] += job.events()
            self.assertEqual(selector.select(0), [])
        for job in events:
            self.assertEqual(types(events[job]), ALL)
            self.assertEqual(job.result(), "one")

    def test_with_block_ends_with_the_snapshot(self):
        _, guest = self.open()
        with guest.start_snapshot(name="one") as job:
            pass
        self.assertEqual(guest.snapshots(), ["one"])
        self.assertEqual((job.name, job.info().phase), ("one", Phase.ENDED))

    def test_with_block_raises_the_error(self):
        machine, guest = self.open(memory=LARGE)
        with self.assertRaises(Cancelled):
            with guest.start_snapshot(name="one"):
                guest.cancel()
        self.assert_undone(machine, guest)

    def test_exception_in_a_with_block_cancels_and_propagates(self):
        machine, guest = self.open(memory=LARGE)
        with self.assertRaises(ZeroDivisionError):
            with guest.start_snapshot(name="one") as job:
                1 // 0
        self.assertTrue(job.done())
        with self.assertRaises(Cancelled):
            job.result()
        self.assertGreater(job.stats().undo_us, 0)
        self.assert_undone(machine, guest)
        self.assertEqual(guest.snapshot(name="two"), "two")

    def test_ctrl_c_in_a_with_block_cancels_and_propagates(self):
        machine, guest = self.open(memory=LARGE)
        with self.assertRaises(KeyboardInterrupt):
            with guest.start_snapshot(name="one", at_once=True) as job:
                for event in job.events():
                    if event.type == EventType.INSTANT:
                        press_ctrl_c()
        self.assertTrue(job.done())
        self.assert_undone(machine, guest)

    def test_repeated_ctrl_c_at_the_end_of_a_with_block(self):
        machine, guest = self.open(memory=LARGE)

        def press():
            press_ctrl_c()
            while job.info().phase < Phase.UNDO:
                time.sleep(0.001)
            press_ctrl_c()

        thread = threading.Thread(target=press)
        with self.assertRaises(KeyboardInterrupt):
            try:
                with guest.start_snapshot(name="one") as job:
                    thread.start()
                    job.result()
            finally:
                thread.join()
        self.assert_undone(machine, guest)

    def test_ctrl_c_during_the_start_of_a_job(self):
        machine, guest = self.open(memory=LARGE)

        def press():
            machine.monitor.wait_for_event("STOP")
            press_ctrl_c()

        thread = threading.Thread(target=press)
        thread.start()
        try:
            with self.assertRaises(KeyboardInterrupt):
                with guest.start_snapshot(name="one") as job:
                    job.result()
        finally:
            thread.join()
        self.assert_undone(machine, guest)

    def test_ctrl_c_without_a_with_block_only_ends_the_wait(self):
        _, guest = self.open(memory=LARGE)
        job = guest.start_snapshot(name="one")
        for wait in (job.wait, job.result, lambda: list(job.events())):
            thread = threading.Thread(target=press_ctrl_c)
            with self.assertRaises(KeyboardInterrupt):
                thread.start()
                wait()
                thread.join()
        self.assertEqual(job.result(), "one")

    def test_job_that_cannot_start(self):
        machine, guest = self.open()
        guest.snapshot(name="one")
        for options, code in (({"flags": 1 << 20}, ErrorCode.INVALID_ARG),
                              ({"name": "one"}, ErrorCode.OPERATION_INVALID)):
            self.assert_error(code, guest.start_snapshot, **options)
            # Here the job reports the error.
            job = guest.start_snapshot(**options, at_once=True)
            self.assertEqual([event.error_code for event in job.events()], [code])
            for call in (job.result, lambda: job.name, job.xml):
                self.assert_error(code, call)
        for at_once in (False, True):
            with self.assertRaises(ValueError):
                guest.start_snapshot("<domainsnapshot/>", name="x", at_once=at_once)
        self.assertEqual(machine.status(), "running")
        guest.close()
        self.assert_error(ErrorCode.INVALID_ARG, guest.start_snapshot)

    def test_closed_or_dropped_job_continues(self):
        _, guest = self.open()
        job = guest.start_snapshot(name="one")
        self.assertEqual(repr(job), "<Job open>")
        job.close()
        job.close()
        self.assertEqual(repr(job), "<Job closed>")
        for call in (job.done, job.wait, job.result, lambda: job.name, job.xml, job.stats, job.info,
                     job.cancel, job.fileno, job.next_event, lambda: next(job.events())):
            self.assert_error(ErrorCode.INVALID_ARG, call)
        with job:
            pass
        self.wait_until_free(guest, "two")
        guest.start_snapshot(name="three")  # the job is not kept
        gc.collect()
        self.wait_until_free(guest, "four")
        self.assertEqual(guest.snapshots(), ["one", "two", "three", "four"])

    def test_job_outlives_its_guest(self):
        machine, guest = self.open()
        job = guest.start_snapshot(name="one")
        guest.close()
        self.assertEqual(job.result(), "one")
        with Guest.open_qmp(machine.qmp, machine.directory / "state") as again:
            self.assertEqual(again.snapshots(), ["one"])

    def test_unrecorded_job_has_xml(self):
        _, guest = self.open()
        flags = Flag.CREATE_LIVE | Flag.CREATE_INSTANT | Flag.CREATE_NO_METADATA
        with guest.start_snapshot(name="one", flags=flags) as job:
            pass
        self.assertEqual(job.name, "one")
        self.assertEqual(ElementTree.fromstring(job.xml()).findtext("name"), "one")
        self.assertEqual(guest.snapshots(), [])


class Asyncio(JobTestCase):
    def test_snapshot_can_be_awaited(self):
        _, guest = self.open()
        events = []
        self.assertEqual(asyncio.run(guest.snapshot_async(name="one", on_event=events.append)),
                         "one")
        self.assertEqual(types(events), ALL)
        self.assertEqual(asyncio.run(guest.snapshot_async(name="two")), "two")

        async def one_that_exists():
            await guest.snapshot_async(name="two")

        self.assert_error(ErrorCode.OPERATION_INVALID, lambda: asyncio.run(one_that_exists()))

    def test_exception_in_the_callback_of_an_awaited_snapshot_cancels(self):
        machine, guest = self.open(memory=LARGE)

        def on_event(event):
            if event.type == EventType.INSTANT:
                raise ZeroDivisionError

        with self.assertRaises(ZeroDivisionError):
            asyncio.run(guest.snapshot_async(name="one", on_event=on_event))
        self.assert_undone(machine, guest)

    def test_several_tasks_can_wait_for_one_job(self):
        _, guest = self.open()

        async def listen(job):
            return [event async for event in job]

        async def wait(job):
            return await job

        async def main():
            job = guest.start_snapshot(name="one", at_once=True)
            results = await asyncio.gather(wait(job), listen(job), wait(job), listen(job), job)
            self.assertEqual((results[0], results[2], results[4]), ("one", "one", "one"))
            # Each event goes to one of the listeners.
            events = sorted(results[1] + results[3], key=lambda event: event.time_us)
            self.assertEqual(types(events), ALL)
            self.assertEqual((await job, [event async for event in job]), ("one", []))

        asyncio.run(main())

    def test_events_can_be_taken_after_the_end(self):
        _, guest = self.open()

        async def main():
            job = guest.start_snapshot(name="one", at_once=True)
            await job
            self.assertEqual(types([event async for event in job]), ALL)

        asyncio.run(main())

    def test_thread_that_takes_events_does_not_block_a_waiting_task(self):
        _, guest = self.open()

        async def main():
            job = guest.start_snapshot(name="one", at_once=True)
            listening = asyncio.get_running_loop().run_in_executor(None, lambda: list(job.events()))
            seen = [event async for event in job]
            self.assertEqual(await job, "one")
            self.assertEqual(len(types(seen)) + len(types(await listening)), len(ALL))

        asyncio.run(main())

    def test_many_guests_in_one_event_loop(self):
        guests = [self.open(name)[1] for name in ("a", "b", "c", "d")]
        guests[0].snapshot(name="one")

        async def main():
            return await asyncio.gather(*(guest.snapshot_async(name="one") for guest in guests),
                                        return_exceptions=True)

        failed, *names = asyncio.run(main())
        self.assertEqual(failed.code, ErrorCode.OPERATION_INVALID)
        self.assertEqual(names, ["one"] * 3)

    def cancel_at_the_instant(self, take):
        """Cancels the task `take(guest, on_event)`, which takes a snapshot, at the instant and once
        more."""
        machine, guest = self.open(memory=LARGE)

        async def main():
            instant = asyncio.Event()

            def on_event(event):
                if event.type == EventType.INSTANT:
                    instant.set()

            task = asyncio.ensure_future(take(guest, on_event))
            await instant.wait()
            task.cancel()
            for _ in range(3):  # the undo is running now
                await asyncio.sleep(0)
            task.cancel()
            with self.assertRaises(asyncio.CancelledError):
                await task
            self.assertTrue(task.cancelled())
            self.assert_undone(machine, guest)

        asyncio.run(main())

    def test_cancelled_task_cancels_its_snapshot(self):
        self.cancel_at_the_instant(
            lambda guest, on_event: guest.snapshot_async(name="one", on_event=on_event))

    def test_task_cancelled_in_an_async_with_block_cancels_its_job(self):
        async def take(guest, on_event):
            async with guest.start_snapshot(name="one", at_once=True) as job:
                async for event in job:
                    on_event(event)
                    if event.type == EventType.INSTANT:
                        break

        self.cancel_at_the_instant(take)

    def test_task_cancelled_while_awaiting_a_job_cancels_it(self):
        async def take(guest, on_event):
            job = guest.start_snapshot(name="one", at_once=True)
            async for event in job:
                on_event(event)
                if event.type == EventType.INSTANT:
                    return await job

        self.cancel_at_the_instant(take)

    def test_timeout_cancels(self):
        machine, guest = self.open(memory=LARGE)

        async def main():
            with self.assertRaises(asyncio.TimeoutError):
                await asyncio.wait_for(guest.snapshot_async(name="one"), 0.001)
            self.assert_undone(machine, guest)

        asyncio.run(main())

    def test_shielded_job_continues(self):
        _, guest = self.open(memory=LARGE)

        async def main():
            job = guest.start_snapshot(name="one", at_once=True)
            with self.assertRaises(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.shield(job), 0.001)
            self.assertFalse(job.done())
            self.assertEqual(await job, "one")

        asyncio.run(main())

    def test_async_with_block(self):
        machine, guest = self.open(memory=LARGE)

        async def main():
            with self.assertRaises(ZeroDivisionError):
                async with guest.start_snapshot(name="one", at_once=True) as job:
                    async for event in job:
                        if event.type == EventType.INSTANT:
                            1 // 0
            self.assert_undone(machine, guest)
            async with guest.start_snapshot(name="two", at_once=True) as job:
                pass
            self.assertEqual(job.name, "two")

        asyncio.run(main())

    def test_closed_coroutine_cancels(self):
        machine, guest = self.open(memory=LARGE)

        async def main():
            coroutine = guest.snapshot_async(name="one")
            coroutine.send(None)  # it waits
            coroutine.close()

        asyncio.run(main())
        self.wait_until_free(guest, "two")
        self.assertEqual(guest.snapshots(), ["two"])

    def test_close_wakes_waiting_tasks(self):
        _, guest = self.open(memory=LARGE)

        async def main():
            job = guest.start_snapshot(name="one", at_once=True)
            waiting = asyncio.ensure_future(job._result_async())
            await asyncio.sleep(0)
            job.close()
            with self.assertRaises(Error) as caught:
                await waiting
            self.assertEqual(caught.exception.code, ErrorCode.INVALID_ARG)

        asyncio.run(main())
        guest.cancel()
        self.wait_until_free(guest, "two")


class Example(JobTestCase):
    def start(self, machines):
        process = subprocess.Popen(
            [
                sys.executable, TOP / "examples/snapshot_many.py",
                "--state-dir", self.directory / "states", "--interval", "0.05",
                *(machine.qmp for machine in machines)
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": str(TOP / "python"), "PYTHONDONTWRITEBYTECODE": "1"})
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process

    def test_example_snapshots_all_guests_it_can(self):
        machines = [self.open(name)[0] for name in ("a", "b")]
        process = self.start(machines)
        output, _ = process.communicate()
        self.assertEqual(process.returncode, 0, output)
        for machine in machines:
            mine = [
                line.partition(": ")[2] for line in output.splitlines()
                if line.startswith(f"{machine.qmp}: ")
            ]
            for line, text in zip(
                (line for line in mine if not line.startswith("progress")),
                ("paused", "switched", "instant", "complete", "the snapshot is ")):
                self.assertTrue(line.startswith(text), output)
            self.assertNotEqual(machine.disk_file().name, "disk.raw")
        machines[0].close()
        output, _ = self.start(machines).communicate()
        self.assertIn(f"{machines[0].qmp}: not opened: ", output)
        self.assertIn(f"{machines[1].qmp}: the snapshot is ", output)

    def test_ctrl_c_cancels_all_snapshots_of_the_example(self):
        opened = [self.open(name, memory=2 * LARGE) for name in ("a", "b")]
        process = self.start([machine for machine, _ in opened])
        told = ""
        while ": instant" not in told:  # the other guest can be in any phase
            line = process.stdout.readline()
            self.assertTrue(line, told)
            told += line
        process.send_signal(signal.SIGINT)
        told += process.communicate()[0]
        self.assertEqual(process.returncode, 130, told)
        self.assertIn(": no snapshot: ", told)
        self.assertNotIn("Traceback", told)
        for machine, guest in opened:
            self.assert_undone(machine, guest)


def xml(name, guest):
    return (f"<domainsnapshot><name>{name}</name>"
            f"<memory snapshot='external' file='{guest.directory / name}.mem'/></domainsnapshot>")


@needs_libvirt
class Libvirt(LibvirtTestCase):
    def test_events_and_jobs(self):
        guest = self.guest()
        events = []
        snapshot = snapshot_create_xml(guest.domain, xml("one", guest), on_event=events.append)
        self.assertEqual(snapshot.getName(), "one")
        self.assertEqual(types(events), ALL)
        with Guest.open_libvirt(guest.domain) as opened:
            with opened.start_snapshot(xml("two", guest)) as job:
                self.assertTrue(guest.is_running())
                self.assertEqual(guest.disk_file().name, "disk.two")
            self.assertEqual(types(job.events()), ALL)
            self.assertEqual(job.result(0), "two")
            self.assertEqual(ElementTree.fromstring(job.xml()).findtext("name"), "two")
            self.assertEqual(asyncio.run(opened.snapshot_async(xml("three", guest))), "three")
        self.assertEqual(sorted(guest.domain.snapshotListNames()), ["one", "three", "two"])
        guest.wait_ticks()

    def test_exception_or_cancelled_task_cancels(self):
        guest = self.guest(memory=LARGE)

        def fail(event):
            if event.type == EventType.SWITCHED:
                raise ZeroDivisionError

        with self.assertRaises(ZeroDivisionError):
            snapshot_create_xml(guest.domain, xml("one", guest), on_event=fail)
        self.assert_undone(guest)
        with Guest.open_libvirt(guest.domain) as opened:
            with self.assertRaises(ZeroDivisionError):
                with opened.start_snapshot(xml("one", guest)):
                    1 // 0
            self.assert_undone(guest)

            async def main():
                with self.assertRaises(asyncio.TimeoutError):
                    await asyncio.wait_for(opened.snapshot_async(xml("one", guest)), 0.001)

            asyncio.run(main())
            self.assert_undone(guest)

    def assert_undone(self, guest):
        self.assertEqual(guest.domain.snapshotListNames(), [])
        self.assertEqual(guest.disk_file(), guest.disk)
        self.assertEqual(sorted(path.name for path in guest.directory.iterdir()),
                         ["disk.qcow2", "serial.log"])
        self.assertTrue(guest.is_running())
        guest.wait_ticks()

    def test_errors_are_libvirts_and_only_instant_snapshots_have_events(self):
        guest = self.guest()
        events = []
        snapshot_create_xml(guest.domain, xml("one", guest))
        with self.assertRaises(libvirt.libvirtError) as caught:
            snapshot_create_xml(guest.domain, xml("one", guest), on_event=events.append)
        self.assertEqual(caught.exception.get_error_code(), libvirt.VIR_ERR_OPERATION_INVALID)
        self.assertEqual(types(events), [EventType.FAILED])
        for flags in (0, Flag.CREATE_LIVE | Flag.CREATE_INSTANT | Flag.CREATE_NO_METADATA):
            with self.assertRaisesRegex(ValueError, "on_event"):
                snapshot_create_xml(guest.domain, xml("two", guest), flags, on_event=self.fail)


if __name__ == "__main__":
    unittest.main()
