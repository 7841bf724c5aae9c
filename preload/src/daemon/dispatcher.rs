// SPDX-License-Identifier: LGPL-2.1-or-later

//! Intercepts the call by which the daemon's dispatcher creates a snapshot for a client.
//!
//! libvirt's driver may check the flags before it calls `qemuSnapshotCreateXML` (12.8 does, 9.0 and
//! 11.3 do not), and refuses a flag that it does not know. So INSTANT is removed before: [`create`]
//! replaces `virDomainSnapshotCreateXML`, notes for this thread that INSTANT was requested for this
//! domain, and calls libvirt's function without the flag. [`take`] finds the note when the driver
//! calls [`super::create`]. All of libvirt's own checks in between, including its access driver's,
//! are made as usual.

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

/// A note that INSTANT was requested for this domain.
type Note = (*const virDomain, &'static Daemon);

thread_local! {
    static NOTED: Cell<Option<Note>> = const { Cell::new(None) };
}

/// Returns the daemon if this thread's current call requested INSTANT for this domain. `None` on
/// the second call.
pub fn take(domain: Option<&virDomain>) -> Option<&'static Daemon> {
    let (_, daemon) = NOTED.get().filter(|(noted, _)| ptr::eq(*noted, address(domain)))?;
    NOTED.set(None);
    Some(daemon)
}

fn address(domain: Option<&virDomain>) -> *const virDomain {
    domain.map_or(ptr::null(), ptr::from_ref)
}

/// Handles `virDomainSnapshotCreateXML`. `theirs` is libvirt's own function, with these flags.
pub fn create(
    domain: Option<&virDomain>,
    bits: c_uint,
    theirs: impl Fn(c_uint) -> *mut virDomainSnapshot,
) -> *mut virDomainSnapshot {
    boundary(failed, || dispatch(domain, bits, theirs))
}

/// Passes the call on to `theirs`. Adds no flag.
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
        // The domain belongs to another driver or another machine, which gets the unchanged
        // request.
        Ok(false) | Err(_) => return Ok(theirs(bits)),
    }
    let daemon = match availability::found() {
        Ok(daemon) => daemon,
        Err(why) => {
            let result = theirs(bits);
            if result.is_null() {
                explain_refusal(&why);
            }
            return Ok(result);
        }
    };
    NOTED.set(Some((address(domain), daemon)));
    let result = theirs(bits & !flags::INSTANT);
    if NOTED.take().is_none() || result.is_null() {
        return Ok(result);
    }
    availability::driver_was_bypassed();
    Err(not_instant(result))
}

/// Whether a domain belongs to the driver in this process.
fn is_drivers(table: &'static table::Table, domain: Option<&virDomain>) -> Result<bool> {
    let connection =
        share_domain(table, domain)?.connect().map_err(|error| error.into_error("domain"))?;
    let uri = connection.uri().map_err(|error| error.into_error("connection"))?;
    Ok(uri.starts_with("qemu:///"))
}

/// Adds to libvirt's refusal of the flag, which is this thread's last error, why instant snapshots
/// are off.
fn explain_refusal(why: &str) {
    let Ok(table) = table::table() else { return };
    let last = VirError::last(table);
    if last.is(Code::InvalidArg) {
        let message = format!("instant snapshots are off in this daemon: {why}: {}", last.message);
        set_last_error(&Error::new(Code::InvalidArg, message));
    }
}

/// The error for a request that libvirt answered with an ordinary snapshot. The snapshot stays,
/// because the domain is on its overlays. Frees libvirt's object for it.
fn not_instant(snapshot: *mut virDomainSnapshot) -> Error {
    let named = catch(|table| {
        // SAFETY: libvirt has returned it, and this is its only owner.
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
