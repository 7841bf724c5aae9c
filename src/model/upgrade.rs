// SPDX-License-Identifier: LGPL-2.1-or-later

//! Which LIVE snapshots can be made as INSTANT ones, for programs that do not know of INSTANT.
//!
//! The rules are the same in clients and in the daemon.

use super::snapshot_xml::SnapshotXml;
use super::xml;
use crate::error::Code;

/// Whether the request names a memory file: `<memory file=>` with `snapshot='external'`, which is
/// the default with a file. False if the XML cannot be read: libvirt reports the error.
pub fn memory_goes_to_a_file(text: &str) -> bool {
    let Ok(SnapshotXml { memory: Some(memory), .. }) = SnapshotXml::parse(text, &xml::GIVEN) else {
        return false;
    };
    memory.file.is_some() && matches!(memory.snapshot.as_deref(), None | Some("external"))
}

/// Whether an error means that instantsnap has changed nothing and refuses the request: it does not
/// support the request, may not carry it out, or does not understand it, which a newer libvirt may.
/// Then libvirt takes its own snapshot.
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
