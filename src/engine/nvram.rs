// SPDX-License-Identifier: LGPL-2.1-or-later

//! Copies of UEFI variables (pflash).
//!
//! QEMU saves them with memory, but does not write-protect them meanwhile. So a variable that the
//! guest sets while memory is being saved would be in a snapshot of an earlier moment. They are
//! copied before, and compared after: if they changed, the snapshot fails. The copy belongs to the
//! snapshot. Clones get copies of it, because QEMU writes the variables that it loads back into the
//! file.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::error::{Error, Result, fail};
use crate::model::nvram::{LARGEST, content_id, copy_path};
use crate::model::{Drive, RecordedNvram};
use crate::own_file::{KnownFile, OwnFile};
use crate::sys;

/// A copy that was taken, and the size and times that the original had then.
#[derive(Debug)]
pub struct Copy {
    /// The copy's part of the snapshot's record.
    pub recorded: RecordedNvram,
    stamp: Stamp,
    own: OwnFile,
}

type Stamp = (u64, i64, i64);

impl Copy {
    /// Plans the copy of a drive's variables: the file to copy, and the name of the copy.
    pub fn plan(drive: &Drive, memory_file: &Path) -> RecordedNvram {
        RecordedNvram {
            name: drive.name().into(),
            copy: copy_path(&memory_file.display().to_string(), drive.name()),
            original: drive.file.clone(),
            format: drive.format.clone(),
            content: None,
        }
    }

    /// Makes the copy that was planned.
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

    /// The file of the copy, which the watchdog removes if the snapshot fails.
    pub fn known(&self) -> KnownFile {
        self.own.known()
    }

    /// Removes the copy.
    pub fn remove(&self) -> Result<()> {
        self.own.remove().map_err(|error| {
            Error::system(format!("cannot remove '{}'", self.recorded.copy), error)
        })
    }

    /// Returns an error if the original has changed since it was copied.
    pub fn check_unchanged(&self) -> Result<()> {
        let original = Path::new(&self.recorded.original);
        let step = || format!("cannot read the UEFI variables '{}'", original.display());
        // The stamp shows a change that was taken back; the content shows one that is too quick for
        // the clock's resolution.
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

/// Copies a file to an open one, and syncs that to disk.
pub fn copy(from: &Path, mut to: &File) -> io::Result<()> {
    io::copy(&mut sys::open_file(from)?.take(LARGEST), &mut to)?;
    to.sync_all()
}

/// Copies a file to a new one of mode 0600, and syncs that to disk. It must not exist yet.
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
