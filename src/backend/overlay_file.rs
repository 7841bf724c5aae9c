// SPDX-License-Identifier: LGPL-2.1-or-later

//! Makes, formats, merges and discards the file of an overlay.
//!
//! qemu-img may run with more rights than a user who can change an image or a link to it. So
//! qemu-img gets the open file and the name of the image below, and uses neither the overlay's name
//! nor the backing file that its header names.

use std::fs::{File, Metadata};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::guest::DEFAULT_TIMEOUT;
use super::images;
use crate::error::{Code, Error, Result, fail};
use crate::model::DiskPlan;
use crate::model::nbd::Export;
use crate::own_file::{KnownFile, OwnFile, Undo};
use crate::sys;
use crate::tool::Tool;

/// The name of qemu-img's standard input.
const STDIN: &str = "/proc/self/fd/0";

/// The rule for a file or a device that exists before the snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beforehand {
    /// libvirt's rule: an empty file or a block device is used, and formatted.
    Taken,
    /// An existing file is never written to: this process has more rights than the user who names
    /// the file.
    Refused,
}

/// The file or the device of an overlay, by how an undo treats it.
#[derive(Debug)]
pub enum OverlayFile {
    /// It was made for the snapshot, and is removed.
    Made(OwnFile),
    /// An empty file that existed before. It is emptied.
    Emptied {
        /// Its path without links.
        path: PathBuf,
        /// The open file.
        file: File,
    },
    /// A block device. The overlay's header on it is wiped; its earlier content is lost.
    Device {
        /// The path of its device node, without links.
        path: PathBuf,
        /// The open file.
        file: File,
    },
    /// An overlay that the caller has made before. It stays as it is.
    Reused(File),
}

impl OverlayFile {
    /// Creates the file, or uses an existing one, as the disk's plan says.
    pub fn open(disk: &DiskPlan, beforehand: Beforehand) -> Result<OverlayFile> {
        if disk.reuse {
            return reuse(disk).map(OverlayFile::Reused);
        }
        let (path, name) = (Path::new(&disk.overlay), disk.drive.name());
        if disk.on_device {
            return match path.metadata() {
                Ok(found) if !found.file_type().is_block_device() => fail!(
                    ConfigUnsupported,
                    "external snapshot device '{}' of disk '{name}' is no block device: use \
                     <source file='...'/> and type='file'",
                    disk.overlay
                ),
                Ok(_) => take(disk, beforehand),
                Err(error) => Err(Error::system(step(disk), error)),
            };
        }
        let own = match OwnFile::create(path) {
            Ok(own) => own,
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                return take(disk, beforehand);
            }
            Err(error) => return Err(Error::system(step(disk), error)),
        };
        // Every user that can open the image below must be able to open the overlay.
        if let Err(error) = sys::copy_owner_and_mode(own.file(), Path::new(&disk.drive.file)) {
            let _ = own.remove();
            return Err(Error::system(step(disk), error));
        }
        Ok(OverlayFile::Made(own))
    }

    /// Opens an overlay that another process has made or taken. `None` if another file, or none,
    /// is at its path now.
    pub fn reopen(known: &KnownFile, is_reused: bool) -> io::Result<Option<OverlayFile>> {
        let Some(own) = OwnFile::reopen(known)? else { return Ok(None) };
        let file = || own.file().try_clone();
        Ok(Some(match known.undo {
            _ if is_reused => OverlayFile::Reused(file()?),
            Undo::Remove => OverlayFile::Made(own),
            Undo::Empty => OverlayFile::Emptied { path: known.path.clone(), file: file()? },
            Undo::Wipe => OverlayFile::Device { path: known.path.clone(), file: file()? },
        }))
    }

    /// The file, as a journal notes it: also one that an undo leaves as it is.
    pub fn noted(&self, path: &str) -> Option<KnownFile> {
        self.known().or_else(|| {
            let found = self.file().metadata().ok()?;
            let id = (found.dev(), found.ino());
            Some(KnownFile { path: path.into(), id, undo: Undo::Empty })
        })
    }

    /// The open file.
    pub fn file(&self) -> &File {
        match self {
            OverlayFile::Made(own) => own.file(),
            OverlayFile::Emptied { file, .. }
            | OverlayFile::Device { file, .. }
            | OverlayFile::Reused(file) => file,
        }
    }

    /// Whether the overlay is on a block device.
    pub fn is_device(&self) -> bool {
        self.file().metadata().is_ok_and(|found| found.file_type().is_block_device())
    }

    /// Whether the overlay has to be formatted.
    pub fn is_new(&self) -> bool {
        !matches!(self, OverlayFile::Reused(_))
    }

    /// The file, as the watchdog needs to know it to undo it.
    pub fn known(&self) -> Option<KnownFile> {
        let (path, file, undo) = match self {
            OverlayFile::Made(own) => return Some(own.known()),
            OverlayFile::Emptied { path, file } => (path, file, Undo::Empty),
            OverlayFile::Device { path, file } => (path, file, Undo::Wipe),
            OverlayFile::Reused(_) => return None,
        };
        let found = file.metadata().ok()?;
        Some(KnownFile { path: path.clone(), id: (found.dev(), found.ino()), undo })
    }

    /// Undoes the file. No QEMU may have it open any more.
    pub fn discard(&self) -> io::Result<()> {
        match self {
            OverlayFile::Made(own) => own.remove(),
            OverlayFile::Reused(_) => Ok(()),
            OverlayFile::Emptied { file, .. } | OverlayFile::Device { file, .. }
                if sys::is_locked(file, sys::IMAGE_LOCKS) =>
            {
                Err(io::Error::other("a QEMU has it open, and its content stays"))
            }
            OverlayFile::Emptied { file, .. } => file.set_len(0),
            OverlayFile::Device { file, .. } => images::wipe(file),
        }
    }

    /// Makes the file and its name durable: from the switch on it has the guest's data.
    pub fn sync(&self, path: &str) -> io::Result<()> {
        self.file().sync_all()?;
        if self.is_device() { Ok(()) } else { sys::sync_parent(Path::new(path)) }
    }

    /// Formats the file as an overlay of an image. `size` is given because QEMU has the image open.
    pub fn format(
        &self,
        image: &str,
        image_format: &str,
        size: u64,
    ) -> std::result::Result<(), String> {
        format(self.file(), image, image_format, size)
    }
}

