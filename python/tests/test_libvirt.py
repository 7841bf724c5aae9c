# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests of the package with libvirt-python and a real libvirtd."""

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import types
import unittest
from pathlib import Path
from unittest import mock
from xml.etree import ElementTree

import instantsnap
from instantsnap import Cancelled, Error, ErrorCode, EventType, Flag, Guest, _binding
from instantsnap import snapshot_create_xml, snapshot_delete, snapshot_revert

from .daemon import LibvirtTestCase, libvirt, libvirt_qemu, needs_libvirt, wait_for

INSTANT = Flag.CREATE_LIVE | Flag.CREATE_INSTANT
# MiB: with this much, memory still flows after its first part, and when a cancel arrives.
LARGE = 2048


def xml(name, guest=None):
    memory = ""
    if guest is not None:
        memory = f"<memory snapshot='external' file='{guest.directory / name}.mem'/>"
    return f"<domainsnapshot><name>{name}</name>{memory}</domainsnapshot>"


class ErrorChecks:
    def assert_libvirt_error(self, code, call, *arguments, domain=None):
        with self.assertRaises(libvirt.libvirtError) as caught:
            call(*arguments)
        error = caught.exception
        self.assertEqual(error.get_error_code(), code, error)
        self.assertEqual(error.get_error_domain(),
                         libvirt.VIR_FROM_QEMU if domain is None else domain)
        self.assertEqual(error.get_error_level(), libvirt.VIR_ERR_ERROR)
        self.assertTrue(error.get_error_message())
        self.assertEqual(str(error), error.get_error_message())
        return error


