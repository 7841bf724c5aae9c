# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests of the package with a real QEMU."""

import os
import signal
import threading
import unittest
from pathlib import Path
from xml.etree import ElementTree

from instantsnap import (Cancelled, DeleteFlag, Error, ErrorCode, Flag, Guest, ImageFormat, Memory,
                         NotFound, Watchdog, doctor, image_convert, prepare_revert,
                         recover_offline)

from .machine import TestCase

# MiB: with this much, memory still flows when the first event arrives, and when a cancel arrives.
LARGE = 2048


class Snapshots(TestCase):
    def test_instant_snapshot_is_recorded_and_described(self):
        machine = self.machine()
        with Guest.open_qmp(machine.qmp, self.state) as guest:
            self.assertEqual(guest.snapshots(), [])
            self.assertIsNone(guest.current())
            name = guest.snapshot(name="one", description="<b> & \"c\" 'd' é")
            self.assertEqual(name, "one")
            self.assertEqual(guest.snapshots(), ["one"])
            self.assertEqual(guest.current(), "one")
            root = ElementTree.fromstring(guest.xml("one"))
            self.assertEqual(root.findtext("name"), "one")
            self.assertEqual(root.findtext("description"), "<b> & \"c\" 'd' é")
            self.assertTrue(Path(root.find("memory").get("file")).exists())
        self.assertEqual(machine.status(), "running")
        self.assertEqual(machine.disk_file(), self.directory / "disk.one")

    def test_stats_are_complete_and_their_phases_add_up(self):
        machine = self.machine()
        with Guest.open_qmp(machine.qmp, self.state) as guest:
            guest.snapshot(name="one")
            stats = guest.stats()
        phases = (stats.validate_us + stats.plan_us + stats.prepare_us + stats.pause_us +
                  stats.switch_us + stats.arm_us + stats.drain_us + stats.finish_us + stats.undo_us)
        self.assertEqual(phases, stats.total_us)
        self.assertGreater(stats.guest_paused_us, 0)
        self.assertLess(stats.guest_paused_us, stats.total_us)
        self.assertLessEqual(stats.instant_us, stats.total_us)
        self.assertEqual(stats.disks, 1)
        self.assertEqual(stats.image_format, ImageFormat.SPARSE)
        self.assertEqual(stats.memory_image_bytes,
                         (self.state / "one.mem").stat().st_blocks * 512)
        self.assertIsInstance(stats.pause_from_events, bool)

    def test_non_live_snapshot(self):
        machine = self.machine()
        with Guest.open_qmp(machine.qmp, self.state) as guest:
            guest.snapshot(name="plain", instant=False)
            self.assertEqual(guest.stats().drain_us, 0)
        self.assertEqual(machine.status(), "running")

    def test_memory_file_is_written_to_the_given_path(self):
        machine = self.machine()
        memory = self.directory / "a & b <é>.mem"
        with Guest.open_qmp(machine.qmp, self.state) as guest:
            guest.snapshot(name="one", memory=memory)
        self.assertGreater(memory.stat().st_size, 4096)

    def test_xml_is_accepted_and_the_default_name_is_the_time(self):
        machine = self.machine()
        with Guest.open_qmp(machine.qmp, self.state) as guest:
            self.assertRegex(guest.snapshot(), r"^\d+$")
            self.assertEqual(guest.snapshot("<domainsnapshot><name>x</name></domainsnapshot>"), "x")
            self.assertEqual(len(guest.snapshots()), 2)

    def test_explicit_flags_replace_instant(self):
        machine = self.machine()
        flags = Flag.CREATE_LIVE | Flag.CREATE_INSTANT | Flag.CREATE_NO_METADATA
        with Guest.open_qmp(machine.qmp, self.state) as guest:
            guest.snapshot(name="one", flags=flags)
            self.assertEqual(guest.snapshots(), [])

    def test_prepare_revert_and_load(self):
        machine = self.machine()
        with Guest.open_qmp(machine.qmp, self.state) as guest:
            guest.snapshot(name="one")
            guest.snapshot(name="two")
        for running, status in ((None, "running"), (True, "running"), (False, "paused")):
            with self.subTest(running=running):
                images = self.directory / f"images {running}"
                images.mkdir()
                plan = prepare_revert(self.state, "one", images)
                self.assertEqual((len(plan.disks), plan.memory_backends), (1, []))
                disk = plan.disks[0]
                self.assertEqual(disk.format, "qcow2")
                self.assertEqual(disk.file.parent, images)
                self.assertTrue(disk.file.exists())
                self.assertEqual(disk.backing_file, self.directory / "disk.raw")
                self.assertEqual(plan.memory_file, self.state / "one.mem")
                self.assertIsInstance(plan.domain_xml, str)
                restored = self.machine(name=f"restored-{running}",
                                        disk=disk.file,
                                        disk_format="qcow2",
                                        arguments=["-incoming", "defer"])
                with Guest.open_qmp(restored.qmp, self.state) as guest:
                    with self.assertRaises(ValueError):
                        guest.load("one", running, memory="some")
                    with self.assertRaises(Error) as raised:
                        guest.load("one", running, bandwidth=1)
                    self.assertEqual(raised.exception.code, ErrorCode.INVALID_ARG)
                    stats = guest.load("one", running)
                    self.assertEqual(guest.current(), "one")
                self.assertEqual((stats.memory, stats.running), (Memory.FULL, running is not False))
                self.assertEqual(stats.check_us + stats.load_us + stats.finish_us, stats.total_us)
                self.assertEqual(restored.status(), status)


    def test_load_whose_memory_follows(self):
        machine = self.machine()
        with Guest.open_qmp(machine.qmp, self.state) as guest:
            guest.snapshot(name="one", image_format="sparse")
            self.assertFalse(guest.memory_progress().coming)
        plan = prepare_revert(self.state, "one", memory="lazy")
        self.assertEqual(plan.memory_backends, [])
        restored = self.machine(name="restored", disk=plan.disks[0].file, disk_format="qcow2",
                                arguments=["-incoming", "defer"])
        with Guest.open_qmp(restored.qmp, self.state) as guest:
            stats = guest.load("one", memory="lazy", bandwidth=1 << 30)
            self.assertEqual((stats.memory, stats.running), (Memory.LAZY, True))
            self.assertEqual(restored.status(), "running")
            progress = guest.memory_progress()
            self.assertLessEqual(progress.bytes_in, progress.bytes_total)
            self.assertTrue(guest.wait_memory(timeout=60))
            self.assertFalse(guest.memory_progress().coming)
            guest.snapshot(name="two")

    def test_prepare_revert_by_a_mapping(self):
        machine = self.machine()
        with Guest.open_qmp(machine.qmp, self.state) as guest:
            guest.snapshot(name="one", image_format="raw")
        with self.assertRaises(Error) as raised:
            prepare_revert(self.state, "one", memory="map")
        self.assertEqual(raised.exception.code, ErrorCode.CONFIG_UNSUPPORTED)
        image_convert(self.state / "one.mem", "sparse")
        for memory in ("map", Memory.MAP):
            plan = prepare_revert(self.state, "one", memory=memory)
            backend, = plan.memory_backends
            self.assertEqual((backend.id, backend.file), ("pc.ram", self.state / "one.mem"))
            self.assertEqual((backend.size, backend.offset % (1 << 20)), (64 << 20, 0))
            for part in ("memory-backend-file,", "id=pc.ram,", f"size={backend.size},",
                         f"mem-path={backend.file},", f"offset={backend.offset},",
                         "share=off,readonly=on,rom=off"):
                self.assertIn(part, backend.object)
        with self.assertRaises(ValueError):
            prepare_revert(self.state, "one", memory="some")

    def test_delete(self):
        machine = self.machine()
        with Guest.open_qmp(machine.qmp, self.state) as guest:
            for name in ("one", "two", "three"):
                guest.snapshot(name=name)
            with self.assertRaises(Error) as raised:
                guest.delete("one")
            self.assertEqual(raised.exception.code, ErrorCode.OPERATION_UNSUPPORTED)
            guest.delete("three")
            self.assertEqual((guest.snapshots(), guest.current()), (["one", "two"], "two"))
            self.assertEqual(machine.disk_file(), self.directory / "disk.two")
            self.assertFalse((self.state / "three.mem").exists()
                             or (self.directory / "disk.three").exists())
            guest.delete("two", DeleteFlag.METADATA_ONLY)
            self.assertTrue((self.state / "two.mem").exists()
                            and (self.directory / "disk.two").exists())
            with self.assertRaises(NotFound):
                guest.delete("two")
            with self.assertRaises(ValueError):
                guest.delete("one", -1)
            with self.assertRaises(Error) as raised:
                guest.delete("one", DeleteFlag.CHILDREN | DeleteFlag.CHILDREN_ONLY)
            self.assertEqual(raised.exception.code, ErrorCode.INVALID_ARG)
        self.assertEqual(machine.status(), "running")


