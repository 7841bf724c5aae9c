# SPDX-License-Identifier: LGPL-2.1-or-later
"""How the package finds the C library."""

import os
import re
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import instantsnap

from . import machine  # noqa: F401 (it sets INSTANTSNAP_LIBRARY)

PACKAGE = Path(instantsnap.__file__).resolve().parent


def python(program, path=PACKAGE.parent, **environment):
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1", **environment})


class FindingTheLibrary(unittest.TestCase):
    def test_version(self):
        self.assertRegex(instantsnap.version(), r"^\d+\.\d+\.\d+$")

    def test_import_alone_loads_nothing(self):
        result = python("import instantsnap; print(instantsnap.Flag.CREATE_LIVE.value)",
                        INSTANTSNAP_LIBRARY="/nonexistent/library.so")
        self.assertEqual((result.stdout, result.returncode), ("256\n", 0), result.stderr)

    def test_missing_library_is_an_import_error_that_names_the_variable(self):
        result = python(
            "import instantsnap\n"
            "try: instantsnap.version()\n"
            "except ImportError as error: print(error)",
            INSTANTSNAP_LIBRARY="/nonexistent/library.so")
        self.assertIn("/nonexistent/library.so", result.stdout)
        self.assertIn("INSTANTSNAP_LIBRARY", result.stdout)

    def test_wrong_library_is_an_import_error_that_names_the_function(self):
        result = python(
            "import instantsnap\n"
            "try: instantsnap.version()\n"
            "except ImportError as error: print(error)",
            INSTANTSNAP_LIBRARY="libc.so.6")
        self.assertRegex(result.stdout, r"libc\.so\.6 has no function instantsnap_\w+")

    def test_library_beside_the_package_is_found(self):
        with tempfile.TemporaryDirectory() as directory:
            copy = Path(directory, "instantsnap")
            copy.mkdir()
            for file in PACKAGE.glob("*.py"):
                (copy / file.name).write_bytes(file.read_bytes())
            (copy / "libinstantsnap.so.0").symlink_to(
                os.path.realpath(os.environ["INSTANTSNAP_LIBRARY"]))
            result = python(
                "import instantsnap; print(instantsnap.version(), instantsnap.__file__)",
                directory,
                INSTANTSNAP_LIBRARY="")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertTrue(re.match(r"\d+\.\d+\.\d+ " + re.escape(directory), result.stdout),
                        result.stdout)


if __name__ == "__main__":
    unittest.main()