@needs_libvirt
class Snapshots(ErrorChecks, LibvirtTestCase):
    def test_instant_snapshot_is_a_libvirt_snapshot(self):
        guest = self.guest()
        snapshot = snapshot_create_xml(guest.domain, xml("first", guest), INSTANT)
        self.assertIs(type(snapshot), libvirt.virDomainSnapshot)
        self.assertEqual(snapshot.getName(), "first")
        self.assertTrue(snapshot.isCurrent())
        self.assertTrue(snapshot.hasMetadata())
        self.assertIs(snapshot.domain(), guest.domain)
        self.assertIs(snapshot.connect(), self.connection)
        root = ElementTree.fromstring(snapshot.getXMLDesc())
        self.assertEqual(root.findtext("name"), "first")
        self.assertEqual(root.findtext("state"), "running")
        memory = Path(root.find("memory").get("file"))
        self.assertEqual(memory, guest.directory / "first.mem")
        self.assertTrue(memory.read_bytes()[:16] == b"LibvirtQemudSave")
        self.assertEqual(guest.domain.snapshotListNames(), ["first"])
        self.assertEqual(guest.disk_file(), guest.directory / "disk.first")
        self.assertTrue(guest.is_running())
        guest.wait_ticks()

        # Instant is the default, and each snapshot is the parent of the next.
        second = snapshot_create_xml(guest.domain, xml("second", guest))
        self.assertEqual(second.getParent().getName(), "first")

    def test_unrecorded_snapshot(self):
        guest = self.guest()
        for name in ("a", "b", "c"):
            snapshot = snapshot_create_xml(guest.domain, xml(name, guest),
                                           INSTANT | Flag.CREATE_NO_METADATA)
            self.assertEqual(snapshot.getName(), name)
            self.assertEqual(guest.domain.snapshotListNames(), [])
            self.assertTrue((guest.directory / f"{name}.mem").exists())
            del snapshot
        guest.wait_ticks()

    def test_flags_of_both_modules_can_be_combined(self):
        guest = self.guest()
        flags = (libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_LIVE
                 | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC | 1 << 10)
        self.assertEqual(
            snapshot_create_xml(guest.domain, xml("one", guest), flags).getName(), "one")

    def test_snapshot_without_instant_is_a_stock_snapshot(self):
        guest = self.guest()
        snapshot = snapshot_create_xml(guest.domain, xml("one"), Flag.CREATE_DISK_ONLY)
        self.assertIs(type(snapshot), libvirt.virDomainSnapshot)
        self.assertIsNone(ElementTree.fromstring(snapshot.getXMLDesc()).find("memory[@file]"))
        self.assertEqual(
            ElementTree.fromstring(snapshot.getXMLDesc()).findtext("state"), "disk-snapshot")
        self.assertEqual(guest.disk_file(), guest.directory / "disk.one")

        # So are errors; those of unknown numbers are passed on unchanged.
        call = (snapshot_create_xml, guest.domain)
        wrong = (libvirt.VIR_ERR_INVALID_ARG, xml("two"), 1 << 20)
        plain = self.assert_libvirt_error(wrong[0], guest.domain.snapshotCreateXML, *wrong[1:])
        ours = self.assert_libvirt_error(wrong[0], *call, *wrong[1:])
        self.assertEqual(ours.err, plain.err)
        self.assert_libvirt_error(libvirt.VIR_ERR_XML_DETAIL,
                                  *call,
                                  "<domainsnapshot",
                                  Flag.CREATE_DISK_ONLY,
                                  domain=libvirt.VIR_FROM_DOMAIN_SNAPSHOT)

    def test_revert_and_delete(self):
        guest = self.guest()
        snapshot = snapshot_create_xml(guest.domain, xml("internal"), 0)
        guest.wait_ticks()
        self.assertIsNone(snapshot_revert(snapshot, libvirt.VIR_DOMAIN_SNAPSHOT_REVERT_PAUSED))
        self.assertFalse(guest.is_running())
        self.assertIsNone(snapshot_revert(snapshot))
        self.assertTrue(guest.is_running())
        guest.wait_ticks()
        self.assertIsNone(snapshot_delete(snapshot))
        self.assertEqual(guest.domain.snapshotListNames(), [])
        self.assert_libvirt_error(libvirt.VIR_ERR_NO_DOMAIN_SNAPSHOT, snapshot_delete, snapshot)
        self.assert_libvirt_error(libvirt.VIR_ERR_NO_DOMAIN_SNAPSHOT, snapshot_revert, snapshot)

    def test_revert_to_an_instant_snapshot(self):
        guest = self.guest()
        snapshot = snapshot_create_xml(guest.domain, xml("one", guest), INSTANT)
        guest.wait_ticks()
        snapshot_revert(snapshot)
        self.assertTrue(guest.is_running())
        self.assertTrue(snapshot.isCurrent())
        guest.wait_ticks()

    def test_delete_an_instant_snapshot(self):
        guest = self.guest()
        snapshots = [
            snapshot_create_xml(guest.domain, xml(name, guest), INSTANT) for name in ("one", "two")
        ]
        snapshot_delete(snapshots[1])
        self.assertEqual(guest.domain.snapshotListNames(), ["one"])
        self.assertFalse((guest.directory / "two.mem").exists())
        guest.wait_ticks()
        snapshot_delete(snapshots[0], libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY)
        self.assertEqual(guest.domain.snapshotListNames(), [])
        self.assertTrue((guest.directory / "one.mem").exists())
        guest.wait_ticks()

    def test_open_libvirt(self):
        guest = self.guest()
        with Guest.open_libvirt(guest.domain) as opened:
            self.assertEqual((opened.snapshots(), opened.current()), ([], None))
            self.assertEqual(opened.snapshot(name="one", memory=guest.directory / "one.mem"), "one")
            snapshot_create_xml(guest.domain, xml("two", guest))
            self.assertEqual((opened.snapshots(), opened.current()), (["one", "two"], "two"))
            self.assertEqual(ElementTree.fromstring(opened.xml("two")).findtext("name"), "two")
            stats = opened.stats()
        phases = (stats.validate_us + stats.plan_us + stats.prepare_us + stats.pause_us +
                  stats.switch_us + stats.arm_us + stats.drain_us + stats.finish_us + stats.undo_us)
        self.assertEqual(phases, stats.total_us)
        self.assertGreater(stats.guest_paused_us, 0)
        self.assertEqual(stats.disks, 1)
        self.assertEqual(stats.memory_image_bytes, (guest.directory / "one.mem").stat().st_size)

    def test_recovery_reports_what_it_has_found(self):
        guest = self.guest()
        journal = self.daemon.journals / "libvirt" / f".{guest.domain.UUIDString()}.journal"
        kept = journal.with_suffix(".kept")

        def on_event(event):
            if event.type == EventType.INSTANT:
                os.link(journal, kept)

        with Guest.open_libvirt(guest.domain) as opened:
            self.assertEqual(opened.recover(), [])
            opened.snapshot(name="one", memory=guest.directory / "one.mem", on_event=on_event)
            # As if the process had been killed at the end.
            self.assertFalse(journal.exists())
            kept.rename(journal)
            found = opened.recover()
            self.assertEqual([(one.snapshot, one.what, one.action, one.blocks) for one in found],
                             [("one", "snapshot", "finished", False)])
            self.assertFalse(journal.exists())
            self.assertEqual(opened.snapshots(), ["one"])
            guest.domain.destroy()
            self.assertEqual(opened.recover(), [])

    def test_guest_outlives_the_objects_it_was_opened_with(self):
        guest = self.guest()
        connection = self.daemon.connect()
        opened = Guest.open_libvirt(connection.lookupByName("one"))
        connection.close()
        del connection
        gc.collect()
        self.assertEqual(opened.snapshot(name="one", memory=guest.directory / "one.mem"), "one")
        opened.close()
        with self.assertRaises(Error) as caught:
            opened.snapshots()
        self.assertEqual(caught.exception.code, ErrorCode.INVALID_ARG)

    def test_two_threads_with_two_domains(self):
        guests = [self.guest("left"), self.guest("right")]
        results = {}

        def take(guest):
            try:
                snapshots = [
                    snapshot_create_xml(guest.domain, xml(f"{number}", guest), INSTANT)
                    for number in range(3)
                ]
                results[guest] = [snapshot.getName() for snapshot in snapshots]
            except Exception as error:
                results[guest] = error

        threads = [threading.Thread(target=take, args=(guest,)) for guest in guests]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for guest in guests:
            self.assertEqual(results[guest], ["0", "1", "2"])
            self.assertEqual(guest.domain.snapshotCurrent().getName(), "2")
            guest.wait_ticks()

    def test_errors_are_libvirt_errors(self):
        guest = self.guest()
        for flags in (Flag.CREATE_INSTANT, INSTANT | 1 << 20, INSTANT | Flag.CREATE_DISK_ONLY,
                      INSTANT | Flag.CREATE_REDEFINE,
                      Flag.CREATE_INSTANT | Flag.CREATE_NO_METADATA):
            with self.subTest(flags):
                error = self.assert_libvirt_error(libvirt.VIR_ERR_INVALID_ARG, snapshot_create_xml,
                                                  guest.domain, xml("one", guest), flags)
                self.assertIn("flag", error.get_error_message())
        self.assert_libvirt_error(libvirt.VIR_ERR_XML_DETAIL, snapshot_create_xml, guest.domain,
                                  "<domainsnapshot")
        with contextlib.suppress(libvirt.libvirtError):
            self.connection.lookupByName("nobody")  # an older error of this thread
        taken = snapshot_create_xml(guest.domain, xml("one", guest))
        error = self.assert_libvirt_error(libvirt.VIR_ERR_OPERATION_INVALID, snapshot_create_xml,
                                          guest.domain, xml("one", guest))
        self.assertIn("'one'", error.get_error_message())
        self.assertIsNone(error.__cause__)
        for call in (snapshot_revert, snapshot_delete):
            self.assert_libvirt_error(libvirt.VIR_ERR_INVALID_ARG, call, taken, 1 << 20)
        self.assertEqual(guest.domain.snapshotListNames(), ["one"])

    def test_shut_off_domain_is_refused(self):
        guest = self.guest()
        guest.domain.destroy()
        self.assert_libvirt_error(libvirt.VIR_ERR_OPERATION_INVALID, snapshot_create_xml,
                                  guest.domain, xml("one", guest))


