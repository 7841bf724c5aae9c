// SPDX-License-Identifier: LGPL-2.1-or-later

//! The state directory of one guest: a `<domainsnapshot>` file for each snapshot, and the name of
//! the current one.
//!
//! Files have mode 0600 and are replaced atomically, so readers need no lock. Writers hold `.lock`
//! only during a change. The name of a snapshot that is being made is held by a file lock of its
//! own, which the kernel releases if the maker dies.
//!
//! Files that a record names are merged and removed with the rights of this process. So a directory
//! that other users may write to can only be read: no snapshot is made, deleted or reverted to in
//! it. A file of another user in a state directory is ignored.

use std::collections::HashSet;
use std::fs::{File, Metadata};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use tempfile::NamedTempFile;

use super::journal::{JournalFile, Planned, ReadJournal};
use super::names::{check_name, generated_names};
use super::record::Record;
use super::xml;
use crate::deadline::Deadline;
use crate::error::{Code, Error, Result, fail};
use crate::own_file::{KnownFile, Undo};
use crate::sys;

/// No change of a state directory takes this long.
const LOCK_TIMEOUT: Duration = Duration::from_secs(30);

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

/// A locked file. It is unlocked even if a process that the caller has forked meanwhile has a copy
/// of its descriptor.
#[derive(Debug)]
pub(super) struct Lock(File);

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

/// The begin and the end of the name of a file that is being written.
const NEW_FILE: [&str; 2] = [".instantsnap-", ".new"];
/// The end of a journal's file name.
const JOURNAL: &str = ".journal";

/// The file name of a snapshot's journal.
fn journal_file(name: &str) -> String {
    format!(".{name}{JOURNAL}")
}

impl Reservation {
    /// The locked file that holds the name.
    pub fn held(&self) -> &File {
        &self.lock.0
    }

    /// Begins the journal of the snapshot, in the state directory.
    pub fn begin_journal(&self, planned: Planned) -> Result<JournalFile> {
        let path = self.path.with_file_name(journal_file(&self.name));
        let directory = path.parent().unwrap_or(Path::new("/")).to_owned();
        let store = Store { directory };
        let _lock = store.lock()?;
        let create = || JournalFile::create(path.clone(), store.new_file()?, &self.name, planned);
        create().map_err(|error| {
            let step = format!("cannot write the snapshot's journal '{}'", path.display());
            let hint = "it is of a snapshot that was interrupted: recover the guest first \
                        (instantsnap_recover())";
            let journal = self.is_undone(&path).then(|| {
                format!(
                    "it is undone but for what a storage hook may have made: look at the storage, \
                     and then remove '{}'",
                    path.display()
                )
            });
            let hint = journal.as_deref().unwrap_or(hint);
            match error.kind() {
                ErrorKind::AlreadyExists => Error::system(step, error).and(hint),
                _ => Error::system(step, error),
            }
        })
    }

    /// Whether all of the snapshot that a journal is of is undone.
    fn is_undone(&self, journal: &Path) -> bool {
        let read = std::fs::read(journal).ok();
        read.and_then(|content| ReadJournal::parse(&self.name, &content).ok())
            .is_some_and(|journal| journal.is_undone())
    }

    /// Its file, for the watchdog.
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
        // The file is removed before it is unlocked, so that no other process can lock a file that
        // has no name any more.
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

    /// The path of a file in the directory.
    pub fn path(&self, file: &str) -> PathBuf {
        self.directory.join(file)
    }

