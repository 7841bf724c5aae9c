// SPDX-License-Identifier: LGPL-2.1-or-later

//! The functions of `instantsnap.h` for storage hooks.

use std::ffi::{CStr, CString, OsString, c_int};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::Arc;
use std::time::Duration;

use super::header::{instantsnap_guest, instantsnap_revert_plan};
use super::native::{GUESTS, add_plan, micros};
use super::{abi, c_string, last_error};
use crate::boundary::boundary;
use crate::engine::{Answer, RevertOptions, StorageCall, StorageHook, prepare_revert_with};
use crate::error::{Result, fail};
use crate::pointers::{In, Malloced, Text};

/// The C callbacks of a storage hook.
pub(super) struct Hook(pub(super) abi::instantsnap_storage_hook);

// SAFETY: the pointer is not used, only passed to the callbacks; the header says on which threads
// these are called.
unsafe impl Send for Hook {}
// SAFETY: as above.
unsafe impl Sync for Hook {}

impl Hook {
    pub(super) fn read(hook: In<abi::instantsnap_storage_hook>) -> Result<Option<Hook>> {
        let Some(hook) = hook.read("hook")? else { return Ok(None) };
        if hook.reserved != 0 {
            fail!(InvalidArg, "hook->reserved must be 0");
        }
        Ok(Some(Hook(hook)))
    }

    /// Returns an error if it cannot be called for a snapshot.
    pub(super) fn check(&self) -> Result<()> {
        if self.0.snapshot.is_none() {
            fail!(InvalidArg, "hook->snapshot must not be NULL");
        }
        Ok(())
    }
}

impl StorageHook for Hook {
    fn snapshot(&self, call: &StorageCall) -> Answer<()> {
        let Some(snapshot) = self.0.snapshot else {
            return Err("it has no snapshot callback".into());
        };
        let call = Call::new(call)?;
        // SAFETY: the caller promises that the hook's callbacks can be called; `call` lives until
        // the callback returns.
        returned(call.with(|call| unsafe { snapshot(call, self.0.opaque) }))
    }

    fn undo(&self, call: &StorageCall) {
        if let (Some(undo), Ok(call)) = (self.0.undo, Call::new(call)) {
            // SAFETY: as above.
            call.with(|call| unsafe { undo(call, self.0.opaque) });
        }
    }

    fn revert(&self, call: &StorageCall) -> Answer<Vec<PathBuf>> {
        let Some(revert) = self.0.revert else { return Err("it has no revert callback".into()) };
        let call = Call::new(call)?;
        let mut files: Vec<_> = call.disks.iter().map(|_| Malloced::NULL).collect();
        // SAFETY: as above; `files` has a place for each disk, and by the header the callback
        // stores NULL or a string of malloc()'s there.
        let status =
            call.with(|call| unsafe { revert(call, files.as_mut_ptr().cast(), self.0.opaque) });
        // The strings are ours now, whatever the callback returned.
        let named: Vec<_> = files.into_iter().map(|file| file.bytes()).collect();
        returned(status)?;
        let path = |bytes| PathBuf::from(OsString::from_vec(bytes));
        let unnamed =
            |name: &CStr| format!("it named no image for disk '{}'", name.to_string_lossy());
        let named = named.into_iter().zip(&call.disks);
        named.map(|(file, disk)| file.map(path).ok_or_else(|| unnamed(&disk.name))).collect()
    }

    fn deadline(&self) -> Option<Duration> {
        (self.0.deadline_ms != 0).then(|| Duration::from_millis(self.0.deadline_ms.into()))
    }
}

fn returned(status: c_int) -> Answer<()> {
    if status == 0 { Ok(()) } else { Err(format!("it returned {status}")) }
}

/// The arguments of a call of the hook, with C's strings.
struct Call {
    snapshot: CString,
    disks: Vec<Disk>,
    paused_us: u64,
    deadline_us: u64,
}

struct Disk {
    name: CString,
    source: CString,
    format: CString,
}

impl Call {
    fn new(call: &StorageCall) -> Answer<Call> {
        let string = |text: &str| c_string(text).map_err(|error| error.message);
        let disk = |disk: &crate::model::ManualDisk| {
            Ok(Disk {
                name: string(&disk.name)?,
                source: string(&disk.source)?,
                format: string(&disk.format)?,
            })
        };
        Ok(Call {
            snapshot: string(&call.snapshot)?,
            disks: call.disks.iter().map(disk).collect::<Answer<_>>()?,
            paused_us: micros(call.paused),
            deadline_us: micros(call.left),
        })
    }

    /// Passes the call to `body` as C's structure, which lives until `body` returns.
    fn with<T>(&self, body: impl FnOnce(*const abi::instantsnap_storage_call) -> T) -> T {
        let disk = |disk: &Disk| abi::instantsnap_storage_disk {
            size: size_of::<abi::instantsnap_storage_disk>(),
            name: disk.name.as_ptr(),
            source: disk.source.as_ptr(),
            format: disk.format.as_ptr(),
        };
        let disks: Vec<_> = self.disks.iter().map(disk).collect();
        let pointers: Vec<_> = disks.iter().map(ptr::from_ref).collect();
        body(&abi::instantsnap_storage_call {
            size: size_of::<abi::instantsnap_storage_call>(),
            snapshot: self.snapshot.as_ptr(),
            disks: pointers.as_ptr(),
            disk_count: pointers.len(),
            paused_us: self.paused_us,
            deadline_us: self.deadline_us,
        })
    }
}

/// `instantsnap_set_storage_hook`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_set_storage_hook(
    guest: *mut instantsnap_guest,
    hook: In<abi::instantsnap_storage_hook>,
) -> c_int {
    boundary(last_error::set, || {
        let guest = GUESTS.get(guest)?;
        let hook = Hook::read(hook)?;
        hook.as_ref().map_or(Ok(()), Hook::check)?;
        guest.set_storage_hook(hook.map(|hook| Arc::new(hook) as Arc<dyn StorageHook>));
        Ok(0)
    })
}

/// `instantsnap_snapshot_prepare_revert_hooked`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_snapshot_prepare_revert_hooked(
    state_dir: Text,
    name: Text,
    directory: Text,
    hook: In<abi::instantsnap_storage_hook>,
) -> *mut instantsnap_revert_plan {
    boundary(last_error::set, || {
        let (state_dir, name) = (state_dir.required("state_dir")?, name.required("name")?);
        let (directory, hook) = (directory.optional("directory")?, Hook::read(hook)?);
        let options = RevertOptions {
            directory: directory.map(Path::new),
            hook: hook.as_ref().map(|hook| hook as &dyn StorageHook),
            ..RevertOptions::default()
        };
        add_plan(prepare_revert_with(Path::new(state_dir), name, options)?)
    })
}
