// SPDX-License-Identifier: LGPL-2.1-or-later

//! UEFI variables (pflash): QEMU saves them with memory, but does not write-protect them meanwhile.
//!
//! So a variable that the guest sets while memory is being saved would be in a snapshot that is
//! older than it. They are copied before, and compared after: if they changed, there is no
//! snapshot. The copy is the snapshot's; clones get copies of it, because QEMU writes what it loads
//! back into the file.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::error::{Error, Result, fail};
use crate::model::nvram::{LARGEST, content_id, copy_path};
use crate::model::{Drive, RecordedNvram};
use crate::own_file::{KnownFile, OwnFile};
use crate::sys;

/// A copy that was taken, and how the original looked then.
#[derive(Debug)]
pub struct Copy {
    /// What is recorded of it.
    pub recorded: RecordedNvram,
    stamp: Stamp,
    own: OwnFile,
}

type Stamp = (u64, i64, i64);

impl Copy {
    /// What will be copied where.
    pub fn plan(drive: &Drive, memory_file: &Path) -> RecordedNvram {
        RecordedNvram {
            name: drive.name().into(),
            copy: copy_path(&memory_file.display().to_string(), drive.name()),
            original: drive.file.clone(),
            format: drive.format.clone(),
            content: None,
        }
    }

    /// Copies.
    pub fn take(mut recorded: RecordedNvram) -> Result<Copy> {
        let original = Path::new(&recorded.original);
        if !original.is_file() {
            fail!(
                ConfigUnsupported,
                "the UEFI variables of the guest are in '{}', which is not a regular file: they \
                 cannot be copied",
                recorded.original
            );
        }
        let step = format!(
            "cannot copy the UEFI variables '{}' to '{}'",
            recorded.original, recorded.copy
        );
        let stamp = stamp(original).map_err(|error| Error::system(&step, error))?;
        let own = copy_new(original, Path::new(&recorded.copy))
            .map_err(|error| Error::system(&step, error))?;
        let content = read(own.file()).map_err(|error| {
            let _ = own.remove();
            Error::system(&step, error)
        })?;
        recorded.content = Some(content_id(&content));
        Ok(Copy { recorded, stamp, own })
    }

    /// The copy, for a watchdog.
    pub fn known(&self) -> KnownFile {
        self.own.known()
    }

    /// Removes the copy.
    pub fn remove(&self) -> Result<()> {
        self.own.remove().map_err(|error| {
            Error::system(format!("cannot remove '{}'", self.recorded.copy), error)
        })
    }

    /// An error if the original is not what was copied any more.
    pub fn check_unchanged(&self) -> Result<()> {
        let original = Path::new(&self.recorded.original);
        let step = || format!("cannot read the UEFI variables '{}'", original.display());
        // The stamp tells of a change that was taken back, the content of one within the clock's
        // grain.
        let unchanged = || {
            Ok(stamp(original)? == self.stamp
                && read(&sys::open_file(original)?)? == read(self.own.file())?)
        };
        if !unchanged().map_err(|error: io::Error| Error::system(step(), error))? {
            fail!(
                OperationFailed,
                "the guest changed its UEFI variables ('{}') while its memory was being saved, so \
                 they are not those of the instant: take the snapshot again",
                self.recorded.original
            );
        }
        Ok(())
    }
}

/// Copies a file to an open one, on disk.
pub fn copy(from: &Path, mut to: &File) -> io::Result<()> {
    io::copy(&mut sys::open_file(from)?.take(LARGEST), &mut to)?;
    to.sync_all()
}

/// Copies a file to one that must not exist, mode 0600, on disk.
fn copy_new(from: &Path, to: &Path) -> io::Result<OwnFile> {
    let own = OwnFile::create(to)?;
    match copy(from, own.file()).and_then(|()| sys::sync_parent(to)) {
        Ok(()) => Ok(own),
        Err(error) => {
            let _ = own.remove();
            Err(error)
        }
    }
}

fn stamp(path: &Path) -> io::Result<Stamp> {
    let metadata = path.metadata()?;
    Ok((metadata.len(), metadata.mtime(), metadata.mtime_nsec()))
}

fn read(mut file: &File) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    file.rewind()?;
    file.take(LARGEST).read_to_end(&mut content)?;
    Ok(content)
}
