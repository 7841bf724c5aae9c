// SPDX-License-Identifier: LGPL-2.1-or-later

//! Inside a stock libvirt daemon: its driver calls with its own object as `vm`, and the next
//! definition of the symbol is the driver's own function.
//!
//! Without INSTANT that function is called, with the same arguments. With it, the domain object is
//! let go of, and the snapshot taken as a client takes it ([`client`]), on the domain that was
//! given: in the daemon its connection is the driver, and libvirt's public functions run in the
//! thread that calls them. The driver's callers of these functions let go of the object next, and
//! do nothing else with it; no job is held. What they allowed the client to do is this snapshot,
//! and we do nothing else: its steps are taken in the daemon's own name ([`daemon::Itself`]).
//!
//! A driver that does not know the flag may refuse it before: [`dispatcher`] takes it off before
//! that, and notes it.
//!
//! Where this daemon is not one that we know, everything is the driver's own function's.

mod availability;
pub mod dispatcher;
mod imports;
mod limit;
mod queue;
mod settings;

use std::ffi::{c_int, c_uint, c_void};
use std::ptr::NonNull;
use std::sync::OnceLock;

use instantsnap_core::backend::{DEFAULT_TIMEOUT, LibvirtConnector};
use instantsnap_core::boundary::boundary;
use instantsnap_core::client::{catch, share_domain, share_snapshot, take};
use instantsnap_core::engine::{ManagedSnapshot, Operation, hold_unless_it_is_a_step};
use instantsnap_core::error::{Result, fail};
use instantsnap_core::libvirt::daemon::{self, Daemon, Priority, Unlocked, log};
use instantsnap_core::libvirt::table::{virDomain, virDomainSnapshot};
use instantsnap_core::model::flags::{self, CreateFlags, DeleteFlags, RevertFlags};
use instantsnap_core::model::upgrade;
use instantsnap_core::pointers::Text;

use self::availability::failed;
use self::settings::Settings;
use crate::loading;

/// Whether this process is a daemon of libvirt's: by its name, or because libvirt's clients connect
/// to it. A program that embeds libvirt's driver is none.
pub fn is_here() -> bool {
    static IS_HERE: OnceLock<bool> = OnceLock::new();
    *IS_HERE.get_or_init(|| loading::has_daemons_name() || daemon::is_listening())
}

/// `qemuSnapshotCreateXML`; the driver's own is `theirs`.
pub fn create(
    vm: NonNull<c_void>,
    domain: Option<&virDomain>,
    xml: Text,
    bits: c_uint,
    theirs: impl Fn() -> *mut virDomainSnapshot,
) -> *mut virDomainSnapshot {
    boundary(failed, || create_or(vm, domain, xml, bits, theirs))
}

fn create_or(
    vm: NonNull<c_void>,
    domain: Option<&virDomain>,
    xml: Text,
    bits: c_uint,
    theirs: impl Fn() -> *mut virDomainSnapshot,
) -> Result<*mut virDomainSnapshot> {
    let noted = dispatcher::take(domain);
    let asked = noted.is_some() || bits & flags::INSTANT != 0;
    if !(asked || flags::is_only_live(bits) && Settings::get().upgrade_live) {
        return Ok(theirs());
    }
    let Some(daemon) = noted.or_else(the_daemon) else { return Ok(theirs()) };
    let result = catch(|table| {
        let (domain, xml) = (share_domain(table, domain)?, xml.required("xmlDesc")?);
        if !asked && !upgrade::memory_goes_to_a_file(xml) {
            return Ok(None);
        }
        let flags = CreateFlags::parse(bits | flags::INSTANT)?;
        if flags.reuses_overlays() {
            // An undo could have to merge an overlay of the client's own making, with the daemon's
            // rights.
            fail!(
                OperationUnsupported,
                "VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT is not for instant snapshots inside the \
                 daemon"
            );
        }
        let _job = limit::Job::begin(Settings::get().max_jobs)?;
        let _itself = daemon.itself();
        let _unlocked = unlocked(daemon, vm);
        if !asked && domain.is_active() != Ok(true) {
            return Ok(None);
        }
        let connector = LibvirtConnector::inside(domain.clone())?;
        take(&domain, connector, xml, flags).map(Some)
    });
    match result {
        Ok(Some(snapshot)) => Ok(snapshot.into_raw()),
        // Nobody has asked for INSTANT.
        Ok(None) => Ok(theirs()),
        Err(error)
            if !asked && (upgrade::is_refusal(error.number()) || limit::is_refusal(&error)) =>
        {
            log(Priority::Info, &format!("a LIVE snapshot stays libvirt's own: {error}"));
            Ok(theirs())
        }
        Err(error) => Err(error),
    }
}

/// The driver's own object without its lock, until what is returned is dropped.
fn unlocked(daemon: &'static Daemon, vm: NonNull<c_void>) -> Unlocked {
    // SAFETY: the driver calls these functions with its live domain object, which it has locked,
    // and unlocks as the next thing.
    unsafe { daemon.unlocked(vm) }
}

/// `qemuSnapshotRevert`: of a snapshot that is our affair too, by libvirt where that works and does
/// no harm.
pub fn revert(
    vm: NonNull<c_void>,
    snapshot: Option<&virDomainSnapshot>,
    bits: c_uint,
    theirs: impl Fn() -> c_int,
) -> c_int {
    // What the flags are to the driver it says itself.
    let ours = RevertFlags::parse(bits).ok().map(Operation::Revert);
    boundary(failed, || on_snapshot(vm, snapshot, theirs, ours))
}

/// `qemuSnapshotDelete`, likewise.
pub fn delete(
    vm: NonNull<c_void>,
    snapshot: Option<&virDomainSnapshot>,
    bits: c_uint,
    theirs: impl Fn() -> c_int,
) -> c_int {
    let ours = DeleteFlags::parse(bits).ok().map(Operation::Delete);
    boundary(failed, || on_snapshot(vm, snapshot, theirs, ours))
}

fn on_snapshot(
    vm: NonNull<c_void>,
    snapshot: Option<&virDomainSnapshot>,
    theirs: impl Fn() -> c_int,
    ours: Option<Operation>,
) -> Result<c_int> {
    let (Some(ours), Some(daemon)) = (ours, the_daemon()) else { return Ok(theirs()) };
    let result = catch(|table| {
        let _unlocked = unlocked(daemon, vm);
        let snapshot = share_snapshot(table, snapshot)?;
        let managed = {
            let _itself = daemon.itself();
            // An error: nothing is known of it.
            ManagedSnapshot::of(&snapshot).ok().flatten()
        };
        // The files that its record names are removed, merged and restored with the daemon's
        // rights, and a client can write that record (REDEFINE). Asked in that client's name.
        let Some(managed) = managed.filter(|managed| managed.callers_domain().may_be_changed())
        else {
            return Ok(false);
        };
        let _itself = daemon.itself();
        let _job = queue::Job::begin(managed.domain.uuid(), DEFAULT_TIMEOUT)?;
        match hold_unless_it_is_a_step(managed, ours)? {
            Some(held) => held.run(ours).map(|()| true),
            // A client that has the library too: this is a step of what it does.
            None => Ok(false),
        }
    });
    Ok(if result? { 0 } else { theirs() })
}

/// The daemon that this process is, for a call that is not a step of another one of ours.
fn the_daemon() -> Option<&'static Daemon> {
    if daemon::is_in_a_call() {
        return None;
    }
    availability::found().ok()
}
