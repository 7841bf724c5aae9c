// SPDX-License-Identifier: LGPL-2.1-or-later

//! Handles the calls of a client of libvirt. The library carries these out:
//!
//! * `virDomainSnapshotCreateXML` with `VIR_DOMAIN_SNAPSHOT_CREATE_INSTANT` (bit 10). With
//!   `INSTANTSNAP_UPGRADE_LIVE=1` in the environment, also a LIVE snapshot of a running QEMU guest
//!   with its memory in a file; if instantsnap refuses that one, libvirt takes its own snapshot,
//!   because the program has not asked for INSTANT.
//! * `virDomainRevertToSnapshot` and `virDomainSnapshotDelete` of a QEMU guest's snapshot with its
//!   memory in a file. instantsnap lets libvirt do it if libvirt can. libvirt is not tried first:
//!   its refusal would reach the program's error handler (by default a line on stderr), and some of
//!   the requests that it accepts do harm.

use std::cell::Cell;
use std::ffi::{c_int, c_uint};
use std::ptr;

use instantsnap_core::boundary::caught;
use instantsnap_core::client;
use instantsnap_core::error::Result;
use instantsnap_core::libvirt::table::{self, virDomain, virDomainSnapshot};
use instantsnap_core::model::flags::{self, CreateFlags, DeleteFlags, RevertFlags};
use instantsnap_core::model::upgrade;
use instantsnap_core::pointers::Text;

use crate::environment;
use crate::libvirt::Libvirt;
use crate::request;

/// Handles `virDomainSnapshotCreateXML`. `theirs` is libvirt's own function, with these flags.
pub fn create(
    libvirt: &Libvirt,
    domain: Option<&virDomain>,
    xml: Text,
    flags: c_uint,
    theirs: impl Fn(c_uint) -> *mut virDomainSnapshot,
) -> *mut virDomainSnapshot {
    let Some(_inside) = Inside::enter() else { return theirs(flags) };
    let asked = flags & flags::INSTANT != 0;
    let is_to_be_upgraded = || Ok(request::is_to_be_upgraded(libvirt, domain, xml, flags));
    if !asked && !caught(is_to_be_upgraded).unwrap_or(false) {
        return theirs(flags);
    }
    // Read first, because this call resets the last error.
    let connection = libvirt.connection_of_domain(domain);
    let instant = || {
        let flags = CreateFlags::parse(flags | flags::INSTANT)?;
        client::create(domain, xml, flags, environment::image_format()?)
    };
    match catch(libvirt, instant) {
        Outcome::Done(snapshot) => snapshot,
        Outcome::Refused(why) if !asked => {
            environment::debug(&format!("a LIVE snapshot stays libvirt's own: {why}"));
            theirs(flags)
        }
        Outcome::Refused(_) | Outcome::Failed => {
            libvirt.dispatch(connection);
            ptr::null_mut()
        }
    }
}

/// Handles `virDomainRevertToSnapshot`. `theirs` is libvirt's own function.
pub fn revert(
    libvirt: &Libvirt,
    snapshot: Option<&virDomainSnapshot>,
    flags: c_uint,
    theirs: impl Fn() -> c_int,
) -> c_int {
    on_snapshot(libvirt, snapshot, theirs, || client::revert(snapshot, RevertFlags::parse(flags)?))
}

/// Handles `virDomainSnapshotDelete`. `theirs` is libvirt's own function.
pub fn delete(
    libvirt: &Libvirt,
    snapshot: Option<&virDomainSnapshot>,
    flags: c_uint,
    theirs: impl Fn() -> c_int,
) -> c_int {
    on_snapshot(libvirt, snapshot, theirs, || client::delete(snapshot, DeleteFlags::parse(flags)?))
}

/// Calls `ours` for a snapshot with its memory in a file, if this libvirt has the functions for it;
/// else `theirs`.
fn on_snapshot(
    libvirt: &Libvirt,
    snapshot: Option<&virDomainSnapshot>,
    theirs: impl Fn() -> c_int,
    ours: impl FnOnce() -> Result<()>,
) -> c_int {
    let Some(_inside) = Inside::enter() else { return theirs() };
    if !caught(|| Ok(request::is_with_memory(libvirt, snapshot))).unwrap_or(false) {
        return theirs();
    }
    if let Err(error) = caught(table::table) {
        environment::debug(&format!("this is left to libvirt: {error}"));
        return theirs();
    }
    // Read first, because this call resets the last error.
    let connection = libvirt.connection_of_snapshot(snapshot);
    match catch(libvirt, ours) {
        Outcome::Done(()) => 0,
        Outcome::Refused(_) | Outcome::Failed => {
            libvirt.dispatch(connection);
            -1
        }
    }
}

/// The result of an operation of instantsnap's.
enum Outcome<T> {
    Done(T),
    /// It has changed nothing. Has the reason, which is libvirt's last error too.
    Refused(String),
    /// It has failed. libvirt's last error has the reason.
    Failed,
}

fn catch<T>(libvirt: &Libvirt, operation: impl FnOnce() -> Result<T>) -> Outcome<T> {
    libvirt.reset_last_error();
    match caught(operation) {
        Ok(result) => {
            libvirt.reset_last_error(); // an optional step may have failed
            Outcome::Done(result)
        }
        Err(error) => {
            libvirt.set_last_error(&error);
            if upgrade::is_refusal(error.number()) {
                Outcome::Refused(error.message)
            } else {
                Outcome::Failed
            }
        }
    }
}

/// Marks a thread as being in one of the three functions. Its nested calls are passed on unchanged.
struct Inside;

thread_local! {
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

impl Inside {
    /// `None` if the thread is marked already, or is ending.
    fn enter() -> Option<Inside> {
        INSIDE
            .try_with(|inside| !inside.replace(true))
            .is_ok_and(|entered| entered)
            .then_some(Inside)
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        let _ = INSIDE.try_with(|inside| inside.set(false));
    }
}
