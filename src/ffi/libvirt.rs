//! `instantsnap-libvirt.h`: the entry points of libvirt's qemu driver, by its own names.
//!
//! `vm` decides: ours, a client's (NULL: `client`), or a driver's own object.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr;

use super::handles::is_handle;
use super::header::{instantsnap_guest, instantsnap_snapshot};
use super::native::{self, GUESTS, SNAPSHOTS, Snapshot};
use super::{boundary, client, driver, text};
use crate::error::{Result, fail};
use crate::flags;

/// `virDomainObj`, which is libvirt's affair.
type DomainObj = c_void;

/// `qemuSnapshotCreateXML`.
///
/// # Safety
/// `xml` is NULL or NUL-terminated, `domain` NULL or libvirt's. Unless `vm` is ours or NULL, everything is as libvirt's own
/// function wants it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qemuSnapshotCreateXML(
    domain: *mut c_void,
    vm: *mut DomainObj,
    xml: *const c_char,
    flags: c_uint,
) -> *mut c_void {
    type Function = unsafe extern "C" fn(*mut c_void, *mut DomainObj, *const c_char, c_uint) -> *mut c_void;
    // SAFETY: by the caller's promise.
    if let Some(snapshot) = unsafe { driver::create(domain, vm, xml, flags) } {
        return snapshot;
    }
    if !is_ours_or_null(vm)
        && flags & flags::INSTANT == 0
        && let Some(next) = next_definition(c"qemuSnapshotCreateXML")
    {
        // SAFETY: the next definition of this symbol has libvirt's signature, and the arguments are its caller's.
        return unsafe { std::mem::transmute::<*mut c_void, Function>(next)(domain, vm, xml, flags) };
    }
    if vm.is_null() {
        // SAFETY: by the caller's promise.
        return unsafe { client::create(domain, xml, flags) };
    }
    boundary(ptr::null_mut(), || {
        check_vm(vm)?;
        if !domain.is_null() {
            fail!(InvalidArg, "domain must be NULL where vm is a guest of instantsnap_open_qmp()");
        }
        // SAFETY: by the caller's promise.
        let name = unsafe { native::create(vm.cast(), xml, flags) }?;
        Ok(SNAPSHOTS.add(Snapshot { name }))
    })
}

/// `qemuSnapshotRevert`.
///
/// # Safety
/// Unless `vm` is ours, everything is as libvirt's own function wants it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qemuSnapshotRevert(vm: *mut DomainObj, snapshot: *mut c_void, flags: c_uint) -> c_int {
    if let Some(result) = driver::revert(vm, snapshot, flags) {
        return result;
    }
    // SAFETY: by the caller's promise.
    if let Some(result) = unsafe { forward(c"qemuSnapshotRevert", vm, snapshot, flags) } {
        return result;
    }
    if vm.is_null() {
        // SAFETY: by the caller's promise.
        return unsafe { client::revert(snapshot, flags) };
    }
    boundary(-1, || {
        check_vm(vm)?;
        let name = SNAPSHOTS.get(snapshot.cast::<instantsnap_snapshot>())?;
        // SAFETY: it is NUL-terminated, and `name` holds it.
        let name = unsafe { text("snapshot", name.name.as_ptr()) }?;
        GUESTS.get(vm.cast::<instantsnap_guest>())?.load(name, flags).map(|()| 0)
    })
}

/// `qemuSnapshotDelete`.
///
/// # Safety
/// Unless `vm` is ours, everything is as libvirt's own function wants it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qemuSnapshotDelete(vm: *mut DomainObj, snapshot: *mut c_void, flags: c_uint) -> c_int {
    if let Some(result) = driver::delete(vm, snapshot, flags) {
        return result;
    }
    // SAFETY: by the caller's promise.
    if let Some(result) = unsafe { forward(c"qemuSnapshotDelete", vm, snapshot, flags) } {
        return result;
    }
    if vm.is_null() {
        // SAFETY: by the caller's promise.
        return unsafe { client::delete(snapshot, flags) };
    }
    boundary(-1, || {
        check_vm(vm)?;
        let guest = GUESTS.get(vm.cast::<instantsnap_guest>())?;
        let name = SNAPSHOTS.get(snapshot.cast::<instantsnap_snapshot>())?;
        // SAFETY: it is NUL-terminated, and `name` holds it.
        let name = unsafe { text("snapshot", name.name.as_ptr()) }?;
        guest.delete(name, flags).map(|()| 0)
    })
}

fn is_ours_or_null(vm: *mut DomainObj) -> bool {
    vm.is_null() || is_handle(vm)
}

fn check_vm(vm: *mut DomainObj) -> Result<()> {
    if !is_handle(vm) {
        fail!(
            OperationUnsupported,
            "vm is not a guest of instantsnap_open_qmp(), and no driver is registered (instantsnap_register_driver())"
        );
    }
    GUESTS.get(vm.cast::<instantsnap_guest>()).map(drop)
}

/// Revert and Delete of a driver's own object go to the driver's own function, where there is one.
///
/// # Safety
/// Unless `vm` is ours or NULL, everything is as libvirt's own function wants it.
unsafe fn forward(symbol: &CStr, vm: *mut DomainObj, snapshot: *mut c_void, flags: c_uint) -> Option<c_int> {
    type Function = unsafe extern "C" fn(*mut DomainObj, *mut c_void, c_uint) -> c_int;
    if is_ours_or_null(vm) {
        return None;
    }
    let next = next_definition(symbol)?;
    // SAFETY: the next definition of this symbol has libvirt's signature, and the arguments are its caller's.
    Some(unsafe { std::mem::transmute::<*mut c_void, Function>(next)(vm, snapshot, flags) })
}

/// The definition of a symbol that would be found if this library had none.
fn next_definition(symbol: &CStr) -> Option<*mut c_void> {
    // SAFETY: the name is NUL-terminated; dlsym only looks.
    let found = unsafe { libc::dlsym(libc::RTLD_NEXT, symbol.as_ptr()) };
    (!found.is_null()).then_some(found)
}
