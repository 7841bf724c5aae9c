# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memory images: what is in them, whether they are whole, and other formats."""

import dataclasses
import json
from typing import Optional

from . import _library
from ._events import ImageFormat
from ._library import StrPath, library


@dataclasses.dataclass(frozen=True)
class MemoryBlock:
    """A memory block of the guest."""
    name: str        #: QEMU's name of it, such as "pc.ram"
    bytes: int       #: its size
    data_pages: int  #: how many of its pages of 4096 bytes are not all zeros
    zero_pages: int  #: how many are


@dataclasses.dataclass(frozen=True)
class ImageInfo:
    """What is in a memory image."""
    format: str             #: "raw" or "sparse"
    domain: Optional[str]   #: the name in its domain XML
    machine: Optional[str]  #: the machine type that QEMU has noted
    was_running: bool       #: whether the guest ran at the instant
    file_bytes: int         #: the length of the file
    disk_bytes: int         #: the space that the file takes on its disk
    blocks: list[MemoryBlock]


def image_info(path: StrPath) -> ImageInfo:
    """What is in a memory image, which must be complete, and raw or sparse.

    Reads all of a raw image, and of a sparse one everything but the pages of blocks of 64 MiB and
    more. Raises Error: INVALID_DOMAIN_SNAPSHOT (the image is missing, incomplete, compressed, cut
    off or damaged), SYSTEM_ERROR.
    """
    info = json.loads(_library.take_string(
        library().instantsnap_image_info(_library.encode(path, "path"))))
    # A later version of the library can add members.
    blocks = [_known(MemoryBlock, block) for block in info["blocks"]]
    return _known(ImageInfo, info | {"blocks": blocks})


def image_verify(path: StrPath) -> None:
    """Checks a memory image as image_info() does: its header, the structure of QEMU's stream, that
    no part of it is missing, and, in a sparse image, that each memory block, its pages and its list
    of pages are where they can be. The content of the pages and the state of the devices are not
    checked. Raises Error as image_info() does."""
    _library.check(library().instantsnap_image_verify(_library.encode(path, "path")))


def image_convert(path: StrPath, format: str) -> None:
    """Converts a memory image to the format "raw" or "sparse", in place: its snapshot can be
    reverted to as before.

    The new image is written to a hidden file beside the old one, synced to disk, and takes the old
    one's name only then; if the call fails, the old one stays. The image keeps its domain XML,
    libvirt's cookie, its mode and, if this process may set it, its owner. Its snapshot must not be
    deleted meanwhile. An image that has the format already stays as it is.

    libvirt's own revert reads raw images only. snapshot_revert() reverts to sparse ones with
    libvirt 11.2 and later, and refuses them with an older one.

    Blocks until all is written. Raises ValueError for another format, or Error:
    INVALID_DOMAIN_SNAPSHOT (as image_info() does), CONFIG_UNSUPPORTED (a raw image with a stream
    that this version does not know), OPERATION_INVALID (the image was replaced or removed
    meanwhile), SYSTEM_ERROR.
    """
    if format not in ("raw", "sparse"):
        raise ValueError(f"format must be 'raw' or 'sparse', not {format!r}")
    _library.check(library().instantsnap_image_convert(
        _library.encode(path, "path"), ImageFormat[format.upper()], 0))


def _known(kind: type, members: dict):
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in members.items() if name in names})
