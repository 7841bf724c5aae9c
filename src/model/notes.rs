// SPDX-License-Identifier: LGPL-2.1-or-later

//! The library's notes about a snapshot that libvirt records: an element in the `<metadata>` of the
//! definition's `<domain>`, which libvirt keeps unchanged.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use quick_xml::escape::escape;
use roxmltree::Node;

use super::frozen::Frozen;
use super::xml;
use crate::error::Result;

const NAMESPACE: &str = "urn:instantsnap:notes:1";
/// The namespace of the notes that earlier, unreleased versions wrote. Such notes are read, and
/// replaced.
const FORMER_NAMESPACE: &str = "https://instantsnap.invalid/snapshot/1";

/// The notes about a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Notes {
    /// The snapshot's images, by disk, from the top down, with their state when they were frozen.
    pub frozen: Vec<(String, Frozen)>,
    /// Overlays that the snapshot named before a revert to it, with their disks. They may still
    /// exist.
    pub left: Vec<(String, String)>,
    /// Images that deleted snapshots froze, and that stayed because they were needed.
    pub former: Vec<String>,
    /// The memory image. `None` in notes of earlier, unreleased versions.
    pub memory: Option<NotedMemory>,
}

/// The memory image of a snapshot, for those who may not read it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotedMemory {
    /// The name of the format that it was to have when the snapshot was taken. (A `sparse` one has
    /// become `raw` if QEMU's stream was of an unknown kind.)
    pub format: String,
    inode: u64,
}

/// How a memory image compares with the note about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compared {
    /// It is the file that was noted.
    Same,
    /// Another file, which can have another format, has replaced it: for example one that was
    /// converted.
    Replaced,
    /// This process may not look at the file, so either can be true.
    Unseen,
}

impl NotedMemory {
    /// The note about an image that exists. `None` if its metadata cannot be read.
    pub fn of(image: &Path, format: &str) -> Option<NotedMemory> {
        let inode = image.metadata().ok()?.ino();
        Some(NotedMemory { format: format.to_owned(), inode })
    }

    /// Whether the image is still the file that was noted.
    pub fn compare(&self, image: &Path) -> Compared {
        match image.metadata() {
            Ok(now) if now.ino() == self.inode => Compared::Same,
            Ok(_) => Compared::Replaced,
            Err(_) => Compared::Unseen,
        }
    }

    fn read(node: Node) -> Option<NotedMemory> {
        let format = node.attribute("format")?.to_owned();
        Some(NotedMemory { format, inode: node.attribute("inode")?.parse().ok()? })
    }
}

impl Notes {
    /// Reads the notes in a `<domain>`, which may be empty.
    pub fn read(domain: Node) -> Notes {
        let all = elements(domain);
        // An earlier version may have added its notes beside ours, which it did not understand.
        // Ours are used then.
        let is_ours = |node: &Node| node.tag_name().namespace() == Some(NAMESPACE);
        let Some(element) = all.iter().copied().find(is_ours).or(all.first().copied()) else {
            return Notes::default();
        };
        let mut notes = Notes::default();
        for node in element.children().filter(Node::is_element) {
            let text = |name: &str| node.attribute(name).map(str::to_owned);
            match node.tag_name().name() {
                "image" => notes.frozen.extend(text("disk").zip(Frozen::read(node))),
                "left" => notes.left.extend(text("disk").zip(text("file"))),
                "former" => notes.former.extend(text("file")),
                "memory" => notes.memory = NotedMemory::read(node),
                _ => {}
            }
        }
        notes
    }

    /// The text of a `<domain>` (or `<inactiveDomain>`) element, with these notes in place of
    /// others.
    pub fn put_into(&self, domain_xml: &str, root: &str) -> Result<String> {
        let mut text = Notes::strip(domain_xml, root)?;
        if *self == Notes::default() {
            return Ok(text);
        }
        let document = xml::parse(&text, root, &xml::RECORDED)?;
        let domain = document.root_element();
        let inner = |node: Node| xml_end(&text, node);
        // libvirt writes `<metadata>` after these elements.
        let predecessor = ["description", "title", "uuid", "name"]
            .into_iter()
            .find_map(|name| xml::child(domain, name));
        match (xml::child(domain, "metadata").map(inner), predecessor) {
            (Some(Some(end)), _) => text.insert_str(end, &self.to_xml()),
            (None, Some(predecessor)) => {
                text.insert_str(
                    predecessor.range().end,
                    &format!("<metadata>{}</metadata>", self.to_xml()),
                );
            }
            // `<metadata/>` was removed above; only a domain without a name is left, which stays
            // unchanged.
            _ => {}
        }
        Ok(text)
    }

    /// The text of such an element, without notes.
    pub fn strip(domain_xml: &str, root: &str) -> Result<String> {
        let document = xml::parse(domain_xml, root, &xml::RECORDED)?;
        let mut text = domain_xml.to_owned();
        let notes = elements(document.root_element());
        let metadata = xml::child(document.root_element(), "metadata").filter(|metadata| {
            let elements = metadata.children().filter(Node::is_element).count();
            elements == notes.len() && (elements > 0 || !metadata.has_children())
        });
        match metadata {
            // `<metadata>` has no other child.
            Some(metadata) => text.replace_range(metadata.range(), ""),
            None => notes.iter().rev().for_each(|notes| text.replace_range(notes.range(), "")),
        }
        Ok(text)
    }

