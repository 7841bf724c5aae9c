// SPDX-License-Identifier: LGPL-2.1-or-later

//! A domain of a stock libvirt that the library has opened, and the undo of its snapshots.

use std::collections::HashSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use instantsnap::backend::LibvirtConnector;
use instantsnap::engine::Handle;
use instantsnap::libvirt::{Connect, Domain};
use instantsnap_testkit::Guest;

pub struct OpenedDomain<'a> {
    pub guest: &'a Guest,
    pub domain: Domain,
    pub handle: Handle,
    /// The files in its directory without a snapshot.
    files: HashSet<OsString>,
    count: u32,
}

impl<'a> OpenedDomain<'a> {
    pub fn open(guest: &'a Guest) -> OpenedDomain<'a> {
        let uuid = guest.virsh("domuuid", &[]);
        let connect = Connect::open(&guest.daemon().uri()).unwrap().unwrap();
        let domain = connect.domain(uuid.trim()).unwrap();
        let handle =
            Handle::open_libvirt(Arc::new(LibvirtConnector::open(domain.clone()).unwrap()));
        OpenedDomain {
            guest,
            domain,
            handle,
            files: files_of(guest.directory()).collect(),
            count: 0,
        }
    }

    /// The path of the memory image.
    pub fn memory(&self) -> PathBuf {
        self.guest.directory().join("memory")
    }

    /// The next snapshot's name and XML.
    pub fn next(&mut self) -> (String, String) {
        self.count += 1;
        let name = format!("s{}", self.count);
        let xml = format!(
            "<domainsnapshot><name>{name}</name><memory snapshot='external' \
             file='{}'/></domainsnapshot>",
            self.memory().display()
        );
        (name, xml)
    }

    /// Merges the overlay, and removes all files of the snapshot.
    pub fn flatten(&self) {
        self.guest.virsh("blockcommit", &["vda", "--active", "--pivot", "--wait"]);
        for file in self.left() {
            std::fs::remove_file(self.guest.directory().join(file)).unwrap();
        }
    }

    /// The files of a snapshot in its directory.
    pub fn left(&self) -> Vec<OsString> {
        files_of(self.guest.directory()).filter(|file| !self.files.contains(file)).collect()
    }
}

fn files_of(directory: &Path) -> impl Iterator<Item = OsString> {
    std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name())
}
