// SPDX-License-Identifier: LGPL-2.1-or-later

//! The durable journal of a snapshot that is being taken: a file in the state directory, with which
//! a later process recovers what the snapshot's process and its watchdog have left.
//!
//! It is a file of JSON lines. The first line says what the snapshot is going to make, and is
//! complete on disk before anything is made. Each later line is appended and synced, and says how
//! far the snapshot is. A process that is killed can leave half a line at the end, which counts as
//! not written. No line is written while the guest is paused.
//!
//! Whether the snapshot is still under way is not in the file: its process and its watchdog hold
//! the lock of the name's reservation.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use crate::own_file::{KnownFile, Undo, as_bytes};
use crate::procfs::{self, Stat};
use crate::sys;

/// The version of the format. A journal with a greater number is of a later version of the library.
const FORMAT: u64 = 1;
/// The kernel's clock for the times of files can be this much behind the clock.
const CLOCK_STEP: i64 = 20_000_000;

/// The first line: what the snapshot is going to make.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Intent {
    /// The version of the format.
    instantsnap_journal: u64,
    /// The snapshot's name.
    pub snapshot: String,
    /// When the line was written, in nanoseconds since the epoch.
    written: i64,
    /// The boot of the host in which that was.
    boot: String,
    /// What the plan knows.
    #[serde(flatten)]
    pub planned: Planned,
    /// The files among these that existed before the snapshot.
    existing: Vec<String>,
}

/// What the plan of a snapshot knows of what it is going to make.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Planned {
    /// The guest's QEMU, where it is known.
    pub qemu: Option<QemuProcess>,
    /// The guest ran, and is to run again.
    pub running: bool,
    /// The snapshot is to be recorded.
    pub is_recorded: bool,
    /// The memory image.
    #[serde(with = "as_bytes")]
    pub memory: PathBuf,
    /// The copies of UEFI variables.
    pub copies: Vec<String>,
    /// The overlays.
    pub overlays: Vec<NotedOverlay>,
    /// The disks that are left to the storage hook.
    pub manual: Vec<String>,
}

/// A process, identified by its number and the time of its start in one boot of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QemuProcess {
    /// Its number.
    pub pid: u32,
    /// The start, in ticks since the boot.
    pub started: u64,
    /// The PID namespace in which that is its number.
    pub namespace: String,
}

/// An overlay, and the image below it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NotedOverlay {
    /// The disk's name.
    pub disk: String,
    /// The overlay's path.
    pub overlay: String,
    /// The node of the overlay's format.
    pub node: String,
    /// The node of the overlay's file.
    pub file_node: String,
    /// The node of the image below.
    pub image_node: String,
    /// The image below.
    pub image: String,
    /// The format of that image.
    pub format: String,
    /// The caller has made the overlay, so it stays.
    pub is_reused: bool,
}

/// A later line: how far the snapshot is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Line {
    /// All files are made.
    Made {
        /// The files, also those of the caller's that the snapshot uses.
        files: Vec<NotedFile>,
        /// The inodes of the images below the overlays, by their paths.
        images: BTreeMap<String, u64>,
    },
    /// The guest is about to be paused, if it runs, and the disks to be switched.
    Switching,
    /// The instant has passed, and the guest runs again.
    Passed {
        /// The snapshot's record.
        record: String,
    },
    /// The snapshot is complete on disk, and checked; its record is to be written.
    Complete,
    /// The snapshot is being undone.
    Undoing,
}

/// A file that the snapshot made, or has taken.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NotedFile {
    /// Its path and its inode.
    pub known: KnownFile,
    /// When the file came into being, in nanoseconds since the epoch, if its file system says so.
    born: Option<i64>,
}

/// What is at the path of a file now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// The file itself.
    Same,
    /// Nothing.
    Gone,
    /// Another file, or one that may be another.
    Another,
}

/// The identity of the file at a path: its device, its inode, and its birth.
fn identity(path: &Path) -> rustix::io::Result<((u64, u64), Option<i64>)> {
    let wanted = StatxFlags::INO | StatxFlags::BTIME;
    let found = statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, wanted)?;
    let device = rustix::fs::makedev(found.stx_dev_major, found.stx_dev_minor);
    let has_birth = StatxFlags::from_bits_retain(found.stx_mask).contains(StatxFlags::BTIME);
    let birth =
        found.stx_btime.tv_sec.saturating_mul(1_000_000_000) + i64::from(found.stx_btime.tv_nsec);
    Ok(((device, found.stx_ino), has_birth.then_some(birth)))
}

