# SPDX-License-Identifier: LGPL-2.1-or-later
"""The C library: finds it, declares its functions, and converts its strings and errors to Python's.

This module does not know snapshots. FUNCTIONS has every function of instantsnap.h once,
LIBVIRT_FUNCTIONS every function of instantsnap-libvirt.h.
"""

import ctypes
import os
import threading
from ctypes import (CFUNCTYPE, POINTER, Structure, c_char_p, c_int, c_int32, c_size_t, c_uint,
                    c_uint32, c_uint64, c_void_p)
from pathlib import Path
from typing import Any, Optional, Union

from ._errors import Error, LibraryNotFound, error_of

ENVIRONMENT = "INSTANTSNAP_LIBRARY"
SONAME = "libinstantsnap.so.0"

StrPath = Union[str, "os.PathLike[str]"]


class CError(Structure):
    """instantsnap_error"""
    _fields_ = [("code", c_int),
                ("domain", c_int),
                ("message", c_char_p)]


class CStats(Structure):
    """instantsnap_stats"""
    _fields_ = [("size", c_size_t),
                ("validate_us", c_uint64),
                ("plan_us", c_uint64),
                ("prepare_us", c_uint64),
                ("pause_us", c_uint64),
                ("switch_us", c_uint64),
                ("arm_us", c_uint64),
                ("drain_us", c_uint64),
                ("finish_us", c_uint64),
                ("undo_us", c_uint64),
                ("total_us", c_uint64),
                ("instant_us", c_uint64),
                ("guest_paused_us", c_uint64),
                ("memory_image_bytes", c_uint64),
                ("pause_from_events", c_uint32),
                ("disks", c_uint32),
                ("setup_us", c_uint64),
                ("lost_pause_us", c_uint64),
                ("lost_tries", c_uint32),
                ("overlapped", c_uint32),
                ("watchdog", c_uint32),
                ("image_format", c_uint32)]


class CEvent(Structure):
    """instantsnap_event"""
    _fields_ = [("size", c_size_t),
                ("type", c_uint32),
                ("error_code", c_int32),
                ("time_us", c_uint64),
                ("paused_us", c_uint64),
                ("bytes_done", c_uint64),
                ("bytes_total", c_uint64),
                ("bytes_per_second", c_uint64),
                ("pages_left", c_uint64)]


class CJobInfo(Structure):
    """instantsnap_job_info"""
    _fields_ = [("size", c_size_t),
                ("phase", c_uint32),
                ("instant", c_uint32),
                ("elapsed_us", c_uint64),
                ("paused_us", c_uint64),
                ("bytes_done", c_uint64),
                ("bytes_total", c_uint64),
                ("bytes_per_second", c_uint64),
                ("pages_left", c_uint64)]


#: instantsnap_event_callback. Keep an instance as long as the library may call it.
EventCallback = CFUNCTYPE(None, POINTER(CEvent), c_void_p)


class CCreateOptions(Structure):
    """instantsnap_create_options"""
    _fields_ = [("size", c_size_t),
                ("callback", EventCallback),
                ("opaque", c_void_p),
                ("progress_interval_ms", c_uint32),
                ("flags", c_uint32),
                ("image_format", c_uint32),
                ("zstd_level", c_uint32)]


CREATE_AT_ONCE = 1 << 0


class CStorageDisk(Structure):
    """instantsnap_storage_disk"""
    _fields_ = [("size", c_size_t),
                ("name", c_char_p),
                ("source", c_char_p),
                ("format", c_char_p)]


class CStorageCall(Structure):
    """instantsnap_storage_call"""
    _fields_ = [("size", c_size_t),
                ("snapshot", c_char_p),
                ("disks", POINTER(POINTER(CStorageDisk))),
                ("disk_count", c_size_t),
                ("paused_us", c_uint64),
                ("deadline_us", c_uint64)]


