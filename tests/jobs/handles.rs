// SPDX-License-Identifier: LGPL-2.1-or-later

//! Jobs by the C API: handles, structures that can grow, and a callback with its pointer. In a
//! forked child the parent's jobs cannot be used.

use std::ffi::{CStr, CString, c_int, c_void};
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::Mutex;

use common::{INSTANTLY, Opened, machine, named};
use instantsnap::error::Code;
use instantsnap::ffi::abi::{
    self, instantsnap_create_options, instantsnap_event, instantsnap_job_info,
};
use instantsnap::ffi::header::{instantsnap_guest, instantsnap_job};
use instantsnap::ffi::{job, native};
use instantsnap::pointers::{Fill, In, Out, Text};
use instantsnap_testkit::{Binary, DEADLINE, Gate, test, wait_for};

use abi::{
    INSTANTSNAP_CREATE_AT_ONCE, INSTANTSNAP_EVENT_COMPLETE, INSTANTSNAP_EVENT_FAILED,
    INSTANTSNAP_EVENT_INSTANT, INSTANTSNAP_EVENT_PAUSED, INSTANTSNAP_EVENT_PROGRESS,
    INSTANTSNAP_EVENT_SWITCHED, INSTANTSNAP_PHASE_ENDED,
};

/// A guest that is opened by the C API.
struct Native {
    guest: *mut instantsnap_guest,
    opened: Opened,
}

impl Native {
    fn start() -> Native {
        let opened = Opened::start(&machine(&Binary::all()[0], 1));
        let text = |path: &std::path::Path| CString::new(path.to_str().unwrap()).unwrap();
        let (socket, state) = (text(&opened.guest.qmp()), text(&opened.state_dir()));
        let guest =
            native::instantsnap_open_qmp(Text::from(&socket), Text::NULL, Text::from(&state));
        assert!(!guest.is_null());
        Native { guest, opened }
    }

    fn start_job(
        &self,
        name: &str,
        options: *const instantsnap_create_options,
    ) -> *mut instantsnap_job {
        let xml = CString::new(named(name)).unwrap();
        // SAFETY: the test passes valid options.
        let options = unsafe { In::from_ptr(options) };
        job::instantsnap_snapshot_create_start(self.guest, Text::from(&xml), INSTANTLY, options)
    }

    fn create(&self, name: &str, options: *const instantsnap_create_options) -> c_int {
        let xml = CString::new(named(name)).unwrap();
        // SAFETY: as above.
        let options = unsafe { In::from_ptr(options) };
        job::instantsnap_snapshot_create(
            self.guest,
            Text::from(&xml),
            INSTANTLY,
            options,
            Out::from(None),
        )
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        native::instantsnap_close(self.guest);
    }
}

fn options(flags: u32) -> instantsnap_create_options {
    instantsnap_create_options {
        size: size_of::<instantsnap_create_options>(),
        callback: None,
        opaque: ptr::null_mut(),
        progress_interval_ms: 0,
        flags,
        image_format: 0,
        zstd_level: 0,
    }
}

fn event() -> instantsnap_event {
    instantsnap_event { size: size_of::<instantsnap_event>(), ..instantsnap_event::default() }
}

fn last_error() -> (c_int, String) {
    // SAFETY: the pointer is never NULL, and valid until this thread's next call.
    let (error, message) = unsafe {
        let error = *native::instantsnap_last_error();
        (error, CStr::from_ptr(error.message))
    };
    (error.code, message.to_str().unwrap().to_owned())
}

#[track_caller]
fn assert_refused(failed: bool, code: Code, part: &str) {
    let (number, message) = last_error();
    assert!(
        failed && number == code as c_int && message.contains(part),
        "{failed} {number} {message}"
    );
}

fn text(string: *mut std::ffi::c_char) -> Option<String> {
    if string.is_null() {
        return None;
    }
    // SAFETY: the library has allocated the string, and it is freed here.
    unsafe {
        let text = CStr::from_ptr(string).to_str().unwrap().to_owned();
        native::instantsnap_free_string(native::Given::from_ptr(string));
        Some(text)
    }
}

