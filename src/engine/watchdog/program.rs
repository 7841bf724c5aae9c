// SPDX-License-Identifier: LGPL-2.1-or-later

//! The program `instantsnap-watchdog`: how the library finds it, and what it runs.

use std::convert::Infallible;
use std::env;
use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::process::DumpableBehavior;

use super::cgroup;
use super::child::Child;
use super::description::Description;
use super::descriptors::Inherited;
use crate::image::Drain;
use crate::sys::{self, CommandLine};
use crate::tool;

/// The name of the program's file.
const NAME: &str = "instantsnap-watchdog";
/// The environment variable that names another file. An empty value means: no program.
const SETTING: &str = "INSTANTSNAP_WATCHDOG";
/// The directories of the program, relative to the library's directory: the same one, and those of
/// an installation.
const FROM_LIBRARY: [&str; 3] = ["", "../libexec/instantsnap", "../../libexec/instantsnap"];
/// The program's directory in the installation that the library was built for.
const INSTALLED: Option<&str> = option_env!("INSTANTSNAP_LIBEXECDIR");
/// The program's only argument. A user who runs the program by hand does not give it.
const STARTED_BY_LIBRARY: &str = "--started-by-libinstantsnap";

/// The program's command line; `None` if there is no program.
pub fn command_line() -> Option<CommandLine> {
    // Other processes of the user may not look into this one. They may look into a program that it
    // executes, and take its descriptors.
    if rustix::process::dumpable_behavior() != Ok(DumpableBehavior::Dumpable) {
        return None;
    }
    tool::command_line([find()?.as_os_str(), OsStr::new(STARTED_BY_LIBRARY)])
}

/// Whether there is a program that a snapshot of this process would start.
pub fn exists() -> bool {
    command_line().is_some()
}

fn find() -> Option<PathBuf> {
    let installed = INSTALLED.map(|directory| Path::new(directory).join(NAME));
    // A process with more rights than its user must not trust its environment, which that user has
    // set, nor the place of a file that the user may have linked to.
    if sys::is_secure() {
        return installed.filter(|file| can_be_trusted(file));
    }
    if let Some(named) = env::var_os(SETTING) {
        return Some(PathBuf::from(named)).filter(|file| can_be_trusted(file));
    }
    let library = sys::own_file().and_then(|file| file.canonicalize().ok());
    let beside = library.iter().filter_map(|file| file.parent()).flat_map(|directory| {
        FROM_LIBRARY.iter().map(move |place| directory.join(place).join(NAME))
    });
    beside.chain(installed).find(|file| can_be_trusted(file))
}

/// Whether the file is a program that no other user can have written.
fn can_be_trusted(file: &Path) -> bool {
    const WRITABLE_BY_OTHERS: u32 = 0o002;
    tool::is_program(file)
        && file.metadata().is_ok_and(|found| {
            sys::is_trusted(found.uid()) && found.mode() & WRITABLE_BY_OTHERS == 0
        })
}

/// Runs the program. It returns only an error: the library has not started it, another version has,
/// or it cannot do its task.
///
/// # Safety
/// Nothing in this process owns a descriptor beyond the first three.
pub unsafe fn run() -> Result<Infallible, &'static str> {
    if !env::args_os().skip(1).eq([STARTED_BY_LIBRARY]) {
        return Err("libinstantsnap starts this program for the time of a snapshot");
    }
    // SAFETY: as above.
    let Some(inherited) = (unsafe { Inherited::take() }) else {
        return Err("descriptors are missing");
    };
    let Inherited { common, description, drain } = inherited;
    sys::set_process_name(c"instantsnap");
    // The caller's working directory may be on a file system that is to be unmounted.
    let _ = env::set_current_dir("/");
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