    fn to_xml(&self) -> String {
        let mut text = format!("<instantsnap:notes xmlns:instantsnap=\"{NAMESPACE}\">");
        for (disk, frozen) in &self.frozen {
            text.push_str(&format!(
                "<instantsnap:image disk=\"{}\"{}/>",
                escape(disk),
                frozen.attributes()
            ));
        }
        for (disk, file) in &self.left {
            text.push_str(&format!(
                "<instantsnap:left disk=\"{}\" file=\"{}\"/>",
                escape(disk),
                escape(file)
            ));
        }
        for file in &self.former {
            text.push_str(&format!("<instantsnap:former file=\"{}\"/>", escape(file)));
        }
        if let Some(NotedMemory { format, inode }) = &self.memory {
            text.push_str(&format!(
                "<instantsnap:memory format=\"{}\" inode=\"{inode}\"/>",
                escape(format)
            ));
        }
        text.push_str("</instantsnap:notes>");
        text
    }
}

/// The elements with notes of a `<domain>`, in order.
fn elements<'a, 'i>(domain: Node<'a, 'i>) -> Vec<Node<'a, 'i>> {
    let is_one = |child: &Node| {
        [NAMESPACE, FORMER_NAMESPACE].map(Some).contains(&child.tag_name().namespace())
    };
    let metadata = xml::child(domain, "metadata");
    metadata.into_iter().flat_map(|metadata| metadata.children()).filter(is_one).collect()
}

/// The position of an element's end tag; `None` for `<name/>`.
fn xml_end(text: &str, node: Node) -> Option<usize> {
    let range = node.range();
    let end = text[range.clone()].rfind("</")?;
    Some(range.start + end)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: &str = "<domain><name>a</name><os/></domain>";
    const WITH_OTHERS: &str =
        "<domain><name>a</name><metadata><x:y xmlns:x='urn:x'/></metadata><os/></domain>";

    fn read(text: &str) -> Notes {
        Notes::read(xml::parse(text, "domain", &xml::RECORDED).unwrap().root_element())
    }

    #[test]
    fn notes_are_read_as_they_were_written_and_leave_no_trace() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let frozen = Frozen::of(file.path().to_str().unwrap()).unwrap();
        let notes = Notes {
            frozen: vec![("vda".into(), frozen)],
            left: vec![("v\"b".into(), "/a<b&'c".into())],
            former: vec!["/d".into(), "/e".into()],
            memory: NotedMemory::of(file.path(), "spa<rse"),
        };
        let memory = notes.memory.as_ref().unwrap();
        assert_eq!(memory.compare(file.path()), Compared::Same);
        assert_eq!(
            memory.compare(tempfile::NamedTempFile::new().unwrap().path()),
            Compared::Replaced
        );
        assert_eq!(memory.compare(&file.path().join("below a file")), Compared::Unseen);
        for plain in [PLAIN, WITH_OTHERS] {
            let noted = notes.put_into(plain, "domain").unwrap();
            assert_eq!(read(&noted), notes);
            assert_eq!(Notes::strip(&noted, "domain").unwrap(), plain);
            let fewer = Notes { left: vec![], ..notes.clone() };
            let changed = fewer.put_into(&noted, "domain").unwrap();
            assert_eq!(read(&changed), fewer);
            assert_eq!(Notes::default().put_into(&changed, "domain").unwrap(), plain);
            assert_eq!(read(plain), Notes::default());
        }
        let empty = "<domain><name>a</name><metadata/></domain>";
        assert_eq!(read(&notes.put_into(empty, "domain").unwrap()), notes);
    }

    #[test]
    fn notes_of_a_former_version_are_read_and_replaced() {
        let notes = Notes { former: vec!["/d".into()], ..Notes::default() };
        for plain in [PLAIN, WITH_OTHERS] {
            let former =
                notes.put_into(plain, "domain").unwrap().replace(NAMESPACE, FORMER_NAMESPACE);
            assert_eq!(read(&former), notes);
            assert_eq!(Notes::strip(&former, "domain").unwrap(), plain);
            let fewer = Notes { former: vec!["/e".into()], ..notes.clone() };
            let renewed = fewer.put_into(&former, "domain").unwrap();
            assert_eq!(renewed, fewer.put_into(plain, "domain").unwrap());

            // A record with notes of this version and of an earlier one.
            let both = renewed.replace("</metadata>", &{
                format!("<o:notes xmlns:o='{FORMER_NAMESPACE}'/><!-- --></metadata>")
            });
            assert_eq!(read(&both), fewer);
            assert!(!Notes::strip(&both, "domain").unwrap().contains("notes"));
            assert_eq!(read(&notes.put_into(&both, "domain").unwrap()), notes);
        }
    }
}
