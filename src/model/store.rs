// SPDX-License-Identifier: LGPL-2.1-or-later

//! The state directory of one guest: a `<domainsnapshot>` file for each snapshot, and which of them
//! is current.
//!
//! Files are mode 0600 and replaced atomically, so readers need no lock. Writers hold `.lock` for
//! the moment of a change only. A snapshot that is being made holds its name by a lock of its own,
//! which the kernel drops should its maker die.
//!
//! What a record names is merged and removed with the rights of this process. So a directory that
//! others may write to is for reading only: nothing is made, deleted or brought back in it. What
//! others have put into it all the same is no record.

use std::collections::HashSet;
use std::fs::{File, Metadata};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use tempfile::NamedTempFile;

use super::names::{check_name, generated_names};
use super::record::Record;
use super::xml;
use crate::deadline::Deadline;
use crate::error::{Code, Error, Result, fail};
use crate::own_file::{KnownFile, Undo};
use crate::sys;

/// Nobody changes a state directory for so long.
const LOCKED: Duration = Duration::from_secs(30);

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
    lock: Lock,
}

/// A file that is locked. A process that the caller has forked meanwhile has the file too; the lock
/// goes all the same.
#[derive(Debug)]
struct Lock(File);

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

impl Reservation {
    /// What holds the name.
    pub fn held(&self) -> &File {
        &self.lock.0
    }

    /// Its file, for a process that goes on where this one ends.
    pub fn known(&self) -> io::Result<KnownFile> {
        let metadata = self.lock.0.metadata()?;
        Ok(KnownFile {
            path: self.path.clone(),
            id: (metadata.dev(), metadata.ino()),
            undo: Undo::Remove,
        })
    }
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
            Error::system(
                format!("cannot open the state directory '{}'", directory.display()),
                error,
            )
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

