# SPDX-License-Identifier: LGPL-2.1-or-later
"""libvirt-python's objects and errors, for functions of the C library and from them.

The only place that knows libvirt-python. It is imported when it is first needed: the package works
without it.
"""

import ctypes
from typing import TYPE_CHECKING, Any

from . import _library
from ._errors import Error, ErrorCode

if TYPE_CHECKING:
    import libvirt

_LIBVIRT = "libvirt.so.0"
#: As libvirt-python names it. A capsule keeps the pointer, so this lives as long as the process.
_SNAPSHOT_CAPSULE = ctypes.create_string_buffer(b"virDomainSnapshotPtr")

# Prototypes of our own: those of ctypes.pythonapi are everybody's.
_new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi))


def binding() -> Any:
    """The module `libvirt`. Raises ImportError where it is missing, or of no use here."""
    try:
        import libvirt
    except ImportError as error:
        raise ImportError(
            f"libvirt-python is needed for this, and cannot be imported ({error}): install Debian's python3-libvirt, "
            "or libvirt-python from PyPI", name="libvirt") from error
    _check_that_libvirt_is_shared(libvirt)
    return libvirt


def _check_that_libvirt_is_shared(libvirt: Any) -> None:
    """A pointer of one libvirt would crash another; and its errors would never be seen."""
    path = libvirt.libvirtmod.__file__
    try:
        # Both are loaded already: by libvirt-python's extension module, and as the C library loads
        # it.
        theirs, ours = (ctypes.cast(ctypes.CDLL(file).virDomainFree, ctypes.c_void_p).value
                        for file in (path, _LIBVIRT))
    except (OSError, AttributeError) as error:
        reason = str(error)
    else:
        if theirs == ours:
            return
        reason = f"it is not the {_LIBVIRT} that the system's loader finds"
    raise ImportError(f"libvirt-python ({path}) uses a libvirt that the instantsnap library cannot use with it: "
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
    """The object for a virDomainSnapshotPtr that the library gave us. The reference is the object's
    from now on, which calls virDomainSnapshotFree() at its end. The pointer may not be NULL."""
    capsule = _new_capsule(pointer, ctypes.addressof(_SNAPSHOT_CAPSULE), None)
    return binding().virDomainSnapshot(dom, _obj=capsule)


def error_of(error: Error) -> "libvirt.libvirtError":
    """The same error as libvirt-python's."""
    libvirt = binding()
    made = libvirt.libvirtError(error.message)  # whatever error this thread has in libvirt is taken, and replaced
    made.args = (error.message,)
    made.err = (int(error.code), error.domain, error.message, libvirt.VIR_ERR_ERROR, error.message, None, None, -1, -1)
    return made


def last_error(what: str) -> "libvirt.libvirtError":
    """Why the last call failed: to be called in the thread of that call, one that had no error
    before, and before any other call. `what` has failed, for where nobody says why."""
    ours = _library.last_error()
    theirs = binding().libvirtError(f"{what} failed")  # it takes the error that this thread has in libvirt
    if theirs.err is None and ours.code != ErrorCode.OK:
        return error_of(ours)  # this libvirt does not let its error be set
    return theirs