/// Refuses to write an overlay to a file that is an image of a snapshot already, for example of a
/// branch that the guest is not on. `images` are pairs of a snapshot's name and an image.
pub fn check_not_of_snapshots<'a>(
    disks: &[DiskPlan],
    images: impl IntoIterator<Item = (&'a str, &'a str)>,
) -> Result<()> {
    let found: Vec<_> = disks.iter().filter(|disk| Path::new(&disk.overlay).exists()).collect();
    for (snapshot, image) in images {
        let is_it = |disk: &&&DiskPlan| sys::same_file(Path::new(&disk.overlay), Path::new(image));
        if let Some(disk) = found.iter().find(is_it) {
            fail!(
                ConfigUnsupported,
                "external snapshot file for disk '{}' already exists, and is an image of snapshot \
                 '{snapshot}': '{}'; name another",
                disk.drive.name(),
                disk.overlay
            );
        }
    }
    Ok(())
}

fn step(disk: &DiskPlan) -> String {
    format!(
        "cannot create external snapshot file '{}' of disk '{}'",
        disk.overlay,
        disk.drive.name()
    )
}

/// Uses an existing file, by libvirt's rule.
fn take(disk: &DiskPlan, beforehand: Beforehand) -> Result<OverlayFile> {
    let (path, name) = (&disk.overlay, disk.drive.name());
    let exists = |more: &str| {
        let message = format!(
            "external snapshot file for disk '{name}' already exists{more}: '{path}'; name another"
        );
        Error::new(Code::ConfigUnsupported, message)
    };
    if beforehand == Beforehand::Refused {
        return Err(exists(", and inside the daemon no existing file is used"));
    }
    let Ok(found) = Path::new(path).metadata() else {
        return Err(exists(", a link that leads nowhere"));
    };
    let is_device = found.file_type().is_block_device();
    if !is_device && !found.is_file() {
        return Err(exists(" and is neither a file nor a block device"));
    }
    if !is_device && found.len() > 0 {
        let hint = "where it is an overlay that was made for this snapshot beforehand, add VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT";
        return Err(exists(" and is neither empty nor a block device").and(hint));
    }
    let open =
        |path: &Path, flags| File::options().read(true).write(true).custom_flags(flags).open(path);
    if is_device {
        // A device that is mounted, or part of a volume group, has an exclusive holder. QEMU does
        // not open its devices exclusively.
        match open(Path::new(path), libc::O_NONBLOCK | libc::O_EXCL) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                return Err(in_use(disk, "the host uses it"));
            }
            _ => {}
        }
    }
    let real = Path::new(path).canonicalize().map_err(|error| Error::system(step(disk), error))?;
    let file = open(&real, libc::O_NONBLOCK | libc::O_NOFOLLOW)
        .map_err(|error| Error::system(step(disk), error))?;
    let opened = file.metadata().map_err(|error| Error::system(step(disk), error))?;
    let same =
        |a: &Metadata, b: &Metadata| (a.dev(), a.ino(), a.len()) == (b.dev(), b.ino(), b.len());
    if !is_device && !same(&found, &opened) {
        return Err(exists(", and was changed just now"));
    }
    if sys::is_locked(&file, sys::IMAGE_LOCKS) {
        return Err(in_use(disk, "a QEMU has it open"));
    }
    Ok(if is_device {
        OverlayFile::Device { path: real, file }
    } else {
        OverlayFile::Emptied { path: real, file }
    })
}

