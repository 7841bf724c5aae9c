// SPDX-License-Identifier: LGPL-2.1-or-later

//! The driver backend: a table of C callbacks as a [`Driver`].

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use once_cell::sync::Lazy;

use super::abi::{self, instantsnap_driver_ops as Ops};
use super::handles::is_handle;
use super::header::{instantsnap_guest, instantsnap_snapshot};
use super::native::{self, GUESTS, SNAPSHOTS, Snapshot};
use super::storage::Hook;
use super::{c_string, last_error};
use crate::backend::driver::{Answer, Driver, Reason, RunState};
use crate::backend::qmp::Switch;
use crate::boundary::{Returned, boundary};
use crate::engine::{Handle, StorageHook};
use crate::error::{Code, DOMAIN, Error, Result, fail};
use crate::libvirt::table::{virDomain, virDomainSnapshot};
use crate::model::flags::{CreateFlags, DeleteFlags, RevertFlags};
use crate::monitor::{Event, Events, json};
use crate::pointers::{In, Malloced, Text};
use crate::sys::lock;

/// The events that drivers have passed on, by the domain's `opaque`.
static PASSED_ON: Lazy<Mutex<HashMap<usize, Weak<Mutex<Events>>>>> = Lazy::new(Mutex::default);
/// This process's own driver.
static REGISTERED: Mutex<Option<Registered>> = Mutex::new(None);

/// A driver that was registered.
#[derive(Clone, Copy)]
struct Registered {
    ops: Ops,
    storage: Option<abi::instantsnap_storage_hook>,
}

// SAFETY: the driver promises that its callbacks can be called from any thread; the pointer is not
// used.
unsafe impl Send for Registered {}