    /// Reserves the name of a snapshot to be made: `name`, or, if none is given, one made of the
    /// time.
    pub fn reserve(&self, name: Option<&str>) -> Result<Reservation> {
        let _lock = self.lock()?;
        // The current snapshot is read again at the end: fail now if it cannot be read.
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

    /// The names of the snapshots that have a journal: they are being taken, or were interrupted.
    pub fn journals(&self) -> Result<Vec<String>> {
        let step = |error| {
            Error::system(
                format!("cannot read the state directory '{}'", self.directory.display()),
                error,
            )
        };
        let mut names = Vec::new();
        for entry in self.directory.read_dir().map_err(step)? {
            let file = entry.map_err(step)?.file_name();
            let name = file.to_str().and_then(|file| file.strip_prefix('.'));
            let name = name.and_then(|name| name.strip_suffix(JOURNAL));
            let Some(name) = name.filter(|name| check_name(name).is_ok()) else { continue };
            // A file of another user is no journal.
            if sys::open_trusted(&self.journal_path(name)).is_ok() {
                names.push(name.to_owned());
            }
        }
        names.sort();
        Ok(names)
    }

    /// The path of a snapshot's journal.
    pub fn journal_path(&self, name: &str) -> PathBuf {
        self.path(&journal_file(name))
    }

    /// Reads the journal of a snapshot. `None` if it does not exist any more; the inner error is
    /// the reason why it cannot be used.
    pub fn read_journal(
        &self,
        name: &str,
    ) -> Result<Option<std::result::Result<ReadJournal, String>>> {
        check_owner(&self.directory)?;
        let path = self.journal_path(name);
        let mut content = Vec::new();
        // The record in it is escaped once more.
        let longest = 4 * xml::RECORDED.bytes() as u64;
        let read = sys::open_trusted(&path).and_then(|file| {
            let written = file.metadata()?.modified().ok();
            file.take(longest).read_to_end(&mut content)?;
            Ok(written)
        });
        match read {
            Ok(written) => {
                let mut journal = ReadJournal::parse(name, &content);
                journal.iter_mut().for_each(|journal| journal.written = written);
                Ok(Some(journal))
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::system(format!("cannot read '{}'", path.display()), error)),
        }
    }

    /// Opens the journal of a snapshot that was interrupted, to append to it. `held` is the
    /// snapshot's name.
    pub fn continue_journal(&self, held: &Reservation) -> Result<JournalFile> {
        let path = self.journal_path(&held.name);
        JournalFile::reopen(&path).map_err(|error| {
            Error::system(format!("cannot write to the journal '{}'", path.display()), error)
        })
    }

    /// A new file, which is to get its name when it is complete. The caller has locked the
    /// directory.
    fn new_file(&self) -> io::Result<NamedTempFile> {
        let [prefix, suffix] = NEW_FILE;
        tempfile::Builder::new().prefix(prefix).suffix(suffix).tempfile_in(&self.directory)
    }

    /// Removes new files whose writer was killed. The caller has locked the directory, so no writer
    /// is alive.
    fn remove_new_files(&self) {
        let [prefix, suffix] = NEW_FILE;
        let entries = self.directory.read_dir().into_iter().flatten().flatten();
        for path in entries.map(|entry| entry.path()) {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let is_new = name.starts_with(prefix) && name.ends_with(suffix);
            if is_new && sys::open_trusted(&path).is_ok() {
                let _ = sys::remove_file(&path);
            }
        }
    }

    /// Holds the name of a snapshot that was interrupted. `None` if its process or its watchdog is
    /// alive.
    pub fn claim(&self, name: &str) -> Result<Option<Reservation>> {
        let _lock = self.lock()?;
        self.remove_new_files();
        match self.lock_name(name) {
            Ok(reservation) => Ok(Some(reservation)),
            Err(error) if error.code == Code::OperationInvalid => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn reserve_locked(&self, name: &str) -> Result<Reservation> {
        check_name(name)?;
        // A dangling symbolic link counts as existing, too.
        if self.record_path(name).symlink_metadata().is_ok() {
            fail!(
                OperationInvalid,
                "domain snapshot '{name}' already exists in '{}'",
                self.directory.display()
            );
        }
        self.lock_name(name)
    }

    fn lock_name(&self, name: &str) -> Result<Reservation> {
        sys::wait_until_forked();
        let path = self.path(&format!(".{name}.reserved"));
        loop {
            let lock = self.open_file(&path)?;
            match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) if is_at(&lock, &path) => {
                    return Ok(Reservation { name: name.into(), path, lock: Lock(lock) });
                }
                // The last holder removed the file after we had opened it, so the next process
                // would lock another file.
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

    /// Records a snapshot and makes it the current one. Its parent is the snapshot that was current
    /// until now. Returns the record with that parent.
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

    /// The records, oldest first, each parent before its children. Unreadable ones are left out:
    /// [`Store::read`] returns the reason.
    pub fn list(&self) -> Result<Vec<Record>> {
        Ok(self.read_all()?.records)
    }

    /// All records but that of this name, for an operation that merges or removes images. This
    /// includes renamed records. Returns an error if a record is damaged, because the images that
    /// its snapshot needs are not known.
    pub fn others(&self, name: &str) -> Result<Vec<Record>> {
        check_owner(&self.directory)?;
        let Contents { records, renamed, damaged } = self.read_all()?;
        if let Some(error) = damaged.into_iter().next() {
            return Err(error.and(
                "so it is not known which images that snapshot needs: repair the file, or move it \
                 out of the directory",
            ));
        }
        Ok(records.into_iter().filter(|record| record.name != name).chain(renamed).collect())
    }

    fn read_all(&self) -> Result<Contents> {
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
        // A copy of an existing record adds nothing.
        let is_copy = |other: &Record| {
            records
                .iter()
                .any(|record| (&record.name, &record.disks) == (&other.name, &other.disks))
        };
        let renamed = others.into_iter().filter(|other| !is_copy(other)).collect();
        Ok(Contents { records: parents_first(records), renamed, damaged })
    }

    /// One record, for an operation that removes, merges or reverts to files that it names. Returns
    /// an error if other users may have written it.
    pub fn read_to_use(&self, name: &str) -> Result<Record> {
        check_owner(&self.directory)?;
        self.read(name)
    }

    /// Reads one record.
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
            // It is no file, or a file of another user.
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
            // Complete XML with another root was never a record.
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
            // It can name a snapshot whose record was removed by hand, or whose commit was
            // interrupted by a crash.
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

    /// Forgets a snapshot. Its children become its parent's. If it was current, its parent becomes
    /// current.
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

    /// The path of a snapshot's record.
    pub fn record_path(&self, name: &str) -> PathBuf {
        self.path(&format!("{name}.xml"))
    }

    fn write_current(&self, name: Option<&str>) -> Result<()> {
        self.write(&self.path(".current"), name.unwrap_or_default().as_bytes(), true)
    }

    /// Writes a file atomically: even after a crash either the complete old file or the complete
    /// new one exists.
    pub(super) fn write(&self, path: &Path, content: &[u8], replace: bool) -> Result<()> {
        let write = || -> io::Result<()> {
            let mut file = self.new_file()?;
            file.write_all(content)?;
            file.as_file().sync_all()?;
            if replace {
                file.persist(path).map_err(|error| error.error)?;
            } else {
                file.persist_noclobber(path).map_err(|error| error.error)?;
            }
            sys::sync_parent(path).inspect_err(|_| {
                // A new file is removed; an old one cannot be restored.
                if !replace {
                    let _ = sys::remove_file(path);
                }
            })
        };
        write().map_err(|error| Error::system(format!("cannot write '{}'", path.display()), error))
    }

    /// Locks the directory. The lock is held only during a change, so a wait for it is short.
    pub(super) fn lock(&self) -> Result<Lock> {
        check_owner(&self.directory)?;
        let path = self.path(".lock");
        let lock = self.open_file(&path)?;
        let deadline = Deadline::after(LOCK_TIMEOUT);
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

/// The contents of a state directory.
struct Contents {
    records: Vec<Record>,
    /// The records whose files were renamed.
    renamed: Vec<Record>,
    /// Why other records cannot be read.
    damaged: Vec<Error>,
}

/// Why a record cannot be read.
enum Unread {
    /// It does not exist, or was never a record of ours.
    NotOurs(Error),
    /// It may have been a record.
    Damaged(Error),
}

/// Refuses a directory that users whom this process does not trust may write to, as sshd does with
/// its users' files.
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
    // In a sticky directory, other users can only add files, which are ignored.
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

/// Whether the directory's group is its owner's private group. Many systems give each user such a
/// group, and the umask is 002 then. An access control list can give the same bit to other users.
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

/// Whether a group is known to have users other than this one, by the lines of passwd(5) and
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

/// Whether an open file is the one at this path.
fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), path.metadata()) {
        (Ok(file), Ok(path)) => (file.dev(), file.ino()) == (path.dev(), path.ino()),
        _ => false,
    }
}

/// Sorts parents before their children. Snapshots of one second are sorted by their names. If
/// parents form a cycle (in an edited file), the oldest of them gets no parent.
fn parents_first(mut pending: Vec<Record>) -> Vec<Record> {
    let mut names: HashSet<String> = pending.iter().map(|record| record.name.clone()).collect();
    let mut sorted: Vec<Record> = Vec::with_capacity(pending.len());
    while !pending.is_empty() {
        let waits =
            |record: &Record| record.parent.as_ref().is_some_and(|parent| names.contains(parent));
        let next = pending.iter().position(|record| !waits(record));
        let mut record = pending.remove(next.unwrap_or(0));
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
