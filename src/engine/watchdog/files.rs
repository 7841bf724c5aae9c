// SPDX-License-Identifier: LGPL-2.1-or-later

//! Files that the watchdog removes or empties. The library has made them for the snapshot, or has
//! taken them for it. If another file has one of their names by then, the watchdog does not change
//! it.

use std::ffi::CString;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{Mode, OFlags};

use crate::backend::images;
use crate::own_file::{KnownFile, Undo};
use crate::sys;

/// A file to remove or empty, in the form that the system calls need.
#[derive(Debug)]
pub struct Discard {
    path: CString,
    directory: CString,
    id: (u64, u64),
    undo: Undo,
}

impl Discard {
    pub fn new(file: &KnownFile) -> Option<Discard> {
        let directory = path(file.path.parent()?)?;
        Some(Discard { path: path(&file.path)?, directory, id: file.id, undo: file.undo })
    }

    /// Whether the file is an overlay that certainly has no data.
    pub fn is_empty_overlay(&self) -> bool {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let opened = rustix::fs::open(&*self.path, flags, Mode::empty());
        sys::file_id(&self.path) == Some(self.id)
            && opened.is_ok_and(|file| images::is_surely_empty(&File::from(file)))
    }

    /// Removes the file, empties it, or overwrites its header.
    pub fn run(&self) {
        match self.undo {
            Undo::Remove if sys::file_id(&self.path) == Some(self.id) => sys::unlink(&self.path),
            Undo::Remove => {}
            Undo::Empty => sys::change_unused(&self.path, self.id, sys::empty),
            Undo::Wipe => sys::change_unused(&self.path, self.id, sys::wipe),
        }
    }
}

/// Discards files, so that not even a loss of power brings one back. Returns whether all are gone.
pub fn discard_for_good(files: &[Discard]) -> bool {
    let mut gone = true;
    for file in files {
        file.run();
        gone &= sys::sync_directory(&file.directory);
        gone &= file.undo != Undo::Remove || sys::file_id(&file.path) != Some(file.id);
    }
    gone
}

/// The path as a C string; `None` if it contains a NUL.
pub fn path(path: &Path) -> Option<CString> {
    CString::new(path.as_os_str().as_bytes()).ok()
}
