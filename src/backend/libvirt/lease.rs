// SPDX-License-Identifier: LGPL-2.1-or-later

//! The disk leases and macvtap devices that libvirt releases while a domain is paused, and takes
//! back when it resumes the domain.
//!
//! QEMU before 9 starts its guest by itself at the end of the pause. libvirt notices that, but
//! takes nothing back. So such a domain is paused and resumed once more, through libvirt.

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use crate::model::{DiskPlan, Domain};
use crate::sys;

/// The bytes that a lock manager locks.
const LEASE: Range<i64> = 0..1;

/// The leases and devices that a domain holds.
#[derive(Debug, Default)]
pub struct Lease {
    /// The domain XML names such leases or devices.
    in_xml: bool,
    /// An image that a lock manager has locked.
    locked: Option<File>,
}

impl Lease {
    /// Reads the leases of a running domain.
    pub fn read(domain: &Domain, disks: &[DiskPlan]) -> Lease {
        let images =
            disks.iter().filter_map(|disk| sys::open_file(Path::new(&disk.drive.file)).ok());
        Lease {
            in_xml: domain.holds_leases,
            locked: images.into_iter().find(|image| sys::is_locked(image, LEASE)),
        }
    }

    /// Whether a domain that QEMU has started by itself must take them back.
    pub fn is_lost(&self) -> bool {
        self.in_xml || self.locked.as_ref().is_some_and(|image| !sys::is_locked(image, LEASE))
    }
}
