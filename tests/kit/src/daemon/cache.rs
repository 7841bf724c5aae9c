// SPDX-License-Identifier: LGPL-2.1-or-later

//! What libvirt has found out about QEMU binaries, handed from daemon to daemon: it takes seconds
//! to find out.
//!
//! libvirt itself checks whether it still holds (time stamps of the binaries, the kernel, KVM), so
//! that a stale entry costs time and nothing else.

use std::path::{Path, PathBuf};

use super::layout::Layout;
use crate::compile::workspace;

/// Gives a daemon that is not started yet what is known.
pub fn seed(layout: &Layout) {
    let target = layout.capabilities();
    std::fs::create_dir_all(&target).expect("the capabilities' directory");
    for file in files(&kept(layout)) {
        // Another process may be about to replace it: what is read is whole all the same.
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

/// Keeps what a daemon knows.
pub fn keep(layout: &Layout) {
    let target = kept(layout);
    std::fs::create_dir_all(&target).expect("target/testkit cannot be created");
    for file in files(&layout.capabilities()) {
        let whole = target.join(file.file_name().expect("a name"));
        if same(&file, &whole) {
            continue;
        }
        // Visible only whole: others do the same at the same time.
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
