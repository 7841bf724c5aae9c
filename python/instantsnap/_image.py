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
class ImageNotes:
    """What the file of notes beside a memory image has: see image_index()."""
    checksums: bool     #: whether it has checksums of the pages
    index: bool         #: whether it has the places of a raw image's pages
    written_first: int  #: how many pages are known to have been written first after the instant


@dataclasses.dataclass(frozen=True)
class ImageInfo:
    """What is in a memory image."""
    format: str             #: "raw", "zstd" or "sparse"
    domain: Optional[str]   #: the name in its domain XML
    machine: Optional[str]  #: the machine type that QEMU has noted
    was_running: bool       #: whether the guest ran at the instant
    file_bytes: int         #: the length of the file
    disk_bytes: int         #: the space that the file takes on its disk
    blocks: list[MemoryBlock]
    notes: Optional[ImageNotes] = None  #: what the file of notes has; None: there is none of it


def image_info(path: StrPath) -> ImageInfo:
    """What is in a memory image, which must be complete, and raw, zstd or sparse.

    Reads all of a raw or zstd image, and of a sparse one everything but the pages of blocks of 64
    MiB and more. Raises Error: INVALID_DOMAIN_SNAPSHOT (the image is missing, incomplete,
    compressed by another program than zstd, cut off or damaged), SYSTEM_ERROR.
    """
    info = json.loads(_library.take_string(
        library().instantsnap_image_info(_library.encode(path, "path"))))
    # A later version of the library can add members.
    blocks = [_known(MemoryBlock, block) for block in info["blocks"]]
    notes = _known(ImageNotes, info["notes"]) if info.get("notes") else None
    return _known(ImageInfo, info | {"blocks": blocks, "notes": notes})


def image_verify(path: StrPath) -> None:
    """Checks a memory image as image_info() does: its header, the structure of QEMU's stream, that
    no part of it is missing, and, in a sparse image, that each memory block, its pages and its list
    of pages are where they can be. A zstd image is decompressed to its end.

    If there is a file of notes with checksums beside the image (see image_index()), reads all
    pages, and checks their content against these. If the file of notes is damaged, or is not of
    this image, that is an error too. The state of the devices is not checked. Raises Error as
    image_info() does."""
    _library.check(library().instantsnap_image_verify(_library.encode(path, "path")))


def image_index(path: StrPath) -> None:
    """Reads an image to its end, and writes down beside it, in the file of notes PATH.pages, what
    is found out of its pages: checksums for image_verify(); of a raw image, where each page is; of
    a raw or zstd image, which pages the guest wrote first after the instant.

    A snapshot that is taken with a sparse or zstd image has this file from the beginning. It goes
    with the image when the snapshot is deleted. Raises Error: INVALID_DOMAIN_SNAPSHOT (as
    image_info() does), CONFIG_UNSUPPORTED (a raw image with pages that are filled with one byte),
    SYSTEM_ERROR.
    """
    _library.check(library().instantsnap_image_index(_library.encode(path, "path"), 0))


def image_convert(path: StrPath, format: str) -> None:
    """Converts a memory image to the format "raw", "zstd" or "sparse", in place: its snapshot
    can be reverted to as before.

    The new image is written to a hidden file beside the old one, synced to disk, and takes the old
    one's name only then; if the call fails, the old one stays. The image keeps its domain XML,
    libvirt's cookie, its mode and, if this process may set it, its owner, and its file of notes
    (without places). Its snapshot must not be deleted meanwhile. An image that has the format already stays as it is.

    libvirt's own revert reads raw images, and from libvirt 10.4 on zstd ones. snapshot_revert()
    also reverts to sparse ones with libvirt 11.2 and later. It refuses what the libvirt at hand
    cannot restore.

    Blocks until all is written. Raises ValueError for another format, or Error:
    INVALID_DOMAIN_SNAPSHOT (as image_info() does), CONFIG_UNSUPPORTED (a stream that this version
    does not know), OPERATION_INVALID (the image was replaced or removed
    meanwhile), SYSTEM_ERROR.
    """
    if format not in ("raw", "zstd", "sparse"):
        raise ValueError(f"format must be 'raw', 'zstd' or 'sparse', not {format!r}")
    _library.check(library().instantsnap_image_convert(
        _library.encode(path, "path"), ImageFormat[format.upper()], 0))


def _known(kind: type, members: dict):
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in members.items() if name in names})
