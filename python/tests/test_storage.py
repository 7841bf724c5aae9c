# SPDX-License-Identifier: LGPL-2.1-or-later
"""Disks that the caller's storage snapshots, here by copying their files."""

import shutil
import unittest

from instantsnap import Cancelled, Error, ErrorCode, Guest, prepare_revert

from .machine import TestCase

XML = ("<domainsnapshot><name>{}</name>"
       "<disks><disk name='vda' snapshot='manual'/></disks></domainsnapshot>")


class Full(Exception):
    pass


def copy_of(call):
    return f"{call.disks[0].source}.{call.snapshot}"


def copy(call):
    shutil.copyfile(call.disks[0].source, copy_of(call))


class StorageHook(TestCase):
    def test_functions_snapshot_undo_and_revert_disks(self):
        machine = self.machine()
        calls, undone = [], []

        def snapshot(call):
            calls.append((call, machine.status()))
            copy(call)

        with Guest.open_qmp(machine.qmp, self.state) as guest:
            with self.assertRaises(Error) as caught:
                guest.snapshot(XML.format("one"))
            self.assertEqual(caught.exception.code, ErrorCode.OPERATION_UNSUPPORTED)
            guest.set_storage_hook(snapshot, undo=undone.append, deadline=20)
            self.assertEqual(guest.snapshot(XML.format("one")), "one")
            call, status = calls[0]
            self.assertEqual((call.snapshot, len(call.disks), status), ("one", 1, "paused"))
            disk = call.disks[0]
            self.assertEqual((disk.name, disk.source, disk.format),
                             ("vda", str(machine.disk), "raw"))
            self.assertGreater(call.paused_us, 0)
            self.assertLessEqual(call.deadline_us, 20_000_000)
            self.assertEqual(machine.disk_file(), machine.disk)

            with self.assertRaises(Cancelled):
                guest.snapshot(XML.format("two"),
                               on_event=lambda event: guest.cancel() if event.type == 3 else None)
            self.assertEqual([call.snapshot for call in undone], ["two"])
            guest.set_storage_hook(None)
            with self.assertRaises(Error):
                guest.snapshot(XML.format("three"))

        with self.assertRaises(Error) as caught:
            prepare_revert(self.state, "one")
        self.assertEqual(caught.exception.code, ErrorCode.OPERATION_UNSUPPORTED)
        with self.assertRaises(ValueError):
            prepare_revert(self.state, "one", revert=lambda call: [])
        plan = prepare_revert(self.state, "one", revert=lambda call: [copy_of(call)])
        self.assertEqual([(disk.name, str(disk.file), disk.format, disk.backing_file)
                          for disk in plan.disks], [("vda", f"{machine.disk}.one", "raw", None)])
        restored = self.machine(name="restored",
                                disk=plan.disks[0].file,
                                arguments=["-incoming", "defer"])
        with Guest.open_qmp(restored.qmp, self.state) as guest:
            guest.load("one")
        self.assertEqual(restored.status(), "running")

    def test_exception_in_a_function_fails_the_snapshot_and_is_raised(self):
        machine = self.machine()
        undone = []

        def snapshot(call):
            raise Full(call.snapshot)

        with Guest.open_qmp(machine.qmp, self.state) as guest:
            guest.set_storage_hook(snapshot, undo=undone.append)
            with self.assertRaisesRegex(Full, "one"):
                guest.snapshot(XML.format("one"))
            with self.assertRaisesRegex(Full, "two"):
                guest.start_snapshot(XML.format("two"))
            with self.assertRaisesRegex(Full, "three"), \
                    guest.start_snapshot(XML.format("three"), at_once=True) as job:
                pass
            self.assertRaises(Full, job.result)
            self.assertEqual(undone, [])
            self.assert_undone(machine, guest)
            for deadline in (0, -1, 2**32):
                self.assertRaises(ValueError, guest.set_storage_hook, snapshot, deadline=deadline)


if __name__ == "__main__":
    unittest.main()
