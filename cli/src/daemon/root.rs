// SPDX-License-Identifier: LGPL-2.1-or-later

//! The system that the command changes: `/`, or the directory of an image.
//!
//! An image may come from elsewhere, and its symbolic links may lead anywhere. So every file in one
//! is found as that system would find it: absolute links begin at its root, and no link leads out
//! of it. Files are opened by the descriptors of directories that were found in this way, and not
//! by names, which could lead elsewhere a moment later.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags};

/// No file of a unit is larger than this.
const LARGEST: u64 = 1 << 20;

const NULL: &str = "/dev/null";

/// A system's root directory.
#[derive(Debug)]
pub struct Root {
    directory: OwnedFd,
    path: PathBuf,
    /// It is `/` of the running system.
    is_own: bool,
}

impl Root {
    /// The system below a directory.
    pub fn open(path: &Path) -> io::Result<Root> {
        let directory = rustix::fs::open(
            path,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        Ok(Root {
            directory,
            path: path.to_owned(),
            is_own: fs::canonicalize(path)? == Path::new("/"),
        })
    }

    /// Whether it is the running system.
    pub fn is_own(&self) -> bool {
        self.is_own
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The path of a file in it, for messages.
    pub fn shown(&self, path: impl AsRef<Path>) -> PathBuf {
        self.path.join(within(path.as_ref()))
    }

    fn find(&self, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        let (path, flags) = (within(path), flags | OFlags::CLOEXEC);
        let found = if self.is_own {
            // Nothing is outside of `/`, and older kernels have no openat2().
            rustix::fs::openat(&self.directory, &path, flags, Mode::empty())
        } else {
            let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
            rustix::fs::openat2(&self.directory, &path, flags, Mode::empty(), resolve)
        };
        Ok(found?)
    }

    /// Whether this name exists, even as a dangling link.
    pub fn has(&self, path: impl AsRef<Path>) -> bool {
        self.find(path.as_ref(), OFlags::PATH | OFlags::NOFOLLOW).is_ok()
    }

    /// Whether there is a regular file of this name.
    pub fn has_file(&self, path: impl AsRef<Path>) -> bool {
        let kind =
            self.find(path.as_ref(), OFlags::PATH).and_then(|file| Ok(rustix::fs::fstat(&file)?));
        kind.is_ok_and(|data| FileType::from_raw_mode(data.st_mode) == FileType::RegularFile)
    }

    /// Opens a file for reading. A pipe or a device is an error, and is not opened, because opening
    /// it can have effects. But /dev/null, which masks a unit's file, is an empty file.
    pub fn open_file(&self, path: impl AsRef<Path>) -> io::Result<File> {
        let found = self.find(path.as_ref(), OFlags::PATH)?;
        let data = rustix::fs::fstat(&found)?;
        let is_null = || fs::metadata(NULL).is_ok_and(|null| data.st_rdev == null.rdev());
        match FileType::from_raw_mode(data.st_mode) {
            FileType::RegularFile => File::open(format!("/proc/self/fd/{}", found.as_raw_fd())),
            FileType::CharacterDevice if is_null() => File::open(NULL),
            _ => Err(io::Error::other("it is not a file")),
        }
    }

    /// Reads one of a unit's files.
    pub fn read(&self, path: impl AsRef<Path>) -> io::Result<String> {
        let (mut text, mut file) = (String::new(), self.open_file(path)?.take(LARGEST + 1));
        file.read_to_string(&mut text)?;
        if file.limit() == 0 { Err(io::Error::other("it is too large")) } else { Ok(text) }
    }

    /// The names in a directory.
    pub fn names(&self, path: impl AsRef<Path>) -> io::Result<Vec<OsString>> {
        let directory = self.find(path.as_ref(), OFlags::RDONLY | OFlags::DIRECTORY)?;
        let names = Dir::new(directory)?
            .map(|entry| Ok(OsString::from_vec(entry?.file_name().to_bytes().to_vec())));
        let mut names: Vec<OsString> = names.collect::<io::Result<_>>()?;
        names.retain(|name| name != "." && name != "..");
        Ok(names)
    }

    /// Opens an existing directory.
    pub fn directory(&self, path: impl AsRef<Path>) -> io::Result<Directory> {
        Ok(Directory(self.find(path.as_ref(), OFlags::RDONLY | OFlags::DIRECTORY)?))
    }

    /// Opens a directory. Makes it, and those above it, if they do not exist.
    pub fn make_directory(&self, path: impl AsRef<Path>) -> io::Result<Directory> {
        let (mut at, mut made) = (PathBuf::new(), self.directory("")?);
        for name in within(path.as_ref()).iter() {
            at.push(name);
            made = match self.directory(&at) {
                Err(error) if error.kind() == ErrorKind::NotFound => made.make_directory(name)?,
                other => other?,
            };
        }
        Ok(made)
    }
}

/// A path without the parts that would lead out of the system.
fn within(path: &Path) -> PathBuf {
    let parts = path
        .components()
        .filter(|part| matches!(part, Component::Normal(_) | Component::ParentDir));
    let path: PathBuf = parts.collect();
    if path.as_os_str().is_empty() { ".".into() } else { path }
}

/// An open directory, even if it is moved.
#[derive(Debug)]
pub struct Directory(OwnedFd);

impl Directory {
    fn make_directory(&self, name: &OsStr) -> io::Result<Directory> {
        match rustix::fs::mkdirat(&self.0, name, Mode::from_raw_mode(0o755)) {
            Ok(()) => rustix::fs::fsync(&self.0)?,
            // Another process has made it meanwhile; or it is a dangling link, which is not
            // followed.
            Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::openat(&self.0, name, flags, Mode::empty()) {
            Ok(made) => Ok(Directory(made)),
            Err(rustix::io::Errno::NOTDIR | rustix::io::Errno::LOOP) => {
                let name = name.to_string_lossy();
                Err(io::Error::other(format!(
                    "{name} is a symbolic link that leads nowhere in that system: remove it"
                )))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Writes a file atomically. An existing one is replaced; the target of a link is not changed.
    pub fn write(&self, name: &str, text: &str) -> io::Result<()> {
        let (fresh, mut file) = self.fresh(name)?;
        let written = file.write_all(text.as_bytes()).and_then(|()| {
            rustix::fs::fchmod(&file, Mode::from_raw_mode(0o644))?;
            file.sync_all()?;
            Ok(rustix::fs::renameat(&self.0, &fresh, &self.0, name)?)
        });
        if let Err(error) = written {
            let _ = rustix::fs::unlinkat(&self.0, &fresh, AtFlags::empty());
            return Err(error);
        }
        Ok(rustix::fs::fsync(&self.0)?)
    }

    /// Creates a new file beside one of this name. Files that were left there stay.
    fn fresh(&self, name: &str) -> io::Result<(String, File)> {
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        for number in 0..100 {
            let fresh = format!("{name}.new-{}-{number}", std::process::id());
            match rustix::fs::openat(&self.0, &fresh, flags, Mode::from_raw_mode(0o600)) {
                Ok(file) => return Ok((fresh, file.into())),
                Err(rustix::io::Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(io::Error::from(ErrorKind::AlreadyExists))
    }

    /// Removes a file, but not the target of a link.
    pub fn remove_file(&self, name: &str) -> io::Result<()> {
        rustix::fs::unlinkat(&self.0, name, AtFlags::empty())?;
        Ok(rustix::fs::fsync(&self.0)?)
    }

    /// Removes an empty directory.
    pub fn remove_directory(&self, name: &str) -> io::Result<()> {
        rustix::fs::unlinkat(&self.0, name, AtFlags::REMOVEDIR)?;
        Ok(rustix::fs::fsync(&self.0)?)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_and_parent_directories_do_not_lead_out() {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("secret"), "outside").unwrap();
        let directory = tempfile::tempdir_in(outside.path()).unwrap();
        symlink(outside.path(), directory.path().join("absolute")).unwrap();
        symlink("..", directory.path().join("relative")).unwrap();
        symlink("/inside", directory.path().join("within")).unwrap();
        fs::write(directory.path().join("inside"), "inside").unwrap();
        let root = Root::open(directory.path()).unwrap();
        assert!(!root.is_own() && Root::open(Path::new("/")).unwrap().is_own());
        for path in ["absolute/secret", "relative/secret", "../secret", "/../secret"] {
            assert!(root.read(path).is_err() && !root.has_file(path), "{path}");
        }
        assert_eq!(root.read("/within").unwrap(), "inside");
        assert!(root.has("absolute") && !root.has_file("absolute"));
        let refused = root.make_directory("absolute/sub").unwrap_err();
        assert!(refused.to_string().contains("leads nowhere in that system"), "{refused}");
    }

    #[test]
    fn a_pipe_is_not_waited_for_and_a_huge_file_is_not_read() {
        let directory = tempfile::tempdir().unwrap();
        let root = Root::open(directory.path()).unwrap();
        let pipe = directory.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, FileType::Fifo, Mode::from_raw_mode(0o600), 0)
            .unwrap();
        assert!(root.read("pipe").unwrap_err().to_string().contains("not a file"));
        fs::File::create(directory.path().join("huge")).unwrap().set_len(LARGEST + 1).unwrap();
        assert!(root.read("huge").unwrap_err().to_string().contains("too large"));
    }
}
