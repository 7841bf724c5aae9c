//! Which calls are for instantsnap.

use std::ffi::{CStr, c_char, c_int, c_uint};

use crate::environment;
use crate::error::Code;
use crate::flags::{DISK_ONLY, INSTANT, LIVE, REDEFINE};
use crate::libvirt::{Domain, Libvirt, Snapshot};
use crate::xml;

/// What instantsnap says before it has touched anything: it cannot, it may not, or does not understand the request, which a
/// newer libvirt may.
pub fn is_refusal(code: c_int) -> bool {
    const REFUSALS: [Code; 9] = [
        Code::OperationUnsupported,
        Code::ConfigUnsupported,
        Code::ArgumentUnsupported,
        Code::InvalidArg,
        Code::XmlError,
        Code::XmlDetail,
        Code::OperationDenied,
        Code::AccessDenied,
        Code::NoConnect,
    ];
    REFUSALS.into_iter().any(|refusal| refusal as c_int == code)
}

/// Whether this is a LIVE snapshot that the user wants to be INSTANT.
///
/// # Safety
/// As of `virDomainSnapshotCreateXML`.
pub unsafe fn is_to_be_upgraded(libvirt: &Libvirt, domain: *mut Domain, xml: *const c_char, flags: c_uint) -> bool {
    if flags & (LIVE | INSTANT | DISK_ONLY | REDEFINE) != LIVE || !environment::upgrade_live() {
        return false;
    }
    if domain.is_null() || xml.is_null() {
        return false;
    }
    // SAFETY: not NULL, and so a NUL-terminated string and a domain by the caller's promise.
    unsafe { memory_goes_to_a_file(CStr::from_ptr(xml)) && libvirt.is_running_under_qemu(domain) }
}

/// `<memory file=>` with `snapshot='external'`, which a file implies. False where it cannot be read: libvirt shall say why.
fn memory_goes_to_a_file(text: &CStr) -> bool {
    let Ok(text) = text.to_str() else { return false };
    let Ok(document) = xml::parse(text, "domainsnapshot", &xml::GIVEN) else { return false };
    xml::child(document.root_element(), "memory").is_some_and(|memory| {
        matches!((memory.attribute("snapshot"), memory.attribute("file")), (None | Some("external"), Some(_)))
    })
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