thread_local! {
    static REASON: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// A domain of a driver, with the driver's callbacks.
struct Domain {
    ops: Ops,
    opaque: *mut c_void,
    events: Arc<Mutex<Events>>,
}

// SAFETY: the driver promises that its table's callbacks can be called with `opaque` from any
// thread, one at a time for one operation; neither is used for anything else.
unsafe impl Send for Domain {}
// SAFETY: as above.
unsafe impl Sync for Domain {}

impl Domain {
    fn new(ops: Ops, opaque: *mut c_void) -> Domain {
        let mut domains = lock(&PASSED_ON);
        domains.retain(|_, events| events.strong_count() > 0);
        let known = domains.get(&(opaque as usize)).and_then(Weak::upgrade);
        let events = known.unwrap_or_else(|| {
            let events = Arc::<Mutex<Events>>::default();
            domains.insert(opaque as usize, Arc::downgrade(&events));
            events
        });
        Domain { ops, opaque, events }
    }

    /// Runs a closure that calls a callback ([`callback!`]), with the driver's lock held.
    fn call<T>(&self, call: impl FnOnce(*mut c_void) -> T) -> T {
        REASON.take();
        self.lock();
        let result = call(self.opaque);
        self.unlock();
        result
    }

    fn lock(&self) {
        if let Some(lock) = self.ops.lock {
            // SAFETY: the driver promises that its callbacks can be called; this thread does not
            // hold the driver's lock.
            unsafe { lock(self.opaque) };
        }
    }

    fn unlock(&self) {
        if let Some(unlock) = self.ops.unlock {
            // SAFETY: the driver promises that its callbacks can be called; this thread holds the
            // driver's lock.
            unsafe { unlock(self.opaque) };
        }
    }

    /// Reports the error of one of libvirt's functions to the driver, and keeps it as the thread's
    /// last error. The driver's lock is held again.
    fn report(&self, error: Error) {
        if let Some(report_error) = self.ops.report_error {
            let message = CString::new(error.message.replace('\0', "\\0")).unwrap_or_default();
            // SAFETY: the driver promises that its table's functions can be called; this thread
            // holds its lock, and the message lives for the call.
            unsafe { report_error(self.opaque, error.number(), DOMAIN, message.as_ptr()) };
        }
        last_error::set(error);
    }

    /// Calls a callback that returns 0, or fails.
    fn check(&self, call: impl FnOnce(*mut c_void) -> c_int) -> Answer<()> {
        match self.call(call) {
            0 => Ok(()),
            _ => Err(reason()),
        }
    }

    /// Calls a callback that returns a string; `None` if it returns NULL without a reason.
    fn string(&self, call: impl FnOnce(*mut c_void) -> *mut c_char) -> Answer<Option<String>> {
        let returned = self.call(call);
        // SAFETY: the driver promises that its callback returns NULL or a string of malloc()'s,
        // which is ours.
        match (text_of(&unsafe { Malloced::from_ptr(returned) })?, reason()) {
            (Some(string), _) => Ok(Some(string)),
            (None, reason) if reason.is_empty() => Ok(None),
            (None, reason) => Err(reason),
        }
    }

    fn switches(
        &self,
        switches: &[Switch],
        call: impl FnOnce(*const abi::instantsnap_driver_disk, usize) -> Answer<()>,
    ) -> Answer<()> {
        let strings: std::result::Result<Vec<_>, _> = switches
            .iter()
            .flat_map(|switch| [&switch.disk, &switch.node, &switch.overlay_node, &switch.overlay])
            .map(|text| CString::new(text.as_str()))
            .collect();
        let Ok(strings) = strings else { return Err(": a name holds a NUL".into()) };
        let disk = |strings: &[CString]| abi::instantsnap_driver_disk {
            size: size_of::<abi::instantsnap_driver_disk>(),
            name: strings[0].as_ptr(),
            node: strings[1].as_ptr(),
            overlay_node: strings[2].as_ptr(),
            overlay: strings[3].as_ptr(),
        };
        let disks: Vec<_> = strings.chunks(4).map(disk).collect();
        call(disks.as_ptr(), disks.len())
    }
}

/// The reason that a failed callback has set, as the rest of a sentence.
fn reason() -> Reason {
    REASON.take().map_or_else(String::new, |reason| format!(": {reason}"))
}

/// A string that a callback has returned.
fn text_of(string: &Malloced) -> Answer<Option<String>> {
    string
        .bytes()
        .map(String::from_utf8)
        .transpose()
        .map_err(|_| ": it returned a string that is not UTF-8".into())
}

/// A closure that calls a callback of a table with the table's `opaque`, and with these further
/// arguments.
macro_rules! callback {
    ($function:expr $(, $argument:expr)*) => {
        // SAFETY: the driver promises that each callback of its table can be called as the header
        // says. [`Domain::call`] runs this with the driver's lock held, and the arguments live for
        // the call.
        |opaque| unsafe { $function(opaque $(, $argument)*) }
    };
}

/// A timeout for a callback. It is rounded up, so that a callback that waits for all of it is
/// regarded as late, and not as failed.
fn milliseconds(timeout: Duration) -> c_uint {
    c_uint::try_from(timeout.as_millis() + 1).unwrap_or(c_uint::MAX)
}

fn text_for_c(text: &str) -> Answer<CString> {
    CString::new(text).map_err(|_| ": its argument holds a NUL".into())
}

const MISSING: &str = ": it is NULL";

impl Driver for Domain {
    fn identity(&self) -> usize {
        self.opaque as usize
    }

    fn run(&self, command: &str, fd: Option<BorrowedFd>, timeout: Duration) -> Answer<String> {
        let (monitor, command) = (self.ops.monitor.ok_or(MISSING)?, text_for_c(command)?);
        let fds: Vec<c_int> = fd.iter().map(AsRawFd::as_raw_fd).collect();
        let mut reply = Malloced::NULL;
        let place = (&raw mut reply).cast();
        let result = self.check(callback!(
            monitor,
            command.as_ptr(),
            fds.as_ptr(),
            fds.len(),
            milliseconds(timeout),
            place
        ));
        // A failed callback may have stored a reply too; `reply` frees it.
        let reply = text_of(&reply);
        result.and(reply)?.ok_or_else(|| ": it gave no reply".into())
    }

    fn state(&self) -> Answer<RunState> {
        let state = self.ops.state.ok_or(MISSING)?;
        match self.call(callback!(state)) {
            state if state == abi::INSTANTSNAP_DRIVER_RUNNING as c_int => Ok(RunState::Running),
            state if state == abi::INSTANTSNAP_DRIVER_PAUSED as c_int => Ok(RunState::Paused),
            state if state == abi::INSTANTSNAP_DRIVER_SHUTOFF as c_int => Ok(RunState::Off),
            -1 => Err(reason()),
            state => Err(format!(": it returned {state}, which is not a state")),
        }
    }

    fn domain_xml(&self) -> Answer<String> {
        let domain_xml = self.ops.domain_xml.ok_or(MISSING)?;
        self.string(callback!(domain_xml))?.ok_or_else(|| ": it returned NULL".into())
    }

    fn state_dir(&self) -> Answer<Option<PathBuf>> {
        let Some(state_dir) = self.ops.state_dir else { return Ok(None) };
        let directory = self.string(callback!(state_dir))?;
        match directory {
            None if self.ops.record.is_none() => Err(": it returned NULL".into()),
            directory => Ok(directory.map(PathBuf::from)),
        }
    }

    fn watchdog_socket(&self) -> Option<PathBuf> {
        let guard_socket = self.ops.guard_socket?;
        self.string(callback!(guard_socket)).ok().flatten().map(PathBuf::from)
    }

    fn pause(&self, timeout: Duration) -> Option<Answer<()>> {
        let pause = self.ops.pause?;
        Some(self.check(callback!(pause, milliseconds(timeout))))
    }

    fn resume(&self, timeout: Duration) -> Option<Answer<()>> {
        let resume = self.ops.resume?;
        Some(self.check(callback!(resume, milliseconds(timeout))))
    }

    fn switch_disks(&self, switches: &[Switch], timeout: Duration) -> Option<Answer<()>> {
        let switch_disks = self.ops.switch_disks?;
        Some(self.switches(switches, |disks, count| {
            self.check(callback!(switch_disks, disks, count, milliseconds(timeout)))
        }))
    }

    fn disks_merged(&self, switches: &[Switch]) {
        let Some(disks_merged) = self.ops.disks_merged else { return };
        let _ = self.switches(switches, |disks, count| {
            self.call(callback!(disks_merged, disks, count));
            Ok(())
        });
    }

    fn begin_job(&self) -> Answer<()> {
        let Some(begin_job) = self.ops.begin_job else { return Ok(()) };
        self.check(callback!(begin_job))
    }

    fn end_job(&self) {
        if let Some(end_job) = self.ops.end_job {
            self.call(callback!(end_job));
        }
    }

    fn record(&self, name: &str, xml: &str) -> Answer<()> {
        let (record, name, xml) =
            (self.ops.record.ok_or(MISSING)?, text_for_c(name)?, text_for_c(xml)?);
        self.check(callback!(record, name.as_ptr(), xml.as_ptr()))
    }

    fn forget(&self, name: &str) -> Answer<()> {
        let (forget, name) = (self.ops.forget.ok_or(MISSING)?, text_for_c(name)?);
        self.check(callback!(forget, name.as_ptr()))
    }

    fn snapshot_xml(&self, name: &str) -> Answer<Option<String>> {
        let (snapshot_xml, name) = (self.ops.snapshot_xml.ok_or(MISSING)?, text_for_c(name)?);
        self.string(callback!(snapshot_xml, name.as_ptr()))
    }

    fn current(&self) -> Answer<Option<String>> {
        let Some(current_snapshot) = self.ops.current_snapshot else { return Ok(None) };
        self.string(callback!(current_snapshot))
    }

    fn take_events(&self) -> Vec<Event> {
        lock(&self.events).take()
    }
}

/// Copies a table that has all required callbacks.
fn read_ops(ops: In<Ops>) -> Result<Ops> {
    let Some(ops) = ops.read("ops")? else { fail!(InvalidArg, "ops must not be NULL") };
    let required = [
        ("monitor", ops.monitor.is_some()),
        ("state", ops.state.is_some()),
        ("domain_xml", ops.domain_xml.is_some()),
        ("state_dir (or record)", ops.state_dir.is_some() || ops.record.is_some()),
        ("forget", ops.forget.is_some() || ops.record.is_none()),
        ("snapshot_xml", ops.snapshot_xml.is_some() || ops.record.is_none()),
        ("lock", ops.lock.is_some() || ops.unlock.is_none()),
        ("unlock", ops.unlock.is_some() || ops.lock.is_none()),
    ];
    if let Some((missing, _)) = required.iter().find(|(_, present)| !present) {
        fail!(InvalidArg, "ops->{missing} must not be NULL");
    }
    Ok(ops)
}

/// Copies a table with its storage hook; none if the table is NULL.
fn read_driver(ops: In<Ops>) -> Result<Option<Registered>> {
    if ops.is_null() {
        return Ok(None);
    }
    let ops = read_ops(ops)?;
    // SAFETY: the driver promises that its table's hook is NULL or a structure that begins with its
    // size.
    let hook = Hook::read(unsafe { In::from_ptr(ops.storage_hook) })?;
    hook.as_ref().map_or(Ok(()), Hook::check)?;
    Ok(Some(Registered { ops, storage: hook.map(|hook| hook.0) }))
}

/// `instantsnap_register_driver`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_register_driver(ops: In<abi::instantsnap_driver_ops>) -> c_int {
    boundary(last_error::set, || {
        let driver = read_driver(ops)?;
        let mut registered = lock(&REGISTERED);
        if driver.is_some() && registered.is_some() {
            fail!(OperationInvalid, "a driver is registered already: register NULL first");
        }
        *registered = driver;
        Ok(0)
    })
}