fn in_use(disk: &DiskPlan, why: &str) -> Error {
    let message = format!(
        "external snapshot file '{}' of disk '{}' is in use ({why}), and would be written to: name \
         another",
        disk.overlay,
        disk.drive.name()
    );
    Error::new(Code::ConfigUnsupported, message)
}

/// Opens the caller's own overlay. QEMU puts the disk's image below it, whatever its header says;
/// but the header counts at the guest's next start, and the guest would see existing content at
/// once.
fn reuse(disk: &DiskPlan) -> Result<File> {
    let DiskPlan { drive, overlay, .. } = disk;
    let refuse = |what: &str| {
        let message = format!(
            "external snapshot file '{overlay}' of disk '{}', which is to be reused, {what}",
            drive.name()
        );
        Error::new(Code::ConfigUnsupported, message)
    };
    let anew = format!(
        "make it anew: qemu-img create -f qcow2 -F {} -b '{}' '{overlay}' {}",
        drive.format, drive.file, drive.size
    );
    let file = sys::open_file(Path::new(overlay))
        .map_err(|error| refuse(&format!("cannot be read: {error}")))?;
    if disk.on_device && !file.metadata().is_ok_and(|found| found.file_type().is_block_device()) {
        return Err(refuse("is no block device: use <source file='...'/> and type='file'"));
    }
    let Some(header) = images::Header::read(&file) else {
        return Err(refuse(&format!("is no qcow2 image: {anew}")));
    };
    if sys::is_locked(&file, sys::IMAGE_LOCKS) {
        return Err(refuse("is in use (a QEMU has it open): name another"));
    }
    // An image that is not a file can have many names.
    let below = header.backing.as_deref().map(|below| images::resolve(overlay, below));
    let is_image = |below: &String| sys::same_file(Path::new(below), Path::new(&drive.file));
    let is_other = |below: &str| {
        Export::named(&drive.file).is_some() && images::id(below) != images::id(&drive.file)
    };
    match &below {
        None => return Err(refuse(&format!("has no backing file: {anew}"))),
        Some(below)
            if drive.file.starts_with('/') && below.starts_with('/') && !is_image(below)
                || is_other(below) =>
        {
            return Err(refuse(&format!(
                "has '{below}' for its backing file, and the disk is on '{}': {anew}",
                drive.file
            )));
        }
        Some(_) => {}
    }
    if header.size != drive.size {
        return Err(refuse(&format!(
            "is of {} bytes, and the disk of {}: {anew}",
            header.size, drive.size
        )));
    }
    let empty =
        header.is_empty(&file).map_err(|error| refuse(&format!("cannot be read: {error}")))?;
    if !empty {
        return Err(refuse(&format!(
            "has content already (of a snapshot that was undone, perhaps), which the guest would \
             see: {anew}"
        )));
    }
    Ok(file)
}

/// Formats a file as an overlay of an image, which is not opened.
pub fn format(
    overlay: &File,
    image: &str,
    image_format: &str,
    size: u64,
) -> std::result::Result<(), String> {
    let mut create = Tool::new("qemu-img");
    create.args(["create", "-q", "-u", "-f", "qcow2", "-F", image_format, "-b", image, STDIN]);
    create.arg(size.to_string()).run_on(overlay)
}

/// Formats a file as an overlay of an image that no process has open.
pub fn create_on(overlay: &File, image: &str, format: &str) -> Result<()> {
    let mut create = Tool::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-F", format, "-b", image, STDIN]);
    // qemu-img opens the image and all images below to learn its size.
    create.run_on_within(overlay, DEFAULT_TIMEOUT).map_err(|error| {
        Error::new(error.code, format!("cannot create an overlay of '{image}': {}", error.message))
    })
}

/// Merges an overlay that no QEMU has open into the image that it was made on.
pub fn commit(overlay: &File, image: &str, image_format: &str) -> Result<()> {
    commit_within(overlay, image, image_format, DEFAULT_TIMEOUT)
}

