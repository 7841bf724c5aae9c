// SPDX-License-Identifier: LGPL-2.1-or-later

//! Notes in a state directory that a QEMU maps the memory image of a snapshot.
//!
//! The kernel keeps the content of a mapped file until the last process has ended that maps it,
//! even if the file is removed meanwhile. So such a guest loses nothing. But a user who deletes a
//! snapshot expects its space back, and that no guest depends on it any more. So a snapshot is not
//! deleted while one does.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::journal::QemuProcess;
use super::store::Store;
use crate::error::{Code, Error, Result};
use crate::{procfs, sys};

/// A QEMU that maps a memory image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// The process.
    pub qemu: QemuProcess,
    /// The boot of the host in which it was started.
    boot: String,
    /// The host; empty if it has no name.
    #[serde(default)]
    host: String,
    /// The device and the inode of the image.
    image: (u64, u64),
}

/// Whether a lease still holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// The process is alive.
    Yes,
    /// It has ended.
    No,
    /// That cannot be seen from here: it was started in another PID namespace, or on another host.
    Unknown,
}

impl Lease {
    /// The lease of a process that is alive on an image that is open.
    pub fn of(pid: u32, image: &File) -> io::Result<Option<Lease>> {
        let image = image.metadata()?;
        let of = |qemu| Lease {
            qemu,
            boot: procfs::boot(),
            host: procfs::machine(),
            image: (image.dev(), image.ino()),
        };
        Ok(QemuProcess::of(pid).map(of))
    }

    /// Whether it still holds.
    pub fn held(&self) -> Held {
        let same_boot = self.boot == procfs::boot();
        if !same_boot && self.host != procfs::machine() {
            return Held::Unknown;
        }
        match self.qemu.has_ended(same_boot) {
            Some(true) => Held::No,
            Some(false) => Held::Yes,
            None => Held::Unknown,
        }
    }

    /// Whether it is of the file with this device and inode. Another host can know the same file by
    /// another device.
    pub fn is_of(&self, image: (u64, u64)) -> bool {
        self.image == image || self.host != procfs::machine() && self.image.1 == image.1
    }
}

/// The begin of the names of the files with a snapshot's leases.
fn prefix(name: &str) -> String {
    format!(".{name}.map-")
}

impl Store {
    /// Notes a lease on the image of a snapshot. It is on disk when this returns.
    pub fn note_lease(&self, name: &str, lease: &Lease) -> Result<()> {
        let QemuProcess { pid, started, .. } = lease.qemu;
        let path = self.path(&format!("{}{pid}-{started}", prefix(name)));
        let text = serde_json::to_vec(lease)
            .map_err(|error| Error::new(Code::InternalError, format!("a lease: {error}")))?;
        // Each clone leaves one: those that have ended make room.
        self.leases(name)?;
        let _lock = self.lock()?;
        self.write(&path, &text, true)
    }

    /// The leases on the image of a snapshot, each with its file. Those that are known to hold no
    /// more are removed.
    pub fn leases(&self, name: &str) -> Result<Vec<(PathBuf, Lease)>> {
        let step = |error| {
            let directory = self.directory().display();
            Error::system(format!("cannot read the state directory '{directory}'"), error)
        };
        let prefix = prefix(name);
        let mut leases = Vec::new();
        for entry in self.directory().read_dir().map_err(step)? {
            let file = entry.map_err(step)?.file_name();
            let process = file.to_str().and_then(|file| file.strip_prefix(&prefix));
            // The name of another snapshot can begin as these files do.
            let is_process = |text: &str| {
                text.split_once('-').is_some_and(|(pid, started)| {
                    pid.parse::<u32>().is_ok() && started.parse::<u64>().is_ok()
                })
            };
            let Some(process) = process.filter(|text| is_process(text)) else { continue };
            let path = self.path(&format!("{prefix}{process}"));
            let mut text = String::new();
            let read = sys::open_trusted(&path).and_then(|mut file| file.read_to_string(&mut text));
            match read {
                Ok(_) => {}
                // It was removed meanwhile, or is a file of another user.
                Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Other) => {
                    continue;
                }
                Err(error) => {
                    return Err(Error::system(format!("cannot read '{}'", path.display()), error));
                }
            }
            let lease: Lease = serde_json::from_str(&text).map_err(|error| {
                Error::new(
                    Code::InvalidDomainSnapshot,
                    format!(
                        "'{}', which says that a QEMU maps the memory image of snapshot '{name}', \
                         is damaged ({error}): remove it when no such QEMU runs",
                        path.display()
                    ),
                )
            })?;
            if lease.held() == Held::No {
                let _ = sys::remove_file(&path);
            } else {
                leases.push((path, lease));
            }
        }
        leases.sort_by_key(|(_, lease)| (lease.qemu.pid, lease.qemu.started));
        Ok(leases)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_holds_as_long_as_its_process() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let image = tempfile::tempfile().unwrap();
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let lease = Lease::of(child.id(), &image).unwrap().unwrap();
        let own = Lease::of(std::process::id(), &image).unwrap().unwrap();
        for lease in [&lease, &own] {
            store.note_lease("s", lease).unwrap();
        }
        let held = |name| -> Vec<_> {
            store.leases(name).unwrap().into_iter().map(|(_, lease)| lease).collect()
        };
        let mut both = vec![lease.clone(), own.clone()];
        both.sort_by_key(|lease| lease.qemu.pid);
        assert_eq!(held("s"), both);
        assert!(held("other").is_empty());
        let metadata = image.metadata().unwrap();
        assert!(own.is_of((metadata.dev(), metadata.ino())));
        assert!(!own.is_of((metadata.dev(), metadata.ino() + 1)));

        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(held("s"), std::slice::from_ref(&own));
        let files = || directory.path().read_dir().unwrap().count();
        // Its own, and that of the lock.
        assert_eq!(files(), 2);

        // A process of this number that was started at another time, or in another boot.
        let another = QemuProcess { started: own.qemu.started + 1, ..own.qemu.clone() };
        store.note_lease("s", &Lease { qemu: another, ..own.clone() }).unwrap();
        assert_eq!(held("s"), std::slice::from_ref(&own));
        store.note_lease("s", &Lease { boot: "another".into(), ..own.clone() }).unwrap();
        assert!(held("s").is_empty());
        let elsewhere = QemuProcess { namespace: "pid:[1]".into(), ..own.qemu.clone() };
        let elsewhere = Lease { qemu: elsewhere, ..own.clone() };
        assert_eq!(elsewhere.held(), Held::Unknown);
        // It may be alive on another host, which can have another device for the image.
        let (boot, host) = ("another".to_owned(), "another".to_owned());
        let remote = Lease { boot, host: host.clone(), ..elsewhere.clone() };
        assert_eq!(remote.held(), Held::Unknown);
        assert!(remote.is_of((metadata.dev() + 1, metadata.ino())));
        // Two containers of one host can have two names.
        assert_eq!(Lease { host, ..own.clone() }.held(), Held::Yes);
        store.note_lease("s", &elsewhere).unwrap();
        assert_eq!(held("s"), [elsewhere]);
    }
}
