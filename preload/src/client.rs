// SPDX-License-Identifier: LGPL-2.1-or-later

//! The calls of a client of libvirt. These are instantsnap's:
//!
//! * `virDomainSnapshotCreateXML` with `VIR_DOMAIN_SNAPSHOT_CREATE_INSTANT` (bit 10). So is, with
//!   `INSTANTSNAP_UPGRADE_LIVE=1` in the environment, a LIVE snapshot of a running QEMU guest with
//!   its memory in a file of its own; where instantsnap refuses that one, it is libvirt's after
//!   all, because nobody asked for INSTANT.
//! * `virDomainRevertToSnapshot` and `virDomainSnapshotDelete` of a QEMU guest's snapshot with its
//!   memory in a file: instantsnap has libvirt do it where libvirt can. Not the other way round:
//!   libvirt's refusal would reach the program's error handler (by default a line on stderr), and
//!   some of what it does not refuse does harm.

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

/// `virDomainSnapshotCreateXML`; libvirt's own, with these flags, is `theirs`.
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
    // Asked for now, because that resets the last error.
    let connection = libvirt.connection_of_domain(domain);
    let instant = || client::create(domain, xml, CreateFlags::parse(flags | flags::INSTANT)?);
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

/// `virDomainRevertToSnapshot`; libvirt's own is `theirs`.
pub fn revert(
    libvirt: &Libvirt,
    snapshot: Option<&virDomainSnapshot>,
    flags: c_uint,
    theirs: impl Fn() -> c_int,
) -> c_int {
    on_snapshot(libvirt, snapshot, theirs, || client::revert(snapshot, RevertFlags::parse(flags)?))
}

/// `virDomainSnapshotDelete`; libvirt's own is `theirs`.
pub fn delete(
    libvirt: &Libvirt,
    snapshot: Option<&virDomainSnapshot>,
    flags: c_uint,
    theirs: impl Fn() -> c_int,
) -> c_int {
    on_snapshot(libvirt, snapshot, theirs, || client::delete(snapshot, DeleteFlags::parse(flags)?))
}

/// `ours` for a snapshot that is instantsnap's affair, where this libvirt lets it; else `theirs`.
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
    // Asked for now, because that resets the last error.
    let connection = libvirt.connection_of_snapshot(snapshot);
    match catch(libvirt, ours) {
        Outcome::Done(()) => 0,
        Outcome::Refused(_) | Outcome::Failed => {
            libvirt.dispatch(connection);
            -1
        }
    }
}

/// What came of an operation of instantsnap's.
enum Outcome<T> {
    Done(T),
    /// It has touched nothing, and says why; as libvirt's last error too.
    Refused(String),
    /// It has tried; why it failed is libvirt's last error.
    Failed,
}

fn catch<T>(libvirt: &Libvirt, operation: impl FnOnce() -> Result<T>) -> Outcome<T> {
    libvirt.reset_last_error();
    match caught(operation) {
        Ok(result) => {
            libvirt.reset_last_error(); // a step may have failed that was not needed
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

/// A thread in one of the three functions. What it calls from there is passed on as it is.
struct Inside;

thread_local! {
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

impl Inside {
    /// None where the thread is inside already, or ending.
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