/// The same with a timeout for the server that one of the images is on: qemu-img would wait for it
/// without end.
fn commit_within(overlay: &File, image: &str, image_format: &str, limit: Duration) -> Result<()> {
    let failed = |reason: String| Error::new(Code::OperationFailed, reason);
    check_own_data(overlay).map_err(failed)?;
    if let Some(server) = images::server_of(image, image_format) {
        // `raw`, because the format does not matter for this check.
        images::size_on_server_within(&server, "raw", limit)?;
    }
    let mut commit = Tool::new("qemu-img");
    commit.args(["commit", "-q", "-d"]);
    if image.starts_with('/') {
        let image = image.replace(',', ",,");
        let below = format!("backing.driver={image_format},backing.file.filename={image}");
        commit.args(["--image-opts", &format!("driver=qcow2,file.filename={STDIN},{below}")]);
    } else {
        let below = images::Header::read(overlay).and_then(|header| header.backing);
        if images::is_of_server(image)
            && below.is_none_or(|below| images::id(&below) != images::id(image))
        {
            fail!(OperationFailed, "the overlay is not on '{image}'");
        }
        // Not a file: only qemu-img understands its name.
        commit.args(["-f", "qcow2", STDIN]);
    }
    commit.run_on(overlay).map_err(failed)?;
    // The overlay may be removed now: no loss of power may take what was merged.
    let synced = sys::open_file(Path::new(image)).and_then(|image| image.sync_data());
    match synced {
        Err(error) if image.starts_with('/') => {
            Err(Error::system(format!("cannot write '{image}' to disk"), error))
        }
        _ => Ok(()),
    }
}