@needs_libvirt
class Interruption(ErrorChecks, LibvirtTestCase):
    def assert_undone(self, guest):
        self.assertEqual(guest.domain.snapshotListNames(), [])
        self.assertEqual(guest.disk_file(), guest.disk)
        self.assertEqual(sorted(path.name for path in guest.directory.iterdir()),
                         ["disk.qcow2", "serial.log"])
        self.assertTrue(guest.is_running())
        command = '{"execute":"query-migrate-capabilities"}'
        answer = libvirt_qemu.qemuMonitorCommand(guest.domain, command, 0)
        capabilities = json.loads(answer)["return"]
        self.assertFalse([
            capability for capability in capabilities
            if capability["capability"] == "background-snapshot" and capability["state"]
        ])
        guest.wait_ticks()

    def run_when_memory_flows(self, guest, action):
        """Starts a thread that calls `action` when a part of the memory image `one` is written."""
        image = guest.directory / "one.mem"

        def watch():
            wait_for("the memory image", lambda: image.exists() and image.stat().st_size > 64 << 10)
            action()

        thread = threading.Thread(target=watch)
        self.addCleanup(thread.join)
        thread.start()

    def test_ctrl_c_cancels_and_propagates(self):
        guest = self.guest(memory=LARGE)
        self.run_when_memory_flows(guest, lambda: os.kill(os.getpid(), signal.SIGINT))
        with self.assertRaises(KeyboardInterrupt):
            snapshot_create_xml(guest.domain, xml("one", guest), INSTANT)
        self.assert_undone(guest)
        self.assertEqual(
            snapshot_create_xml(guest.domain, xml("two", guest), INSTANT).getName(), "two")

    def test_cancel_from_another_thread(self):
        guest = self.guest(memory=LARGE)
        with Guest.open_libvirt(guest.domain) as opened:
            self.run_when_memory_flows(guest, opened.cancel)
            with self.assertRaises(Cancelled):
                opened.snapshot(name="one", memory=guest.directory / "one.mem")
        self.assert_undone(guest)