/// Opens a domain by a driver's callbacks. The header says how they are called with `opaque`.
pub fn open(ops: In<Ops>, opaque: *mut c_void) -> Result<Handle> {
    Handle::open_driver(Arc::new(Domain::new(read_ops(ops)?, opaque)))
}

/// `instantsnap_open_driver`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_open_driver(
    ops: In<abi::instantsnap_driver_ops>,
    opaque: *mut c_void,
) -> *mut instantsnap_guest {
    boundary(last_error::set, || Ok(GUESTS.add(open(ops, opaque)?)))
}

/// `instantsnap_driver_set_reason`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_driver_set_reason(reason: Text) {
    boundary(last_error::set, || {
        REASON.set(reason.optional("reason")?.map(str::to_owned));
        Ok(())
    });
}

/// `instantsnap_driver_event`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_driver_event(opaque: *mut c_void, event: Text) {
    boundary(last_error::set, || {
        let event = json::parse(event.required("event")?.as_bytes()).ok();
        let event = event.and_then(|message| Event::read(&message));
        let events = lock(&PASSED_ON).get(&(opaque as usize)).and_then(Weak::upgrade);
        if let (Some(event), Some(events)) = (event, events) {
            lock(&events).keep(event);
        }
        Ok(())
    });
}

/// Whether this process has a driver of its own.
pub fn is_registered() -> bool {
    lock(&REGISTERED).is_some()
}

