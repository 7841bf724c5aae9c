// SPDX-License-Identifier: LGPL-2.1-or-later

//! Files and results that the tests of one run share. The program that runs the tests has a
//! directory for them, which it removes at its end.

use std::path::PathBuf;

use tempfile::TempDir;

use crate::compile::workspace;

const DIRECTORY: &str = "INSTANTSNAP_TEST_RUN";
/// What the library takes for its watchdog, for daemons with the library in them too.
pub const WATCHDOG: &str = "INSTANTSNAP_WATCHDOG";
/// The directory of the library's journals under libvirt.
pub const STATE: &str = "INSTANTSNAP_STATE_DIRECTORY";

/// The run. Dropping it removes its directory.
pub struct Run {
    _directory: Option<TempDir>,
}

/// Begins a run, unless this program is already part of one.
pub fn begin() -> Run {
    if directory().is_some() {
        return Run { _directory: None };
    }
    let parent = workspace().join("target/testkit");
    std::fs::create_dir_all(&parent).expect("target/testkit cannot be created");
    let own = tempfile::Builder::new().prefix("run-").tempdir_in(parent);
    let own = own.expect("a directory in target/testkit");
    // QEMU and libvirtd also run as other users than root.
    let readable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(own.path(), readable).expect("a directory of our own");
    // SAFETY: no other thread runs yet.
    unsafe {
        std::env::set_var(DIRECTORY, own.path());
        std::env::set_var(STATE, own.path().join("state"));
    }
    name_watchdog();
    Run { _directory: Some(own) }
}

/// A test program is in another directory than the programs that cargo builds for it, so that the
/// library in it would not find its own.
fn name_watchdog() {
    let own = std::env::current_exe().expect("a program has a file");
    let built = own.ancestors().nth(2).map(|directory| directory.join("instantsnap-watchdog"));
    if let Some(program) = built.filter(|program| program.exists())
        && std::env::var_os(WATCHDOG).is_none()
    {
        // SAFETY: no other thread runs yet.
        unsafe { std::env::set_var(WATCHDOG, program) };
    }
}

/// The run's directory, for a test that is part of a run.
pub fn directory() -> Option<PathBuf> {
    std::env::var_os(DIRECTORY).map(PathBuf::from)
}

/// The result of `find_out`, which is called once in a run, unless two tests ask at the same time.
pub fn once(key: &str, find_out: impl FnOnce() -> String) -> String {
    let Some(directory) = directory() else { return find_out() };
    let file = directory.join(key.replace('/', "_"));
    if let Ok(known) = std::fs::read_to_string(&file) {
        return known;
    }
    let found = find_out();
    let own = file.with_extension(std::process::id().to_string());
    // The file is complete or absent.
    std::fs::write(&own, &found)
        .and_then(|()| std::fs::rename(&own, &file))
        .expect("the directory of this run can be written");
    found
}
