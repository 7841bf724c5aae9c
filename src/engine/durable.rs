// SPDX-License-Identifier: LGPL-2.1-or-later

//! Writes the images below the overlays to stable storage.
//!
//! When QEMU switches a disk, it writes its data out, unless it was told to ignore flushes
//! (cache=unsafe). In that case the kernel may keep the disk's newest data in the host's page cache
//! for any time, and a crash of the host would take it from a snapshot that was reported as
//! complete. A storage hook's snapshot of the device below would lack this data at once, so it is
//! written out before the hook is called.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::error::{Error, Result, fail};
use crate::model::{DiskPlan, Drive};
use crate::sys;

/// Whether the error means that the file system has nothing to write out, or does not support it.
fn cannot_sync(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    errno.is_some_and(|errno| {
        [Errno::INVAL, Errno::ROFS, Errno::NOTSUP, Errno::NOSYS].contains(&errno)
    })
}

fn sync(file: &File) -> io::Result<()> {
    file.sync_data().or_else(|error| if cannot_sync(&error) { Ok(()) } else { Err(error) })
}

/// Writes out the host's dirty pages of these disks' images, which QEMU does not change any more.
/// All images of the chain are written out, because an earlier snapshot, which made the lower ones,
/// need not have been ours. `pid` is QEMU's.
pub fn sync_images(disks: &[DiskPlan], pid: Option<u32>) -> Result<()> {
    for disk in disks {
        let drive = &disk.drive;
        // The server of an image that is not local is responsible for it.
        let images = std::iter::once(&drive.file)
            .chain(&drive.backing)
            .filter(|image| image.starts_with('/'));
        for image in images {
            let synced = match sys::open_file(Path::new(image)) {
                Ok(file) => sync(&file),
                // This process may not read it, or only QEMU sees its directory.
                Err(_) if drive.options.no_flush => sync_around(Path::new(image), pid).map(drop),
                Err(_) => Ok(()),
            };
            synced.map_err(|error| {
                let step =
                    format!("cannot write the image '{image}' of disk '{}' out", drive.name());
                Error::system(step, error)
            })?;
        }
    }
    Ok(())
}

/// What was synced in place of an image that cannot be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Synced {
    FileSystem,
    Host,
}

/// Syncs the file system that an image is in; if it cannot be found, all of the host's.
fn sync_around(image: &Path, pid: Option<u32>) -> io::Result<Synced> {
    let for_qemu = pid.map(|pid| PathBuf::from(format!("/proc/{pid}/root{}", image.display())));
    for path in [Some(image.to_owned()), for_qemu].into_iter().flatten() {
        if let Some(directory) = directory_around(&path) {
            return match rustix::fs::syncfs(&directory).map_err(io::Error::from) {
                Err(error) if !cannot_sync(&error) => Err(error),
                _ => Ok(Synced::FileSystem),
            };
        }
    }
    // On Linux this returns when everything is written.
    rustix::fs::sync();
    Ok(Synced::Host)
}

/// The nearest directory in an image's file system that can be opened. None for a block device,
/// whose data is in no file system.
fn directory_around(image: &Path) -> Option<File> {
    // A link's target can be in another file system.
    let image = image.canonicalize().unwrap_or_else(|_| image.to_owned());
    let metadata =
        image.metadata().ok().filter(|metadata| !metadata.file_type().is_block_device())?;
    let flags = libc::O_DIRECTORY | libc::O_NONBLOCK;
    let open =
        |directory: &Path| File::options().read(true).custom_flags(flags).open(directory).ok();
    let is_around =
        |directory: &File| directory.metadata().is_ok_and(|found| found.dev() == metadata.dev());
    image.ancestors().skip(1).filter_map(open).find(is_around)
}

/// The disks that a storage hook snapshots, and that ignore flushes. They are opened before the
/// pause, and written out in it.
#[derive(Debug, Default)]
pub struct Unflushed(Vec<(String, File)>);

impl Unflushed {
    /// Opens them. It is an error if one cannot be opened, because it could not be written out
    /// before the hook's snapshot.
    pub fn open(drives: &[Drive]) -> Result<Unflushed> {
        let mut opened = Vec::new();
        for drive in drives.iter().filter(|drive| drive.options.no_flush) {
            match sys::open_file(Path::new(&drive.file)) {
                Ok(file) => opened.push((drive.name().to_owned(), file)),
                Err(error) => fail!(
                    ConfigUnsupported,
                    "disk '{}' is left to a storage hook (snapshot='manual') and ignores flushes \
                     (cache='unsafe'), and its image '{}' cannot be opened ({error}) to write out \
                     the host's dirty pages of it, which a snapshot of the storage would lack. Use \
                     another cache mode, or run this program with permission to read the image",
                    drive.name(),
                    drive.file
                ),
            }
        }
        Ok(Unflushed(opened))
    }

    /// Writes their dirty pages out.
    pub fn sync(&self) -> std::result::Result<(), String> {
        self.0.iter().try_for_each(|(disk, file)| {
            sync(file).map_err(|error| {
                format!("the host's dirty pages of disk '{disk}' could not be written out: {error}")
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// Runs `body` on a thread that opens files as a user other than root, if this process is
    /// root's.
    fn as_nobody(body: impl FnOnce() + Send) {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                // SAFETY: the system call is about its thread only.
                unsafe { libc::syscall(libc::SYS_setfsuid, 65534) };
                body();
            });
            thread.join().unwrap();
        });
    }

    #[test]
    fn for_an_image_that_cannot_be_opened_its_file_system_is_written_out_and_not_all_of_the_hosts()
    {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("image");
        std::fs::write(&image, "newest").unwrap();
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&image, &link).unwrap();
        let mode = |path: &Path, mode| {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap()
        };
        mode(&image, 0);
        mode(directory.path(), 0o755);
        as_nobody(|| {
            for path in [&image, &link] {
                assert!(sys::open_file(path).is_err());
                assert_eq!(sync_around(path, None).unwrap(), Synced::FileSystem);
            }
        });
        // No directory is found for a missing image, and none for a block device.
        assert!(directory_around(&directory.path().join("missing")).is_none());
        assert!(directory_around(Path::new("/dev/loop0")).is_none());
    }
}
