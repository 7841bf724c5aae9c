// SPDX-License-Identifier: LGPL-2.1-or-later

//! The functions of `instantsnap.h` for snapshots with events, and for jobs.

use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::header::{instantsnap_guest, instantsnap_job};
use super::image::format_of;
use super::native::{GUESTS, convert_stats, micros};
use super::{Registry, abi, c_string, last_error};
use crate::boundary::boundary;
use crate::engine::{Event, EventKind, Job, Observer, Phase, Returns};
use crate::error::{Result, fail};
use crate::image::{Format, Level};
use crate::model::flags::CreateFlags;
use crate::pointers::{Fill, In, Out, Text};

static JOBS: Registry<Owned> = Registry::new("job");
/// The process whose jobs are in [`JOBS`]. It is checked before [`JOBS`] is locked: in a forked
/// child that lock may be held for ever by a thread that the child does not have.
static PROCESS: AtomicU32 = AtomicU32::new(0);

/// A job, and the process that has its thread.
struct Owned {
    job: Job,
    process: u32,
}

/// Puts a job into the registry.
fn add(job: Job) -> *mut instantsnap_job {
    let process = std::process::id();
    PROCESS.store(process, Ordering::Relaxed);
    JOBS.add(Owned { job, process })
}

/// Finds a job of this process.
fn find(job: *const instantsnap_job) -> Result<Arc<Owned>> {
    let process = std::process::id();
    let is_ours = |of: u32| [0, process].contains(&of);
    if is_ours(PROCESS.load(Ordering::Relaxed)) {
        let found = JOBS.get(job)?;
        if is_ours(found.process) {
            return Ok(found);
        }
    }
    fail!(
        OperationInvalid,
        "the job belongs to the process that this one was forked from: its snapshot is not taken \
         here"
    )
}

/// The caller's callback for the events of a snapshot.
struct Listener {
    callback: abi::instantsnap_event_callback,
    opaque: *mut c_void,
    interval: Option<Duration>,
}

// SAFETY: the pointer is not used, only passed to the callback; the header says on which thread
// that is called.
unsafe impl Send for Listener {}

impl Observer for Listener {
    fn event(&mut self, event: &Event) {
        if let Some(callback) = self.callback {
            let event = convert_event(event);
            // SAFETY: the caller promises that the callback can be called with `opaque` until the
            // last event; `event` lives for the call.
            unsafe { callback(&raw const event, self.opaque) };
        }
    }

    fn interval(&self) -> Option<Duration> {
        self.interval
    }
}

/// The options of a snapshot.
struct Options {
    listener: Listener,
    flags: u32,
    image_format: Option<Format>,
}

impl Options {
    fn read(options: In<abi::instantsnap_create_options>) -> Result<Options> {
        /// The default interval of progress events.
        const INTERVAL_MS: u32 = 500;
        let Some(options) = options.read("options")? else {
            return Ok(Options {
                listener: Listener { callback: None, opaque: ptr::null_mut(), interval: None },
                flags: 0,
                image_format: None,
            });
        };
        let unknown = options.flags & !abi::INSTANTSNAP_CREATE_AT_ONCE;
        if unknown != 0 {
            fail!(InvalidArg, "unsupported flags (0x{unknown:x}) in options");
        }
        let interval = match options.progress_interval_ms {
            0 => INTERVAL_MS,
            interval => interval,
        };
        let interval = Some(Duration::from_millis(interval.into()));
        let listener = Listener { callback: options.callback, opaque: options.opaque, interval };
        let wanted = options.image_format;
        let mut image_format = format_of(wanted);
        if image_format.is_none() && wanted != abi::INSTANTSNAP_IMAGE_DEFAULT {
            fail!(InvalidArg, "unknown image format {wanted} in options");
        }
        if options.zstd_level != 0 {
            let (given, level) = (options.zstd_level, Level::numbered(options.zstd_level));
            image_format = match (image_format, level) {
                (Some(Format::Zstd(_)), Some(level)) => Some(Format::Zstd(level)),
                (_, None) => fail!(InvalidArg, "zstd_level is {given}, and may be 1 to 19"),
                _ => fail!(InvalidArg, "zstd_level is for images of the format zstd"),
            };
        }
        Ok(Options { listener, flags: options.flags, image_format })
    }
}

/// `instantsnap_snapshot_create`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_snapshot_create(
    guest: *mut instantsnap_guest,
    xml: Text,
    flags: c_uint,
    options: In<abi::instantsnap_create_options>,
    name: Out<*mut c_char>,
) -> c_int {
    boundary(last_error::set, || {
        let guest = GUESTS.get(guest)?;
        let (xml, options) = (xml.required("xml")?, Options::read(options)?);
        if options.flags != 0 {
            fail!(
                InvalidArg,
                "INSTANTSNAP_CREATE_AT_ONCE is for instantsnap_snapshot_create_start()"
            );
        }
        let mut listener = options.listener;
        if listener.callback.is_none() {
            // Without a callback QEMU need not be asked for the progress.
            listener.interval = None;
        }
        let (flags, format) = (CreateFlags::parse(flags), options.image_format);
        let created = c_string(guest.create(xml, flags, format, &mut listener)?.name)?;
        name.put(|| created.into_raw());
        Ok(0)
    })
}

/// `instantsnap_snapshot_create_start`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_snapshot_create_start(
    guest: *mut instantsnap_guest,
    xml: Text,
    flags: c_uint,
    options: In<abi::instantsnap_create_options>,
) -> *mut instantsnap_job {
    boundary(last_error::set, || {
        let guest = GUESTS.get(guest)?;
        let (xml, options) = (xml.required("xml")?, Options::read(options)?);
        let returns = match options.flags & abi::INSTANTSNAP_CREATE_AT_ONCE {
            0 => Returns::AtInstant,
            _ => Returns::AtOnce,
        };
        let flags = CreateFlags::parse(flags);
        let (listener, format) = (Box::new(options.listener), options.image_format);
        Ok(add(guest.start(xml, flags, format, listener, returns)?))
    })
}

