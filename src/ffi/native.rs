// SPDX-License-Identifier: LGPL-2.1-or-later

//! The functions of `instantsnap.h` for guests, snapshots and revert plans.

use std::ffi::{CStr, CString, c_char, c_int, c_uint};
use std::path::Path;
use std::ptr::{self, NonNull};
use std::time::Duration;

use super::header::{instantsnap_guest, instantsnap_revert_plan, instantsnap_snapshot};
use super::{Registry, abi, c_string, last_error};
use crate::boundary::boundary;
use crate::engine::{
    self, EarlyStart, Handle, LoadOptions, Phase, RevertPlan, Stats, WatchdogKind,
};
use crate::error::{Result, fail};
use crate::image::Format;
use crate::model::flags::{CreateFlags, DeleteFlags, RevertFlags};
use crate::pointers::{Fill, Out, Text};

pub(super) static GUESTS: Registry<Handle> = Registry::new("guest");
pub(super) static SNAPSHOTS: Registry<Snapshot> = Registry::new("snapshot");
static PLANS: Registry<Plan> = Registry::new("plan");

/// A snapshot that C has a handle of.
pub struct Snapshot {
    /// Its name.
    pub name: CString,
}

/// A revert plan that C has a handle of.
struct Plan {
    disks: Vec<PlanDisk>,
    memory_backends: Vec<PlanBackend>,
    memory_file: CString,
    domain_xml: CString,
}

struct PlanDisk {
    name: CString,
    file: CString,
    format: CString,
    backing_file: Option<CString>,
}

struct PlanBackend {
    id: CString,
    file: CString,
    offset: u64,
    length: u64,
    object: CString,
}

/// `instantsnap_version`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_version() -> *const c_char {
    boundary(last_error::set, || {
        const VERSION: &CStr =
            match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
                Ok(version) => version,
                Err(_) => panic!("a version without NUL"),
            };
        Ok(VERSION.as_ptr())
    })
}

/// `instantsnap_last_error`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_last_error() -> *const abi::instantsnap_error {
    boundary(last_error::set, || Ok(last_error::get()))
}

/// `instantsnap_free_string`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_free_string(string: Option<Given>) {
    boundary(last_error::set, || {
        drop(string);
        Ok(())
    });
}

/// `instantsnap_free_string_list`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_free_string_list(strings: Option<GivenList>) {
    boundary(last_error::set, || {
        drop(strings);
        Ok(())
    });
}

/// A `char *` that this library has returned, and that the caller gives back. Dropping it frees it.
#[repr(transparent)]
pub struct Given(NonNull<c_char>);

impl Given {
    /// # Safety
    /// `string` was returned by this library as `char *`, and not freed since.
    pub unsafe fn from_ptr(string: *mut c_char) -> Option<Given> {
        NonNull::new(string).map(Given)
    }
}

impl Drop for Given {
    fn drop(&mut self) {
        // SAFETY: by the type, it came from CString::into_raw, and is not used any more.
        drop(unsafe { CString::from_raw(self.0.as_ptr()) });
    }
}

/// A `char **` that `instantsnap_snapshot_list` has returned, and that is unchanged. Dropping it
/// frees it and its strings.
#[repr(transparent)]
pub struct GivenList(NonNull<Option<Given>>);

impl Drop for GivenList {
    fn drop(&mut self) {
        let first = self.0.as_ptr();
        // SAFETY: by the type, it is a boxed slice of ours, of strings of ours, and ends with its
        // only NULL.
        unsafe {
            let length = (0..).take_while(|&n| (*first.add(n)).is_some()).count() + 1;
            drop(Box::from_raw(ptr::slice_from_raw_parts_mut(first, length)));
        }
    }
}

/// `instantsnap_open_qmp`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_open_qmp(
    qmp_socket: Text,
    domain_xml: Text,
    state_dir: Text,
) -> *mut instantsnap_guest {
    boundary(last_error::set, || {
        let (socket, domain_xml) =
            (qmp_socket.required("qmp_socket")?, domain_xml.optional("domain_xml")?);
        let state_dir = state_dir.required("state_dir")?;
        Ok(GUESTS.add(Handle::open_qmp(Path::new(socket), domain_xml, Path::new(state_dir))?))
    })
}

/// `instantsnap_close`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_close(guest: *mut instantsnap_guest) {
    boundary(last_error::set, || if guest.is_null() { Ok(()) } else { GUESTS.remove(guest) });
}

/// `instantsnap_set_pause_limit`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_set_pause_limit(
    guest: *mut instantsnap_guest,
    milliseconds: c_uint,
) -> c_int {
    boundary(last_error::set, || {
        let guest = GUESTS.get(guest)?;
        if milliseconds == 0 {
            fail!(InvalidArg, "milliseconds must be 1 or more");
        }
        guest.set_pause_limit(Duration::from_millis(milliseconds.into()));
        Ok(0)
    })
}

