// SPDX-License-Identifier: LGPL-2.1-or-later

//! What the tests of one run share: files that each would make anew, and what each would find out
//! anew. The program that runs them has a directory for it, which ends with it.

use std::path::PathBuf;

use tempfile::TempDir;

use crate::compile::workspace;

const DIRECTORY: &str = "INSTANTSNAP_TEST_RUN";

/// The run. Its directory is removed when it is dropped.
pub struct Run {
    _directory: Option<TempDir>,
}

/// Begins a run, unless this program is part of one.
pub fn begin() -> Run {
    if directory().is_some() {
        return Run { _directory: None };
    }
    let parent = workspace().join("target/testkit");
    std::fs::create_dir_all(&parent).expect("target/testkit cannot be created");
    let own = tempfile::Builder::new().prefix("run-").tempdir_in(parent);
    let own = own.expect("a directory in target/testkit");
    // QEMU and libvirtd run as other users than root, too.
    let readable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(own.path(), readable).expect("a directory of our own");
    // SAFETY: no other thread runs yet.
    unsafe { std::env::set_var(DIRECTORY, own.path()) };
    Run { _directory: Some(own) }
}

/// The run's directory, in a test of one.
pub fn directory() -> Option<PathBuf> {
    std::env::var_os(DIRECTORY).map(PathBuf::from)
}

/// What `find_out` says: once in a run, unless two tests ask at the same time.
pub fn once(key: &str, find_out: impl FnOnce() -> String) -> String {
    let Some(directory) = directory() else { return find_out() };
    let file = directory.join(key.replace('/', "_"));
    if let Ok(known) = std::fs::read_to_string(&file) {
        return known;
    }
    let found = find_out();
    let own = file.with_extension(std::process::id().to_string());
    // Whole, or not there.
    std::fs::write(&own, &found)
        .and_then(|()| std::fs::rename(&own, &file))
        .expect("the directory of this run can be written");
    found
}
