// SPDX-License-Identifier: LGPL-2.1-or-later

//! What a snapshot's XML tells, as far as a snapshot that is being taken has to know.

use crate::model::{domain, snapshot_writer, xml};

/// The files of all disks in the `<domain>` of a snapshot.
pub fn domain_files(snapshot_xml: &str) -> Vec<String> {
    let Ok(document) = xml::parse(snapshot_xml, "domainsnapshot", &xml::RECORDED) else {
        return Vec::new();
    };
    let domain = xml::child(document.root_element(), "domain");
    domain.into_iter().flat_map(domain::disks).filter_map(|disk| disk.file).collect()
}

/// The name of a snapshot's parent.
pub fn parent(snapshot_xml: &str) -> Option<String> {
    let document = xml::parse(snapshot_xml, "domainsnapshot", &xml::RECORDED).ok()?;
    xml::text(xml::child(document.root_element(), "parent")?, "name")
}

/// The same snapshot with another parent.
pub fn with_parent(snapshot_xml: &str, parent: &str) -> String {
    let mut changed = snapshot_xml.to_owned();
    let Ok(document) = xml::parse(snapshot_xml, "domainsnapshot", &xml::RECORDED) else {
        return changed;
    };
    let root = document.root_element();
    let element = snapshot_writer::parent(parent);
    match (xml::child(root, "parent"), xml::child(root, "name")) {
        (Some(old), _) => changed.replace_range(old.range(), &element),
        (None, Some(name)) => changed.insert_str(name.range().end, &element),
        (None, None) => {}
    }
    changed
}
