//! Instant snapshots for programs that know libvirt only: `LD_PRELOAD=/…/libinstantsnap-preload.so PROGRAM`.
//!
//! The library stands before three functions of `libvirt.so.0`, and passes every call on but these:
//!
//! * `virDomainSnapshotCreateXML` with `VIR_DOMAIN_SNAPSHOT_CREATE_INSTANT` (bit 10) is instantsnap's. So is, with
//!   `INSTANTSNAP_UPGRADE_LIVE=1` in the environment, a LIVE snapshot of a running QEMU guest with its memory in a file of its
//!   own; where instantsnap refuses that one, it is libvirt's after all, because nobody asked for INSTANT.
//! * `virDomainRevertToSnapshot` and `virDomainSnapshotDelete` of a QEMU guest's snapshot with its memory in a file are
//!   instantsnap's, which has libvirt do it where libvirt can. Not the other way round: libvirt's refusal would reach the
//!   program's error handler (by default a line on stderr), and some of what it does not refuse does harm.
//!
//! instantsnap itself is opened at the first call that needs it; where it is missing, only calls with bit 10 notice.
//! `docs/preload.md` is for users. Here, [`libvirt`] and [`ours`] hold the functions of the two libraries, found at run time,
//! so that preloading loads neither.

// Numbers, names and limits are the main library's, from its own files.
#[allow(unused)]
#[path = "../../src/error.rs"]
mod error;
#[allow(unused)]
#[path = "../../src/flags.rs"]
mod flags;
#[path = "../../src/uncancelled.rs"]
mod uncancelled;
#[allow(unused)]
#[path = "../../src/snapshot/upgrade.rs"]
mod upgrade;
#[allow(unused)]
#[path = "../../src/snapshot/xml.rs"]
mod xml;

mod environment;
mod libvirt;
mod ours;
mod request;

use std::cell::Cell;
use std::ffi::{c_char, c_int, c_uint};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

use error::{Code, Error, Result};
use libvirt::{Domain, Libvirt, OnSnapshot, Snapshot};
use ours::Ours;
use uncancelled::Uncancelled;

/// libvirt's, and instant with bit 10.
///
/// # Safety
/// As of libvirt's own.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn virDomainSnapshotCreateXML(
    domain: *mut Domain,
    xml: *const c_char,
    flags: c_uint,
) -> *mut Snapshot {
    let _uncancelled = Uncancelled::enter();
    let Some(libvirt) = Libvirt::get() else { return ptr::null_mut() };
    // SAFETY: the arguments are those of a call of this very function.
    let theirs = || unsafe { (libvirt.virDomainSnapshotCreateXML)(domain, xml, flags) };
    let Some(_inside) = Inside::enter() else { return theirs() };

    let asked = flags & flags::INSTANT != 0;
    // SAFETY: by the caller's promise.
    if !asked && !guarded(|| unsafe { request::is_to_be_upgraded(libvirt, domain, xml, flags) }).unwrap_or(false) {
        return theirs();
    }
    // SAFETY: by the caller's promise. Asked for now, because that resets the last error.
    let connection = unsafe { libvirt.connection_of_domain(domain) };
    // SAFETY: without a driver's own object this function is for what a client has.
    let instant = |ours: &Ours| unsafe { (ours.create)(domain, ptr::null_mut(), xml, flags | flags::INSTANT) };
    match attempt(libvirt, instant, |snapshot| !snapshot.is_null()) {
        Outcome::Done(snapshot) => snapshot,
        Outcome::Refused(why) if !asked => {
            environment::debug(&format!("a LIVE snapshot stays libvirt's own: {why}"));
            theirs()
        }
        Outcome::Refused(_) | Outcome::Failed => {
            // SAFETY: the domain's connection, which lives as long as the domain.
            unsafe { libvirt.dispatch(connection) };
            ptr::null_mut()
        }
    }
}

/// libvirt's, or instantsnap's where libvirt cannot.
///
/// # Safety
/// As of libvirt's own.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn virDomainRevertToSnapshot(snapshot: *mut Snapshot, flags: c_uint) -> c_int {
    let _uncancelled = Uncancelled::enter();
    let Some(libvirt) = Libvirt::get() else { return -1 };
    // SAFETY: by the caller's promise.
    unsafe { on_snapshot(libvirt, snapshot, flags, libvirt.virDomainRevertToSnapshot, |ours| ours.revert) }
}

