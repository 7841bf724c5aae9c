// SPDX-License-Identifier: LGPL-2.1-or-later

//! Which LIVE snapshots can be INSTANT ones, for programs that do not know of them.
//!
//! The rules are the same in clients and in the daemon.

use super::snapshot_xml::SnapshotXml;
use super::xml;
use crate::error::Code;

/// `<memory file=>` with `snapshot='external'`, which a file implies. False where it cannot be
/// read: libvirt shall say why.
pub fn memory_goes_to_a_file(text: &str) -> bool {
    let Ok(SnapshotXml { memory: Some(memory), .. }) = SnapshotXml::parse(text, &xml::GIVEN) else {
        return false;
    };
    memory.file.is_some() && matches!(memory.snapshot.as_deref(), None | Some("external"))
}

/// What instantsnap says before it has touched anything: it cannot, it may not, or does not
/// understand the request, which a newer libvirt may. Then the snapshot is libvirt's own after all.
pub fn is_refusal(code: i32) -> bool {
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
    REFUSALS.into_iter().any(|refusal| refusal as i32 == code)
}
