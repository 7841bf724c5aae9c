// SPDX-License-Identifier: LGPL-2.1-or-later

//! The library for `LD_PRELOAD=/…/libinstantsnap-preload.so`: instant snapshots for programs that
//! know only libvirt, and for all clients of libvirt's daemon.
//!
//! The library intercepts functions of libvirt's, and passes on every call that it does not handle
//! itself:
//!
//! * `virDomainSnapshotCreateXML`, `virDomainRevertToSnapshot` and `virDomainSnapshotDelete`, the
//!   public functions of `libvirt.so.0`. In a client, the library handles some of their calls
//!   ([`client`]). In the daemon, whose dispatcher calls the first of them for a client, the
//!   INSTANT flag is removed and noted ([`daemon::dispatcher`]).
//! * `qemuSnapshotCreateXML`, `qemuSnapshotRevert` and `qemuSnapshotDelete`, which libvirt's QEMU
//!   driver calls by the symbol. In the daemon, the library handles some of these calls
//!   ([`daemon`]). In any other process, also one that embeds the driver, all are passed on: to
//!   libinstantsnap, if the program is linked with it, or to the driver.
//!
//! The engine is part of this library (`src/core.rs`), so that a process needs only one file. If
//! the program also has libinstantsnap, that is another copy: the two share nothing in the process,
//! and lock each other out as two processes do. libvirt is found at run time: preloading does not
//! load it.
//!
//! `docs/preload.md` and `docs/inside-the-daemon.md` are for users.

#![warn(missing_docs)]

mod client;
mod daemon;
mod environment;
mod libvirt;
mod loading;
mod request;

use std::ffi::{CStr, c_int, c_uint};
use std::ptr::{self, NonNull};

use instantsnap_core::boundary::boundary;
use instantsnap_core::error::{Code, Error, Result};
use instantsnap_core::libvirt::driver::{Next, virDomainObj};
use instantsnap_core::libvirt::table::{virDomain, virDomainSnapshot};
use instantsnap_core::pointers::Text;
use instantsnap_core::symbols::Library;

use libvirt::Libvirt;

/// libvirt's function; with bit 10 the snapshot is instant.
#[unsafe(no_mangle)]
pub extern "C" fn virDomainSnapshotCreateXML(
    domain: Option<&virDomain>,
    xml: Text,
    flags: c_uint,
) -> *mut virDomainSnapshot {
    boundary(set_last_error, || {
        let Some(libvirt) = Libvirt::get() else { return Ok(ptr::null_mut()) };
        let theirs = |flags| (libvirt.next.virDomainSnapshotCreateXML)(domain, xml, flags);
        Ok(if daemon::is_here() {
            daemon::dispatcher::create(domain, flags, theirs)
        } else {
            client::create(libvirt, domain, xml, flags, theirs)
        })
    })
}

/// libvirt's function, or instantsnap's if libvirt cannot.
#[unsafe(no_mangle)]
pub extern "C" fn virDomainRevertToSnapshot(
    snapshot: Option<&virDomainSnapshot>,
    flags: c_uint,
) -> c_int {
    boundary(set_last_error, || {
        let Some(libvirt) = Libvirt::get() else { return Ok(-1) };
        let theirs = || (libvirt.next.virDomainRevertToSnapshot)(snapshot, flags);
        // In the daemon, the driver checks permissions before it calls the function below.
        Ok(if daemon::is_here() {
            theirs()
        } else {
            client::revert(libvirt, snapshot, flags, theirs)
        })
    })
}

/// libvirt's function, or instantsnap's if libvirt cannot.
#[unsafe(no_mangle)]
pub extern "C" fn virDomainSnapshotDelete(
    snapshot: Option<&virDomainSnapshot>,
    flags: c_uint,
) -> c_int {
    boundary(set_last_error, || {
        let Some(libvirt) = Libvirt::get() else { return Ok(-1) };
        let theirs = || (libvirt.next.virDomainSnapshotDelete)(snapshot, flags);
        Ok(if daemon::is_here() {
            theirs()
        } else {
            client::delete(libvirt, snapshot, flags, theirs)
        })
    })
}

