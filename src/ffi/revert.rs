// SPDX-License-Identifier: LGPL-2.1-or-later

//! The functions of `instantsnap.h` that revert with options.

use std::ffi::{c_int, c_uint};
use std::path::Path;
use std::time::Duration;

use super::header::{instantsnap_guest, instantsnap_revert_plan};
use super::native::{GUESTS, add_plan, micros};
use super::storage::Hook;
use super::{abi, last_error};
use crate::boundary::boundary;
use crate::engine::{LoadOptions, RevertOptions, StorageHook, prepare_revert, prepare_revert_with};
use crate::error::{Result, fail};
use crate::model::Memory;
use crate::model::flags::RevertFlags;
use crate::pointers::{Fill, In, Text};

/// `instantsnap_snapshot_prepare_revert_with`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_snapshot_prepare_revert_with(
    state_dir: Text,
    name: Text,
    options: In<abi::instantsnap_revert_options>,
) -> *mut instantsnap_revert_plan {
    boundary(last_error::set, || {
        let (state_dir, name) = (state_dir.required("state_dir")?, name.required("name")?);
        let Some(options) = options.read("options")? else {
            return add_plan(prepare_revert(Path::new(state_dir), name, None)?);
        };
        if options.reserved != 0 {
            fail!(InvalidArg, "the reserved field of options must be 0");
        }
        // SAFETY: by the header, the pointers in the options are NULL, or what the header says, and
        // live until this function returns.
        let (directory, hook) =
            unsafe { (Text::from_ptr(options.directory), In::from_ptr(options.hook)) };
        let hook = Hook::read(hook)?;
        let options = RevertOptions {
            directory: directory.optional("options->directory")?.map(Path::new),
            hook: hook.as_ref().map(|hook| hook as &dyn StorageHook),
            memory: memory_of(options.memory)?,
        };
        add_plan(prepare_revert_with(Path::new(state_dir), name, options)?)
    })
}

/// The way in which memory comes back that has this number in C.
fn memory_of(number: u32) -> Result<Memory> {
    match Memory::numbered(number) {
        Some(memory) => Ok(memory),
        None => fail!(InvalidArg, "unknown memory {number} in options"),
    }
}

/// `instantsnap_snapshot_load_with`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_snapshot_load_with(
    guest: *mut instantsnap_guest,
    name: Text,
    flags: c_uint,
    options: In<abi::instantsnap_load_options>,
    mut stats: Fill<abi::instantsnap_load_stats>,
) -> c_int {
    boundary(last_error::set, || {
        let guest = GUESTS.get(guest)?;
        let name = name.required("name")?;
        let options = match options.read("options")? {
            None => LoadOptions::default(),
            Some(options) if options.reserved != 0 => {
                fail!(InvalidArg, "the reserved field of options must be 0")
            }
            Some(options) => LoadOptions {
                memory: memory_of(options.memory)?,
                bandwidth: Some(options.bandwidth).filter(|bandwidth| *bandwidth != 0),
            },
        };
        // A bad structure must be found before anything is done.
        stats.check("stats")?;
        let loaded = guest.load(name, RevertFlags::parse(flags)?, options)?;
        if stats.is_null() {
            return Ok(0);
        }
        let [check_us, load_us, finish_us] = [loaded.check, loaded.load, loaded.finish].map(micros);
        let converted = abi::instantsnap_load_stats {
            size: size_of::<abi::instantsnap_load_stats>(),
            check_us,
            load_us,
            finish_us,
            total_us: check_us + load_us + finish_us,
            memory: loaded.memory.number(),
            running: loaded.running.into(),
        };
        stats.put("stats", converted).map(|()| 0)
    })
}

/// `instantsnap_memory_get_progress`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_memory_get_progress(
    guest: *mut instantsnap_guest,
    mut progress: Fill<abi::instantsnap_memory_progress>,
) -> c_int {
    boundary(last_error::set, || {
        let guest = GUESTS.get(guest)?;
        progress.check("progress")?;
        let found = guest.memory_progress()?;
        let converted = abi::instantsnap_memory_progress {
            size: size_of::<abi::instantsnap_memory_progress>(),
            bytes_in: found.pages.bytes,
            bytes_total: found.pages.total,
            coming: found.is_coming.into(),
            reserved: 0,
        };
        progress.put("progress", converted).map(|()| 0)
    })
}

/// `instantsnap_memory_wait`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_memory_wait(
    guest: *mut instantsnap_guest,
    timeout_ms: c_int,
) -> c_int {
    boundary(last_error::set, || {
        // A negative timeout is no limit.
        let timeout = u64::try_from(timeout_ms).ok().map(Duration::from_millis);
        Ok(GUESTS.get(guest)?.wait_memory(timeout)?.into())
    })
}
