// SPDX-License-Identifier: LGPL-2.1-or-later

//! What the program does as a watchdog.

use std::convert::Infallible;
use std::fs::File;
use std::io::Read;

use super::child::Child;
use super::description::Description;
use super::descriptors::Inherited;
use crate::engine::program::{begin, cgroup};
use crate::image::Drain;

/// Runs the watchdog. It returns only an error: another version of the library has started it, or
/// it cannot do its task.
///
/// # Safety
/// Nothing in this process owns a descriptor beyond the first three.
pub unsafe fn run() -> Result<Infallible, &'static str> {
    // SAFETY: as above.
    let Some(inherited) = (unsafe { Inherited::take() }) else {
        return Err("descriptors are missing");
    };
    let Inherited { common, description, drain } = inherited;
    begin();
    let mut text = Vec::new();
    let description: Description = File::from(description)
        .read_to_end(&mut text)
        .ok()
        .and_then(|_| serde_json::from_slice(&text).ok())
        .filter(Description::is_current)
        .ok_or("another version of libinstantsnap has started this program")?;
    // Before it has threads, which cannot all enter some cgroups.
    if let Some(cgroup) = &description.cgroup {
        cgroup::enter(&cgroup.0).map_err(|_| "the cgroup cannot be entered")?;
    }
    let cannot_move = "the stream cannot be moved";
    let pipe = common.pipe.try_clone().map_err(|_| cannot_move)?;
    let Description { offset, format, .. } = description;
    let drain = Drain::inherited(pipe, drain, offset, format).map_err(|_| cannot_move)?;
    if drain.start().is_err() {
        // Dropping the drain would also stop the thread that the caller starts instead.
        std::mem::forget(drain);
        return Err(cannot_move);
    }
    Child::new(description).run(common, Some(drain))
}
