// SPDX-License-Identifier: LGPL-2.1-or-later

//! The library inside a stock libvirt daemon. The driver calls the functions here with its own
//! domain object as `vm`. The next definition of the symbol is the driver's own function.
//!
//! Without INSTANT, the driver's function is called, with the same arguments. With INSTANT, the
//! domain object is unlocked, and the snapshot is taken as a client takes it ([`client`]), on the
//! given domain: in the daemon its connection is the driver, and libvirt's public functions run in
//! the thread that calls them. The driver's callers of these functions unlock the object next, and
//! do nothing else with it; they hold no job. They have checked the client's permission for this
//! snapshot, and nothing else is done here: the steps of the snapshot run with the daemon's own
//! identity ([`daemon::Itself`]).
//!
//! A driver that does not know the flag may refuse it earlier. So [`dispatcher`] removes the flag
//! before that, and notes it.
//!
//! In a daemon of an unknown version, every call goes to the driver's own function.

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
use crate::environment;
use crate::loading;

/// Whether this process is a daemon of libvirt's: it has a daemon's name, or libvirt's clients
/// connect to it. A program that embeds libvirt's driver is no daemon.
pub fn is_here() -> bool {
    static IS_HERE: OnceLock<bool> = OnceLock::new();
    *IS_HERE.get_or_init(|| loading::has_daemons_name() || daemon::is_listening())
}

/// Handles `qemuSnapshotCreateXML`. `theirs` is the driver's own function.
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
            // An undo may have to merge an overlay that the client has made, with the daemon's
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
        take(&domain, connector, xml, flags, environment::image_format()?).map(Some)
    });
    match result {
        Ok(Some(snapshot)) => Ok(snapshot.into_raw()),
        // The client has not asked for INSTANT.
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

/// Unlocks the driver's domain object until the result is dropped.
fn unlocked(daemon: &'static Daemon, vm: NonNull<c_void>) -> Unlocked {
    // SAFETY: the driver calls these functions with its live domain object, which it has locked,
    // and unlocks as the next thing.
    unsafe { daemon.unlocked(vm) }
}

/// Handles `qemuSnapshotRevert`. A snapshot that the library supports is reverted to by the
/// library, which lets libvirt do it if that works and does no harm.
pub fn revert(
    vm: NonNull<c_void>,
    snapshot: Option<&virDomainSnapshot>,
    bits: c_uint,
    theirs: impl Fn() -> c_int,
) -> c_int {
    // The driver itself reports invalid flags.
    let ours = RevertFlags::parse(bits).ok().map(Operation::Revert);
    boundary(failed, || on_snapshot(vm, snapshot, theirs, ours))
}

/// Handles `qemuSnapshotDelete` in the same way.
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
            // On an error the snapshot is left to libvirt.
            ManagedSnapshot::of(&snapshot).ok().flatten()
        };
        // The files that its record names are removed, merged and restored with the daemon's
        // rights, and a client can write that record (REDEFINE). So this check runs with the
        // client's identity.
        let Some(managed) = managed.filter(|managed| managed.callers_domain().may_be_changed())
        else {
            return Ok(false);
        };
        let _itself = daemon.itself();
        let _job = queue::Job::begin(managed.domain.uuid(), DEFAULT_TIMEOUT)?;
        match hold_unless_it_is_a_step(managed, ours)? {
            Some(held) => held.run(ours).map(|()| true),
            // This is a step of an operation of a client that has the library too.
            None => Ok(false),
        }
    });
    Ok(if result? { 0 } else { theirs() })
}

/// The daemon in this process. `None` if the current call is a step of one of our own.
fn the_daemon() -> Option<&'static Daemon> {
    if daemon::is_in_a_call() {
        return None;
    }
    availability::found().ok()
}
