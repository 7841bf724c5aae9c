//! The entry points of a client of a stock libvirt: `vm` is NULL, objects and errors are libvirt's
//! own.

use std::ffi::{c_int, c_uint};
use std::sync::Arc;

use super::header::instantsnap_guest;
use super::last_error;
use super::native::GUESTS;
use crate::backend::LibvirtConnector;
use crate::boundary::{boundary, caught};
use crate::engine::{self, Handle};
use crate::error::{Error, Result, fail};
use crate::libvirt::table::{self, virDomain, virDomainSnapshot};
use crate::libvirt::{self, Domain, Snapshot, VirError};
use crate::model::flags::{self, CreateFlags, DeleteFlags, RevertFlags};
use crate::pointers::Text;

/// Runs a body that needs libvirt. What libvirt has said on the way is no error of one that
/// succeeds.
pub fn attempt<T>(body: impl FnOnce(&'static table::Table) -> Result<T>) -> Result<T> {
    let result = caught(|| body(table::table()?));
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

/// A reference to the caller's domain.
pub fn share_domain(table: &'static table::Table, domain: Option<&virDomain>) -> Result<Domain> {
    let Some(domain) = domain else { fail!(InvalidArg, "domain must not be NULL") };
    Domain::share(table, domain).map_err(|error| error.into_error("domain"))
}

/// A reference to the caller's snapshot.
pub fn share_snapshot(
    table: &'static table::Table,
    snapshot: Option<&virDomainSnapshot>,
) -> Result<Snapshot> {
    let Some(snapshot) = snapshot else { fail!(InvalidArg, "snapshot must not be NULL") };
    Snapshot::share(table, snapshot).map_err(|error| error.into_error("snapshot"))
}

/// `qemuSnapshotCreateXML` with `vm` NULL.
pub fn create(domain: Option<&virDomain>, xml: Text, bits: c_uint) -> *mut virDomainSnapshot {
    if bits & flags::INSTANT == 0 {
        return boundary(last_error::set, || pass_through(domain, xml, bits));
    }
    let take = |table| {
        let flags = CreateFlags::parse(bits)?;
        let (domain, xml) = (share_domain(table, domain)?, xml.required("xmlDesc")?);
        let connector = LibvirtConnector::open(domain.clone())?;
        Ok(take(&domain, connector, xml, flags)?.into_raw())
    };
    boundary(tell, || attempt(take))
}

/// Takes a snapshot; libvirt's object of it.
pub fn take(
    domain: &Domain,
    connector: LibvirtConnector,
    xml: &str,
    flags: CreateFlags,
) -> Result<Snapshot> {
    let connector = Arc::new(connector);
    let name = Handle::open_libvirt(Arc::clone(&connector)).create(xml, Ok(flags), &mut ())?;
    match connector.taken() {
        Some(snapshot) => Ok(snapshot),
        // Of memory alone, and not recorded: libvirt has had no part in it.
        None => domain
            .snapshot_object(&name)
            .map_err(|error| error.into_error(&format!("snapshot '{name}' is complete, but"))),
    }
}

/// libvirt's own, its result and its error as they are.
fn pass_through(
    domain: Option<&virDomain>,
    xml: Text,
    bits: c_uint,
) -> Result<*mut virDomainSnapshot> {
    let table = table::table()?;
    // libvirt checks all of them itself.
    let snapshot = (table.virDomainSnapshotCreateXML)(domain, xml, bits);
    if snapshot.is_null() { Err(VirError::last(table).into()) } else { Ok(snapshot) }
}

/// `qemuSnapshotRevert` with `vm` NULL.
pub fn revert(snapshot: Option<&virDomainSnapshot>, bits: c_uint) -> Result<c_int> {
    attempt(|table| {
        let flags = RevertFlags::parse(bits)?;
        engine::revert_managed(&share_snapshot(table, snapshot)?, flags).map(|()| 0)
    })
}

/// `qemuSnapshotDelete` with `vm` NULL.
pub fn delete(snapshot: Option<&virDomainSnapshot>, bits: c_uint) -> Result<c_int> {
    attempt(|table| {
        let flags = DeleteFlags::parse(bits)?;
        engine::delete_managed(&share_snapshot(table, snapshot)?, flags).map(|()| 0)
    })
}

/// `instantsnap_open_libvirt`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_open_libvirt(domain: Option<&virDomain>) -> *mut instantsnap_guest {
    boundary(last_error::set, || {
        let domain = share_domain(table::table()?, domain)?;
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
