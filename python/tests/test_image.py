# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memory images: what is in them, whether they are whole, and other formats."""

import os
import unittest

from instantsnap import (Error, ErrorCode, Guest, image_convert, image_index, image_info,
                         image_verify)

from .machine import TestCase


class Images(TestCase):
    def snapshot(self):
        machine = self.machine()
        with Guest.open_qmp(machine.qmp, self.state) as guest:
            guest.snapshot(name="s", image_format="raw")
        return self.state / "s.mem"

    def test_conversion_keeps_the_contents(self):
        path = self.snapshot()
        raw = image_info(path)
        self.assertEqual(raw.format, "raw")
        self.assertTrue(raw.was_running)
        self.assertEqual(raw.file_bytes, path.stat().st_size)
        self.assertEqual(sum(block.bytes for block in raw.blocks) // 4096,
                         sum(block.data_pages + block.zero_pages for block in raw.blocks))
        image_convert(path, "sparse")
        image_verify(path)
        sparse = image_info(path)
        self.assertEqual(sparse.format, "sparse")
        self.assertEqual((sparse.blocks, sparse.machine, sparse.domain),
                         (raw.blocks, raw.machine, raw.domain))
        self.assertTrue(sparse.notes.checksums)
        self.assertFalse(sparse.notes.index)
        image_convert(path, "zstd")
        image_verify(path)
        zstd = image_info(path)
        self.assertEqual((zstd.format, zstd.blocks), ("zstd", raw.blocks))
        self.assertLess(zstd.file_bytes, raw.file_bytes)
        image_convert(path, "raw")
        self.assertEqual(image_info(path).blocks, raw.blocks)
        image_index(path)
        self.assertTrue(image_info(path).notes.index)
        image_verify(path)

    def test_level_is_for_zstd_images(self):
        machine = self.machine()
        with Guest.open_qmp(machine.qmp, self.state) as guest:
            for arguments in ({"zstd_level": 3}, {"image_format": "sparse", "zstd_level": 3},
                              {"image_format": "zstd", "zstd_level": 0},
                              {"image_format": "zstd", "zstd_level": 20}):
                with self.assertRaises(ValueError):
                    guest.snapshot(**arguments)
            sizes = []
            for level in (1, 19):
                name = guest.snapshot(name=f"s{level}", image_format="zstd", zstd_level=level)
                self.assertEqual(guest.stats().image_format.name, "ZSTD")
                sizes.append(image_info(self.state / f"{name}.mem").file_bytes)
            self.assertLess(sizes[1], sizes[0])

    def test_image_that_is_cut_off_is_not_whole(self):
        path = self.snapshot()
        for name in ("raw", "zstd", "sparse"):
            with self.subTest(name):
                image_convert(path, name)
                whole = path.read_bytes()
                path.chmod(0o600)
                os.truncate(path, len(whole) // 2)
                for call in (image_info, image_verify, lambda path: image_convert(path, "raw")):
                    with self.assertRaises(Error) as caught:
                        call(path)
                    self.assertEqual(caught.exception.code, ErrorCode.INVALID_DOMAIN_SNAPSHOT)
                    self.assertIn(str(path), str(caught.exception))
                path.write_bytes(whole)

    def test_another_format_is_a_value_error(self):
        for name in ("gzip", "default", "RAW", None):
            with self.assertRaises(ValueError):
                image_convert("/nonexistent", name)


if __name__ == "__main__":
    unittest.main()
