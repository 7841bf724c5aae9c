//! The guest's `<domain>` XML: which disks it names, and how it reads with the files that they have now.

use std::ops::Range;

use quick_xml::escape::escape;
use roxmltree::Node;

use super::xml;
use crate::error::{Result, fail};

/// A `<domain>` element, kept to the letter.
#[derive(Clone, Debug)]
pub struct Domain {
    text: String,
    /// Its name.
    pub name: String,
    /// Its disks that have a target.
    pub disks: Vec<DomainDisk>,
}

/// A `<disk>` of the domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainDisk {
    /// `<target dev=>`.
    pub target: String,
    /// `<alias name=>`: the id that libvirt gave, or the user.
    pub alias: Option<String>,
    /// `<source file=>` or `dev=`.
    pub source: Option<String>,
    /// `snapshot=`.
    pub snapshot: Option<String>,
    /// `<driver io=>`.
    pub io: Option<String>,
    /// `<driver discard=>`.
    pub discard: Option<String>,
}

/// What a disk's image is now.
#[derive(Clone, Debug)]
pub struct Source<'a> {
    /// `<target dev=>` of the disk.
    pub target: &'a str,
    /// Its image.
    pub file: &'a str,
    /// The image's format.
    pub format: &'a str,
}

/// What a QEMU tells of itself, for guests whose domain XML nobody knows.
#[derive(Clone, Debug, Default)]
pub struct Machine {
    /// `-name`.
    pub name: String,
    /// `-uuid`.
    pub uuid: String,
    /// Under KVM, not TCG.
    pub kvm: bool,
    /// In bytes.
    pub memory: u64,
    /// How many.
    pub vcpus: usize,
    /// `x86_64`.
    pub arch: String,
    /// `pc-i440fx-7.2`.
    pub machine: String,
    /// Path of the QEMU binary.
    pub emulator: Option<String>,
}

impl Domain {
    /// Reads `<domain>`.
    pub fn parse(text: &str) -> Result<Domain> {
        let document = xml::parse(text, "domain", &xml::GIVEN)?;
        let root = document.root_element();
        let Some(name) = xml::text(root, "name") else { fail!(XmlError, "<domain> XML has no <name>") };
        let disks = disk_nodes(root).filter_map(disk).collect();
        // Without what a file has around it (an XML declaration), and a document inside another cannot have.
        Ok(Domain { text: text[root.range()].into(), name, disks })
    }

    /// A document of our own for a QEMU without one: enough for a person, and for libvirt's save image tools. Disks are called
    /// by their number there, as `vda`: a drive's own name is seldom one that libvirt takes.
    pub fn minimal(machine: &Machine, disks: &[Source]) -> String {
        let mut text = format!("<domain type='{}'>\n", if machine.kvm { "kvm" } else { "qemu" });
        let mut line = |line: String| text.push_str(&line);
        line(format!("  <name>{}</name>\n", escape(&machine.name)));
        // All zeros: QEMU was given none, and libvirt takes none.
        if machine.uuid.chars().any(|c| c != '0' && c != '-') {
            line(format!("  <uuid>{}</uuid>\n", escape(&machine.uuid)));
        }
        line(format!("  <memory unit='KiB'>{}</memory>\n", machine.memory / 1024));
        line(format!("  <vcpu>{}</vcpu>\n", machine.vcpus));
        line("  <os>\n".into());
        line(format!("    <type arch='{}' machine='{}'>hvm</type>\n", escape(&machine.arch), escape(&machine.machine)));
        line("  </os>\n  <devices>\n".into());
        if let Some(emulator) = &machine.emulator {
            line(format!("    <emulator>{}</emulator>\n", escape(emulator)));
        }
        for (index, disk) in disks.iter().enumerate() {
            line("    <disk type='file' device='disk'>\n".into());
            line(format!("      <driver name='qemu' type='{}'/>\n", escape(disk.format)));
            line(format!("      <source file='{}'/>\n", escape(disk.file)));
            line(format!("      <target dev='{}' bus='virtio'/>\n", target_name(index)));
            line("    </disk>\n".into());
        }
        text.push_str("  </devices>\n</domain>\n");
        text
    }

