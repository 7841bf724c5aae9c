# SPDX-License-Identifier: LGPL-2.1-or-later
"""How the memory of a snapshot comes back."""

import dataclasses
import enum
from typing import Union

from . import _library
from ._errors import known


class Memory(enum.IntEnum):
    """How the memory of a snapshot comes back. Functions take the names, too: "auto", "full",
    "lazy", "map"."""
    #: MAP if QEMU was started with the snapshot's memory image mapped, else FULL; LoadStats.memory
    #: says which it was. The library never falls back from one way to another.
    AUTO = 0
    #: all of it is written to QEMU before the guest runs: seconds for each few GiB
    FULL = 1
    #: the load returns when the guest runs, and the memory follows: a page when the guest needs it,
    #: and all others in between. Needs a sparse image and anonymous memory
    LAZY = 2
    #: QEMU (8.2 or later) was started with the memory backends of the plan, so that the guest's RAM
    #: is the memory image, which must be sparse: the guest runs within milliseconds, and clones
    #: share what they do not write. They need the image as long as they run. docs/clones.md says
    #: more.
    MAP = 3


@dataclasses.dataclass(frozen=True)
class LoadStats:
    """What a load did. Times are whole microseconds; the first three follow each other without
    gaps, and total_us is their sum."""
    check_us: int               #: checks, before QEMU is told to load
    load_us: int                #: until QEMU has loaded the snapshot
    finish_us: int              #: until the guest runs, if it is to, and the snapshot is current
    total_us: int               #: the whole call
    memory: Union[Memory, int]  #: how memory came, never AUTO; an int for an unknown way
    running: bool               #: whether the guest runs; else it is paused


@dataclasses.dataclass(frozen=True)
class MemoryProgress:
    """How far the memory of a guest is that was loaded with "lazy"."""
    bytes_in: int     #: the bytes of pages that are not zero and are in; 0: not known
    bytes_total: int  #: all bytes of such pages; 0: not known, or nothing comes
    coming: bool      #: whether memory is still to come


def memory_of(memory: Union[str, Memory]) -> Memory:
    """The way with this name. Raises ValueError."""
    if isinstance(memory, Memory):
        return memory
    for known_memory in Memory:
        if known_memory.name.lower() == memory:
            return known_memory
    raise ValueError(f"memory must be 'auto', 'full', 'lazy' or 'map', not {memory!r}")


def load_stats_of(stats: _library.CLoadStats) -> LoadStats:
    """The statistics that the library has filled."""
    return LoadStats(
        check_us=stats.check_us,
        load_us=stats.load_us,
        finish_us=stats.finish_us,
        total_us=stats.total_us,
        memory=known(Memory, stats.memory),
        running=bool(stats.running))