    /// Holds a name for a snapshot to be made: this one, or, if none is given, one made of the
    /// time.
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
        // A symbolic link that leads nowhere is in the way, too.
        if self.record_path(name).symlink_metadata().is_ok() {
            fail!(
                OperationInvalid,
                "domain snapshot '{name}' already exists in '{}'",
                self.directory.display()
            );
        }
        let path = self.path(&format!(".{name}.reserved"));
        loop {
            let lock = self.open_file(&path)?;
            match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) if is_at(&lock, &path) => {
                    return Ok(Reservation { name: name.into(), path, lock: Lock(lock) });
                }
                // Its last holder removed it after we had opened it: the next to come would have
                // another file.
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => {
                    fail!(OperationInvalid, "domain snapshot '{name}' is being created already")
                }
                Err(error) => {
                    return Err(Error::system(format!("cannot lock '{}'", path.display()), error));
                }
            }
        }
    }

    /// Records a snapshot and makes it the current one; its parent is the one current until now,
    /// which is returned in it.
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

    /// Records, oldest first, a parent before its children. What cannot be read is passed over: see
    /// [`Store::read`] of it.
    pub fn list(&self) -> Result<Vec<Record>> {
        Ok(self.look_through()?.records)
    }

    /// All records but that of this name, for what merges or removes images: also of snapshots
    /// whose records were renamed. An error where one is damaged, since what its snapshot needs is
    /// not known.
    pub fn others(&self, name: &str) -> Result<Vec<Record>> {
        check_owner(&self.directory)?;
        let Contents { records, renamed, damaged } = self.look_through()?;
        if let Some(error) = damaged.into_iter().next() {
            return Err(error.and(
                "so it is not known which images that snapshot needs: mend the file, or move it \
                 out of the directory",
            ));
        }
        Ok(records.into_iter().filter(|record| record.name != name).chain(renamed).collect())
    }

    fn look_through(&self) -> Result<Contents> {
        let step = |error| {
            Error::system(
                format!("cannot read the state directory '{}'", self.directory.display()),
                error,
            )
        };
        let (mut records, mut others) = (Vec::new(), Vec::new());
        let mut damaged = Vec::new();
        for entry in self.directory.read_dir().map_err(step)? {
            let file = entry.map_err(step)?.file_name();
            let name = file.to_str().and_then(|file| file.strip_suffix(".xml"));
            let Some(name) = name.filter(|name| check_name(name).is_ok()) else { continue };
            match self.read_file(name) {
                Ok(record) if record.name == name => records.push(record),
                Ok(record) => others.push(record),
                Err(Unread::NotOurs(_)) => {}
                Err(Unread::Damaged(error)) => damaged.push(error),
            }
        }
        records.sort_by(|a, b| (a.creation_time, &a.name).cmp(&(b.creation_time, &b.name)));
        // A copy of a record that is there says nothing new.
        let is_copy = |other: &Record| {
            records
                .iter()
                .any(|record| (&record.name, &record.disks) == (&other.name, &other.disks))
        };
        let renamed = others.into_iter().filter(|other| !is_copy(other)).collect();
        Ok(Contents { records: parents_first(records), renamed, damaged })
    }

    /// One record, by which files are removed, merged or brought back: an error where others could
    /// have written it.
    pub fn read_to_use(&self, name: &str) -> Result<Record> {
        check_owner(&self.directory)?;
        self.read(name)
    }

    /// One record.
    pub fn read(&self, name: &str) -> Result<Record> {
        check_name(name)?;
        let record = self.read_file(name).map_err(|unread| match unread {
            Unread::NotOurs(error) | Unread::Damaged(error) => error,
        })?;
        if record.name != name {
            fail!(
                InvalidDomainSnapshot,
                "'{}' is the metadata of '{}'",
                self.record_path(name).display(),
                record.name
            );
        }
        Ok(record)
    }

    fn read_file(&self, name: &str) -> std::result::Result<Record, Unread> {
        let path = self.record_path(name);
        let damaged =
            |code, reason: &str| Error::new(code, format!("'{}': {reason}", path.display()));
        let text = match read_trusted(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(Unread::NotOurs(Error::new(
                    Code::NoDomainSnapshot,
                    format!(
                        "no domain snapshot with matching name '{name}' in '{}'",
                        self.directory.display()
                    ),
                )));
            }
            // What is no file, or somebody else's.
            Err(error) if error.kind() == ErrorKind::Other => {
                return Err(Unread::NotOurs(damaged(
                    Code::InvalidDomainSnapshot,
                    &format!("it is no record: {error}"),
                )));
            }
            Err(error) => {
                return Err(Unread::Damaged(Error::system(
                    format!("cannot read '{}'", path.display()),
                    error,
                )));
            }
        };
        let Ok(text) = String::from_utf8(text) else {
            let reason = "snapshot metadata is damaged: it is not UTF-8";
            return Err(Unread::Damaged(damaged(Code::InvalidDomainSnapshot, reason)));
        };
        Record::parse(&text).map_err(|error| {
            let error = damaged(error.code, &error.message);
            // XML that is whole and something else was never a record.
            if xml::is_another(&text, "domainsnapshot") {
                Unread::NotOurs(error)
            } else {
                Unread::Damaged(error)
            }
        })
    }

    /// The name of the current snapshot.
    pub fn current(&self) -> Result<Option<String>> {
        let path = self.path(".current");
        match read_trusted(&path) {
            // It can name one that was removed by hand, or whose commit was cut short by a crash.
            Ok(name) => Ok(String::from_utf8(name)
                .ok()
                .filter(|name| check_name(name).is_ok() && self.record_path(name).exists())),
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

    /// Forgets a snapshot: its children become its parent's, and where it was current, its parent
    /// is.
    pub fn forget(&self, name: &str) -> Result<()> {
        let _lock = self.lock()?;
        let record = self.read(name)?;
        let parent = record.parent.filter(|parent| parent != name);
        for mut child in
            self.list()?.into_iter().filter(|child| child.parent.as_deref() == Some(name))
        {
            child.parent.clone_from(&parent);
            self.write(&self.record_path(&child.name), child.to_xml().as_bytes(), true)?;
        }
        if self.current()?.as_deref() == Some(name) {
            self.write_current(parent.as_deref())?;
        }
        let path = self.record_path(name);
        sys::remove_file(&path)
            .and_then(|()| sys::sync_parent(&path))
            .map_err(|error| Error::system(format!("cannot remove '{}'", path.display()), error))
    }

    /// Where a snapshot of this name is recorded.
    pub fn record_path(&self, name: &str) -> PathBuf {
        self.path(&format!("{name}.xml"))
    }

    fn write_current(&self, name: Option<&str>) -> Result<()> {
        self.write(&self.path(".current"), name.unwrap_or_default().as_bytes(), true)
    }

    /// Writes a file so that at any moment, a crash included, the old or the new one is there,
    /// whole.
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
    fn lock(&self) -> Result<Lock> {
        check_owner(&self.directory)?;
        let path = self.path(".lock");
        let lock = self.open_file(&path)?;
        let deadline = Deadline::after(LOCKED);
        loop {
            match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(Errno::INTR) => {}
                Err(Errno::WOULDBLOCK) if deadline.left().is_some() => {
                    std::thread::sleep(Duration::from_millis(2))
                }
                Err(Errno::WOULDBLOCK) => fail!(
                    OperationTimeout,
                    "the state directory is locked ('{}'), by a process that was stopped or killed \
                     while it changed it, or by a child of that: end it (`fuser` names it), and \
                     try again",
                    path.display()
                ),
                Err(error) => {
                    return Err(Error::system(format!("cannot lock '{}'", path.display()), error));
                }
            }
        }
        Ok(Lock(lock))
    }

    fn open_file(&self, path: &Path) -> Result<File> {
        sys::open_or_create_trusted(path)
            .map_err(|error| Error::system(format!("cannot open '{}'", path.display()), error))
    }
}

/// What is in a state directory.
struct Contents {
    records: Vec<Record>,
    /// Those of which the file was renamed.
    renamed: Vec<Record>,
    /// Why others cannot be read.
    damaged: Vec<Error>,
}

/// Why a file is not read.
enum Unread {
    /// It is not there, or was never a record of ours.
    NotOurs(Error),
    /// It may have been one.
    Damaged(Error),
}

