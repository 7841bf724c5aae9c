# SPDX-License-Identifier: LGPL-2.1-or-later
"""Snapshots of the domains of a stock libvirt, with libvirt-python's own objects and errors."""

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Optional

from . import _binding, _library
from ._errors import Error
from ._events import OnEvent
from ._guest import Flag, Guest, checked_flags
from ._interrupt import interruptible
from ._library import library

if TYPE_CHECKING:
    import libvirt


def snapshot_create_xml(
        dom: "libvirt.virDomain", xml: str, flags: int = Flag.CREATE_LIVE | Flag.CREATE_INSTANT, *,
        on_event: Optional[OnEvent] = None,
        progress_interval: Optional[float] = None,
        image_format: Optional[str] = None,
        zstd_level: Optional[int] = None) -> "libvirt.virDomainSnapshot":
    """Takes a snapshot of a libvirt domain, like dom.snapshotCreateXML(), but also with
    Flag.CREATE_INSTANT.

    dom: a libvirt.virDomain of a connection to libvirt's QEMU driver on this machine.
    xml: libvirt's `<domainsnapshot>`. With CREATE_INSTANT it must name a file for the memory:
        `<domainsnapshot><memory snapshot='external' file='/PATH'/></domainsnapshot>`.
    flags: Flags, libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_*, or both combined. Without CREATE_INSTANT the
        call goes unchanged to libvirt.
    on_event, progress_interval, image_format, zstd_level: as for Guest.snapshot(). Only with
        CREATE_INSTANT and without CREATE_NO_METADATA. libvirt before 11.2 cannot restore "sparse",
        and before 10.4, or without the program zstd, "zstd": CONFIG_UNSUPPORTED.

    Returns libvirt's own snapshot, a libvirt.virDomainSnapshot with all its methods.

    Blocks until the snapshot is complete and on disk: seconds for a guest of some GiB; other
    threads go on. KeyboardInterrupt, or any other exception of a signal handler, cancels a snapshot
    with CREATE_INSTANT, unless it also has CREATE_NO_METADATA: everything is undone, then the
    exception goes on. Otherwise the exception goes on when the call has ended. (A snapshot that was
    complete already stays.)

    Raises libvirt.libvirtError, with get_error_code(), get_error_domain() (libvirt.VIR_FROM_QEMU)
    and get_error_message(), and with the domain as it was before the call: see Guest.snapshot().
    (libvirt.virGetLastError() does not have the error, because another thread did the work.) Also
    raises TypeError (not a libvirt.virDomain), ValueError (a NUL character; flags that are not a
    32-bit number; on_event with flags that have no events), ImportError (no libvirt-python),
    LibraryNotFound, and what on_event raises.
    """
    domain, text = _binding.domain_pointer(dom), _library.encode(xml, "xml")
    bits = checked_flags(flags)
    if bits & Flag.CREATE_INSTANT and not bits & Flag.CREATE_NO_METADATA:
        try:
            with Guest.open_libvirt(dom) as guest:
                name = guest.snapshot(
                    xml, flags=bits, on_event=on_event, progress_interval=progress_interval,
                    image_format=image_format, zstd_level=zstd_level)
        except Error as error:
            raise _binding.error_of(error) from None
        return dom.snapshotLookupByName(name)
    if on_event is not None or image_format is not None:
        raise ValueError(
            "on_event and image_format are for snapshots with CREATE_INSTANT and without "
            "CREATE_NO_METADATA")

    def create() -> "libvirt.virDomainSnapshot":
        # None instead of a driver's domain object, because this process is a client.
        pointer = library().qemuSnapshotCreateXML(domain, None, text, bits)
        if not pointer:
            raise _binding.last_error("qemuSnapshotCreateXML()")
        return _binding.take_snapshot(dom, pointer)

    return interruptible(create, _nothing)


def snapshot_revert(snapshot: "libvirt.virDomainSnapshot", flags: int = 0) -> None:
    """Reverts a domain to one of its snapshots, however that was taken, like
    dom.revertToSnapshot(snapshot, flags). qemuSnapshotRevert() in instantsnap-libvirt.h says what
    is done if this libvirt cannot do it.

    flags: libvirt.VIR_DOMAIN_SNAPSHOT_REVERT_*.

    Blocks until the domain is reverted: seconds for a guest of some GiB; other threads go on. If a
    signal handler raises an exception meanwhile, for example KeyboardInterrupt, it goes on
    afterwards. Raises libvirt.libvirtError, TypeError (not a libvirt.virDomainSnapshot), ValueError
    (flags that are not a 32-bit number), ImportError (no libvirt-python), LibraryNotFound.
    """
    _change(snapshot, "qemuSnapshotRevert", flags)


def snapshot_delete(snapshot: "libvirt.virDomainSnapshot", flags: int = 0) -> None:
    """Deletes a snapshot, like snapshot.delete(flags). qemuSnapshotDelete() in
    instantsnap-libvirt.h says what is done if this libvirt cannot do it. The object stays, with its
    name.

    flags: libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_*.

    Blocks until the snapshot is deleted, which can include merging its disks. Signals and
    exceptions are as for snapshot_revert().
    """
    _change(snapshot, "qemuSnapshotDelete", flags)


def _change(snapshot: "libvirt.virDomainSnapshot", function: str, flags: int) -> None:
    pointer, bits = _binding.snapshot_pointer(snapshot), checked_flags(flags)

    def change() -> None:
        if getattr(library(), function)(None, pointer, bits) < 0:
            raise _binding.last_error(f"{function}()")

    interruptible(change, _nothing)


def _nothing() -> None:
    """The `cancel` of an operation that cannot be cancelled: interruptible() waits for its end."""
