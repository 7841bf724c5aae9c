# SPDX-License-Identifier: LGPL-2.1-or-later
"""Converts libvirt-python's objects for functions of the C library, and their results and errors
back.

Only this module knows libvirt-python. It imports libvirt-python when that is first needed: the
package works without it.
"""

import ctypes
from typing import TYPE_CHECKING, Any

from . import _library
from ._errors import Error, ErrorCode

if TYPE_CHECKING:
    import libvirt

_LIBVIRT = "libvirt.so.0"
#: The name that libvirt-python gives the capsule. The capsule keeps a pointer to it, so it must
#: live as long as the process.
_SNAPSHOT_CAPSULE = ctypes.create_string_buffer(b"virDomainSnapshotPtr")

# A prototype of this module's own: all modules share those of ctypes.pythonapi.
_new_capsule = ctypes.PYFUNCTYPE(
    ctypes.py_object, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi))


def binding() -> Any:
    """The module `libvirt`. Raises ImportError if it is missing or cannot be used here."""
    try:
        import libvirt
    except ImportError as error:
        raise ImportError(
            f"libvirt-python is needed for this, and cannot be imported ({error}): install "
            "Debian's python3-libvirt, or libvirt-python from PyPI", name="libvirt") from error
    _check_that_libvirt_is_shared(libvirt)
    return libvirt


def _check_that_libvirt_is_shared(libvirt: Any) -> None:
    """Raises ImportError if libvirt-python and the C library use different libvirts: a pointer of
    one would crash the other, and errors of one would not be seen in the other."""
    path = libvirt.libvirtmod.__file__
    try:
        # Both are loaded already: by libvirt-python's extension module, and by the C library.
        theirs, ours = (ctypes.cast(ctypes.CDLL(file).virDomainFree, ctypes.c_void_p).value
                        for file in (path, _LIBVIRT))
    except (OSError, AttributeError) as error:
        reason = str(error)
    else:
        if theirs == ours:
            return
        reason = f"it is not the {_LIBVIRT} that the system's loader finds"
    raise ImportError(
        f"libvirt-python ({path}) uses a libvirt that the instantsnap library cannot use with it: "
        f"{reason}", name="libvirt", path=path)


def domain_pointer(dom: "libvirt.virDomain") -> int:
    """The virDomainPtr of an object, which must outlive its use. Raises TypeError, ImportError."""
    return _pointer(dom, "virDomain", "dom")


def snapshot_pointer(snapshot: "libvirt.virDomainSnapshot") -> int:
    """The virDomainSnapshotPtr of an object, which must outlive its use. Raises TypeError,
    ImportError."""
    return _pointer(snapshot, "virDomainSnapshot", "snapshot")


def _pointer(thing: Any, kind: str, what: str) -> int:
    if not isinstance(thing, getattr(binding(), kind)):
        raise TypeError(f"{what} must be a libvirt.{kind}, not {type(thing).__name__}")
    pointer = thing.c_pointer()
    assert isinstance(pointer, int)
    return pointer


def take_snapshot(dom: "libvirt.virDomain", pointer: int) -> "libvirt.virDomainSnapshot":
    """The object for a virDomainSnapshotPtr that the C library returned, which must not be NULL.
    The object owns the reference from now on, and calls virDomainSnapshotFree() when it is
    deleted."""
    capsule = _new_capsule(pointer, ctypes.addressof(_SNAPSHOT_CAPSULE), None)
    return binding().virDomainSnapshot(dom, _obj=capsule)


def error_of(error: Error) -> "libvirt.libvirtError":
    """The same error as an exception of libvirt-python."""
    libvirt = binding()
    # The constructor takes the error that this thread has in libvirt: replaced below.
    made = libvirt.libvirtError(error.message)
    made.args = (error.message,)
    made.err = (int(error.code), error.domain, error.message, libvirt.VIR_ERR_ERROR, error.message,
                None, None, -1, -1)
    return made


def last_error(what: str) -> "libvirt.libvirtError":
    """The error of the last call. Must be called in the thread of that call, which must have had no
    error before, and before any other call. `what` names the call, for an error without a
    reason."""
    ours = _library.last_error()
    # The constructor takes the error that this thread has in libvirt.
    theirs = binding().libvirtError(f"{what} failed")
    if theirs.err is None and ours.code != ErrorCode.OK:
        return error_of(ours)  # the C library cannot set errors in this libvirt
    return theirs
