// SPDX-License-Identifier: LGPL-2.1-or-later

//! Files that the watchdog removes, or empties: those that were made, or taken, for the snapshot,
//! and not what may be called so by then.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::own_file::{KnownFile, Undo};
use crate::sys;

/// A file, as the kernel wants it.
#[derive(Debug)]
pub struct Discard {
    path: CString,
    id: (u64, u64),
    undo: Undo,
}

impl Discard {
    pub fn new(file: &KnownFile) -> Option<Discard> {
        Some(Discard { path: path(&file.path)?, id: file.id, undo: file.undo })
    }

    /// Removes it, or empties it.
    pub fn run(&self) {
        match self.undo {
            Undo::Remove if sys::file_id(&self.path) == Some(self.id) => sys::unlink(&self.path),
            Undo::Remove => {}
            Undo::Empty => sys::change_unused(&self.path, self.id, sys::empty),
            Undo::Wipe => sys::change_unused(&self.path, self.id, sys::wipe),
        }
    }
}

/// A path, as the kernel wants it.
pub fn path(path: &Path) -> Option<CString> {
    CString::new(path.as_os_str().as_bytes()).ok()
}
