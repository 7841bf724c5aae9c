# SPDX-License-Identifier: LGPL-2.1-or-later
"""The header and the package say the same."""

import ctypes
import dataclasses
import re
import subprocess
import tempfile
import unittest
from pathlib import Path

from instantsnap import ErrorCode, Flag, Stats, _library

from .machine import TOP

HEADER = (TOP / "include" / "instantsnap.h").read_text()
CODE = re.sub(r"/\*.*?\*/", "", HEADER, flags=re.DOTALL)


def functions():
    """name -> number of parameters, of every function that the header declares."""
    found = {}
    for name, parameters in re.findall(r"\b(instantsnap_\w+)\(([^)]*)\);", CODE):
        found[name] = 0 if parameters.strip() == "void" else parameters.count(",") + 1
    return found


class Declarations(unittest.TestCase):
    def test_every_function_of_the_header_is_declared_and_no_other(self):
        declared = {name: len(parameters) for name, (_, parameters) in _library.FUNCTIONS.items()}
        self.assertGreater(len(declared), 20)
        self.assertEqual(functions(), declared)

    def test_pointers_are_never_returned_as_integers(self):
        for name in functions():
            result = re.search(r"^\s*(.*?)\b" + name + r"\(", CODE, re.MULTILINE)[1]
            kind = _library.FUNCTIONS[name][0]
            with self.subTest(name):
                if "*" in result:
                    self.assertEqual(ctypes.sizeof(kind), ctypes.sizeof(ctypes.c_void_p))
                    owned = result.strip() == "char *"
                    self.assertEqual(kind is ctypes.c_void_p, owned or "instantsnap_" in result and "const" not in result)

    def test_structures_are_laid_out_as_the_compiler_does(self):
        structures = {"instantsnap_error": _library.CError, "instantsnap_stats": _library.CStats,
                      "instantsnap_revert_disk": _library.CRevertDisk}
        lines = ["#include <stdio.h>", f'#include "{TOP}/include/instantsnap.h"', "int main(void) {"]
        expected = []
        for name, structure in structures.items():
            expected.append(f"{name} {ctypes.sizeof(structure)}")
            lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
            for field, *_ in structure._fields_:
                expected.append(f"{field} {getattr(structure, field).offset} {getattr(structure, field).size}")
                lines.append(f'printf("{field} %zu %zu\\n", offsetof({name}, {field}), sizeof((({name} *)0)->{field}));')
        lines.append("return 0; }")
        with tempfile.TemporaryDirectory() as directory:
            source, program = Path(directory, "layout.c"), Path(directory, "layout")
            source.write_text("\n".join(lines))
            subprocess.run(["cc", "-o", program, source], check=True)
            printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout
        self.assertEqual(printed.splitlines(), expected)

    def test_every_field_of_the_statistics_is_passed_on(self):
        fields = [name for name, *_ in _library.CStats._fields_ if name != "size"]
        self.assertEqual([field.name for field in dataclasses.fields(Stats)], fields)

    def test_flags_are_the_headers(self):
        listed = {name: 1 << int(bit)
                  for name, bit in re.findall(r"VIR_DOMAIN_SNAPSHOT_(CREATE_\w+) *=? *\(?1 << (\d+)", CODE)}
        self.assertEqual({name: flag.value for name, flag in Flag.__members__.items()}, listed)

    def test_error_codes_are_the_headers(self):
        listed = {name: int(number) for name, number in re.findall(r"VIR_ERR_(\w+) = (\d+)", CODE)}
        self.assertEqual({name: code.value for name, code in ErrorCode.__members__.items()}, listed)


if __name__ == "__main__":
    unittest.main()
