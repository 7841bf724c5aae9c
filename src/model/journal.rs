// SPDX-License-Identifier: LGPL-2.1-or-later

//! The durable journal of a snapshot that is being taken: a file in the state directory, with which
//! a later process recovers what the snapshot's process and its watchdog have left.
//!
//! It is a file of JSON lines. The first line says what the snapshot is going to make, and is
//! complete on disk before anything is made. Each later line is appended and synced, and says how
//! far the snapshot, its undo or its recovery is. A process that is killed, or a host that loses
//! its power, can leave half a line at the end, which counts as not written, and which the next
//! line overwrites. No line is written while the guest is paused.
//!
//! Whether the snapshot is still under way is not in the file: its process and its watchdog hold
//! the lock of the name's reservation.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

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
    /// The host; empty if it has no name.
    #[serde(default)]
    machine: String,
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
    /// The QMP socket by which the guest was opened, without links.
    #[serde(default)]
    pub socket: Option<String>,
    /// A driver has opened the guest. It has its own record of the disks, which names the overlays
    /// from the switch on.
    #[serde(default)]
    pub by_driver: bool,
    /// The domain of libvirt that the guest is.
    #[serde(default)]
    pub domain: Option<NotedDomain>,
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

/// A domain of libvirt whose snapshot is taken. Its journal has the domain's UUID for its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotedDomain {
    /// The URI of the connection.
    pub uri: String,
    /// The domain's name.
    pub name: String,
    /// The snapshot's name.
    pub snapshot: String,
    /// The definition of a persistent domain before the snapshot.
    pub definition: Option<String>,
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
    /// The snapshot, its undo or its recovery has resumed the guest. A pause after this is another
    /// client's.
    Resumed,
    /// The instant has passed, and the guest runs again.
    Passed {
        /// The snapshot's record.
        record: String,
    },
    /// The snapshot is complete on disk, and checked; its record is to be written.
    Complete,
    /// The snapshot is being undone.
    Undoing,
    /// QEMU has ended, and qemu-img is about to merge these overlays into the images below. From
    /// here on those images are of no use until the merge was repeated as a whole.
    Merging {
        /// The overlays.
        overlays: Vec<String>,
        /// The boot of the host in which that was.
        boot: String,
    },
    /// These overlays are merged, and the images below are on disk. They are about to be removed.
    Merged {
        /// The overlays.
        overlays: Vec<String>,
    },
    /// All is undone but what a storage hook may have made.
    Undone,
}

impl Line {
    /// The line that is written before qemu-img merges these overlays.
    pub fn merging(overlays: Vec<String>) -> Line {
        Line::Merging { overlays, boot: procfs::boot() }
    }