/// `instantsnap_job_wait`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_job_wait(job: *mut instantsnap_job, timeout_ms: c_int) -> c_int {
    boundary(last_error::set, || {
        // A negative timeout is no limit.
        let timeout = u64::try_from(timeout_ms).ok().map(Duration::from_millis);
        Ok(find(job)?.job.wait(timeout).into())
    })
}

/// `instantsnap_job_get_fd`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_job_get_fd(job: *mut instantsnap_job) -> c_int {
    // The registry keeps the job, and with it the descriptor.
    boundary(last_error::set, || Ok(find(job)?.job.readable().as_raw_fd()))
}

/// `instantsnap_job_next_event`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_job_next_event(
    job: *mut instantsnap_job,
    mut event: Fill<abi::instantsnap_event>,
) -> c_int {
    boundary(last_error::set, || {
        let job = find(job)?;
        // The first `put` checks the structure's size, so that a wrong one loses no event.
        event.put("event", abi::instantsnap_event::default())?;
        let Some(next) = job.job.next_event() else { return Ok(0) };
        event.put("event", convert_event(&next)).map(|()| 1)
    })
}

/// `instantsnap_job_get_info`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_job_get_info(
    job: *mut instantsnap_job,
    mut info: Fill<abi::instantsnap_job_info>,
) -> c_int {
    boundary(last_error::set, || {
        let now = find(job)?.job.info();
        let converted = abi::instantsnap_job_info {
            size: size_of::<abi::instantsnap_job_info>(),
            phase: now.phase.map_or(abi::INSTANTSNAP_PHASE_ENDED, convert_phase),
            instant: now.instant.into(),
            elapsed_us: micros(now.elapsed),
            paused_us: micros(now.paused),
            bytes_done: now.flow.done,
            bytes_total: now.flow.total,
            bytes_per_second: now.flow.per_second,
            pages_left: now.flow.pages_left,
        };
        info.put("info", converted).map(|()| 0)
    })
}

/// `instantsnap_job_get_result`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_job_get_result(job: *mut instantsnap_job) -> c_int {
    boundary(last_error::set, || find(job)?.job.result().map(|_| 0))
}

/// `instantsnap_job_get_name`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_job_get_name(job: *mut instantsnap_job) -> *mut c_char {
    boundary(last_error::set, || c_string(find(job)?.job.result()?).map(CString::into_raw))
}

/// `instantsnap_job_get_xml`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_job_get_xml(job: *mut instantsnap_job) -> *mut c_char {
    boundary(last_error::set, || c_string(find(job)?.job.xml()?).map(CString::into_raw))
}

/// `instantsnap_job_get_stats`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_job_get_stats(
    job: *mut instantsnap_job,
    mut stats: Fill<abi::instantsnap_stats>,
) -> c_int {
    boundary(last_error::set, || {
        let known = find(job)?.job.stats()?;
        stats.put("stats", convert_stats(&known)).map(|()| 0)
    })
}

/// `instantsnap_job_cancel`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_job_cancel(job: *mut instantsnap_job) -> c_int {
    boundary(last_error::set, || {
        find(job)?.job.cancel();
        Ok(0)
    })
}

/// `instantsnap_job_free`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_job_free(job: *mut instantsnap_job) {
    boundary(last_error::set, || {
        if job.is_null() { Ok(()) } else { find(job).and_then(|_| JOBS.remove(job)) }
    });
}

fn convert_phase(phase: Phase) -> u32 {
    match phase {
        Phase::Validate => abi::INSTANTSNAP_PHASE_VALIDATE,
        Phase::Plan => abi::INSTANTSNAP_PHASE_PLAN,
        Phase::Prepare => abi::INSTANTSNAP_PHASE_PREPARE,
        Phase::Pause => abi::INSTANTSNAP_PHASE_PAUSE,
        Phase::Switch => abi::INSTANTSNAP_PHASE_SWITCH,
        Phase::Arm => abi::INSTANTSNAP_PHASE_ARM,
        Phase::Drain => abi::INSTANTSNAP_PHASE_DRAIN,
        Phase::Finish => abi::INSTANTSNAP_PHASE_FINISH,
        Phase::Undo => abi::INSTANTSNAP_PHASE_UNDO,
    }
}

fn convert_event(event: &Event) -> abi::instantsnap_event {
    let (kind, error_code) = match event.kind {
        EventKind::Paused => (abi::INSTANTSNAP_EVENT_PAUSED, 0),
        EventKind::Switched => (abi::INSTANTSNAP_EVENT_SWITCHED, 0),
        EventKind::Instant => (abi::INSTANTSNAP_EVENT_INSTANT, 0),
        EventKind::Progress => (abi::INSTANTSNAP_EVENT_PROGRESS, 0),
        EventKind::Complete => (abi::INSTANTSNAP_EVENT_COMPLETE, 0),
        EventKind::Failed(code) => (abi::INSTANTSNAP_EVENT_FAILED, code),
    };
    abi::instantsnap_event {
        size: size_of::<abi::instantsnap_event>(),
        r#type: kind,
        error_code,
        time_us: micros(event.time),
        paused_us: micros(event.paused),
        bytes_done: event.flow.done,
        bytes_total: event.flow.total,
        bytes_per_second: event.flow.per_second,
        pages_left: event.flow.pages_left,
    }
}