#: The callbacks of instantsnap_storage_hook. Keep instances as long as the library may call them.
StorageSnapshot = CFUNCTYPE(c_int, POINTER(CStorageCall), c_void_p)
StorageUndo = CFUNCTYPE(None, POINTER(CStorageCall), c_void_p)
StorageRevert = CFUNCTYPE(c_int, POINTER(CStorageCall), POINTER(c_void_p), c_void_p)


class CStorageHook(Structure):
    """instantsnap_storage_hook"""
    _fields_ = [("size", c_size_t),
                ("opaque", c_void_p),
                ("snapshot", StorageSnapshot),
                ("undo", StorageUndo),
                ("revert", StorageRevert),
                ("deadline_ms", c_uint32),
                ("reserved", c_uint32)]


class CRevertOptions(Structure):
    """instantsnap_revert_options"""
    _fields_ = [("size", c_size_t),
                ("directory", c_char_p),
                ("hook", POINTER(CStorageHook)),
                ("memory", c_uint32),
                ("reserved", c_uint32)]


class CLoadOptions(Structure):
    """instantsnap_load_options"""
    _fields_ = [("size", c_size_t),
                ("memory", c_uint32),
                ("reserved", c_uint32),
                ("bandwidth", c_uint64)]


class CMemoryProgress(Structure):
    """instantsnap_memory_progress"""
    _fields_ = [("size", c_size_t),
                ("bytes_in", c_uint64),
                ("bytes_total", c_uint64),
                ("coming", c_uint32),
                ("reserved", c_uint32)]


class CLoadStats(Structure):
    """instantsnap_load_stats"""
    _fields_ = [("size", c_size_t),
                ("check_us", c_uint64),
                ("load_us", c_uint64),
                ("finish_us", c_uint64),
                ("total_us", c_uint64),
                ("memory", c_uint32),
                ("running", c_uint32)]


class CMemoryBackend(Structure):
    """instantsnap_memory_backend"""
    _fields_ = [("size", c_size_t),
                ("id", c_char_p),
                ("file", c_char_p),
                ("offset", c_uint64),
                ("length", c_uint64),
                ("object", c_char_p)]


class CRevertDisk(Structure):
    """instantsnap_revert_disk"""
    _fields_ = [("size", c_size_t),
                ("name", c_char_p),
                ("file", c_char_p),
                ("format", c_char_p),
                ("backing_file", c_char_p)]


# Handles are c_void_p. So are strings that the caller has to free: ctypes converts a c_char_p
# result to bytes and drops the pointer, which is right for borrowed strings only.
_GUEST = _JOB = _PLAN = _SNAPSHOT = _OWNED_STRING = c_void_p
# libvirt's virDomainPtr and virDomainSnapshotPtr, and its driver's virDomainObj *.
_VIR_DOMAIN = _VIR_SNAPSHOT = _DOMAIN_OBJECT = c_void_p

