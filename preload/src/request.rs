//! Which calls are for instantsnap.

use std::ffi::{CStr, c_char, c_uint};

use crate::environment;
use crate::libvirt::{Domain, Libvirt, Snapshot};
use crate::{upgrade, xml};

/// Whether this is a LIVE snapshot that the user wants to be INSTANT.
///
/// # Safety
/// As of `virDomainSnapshotCreateXML`.
pub unsafe fn is_to_be_upgraded(libvirt: &Libvirt, domain: *mut Domain, xml: *const c_char, flags: c_uint) -> bool {
    if !upgrade::is_live(flags) || !environment::upgrade_live() {
        return false;
    }
    if domain.is_null() || xml.is_null() {
        return false;
    }
    // SAFETY: not NULL, and so a NUL-terminated string and a domain by the caller's promise.
    unsafe {
        CStr::from_ptr(xml).to_str().is_ok_and(upgrade::memory_goes_to_a_file) && libvirt.is_running_under_qemu(domain)
    }
}

/// Whether this is a QEMU guest's snapshot with its memory in a file.
///
/// # Safety
/// `snapshot` is NULL or one of libvirt's.
pub unsafe fn is_with_memory(libvirt: &Libvirt, snapshot: *mut Snapshot) -> bool {
    // SAFETY: by the caller's promise.
    let text = unsafe {
        let is_qemu = libvirt.is_qemu(libvirt.connection_of_snapshot(snapshot));
        if is_qemu { libvirt.snapshot_xml(snapshot) } else { None }
    };
    let Some(text) = text else { return false };
    let Ok(document) = xml::parse(&text, "domainsnapshot", &xml::RECORDED) else { return false };
    xml::attribute(document.root_element(), "memory", "snapshot") == Some("external")
}