/// Calls every function of the API on a job. Returns each function's name, result and error code.
fn call_all(handle: *mut instantsnap_job) -> Vec<(&'static str, c_int, c_int)> {
    let mut calls = Vec::new();
    let mut note = |what, result| calls.push((what, result, last_error().0));
    let mut info =
        instantsnap_job_info { size: size_of::<instantsnap_job_info>(), ..Default::default() };
    let mut stats =
        abi::instantsnap_stats { size: size_of::<abi::instantsnap_stats>(), ..Default::default() };
    let null = |string: *mut std::ffi::c_char| if text(string).is_some() { 0 } else { -1 };
    note("wait", job::instantsnap_job_wait(handle, -1));
    note("get_fd", job::instantsnap_job_get_fd(handle));
    // SAFETY: each pointer is to a live structure of the size that it names.
    unsafe {
        let mut event = event();
        note("next_event", job::instantsnap_job_next_event(handle, Fill::from_ptr(&raw mut event)));
        note("get_info", job::instantsnap_job_get_info(handle, Fill::from_ptr(&raw mut info)));
        note("get_stats", job::instantsnap_job_get_stats(handle, Fill::from_ptr(&raw mut stats)));
    }
    note("get_result", job::instantsnap_job_get_result(handle));
    note("get_name", null(job::instantsnap_job_get_name(handle)));
    note("get_xml", null(job::instantsnap_job_get_xml(handle)));
    note("cancel", job::instantsnap_job_cancel(handle));
    job::instantsnap_job_free(handle);
    note("free", -1);
    calls
}

#[track_caller]
fn assert_all_fail(handle: *mut instantsnap_job, code: Code) {
    let skipped = handle.is_null();
    for (what, result, error) in call_all(handle) {
        // NULL can be freed.
        assert!(
            skipped && what == "free" || result == -1 && error == code as c_int,
            "{what}: {result}, error {error}"
        );
    }
}

#[test]
fn invalid_job_handles_are_refused() {
    assert_all_fail(ptr::null_mut(), Code::InvalidArg);
    assert_all_fail(12345 as *mut instantsnap_job, Code::InvalidArg);
    let native = Native::start();
    assert_all_fail(native.guest.cast(), Code::InvalidArg);
    let handle = native.start_job("s", ptr::null());
    assert_eq!(job::instantsnap_job_wait(handle, -1), 1);
    job::instantsnap_job_free(handle);
    assert_all_fail(handle, Code::InvalidArg);
}

/// A structure of a later version, which has one more field.
#[repr(C)]
struct Later<T> {
    known: T,
    newer: u64,
}