#: name -> (result, parameters), in the order of the header.
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "instantsnap_version": (c_char_p, []),
    "instantsnap_last_error": (POINTER(CError), []),
    "instantsnap_free_string": (None, [_OWNED_STRING]),
    "instantsnap_free_string_list": (None, [c_void_p]),
    "instantsnap_open_qmp": (_GUEST, [c_char_p, c_char_p, c_char_p]),
    "instantsnap_open_libvirt": (_GUEST, [_VIR_DOMAIN]),
    "instantsnap_close": (None, [_GUEST]),
    "instantsnap_set_pause_limit": (c_int, [_GUEST, c_uint]),
    "instantsnap_set_overlap_tries": (c_int, [_GUEST, c_uint]),
    "instantsnap_set_watchdog_required": (c_int, [_GUEST, c_uint]),
    "instantsnap_set_storage_hook": (c_int, [_GUEST, POINTER(CStorageHook)]),
    "instantsnap_snapshot_create_xml": (c_int, [_GUEST, c_char_p, c_uint, POINTER(_OWNED_STRING)]),
    "instantsnap_snapshot_create": (
        c_int, [_GUEST, c_char_p, c_uint, POINTER(CCreateOptions), POINTER(_OWNED_STRING)]),
    "instantsnap_snapshot_create_start": (
        _JOB, [_GUEST, c_char_p, c_uint, POINTER(CCreateOptions)]),
    "instantsnap_job_wait": (c_int, [_JOB, c_int]),
    "instantsnap_job_get_fd": (c_int, [_JOB]),
    "instantsnap_job_next_event": (c_int, [_JOB, POINTER(CEvent)]),
    "instantsnap_job_get_info": (c_int, [_JOB, POINTER(CJobInfo)]),
    "instantsnap_job_get_result": (c_int, [_JOB]),
    "instantsnap_job_get_name": (_OWNED_STRING, [_JOB]),
    "instantsnap_job_get_xml": (_OWNED_STRING, [_JOB]),
    "instantsnap_job_get_stats": (c_int, [_JOB, POINTER(CStats)]),
    "instantsnap_job_cancel": (c_int, [_JOB]),
    "instantsnap_job_free": (None, [_JOB]),
    "instantsnap_snapshot_cancel": (c_int, [_GUEST]),
    "instantsnap_get_stats": (c_int, [_GUEST, POINTER(CStats)]),
    "instantsnap_snapshot_list": (c_int, [_GUEST, POINTER(c_void_p)]),
    "instantsnap_snapshot_get_xml": (_OWNED_STRING, [_GUEST, c_char_p]),
    "instantsnap_snapshot_current": (_OWNED_STRING, [_GUEST]),
    "instantsnap_snapshot_prepare_revert": (_PLAN, [c_char_p, c_char_p, c_char_p]),
    "instantsnap_snapshot_prepare_revert_hooked": (
        _PLAN, [c_char_p, c_char_p, c_char_p, POINTER(CStorageHook)]),
    "instantsnap_snapshot_prepare_revert_with": (
        _PLAN, [c_char_p, c_char_p, POINTER(CRevertOptions)]),
    "instantsnap_revert_plan_disk_count": (c_size_t, [_PLAN]),
    "instantsnap_revert_plan_get_disk": (c_int, [_PLAN, c_size_t, POINTER(CRevertDisk)]),
    "instantsnap_revert_plan_memory_backend_count": (c_size_t, [_PLAN]),
    "instantsnap_revert_plan_get_memory_backend": (
        c_int, [_PLAN, c_size_t, POINTER(CMemoryBackend)]),
    "instantsnap_revert_plan_memory_file": (c_char_p, [_PLAN]),
    "instantsnap_revert_plan_domain_xml": (c_char_p, [_PLAN]),
    "instantsnap_revert_plan_free": (None, [_PLAN]),
    "instantsnap_snapshot_load": (c_int, [_GUEST, c_char_p, c_uint]),
    "instantsnap_snapshot_load_with": (
        c_int, [_GUEST, c_char_p, c_uint, POINTER(CLoadOptions), POINTER(CLoadStats)]),
    "instantsnap_memory_get_progress": (c_int, [_GUEST, POINTER(CMemoryProgress)]),
    "instantsnap_memory_wait": (c_int, [_GUEST, c_int]),
    "instantsnap_snapshot_delete": (c_int, [_GUEST, c_char_p, c_uint]),
    "instantsnap_image_info": (_OWNED_STRING, [c_char_p]),
    "instantsnap_image_verify": (c_int, [c_char_p]),
    "instantsnap_image_convert": (c_int, [c_char_p, c_uint, c_uint]),
    "instantsnap_image_index": (c_int, [c_char_p, c_uint]),
    "instantsnap_recover": (c_int, [_GUEST, POINTER(_OWNED_STRING)]),
    "instantsnap_recover_offline": (c_int, [c_char_p, POINTER(_OWNED_STRING)]),
    "instantsnap_doctor": (c_int, [_GUEST, POINTER(_OWNED_STRING)]),
    "instantsnap_snapshot_get_name": (c_char_p, [_SNAPSHOT]),
    "instantsnap_snapshot_free": (None, [_SNAPSHOT]),
}