/// libvirt's, or instantsnap's where libvirt cannot.
///
/// # Safety
/// As of libvirt's own.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn virDomainSnapshotDelete(snapshot: *mut Snapshot, flags: c_uint) -> c_int {
    let _uncancelled = Uncancelled::enter();
    let Some(libvirt) = Libvirt::get() else { return -1 };
    // SAFETY: by the caller's promise.
    unsafe { on_snapshot(libvirt, snapshot, flags, libvirt.virDomainSnapshotDelete, |ours| ours.delete) }
}

/// `mine` for a snapshot that is instantsnap's affair, if it is there; else `theirs`.
///
/// # Safety
/// As of `theirs`.
unsafe fn on_snapshot(
    libvirt: &Libvirt,
    snapshot: *mut Snapshot,
    flags: c_uint,
    theirs: OnSnapshot,
    mine: fn(&Ours) -> ours::OnSnapshot,
) -> c_int {
    // SAFETY: the arguments are those of a call of this very function.
    let theirs = || unsafe { theirs(snapshot, flags) };
    let Some(_inside) = Inside::enter() else { return theirs() };
    // SAFETY: by the caller's promise.
    if !guarded(|| unsafe { request::is_with_memory(libvirt, snapshot) }).unwrap_or(false) {
        return theirs();
    }
    if let Err(error) = guarded(Ours::get).and_then(|ours| ours) {
        environment::debug(&format!("this is left to libvirt: {error}"));
        return theirs();
    }
    // SAFETY: libvirt has given the snapshot's XML, so it is one. Asked for now, because that resets the last error.
    let connection = unsafe { libvirt.connection_of_snapshot(snapshot) };
    // SAFETY: without a driver's own object these functions are for what a client has.
    let call = |ours: &Ours| unsafe { mine(ours)(ptr::null_mut(), snapshot, flags) };
    match attempt(libvirt, call, |result| *result >= 0) {
        Outcome::Done(result) => result,
        Outcome::Refused(_) | Outcome::Failed => {
            // SAFETY: the snapshot's connection, which lives as long as the snapshot.
            unsafe { libvirt.dispatch(connection) };
            -1
        }
    }
}

/// What came of a call of instantsnap.
enum Outcome<T> {
    Done(T),
    /// It has touched nothing, and says why; as libvirt's last error too.
    Refused(String),
    /// It has tried; why it failed is libvirt's last error.
    Failed,
}

/// A call of instantsnap, which returns something `good`, or has failed.
fn attempt<T>(libvirt: &Libvirt, call: impl FnOnce(&Ours) -> T, good: impl FnOnce(&T) -> bool) -> Outcome<T> {
    libvirt.reset_last_error();
    let result = guarded(|| {
        let ours = Ours::get()?;
        let result = call(ours);
        if good(&result) { Ok(result) } else { Err(ours.last_error()) }
    });
    match result.and_then(|result| result) {
        Ok(result) => {
            libvirt.reset_last_error(); // a step may have failed that was not needed
            return Outcome::Done(result);
        }
        // It has made this libvirt's last error itself.
        Err(_) if libvirt.last_error().is_some() => {}
        Err(error) => libvirt.set_last_error(&error),
    }
    match libvirt.last_error() {
        Some(error) if upgrade::is_refusal(error.code) => Outcome::Refused(error.message),
        _ => Outcome::Failed,
    }
}

/// Keeps a panic, which is a defect of this library's, from the program.
fn guarded<T>(body: impl FnOnce() -> T) -> Result<T> {
    catch_unwind(AssertUnwindSafe(body))
        .map_err(|_| Error::new(Code::InternalError, "a defect of libinstantsnap-preload.so, please report it"))
}

/// A thread in one of the three functions. What it calls from there is passed on as it is.
struct Inside;

thread_local! {
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

impl Inside {
    /// None where the thread is inside already, or ending.
    fn enter() -> Option<Inside> {
        INSIDE.try_with(|inside| !inside.replace(true)).is_ok_and(|entered| entered).then_some(Inside)
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        let _ = INSIDE.try_with(|inside| inside.set(false));
    }
}
