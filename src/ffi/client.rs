//! The entry points of a client of a stock libvirt: `vm` is NULL, objects and errors are libvirt's own.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::{self, NonNull};
use std::sync::Arc;

use super::header::instantsnap_guest;
use super::native::GUESTS;
use super::{boundary, defect, last_error, text};
use crate::engine::Handle;
use crate::error::{Error, Result, fail};
use crate::flags;
use crate::guest::{LibvirtConnector, libvirt as guest};
use crate::libvirt::{self, Domain, Snapshot, VirError, table};

/// Runs the body of one of libvirt's functions. Its error is put where libvirt's callers look, and where ours do.
fn virtually<T>(failed: T, body: impl FnOnce(&'static table::Table) -> Result<T>) -> T {
    attempt(body).unwrap_or_else(|error| {
        tell(error);
        failed
    })
}

/// The same, but that nobody is told of the error yet.
pub fn attempt<T>(body: impl FnOnce(&'static table::Table) -> Result<T>) -> Result<T> {
    let result = catch_unwind(AssertUnwindSafe(|| {
        let table = table::table()?;
        body(table)
    }));
    let result = result.unwrap_or_else(|panic| Err(defect(&*panic)));
    // What libvirt has said on the way is no error of the call.
    if let (Ok(_), Ok(table)) = (&result, table::table()) {
        libvirt::reset_last_error(table);
    }
    result
}

/// Makes an error the thread's last one, for whoever asks libvirt, and for whoever asks us.
pub fn tell(error: Error) {
    if let Ok(table) = table::table()
        && !libvirt::set_last(table, &error)
    {
        // Better none there than another one.
        libvirt::reset_last_error(table);
    }
    last_error::set(error);
}

/// # Safety
/// `domain` is NULL or a `virDomainPtr`.
pub unsafe fn share_domain(table: &'static table::Table, domain: *mut c_void) -> Result<Domain> {
    let Some(domain) = NonNull::new(domain) else { fail!(InvalidArg, "domain must not be NULL") };
    // SAFETY: by the caller's promise.
    unsafe { Domain::share(table, domain.cast()) }.map_err(|error| error.into_error("domain"))
}

/// # Safety
/// `snapshot` is NULL or a `virDomainSnapshotPtr`.
pub unsafe fn share_snapshot(table: &'static table::Table, snapshot: *mut c_void) -> Result<Snapshot> {
    let Some(snapshot) = NonNull::new(snapshot) else { fail!(InvalidArg, "snapshot must not be NULL") };
    if super::handles::is_handle(snapshot.as_ptr()) {
        fail!(InvalidArg, "snapshot is one of instantsnap_open_qmp()'s guest: vm must be that guest");
    }
    // SAFETY: by the caller's promise.
    unsafe { Snapshot::share(table, snapshot.cast()) }.map_err(|error| error.into_error("snapshot"))
}

/// `qemuSnapshotCreateXML` with `vm` NULL.
///
/// # Safety
/// `domain` is NULL or a `virDomainPtr`, `xml` NULL or NUL-terminated.
pub unsafe fn create(domain: *mut c_void, xml: *const c_char, bits: c_uint) -> *mut c_void {
    if bits & flags::INSTANT == 0 {
        // SAFETY: by the caller's promise.
        return unsafe { pass_through(domain, xml, bits) };
    }
    virtually(ptr::null_mut(), |table| {
        flags::Flags::check(bits)?;
        // SAFETY: by the caller's promise.
        let (domain, xml) = unsafe { (share_domain(table, domain)?, text("xmlDesc", xml)?) };
        let connector = LibvirtConnector::open(domain.clone())?;
        Ok(take(&domain, connector, xml, bits)?.into_raw().cast())
    })
}

/// Takes a snapshot; libvirt's object of it.
pub fn take(domain: &Domain, connector: LibvirtConnector, xml: &str, bits: c_uint) -> Result<Snapshot> {
    let connector = Arc::new(connector);
    let name = Handle::open_libvirt(Arc::clone(&connector)).create(xml, bits, &mut ())?;
    match connector.taken() {
        Some(snapshot) => Ok(snapshot),
        // Of memory alone, and not recorded: libvirt has had no part in it.
        None => domain
            .snapshot_object(&name)
            .map_err(|error| error.into_error(&format!("snapshot '{name}' is complete, but"))),
    }
}

/// libvirt's own, its result and its error as they are.
///
/// # Safety
/// As [`create`].
unsafe fn pass_through(domain: *mut c_void, xml: *const c_char, bits: c_uint) -> *mut c_void {
    let table = match table::table() {
        Ok(table) => table,
        Err(error) => {
            last_error::set(error);
            return ptr::null_mut();
        }
    };
    // SAFETY: by the caller's promise; libvirt checks all of them itself.
    let snapshot = unsafe { (table.virDomainSnapshotCreateXML)(domain.cast(), xml, bits) };
    if snapshot.is_null() {
        last_error::set(VirError::last(table).into());
    }
    snapshot.cast()
}

/// `qemuSnapshotRevert` with `vm` NULL.
///
/// # Safety
/// `snapshot` is NULL or a `virDomainSnapshotPtr`.
pub unsafe fn revert(snapshot: *mut c_void, bits: c_uint) -> c_int {
    virtually(-1, |table| {
        flags::revert::check(bits)?;
        // SAFETY: by the caller's promise.
        let snapshot = unsafe { share_snapshot(table, snapshot) }?;
        guest::revert(&snapshot, bits).map(|()| 0)
    })
}

/// `qemuSnapshotDelete` with `vm` NULL.
///
/// # Safety
/// `snapshot` is NULL or a `virDomainSnapshotPtr`.
pub unsafe fn delete(snapshot: *mut c_void, bits: c_uint) -> c_int {
    virtually(-1, |table| {
        flags::delete::check(bits)?;
        // SAFETY: by the caller's promise.
        let snapshot = unsafe { share_snapshot(table, snapshot) }?;
        guest::delete(&snapshot, bits).map(|()| 0)
    })
}

/// `instantsnap_open_libvirt`.
///
/// # Safety
/// `domain` is NULL or a `virDomainPtr`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn instantsnap_open_libvirt(domain: *mut c_void) -> *mut instantsnap_guest {
    boundary(ptr::null_mut(), || {
        let table = table::table()?;
        // SAFETY: by the caller's promise.
        let domain = unsafe { share_domain(table, domain) }?;
        Ok(GUESTS.add(Handle::open_libvirt(Arc::new(LibvirtConnector::open(domain)?))))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;

    #[test]
    fn a_panic_is_an_error_and_what_it_unwinds_is_dropped() {
        struct Held<'a>(&'a std::cell::Cell<bool>);
        impl Drop for Held<'_> {
            fn drop(&mut self) {
                self.0.set(false);
            }
        }
        if table::table().is_err() {
            return;
        }
        let held = std::cell::Cell::new(true);
        let result = attempt(|_| -> Result<()> {
            let _held = Held(&held);
            panic!("on purpose")
        });
        let error = result.unwrap_err();
        assert_eq!(error.code, Code::InternalError);
        assert!(error.message.contains("on purpose"), "{error}");
        assert!(!held.get());
    }
}