class Examination(TestCase):
    def test_doctor_examines_a_guest_and_the_host(self):
        machine = self.machine()
        with Guest.open_qmp(machine.qmp, self.state) as guest:
            found = guest.doctor()
            self.assertEqual([finding for finding in found if finding.verdict == "fail"], [])
            self.assertIn(("disk", "pass"), [(each.check, each.verdict) for each in found])
            guest.snapshot(name="one")
        with self.assertRaises(Error):
            guest.doctor()
        self.assertIn("kernel", [finding.check for finding in doctor()])


class Interruption(TestCase):
    def test_recovery_of_a_guest_reports_what_it_has_found(self):
        machine = self.machine()
        with Guest.open_qmp(machine.qmp, self.state) as guest:
            self.assertEqual(guest.recover(), [])
            self.assertEqual(recover_offline(self.state), [])
            journal = self.state / ".lost.journal"
            journal.write_text("damaged\n")
            journal.chmod(0o600)
            for found in (guest.recover(), recover_offline(str(self.state))):
                self.assertEqual(len(found), 1)
                self.assertEqual((found[0].snapshot, found[0].what, found[0].object),
                                 ("lost", "snapshot", "lost"))
                self.assertEqual((found[0].action, found[0].blocks), ("left", True))
                self.assertIn(str(journal), found[0].why)
            with self.assertRaises(Error) as caught:
                guest.snapshot()
            self.assertEqual(caught.exception.code, ErrorCode.OPERATION_INVALID)
            journal.unlink()
            guest.snapshot(name="next")
        with self.assertRaises(Error):
            recover_offline(self.state / "nowhere")

    def test_ctrl_c_in_the_drain_cancels_and_propagates(self):
        machine = self.machine(memory=LARGE)

        def interrupt():
            machine.monitor.wait_for_event("RESUME")
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        with Guest.open_qmp(machine.qmp, self.state) as guest:
            thread.start()
            with self.assertRaises(KeyboardInterrupt):
                guest.snapshot(name="one")
            thread.join()
            self.assert_undone(machine, guest)
            self.assertEqual(guest.snapshot(name="two"), "two")

    def test_cancel_from_another_thread(self):
        machine = self.machine(memory=LARGE)
        with Guest.open_qmp(machine.qmp, self.state) as guest:
            def cancel():
                machine.monitor.wait_for_event("RESUME")
                guest.cancel()

            thread = threading.Thread(target=cancel)
            thread.start()
            with self.assertRaises(Cancelled) as caught:
                guest.snapshot(name="one")
            thread.join()
            self.assertEqual(caught.exception.code, ErrorCode.OPERATION_ABORTED)
            self.assert_undone(machine, guest)
            self.assertGreater(guest.stats().undo_us, 0)

    def test_second_snapshot_is_refused_and_does_no_harm(self):
        machine = self.machine(memory=LARGE)
        refused = []
        with Guest.open_qmp(machine.qmp, self.state) as guest:
            def second():
                machine.monitor.wait_for_event("RESUME")
                try:
                    guest.snapshot(name="two")
                except Error as error:
                    refused.append(error)

            thread = threading.Thread(target=second)
            thread.start()
            guest.snapshot(name="one")
            thread.join()
            self.assertEqual([error.code for error in refused], [ErrorCode.OPERATION_INVALID])
            self.assertEqual(guest.snapshots(), ["one"])