#[test]
fn options_of_other_versions_are_accepted() {
    let native = Native::start();
    let mut small = options(0);
    small.size -= 4;
    for size in [0, small.size, usize::MAX] {
        small.size = size;
        assert_refused(
            native.start_job("s", &raw const small).is_null(),
            Code::InvalidArg,
            "options->size",
        );
        assert_refused(
            native.create("s", &raw const small) == -1,
            Code::InvalidArg,
            "options->size",
        );
    }
    let mut later = Later { known: options(0), newer: 1 };
    later.known.size = size_of_val(&later);
    let seen = (&raw const later).cast();
    assert_refused(
        native.start_job("s", seen).is_null(),
        Code::InvalidArg,
        "newer than this version",
    );
    let unknown = options(1 << 7);
    assert_refused(native.start_job("s", &raw const unknown).is_null(), Code::InvalidArg, "0x80");
    let at_once = options(INSTANTSNAP_CREATE_AT_ONCE);
    assert_refused(native.create("s", &raw const at_once) == -1, Code::InvalidArg, "AT_ONCE");

    later.newer = 0;
    let handle = native.start_job("s", (&raw const later).cast());
    assert_eq!(job::instantsnap_job_wait(handle, -1), 1);
    // The library fills the rest of an event with zeros. An event that does not fit stays in the
    // queue.
    let mut small = instantsnap_event { size: 8, ..event() };
    // SAFETY: the structure is larger than its size field says.
    let result = unsafe { job::instantsnap_job_next_event(handle, Fill::from_ptr(&raw mut small)) };
    assert_refused(result == -1, Code::InvalidArg, "event->size");
    let mut event = Later { known: event(), newer: 7 };
    event.known.size = size_of_val(&event);
    // SAFETY: the structure has the size that its size field says.
    let place = unsafe { Fill::from_ptr((&raw mut event).cast()) };
    assert_eq!(job::instantsnap_job_next_event(handle, place), 1);
    assert_eq!((event.known.r#type, event.newer), (INSTANTSNAP_EVENT_PAUSED, 0));
    assert_eq!(event.known.size, size_of_val(&event), "the size is the caller's");
    job::instantsnap_job_free(handle);
}

/// The data behind a callback's `opaque` pointer.
#[derive(Default)]
struct Told {
    events: Mutex<Vec<instantsnap_event>>,
    /// The callback waits here at the instant.
    gate: Gate,
    /// The job, once it is started. The callback of the last event then asks for its result.
    job: Mutex<Option<usize>>,
    result: Mutex<Option<c_int>>,
    signals_blocked: Mutex<bool>,
}

unsafe extern "C" fn tell(event: *const instantsnap_event, opaque: *mut c_void) {
    // SAFETY: `opaque` is the test's own data, which it keeps until the last event.
    let (event, told) = unsafe { (*event, &*opaque.cast::<Told>()) };
    told.events.lock().unwrap().push(event);
    if event.r#type == INSTANTSNAP_EVENT_INSTANT {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: this only reads this thread's signal mask.
        let blocked = unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, ptr::null(), set.as_mut_ptr());
            libc::sigismember(set.as_ptr(), libc::SIGTERM) == 1
        };
        *told.signals_blocked.lock().unwrap() = blocked;
        told.gate.pass();
    }
    if [INSTANTSNAP_EVENT_COMPLETE, INSTANTSNAP_EVENT_FAILED].contains(&event.r#type)
        && let Some(handle) = *told.job.lock().unwrap()
    {
        *told.result.lock().unwrap() =
            Some(job::instantsnap_job_get_result(handle as *mut instantsnap_job));
    }
}