/// Refuses a qcow2 image whose data is in another file. Our overlays are not such images.
fn check_own_data(overlay: &File) -> std::result::Result<(), String> {
    const INCOMPATIBLE_FEATURES: u64 = 72;
    const EXTERNAL_DATA_FILE: u64 = 1 << 2;
    let mut features = [0; 8];
    overlay
        .read_exact_at(&mut features, INCOMPATIBLE_FEATURES)
        .map_err(|error| error.to_string())?;
    if u64::from_be_bytes(features) & EXTERNAL_DATA_FILE != 0 {
        return Err("it has its data in another file, which no overlay of a snapshot has".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_server_below_that_does_not_answer_is_not_waited_for_without_end_by_a_merge() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        // The kernel accepts clients, and they get no answer.
        let _silent = UnixListener::bind(path("nbd")).unwrap();
        let server = format!("nbd+unix:///x?socket={}", path("nbd"));
        let overlay = |name: &str, below: &str, below_format: &str| {
            let file =
                File::options().read(true).write(true).create_new(true).open(path(name)).unwrap();
            format(&file, below, below_format, 1 << 20).unwrap();
            file
        };
        let (lower, image) = (overlay("lower", &server, "raw"), path("lower"));
        let upper = overlay("upper", &image, "qcow2");
        for (top, image, image_format) in [(&lower, &server, "raw"), (&upper, &image, "qcow2")] {
            let error =
                commit_within(top, image, image_format, Duration::from_millis(300)).unwrap_err();
            assert_eq!(error.code, Code::OperationTimeout, "{error}");
            assert!(error.message.contains(&server), "{error}");
        }
    }
    use crate::model::drive::OpenOptions;
    use crate::model::{Drive, Role};

    fn tool(name: &'static str, words: &[&str]) {
        Tool::new(name).args(words).run().unwrap();
    }

    fn plan(image: &str, overlay: &str) -> DiskPlan {
        let drive = Drive {
            names: vec!["vda".into()],
            role: Role::Disk,
            node: String::new(),
            file: image.into(),
            format: "raw".into(),
            backing: Vec::new(),
            size: 1 << 20,
            bitmaps: Vec::new(),
            options: OpenOptions::default(),
            unsupported_reason: None,
            snapshot: None,
        };
        DiskPlan { drive, overlay: overlay.into(), reuse: false, on_device: false }
    }

    #[test]
    fn an_empty_file_is_taken_and_is_empty_again_and_all_else_that_is_there_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        let (image, empty, link, full) = (path("image"), path("empty"), path("link"), path("full"));
        for (file, content) in [(&image, vec![0; 1 << 20]), (&empty, vec![]), (&full, vec![1])] {
            std::fs::write(file, content).unwrap();
        }
        std::os::unix::fs::symlink(&empty, &link).unwrap();
        for name in [&empty, &link] {
            let taken = OverlayFile::open(&plan(&image, name), Beforehand::Taken).unwrap();
            taken.format(&image, "raw", 1 << 20).unwrap();
            assert_eq!(images::chain(&empty, "qcow2").unwrap().len(), 2);
            let known = taken.known().unwrap();
            assert_eq!((known.path.to_str(), known.undo), (Some(&*empty), Undo::Empty));
            taken.discard().unwrap();
            assert_eq!(std::fs::read(&empty).unwrap(), b"");
            // The same as a forked process does it.
            taken.format(&image, "raw", 1 << 20).unwrap();
            let as_c = std::ffi::CString::new(empty.clone()).unwrap();
            sys::change_unused(&as_c, (known.id.0, known.id.1 + 1), sys::empty);
            assert_ne!(std::fs::read(&empty).unwrap(), b"");
            sys::change_unused(&as_c, known.id, sys::wipe);
            assert!(images::Header::read(taken.file()).is_none());
            sys::change_unused(&as_c, known.id, sys::empty);
            assert_eq!(std::fs::read(&empty).unwrap(), b"");
        }
        let refused = |name: &str, beforehand, part: &str| {
            let error = OverlayFile::open(&plan(&image, name), beforehand).unwrap_err();
            assert!(
                error.message.contains("already exists") && error.message.contains(part),
                "{error}"
            );
        };
        refused(&full, Beforehand::Taken, "neither empty");
        refused(&empty, Beforehand::Refused, "inside the daemon");
        refused(directory.path().to_str().unwrap(), Beforehand::Taken, "neither a file");
        std::fs::remove_file(&empty).unwrap();
        refused(&link, Beforehand::Taken, "leads nowhere");
        assert_eq!(std::fs::read(&full).unwrap(), [1]);
    }

    #[test]
    fn an_overlay_made_beforehand_is_on_the_disks_image_of_its_size_and_empty() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        let (image, overlay) = (path("image"), path("overlay"));
        for file in [&image, &path("another")] {
            std::fs::write(file, vec![0; 1 << 20]).unwrap();
        }
        let plan = DiskPlan { reuse: true, ..plan(&image, &overlay) };
        let make = |words: &[&str]| {
            tool("qemu-img", &[&["create", "-q", "-u", "-f", "qcow2"], words].concat())
        };
        let refused = |part: &str| {
            let error = OverlayFile::open(&plan, Beforehand::Taken).unwrap_err();
            assert!(
                error.message.contains("to be reused") && error.message.contains(part),
                "{error}"
            );
        };
        refused("No such file");
        make(&[&overlay, "1M"]);
        refused("has no backing file");
        make(&["-F", "raw", "-b", "another", &overlay, "1M"]);
        refused("another' for its backing file");
        make(&["-F", "raw", "-b", &image, &overlay, "2M"]);
        refused("is of 2097152 bytes");
        make(&["-F", "raw", "-b", "image", &overlay, "1M"]);
        OverlayFile::open(&plan, Beforehand::Taken).unwrap();
        tool("qemu-io", &["-f", "qcow2", "-c", "write -P 7 0 4k", &overlay]);
        refused("has content already");
        std::fs::write(
            &overlay,
            "something else, and more of it than a header has bytes, which are over a hundred",
        )
        .unwrap();
        refused("is no qcow2 image");
    }

    #[test]
    fn an_overlay_is_merged_into_the_image_that_it_was_made_on_whatever_it_says_of_itself() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        let (image, victim, overlay) = (path("image, raw"), path("victim"), path("overlay"));
        for file in [&image, &victim] {
            std::fs::write(file, vec![0; 1 << 20]).unwrap();
        }
        let own = OverlayFile::open(&plan(&image, &overlay), Beforehand::Refused).unwrap();
        own.format(&image, "raw", 1 << 20).unwrap();
        tool("qemu-io", &["-f", "qcow2", "-c", "write -P 7 0 4k", &overlay]);
        tool(
            "qemu-img",
            &["rebase", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", &victim, &overlay],
        );
        commit(own.file(), &image, "raw").unwrap();
        assert_eq!(std::fs::read(&image).unwrap()[..4097], [vec![7; 4096], vec![0]].concat());
        assert!(std::fs::read(&victim).unwrap().iter().all(|byte| *byte == 0));
    }

    #[test]
    fn an_image_with_its_data_elsewhere_is_not_merged() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        let (image, overlay) = (path("image"), path("overlay"));
        std::fs::write(&image, vec![0; 1 << 20]).unwrap();
        let data = format!("data_file={},data_file_raw=off", path("data"));
        tool("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &data, &overlay, "1M"]);
        let error = commit(&File::open(&overlay).unwrap(), &image, "raw").unwrap_err();
        assert!(error.message.contains("its data in another file"), "{error}");
    }
}
