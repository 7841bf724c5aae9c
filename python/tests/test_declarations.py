# SPDX-License-Identifier: LGPL-2.1-or-later
"""The package's declarations match the headers."""

import ctypes
import dataclasses
import re
import subprocess
import tempfile
import unittest
from pathlib import Path

from instantsnap import (DeleteFlag, ErrorCode, Event, EventType, Flag, JobInfo, LoadStats, Memory,
                         MemoryProgress, Phase, Stats, StorageDisk, _library)

from .machine import TOP

def code(header):
    return re.sub(r"/\*.*?\*/", "", (TOP / "include" / header).read_text(), flags=re.DOTALL)


CODE = code("instantsnap.h")
LIBVIRT_CODE = code("instantsnap-libvirt.h")


def functions(code=CODE):
    """The number of parameters, by name, of every function that the header declares."""
    found = {}
    for name, parameters in re.findall(r"\b(\w+)\(([^()]*)\);", code):
        # The package does not offer the functions of drivers.
        if "driver" in name:
            continue
        found[name] = 0 if parameters.strip() == "void" else parameters.count(",") + 1
    return found


class Declarations(unittest.TestCase):
    def test_declared_functions_are_those_of_the_headers(self):
        def declared(functions):
            return {name: len(parameters) for name, (_, parameters) in functions.items()}

        self.assertGreater(len(functions()), 20)
        self.assertEqual(functions(), declared(_library.FUNCTIONS))
        self.assertEqual(functions(LIBVIRT_CODE), declared(_library.LIBVIRT_FUNCTIONS))

    def test_pointers_are_never_returned_as_integers(self):
        for name in functions():
            result = re.search(r"^\s*(.*?)\b" + name + r"\(", CODE, re.MULTILINE)[1]
            kind = _library.FUNCTIONS[name][0]
            with self.subTest(name):
                if "*" in result:
                    self.assertEqual(ctypes.sizeof(kind), ctypes.sizeof(ctypes.c_void_p))
                    owned = result.strip() == "char *"
                    handle = "instantsnap_" in result and "const" not in result
                    self.assertEqual(kind is ctypes.c_void_p, owned or handle)

    def test_structures_have_the_compilers_layout(self):
        structures = {
            "instantsnap_error": _library.CError,
            "instantsnap_stats": _library.CStats,
            "instantsnap_event": _library.CEvent,
            "instantsnap_job_info": _library.CJobInfo,
            "instantsnap_create_options": _library.CCreateOptions,
            "instantsnap_storage_disk": _library.CStorageDisk,
            "instantsnap_storage_call": _library.CStorageCall,
            "instantsnap_storage_hook": _library.CStorageHook,
            "instantsnap_revert_options": _library.CRevertOptions,
            "instantsnap_load_options": _library.CLoadOptions,
            "instantsnap_load_stats": _library.CLoadStats,
            "instantsnap_memory_progress": _library.CMemoryProgress,
            "instantsnap_memory_backend": _library.CMemoryBackend,
            "instantsnap_revert_disk": _library.CRevertDisk,
        }
        lines = [
            "#include <stdio.h>", f'#include "{TOP}/include/instantsnap.h"', "int main(void) {"
        ]
        expected = []
        for name, structure in structures.items():
            expected.append(f"{name} {ctypes.sizeof(structure)}")
            lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
            for field, *_ in structure._fields_:
                expected.append(
                    f"{field} {getattr(structure, field).offset} {getattr(structure, field).size}")
                lines.append(f'printf("{field} %zu %zu\\n", offsetof({name}, {field}), '
                             f'sizeof((({name} *)0)->{field}));')
        lines.append("return 0; }")
        with tempfile.TemporaryDirectory() as directory:
            source, program = Path(directory, "layout.c"), Path(directory, "layout")
            source.write_text("\n".join(lines))
            subprocess.run(["cc", "-o", program, source], check=True)
            printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout
        self.assertEqual(printed.splitlines(), expected)

    def test_every_structure_of_the_header_is_declared(self):
        listed = re.findall(r"^\} instantsnap_(\w+);", CODE, re.MULTILINE)
        enums = re.findall(r"typedef enum instantsnap_(\w+)", CODE)
        declared = {
            kind.__doc__ for kind in ctypes.Structure.__subclasses__()
            if kind.__module__ == _library.__name__
        }
        structures = {name for name in set(listed) - set(enums) if not name.startswith("driver_")}
        self.assertEqual({f"instantsnap_{name}" for name in structures}, declared)

    def test_every_field_has_an_attribute_in_the_package(self):
        for structure, kind in ((_library.CStats, Stats), (_library.CEvent, Event),
                                (_library.CJobInfo, JobInfo), (_library.CStorageDisk, StorageDisk),
                                (_library.CLoadStats, LoadStats),
                                (_library.CMemoryProgress, MemoryProgress)):
            fields = [name for name, *_ in structure._fields_ if name not in ("size", "reserved")]
            self.assertEqual([field.name for field in dataclasses.fields(kind)], fields)

    def test_events_and_phases_match_the_header(self):
        for prefix, kind in (("EVENT", EventType), ("PHASE", Phase)):
            listed = {
                name: int(number)
                for name, number in re.findall(rf"INSTANTSNAP_{prefix}_(\w+) = (\d+)", CODE)
            }
            self.assertEqual({name: member.value for name, member in kind.__members__.items()},
                             listed)

    def test_ways_of_memory_match_the_header(self):
        listed = {
            name: int(number)
            for name, number in re.findall(r"INSTANTSNAP_MEMORY_(\w+) = (\d+)", CODE)
        }
        self.assertEqual({name: member.value for name, member in Memory.__members__.items()},
                         listed)

    def test_options_match_the_header(self):
        listed = dict(re.findall(r"INSTANTSNAP_(CREATE_\w+) = 1 << (\d+)", CODE))
        self.assertEqual(listed, {"CREATE_AT_ONCE": "0"})
        self.assertEqual(_library.CREATE_AT_ONCE, 1 << 0)

    def test_flags_match_the_header(self):
        listed = {
            name: 1 << int(bit) for name, bit in re.findall(
                r"VIR_DOMAIN_SNAPSHOT_(CREATE_\w+) *=? *\(?1 << (\d+)", CODE)
        }
        self.assertEqual({name: flag.value for name, flag in Flag.__members__.items()}, listed)
        listed = {
            name: 1 << int(bit)
            for name, bit in re.findall(r"SNAPSHOT_DELETE_(\w+) = 1 << (\d+)", CODE)
        }
        self.assertEqual({name: flag.value for name, flag in DeleteFlag.__members__.items()},
                         listed)

    def test_error_codes_match_the_header(self):
        listed = {name: int(number) for name, number in re.findall(r"VIR_ERR_(\w+) = (\d+)", CODE)}
        self.assertEqual({name: code.value for name, code in ErrorCode.__members__.items()}, listed)


if __name__ == "__main__":
    unittest.main()