impl NotedFile {
    /// Notes a file that exists.
    pub fn of(known: KnownFile) -> NotedFile {
        let born = identity(&known.path).ok().filter(|(id, _)| *id == known.id);
        NotedFile { known, born: born.and_then(|(_, born)| born) }
    }

    /// What is at its path now. A device's number can change when the host is restarted, so after
    /// that a file without a birth is not recognised.
    fn presence(&self, same_boot: bool) -> Presence {
        match identity(&self.known.path) {
            Err(Errno::NOENT) => Presence::Gone,
            Ok((id, born))
                if id.1 == self.known.id.1
                    && born == self.born
                    && (same_boot && id.0 == self.known.id.0 || born.is_some()) =>
            {
                Presence::Same
            }
            Ok(_) | Err(_) => Presence::Another,
        }
    }
}

impl QemuProcess {
    /// Notes a process that runs.
    pub fn of(pid: u32) -> Option<QemuProcess> {
        let started = Stat::start_if_alive(pid)?;
        Some(QemuProcess { pid, started, namespace: procfs::namespace("pid") })
    }

    /// Whether it has ended; `None` if that cannot be seen from here.
    pub fn has_ended(&self, same_boot: bool) -> Option<bool> {
        if !same_boot {
            return Some(true);
        }
        (self.namespace == procfs::namespace("pid"))
            .then(|| Stat::start_if_alive(self.pid) != Some(self.started))
    }
}

/// The journal of a snapshot that this process takes.
#[derive(Debug)]
pub struct JournalFile {
    path: PathBuf,
    file: File,
}

impl JournalFile {
    /// Writes a new journal with its first line, in the place of `new`, a new file beside it. It is
    /// an error if the journal exists.
    pub fn create(
        path: PathBuf,
        mut new: NamedTempFile,
        snapshot: &str,
        mut planned: Planned,
    ) -> io::Result<JournalFile> {
        let exists = |path: &&str| Path::new(path).symlink_metadata().is_ok();
        let named = planned.overlays.iter().map(|overlay| &*overlay.overlay);
        let named = named.chain(planned.copies.iter().map(|copy| &**copy));
        let named = named.chain(planned.memory.to_str());
        let existing = named.filter(exists).map(str::to_owned).collect();
        planned.memory = std::path::absolute(&planned.memory)?;
        let intent = Intent {
            instantsnap_journal: FORMAT,
            snapshot: snapshot.into(),
            written: now(),
            boot: procfs::boot(),
            planned,
            existing,
        };
        new.write_all(&line_of(&intent)?)?;
        new.as_file().sync_all()?;
        let file = new.persist_noclobber(&path).map_err(|error| error.error)?;
        let journal = JournalFile { path, file };
        sys::sync_parent(&journal.path).inspect_err(|_| drop(journal.remove()))?;
        Ok(journal)
    }

    /// Appends a line, and syncs it to disk.
    pub fn append(&mut self, line: &Line) -> io::Result<()> {
        self.file.write_all(&line_of(line)?)?;
        self.file.sync_data()
    }

    /// The file, for the watchdog, which removes it when it has undone everything.
    pub fn known(&self) -> io::Result<KnownFile> {
        let metadata = self.file.metadata()?;
        let id = (metadata.dev(), metadata.ino());
        Ok(KnownFile { path: self.path.clone(), id, undo: Undo::Remove })
    }

    /// Removes the journal.
    pub fn remove(&self) -> io::Result<()> {
        sys::remove_file(&self.path)
    }
}

fn now() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.as_nanos().try_into().unwrap_or_default()
}

fn line_of(value: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    Ok(line)
}

/// A journal that was read.
#[derive(Clone, Debug)]
pub struct ReadJournal {
    /// What the snapshot was going to make.
    pub intent: Intent,
    lines: Vec<Line>,
    same_boot: bool,
}