fn types(told: &Told) -> Vec<u32> {
    let events = told.events.lock().unwrap();
    let types = events.iter().map(|event| event.r#type);
    types.filter(|what| *what != INSTANTSNAP_EVENT_PROGRESS).collect()
}

const ALL: [u32; 4] = [
    INSTANTSNAP_EVENT_PAUSED,
    INSTANTSNAP_EVENT_SWITCHED,
    INSTANTSNAP_EVENT_INSTANT,
    INSTANTSNAP_EVENT_COMPLETE,
];

#[test]
fn callback_receives_every_event_with_its_opaque_pointer() {
    let native = Native::start();
    let told = Told::default();
    let opaque = (&raw const told).cast_mut().cast();
    let options = instantsnap_create_options {
        callback: Some(tell),
        opaque,
        ..options(INSTANTSNAP_CREATE_AT_ONCE)
    };
    let handle = native.start_job("s", &raw const options);
    *told.job.lock().unwrap() = Some(handle as usize);
    assert!(told.gate.wait_arrived(DEADLINE));
    assert_eq!(job::instantsnap_job_wait(handle, 0), 0);
    assert_refused(
        job::instantsnap_job_get_result(handle) == -1,
        Code::OperationInvalid,
        "still being taken",
    );
    told.gate.release();
    assert_eq!(job::instantsnap_job_wait(handle, -1), 1);

    assert_eq!(types(&told), ALL);
    assert!(
        told.events
            .lock()
            .unwrap()
            .iter()
            .all(|event| event.size == size_of::<instantsnap_event>())
    );
    assert!(
        *told.signals_blocked.lock().unwrap(),
        "no handler of the caller's runs in the job's thread"
    );
    assert_eq!(*told.result.lock().unwrap(), Some(0), "the end is known when it is told");
    assert_eq!(text(job::instantsnap_job_get_name(handle)).as_deref(), Some("s"));
    assert!(text(job::instantsnap_job_get_xml(handle)).unwrap().contains("<name>s</name>"));
    let mut info =
        instantsnap_job_info { size: size_of::<instantsnap_job_info>(), ..Default::default() };
    // SAFETY: the structure has the size that its size field says.
    let place = unsafe { Fill::from_ptr(&raw mut info) };
    assert_eq!(job::instantsnap_job_get_info(handle, place), 0);
    assert_eq!((info.phase, info.instant), (INSTANTSNAP_PHASE_ENDED, 1));
    assert_eq!(info.bytes_done, told.events.lock().unwrap().last().unwrap().bytes_done);
    job::instantsnap_job_free(handle);

    // The same on the caller's own thread, whose signals the library does not block.
    told.events.lock().unwrap().clear();
    *told.job.lock().unwrap() = None;
    let blocking = instantsnap_create_options { flags: 0, ..options };
    assert_eq!(native.create("t", &raw const blocking), 0);
    assert_eq!(types(&told), ALL);
    assert!(!*told.signals_blocked.lock().unwrap());
    assert_eq!(native.create("t", &raw const blocking), -1);
    let last = *told.events.lock().unwrap().last().unwrap();
    assert_eq!(
        (last.r#type, last.error_code),
        (INSTANTSNAP_EVENT_FAILED, Code::OperationInvalid as i32)
    );
}

#[test]
fn job_continues_after_its_handle_and_guest_are_freed() {
    let native = Native::start();
    // The data is leaked because nothing tells when the callback has returned for the last time.
    let told: &Told = Box::leak(Box::default());
    let opaque = ptr::from_ref(told).cast_mut().cast();
    let options = instantsnap_create_options {
        callback: Some(tell),
        opaque,
        ..options(INSTANTSNAP_CREATE_AT_ONCE)
    };
    let handle = native.start_job("s", &raw const options);
    assert!(told.gate.wait_arrived(DEADLINE));
    // The guest is still busy, and a second handle of it can be opened.
    assert_refused(
        native.start_job("t", ptr::null()).is_null(),
        Code::OperationInvalid,
        "another snapshot",
    );
    let Native { guest, opened } = &native;
    native::instantsnap_close(*guest);
    job::instantsnap_job_free(handle);
    told.gate.release();
    wait_for(DEADLINE, || (types(told) == ALL).then_some(()))
        .expect("it ends, and its callback is told");
    opened.restore_clone("s");
}

#[test]
fn forked_child_cannot_use_the_parents_job() {
    let native = Native::start();
    let told = Told::default();
    let opaque = (&raw const told).cast_mut().cast();
    let options = instantsnap_create_options {
        callback: Some(tell),
        opaque,
        ..options(INSTANTSNAP_CREATE_AT_ONCE)
    };
    let handle = native.start_job("s", &raw const options);
    assert!(told.gate.wait_arrived(DEADLINE));
    // SAFETY: the child calls functions of the library that fail at once, and exits without running
    // anything else.
    let status = unsafe {
        match libc::fork() {
            0 => {
                let refused = |&(_, result, error): &(_, c_int, c_int)| {
                    result == -1 && error == Code::OperationInvalid as c_int
                };
                let right = call_all(handle).iter().all(refused);
                libc::_exit(if right { 0 } else { 1 })
            }
            child => {
                let mut status = 0;
                assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
                status
            }
        }
    };
    assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "{status}");
    // The child has neither cancelled nor freed the job.
    assert_eq!(job::instantsnap_job_wait(handle, 0), 0);
    told.gate.release();
    assert_eq!(job::instantsnap_job_wait(handle, -1), 1);
    assert_eq!(job::instantsnap_job_get_result(handle), 0);
    assert_eq!(types(&told), ALL);
    job::instantsnap_job_free(handle);
    native.opened.restore_clone("s");
}