/// `instantsnap_set_watchdog_required`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_set_watchdog_required(
    guest: *mut instantsnap_guest,
    required: c_uint,
) -> c_int {
    boundary(last_error::set, || {
        let guest = GUESTS.get(guest)?;
        if required > 1 {
            fail!(InvalidArg, "required must be 0 or 1");
        }
        guest.set_needs_watchdog(required == 1);
        Ok(0)
    })
}

/// `instantsnap_set_overlap_tries`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_set_overlap_tries(
    guest: *mut instantsnap_guest,
    tries: c_uint,
) -> c_int {
    boundary(last_error::set, || {
        GUESTS.get(guest)?.set_early_start(EarlyStart { tries, ..EarlyStart::default() });
        Ok(0)
    })
}

/// `instantsnap_snapshot_create_xml`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_snapshot_create_xml(
    guest: *mut instantsnap_guest,
    xml: Text,
    flags: c_uint,
    name: Out<*mut c_char>,
) -> c_int {
    boundary(last_error::set, || {
        let created = create(guest, xml, flags)?;
        name.put(|| created.into_raw());
        Ok(0)
    })
}

/// Takes a snapshot; returns its name.
pub(super) fn create(guest: *mut instantsnap_guest, xml: Text, flags: c_uint) -> Result<CString> {
    let guest = GUESTS.get(guest)?;
    c_string(guest.create(xml.required("xml")?, CreateFlags::parse(flags), None, &mut ())?.name)
}

/// `instantsnap_snapshot_cancel`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_snapshot_cancel(guest: *mut instantsnap_guest) -> c_int {
    boundary(last_error::set, || GUESTS.get(guest)?.cancel().map(|()| 0))
}

/// `instantsnap_get_stats`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_get_stats(
    guest: *mut instantsnap_guest,
    mut stats: Fill<abi::instantsnap_stats>,
) -> c_int {
    boundary(last_error::set, || {
        let guest = GUESTS.get(guest)?;
        let Some(last) = guest.stats() else {
            fail!(OperationInvalid, "no snapshot of this guest was taken through this handle yet");
        };
        stats.put("stats", convert_stats(&last)).map(|()| 0)
    })
}

pub(super) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

pub(super) fn convert_stats(stats: &Stats) -> abi::instantsnap_stats {
    let phase = |phase| micros(stats.phase(phase));
    let mut converted = abi::instantsnap_stats {
        size: size_of::<abi::instantsnap_stats>(),
        validate_us: phase(Phase::Validate),
        plan_us: phase(Phase::Plan),
        prepare_us: phase(Phase::Prepare),
        pause_us: phase(Phase::Pause),
        switch_us: phase(Phase::Switch),
        arm_us: phase(Phase::Arm),
        drain_us: phase(Phase::Drain),
        finish_us: phase(Phase::Finish),
        undo_us: phase(Phase::Undo),
        total_us: 0,
        instant_us: stats.instant.map_or(0, micros),
        guest_paused_us: stats.paused.map_or(0, |(paused, _)| micros(paused)),
        memory_image_bytes: stats.memory_image_bytes,
        pause_from_events: matches!(stats.paused, Some((_, engine::PauseSource::Events))).into(),
        disks: stats.disks as u32,
        setup_us: micros(stats.setup),
        lost_pause_us: micros(stats.lost_pause),
        lost_tries: stats.lost,
        overlapped: stats.started_early.into(),
        watchdog: match stats.watchdog {
            WatchdogKind::None => abi::INSTANTSNAP_WATCHDOG_NONE,
            WatchdogKind::Fork => abi::INSTANTSNAP_WATCHDOG_FORK,
            WatchdogKind::Program => abi::INSTANTSNAP_WATCHDOG_PROGRAM,
        },
        image_format: match stats.image_format {
            None => abi::INSTANTSNAP_IMAGE_DEFAULT,
            Some(Format::Raw) => abi::INSTANTSNAP_IMAGE_RAW,
            Some(Format::Sparse) => abi::INSTANTSNAP_IMAGE_SPARSE,
            Some(Format::Zstd(_)) => abi::INSTANTSNAP_IMAGE_ZSTD,
        },
    };
    // The sum of the reported times, which are each rounded down to whole microseconds.
    converted.total_us = [
        converted.validate_us,
        converted.plan_us,
        converted.prepare_us,
        converted.pause_us,
        converted.switch_us,
        converted.arm_us,
        converted.drain_us,
        converted.finish_us,
        converted.undo_us,
    ]
    .iter()
    .sum();
    converted
}

