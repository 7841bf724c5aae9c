// SPDX-License-Identifier: LGPL-2.1-or-later

//! The program `instantsnap-watchdog`: how the library finds it, and what it is to do.

pub mod cgroup;

use std::env;
use std::ffi::OsStr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::process::DumpableBehavior;
use serde::{Deserialize, Serialize};

use crate::own_file::as_bytes;
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

/// What the program does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It is the watchdog of a snapshot.
    Watchdog,
    /// It serves the pages of a memory image.
    PageServer,
}

impl Role {
    /// The program's first argument. A user who runs the program by hand does not give it.
    fn argument(self) -> &'static str {
        match self {
            Role::Watchdog => "--started-by-libinstantsnap",
            Role::PageServer => "--serve-pages-for-libinstantsnap",
        }
    }

    /// What this process was started for; `None` if the library has not started it.
    pub fn of_this_process() -> Option<Role> {
        let argument = env::args_os().nth(1)?;
        [Role::Watchdog, Role::PageServer].into_iter().find(|role| argument == role.argument())
    }
}

/// A path that names the same file from every working directory.
#[derive(Debug, Serialize, Deserialize)]
pub struct AbsolutePath(#[serde(with = "as_bytes")] pub PathBuf);

/// Sets up this process, which is the program.
pub fn begin() {
    sys::set_process_name(c"instantsnap");
    // The caller's working directory may be on a file system that is to be unmounted.
    let _ = env::set_current_dir("/");
}

/// The program's command line for this task; `None` if there is no program. `token`: an argument by
/// which its process can be found.
pub fn command_line(role: Role, token: Option<&str>) -> Option<CommandLine> {
    // Other processes of the user may not look into this one. They may look into a program that it
    // executes, and take its descriptors.
    if rustix::process::dumpable_behavior() != Ok(DumpableBehavior::Dumpable) {
        return None;
    }
    let program = find()?;
    let words = [role.argument()].into_iter().chain(token).map(OsStr::new);
    tool::command_line([program.as_os_str()].into_iter().chain(words))
}

/// Whether there is a program that a snapshot of this process would start.
pub fn exists() -> bool {
    command_line(Role::Watchdog, None).is_some()
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
