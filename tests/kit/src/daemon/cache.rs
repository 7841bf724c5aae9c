// SPDX-License-Identifier: LGPL-2.1-or-later

//! libvirt's capabilities of QEMU binaries, passed from daemon to daemon because it takes libvirt
//! seconds to probe them.
//!
//! libvirt itself checks whether they are still valid (time stamps of the binaries, the kernel,
//! KVM), so a stale entry only costs time.

use std::path::{Path, PathBuf};

use super::layout::Layout;
use crate::compile::workspace;

/// Gives a daemon that is not started yet the kept capabilities.
pub fn seed(layout: &Layout) {
    let target = layout.capabilities();
    std::fs::create_dir_all(&target).expect("the capabilities' directory");
    for file in files(&kept(layout)) {
        // Another process can replace the file at any time, but each version is complete.
        let name = file.file_name().expect("a name");
        let _ = std::fs::copy(&file, target.join(name));
    }
    if let Some(uid) = layout.daemon_user() {
        let made =
            target.ancestors().take_while(|path| *path != layout.directory()).map(Path::to_owned);
        for path in made.chain(files(&target)) {
            std::os::unix::fs::chown(&path, Some(uid), Some(uid))
                .expect("chown of the capabilities");
        }
    }
}

/// Keeps the daemon's capabilities.
pub fn keep(layout: &Layout) {
    let target = kept(layout);
    std::fs::create_dir_all(&target).expect("target/testkit cannot be created");
    for file in files(&layout.capabilities()) {
        let whole = target.join(file.file_name().expect("a name"));
        if same(&file, &whole) {
            continue;
        }
        // The rename makes the complete file visible, because other processes do the same at the
        // same time.
        if let Ok(own) = tempfile::NamedTempFile::new_in(&target) {
            let _ = std::fs::copy(&file, own.path()).map(|_| own.persist(&whole));
        }
    }
}

fn kept(layout: &Layout) -> PathBuf {
    workspace().join("target/testkit/capabilities").join(layout.capabilities_key())
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|end| end == "xml"))
        .collect()
}

fn same(one: &Path, other: &Path) -> bool {
    std::fs::read(one).ok() == std::fs::read(other).ok()
}