    /// The document with these disks on these images; everything else to the letter.
    pub fn with_sources(&self, sources: &[Source]) -> Result<String> {
        let document = xml::parse(&self.text, "domain", &xml::GIVEN)?;
        let mut edits = Vec::new();
        for node in disk_nodes(document.root_element()) {
            let Some(target) = xml::attribute(node, "target", "dev") else { continue };
            if let Some(source) = sources.iter().find(|source| source.target == target) {
                edit_disk(node, source, &mut edits)?;
            }
        }
        edits.sort_by_key(|(range, _)| range.start);
        let mut text = self.text.clone();
        for (range, replacement) in edits.into_iter().rev() {
            text.replace_range(range, &replacement);
        }
        Ok(text)
    }
}

/// `vda`, `vdb`, ..., `vdz`, `vdaa`: libvirt knows no other names.
fn target_name(mut index: usize) -> String {
    let mut letters = Vec::new();
    loop {
        letters.insert(0, char::from(b'a' + (index % 26) as u8));
        match index / 26 {
            0 => break,
            rest => index = rest - 1,
        }
    }
    format!("vd{}", letters.iter().collect::<String>())
}

fn disk_nodes<'a, 'i>(root: Node<'a, 'i>) -> impl Iterator<Item = Node<'a, 'i>> {
    xml::children(root, "devices").flat_map(|devices| xml::children(devices, "disk"))
}

fn disk(node: Node) -> Option<DomainDisk> {
    let attribute = |child, name| xml::attribute(node, child, name).map(str::to_owned);
    Some(DomainDisk {
        target: attribute("target", "dev")?,
        alias: attribute("alias", "name"),
        source: attribute("source", "file").or_else(|| attribute("source", "dev")),
        snapshot: node.attribute("snapshot").map(str::to_owned),
        io: attribute("driver", "io"),
        discard: attribute("driver", "discard"),
    })
}

type Edits = Vec<(Range<usize>, String)>;

/// The edits that put one `<disk>` onto another image. A disk that is on it already stays to the letter.
fn edit_disk(disk: Node, source: &Source, edits: &mut Edits) -> Result<()> {
    let Some(old) = xml::child(disk, "source") else {
        fail!(XmlError, "disk '{}' has no <source> in the domain XML, and an image in QEMU", source.target);
    };
    let file = old.attributes().find(|attribute| matches!(attribute.name(), "file" | "dev"));
    if file.is_some_and(|file| file.value() == source.file) {
        return Ok(());
    }
    let Some(file) = file else {
        fail!(
            ConfigUnsupported,
            "disk '{}' is on network storage in the domain XML, and on '{}' in QEMU",
            source.target,
            source.file
        );
    };
    edits.push((file.range(), format!("file='{}'", escape(source.file))));
    if let Some(kind) = disk.attribute_node("type") {
        edits.push((kind.range(), "type='file'".into()));
    }
    match xml::child(disk, "driver") {
        Some(driver) => match driver.attribute_node("type") {
            Some(format) => edits.push((format.range(), format!("type='{}'", escape(source.format)))),
            None => {
                let at = driver.range().start + "<driver".len();
                edits.push((at..at, format!(" type='{}'", escape(source.format))));
            }
        },
        None => {
            let at = old.range().start;
            edits.push((at..at, format!("<driver name='qemu' type='{}'/>\n      ", escape(source.format))));
        }
    }
    // It tells the chain below the old image; without it libvirt looks for itself.
    if let Some(backing) = xml::child(disk, "backingStore") {
        edits.push((backing.range(), String::new()));
    }
    Ok(())
}

/// The text of a `<domain>` element inside a larger document; `None` where it has no name.
pub fn element_text(node: Node) -> Option<String> {
    xml::text(node, "name").map(|_| node.document().input_text()[node.range()].into())
}