@needs_libvirt
class WithoutADaemon(ErrorChecks, unittest.TestCase):
    """Tests the conversions from and to libvirt-python, with libvirt's test driver in this
    process."""

    def setUp(self):
        self.connection = libvirt.open("test:///default")
        self.addCleanup(self.connection.close)
        self.domain = self.connection.lookupByName("test")
        self.addCleanup(self.forget_everything)

    def forget_everything(self):
        for snapshot in self.domain.listAllSnapshots():
            snapshot.delete()

    def test_every_snapshot_is_freed_once(self):
        free = libvirt.libvirtmod.virDomainSnapshotFree
        freed = []
        with mock.patch.object(libvirt.libvirtmod, "virDomainSnapshotFree",
                               side_effect=lambda capsule: (freed.append(free(capsule)))):
            for number in range(200):
                snapshot = snapshot_create_xml(self.domain, xml(f"{number}"), 0)
                self.assertEqual(snapshot.getName(), f"{number}")
                self.assertEqual(repr(snapshot._o)[:39], '<capsule object "virDomainSnapshotPtr" ')
                del snapshot
                gc.collect()
                self.assertEqual(len(freed), number + 1)
        self.assertEqual(set(freed), {0})
        self.assertEqual(self.domain.snapshotNum(), 200)

    def test_snapshot_keeps_its_connection_alive(self):
        connection = libvirt.open("test:///default")
        snapshot = snapshot_create_xml(connection.lookupByName("test"), xml("one"), 0)
        del connection
        gc.collect()
        self.assertTrue(snapshot.isCurrent())
        snapshot_revert(snapshot)
        snapshot_delete(snapshot)
        self.assertEqual(snapshot.domain().snapshotListNames(), [])

    def test_instant_snapshot_of_another_driver_is_refused(self):
        self.assert_libvirt_error(libvirt.VIR_ERR_OPERATION_UNSUPPORTED, snapshot_create_xml,
                                  self.domain, xml("one"))
        with self.assertRaises(Error) as caught:
            Guest.open_libvirt(self.domain)
        self.assertEqual(caught.exception.code, ErrorCode.OPERATION_UNSUPPORTED)

    def test_other_objects_are_type_errors(self):
        snapshot = snapshot_create_xml(self.domain, xml("one"), 0)
        for thing in (None, "test", 0, self.connection, snapshot):
            for call in (lambda: snapshot_create_xml(thing, xml("two")),
                         lambda: Guest.open_libvirt(thing)):
                with self.assertRaisesRegex(TypeError, r"^dom must be a libvirt\.virDomain, not "):
                    call()
        for thing in (None, "test", 0, self.connection, self.domain):
            for call in (snapshot_revert, snapshot_delete):
                with self.assertRaisesRegex(
                        TypeError, r"^snapshot must be a libvirt\.virDomainSnapshot, not "):
                    call(thing)
        for flags in ("1", 1.0, None):
            with self.assertRaises(TypeError):
                snapshot_create_xml(self.domain, xml("two"), flags)
        with self.assertRaises(TypeError):
            snapshot_create_xml(self.domain, None)

    def test_values_that_c_would_truncate_are_refused(self):
        snapshot = snapshot_create_xml(self.domain, xml("one"), 0)
        for flags in (-1, 1 << 32):
            for call in (lambda: snapshot_create_xml(self.domain, xml("two"), flags),
                         lambda: snapshot_revert(snapshot, flags),
                         lambda: snapshot_delete(snapshot, flags)):
                with self.assertRaisesRegex(ValueError, "flags"):
                    call()
        with self.assertRaisesRegex(ValueError, "NUL"):
            snapshot_create_xml(self.domain, xml("two") + "\0")
        self.assertEqual(self.domain.snapshotListNames(), ["one"])

    def test_error_is_kept_where_libvirt_has_none(self):
        snapshot = snapshot_create_xml(self.domain, xml("one"), 0)
        with mock.patch.object(libvirt.libvirtmod, "virGetLastError", return_value=None):
            self.assert_libvirt_error(libvirt.VIR_ERR_INVALID_ARG, snapshot_revert, snapshot,
                                      1 << 20)

    def test_ctrl_c_waits_where_cancelling_is_impossible(self):
        snapshot = snapshot_create_xml(self.domain, xml("one"), 0)
        pointer = _binding.snapshot_pointer(snapshot)
        ended = []

        def delete(*arguments):
            os.kill(os.getpid(), signal.SIGINT)
            ended.append(arguments)
            return 0

        with mock.patch("instantsnap._libvirt.library",
                        lambda: types.SimpleNamespace(qemuSnapshotDelete=delete)):
            with self.assertRaises(KeyboardInterrupt):
                snapshot_delete(snapshot, 2)
        self.assertEqual(ended, [(None, pointer, 2)])

    def test_second_copy_of_libvirt_is_refused(self):
        with tempfile.TemporaryDirectory() as directory:
            source, other = Path(directory, "other.c"), Path(directory, "other.so")
            source.write_text("int virDomainFree(void *domain) { return domain != 0; }")
            subprocess.run(["cc", "-shared", "-fPIC", "-o", other, source], check=True)
            for path, reason in ((str(other), "not the libvirt.so.0"),
                                 ("/nonexistent.so", "nonexistent")):
                with mock.patch.object(libvirt, "libvirtmod", types.SimpleNamespace(__file__=path)):
                    with self.assertRaisesRegex(ImportError, reason) as caught:
                        snapshot_create_xml(self.domain, xml("one"), 0)
                self.assertEqual(caught.exception.path, path)


class WithoutLibvirtPython(unittest.TestCase):
    def test_only_functions_that_need_libvirt_python_fail(self):
        program = (
            # None in sys.modules makes an import fail.
            "import sys; sys.modules['libvirt'] = None\n"
            "import instantsnap\n"
            "print(instantsnap.version())\n"
            "for call in (instantsnap.Guest.open_libvirt, instantsnap.snapshot_revert,\n"
            "             instantsnap.snapshot_delete,\n"
            "             lambda dom: instantsnap.snapshot_create_xml(dom, '')):\n"
            "    try: call(None)\n"
            "    except ImportError as error: print(error.name, 'python3-libvirt' in str(error))\n")
        path = str(Path(instantsnap.__file__).resolve().parents[1])
        result = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"})
        self.assertEqual(result.stdout.splitlines()[1:], ["libvirt True"] * 4, result.stderr)


if __name__ == "__main__":
    unittest.main()