/// The domain `vm` of the registered driver; none if `vm` is NULL or a handle.
pub fn called(vm: *mut c_void) -> Option<Called> {
    if vm.is_null() || is_handle(vm) {
        return None;
    }
    let Registered { ops, storage } = (*lock(&REGISTERED))?;
    let storage = storage.map(|hook| Hook(abi::instantsnap_storage_hook { opaque: vm, ..hook }));
    Some(Called { domain: Domain::new(ops, vm), storage })
}

/// A domain for which one of libvirt's functions was called.
pub struct Called {
    domain: Domain,
    storage: Option<Hook>,
}

/// Runs the body of one of libvirt's functions, which is called with the driver's lock held.
fn enter<T: Returned>(called: Called, body: impl FnOnce(&Arc<Domain>, &Handle) -> Result<T>) -> T {
    /// Takes the driver's lock again when it is dropped.
    struct Unlocked<'a>(&'a Domain);
    impl Drop for Unlocked<'_> {
        fn drop(&mut self) {
            self.0.lock();
        }
    }

    let Called { domain, storage } = called;
    let domain = Arc::new(domain);
    boundary(
        |error| domain.report(error),
        || {
            domain.unlock();
            let _unlocked = Unlocked(&domain);
            let handle = Handle::open_driver(domain.clone())?;
            handle.set_storage_hook(storage.map(|hook| Arc::new(hook) as Arc<dyn StorageHook>));
            body(&domain, &handle)
        },
    )
}

