// SPDX-License-Identifier: LGPL-2.1-or-later

//! `instantsnap-libvirt.h`: the entry points of libvirt's QEMU driver, by its own names.
//!
//! `vm` tells what kind of call it is. It is a handle of ours; or NULL for a client of libvirt
//! (`client`); or an object of a driver that was registered (`driver`); or an object of a driver
//! that has these functions itself. A call of the last kind is passed on to the next definition of
//! the symbol: it arrives here only because the driver's process is linked or preloaded with this
//! library. Snapshots inside libvirt's daemon are taken by the library in `preload/`.

use std::ffi::{c_int, c_uint};
use std::ptr::NonNull;

use super::handles::is_handle;
use super::header::{instantsnap_guest, instantsnap_snapshot};
use super::native::{self, GUESTS, SNAPSHOTS, Snapshot};
use super::{client, driver, last_error};
use crate::boundary::boundary;
use crate::engine::LoadOptions;
use crate::error::{Code, Error, Result, fail};
use crate::libvirt::VirError;
use crate::libvirt::driver::{Next, virDomainObj};
use crate::libvirt::table::{self, virDomain, virDomainSnapshot};
use crate::model::flags::{self, DeleteFlags, RevertFlags};
use crate::pointers::Text;
use crate::symbols::Library;

/// `qemuSnapshotCreateXML`.
///
/// # Safety
/// Unless `vm` is a handle of ours, every object is valid for libvirt's own function.
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
            let snapshot = unsafe { next(domain, vm.as_ptr(), xml, flags) };
            if snapshot.is_null() && flags & flags::INSTANT != 0 {
                explain_refused_flag();
            }
            return Ok(snapshot);
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
/// Unless `vm` is a handle of ours, every object is valid for libvirt's own function.
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
            return Ok(unsafe { next(vm.as_ptr(), snapshot, flags) });
        }
        if vm.is_null() {
            return Ok(boundary(client::set_last_error, || {
                client::revert(clients(snapshot)?, flags)
            }));
        }
        check_vm(vm)?;
        let snapshot = SNAPSHOTS.get(snapshot.cast::<instantsnap_snapshot>())?;
        let name = Text::from(&snapshot.name).required("snapshot")?;
        let guest = GUESTS.get(vm.cast::<instantsnap_guest>())?;
        guest.load(name, RevertFlags::parse(flags)?, LoadOptions::default()).map(|_| 0)
    })
}

/// `qemuSnapshotDelete`.
///
/// # Safety
/// Unless `vm` is a handle of ours, every object is valid for libvirt's own function.
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
            return Ok(unsafe { next(vm.as_ptr(), snapshot, flags) });
        }
        if vm.is_null() {
            return Ok(boundary(client::set_last_error, || {
                client::delete(clients(snapshot)?, flags)
            }));
        }
        check_vm(vm)?;
        let guest = GUESTS.get(vm.cast::<instantsnap_guest>())?;
        let snapshot = SNAPSHOTS.get(snapshot.cast::<instantsnap_snapshot>())?;
        let name = Text::from(&snapshot.name).required("snapshot")?;
        guest.delete(name, DeleteFlags::parse(flags)?).map(|()| 0)
    })
}

/// `vm` and the driver's own function, if `vm` is a driver's object and the driver has the
/// function.
fn drivers_own<F>(
    vm: *mut virDomainObj,
    function: impl FnOnce(Next) -> Option<F>,
) -> Option<(NonNull<virDomainObj>, F)> {
    let vm = NonNull::new(vm).filter(|vm| !is_handle(vm.as_ptr()))?;
    let next = Next::find(|name| Library::NEXT.find(name)).ok()?;
    Some((vm, function(next)?))
}

/// Adds an explanation to this thread's last error, if it is the driver's refusal of the flag
/// INSTANT: the daemon needs another library.
fn explain_refused_flag() {
    let Ok(table) = table::table() else { return };
    let error = VirError::last(table);
    // libvirt's message contains the bit in every language.
    if error.is(Code::InvalidArg) && error.message.contains(&format!("{:#x}", flags::INSTANT)) {
        let message = format!(
            "instant snapshots inside libvirt's daemon are taken by libinstantsnap-preload.so, and \
             not by libinstantsnap.so.0: start the daemon with \
             LD_PRELOAD=/path/to/libinstantsnap-preload.so (instantsnap daemon enable): {}",
            error.message
        );
        client::set_last_error(Error::new(Code::InvalidArg, message));
    }
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

/// A reference to an object of libvirt's, for the time of the call; none if it is NULL or a handle.
fn libvirts<'a, T>(object: *mut T) -> Option<&'a T> {
    // SAFETY: by the header, an object that is passed with `vm` NULL, or with an object of
    // libvirt's own driver, is NULL or libvirt's, and lives for the call. Its type is opaque here.
    if is_handle(object) { None } else { unsafe { object.as_ref() } }
}

/// The snapshot that a client of libvirt has passed.
fn clients<'a>(snapshot: *mut virDomainSnapshot) -> Result<Option<&'a virDomainSnapshot>> {
    if is_handle(snapshot) {
        fail!(
            InvalidArg,
            "snapshot is one of instantsnap_open_qmp()'s guest: vm must be that guest"
        );
    }
    Ok(libvirts(snapshot))
}