class Refusals(TestCase):
    def assert_error(self, code, call, *arguments, **options):
        with self.assertRaises(Error) as caught:
            call(*arguments, **options)
        self.assertEqual(caught.exception.code, code, caught.exception.message)
        self.assertTrue(caught.exception.message)
        self.assertEqual(str(caught.exception), caught.exception.message)
        self.assertEqual(caught.exception.domain, 10)

    def test_missing_socket_or_directory_is_refused(self):
        self.assert_error(ErrorCode.SYSTEM_ERROR, Guest.open_qmp, self.directory / "none",
                          self.state)
        machine = self.machine()
        self.assert_error(ErrorCode.SYSTEM_ERROR, Guest.open_qmp, machine.qmp,
                          self.directory / "none")
        self.assert_error(ErrorCode.XML_DETAIL, Guest.open_qmp, machine.qmp, self.state, "<domain")

    def test_invalid_xml_is_refused(self):
        machine = self.machine()
        with Guest.open_qmp(machine.qmp, self.state) as guest:
            self.assert_error(ErrorCode.XML_DETAIL, guest.snapshot, "<domainsnapshot>")
            self.assert_error(ErrorCode.XML_DETAIL, guest.snapshot, name="a/b")
            with self.assertRaises(ValueError):
                guest.snapshot("<domainsnapshot/>", name="x")
            with self.assertRaises(ValueError):
                guest.snapshot("<domainsnapshot/>\0")
            self.assertEqual(machine.disk_file(), machine.disk)

    def test_invalid_flags_are_refused(self):
        machine = self.machine()
        with Guest.open_qmp(machine.qmp, self.state) as guest:
            for flags in (1 << 20, Flag.CREATE_INSTANT,
                          Flag.CREATE_INSTANT | Flag.CREATE_LIVE | Flag.CREATE_DISK_ONLY):
                self.assert_error(ErrorCode.INVALID_ARG, guest.snapshot, flags=flags)
            self.assert_error(ErrorCode.OPERATION_UNSUPPORTED,
                              guest.snapshot,
                              flags=Flag.CREATE_DISK_ONLY)
            for flags in (-1, 1 << 32):
                with self.assertRaises(ValueError):
                    guest.snapshot(flags=flags)

    def test_existing_name_is_refused(self):
        machine = self.machine()
        with Guest.open_qmp(machine.qmp, self.state) as guest:
            guest.snapshot(name="one")
            self.assert_error(ErrorCode.OPERATION_INVALID, guest.snapshot, name="one")

    def test_unknown_names_are_refused(self):
        machine = self.machine()
        with Guest.open_qmp(machine.qmp, self.state) as guest:
            with self.assertRaises(NotFound):
                guest.xml("none")
            with self.assertRaises(NotFound):
                guest.load("none")
            with self.assertRaises(NotFound):
                prepare_revert(self.state, "none")

    def test_load_into_a_running_guest_is_refused(self):
        machine = self.machine()
        with Guest.open_qmp(machine.qmp, self.state) as guest:
            guest.snapshot(name="one")
            with self.assertRaises(Error):
                guest.load("one")
        self.assertEqual(machine.status(), "running")

    def test_stats_and_cancel_without_a_snapshot_are_refused(self):
        machine = self.machine()
        with Guest.open_qmp(machine.qmp, self.state) as guest:
            self.assert_error(ErrorCode.OPERATION_INVALID, guest.stats)
            self.assert_error(ErrorCode.OPERATION_INVALID, guest.cancel)

    def test_pause_limit(self):
        machine = self.machine()
        with Guest.open_qmp(machine.qmp, self.state) as guest:
            for seconds in (0, -1, 0.0001, 2**32, float("nan"), float("inf")):
                with self.subTest(seconds), self.assertRaises(ValueError):
                    guest.pause_limit(seconds)
            guest.pause_limit(30)
            guest.pause_limit(0.001)

    def test_early_start_tries(self):
        machine = self.machine()
        with Guest.open_qmp(machine.qmp, self.state) as guest:
            for tries in (-1, 2**32):
                with self.subTest(tries), self.assertRaises(ValueError):
                    guest.overlap_tries(tries)
            guest.overlap_tries(0)
            guest.snapshot("<domainsnapshot/>")
            self.assertFalse(guest.stats().overlapped)
            self.assertEqual(guest.stats().lost_tries, 0)

    def test_watchdog(self):
        machine = self.machine()
        with Guest.open_qmp(machine.qmp, self.state) as guest:
            guest.require_watchdog()
            guest.snapshot("<domainsnapshot/>")
            self.assertEqual(guest.stats().watchdog, Watchdog.PROGRAM)
            guest.require_watchdog(False)

    def test_closed_guest_is_refused(self):
        machine = self.machine()
        guest = Guest.open_qmp(machine.qmp, self.state)
        guest.close()
        guest.close()
        for call in (guest.snapshot, guest.snapshots, guest.current, guest.stats, guest.cancel,
                     lambda: guest.xml("one"), lambda: guest.load("one"),
                     lambda: guest.pause_limit(1)):
            self.assert_error(ErrorCode.INVALID_ARG, call)


if __name__ == "__main__":
    unittest.main()