/// `qemuSnapshotCreateXML` of a registered driver.
pub fn create(
    called: Called,
    domain: *mut virDomain,
    xml: Text,
    bits: c_uint,
) -> *mut virDomainSnapshot {
    enter(called, |driver, handle| {
        let flags = CreateFlags::parse(bits);
        let name = c_string(handle.create(xml.required("xmlDesc")?, flags, None, &mut ())?.name)?;
        let Some(make_snapshot) = driver.ops.make_snapshot else {
            return Ok(SNAPSHOTS.add(Snapshot { name }));
        };
        let snapshot = driver.call(callback!(make_snapshot, domain.cast(), name.as_ptr()));
        if snapshot.is_null() {
            let (name, reason) = (name.to_string_lossy(), reason());
            fail!(
                OperationFailed,
                "the snapshot '{name}' is complete, but the driver has not made an object of \
                 it{reason}"
            );
        }
        Ok(snapshot.cast())
    })
}

/// `qemuSnapshotRevert` of a registered driver.
pub fn revert(called: Called, snapshot: *mut virDomainSnapshot, bits: c_uint) -> c_int {
    enter(called, |driver, handle| {
        let flags = RevertFlags::parse(bits)?;
        let Some(restart) = driver.ops.restart else {
            fail!(
                OperationUnsupported,
                "the driver cannot start a new QEMU for a snapshot: it has no `restart`"
            );
        };
        let name = name_of(driver, snapshot)?;
        handle.revert(&name, flags, |plan| {
            let plan = native::Borrowed::plan(plan)?;
            let restarted = driver.check(callback!(restart, plan.handle()));
            restarted.map_err(|reason| {
                let message = format!(
                    "cannot start QEMU for snapshot '{name}': the driver's callback failed{reason}"
                );
                Error::new(Code::OperationFailed, message)
            })
        })?;
        Ok(0)
    })
}

/// `qemuSnapshotDelete` of a registered driver.
pub fn delete(called: Called, snapshot: *mut virDomainSnapshot, bits: c_uint) -> c_int {
    enter(called, |driver, handle| {
        let flags = DeleteFlags::parse(bits)?;
        let name = name_of(driver, snapshot)?;
        handle.delete(&name, flags).map(|()| 0)
    })
}

/// The name of a snapshot, which is an object of ours or of the driver's.
fn name_of(driver: &Domain, snapshot: *mut virDomainSnapshot) -> Result<String> {
    if snapshot.is_null() || is_handle(snapshot) {
        let snapshot = SNAPSHOTS.get(snapshot.cast::<instantsnap_snapshot>())?;
        return Ok(snapshot.name.to_string_lossy().into_owned());
    }
    let Some(snapshot_name) = driver.ops.snapshot_name else {
        fail!(
            InvalidArg,
            "snapshot is not an object of this library, and the driver has no `snapshot_name`"
        );
    };
    let name = driver.string(callback!(snapshot_name, snapshot.cast()));
    match name {
        Ok(Some(name)) => Ok(name),
        Ok(None) => fail!(OperationFailed, "the driver does not know the snapshot's name"),
        Err(reason) => {
            fail!(OperationFailed, "the driver cannot tell the snapshot's name{reason}")
        }
    }
}
