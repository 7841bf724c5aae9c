//! Instant snapshots for programs that know libvirt only: `LD_PRELOAD=/…/libinstantsnap-preload.so
//! PROGRAM`.
//!
//! The library stands before three functions of `libvirt.so.0`, and passes every call on but these:
//!
//! * `virDomainSnapshotCreateXML` with `VIR_DOMAIN_SNAPSHOT_CREATE_INSTANT` (bit 10) is
//!   instantsnap's. So is, with `INSTANTSNAP_UPGRADE_LIVE=1` in the environment, a LIVE snapshot of
//!   a running QEMU guest with its memory in a file of its own; where instantsnap refuses that one,
//!   it is libvirt's after all, because nobody asked for INSTANT.
//! * `virDomainRevertToSnapshot` and `virDomainSnapshotDelete` of a QEMU guest's snapshot with its
//!   memory in a file are instantsnap's, which has libvirt do it where libvirt can. Not the other
//!   way round: libvirt's refusal would reach the program's error handler (by default a line on
//!   stderr), and some of what it does not refuse does harm.
//!
//! instantsnap itself is opened at the first call that needs it; where it is missing, only calls
//! with bit 10 notice. `docs/preload.md` is for users. Here, [`libvirt`] and [`ours`] hold the
//! functions of the two libraries, found at run time, so that preloading loads neither.

// The boundary, numbers, names and limits are the main library's, from its own files.
#[allow(unused)]
#[path = "../../src/boundary.rs"]
mod boundary;
#[allow(unused)]
#[path = "../../src/error.rs"]
mod error;
#[allow(unused)]
#[path = "../../src/model"]
mod model {
    pub mod flags;
}
#[allow(unused, missing_docs)]
#[path = "../../src/pointers.rs"]
mod pointers;
#[allow(unused)]
#[path = "../../src/symbols.rs"]
mod symbols;
#[path = "../../src/uncancelled.rs"]
mod uncancelled;
#[allow(unused)]
#[path = "../../src/model/upgrade.rs"]
mod upgrade;
#[allow(unused)]
#[path = "../../src/model/xml.rs"]
mod xml;

mod environment;
mod libvirt;
mod ours;
mod request;

use std::cell::Cell;
use std::ffi::{c_int, c_uint};
use std::ptr;

use boundary::{boundary, caught};
use error::Error;
use libvirt::{Domain, Libvirt, OnSnapshot, Snapshot};
use model::flags;
use ours::Ours;
use pointers::Text;

/// libvirt's, and instant with bit 10.
#[unsafe(no_mangle)]
pub extern "C" fn virDomainSnapshotCreateXML(
    domain: Option<&Domain>,
    xml: Text,
    flags: c_uint,
) -> *mut Snapshot {
    boundary(tell, || {
        let Some(libvirt) = Libvirt::get() else { return Ok(ptr::null_mut()) };
        let theirs = || Ok((libvirt.next.virDomainSnapshotCreateXML)(domain, xml, flags));
        let Some(_inside) = Inside::enter() else { return theirs() };

        let asked = flags & flags::INSTANT != 0;
        let is_to_be_upgraded = || Ok(request::is_to_be_upgraded(libvirt, domain, xml, flags));
        if !asked && !caught(is_to_be_upgraded).unwrap_or(false) {
            return theirs();
        }
        // Asked for now, because that resets the last error.
        let connection = libvirt.connection_of_domain(domain);
        let instant =
            |ours: &Ours| (ours.qemuSnapshotCreateXML)(domain, None, xml, flags | flags::INSTANT);
        match attempt(libvirt, instant, |snapshot| !snapshot.is_null()) {
            Outcome::Done(snapshot) => Ok(snapshot),
            Outcome::Refused(why) if !asked => {
                environment::debug(&format!("a LIVE snapshot stays libvirt's own: {why}"));
                theirs()
            }
            Outcome::Refused(_) | Outcome::Failed => {
                libvirt.dispatch(connection);
                Ok(ptr::null_mut())
            }
        }
    })
}

/// libvirt's, or instantsnap's where libvirt cannot.
#[unsafe(no_mangle)]
pub extern "C" fn virDomainRevertToSnapshot(snapshot: Option<&Snapshot>, flags: c_uint) -> c_int {
    boundary(tell, || {
        let Some(libvirt) = Libvirt::get() else { return Ok(-1) };
        let theirs = libvirt.next.virDomainRevertToSnapshot;
        Ok(on_snapshot(libvirt, snapshot, flags, theirs, |ours| ours.qemuSnapshotRevert))
    })
}

/// libvirt's, or instantsnap's where libvirt cannot.
#[unsafe(no_mangle)]
pub extern "C" fn virDomainSnapshotDelete(snapshot: Option<&Snapshot>, flags: c_uint) -> c_int {
    boundary(tell, || {
        let Some(libvirt) = Libvirt::get() else { return Ok(-1) };
        let theirs = libvirt.next.virDomainSnapshotDelete;
        Ok(on_snapshot(libvirt, snapshot, flags, theirs, |ours| ours.qemuSnapshotDelete))
    })
}

/// Makes an error, of which libvirt knows nothing yet, the thread's last one there.
fn tell(error: Error) {
    if let Some(libvirt) = Libvirt::get() {
        libvirt.set_last_error(&error);
    }
}

/// `mine` for a snapshot that is instantsnap's affair, if it is there; else `theirs`.
fn on_snapshot(
    libvirt: &Libvirt,
    snapshot: Option<&Snapshot>,
    flags: c_uint,
    theirs: OnSnapshot,
    mine: fn(&Ours) -> ours::OnSnapshot,
) -> c_int {
    let theirs = || theirs(snapshot, flags);
    let Some(_inside) = Inside::enter() else { return theirs() };
    if !caught(|| Ok(request::is_with_memory(libvirt, snapshot))).unwrap_or(false) {
        return theirs();
    }
    if let Err(error) = caught(Ours::get) {
        environment::debug(&format!("this is left to libvirt: {error}"));
        return theirs();
    }
    // Asked for now, because that resets the last error.
    let connection = libvirt.connection_of_snapshot(snapshot);
    let call = |ours: &Ours| mine(ours)(None, snapshot, flags);
    match attempt(libvirt, call, |result| *result >= 0) {
        Outcome::Done(result) => result,
        Outcome::Refused(_) | Outcome::Failed => {
            libvirt.dispatch(connection);
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
fn attempt<T>(
    libvirt: &Libvirt,
    call: impl FnOnce(&Ours) -> T,
    good: impl FnOnce(&T) -> bool,
) -> Outcome<T> {
    libvirt.reset_last_error();
    let result = caught(|| {
        let ours = Ours::get()?;
        let result = call(ours);
        if good(&result) { Ok(result) } else { Err(ours.last_error()) }
    });
    match result {
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
