// SPDX-License-Identifier: LGPL-2.1-or-later

//! The functions for callers that use libvirt's objects and errors: for a client of a stock
//! libvirt, and for a client's call inside the daemon.
//!
//! Objects are libvirt's own, as pointers that C has passed; errors become libvirt's last error of
//! the thread ([`set_last_error`]).

use std::sync::Arc;

use crate::backend::LibvirtConnector;
use crate::boundary::caught;
use crate::engine::{self, Created, Handle};
use crate::error::{Error, Result, fail};
use crate::image::Format;
use crate::libvirt::table::{self, virDomain, virDomainSnapshot};
use crate::libvirt::{self, Domain, Snapshot};
use crate::model::flags::{CreateFlags, DeleteFlags, RevertFlags};
use crate::pointers::Text;

/// Runs a body that uses libvirt. If it succeeds, clears the errors that libvirt has set meanwhile.
pub fn catch<T>(body: impl FnOnce(&'static table::Table) -> Result<T>) -> Result<T> {
    let result = caught(|| body(table::table()?));
    if let (Ok(_), Ok(table)) = (&result, table::table()) {
        libvirt::reset_last_error(table);
    }
    result
}

/// Makes an error libvirt's last one of this thread.
pub fn set_last_error(error: &Error) {
    if let Ok(table) = table::table()
        && !libvirt::set_last(table, error)
    {
        // libvirt must not keep another error as this thread's last one.
        libvirt::reset_last_error(table);
    }
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

/// `qemuSnapshotCreateXML` of a client, with INSTANT. `format` is that of the memory image, if it
/// is not the default.
pub fn create(
    domain: Option<&virDomain>,
    xml: Text,
    flags: CreateFlags,
    format: Option<Format>,
) -> Result<*mut virDomainSnapshot> {
    catch(|table| {
        let (domain, xml) = (share_domain(table, domain)?, xml.required("xmlDesc")?);
        let connector = LibvirtConnector::open(domain.clone())?;
        Ok(take(&domain, connector, xml, flags, format)?.into_raw())
    })
}

/// Takes a snapshot. Returns libvirt's object for it.
pub fn take(
    domain: &Domain,
    connector: LibvirtConnector,
    xml: &str,
    flags: CreateFlags,
    format: Option<Format>,
) -> Result<Snapshot> {
    let handle = Handle::open_libvirt(Arc::new(connector));
    let Created { name, object, .. } = handle.create(xml, Ok(flags), format, &mut ())?;
    match object {
        Some(snapshot) => Ok(snapshot),
        // A snapshot of memory alone that was not recorded: libvirt was not involved.
        None => domain
            .snapshot_object(&name)
            .map_err(|error| error.into_error(&format!("snapshot '{name}' is complete, but"))),
    }
}

/// `qemuSnapshotRevert` of a client.
pub fn revert(snapshot: Option<&virDomainSnapshot>, flags: RevertFlags) -> Result<()> {
    catch(|table| engine::revert_managed(&share_snapshot(table, snapshot)?, flags))
}

/// `qemuSnapshotDelete` of a client.
pub fn delete(snapshot: Option<&virDomainSnapshot>, flags: DeleteFlags) -> Result<()> {
    catch(|table| engine::delete_managed(&share_snapshot(table, snapshot)?, flags))
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
        let result = catch(|_| -> Result<()> {
            let _held = Held(&held);
            panic!("on purpose")
        });
        let error = result.unwrap_err();
        assert_eq!(error.code, Code::InternalError);
        assert!(error.message.contains("on purpose"), "{error}");
        assert!(!held.get());
    }
}
