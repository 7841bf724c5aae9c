//! `instantsnap-libvirt.h`: the entry points of libvirt's qemu driver, by its own names.
//!
//! `vm` decides: ours, a client's (NULL: `client`), or a driver's own object: of a driver that was
//! registered (`driver`), or of one that has these functions itself (`inside`).

use std::ffi::{c_int, c_uint, c_void};
use std::ptr::NonNull;

use super::handles::is_handle;
use super::header::{instantsnap_guest, instantsnap_snapshot};
use super::native::{self, GUESTS, SNAPSHOTS, Snapshot};
use super::{client, driver, inside, last_error};
use crate::boundary::boundary;
use crate::error::{Result, fail};
use crate::libvirt::table::{virDomain, virDomainSnapshot};
use crate::model::flags::{DeleteFlags, RevertFlags};
use crate::pointers::Text;
use crate::symbols::{Library, symbols};

/// `virDomainObj`, which is libvirt's affair; or a guest of ours.
#[allow(non_camel_case_types)]
pub type virDomainObj = c_void;

/// `qemuSnapshotCreateXML`.
///
/// # Safety
/// Unless `vm` is ours, every object is as libvirt's own function wants it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qemuSnapshotCreateXML(
    domain: *mut virDomain,
    vm: *mut virDomainObj,
    xml: Text,
    flags: c_uint,
) -> *mut virDomainSnapshot {
    boundary(last_error::set, || {
        if let Some(called) = driver::called(vm) {
            return Ok(driver::create(called, domain, xml, flags));
        }
        if let Some((vm, next)) = drivers_own(vm, |next| next.qemuSnapshotCreateXML) {
            // SAFETY: the arguments are those of a call of this very function.
            let theirs = || unsafe { next(domain, vm.as_ptr(), xml, flags) };
            return Ok(inside::create(vm, libvirts(domain), xml, flags, theirs));
        }
        if vm.is_null() {
            return Ok(client::create(libvirts(domain), xml, flags));
        }
        check_vm(vm)?;
        if !domain.is_null() {
            fail!(InvalidArg, "domain must be NULL where vm is a guest of instantsnap_open_qmp()");
        }
        let name = native::create(vm.cast(), xml, flags)?;
        Ok(SNAPSHOTS.add(Snapshot { name }))
    })
}

/// `qemuSnapshotRevert`.
///
/// # Safety
/// Unless `vm` is ours, every object is as libvirt's own function wants it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qemuSnapshotRevert(
    vm: *mut virDomainObj,
    snapshot: *mut virDomainSnapshot,
    flags: c_uint,
) -> c_int {
    boundary(last_error::set, || {
        if let Some(called) = driver::called(vm) {
            return Ok(driver::revert(called, snapshot, flags));
        }
        if let Some((vm, next)) = drivers_own(vm, |next| next.qemuSnapshotRevert) {
            // SAFETY: the arguments are those of a call of this very function.
            let theirs = || unsafe { next(vm.as_ptr(), snapshot, flags) };
            return Ok(inside::revert(vm, clients(snapshot), flags, theirs));
        }
        if vm.is_null() {
            return Ok(boundary(client::tell, || client::revert(clients(snapshot)?, flags)));
        }
        check_vm(vm)?;
        let snapshot = SNAPSHOTS.get(snapshot.cast::<instantsnap_snapshot>())?;
        let name = Text::from(&snapshot.name).required("snapshot")?;
        let guest = GUESTS.get(vm.cast::<instantsnap_guest>())?;
        guest.load(name, RevertFlags::parse(flags)?).map(|()| 0)
    })
}

/// `qemuSnapshotDelete`.
///
/// # Safety
/// Unless `vm` is ours, every object is as libvirt's own function wants it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qemuSnapshotDelete(
    vm: *mut virDomainObj,
    snapshot: *mut virDomainSnapshot,
    flags: c_uint,
) -> c_int {
    boundary(last_error::set, || {
        if let Some(called) = driver::called(vm) {
            return Ok(driver::delete(called, snapshot, flags));
        }
        if let Some((vm, next)) = drivers_own(vm, |next| next.qemuSnapshotDelete) {
            // SAFETY: the arguments are those of a call of this very function.
            let theirs = || unsafe { next(vm.as_ptr(), snapshot, flags) };
            return Ok(inside::delete(vm, clients(snapshot), flags, theirs));
        }
        if vm.is_null() {
            return Ok(boundary(client::tell, || client::delete(clients(snapshot)?, flags)));
        }
        check_vm(vm)?;
        let guest = GUESTS.get(vm.cast::<instantsnap_guest>())?;
        let snapshot = SNAPSHOTS.get(snapshot.cast::<instantsnap_snapshot>())?;
        let name = Text::from(&snapshot.name).required("snapshot")?;
        guest.delete(name, DeleteFlags::parse(flags)?).map(|()| 0)
    })
}

symbols! {
    /// The definitions that would be found if this library had none: of libvirt's driver.
    struct Next;

    unsafe extern "C" {}

    optional {
        unsafe fn qemuSnapshotCreateXML(*mut virDomain, *mut virDomainObj, Text, c_uint) -> *mut virDomainSnapshot;
        unsafe fn qemuSnapshotRevert(*mut virDomainObj, *mut virDomainSnapshot, c_uint) -> c_int;
        unsafe fn qemuSnapshotDelete(*mut virDomainObj, *mut virDomainSnapshot, c_uint) -> c_int;
    }
}

/// Where `vm` is a driver's own object, and the driver has this function itself: both.
fn drivers_own<F>(
    vm: *mut virDomainObj,
    function: impl FnOnce(Next) -> Option<F>,
) -> Option<(NonNull<virDomainObj>, F)> {
    let vm = NonNull::new(vm).filter(|vm| !is_handle(vm.as_ptr()))?;
    let next = Next::find(|name| Library::NEXT.find(name)).ok()?;
    Some((vm, function(next)?))
}

fn check_vm(vm: *mut virDomainObj) -> Result<()> {
    if !is_handle(vm) {
        fail!(
            OperationUnsupported,
            "vm is not a guest of instantsnap_open_qmp(), and no driver is registered \
             (instantsnap_register_driver())"
        );
    }
    GUESTS.get(vm.cast::<instantsnap_guest>()).map(drop)
}

/// An object of libvirt's, for the time of the call.
fn libvirts<'a, T>(object: *mut T) -> Option<&'a T> {
    // SAFETY: by the header, an object that is given with `vm` NULL, or with an object of libvirt's
    // own driver, is NULL or libvirt's, and lives for the call. Nothing of what it holds is seen
    // from here.
    if is_handle(object) { None } else { unsafe { object.as_ref() } }
}

/// A snapshot of a client's.
fn clients<'a>(snapshot: *mut virDomainSnapshot) -> Result<Option<&'a virDomainSnapshot>> {
    if is_handle(snapshot) {
        fail!(
            InvalidArg,
            "snapshot is one of instantsnap_open_qmp()'s guest: vm must be that guest"
        );
    }
    Ok(libvirts(snapshot))
}
