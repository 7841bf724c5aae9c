// SPDX-License-Identifier: LGPL-2.1-or-later

//! The entry points of a client of a stock libvirt: `vm` is NULL, and objects and errors are
//! libvirt's own.

use std::ffi::{c_int, c_uint};
use std::sync::Arc;

use super::header::instantsnap_guest;
use super::last_error;
use super::native::GUESTS;
use crate::backend::LibvirtConnector;
use crate::boundary::boundary;
use crate::client::{self, share_domain};
use crate::engine::Handle;
use crate::error::{Error, Result};
use crate::libvirt::VirError;
use crate::libvirt::table::{self, virDomain, virDomainSnapshot};
use crate::model::flags::{self, CreateFlags, DeleteFlags, RevertFlags};
use crate::pointers::Text;

/// Makes an error the thread's last one, both in libvirt and in this library.
pub fn set_last_error(error: Error) {
    client::set_last_error(&error);
    last_error::set(error);
}

/// `qemuSnapshotCreateXML` with `vm` NULL.
pub fn create(domain: Option<&virDomain>, xml: Text, bits: c_uint) -> *mut virDomainSnapshot {
    if bits & flags::INSTANT == 0 {
        return boundary(last_error::set, || pass_through(domain, xml, bits));
    }
    boundary(set_last_error, || client::create(domain, xml, CreateFlags::parse(bits)?, None))
}

/// Calls libvirt's own function, and returns its result or error unchanged.
fn pass_through(
    domain: Option<&virDomain>,
    xml: Text,
    bits: c_uint,
) -> Result<*mut virDomainSnapshot> {
    let table = table::table()?;
    // libvirt checks the arguments itself.
    let snapshot = (table.virDomainSnapshotCreateXML)(domain, xml, bits);
    if snapshot.is_null() { Err(VirError::last(table).into()) } else { Ok(snapshot) }
}

/// `qemuSnapshotRevert` with `vm` NULL.
pub fn revert(snapshot: Option<&virDomainSnapshot>, bits: c_uint) -> Result<c_int> {
    client::revert(snapshot, RevertFlags::parse(bits)?).map(|()| 0)
}

/// `qemuSnapshotDelete` with `vm` NULL.
pub fn delete(snapshot: Option<&virDomainSnapshot>, bits: c_uint) -> Result<c_int> {
    client::delete(snapshot, DeleteFlags::parse(bits)?).map(|()| 0)
}

/// `instantsnap_open_libvirt`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_open_libvirt(domain: Option<&virDomain>) -> *mut instantsnap_guest {
    boundary(last_error::set, || {
        let domain = share_domain(table::table()?, domain)?;
        Ok(GUESTS.add(Handle::open_libvirt(Arc::new(LibvirtConnector::open(domain)?))))
    })
}
