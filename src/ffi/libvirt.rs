//! `instantsnap-libvirt.h`: the entry points of libvirt's qemu driver, by its own names.
//!
//! `vm` decides: ours, a client's (NULL: `client`), or a driver's own object: of a driver that was registered (`driver`), or of
//! one that has these functions itself (`inside`).

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr::{self, NonNull};

use super::handles::is_handle;
use super::header::{instantsnap_guest, instantsnap_snapshot};
use super::native::{self, GUESTS, SNAPSHOTS, Snapshot};
use super::{boundary, client, driver, inside, text};
use crate::error::{Result, fail};
use crate::uncancelled::Uncancelled;

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
    let _uncancelled = Uncancelled::enter();
    // SAFETY: by the caller's promise.
    if let Some(snapshot) = unsafe { driver::create(domain, vm, xml, flags) } {
        return snapshot;
    }
    if let Some((vm, next)) = drivers_own(vm, c"qemuSnapshotCreateXML") {
        // SAFETY: the next definition of this symbol has libvirt's signature, and the arguments are its caller's.
        return unsafe {
            inside::create(domain, vm, xml, flags, std::mem::transmute::<*mut c_void, inside::Create>(next))
        };
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
    let _uncancelled = Uncancelled::enter();
    if let Some(result) = driver::revert(vm, snapshot, flags) {
        return result;
    }
    if let Some((vm, next)) = drivers_own(vm, c"qemuSnapshotRevert") {
        // SAFETY: the next definition of this symbol has libvirt's signature, and the arguments are its caller's.
        return unsafe {
            inside::revert(vm, snapshot, flags, std::mem::transmute::<*mut c_void, inside::OnSnapshot>(next))
        };
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
    let _uncancelled = Uncancelled::enter();
    if let Some(result) = driver::delete(vm, snapshot, flags) {
        return result;
    }
    if let Some((vm, next)) = drivers_own(vm, c"qemuSnapshotDelete") {
        // SAFETY: the next definition of this symbol has libvirt's signature, and the arguments are its caller's.
        return unsafe {
            inside::delete(vm, snapshot, flags, std::mem::transmute::<*mut c_void, inside::OnSnapshot>(next))
        };
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

fn check_vm(vm: *mut DomainObj) -> Result<()> {
    if !is_handle(vm) {
        fail!(
            OperationUnsupported,
            "vm is not a guest of instantsnap_open_qmp(), and no driver is registered (instantsnap_register_driver())"
        );
    }
    GUESTS.get(vm.cast::<instantsnap_guest>()).map(drop)
}

/// Where `vm` is a driver's own object, and the driver has this function itself: both.
fn drivers_own(vm: *mut DomainObj, symbol: &CStr) -> Option<(NonNull<DomainObj>, *mut c_void)> {
    let vm = NonNull::new(vm).filter(|vm| !is_handle(vm.as_ptr()))?;
    Some((vm, next_definition(symbol)?))
}

/// The definition of a symbol that would be found if this library had none.
fn next_definition(symbol: &CStr) -> Option<*mut c_void> {
    // SAFETY: the name is NUL-terminated; dlsym only looks.
    let found = unsafe { libc::dlsym(libc::RTLD_NEXT, symbol.as_ptr()) };
    (!found.is_null()).then_some(found)
}
