// SPDX-License-Identifier: LGPL-2.1-or-later

//! What libvirt gives away while a domain is paused, and takes back when it resumes it: disk leases
//! and macvtap devices.
//!
//! QEMU before 9 starts its guest by itself at the end of the pause. libvirt takes note of it, and
//! takes nothing back. Where that matters the domain is paused and resumed once more, through
//! libvirt.

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use crate::model::{DiskPlan, Domain};
use crate::sys;

/// Which bytes a lock manager locks.
const LEASE: Range<i64> = 0..1;

/// Whether there is something to be taken back.
#[derive(Debug, Default)]
pub struct Lease {
    /// The domain XML names what is given away.
    in_xml: bool,
    /// An image with a lock of a lock manager's on it.
    locked: Option<File>,
}

impl Lease {
    /// Looks at a domain that runs.
    pub fn look(domain: &Domain, disks: &[DiskPlan]) -> Lease {
        let images =
            disks.iter().filter_map(|disk| sys::open_file(Path::new(&disk.drive.file)).ok());
        Lease {
            in_xml: domain.holds_leases,
            locked: images.into_iter().find(|image| sys::is_locked(image, LEASE)),
        }
    }

    /// Whether it must be taken back, of a domain that was started past libvirt.
    pub fn is_lost(&self) -> bool {
        self.in_xml || self.locked.as_ref().is_some_and(|image| !sys::is_locked(image, LEASE))
    }
}