LIBVIRT_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "qemuSnapshotCreateXML": (_VIR_SNAPSHOT, [_VIR_DOMAIN, _DOMAIN_OBJECT, c_char_p, c_uint]),
    "qemuSnapshotRevert": (c_int, [_DOMAIN_OBJECT, _VIR_SNAPSHOT, c_uint]),
    "qemuSnapshotDelete": (c_int, [_DOMAIN_OBJECT, _VIR_SNAPSHOT, c_uint]),
}

_lock = threading.Lock()
_loaded: Optional[ctypes.CDLL] = None


def library() -> ctypes.CDLL:
    """The C library, loaded at the first call. Raises LibraryNotFound."""
    global _loaded
    with _lock:
        if _loaded is None:
            _loaded = _load()
        return _loaded


def _load() -> ctypes.CDLL:
    tried = []
    for candidate in _candidates():
        try:
            found = ctypes.CDLL(candidate)
        except OSError as error:
            tried.append(str(error))
            continue
        _declare(found, candidate)
        return found
    raise LibraryNotFound(
        f"the instantsnap library was not found: {'; '.join(tried)}. Install {SONAME} where the "
        f"system's loader finds it, or set {ENVIRONMENT} to its path", name="libinstantsnap")


def _candidates() -> list[str]:
    named = os.environ.get(ENVIRONMENT)
    if named:
        return [named]  # only this file: never silently another one
    here = Path(__file__).resolve().parent
    beside = [str(here / name) for name in ("libinstantsnap.so", SONAME)]
    return [path for path in beside if os.path.exists(path)] + [SONAME]


def _declare(found: ctypes.CDLL, path: str) -> None:
    for name, (result, parameters) in (FUNCTIONS | LIBVIRT_FUNCTIONS).items():
        try:
            function = getattr(found, name)
        except AttributeError:
            raise LibraryNotFound(
                f"{path} has no function {name}: it is not the instantsnap library, or an older "
                "one than this package needs", name="libinstantsnap", path=path) from None
        function.restype = result
        function.argtypes = parameters


def last_error() -> Error:
    """The error of the last call. Must be called in the thread of that call, before any other
    call."""
    error = library().instantsnap_last_error().contents
    return error_of(error.code, error.domain, (error.message or b"").decode("utf-8", "replace"))


def check(result: int) -> int:
    """The result of a call. Raises its Error if the result is -1: see last_error()."""
    if result < 0:
        raise last_error()
    return result


def encode(text: StrPath, what: str) -> bytes:
    """A string or path argument as UTF-8. Raises ValueError for a NUL, at which C would cut it
    off."""
    encoded = os.fspath(text).encode("utf-8", "surrogateescape")
    if b"\0" in encoded:
        raise ValueError(f"{what} contains a NUL character")
    return encoded


def encode_optional(text: Optional[StrPath], what: str) -> Optional[bytes]:
    """Like encode(); None stays None."""
    return None if text is None else encode(text, what)


def decode(text: bytes) -> str:
    """A string from the library. Bytes of a path that are not UTF-8 survive a later encode()."""
    return text.decode("utf-8", "surrogateescape")


def take_string(pointer: Optional[int]) -> str:
    """The text of a string that the library returned; frees the string. Raises the Error if the
    string is NULL: see last_error()."""
    if not pointer:
        raise last_error()
    try:
        return decode(ctypes.string_at(pointer))
    finally:
        library().instantsnap_free_string(pointer)


def take_string_list(pointer: Optional[int]) -> list[str]:
    """The texts of a NULL-terminated list that the library returned; frees the list."""
    if not pointer:
        return []
    texts: list[str] = []
    try:
        strings = ctypes.cast(pointer, POINTER(c_char_p))
        while (text := strings[len(texts)]) is not None:
            texts.append(decode(text))
    finally:
        library().instantsnap_free_string_list(pointer)
    return texts
