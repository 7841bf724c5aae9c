//! The images below the overlays, on stable storage.
//!
//! QEMU writes to the host what its guest has flushed when it switches a disk, unless it was told to ignore flushes
//! (cache=unsafe). Then what the disk held at the instant is in the host's page cache for as long as the kernel likes, and a
//! crash of the host would take it from a snapshot that was reported as complete.

use std::io::ErrorKind;
use std::path::Path;

use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::snapshot::DiskPlan;
use crate::sys;

/// Whether it is the file system that has nothing to write out, or no way to.
fn cannot_sync(error: &std::io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    errno.is_some_and(|errno| [Errno::INVAL, Errno::ROFS, Errno::NOTSUP, Errno::NOSYS].contains(&errno))
}

/// Writes out what the host still has of these disks' images, which nobody changes any more. Those further below are as old
/// as the snapshots before, which need not have been ours.
pub fn sync_images(disks: &[DiskPlan]) -> Result<()> {
    let mut everything = false;
    for disk in disks {
        let drive = &disk.drive;
        // What is not local is its server's.
        let images = std::iter::once(&drive.file).chain(&drive.backing).filter(|image| image.starts_with('/'));
        for image in images {
            match sys::open_file(Path::new(image)) {
                Ok(file) => match file.sync_data() {
                    Err(error) if !cannot_sync(&error) => {
                        let step = format!("cannot write the image '{image}' of disk '{}' out", drive.name());
                        return Err(Error::system(step, error));
                    }
                    _ => {}
                },
                // The caller may not read it, or it is in a place that only QEMU sees.
                Err(error) => everything |= drive.options.no_flush && error.kind() != ErrorKind::NotFound,
            }
        }
    }
    if everything {
        // Linux waits for the end of it.
        rustix::fs::sync();
    }
    Ok(())
}