/// `instantsnap_snapshot_list`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_snapshot_list(
    guest: *mut instantsnap_guest,
    names: Out<*mut *mut c_char>,
) -> c_int {
    boundary(last_error::set, || {
        let known = GUESTS.get(guest)?.snapshot_list().names()?;
        let list = known.into_iter().map(c_string).collect::<Result<Vec<_>>>()?;
        let count = list.len() as c_int;
        names.put(|| {
            let strings = list.into_iter().map(CString::into_raw).chain([ptr::null_mut()]);
            Box::into_raw(strings.collect::<Box<[*mut c_char]>>()).cast()
        });
        Ok(count)
    })
}

/// `instantsnap_snapshot_get_xml`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_snapshot_get_xml(
    guest: *mut instantsnap_guest,
    name: Text,
) -> *mut c_char {
    boundary(last_error::set, || {
        let guest = GUESTS.get(guest)?;
        let name = name.required("name")?;
        Ok(c_string(guest.snapshot_list().xml(name)?)?.into_raw())
    })
}

/// `instantsnap_snapshot_current`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_snapshot_current(guest: *mut instantsnap_guest) -> *mut c_char {
    boundary(last_error::set, || match GUESTS.get(guest)?.snapshot_list().current()? {
        Some(name) => Ok(c_string(name)?.into_raw()),
        None => fail!(NoDomainSnapshot, "the guest does not have a current snapshot"),
    })
}

/// `instantsnap_snapshot_prepare_revert`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_snapshot_prepare_revert(
    state_dir: Text,
    name: Text,
    directory: Text,
) -> *mut instantsnap_revert_plan {
    boundary(last_error::set, || {
        let (state_dir, name) = (state_dir.required("state_dir")?, name.required("name")?);
        let directory = directory.optional("directory")?;
        add_plan(engine::prepare_revert(Path::new(state_dir), name, directory.map(Path::new))?)
    })
}

/// Adds a plan, and returns its handle.
pub(super) fn add_plan(plan: RevertPlan) -> Result<*mut instantsnap_revert_plan> {
    Ok(PLANS.add(convert_plan(plan)?))
}

fn convert_plan(plan: RevertPlan) -> Result<Plan> {
    let disk = |disk: engine::RevertDisk| {
        Ok(PlanDisk {
            name: c_string(disk.name)?,
            file: c_string(disk.file.into_os_string().into_encoded_bytes())?,
            format: c_string(disk.format)?,
            backing_file: disk.backing_file.map(c_string).transpose()?,
        })
    };
    let backend = |backend: engine::MemoryBackend| {
        Ok(PlanBackend {
            object: c_string(backend.object())?,
            id: c_string(backend.id)?,
            file: c_string(backend.file.into_os_string().into_encoded_bytes())?,
            offset: backend.offset,
            length: backend.size,
        })
    };
    Ok(Plan {
        memory_backends: plan.memory_backends.into_iter().map(backend).collect::<Result<_>>()?,
        disks: plan.disks.into_iter().map(disk).collect::<Result<_>>()?,
        memory_file: c_string(plan.memory_file)?,
        domain_xml: c_string(plan.domain_xml)?,
    })
}

/// A handle of a plan. It is closed when this is dropped.
pub(super) struct Borrowed(*mut instantsnap_revert_plan);

impl Borrowed {
    pub(super) fn plan(plan: &RevertPlan) -> Result<Borrowed> {
        add_plan(plan.clone()).map(Borrowed)
    }

    pub(super) fn handle<C>(&self) -> *const C {
        self.0.cast_const().cast()
    }
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        // The callback may have freed it already.
        let _ = PLANS.remove(self.0);
    }
}

/// `instantsnap_revert_plan_disk_count`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_revert_plan_disk_count(
    plan: *const instantsnap_revert_plan,
) -> usize {
    boundary(last_error::set, || Ok(PLANS.get(plan)?.disks.len()))
}

/// `instantsnap_revert_plan_get_disk`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_revert_plan_get_disk(
    plan: *const instantsnap_revert_plan,
    index: usize,
    mut disk: Fill<abi::instantsnap_revert_disk>,
) -> c_int {
    boundary(last_error::set, || {
        let plan = PLANS.get(plan)?;
        let Some(found) = plan.disks.get(index) else {
            fail!(InvalidArg, "there is no disk {index}: the plan has {}", plan.disks.len());
        };
        let converted = abi::instantsnap_revert_disk {
            size: size_of::<abi::instantsnap_revert_disk>(),
            name: found.name.as_ptr(),
            file: found.file.as_ptr(),
            format: found.format.as_ptr(),
            backing_file: found.backing_file.as_ref().map_or(ptr::null(), |file| file.as_ptr()),
        };
        disk.put("disk", converted).map(|()| 0)
    })
}