/// The driver's function; in the daemon, with bit 10 the snapshot is instant.
///
/// # Safety
/// Every object must be valid for the next definition.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qemuSnapshotCreateXML(
    domain: *mut virDomain,
    vm: *mut virDomainObj,
    xml: Text,
    flags: c_uint,
) -> *mut virDomainSnapshot {
    boundary(set_last_error, || {
        let next = next(|next| next.qemuSnapshotCreateXML)?;
        // SAFETY: the arguments are those of a call of this very function.
        let theirs = || unsafe { next(domain, vm, xml, flags) };
        let Some(vm) = drivers_own(vm) else { return Ok(theirs()) };
        // SAFETY: libvirt's driver calls with NULL or its own object, which lives for the call.
        let domain = unsafe { domain.as_ref() };
        Ok(daemon::create(vm, domain, xml, flags, theirs))
    })
}

/// The driver's function, or, in the daemon, instantsnap's if libvirt cannot.
///
/// # Safety
/// Every object must be valid for the next definition.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qemuSnapshotRevert(
    vm: *mut virDomainObj,
    snapshot: *mut virDomainSnapshot,
    flags: c_uint,
) -> c_int {
    boundary(set_last_error, || {
        let next = next(|next| next.qemuSnapshotRevert)?;
        // SAFETY: the arguments are those of a call of this very function.
        let theirs = || unsafe { next(vm, snapshot, flags) };
        let Some(vm) = drivers_own(vm) else { return Ok(theirs()) };
        // SAFETY: libvirt's driver calls with NULL or its own object, which lives for the call.
        Ok(daemon::revert(vm, unsafe { snapshot.as_ref() }, flags, theirs))
    })
}

/// The driver's function, or, in the daemon, instantsnap's if libvirt cannot.
///
/// # Safety
/// Every object must be valid for the next definition.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qemuSnapshotDelete(
    vm: *mut virDomainObj,
    snapshot: *mut virDomainSnapshot,
    flags: c_uint,
) -> c_int {
    boundary(set_last_error, || {
        let next = next(|next| next.qemuSnapshotDelete)?;
        // SAFETY: the arguments are those of a call of this very function.
        let theirs = || unsafe { next(vm, snapshot, flags) };
        let Some(vm) = drivers_own(vm) else { return Ok(theirs()) };
        // SAFETY: libvirt's driver calls with NULL or its own object, which lives for the call.
        Ok(daemon::delete(vm, unsafe { snapshot.as_ref() }, flags, theirs))
    })
}

/// The next definition of a function of libvirt's driver.
fn next<F>(function: impl FnOnce(Next) -> Option<F>) -> Result<F> {
    // A plugin may be linked with libinstantsnap, which is not in the global scope then, and so not
    // found by `NEXT`.
    let library = Library::loaded(c"libinstantsnap.so.0");
    let find = |name: &CStr| match (Library::NEXT.find(name), &library) {
        (found, Some(library)) if found.is_null() => library.find(name),
        (found, _) => found,
    };
    Next::find(find).ok().and_then(function).ok_or_else(|| {
        Error::new(Code::OperationUnsupported, "libvirt's QEMU driver is not in this process")
    })
}

/// The domain object of libvirt's own driver: in its daemon, any that is not NULL.
fn drivers_own(vm: *mut virDomainObj) -> Option<NonNull<virDomainObj>> {
    NonNull::new(vm).filter(|_| daemon::is_here())
}

/// Makes an error this thread's last error in libvirt.
fn set_last_error(error: Error) {
    if let Some(libvirt) = Libvirt::get() {
        libvirt.set_last_error(&error);
    }
}