impl ReadJournal {
    /// Reads the content of a snapshot's journal. Returns the reason if it cannot be used.
    pub fn parse(snapshot: &str, content: &[u8]) -> Result<ReadJournal, String> {
        // Half a line at the end was never written.
        let end = content.iter().rposition(|byte| *byte == b'\n').unwrap_or(0);
        let mut lines = content[..end].split(|byte| *byte == b'\n');
        let first = lines.next().unwrap_or_default();
        let damaged = |error| format!("is damaged: {error}");
        let value: serde_json::Value = serde_json::from_slice(first).map_err(damaged)?;
        match value["instantsnap_journal"].as_u64() {
            Some(FORMAT) => {}
            Some(format) => {
                return Err(format!(
                    "is of a later version of instantsnap (format {format}): use that version to \
                     recover"
                ));
            }
            None => return Err("is damaged, or is no journal".into()),
        }
        let intent: Intent = serde_json::from_slice(first).map_err(damaged)?;
        if intent.snapshot != snapshot {
            return Err(format!("is that of snapshot '{}'", intent.snapshot));
        }
        let lines = lines.map(serde_json::from_slice).collect::<Result<_, _>>().map_err(damaged)?;
        let same_boot = intent.boot == procfs::boot();
        Ok(ReadJournal { intent, lines, same_boot })
    }

    /// Whether the snapshot had made all of its files.
    pub fn has_made(&self) -> bool {
        self.lines.iter().any(|line| matches!(line, Line::Made { .. }))
    }

    /// Whether the guest may have been paused, and the disks switched.
    pub fn may_have_switched(&self) -> bool {
        self.lines.iter().any(|line| matches!(line, Line::Switching))
    }

    /// Whether the snapshot was being undone.
    pub fn is_undoing(&self) -> bool {
        self.lines.iter().any(|line| matches!(line, Line::Undoing))
    }

    /// Whether the snapshot was complete on disk, and checked.
    pub fn is_complete(&self) -> bool {
        self.lines.iter().any(|line| matches!(line, Line::Complete))
    }

    /// The snapshot's record, once the instant had passed.
    pub fn record(&self) -> Option<&str> {
        self.lines.iter().find_map(|line| match line {
            Line::Passed { record } => Some(&**record),
            _ => None,
        })
    }

    /// The inode of an image below an overlay, when the overlay was made.
    pub fn inode_of_image(&self, image: &str) -> Option<u64> {
        self.lines.iter().find_map(|line| match line {
            Line::Made { images, .. } => images.get(image).copied(),
            _ => None,
        })
    }

    /// Whether the guest's QEMU has ended; `None` if that is not known.
    pub fn has_qemu_ended(&self) -> Option<bool> {
        if !self.same_boot {
            return Some(true);
        }
        self.intent.planned.qemu.as_ref()?.has_ended(self.same_boot)
    }

    /// Finds a file that the snapshot was going to make. Returns what is there, and the file itself
    /// if it is the snapshot's.
    ///
    /// If the snapshot was killed before it noted the inodes, a file is its own if nothing was at
    /// the path before the journal was written, the file came into being after that, and it has the
    /// content of such a file (`is_plausible`).
    pub fn find(
        &self,
        path: &Path,
        is_plausible: impl Fn() -> bool,
    ) -> (Presence, Option<NotedFile>) {
        let files = self.lines.iter().filter_map(|line| match line {
            Line::Made { files, .. } => Some(files),
            _ => None,
        });
        if let Some(file) = files.flatten().find(|file| file.known.path == path) {
            let presence = file.presence(self.same_boot);
            // The number of the device can have changed.
            let id = identity(path).map_or(file.known.id, |(id, _)| id);
            let known = KnownFile { id, ..file.known.clone() };
            let found = NotedFile { known, born: file.born };
            return (presence, (presence == Presence::Same).then_some(found));
        }
        let Ok((id, born)) = identity(path) else { return (Presence::Gone, None) };
        let was_there = self.intent.existing.iter().any(|known| Path::new(known) == path);
        let is_younger = born.is_some_and(|born| born + CLOCK_STEP >= self.intent.written);
        if self.has_made() || was_there || !is_younger || !is_plausible() {
            return (Presence::Another, None);
        }
        let known = KnownFile { path: path.into(), id, undo: Undo::Remove };
        (Presence::Same, Some(NotedFile { known, born }))
    }
}