    /// The line as it is in the file.
    pub fn text(&self) -> io::Result<Vec<u8>> {
        line_of(self)
    }
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
    /// The length of the lines that were written as a whole.
    length: u64,
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
            machine: procfs::machine(),
            planned,
            existing,
        };
        let first = line_of(&intent)?;
        new.write_all(&first)?;
        new.as_file().sync_all()?;
        let file = new.persist_noclobber(&path).map_err(|error| error.error)?;
        let journal = JournalFile { path, file, length: first.len() as u64 };
        sys::sync_parent(&journal.path).inspect_err(|_| drop(journal.remove()))?;
        Ok(journal)
    }

    /// Opens the journal of a snapshot that was interrupted, to append to it. Half a line at its
    /// end is removed. The caller holds the snapshot's name.
    pub fn reopen(path: &Path) -> io::Result<JournalFile> {
        let file = sys::open_trusted_to_write(path)?;
        let mut content = Vec::new();
        (&file).read_to_end(&mut content)?;
        let length = whole_lines(&content).len() as u64;
        file.set_len(length)?;
        Ok(JournalFile { path: path.into(), file, length })
    }

    /// Appends a line, and syncs it to disk. After an error the line counts as not written.
    pub fn append(&mut self, of: &Line) -> io::Result<()> {
        let line = line_of(of)?;
        // A resumed guest ends with the host's power, so that line need not outlive it. It is
        // written where the guest waits for nothing, not even for a disk.
        let needs_sync = !matches!(of, Line::Resumed);
        let written = self.file.write_all_at(&line, self.length);
        let written =
            written.and_then(|()| if needs_sync { self.file.sync_data() } else { Ok(()) });
        match written {
            Ok(()) => self.length += line.len() as u64,
            // A part of it must not precede the next line.
            Err(_) => self.file.set_len(self.length)?,
        }
        written
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

/// The content without a last line that was not written as a whole. A line has no NUL: where a page
/// of it never reached the disk, its bytes are zeros.
fn whole_lines(content: &[u8]) -> &[u8] {
    let end_of = |content: &[u8]| content.iter().rposition(|byte| *byte == b'\n');
    let terminated = &content[..end_of(content).map_or(0, |at| at + 1)];
    let Some(last) = terminated.len().checked_sub(1) else { return terminated };
    let begin = end_of(&terminated[..last]).map_or(0, |at| at + 1);
    // The first line was synced before it got its name.
    if begin > 0 && terminated[begin..].contains(&0) { &content[..begin] } else { terminated }
}

/// A journal that was read.
#[derive(Clone, Debug)]
pub struct ReadJournal {
    /// What the snapshot was going to make.
    pub intent: Intent,
    lines: Vec<Line>,
    same_boot: bool,
    /// When the last line was written, if that is known.
    pub written: Option<SystemTime>,
}

impl ReadJournal {
    /// Whether a file was last written so long after the journal's last line that the snapshot, or
    /// the undo that this line begins, can hardly have done it.
    pub fn is_long_before(&self, file: &Path) -> bool {
        const LONG: Duration = Duration::from_secs(60);
        let modified = file.metadata().and_then(|found| found.modified()).ok();
        let since = self.written.zip(modified).and_then(|(line, file)| {
            // The error is of a file that is older than the line.
            file.duration_since(line).ok()
        });
        since.is_some_and(|since| since > LONG)
    }

    /// Reads the content of a snapshot's journal. Returns the reason if it cannot be used.
    pub fn parse(snapshot: &str, content: &[u8]) -> Result<ReadJournal, String> {
        let whole = whole_lines(content);
        let mut lines = whole.strip_suffix(b"\n").unwrap_or(whole).split(|byte| *byte == b'\n');
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
        Ok(ReadJournal { intent, lines, same_boot, written: None })
    }

    /// Whether the snapshot had made all of its files.
    pub fn has_made(&self) -> bool {
        self.lines.iter().any(|line| matches!(line, Line::Made { .. }))
    }

    /// Whether the guest may have been paused, and the disks switched.
    pub fn may_have_switched(&self) -> bool {
        self.lines.iter().any(|line| matches!(line, Line::Switching))
    }

    /// Whether the snapshot may have paused the guest, and is not known to have resumed it.
    pub fn may_be_paused(&self) -> bool {
        let last = self
            .lines
            .iter()
            .rev()
            .find(|line| matches!(line, Line::Switching | Line::Resumed | Line::Passed { .. }));
        matches!(last, Some(Line::Switching))
    }

    /// Whether all is undone but what a storage hook may have made.
    pub fn is_undone(&self) -> bool {
        self.lines.iter().any(|line| matches!(line, Line::Undone))
    }

    /// Whether qemu-img has begun to merge an overlay, and in this boot of the host; `None` if it
    /// has not.
    pub fn has_begun_merging(&self, overlay: &str) -> Option<bool> {
        self.lines.iter().rev().find_map(|line| match line {
            Line::Merging { overlays, boot } if overlays.iter().any(|merged| merged == overlay) => {
                Some(*boot == procfs::boot())
            }
            _ => None,
        })
    }

    /// The overlays that are merged, so that they are needed no more.
    pub fn merged(&self) -> Vec<String> {
        let overlays = self.intent.planned.overlays.iter().map(|overlay| &overlay.overlay);
        overlays.filter(|overlay| self.has_merged(overlay)).cloned().collect()
    }

    /// Whether an overlay is merged, so that it is needed no more.
    pub fn has_merged(&self, overlay: &str) -> bool {
        self.lines.iter().any(|line| match line {
            Line::Merged { overlays } => overlays.iter().any(|merged| merged == overlay),
            _ => false,
        })
    }

    /// The other host that the journal is of, if it is not of this one. Processes, locks and boots
    /// of another host cannot be known here.
    pub fn other_host(&self) -> Option<&str> {
        let here = procfs::machine();
        let machine = &*self.intent.machine;
        (!self.same_boot && !machine.is_empty() && machine != here).then_some(machine)
    }

    /// The images and files that the snapshot made or stands on.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        let Planned { overlays, copies, memory, .. } = &self.intent.planned;
        overlays
            .iter()
            .flat_map(|overlay| [&overlay.overlay, &overlay.image])
            .chain(copies)
            .map(Path::new)
            .chain([&**memory])
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
        if self.other_host().is_some() {
            return None;
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(memory: &Path) -> Planned {
        Planned {
            qemu: None,
            socket: None,
            by_driver: false,
            domain: None,
            running: true,
            is_recorded: true,
            memory: memory.into(),
            copies: Vec::new(),
            overlays: Vec::new(),
            manual: Vec::new(),
        }
    }

    fn journal(directory: &Path) -> (PathBuf, JournalFile) {
        let path = directory.join(".s.journal");
        let new = NamedTempFile::new_in(directory).unwrap();
        let journal = JournalFile::create(path.clone(), new, "s", planned(&path)).unwrap();
        (path, journal)
    }

    fn read(path: &Path) -> Result<ReadJournal, String> {
        ReadJournal::parse("s", &std::fs::read(path).unwrap())
    }

    #[test]
    fn a_last_line_that_was_not_written_as_a_whole_counts_as_not_written_and_is_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        let (path, mut journal) = journal(directory.path());
        journal.append(&Line::Switching).unwrap();
        let whole = std::fs::read(&path).unwrap();
        let torn: [&[u8]; 4] = [b"\"Und", b"{\"Passed\":{\"rec", b"\"Und\0\0\0\n", b"\0\0\0"];
        for torn in torn {
            std::fs::write(&path, [&whole, torn].concat()).unwrap();
            let found = read(&path).unwrap();
            assert!(found.may_have_switched() && !found.is_undoing());
            JournalFile::reopen(&path).unwrap().append(&Line::Resumed).unwrap();
            let found = read(&path).unwrap();
            assert!(found.may_have_switched() && !found.may_be_paused(), "{found:?}");
        }
    }

    #[test]
    fn a_broken_line_before_the_last_one_or_a_whole_one_that_makes_no_sense_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let (path, _) = journal(directory.path());
        let whole = std::fs::read_to_string(&path).unwrap();
        for broken in ["\"Swit\n\"Undoing\"\n", "\0\0\n\"Undoing\"\n", "\"Other\"\n", "\n"] {
            std::fs::write(&path, format!("{whole}{broken}")).unwrap();
            assert!(read(&path).unwrap_err().contains("damaged"), "{broken:?}");
        }
        std::fs::write(&path, [0, b'\n']).unwrap();
        assert!(read(&path).unwrap_err().contains("damaged"));
    }

    #[test]
    fn a_line_that_could_not_be_written_leaves_no_half_of_itself_behind() {
        let directory = tempfile::tempdir().unwrap();
        let (path, mut journal) = journal(directory.path());
        // The same as after a write that failed halfway.
        journal.file.write_all_at(b"{\"Passed\":{\"record\":\"long", journal.length).unwrap();
        journal.append(&Line::Undoing).unwrap();
        std::fs::File::options().write(true).open(&path).unwrap().set_len(journal.length).unwrap();
        assert!(read(&path).unwrap().is_undoing());
        // This descriptor cannot be written to.
        journal.file = File::open(&path).unwrap();
        journal.append(&Line::Resumed).unwrap_err();
        assert!(read(&path).unwrap().is_undoing());
    }

    #[test]
    fn a_pause_is_the_snapshots_only_until_the_guest_was_resumed() {
        let directory = tempfile::tempdir().unwrap();
        let (path, mut journal) = journal(directory.path());
        for (line, is_ours) in [
            (Line::Switching, true),
            (Line::Resumed, false),
            (Line::Switching, true),
            (Line::Undoing, true),
            (Line::Passed { record: String::new() }, false),
        ] {
            journal.append(&line).unwrap();
            assert_eq!(read(&path).unwrap().may_be_paused(), is_ours, "{line:?}");
        }
    }

    #[test]
    fn a_file_that_was_written_long_after_the_last_line_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let (path, _) = journal(directory.path());
        let mut journal = read(&path).unwrap();
        let file = directory.path().join("image");
        std::fs::write(&file, "").unwrap();
        assert!(!journal.is_long_before(&file), "it is not known when the line was written");
        let now = file.metadata().unwrap().modified().unwrap();
        for (seconds, is_long) in [(0, false), (59, false), (61, true), (3600, true)] {
            journal.written = Some(now - Duration::from_secs(seconds));
            assert_eq!(journal.is_long_before(&file), is_long, "{seconds}");
        }
        journal.written = Some(now + Duration::from_secs(3600));
        assert!(!journal.is_long_before(&file));
        assert!(!journal.is_long_before(&directory.path().join("nowhere")));
    }

    #[test]
    fn a_journal_of_another_host_is_told_from_one_of_an_earlier_boot_of_this_host() {
        let directory = tempfile::tempdir().unwrap();
        let (path, _) = journal(directory.path());
        let changed = |boot: &str, machine: &str| {
            let mut journal = read(&path).unwrap();
            if !boot.is_empty() {
                journal.same_boot = false;
            }
            journal.intent.machine = machine.into();
            let other = journal.other_host().map(str::to_owned);
            (other, journal.has_qemu_ended())
        };
        let here = procfs::machine();
        assert!(!here.is_empty());
        assert_eq!(changed("", &here), (None, None));
        assert_eq!(changed("earlier", &here), (None, Some(true)));
        assert_eq!(changed("earlier", "another"), (Some("another".into()), None));
        // Two containers of one host can have two names.
        assert_eq!(changed("", "another"), (None, None));
    }
}
