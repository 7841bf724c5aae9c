// SPDX-License-Identifier: LGPL-2.1-or-later

//! The functions of libvirt's QEMU driver that this project defines too.

use std::ffi::{c_int, c_uint, c_void};

use super::table::{virDomain, virDomainSnapshot};
use crate::pointers::Text;
use crate::symbols::symbols;

/// libvirt's `virDomainObj`, which is opaque here; or a guest of ours.
#[allow(non_camel_case_types)]
pub type virDomainObj = c_void;

symbols! {
    /// The definitions after ours in the order of the loaded libraries.
    pub struct Next;

    unsafe extern "C" {}

    optional {
        unsafe fn qemuSnapshotCreateXML(
            *mut virDomain, *mut virDomainObj, Text, c_uint
        ) -> *mut virDomainSnapshot;
        unsafe fn qemuSnapshotRevert(*mut virDomainObj, *mut virDomainSnapshot, c_uint) -> c_int;
        unsafe fn qemuSnapshotDelete(*mut virDomainObj, *mut virDomainSnapshot, c_uint) -> c_int;
    }
}
