// SPDX-License-Identifier: LGPL-2.1-or-later

//! Disks on volumes of storage pools. The volumes are files and devices of this machine, which
//! libvirt's XML names by pool and volume.
//!
//! QEMU has their paths. A snapshot is recorded with the paths, so that it can be reverted to, and
//! its overlays merged, even if the pool is removed. The domain's definition in libvirt is put back
//! unchanged.

use std::ops::Range;

use quick_xml::escape::escape;
use roxmltree::Node;
use serde_json::Value;

use crate::error::Result;
use crate::model::domain::{self, Disk, Storage, domain_disks};
use crate::model::xml;

/// A volume that a disk is on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// The storage pool's name.
    pub pool: String,
    /// The volume's name.
    pub name: String,
    /// The path that QEMU uses.
    pub path: String,
}

/// The volumes that disks of a running domain are on, with the paths that QEMU uses. `blocks` is
/// the answer to `query-block`. A volume that is no file or device of this machine is left out.
pub fn of_domain(live_xml: &str, blocks: &Value) -> Result<Vec<Volume>> {
    let volume = |disk: Disk| {
        let ((pool, name), alias) = (disk.volume?, disk.alias?);
        let has_alias = |block: &&Value| {
            block["qdev"].as_str().is_some_and(|qdev| qdev.split('/').any(|id| id == alias))
        };
        let block = blocks.as_array()?.iter().find(has_alias)?;
        let path = block["inserted"]["file"].as_str().filter(|path| path.starts_with('/'))?;
        Some(Volume { pool, name, path: path.into() })
    };
    Ok(domain_disks(live_xml)?.into_iter().filter_map(volume).collect())
}

/// Whether a disk of a domain is on a volume itself, and not only on an overlay of one.
pub fn are_in(domain_xml: &str) -> bool {
    domain_xml.contains("<disk type='volume'")
}

/// A domain's XML, with paths in place of volumes.
pub fn with_paths(domain_xml: &str, volumes: &[Volume]) -> Result<String> {
    Ok(replaced(domain_xml, xml::parse(domain_xml, "domain", &xml::GIVEN)?.root_element(), volumes))
}

/// A snapshot definition, with paths in place of volumes.
pub fn record_with_paths(record: &str, volumes: &[Volume]) -> Result<String> {
    Ok(replaced(
        record,
        xml::parse(record, "domainsnapshot", &xml::RECORDED)?.root_element(),
        volumes,
    ))
}

fn replaced(text: &str, root: Node, volumes: &[Volume]) -> String {
    let mut edits: Vec<(Range<usize>, String)> = Vec::new();
    for element in root.descendants() {
        let Some((pool, name)) = names(element) else { continue };
        let Some(volume) = volumes.iter().find(|volume| volume.pool == pool && volume.name == name)
        else {
            continue;
        };
        let storage = Storage::at(&volume.path);
        let attribute = if storage.kind() == "block" { "dev" } else { "file" };
        let path = format!("{attribute}='{}'", escape(volume.path.as_str()));
        let (Some(kind), Some(source)) =
            (element.attribute_node("type"), xml::child(element, "source"))
        else {
            continue;
        };
        edits.push((kind.range(), format!("type='{}'", storage.kind())));
        for attribute in source.attributes() {
            match attribute.name() {
                "pool" => edits.push((attribute.range(), path.clone())),
                "volume" | "mode" => edits.push((attribute.range(), String::new())),
                _ => {}
            }
        }
    }
    edits.sort_by_key(|(range, _)| range.start);
    let mut text = text.to_owned();
    for (range, replacement) in edits.into_iter().rev() {
        text.replace_range(range, &replacement);
    }
    text
}

/// The names of the pool and the volume of a disk, or of an image below one.
fn names<'a>(element: Node<'a, '_>) -> Option<(&'a str, &'a str)> {
    let is_image = matches!(element.tag_name().name(), "disk" | "backingStore");
    domain::volume(element).filter(|_| is_image)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_volume_becomes_the_path_that_qemu_has_wherever_it_is_in_the_chain() {
        let xml = |top: &str, below: &str| {
            format!(
                "<domain><name>x</name><devices><disk {top}<target dev='vda'/><alias \
                 name='virtio-disk0'/></disk><disk type='file'><source file='/s'/><backingStore \
                 {below}<backingStore/></backingStore><target \
                 dev='vdb'/></disk></devices></domain>"
            )
        };
        let volume = "type='volume'><source pool='p' volume='v&amp;' index='1'/>";
        let live = xml(volume, volume);
        let blocks = json!([
            { "qdev": "/machine/peripheral/virtio-disk01/virtio-backend", "inserted": { "file": "/other" } },
            { "qdev": "/machine/peripheral/virtio-disk0/virtio-backend", "inserted": { "file": "/pool/v&" } },
        ]);
        let volumes = of_domain(&live, &blocks).unwrap();
        assert!(are_in(&live) && !are_in(&xml("type='file'><source file='/s'/>", volume)));
        let file = "type='file'><source file='/pool/v&amp;'  index='1'/>";
        assert_eq!(with_paths(&live, &volumes).unwrap(), xml(file, file));
        // A volume on another machine is not changed.
        let remote = json!([{ "qdev": "virtio-disk0", "inserted": { "file": "rbd:pool/v" } }]);
        assert_eq!(with_paths(&live, &of_domain(&live, &remote).unwrap()).unwrap(), live);
    }
}