/// As sshd has it of its users' files: nobody may write to the directory whom this process does not
/// trust anyway.
fn check_owner(directory: &Path) -> Result<()> {
    const GROUP_WRITES: u32 = 0o020;
    const OTHERS_WRITE: u32 = 0o002;
    const STICKY: u32 = 0o1000;
    let shown = directory.display();
    let metadata = directory.metadata().map_err(|error| {
        Error::system(format!("cannot look at the state directory '{shown}'"), error)
    })?;
    if !sys::is_trusted(metadata.uid()) {
        fail!(
            AccessDenied,
            "the state directory '{shown}' belongs to user {}, and this is user {}: files that its \
             records name are removed with the rights of this process; work as that user, or take \
             the directory over (chown {} '{shown}')",
            metadata.uid(),
            sys::user(),
            sys::user()
        );
    }
    let mode = metadata.mode();
    let written = mode & OTHERS_WRITE != 0
        || mode & GROUP_WRITES != 0 && !is_of_private_group(directory, &metadata);
    // In a sticky one others can only add files, and theirs are passed over.
    if written && mode & STICKY == 0 {
        fail!(
            AccessDenied,
            "other users may write to the state directory '{shown}' (its mode is {:04o}), and \
             could have any file removed by its records: chmod go-w '{shown}'",
            mode & 0o7777
        );
    }
    Ok(())
}

/// Whether the group that may write to a directory is its owner alone: the group that many systems
/// give each user, whose umask is 002 then. An access control list can let others write by the same
/// bit.
fn is_of_private_group(directory: &Path, metadata: &Metadata) -> bool {
    let (user, group) = (metadata.uid(), metadata.gid());
    let own = user == sys::user() && group == rustix::process::getegid().as_raw();
    if user != group && !own {
        return false;
    }
    let has_acl =
        rustix::fs::getxattr(directory, c"system.posix_acl_access", &mut [0_u8; 0][..]).is_ok();
    let [users, groups] =
        ["/etc/passwd", "/etc/group"].map(|path| std::fs::read_to_string(path).unwrap_or_default());
    !has_acl && !is_shared(user, group, &users, &groups)
}

/// Whether users other than this one are known to be in a group, by the lines of passwd(5) and
/// group(5).
fn is_shared(user: u32, group: u32, users: &str, groups: &str) -> bool {
    let is =
        |field: Option<&&str>, number: u32| field.is_some_and(|field| field.parse() == Ok(number));
    let fields = |line| str::split(line, ':').collect::<Vec<_>>();
    let users: Vec<Vec<&str>> = users.lines().map(fields).collect();
    let is_user = |name: &str| users.iter().any(|known| known[0] == name && is(known.get(2), user));
    let is_others = |known: &Vec<&str>| is(known.get(3), group) && !is(known.get(2), user);
    let has_others = |known: &Vec<&str>| {
        let mut members = known.get(3).into_iter().flat_map(|members| members.split(','));
        is(known.get(2), group) && members.any(|member| !member.is_empty() && !is_user(member))
    };
    users.iter().any(is_others) || groups.lines().map(fields).any(|known| has_others(&known))
}

fn read_trusted(path: &Path) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    let longest = xml::RECORDED.bytes() as u64;
    sys::open_trusted(path)?.take(longest + 1).read_to_end(&mut content)?;
    Ok(content)
}

/// Whether an open file is the one of this path.
fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), path.metadata()) {
        (Ok(file), Ok(path)) => (file.dev(), file.ino()) == (path.dev(), path.ino()),
        _ => false,
    }
}

/// Snapshots of one second are in the order of their names; a parent still comes before its child.
/// Where parents form a circle (an edited file), its oldest has none.
fn parents_first(mut left: Vec<Record>) -> Vec<Record> {
    let mut names: HashSet<String> = left.iter().map(|record| record.name.clone()).collect();
    let mut sorted: Vec<Record> = Vec::with_capacity(left.len());
    while !left.is_empty() {
        let waits =
            |record: &Record| record.parent.as_ref().is_some_and(|parent| names.contains(parent));
        let next = left.iter().position(|record| !waits(record));
        let mut record = left.remove(next.unwrap_or(0));
        if next.is_none() {
            record.parent = None;
        }
        names.remove(&record.name);
        sorted.push(record);
    }
    sorted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_is_shared_where_another_user_has_it_or_is_a_member() {
        let users =
            "root:x:0:0::/root:/bin/sh\nann:x:1000:1000::/:/bin/sh\nbob:x:1001:100::/:/bin/sh\n";
        assert!(!is_shared(1000, 1000, users, "ann:x:1000:\nusers:x:100:bob\n"));
        assert!(!is_shared(1000, 1000, users, "ann:x:1000:ann\n"));
        assert!(is_shared(1000, 1000, users, "ann:x:1000:ann,bob\n"));
        assert!(is_shared(1000, 100, users, "users:x:100:\n"), "it is bob's first group");
        assert!(!is_shared(1001, 100, users, "users:x:100:bob\n"));
        assert!(!is_shared(7, 7, "", ""));
    }
}
