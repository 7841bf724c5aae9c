// SPDX-License-Identifier: LGPL-2.1-or-later

//! A file that we have made, and may have to remove. Another file that has its name by then is not
//! removed.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf, absolute};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, openat, statat, unlinkat};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// A file that we have made. Its directory is kept open, so that a user who may rename the
/// directories above cannot make us remove a file of another directory.
#[derive(Debug)]
pub struct OwnFile {
    path: PathBuf,
    directory: OwnedFd,
    name: OsString,
    file: File,
    /// Its device and its inode. No other file has the same ones while this one is open.
    id: (u64, u64),
}

impl OwnFile {
    /// Creates the file with mode 0600, for reading and writing. It is an error if it exists, and
    /// then it is not changed.
    pub fn create(path: &Path) -> io::Result<OwnFile> {
        let (directory, name) = open_directory(path)?;
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
        let file = openat(&directory, name, flags, Mode::RUSR | Mode::WUSR)?;
        OwnFile::new(path, directory, name, file)
    }

    /// Opens a file that another process has made, for reading and writing. `None` if another file,
    /// or none, is at its path now.
    pub fn reopen(known: &KnownFile) -> io::Result<Option<OwnFile>> {
        OwnFile::open(known, OFlags::RDWR)
    }

    /// The same for a file that is to be removed, and that nobody may be allowed to write.
    pub fn reopen_to_remove(known: &KnownFile) -> io::Result<Option<OwnFile>> {
        OwnFile::open(known, OFlags::RDONLY)
    }

    fn open(known: &KnownFile, access: OFlags) -> io::Result<Option<OwnFile>> {
        let (directory, name) = open_directory(&known.path)?;
        let flags = access | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match openat(&directory, name, flags, Mode::empty()) {
            Ok(file) => file,
            Err(Errno::NOENT | Errno::LOOP) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        let own = OwnFile::new(&known.path, directory, name, file)?;
        Ok((own.id == known.id).then_some(own))
    }

    fn new(path: &Path, directory: OwnedFd, name: &OsStr, file: OwnedFd) -> io::Result<OwnFile> {
        let file = File::from(file);
        let metadata = file.metadata()?;
        let id = (metadata.dev(), metadata.ino());
        Ok(OwnFile { path: path.into(), directory, name: name.into(), file, id })
    }

    /// The path by which it was created.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The data by which a process without this one's descriptors recognizes the file.
    pub fn known(&self) -> KnownFile {
        KnownFile { path: self.path.clone(), id: self.id, undo: Undo::Remove }
    }

    /// Removes the file, if it still exists.
    pub fn remove(&self) -> io::Result<()> {
        match statat(&self.directory, &self.name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) if (found.st_dev, found.st_ino) != self.id => return Ok(()),
            Err(Errno::NOENT) => return Ok(()),
            Err(errno) => return Err(errno.into()),
            Ok(_) => {}
        }
        match unlinkat(&self.directory, &self.name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// A file, identified by its path and by the inode that it had when it was made.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KnownFile {
    /// The path by which it was created.
    #[serde(with = "as_bytes")]
    pub path: PathBuf,
    /// Its device and its inode.
    pub id: (u64, u64),
    /// How it is undone.
    pub undo: Undo,
}

impl KnownFile {
    /// The same file by a path that names it from every working directory.
    pub fn with_absolute_path(self) -> KnownFile {
        KnownFile { path: from_root(&self.path), ..self }
    }
}

/// Makes a path absolute, for a process whose working directory is another one.
pub fn from_root(path: &Path) -> PathBuf {
    absolute(path).unwrap_or_else(|_| path.into())
}

/// Opens the directory of a file. Returns the file's name too.
fn open_directory(path: &Path) -> io::Result<(OwnedFd, &OsStr)> {
    let name = path.file_name().ok_or_else(|| io::Error::from(io::ErrorKind::IsADirectory))?;
    let parent = path.parent().map(Path::as_os_str).filter(|parent| !parent.is_empty());
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok((openat(CWD, parent.unwrap_or(OsStr::new(".")), flags, Mode::empty())?, name))
}

/// How an undo changes a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Undo {
    /// The snapshot made the file: the undo removes it.
    Remove,
    /// The file existed before, and was empty: the undo empties it.
    Empty,
    /// A block device: the undo overwrites the header of the overlay on it.
    Wipe,
}

/// A path in JSON, which need not be text.
pub mod as_bytes {
    use std::ffi::OsString;
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    use std::path::{Path, PathBuf};

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[allow(missing_docs)]
    pub fn serialize<S: Serializer>(path: &Path, to: S) -> Result<S::Ok, S::Error> {
        path.as_os_str().as_bytes().serialize(to)
    }

    #[allow(missing_docs)]
    pub fn deserialize<'a, D: Deserializer<'a>>(from: D) -> Result<PathBuf, D::Error> {
        Ok(OsString::from_vec(Vec::deserialize(from)?).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_removed_wherever_its_directory_is_now_and_another_of_its_name_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let (here, there) = (directory.path().join("here"), directory.path().join("there"));
        std::fs::create_dir(&here).unwrap();
        let own = OwnFile::create(&here.join("file")).unwrap();
        assert_eq!(
            OwnFile::create(&here.join("file")).unwrap_err().kind(),
            io::ErrorKind::AlreadyExists
        );
        // Another user puts another directory in its place, with a file of that name.
        std::fs::rename(&here, &there).unwrap();
        std::fs::create_dir(&here).unwrap();
        std::fs::write(here.join("file"), "another").unwrap();
        own.remove().unwrap();
        assert!(!there.join("file").exists());
        assert!(here.join("file").exists());
        own.remove().unwrap();
    }

    #[test]
    fn what_has_taken_its_name_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let own = OwnFile::create(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/nonexistent", &path).unwrap();
        own.remove().unwrap();
        assert!(path.symlink_metadata().is_ok());
    }
}