/// `instantsnap_revert_plan_memory_backend_count`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_revert_plan_memory_backend_count(
    plan: *const instantsnap_revert_plan,
) -> usize {
    boundary(last_error::set, || Ok(PLANS.get(plan)?.memory_backends.len()))
}

/// `instantsnap_revert_plan_get_memory_backend`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_revert_plan_get_memory_backend(
    plan: *const instantsnap_revert_plan,
    index: usize,
    mut backend: Fill<abi::instantsnap_memory_backend>,
) -> c_int {
    boundary(last_error::set, || {
        let plan = PLANS.get(plan)?;
        let Some(found) = plan.memory_backends.get(index) else {
            let count = plan.memory_backends.len();
            fail!(InvalidArg, "there is no memory backend {index}: the plan has {count}");
        };
        let converted = abi::instantsnap_memory_backend {
            size: size_of::<abi::instantsnap_memory_backend>(),
            id: found.id.as_ptr(),
            file: found.file.as_ptr(),
            offset: found.offset,
            length: found.length,
            object: found.object.as_ptr(),
        };
        backend.put("backend", converted).map(|()| 0)
    })
}

/// `instantsnap_revert_plan_memory_file`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_revert_plan_memory_file(
    plan: *const instantsnap_revert_plan,
) -> *const c_char {
    // The registry keeps the plan, and with it the string.
    boundary(last_error::set, || Ok(PLANS.get(plan)?.memory_file.as_ptr()))
}

/// `instantsnap_revert_plan_domain_xml`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_revert_plan_domain_xml(
    plan: *const instantsnap_revert_plan,
) -> *const c_char {
    boundary(last_error::set, || Ok(PLANS.get(plan)?.domain_xml.as_ptr()))
}

/// `instantsnap_revert_plan_free`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_revert_plan_free(plan: *mut instantsnap_revert_plan) {
    boundary(last_error::set, || if plan.is_null() { Ok(()) } else { PLANS.remove(plan) });
}

/// `instantsnap_snapshot_load`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_snapshot_load(
    guest: *mut instantsnap_guest,
    name: Text,
    flags: c_uint,
) -> c_int {
    boundary(last_error::set, || {
        let guest = GUESTS.get(guest)?;
        let name = name.required("name")?;
        guest.load(name, RevertFlags::parse(flags)?, LoadOptions::default()).map(|_| 0)
    })
}

/// `instantsnap_snapshot_delete`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_snapshot_delete(
    guest: *mut instantsnap_guest,
    name: Text,
    flags: c_uint,
) -> c_int {
    boundary(last_error::set, || {
        let guest = GUESTS.get(guest)?;
        let name = name.required("name")?;
        guest.delete(name, DeleteFlags::parse(flags)?).map(|()| 0)
    })
}

/// `instantsnap_recover`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_recover(
    guest: *mut instantsnap_guest,
    report: Out<*mut c_char>,
) -> c_int {
    boundary(last_error::set, || put_report(&GUESTS.get(guest)?.recover()?, report))
}

/// `instantsnap_recover_offline`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_recover_offline(state_dir: Text, report: Out<*mut c_char>) -> c_int {
    boundary(last_error::set, || {
        let state_dir = Path::new(state_dir.required("state_dir")?);
        put_report(&engine::recover_offline(state_dir)?, report)
    })
}

/// Stores the report of a recovery. Returns how many things were found.
fn put_report(found: &[engine::Recovered], report: Out<*mut c_char>) -> Result<c_int> {
    let text = c_string(engine::recovery_report(found))?;
    report.put(|| text.into_raw());
    Ok(found.len() as c_int)
}

/// `instantsnap_doctor`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_doctor(
    guest: *mut instantsnap_guest,
    report: Out<*mut c_char>,
) -> c_int {
    boundary(last_error::set, || {
        let findings = match guest.is_null() {
            true => engine::examine_host(),
            false => GUESTS.get(guest)?.examine(),
        };
        let text = c_string(engine::doctor_report(&findings))?;
        report.put(|| text.into_raw());
        let failed = findings.iter().filter(|found| found.verdict == engine::Verdict::Fail);
        Ok(failed.count() as c_int)
    })
}

/// `instantsnap_snapshot_get_name`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_snapshot_get_name(
    snapshot: *const instantsnap_snapshot,
) -> *const c_char {
    boundary(last_error::set, || Ok(SNAPSHOTS.get(snapshot)?.name.as_ptr()))
}

/// `instantsnap_snapshot_free`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_snapshot_free(snapshot: *mut instantsnap_snapshot) {
    boundary(
        last_error::set,
        || if snapshot.is_null() { Ok(()) } else { SNAPSHOTS.remove(snapshot) },
    );
}
