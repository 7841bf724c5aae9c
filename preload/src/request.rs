// SPDX-License-Identifier: LGPL-2.1-or-later

//! Decides which calls of a client instantsnap handles.

use std::ffi::c_uint;

use instantsnap_core::libvirt::table::{virDomain, virDomainSnapshot};
use instantsnap_core::model::snapshot_xml::SnapshotXml;
use instantsnap_core::model::{flags, upgrade, xml};
use instantsnap_core::pointers::Text;

use crate::environment;
use crate::libvirt::Libvirt;

/// Whether this is a LIVE snapshot that is made as an INSTANT one.
pub fn is_to_be_upgraded(
    libvirt: &Libvirt,
    domain: Option<&virDomain>,
    xml: Text,
    bits: c_uint,
) -> bool {
    if !flags::is_only_live(bits) || !environment::upgrade_live() {
        return false;
    }
    let (Some(domain), Some(xml)) = (domain, xml.get()) else { return false };
    xml.to_str().is_ok_and(upgrade::memory_goes_to_a_file) && libvirt.is_running_under_qemu(domain)
}

/// Whether this is a QEMU guest's snapshot with its memory in a file.
pub fn is_with_memory(libvirt: &Libvirt, snapshot: Option<&virDomainSnapshot>) -> bool {
    let is_qemu = libvirt.is_qemu(libvirt.connection_of_snapshot(snapshot));
    let text = snapshot.filter(|_| is_qemu).and_then(|snapshot| libvirt.snapshot_xml(snapshot));
    let Some(text) = text else { return false };
    let parsed = SnapshotXml::parse(&text, &xml::RECORDED);
    parsed.is_ok_and(|snapshot| snapshot.external_memory().is_some())
}
