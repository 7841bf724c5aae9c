// SPDX-License-Identifier: LGPL-2.1-or-later

//! The structures and constants of the C header.
//!
//! The build reads this file, and makes the C compiler compare every field and every number with
//! the header's (`build-script/`).

// The names are C's, and the header documents the fields.
#![allow(missing_docs, non_camel_case_types)]

use core::ffi::{c_char, c_int, c_uint, c_void};
use core::mem::size_of;

macro_rules! structures {
    ($($(#[$attribute:meta])* struct $name:ident { $($field:ident: $type:ty,)+ })+) => {
        $(
            $(#[$attribute])*
            #[repr(C)]
            #[derive(Clone, Copy, Debug)]
            pub struct $name {
                $(
                    #[allow(missing_docs)]
                    pub $field: $type,
                )+
            }

            // It must have no padding, because it is filled byte by byte.
            const _: () = assert!(size_of::<$name>() == 0 $(+ size_of::<$type>())+);
        )+
    };
}

macro_rules! constants {
    ($($name:ident = $value:literal,)+) => {
        $(pub const $name: u32 = $value;)+
    };
}

constants! {
    INSTANTSNAP_PHASE_VALIDATE = 0,
    INSTANTSNAP_PHASE_PLAN = 1,
    INSTANTSNAP_PHASE_PREPARE = 2,
    INSTANTSNAP_PHASE_PAUSE = 3,
    INSTANTSNAP_PHASE_SWITCH = 4,
    INSTANTSNAP_PHASE_ARM = 5,
    INSTANTSNAP_PHASE_DRAIN = 6,
    INSTANTSNAP_PHASE_FINISH = 7,
    INSTANTSNAP_PHASE_UNDO = 8,
    INSTANTSNAP_PHASE_ENDED = 9,
    INSTANTSNAP_WATCHDOG_NONE = 0,
    INSTANTSNAP_WATCHDOG_FORK = 1,
    INSTANTSNAP_WATCHDOG_PROGRAM = 2,
    INSTANTSNAP_IMAGE_DEFAULT = 0,
    INSTANTSNAP_IMAGE_RAW = 1,
    INSTANTSNAP_IMAGE_SPARSE = 2,
    INSTANTSNAP_IMAGE_ZSTD = 3,
    INSTANTSNAP_EVENT_PAUSED = 1,
    INSTANTSNAP_EVENT_SWITCHED = 2,
    INSTANTSNAP_EVENT_INSTANT = 3,
    INSTANTSNAP_EVENT_PROGRESS = 4,
    INSTANTSNAP_EVENT_COMPLETE = 5,
    INSTANTSNAP_EVENT_FAILED = 6,
    INSTANTSNAP_CREATE_AT_ONCE = 1,
    INSTANTSNAP_MEMORY_AUTO = 0,
    INSTANTSNAP_MEMORY_FULL = 1,
    INSTANTSNAP_MEMORY_LAZY = 2,
    INSTANTSNAP_MEMORY_MAP = 3,
    INSTANTSNAP_DRIVER_RUNNING = 1,
    INSTANTSNAP_DRIVER_PAUSED = 2,
    INSTANTSNAP_DRIVER_SHUTOFF = 3,
}

/// The opaque type of a revert plan's handle.
pub type instantsnap_revert_plan = c_void;

/// Receives an event.
pub type instantsnap_event_callback =
    Option<unsafe extern "C" fn(*const instantsnap_event, *mut c_void)>;

/// Snapshots disks. Returns 0 on success.
pub type instantsnap_storage_snapshot =
    Option<unsafe extern "C" fn(*const instantsnap_storage_call, *mut c_void) -> c_int>;

/// Removes the snapshot of the disks.
pub type instantsnap_storage_undo =
    Option<unsafe extern "C" fn(*const instantsnap_storage_call, *mut c_void)>;

/// Names the images of the disks, each by a string of malloc()'s. Returns 0 on success.
pub type instantsnap_storage_revert = Option<
    unsafe extern "C" fn(*const instantsnap_storage_call, *mut *mut c_char, *mut c_void) -> c_int,
>;

structures! {
    /// The last error of a thread.
    struct instantsnap_error {
        code: c_int,
        domain: c_int,
        message: *const c_char,
    }

    /// The statistics of a snapshot: microseconds, bytes and counts.
    #[derive(Default)]
    struct instantsnap_stats {
        size: usize,
        validate_us: u64,
        plan_us: u64,
        prepare_us: u64,
        pause_us: u64,
        switch_us: u64,
        arm_us: u64,
        drain_us: u64,
        finish_us: u64,
        undo_us: u64,
        total_us: u64,
        instant_us: u64,
        guest_paused_us: u64,
        memory_image_bytes: u64,
        pause_from_events: u32,
        disks: u32,
        setup_us: u64,
        lost_pause_us: u64,
        lost_tries: u32,
        overlapped: u32,
        watchdog: u32,
        image_format: u32,
    }

    /// An event.
    #[derive(Default)]
    struct instantsnap_event {
        size: usize,
        r#type: u32,
        error_code: i32,
        time_us: u64,
        paused_us: u64,
        bytes_done: u64,
        bytes_total: u64,
        bytes_per_second: u64,
        pages_left: u64,
    }

    /// The progress of a job.
    #[derive(Default)]
    struct instantsnap_job_info {
        size: usize,
        phase: u32,
        instant: u32,
        elapsed_us: u64,
        paused_us: u64,
        bytes_done: u64,
        bytes_total: u64,
        bytes_per_second: u64,
        pages_left: u64,
    }

    /// The options of a snapshot.
    struct instantsnap_create_options {
        size: usize,
        callback: instantsnap_event_callback,
        opaque: *mut c_void,
        progress_interval_ms: u32,
        flags: u32,
        image_format: u32,
        zstd_level: u32,
    }

    /// A disk that a storage hook snapshots.
    struct instantsnap_storage_disk {
        size: usize,
        name: *const c_char,
        source: *const c_char,
        format: *const c_char,
    }

    /// The arguments of a call of a storage hook.
    struct instantsnap_storage_call {
        size: usize,
        snapshot: *const c_char,
        disks: *const *const instantsnap_storage_disk,
        disk_count: usize,
        paused_us: u64,
        deadline_us: u64,
    }

    /// A storage hook.
    struct instantsnap_storage_hook {
        size: usize,
        opaque: *mut c_void,
        snapshot: instantsnap_storage_snapshot,
        undo: instantsnap_storage_undo,
        revert: instantsnap_storage_revert,
        deadline_ms: u32,
        reserved: u32,
    }

    /// How a revert is prepared; the strings are borrowed.
    struct instantsnap_revert_options {
        size: usize,
        directory: *const c_char,
        hook: *const instantsnap_storage_hook,
        memory: u32,
        reserved: u32,
    }

    /// How a snapshot is loaded.
    struct instantsnap_load_options {
        size: usize,
        memory: u32,
        reserved: u32,
        bandwidth: u64,
    }

    /// How far the memory of a guest is.
    #[derive(Default)]
    struct instantsnap_memory_progress {
        size: usize,
        bytes_in: u64,
        bytes_total: u64,
        coming: u32,
        reserved: u32,
    }

    /// What a load did: microseconds.
    #[derive(Default)]
    struct instantsnap_load_stats {
        size: usize,
        check_us: u64,
        load_us: u64,
        finish_us: u64,
        total_us: u64,
        memory: u32,
        running: u32,
    }

    /// One memory backend of a revert plan; the plan owns the strings.
    struct instantsnap_memory_backend {
        size: usize,
        id: *const c_char,
        file: *const c_char,
        offset: u64,
        length: u64,
        object: *const c_char,
    }

    /// One disk of a revert plan; the plan owns the strings.
    struct instantsnap_revert_disk {
        size: usize,
        name: *const c_char,
        file: *const c_char,
        format: *const c_char,
        backing_file: *const c_char,
    }

    /// A disk and its overlay; the strings are borrowed.
    struct instantsnap_driver_disk {
        size: usize,
        name: *const c_char,
        node: *const c_char,
        overlay_node: *const c_char,
        overlay: *const c_char,
    }

    /// The callbacks of a driver.
    struct instantsnap_driver_ops {
        size: usize,
        monitor: Option<
            unsafe extern "C" fn(*mut c_void, *const c_char, *const c_int, usize, c_uint, *mut *mut c_char) -> c_int,
        >,
        state: Option<unsafe extern "C" fn(*mut c_void) -> c_int>,
        domain_xml: Option<unsafe extern "C" fn(*mut c_void) -> *mut c_char>,
        state_dir: Option<unsafe extern "C" fn(*mut c_void) -> *mut c_char>,
        record: Option<unsafe extern "C" fn(*mut c_void, *const c_char, *const c_char) -> c_int>,
        forget: Option<unsafe extern "C" fn(*mut c_void, *const c_char) -> c_int>,
        snapshot_xml: Option<unsafe extern "C" fn(*mut c_void, *const c_char) -> *mut c_char>,
        current_snapshot: Option<unsafe extern "C" fn(*mut c_void) -> *mut c_char>,
        pause: Option<unsafe extern "C" fn(*mut c_void, c_uint) -> c_int>,
        resume: Option<unsafe extern "C" fn(*mut c_void, c_uint) -> c_int>,
        switch_disks: Option<unsafe extern "C" fn(*mut c_void, *const instantsnap_driver_disk, usize, c_uint) -> c_int>,
        disks_merged: Option<unsafe extern "C" fn(*mut c_void, *const instantsnap_driver_disk, usize)>,
        begin_job: Option<unsafe extern "C" fn(*mut c_void) -> c_int>,
        end_job: Option<unsafe extern "C" fn(*mut c_void)>,
        lock: Option<unsafe extern "C" fn(*mut c_void)>,
        unlock: Option<unsafe extern "C" fn(*mut c_void)>,
        guard_socket: Option<unsafe extern "C" fn(*mut c_void) -> *mut c_char>,
        report_error: Option<unsafe extern "C" fn(*mut c_void, c_int, c_int, *const c_char)>,
        make_snapshot: Option<unsafe extern "C" fn(*mut c_void, *mut c_void, *const c_char) -> *mut c_void>,
        snapshot_name: Option<unsafe extern "C" fn(*mut c_void, *mut c_void) -> *mut c_char>,
        restart: Option<unsafe extern "C" fn(*mut c_void, *const instantsnap_revert_plan) -> c_int>,
        storage_hook: *const instantsnap_storage_hook,
    }
}
