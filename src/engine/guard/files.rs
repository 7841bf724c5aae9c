//! Files that the guard removes: those that were made for the snapshot, and not what may be called so by then.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::own_file::KnownFile;
use crate::sys;

/// A file, as the kernel wants it.
#[derive(Debug)]
pub struct Remove {
    path: CString,
    id: (u64, u64),
}

impl Remove {
    pub fn new(file: &KnownFile) -> Option<Remove> {
        Some(Remove { path: path(&file.path)?, id: file.id })
    }

    /// Removes it.
    pub fn run(&self) {
        if sys::file_id(&self.path) == Some(self.id) {
            sys::unlink(&self.path);
        }
    }
}

/// A path, as the kernel wants it.
pub fn path(path: &Path) -> Option<CString> {
    CString::new(path.as_os_str().as_bytes()).ok()
}
