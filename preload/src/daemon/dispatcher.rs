// SPDX-License-Identifier: LGPL-2.1-or-later

//! Where the daemon's dispatcher calls libvirt's public function for a client.
//!
//! libvirt's driver may look at the flags before it calls `qemuSnapshotCreateXML` (12.8 does, 9.0
//! and 11.3 do not), and refuses a bit that it does not know. So the bit is taken off before:
//! [`create`] stands before `virDomainSnapshotCreateXML`, notes for this thread that INSTANT was
//! asked for of this domain, and calls libvirt's function without the bit; [`take`] finds the note
//! when the driver arrives at [`super::create`]. All that libvirt checks on the way, its access
//! driver included, it checks as ever.

use std::cell::Cell;
use std::ffi::c_uint;
use std::ptr;

use instantsnap_core::boundary::boundary;
use instantsnap_core::client::{catch, set_last_error, share_domain};
use instantsnap_core::error::{Code, Error, Result};
use instantsnap_core::libvirt::daemon::{self, Daemon};
use instantsnap_core::libvirt::table::{self, virDomain, virDomainSnapshot};
use instantsnap_core::libvirt::{Snapshot, VirError};
use instantsnap_core::model::flags;

use super::availability::{self, failed};

/// A note: INSTANT was asked for of this domain.
type Note = (*const virDomain, &'static Daemon);

thread_local! {
    static NOTED: Cell<Option<Note>> = const { Cell::new(None) };
}

/// Whether INSTANT was asked for of this domain by the call that this thread is in; once.
pub fn take(domain: Option<&virDomain>) -> Option<&'static Daemon> {
    let (_, daemon) = NOTED.get().filter(|(noted, _)| ptr::eq(*noted, address(domain)))?;
    NOTED.set(None);
    Some(daemon)
}

fn address(domain: Option<&virDomain>) -> *const virDomain {
    domain.map_or(ptr::null(), ptr::from_ref)
}

/// `virDomainSnapshotCreateXML`; libvirt's own, with these flags, is `theirs`.
pub fn create(
    domain: Option<&virDomain>,
    bits: c_uint,
    theirs: impl Fn(c_uint) -> *mut virDomainSnapshot,
) -> *mut virDomainSnapshot {
    boundary(failed, || dispatch(domain, bits, theirs))
}

/// Passes a call on to `theirs`, in which no bit is added.
fn dispatch(
    domain: Option<&virDomain>,
    bits: c_uint,
    theirs: impl Fn(c_uint) -> *mut virDomainSnapshot,
) -> Result<*mut virDomainSnapshot> {
    if bits & flags::INSTANT == 0 || daemon::is_in_a_call() {
        return Ok(theirs(bits));
    }
    match catch(|table| is_drivers(table, domain)) {
        Ok(true) => {}
        // Another driver's, or another machine's, which is asked for what was asked for here.
        Ok(false) | Err(_) => return Ok(theirs(bits)),
    }
    let daemon = match availability::found() {
        Ok(daemon) => daemon,
        Err(why) => {
            let result = theirs(bits);
            if result.is_null() {
                say_why_it_is_off(&why);
            }
            return Ok(result);
        }
    };
    NOTED.set(Some((address(domain), daemon)));
    let result = theirs(bits & !flags::INSTANT);
    if NOTED.take().is_none() || result.is_null() {
        return Ok(result);
    }
    availability::driver_is_elsewhere();
    Err(not_instant(result))
}

/// Whether a domain is one of the driver in this process.
fn is_drivers(table: &'static table::Table, domain: Option<&virDomain>) -> Result<bool> {
    let connection =
        share_domain(table, domain)?.connect().map_err(|error| error.into_error("domain"))?;
    let uri = connection.uri().map_err(|error| error.into_error("connection"))?;
    Ok(uri.starts_with("qemu:///"))
}

/// Adds to libvirt's refusal of the flag, which is this thread's last error, why it is refused.
fn say_why_it_is_off(why: &str) {
    let Ok(table) = table::table() else { return };
    let said = VirError::last(table);
    if said.is(Code::InvalidArg) {
        let message = format!("instant snapshots are off in this daemon: {why}: {}", said.message);
        set_last_error(&Error::new(Code::InvalidArg, message));
    }
}

/// The error for a snapshot that is an ordinary one, which stays: the domain is on its overlays.
/// What libvirt has returned is given up.
fn not_instant(snapshot: *mut virDomainSnapshot) -> Error {
    let named = catch(|table| {
        // SAFETY: libvirt has returned it, and nobody else has it.
        let snapshot = unsafe { Snapshot::from_raw(table, snapshot) };
        Ok(snapshot.map_err(|error| error.into_error("snapshot"))?.name())
    });
    let name = named.unwrap_or_else(|_| "without a name".to_owned());
    Error::new(
        Code::OperationFailed,
        format!(
            "this libvirt has taken snapshot '{name}' in its ordinary way, and not at the moment \
             of the call, because its driver did not call qemuSnapshotCreateXML(): delete that \
             snapshot if it is of no use; instant snapshots are off in this daemon from now on"
        ),
    )
}
