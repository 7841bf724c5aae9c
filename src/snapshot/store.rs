//! The state directory of one guest: a `<domainsnapshot>` file for each snapshot, and which of them is current.
//!
//! Files are mode 0600 and replaced atomically, so readers need no lock. Writers hold `.lock` for the moment of a change
//! only. A snapshot that is being made holds its name by a lock of its own, which the kernel drops should its maker die.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use tempfile::NamedTempFile;

use super::{Record, check_name, generated_names};
use crate::error::{Code, Error, Result, fail};
use crate::sys;

/// A guest's state directory.
#[derive(Clone, Debug)]
pub struct Store {
    directory: PathBuf,
}

/// A snapshot's name, held while the snapshot is made.
#[derive(Debug)]
pub struct Reservation {
    /// The name.
    pub name: String,
    path: PathBuf,
    _lock: File,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // Before the lock goes, so that nobody can hold a lock on a file without a name.
        let _ = sys::remove_file(&self.path);
    }
}

impl Store {
    /// Opens an existing directory.
    pub fn open(directory: &Path) -> Result<Store> {
        let directory = directory.canonicalize().map_err(|error| {
            Error::system(format!("cannot open the state directory '{}'", directory.display()), error)
        })?;
        if !directory.is_dir() {
            fail!(SystemError, "the state directory '{}' is not a directory", directory.display());
        }
        if directory.to_str().is_none_or(|path| path.chars().any(char::is_control)) {
            fail!(SystemError, "the state directory {directory:?} has a name that XML cannot hold");
        }
        Ok(Store { directory })
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Where a file of this name is in the directory.
    pub fn path(&self, file: &str) -> PathBuf {
        self.directory.join(file)
    }

    /// Holds a name for a snapshot to be made: this one, or, if none is given, one made of the time.
    pub fn reserve(&self, name: Option<&str>) -> Result<Reservation> {
        let _lock = self.lock()?;
        // What could not be read at the end is better not begun.
        self.current()?;
        if let Some(name) = name {
            return self.reserve_locked(name);
        }
        let mut last = None;
        for candidate in generated_names() {
            match self.reserve_locked(&candidate) {
                Err(error) if error.code == Code::OperationInvalid => last = Some(error),
                other => return other,
            }
        }
        Err(last.expect("there were candidates"))
    }

    fn reserve_locked(&self, name: &str) -> Result<Reservation> {
        check_name(name)?;
        sys::wait_until_forked();
        if self.record_path(name).exists() {
            fail!(OperationInvalid, "domain snapshot '{name}' already exists in '{}'", self.directory.display());
        }
        let path = self.path(&format!(".{name}.reserved"));
        loop {
            let lock = self.open_file(&path)?;
            match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) if is_at(&lock, &path) => return Ok(Reservation { name: name.into(), path, _lock: lock }),
                // Its last holder removed it after we had opened it: the next to come would have another file.
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    fail!(OperationInvalid, "domain snapshot '{name}' is being created already")
                }
                Err(error) => return Err(Error::system(format!("cannot lock '{}'", path.display()), error)),
            }
        }
    }

    /// Records a snapshot and makes it the current one; its parent is the one current until now, which is returned in it.
    pub fn commit(&self, reservation: &Reservation, mut record: Record) -> Result<Record> {
        let _lock = self.lock()?;
        record.parent = self.current()?;
        let path = self.record_path(&reservation.name);
        self.write(&path, record.to_xml().as_bytes(), false)?;
        if let Err(error) = self.write_current(Some(&record.name)) {
            let _ = sys::remove_file(&path);
            return Err(error);
        }
        Ok(record)
    }

    /// Names and records, oldest first.
    pub fn list(&self) -> Result<Vec<Record>> {
        let step =
            |error| Error::system(format!("cannot read the state directory '{}'", self.directory.display()), error);
        let mut records = Vec::new();
        for entry in self.directory.read_dir().map_err(step)? {
            let file = entry.map_err(step)?.file_name();
            let name = file.to_str().and_then(|file| file.strip_suffix(".xml"));
            if let Some(name) = name.filter(|name| check_name(name).is_ok()) {
                match self.read(name) {
                    // Deleted since the directory was read.
                    Err(error) if error.code == Code::NoDomainSnapshot => {}
                    other => records.push(other?),
                }
            }
        }
        records.sort_by(|a, b| (a.creation_time, &a.name).cmp(&(b.creation_time, &b.name)));
        Ok(parents_first(records))
    }

    /// One record.
    pub fn read(&self, name: &str) -> Result<Record> {
        check_name(name)?;
        let path = self.record_path(name);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                fail!(
                    NoDomainSnapshot,
                    "no domain snapshot with matching name '{name}' in '{}'",
                    self.directory.display()
                )
            }
            Err(error) if error.kind() == ErrorKind::InvalidData => {
                fail!(InvalidDomainSnapshot, "'{}': snapshot metadata is damaged: it is not UTF-8", path.display())
            }
            Err(error) => return Err(Error::system(format!("cannot read '{}'", path.display()), error)),
        };
        let record = Record::parse(&text)
            .map_err(|error| Error::new(error.code, format!("'{}': {}", path.display(), error.message)))?;
        if record.name != name {
            fail!(InvalidDomainSnapshot, "'{}' is the metadata of '{}'", path.display(), record.name);
        }
        Ok(record)
    }

    /// The name of the current snapshot.
    pub fn current(&self) -> Result<Option<String>> {
        let path = self.path(".current");
        match std::fs::read_to_string(&path) {
            // It can name one that was removed by hand, or whose commit was cut short by a crash.
            Ok(name) => Ok(Some(name).filter(|name| check_name(name).is_ok() && self.record_path(name).exists())),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::system(format!("cannot read '{}'", path.display()), error)),
        }
    }

    /// Makes a recorded snapshot the current one.
    pub fn set_current(&self, name: &str) -> Result<()> {
        let _lock = self.lock()?;
        self.read(name)?;
        self.write_current(Some(name))
    }

    /// Forgets a snapshot: its children become its parent's, and where it was current, its parent is.
    pub fn forget(&self, name: &str) -> Result<()> {
        let _lock = self.lock()?;
        let record = self.read(name)?;
        for mut child in self.list()?.into_iter().filter(|child| child.parent.as_deref() == Some(name)) {
            child.parent.clone_from(&record.parent);
            self.write(&self.record_path(&child.name), child.to_xml().as_bytes(), true)?;
        }
        if self.current()?.as_deref() == Some(name) {
            self.write_current(record.parent.as_deref())?;
        }
        let path = self.record_path(name);
        sys::remove_file(&path)
            .and_then(|()| sys::sync_parent(&path))
            .map_err(|error| Error::system(format!("cannot remove '{}'", path.display()), error))
    }

    fn record_path(&self, name: &str) -> PathBuf {
        self.path(&format!("{name}.xml"))
    }

    fn write_current(&self, name: Option<&str>) -> Result<()> {
        self.write(&self.path(".current"), name.unwrap_or_default().as_bytes(), true)
    }

    /// Writes a file so that at any moment, a crash included, the old or the new one is there, whole.
    fn write(&self, path: &Path, content: &[u8], replace: bool) -> Result<()> {
        let write = || -> io::Result<()> {
            let mut file = NamedTempFile::new_in(&self.directory)?;
            file.write_all(content)?;
            file.as_file().sync_all()?;
            if replace {
                file.persist(path).map_err(|error| error.error)?;
            } else {
                file.persist_noclobber(path).map_err(|error| error.error)?;
            }
            sys::sync_parent(path).inspect_err(|_| {
                // Of a new file nothing is left; an old one cannot be brought back.
                if !replace {
                    let _ = sys::remove_file(path);
                }
            })
        };
        write().map_err(|error| Error::system(format!("cannot write '{}'", path.display()), error))
    }

    /// Held for the moment of a change only, so waiting for it is short.
    fn lock(&self) -> Result<File> {
        let path = self.path(".lock");
        let lock = self.open_file(&path)?;
        rustix::io::retry_on_intr(|| flock(&lock, FlockOperation::LockExclusive))
            .map_err(|error| Error::system(format!("cannot lock '{}'", path.display()), error))?;
        Ok(lock)
    }

    fn open_file(&self, path: &Path) -> Result<File> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        options.open(path).map_err(|error| Error::system(format!("cannot open '{}'", path.display()), error))
    }
}

/// Whether an open file is the one of this path.
fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), path.metadata()) {
        (Ok(file), Ok(path)) => (file.dev(), file.ino()) == (path.dev(), path.ino()),
        _ => false,
    }
}

/// Snapshots of one second are in the order of their names; a parent still comes before its child.
fn parents_first(mut left: Vec<Record>) -> Vec<Record> {
    let mut sorted: Vec<Record> = Vec::with_capacity(left.len());
    while !left.is_empty() {
        let waits = |record: &Record| {
            record.parent.as_ref().is_some_and(|parent| left.iter().any(|other| &other.name == parent))
        };
        // Where parents form a circle (an edited file), the oldest goes first.
        let next = left.iter().position(|record| !waits(record)).unwrap_or(0);
        sorted.push(left.remove(next));
    }
    sorted
}
