// SPDX-License-Identifier: LGPL-2.1-or-later

//! Reads the guest's `<domain>` XML: its disks and their images. Also writes it with other images.

use std::ops::Range;
use std::os::unix::fs::FileTypeExt;

use quick_xml::escape::escape;
use roxmltree::Node;

use super::nbd::{self, Export};
use super::xml;
use crate::error::{Result, fail};

/// A `<domain>` element, with its unchanged text.
#[derive(Clone, Debug, Default)]
pub struct Domain {
    text: String,
    /// Its name.
    pub name: String,
    /// Its disks that have a target.
    pub disks: Vec<Disk>,
    /// Its UEFI variables.
    pub nvram: Option<Nvram>,
    /// The unchanged text of `<cpu>`.
    pub cpu: Option<String>,
    /// It has disk leases or macvtap devices, which libvirt releases while a domain is paused.
    pub holds_leases: bool,
    /// It has memory that keeps its content when the guest ends (NVDIMM, virtio-pmem).
    pub has_persistent_memory: bool,
}

/// A `<disk>` of a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// `<target dev=>`.
    pub target: String,
    /// `<alias name=>`: the id that libvirt or the user gave.
    pub alias: Option<String>,
    /// `type=`.
    pub kind: String,
    /// The place of its image; `None` if there is no medium.
    pub storage: Option<Storage>,
    /// The image's path, or its NBD export's URI. `None` if there is no medium, or one without such
    /// a name.
    pub file: Option<String>,
    /// It has a medium.
    pub present: bool,
    /// The image's format.
    pub format: String,
    /// The images that the XML names below it, from the top down.
    pub backing: Vec<String>,
    /// The XML has no further image below those.
    pub is_whole: bool,
    /// How many images the XML lists in its chain, including those without a name.
    pub depth: usize,
    /// `<source protocol=>`.
    pub protocol: Option<String>,
    /// `<source name=>`.
    pub source_name: Option<String>,
    /// The storage pool and the volume that it is on.
    pub volume: Option<(String, String)>,
    /// Its storage needs a secret.
    pub needs_secret: bool,
    /// Its image is encrypted.
    pub encrypted: bool,
    /// A SCSI device passed through: `device='lun'`.
    pub is_lun: bool,
    /// The guest only reads it.
    pub read_only: bool,
    /// It is shared with other domains.
    pub shareable: bool,
    /// libvirt discards what the guest writes to it.
    pub transient: bool,
    /// Its image is being merged into one below.
    pub is_merging: bool,
    /// Its block job can be completed.
    pub job_ready: bool,
    /// `snapshot=`.
    pub snapshot: Option<String>,
    /// `<driver cache=>`.
    pub cache: Option<String>,
    /// `<driver io=>`.
    pub io: Option<String>,
    /// `<driver discard=>`.
    pub discard: Option<String>,
}

/// `<os><nvram>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nvram {
    /// Its file; empty if it is not in a file.
    pub file: String,
    /// Its format.
    pub format: String,
}

impl Disk {
    /// Its images from the top down, with libvirt's names.
    pub fn layers(&self) -> Vec<&str> {
        self.file.iter().chain(&self.backing).map(String::as_str).collect()
    }
}

/// An image for a disk.
#[derive(Clone, Debug)]
pub struct Source<'a> {
    /// `<target dev=>` of the disk.
    pub target: &'a str,
    /// The place of the image.
    pub storage: Storage,
    /// The image's format.
    pub format: &'a str,
}

/// The place of an image, as a `<disk>` describes it. `type=` and `<source>` belong together:
/// libvirt starts no domain in which they do not match the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Storage {
    kind: String,
    source: String,
    name: Option<String>,
}

impl Storage {
    /// The place of an image with this path, or with QEMU's name for a server's image. A device is
    /// `type='block'`, everything else a file.
    pub fn at(path: &str) -> Storage {
        if let Some(export) = Export::named(path) {
            return Storage {
                kind: "network".into(),
                source: export.source(),
                name: Some(export.uri()),
            };
        }
        let device = std::fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device());
        Storage::local(if device { "block" } else { "file" }, path)
    }

    /// The place of a file that need not exist yet.
    pub fn file(path: &str) -> Storage {
        Storage::local("file", path)
    }

    fn local(kind: &str, path: &str) -> Storage {
        let attribute = if kind == "block" { "dev" } else { "file" };
        let source = format!("<source {attribute}='{}'/>", escape(path));
        Storage { kind: kind.into(), source, name: Some(path.into()) }
    }

    /// The place in an element with a `type=` and a `<source>`: a disk, or a disk's
    /// `<backingStore>`. `None` if it has no medium.
    pub fn of(element: Node) -> Option<Storage> {
        let source = xml::child(element, "source").filter(|source| !is_empty(*source))?;
        let text = source.document().input_text()[source.range()].to_owned();
        let kind = element.attribute("type").unwrap_or("file").to_owned();
        let name = match kind.as_str() {
            "network" => Export::of(source)
                .filter(|_| !nbd::needs_secret(element))
                .map(|export| export.uri()),
            _ => local_path(source).map(str::to_owned),
        };
        Some(Storage { kind, source: text, name })
    }

    /// `type=`.
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// The unchanged `<source>`.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The image's name: the path of a file or a device of this host, or an NBD export's URI.
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }
}

/// `file=` or `dev=`.
fn local_path<'a>(source: Node<'a, '_>) -> Option<&'a str> {
    source.attribute("file").or_else(|| source.attribute("dev"))
}

/// Whether a `<source>` names no medium: for an empty drive, libvirt 12 writes one with only the
/// number of its node.
fn is_empty(source: Node) -> bool {
    let names_medium = |name: &str| !matches!(name, "index" | "startupPolicy");
    !source.attributes().any(|attribute| names_medium(attribute.name()))
        && !source.children().any(|child| child.is_element())
}

/// A machine as QEMU reports it, for guests without a domain XML.
#[derive(Clone, Debug, Default)]
pub struct Machine {
    /// `-name`.
    pub name: String,
    /// `-uuid`.
    pub uuid: String,
    /// It runs with KVM, not TCG.
    pub kvm: bool,
    /// The memory in bytes.
    pub memory: u64,
    /// The number of vCPUs.
    pub vcpus: usize,
    /// The architecture, like `x86_64`.
    pub arch: String,
    /// The machine type, like `pc-i440fx-7.2`.
    pub machine: String,
    /// The path of the QEMU binary.
    pub emulator: Option<String>,
}

impl Domain {
    /// Reads `<domain>`.
    pub fn parse(text: &str) -> Result<Domain> {
        let document = xml::parse(text, "domain", &xml::GIVEN)?;
        let root = document.root_element();
        let Some(name) = xml::text(root, "name") else {
            fail!(XmlError, "<domain> XML has no <name>")
        };
        Ok(Domain {
            // Without what can surround it in a file, such as an XML declaration: another document
            // could not contain that.
            text: text[root.range()].into(),
            name,
            disks: disks(root),
            nvram: nvram(root),
            cpu: xml::child(root, "cpu").map(|cpu| text[cpu.range()].to_owned()),
            holds_leases: holds_leases(root),
            has_persistent_memory: has_persistent_memory(root),
        })
    }

    /// The disk of this target.
    pub fn disk(&self, target: &str) -> Option<&Disk> {
        self.disks.iter().find(|disk| disk.target == target)
    }

    /// The place of a disk's image; `None` if there is no such disk, or if it has no medium.
    pub fn storage(&self, target: &str) -> Option<Storage> {
        self.disk(target)?.storage.clone()
    }

    /// Makes a document for a QEMU without one. It is enough for a person, and for libvirt's save
    /// image tools. The disks are numbered there, like `vda`: libvirt seldom accepts a drive's own
    /// name.
    pub fn minimal(machine: &Machine, disks: &[Source]) -> String {
        let mut text = format!("<domain type='{}'>\n", if machine.kvm { "kvm" } else { "qemu" });
        let mut line = |line: String| text.push_str(&line);
        line(format!("  <name>{}</name>\n", escape(&machine.name)));
        // All zeros: QEMU was given no UUID, and libvirt accepts no such UUID.
        if machine.uuid.chars().any(|c| c != '0' && c != '-') {
            line(format!("  <uuid>{}</uuid>\n", escape(&machine.uuid)));
        }
        line(format!("  <memory unit='KiB'>{}</memory>\n", machine.memory / 1024));
        line(format!("  <vcpu>{}</vcpu>\n", machine.vcpus));
        line("  <os>\n".into());
        line(format!(
            "    <type arch='{}' machine='{}'>hvm</type>\n",
            escape(&machine.arch),
            escape(&machine.machine)
        ));
        line("  </os>\n  <devices>\n".into());
        if let Some(emulator) = &machine.emulator {
            line(format!("    <emulator>{}</emulator>\n", escape(emulator)));
        }
        for (index, disk) in disks.iter().enumerate() {
            line(format!("    <disk type='{}' device='disk'>\n", disk.storage.kind));
            line(format!("      <driver name='qemu' type='{}'/>\n", escape(disk.format)));
            line(format!("      {}\n", disk.storage.source));
            line(format!("      <target dev='{}' bus='virtio'/>\n", target_name(index)));
            line("    </disk>\n".into());
        }
        text.push_str("  </devices>\n</domain>\n");
        text
    }

    /// The document with these disks on these images. Everything else is unchanged.
    pub fn with_sources(&self, sources: &[Source]) -> Result<String> {
        let document = xml::parse(&self.text, "domain", &xml::GIVEN)?;
        let mut edits = Vec::new();
        for node in disk_nodes(document.root_element()) {
            let Some(target) = xml::attribute(node, "target", "dev") else { continue };
            if let Some(source) = sources.iter().find(|source| source.target == target) {
                edit_disk(node, source, &mut edits)?;
            }
        }
        // An insertion in front of a replaced element comes before the replacement.
        edits.sort_by_key(|(range, _)| (range.start, range.end));
        let mut text = self.text.clone();
        for (range, replacement) in edits.into_iter().rev() {
            text.replace_range(range, &replacement);
        }
        Ok(text)
    }
}

/// The target of the nth disk: `vda`, `vdb`, ..., `vdz`, `vdaa`. libvirt accepts no other names.
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

/// The disks of a domain's XML that have a target.
pub fn domain_disks(domain_xml: &str) -> Result<Vec<Disk>> {
    let document = xml::parse(domain_xml, "domain", &xml::GIVEN)?;
    Ok(disks(document.root_element()))
}

/// The disks of a `<domain>`, or of an element like one, that have a target.
pub fn disks(domain: Node) -> Vec<Disk> {
    disk_nodes(domain).filter_map(disk).collect()
}

/// The disk of a `<disk>` element; `None` if it has no target.
pub fn disk(node: Node) -> Option<Disk> {
    let attribute = |child, name| xml::attribute(node, child, name).map(str::to_owned);
    let has = |name| xml::child(node, name).is_some();
    let name = |image: Node| Storage::of(image)?.name;
    let chain = || {
        let top = xml::child(node, "backingStore");
        std::iter::successors(top, |image| xml::child(*image, "backingStore"))
    };
    let has_source = |image: &Node| xml::child(*image, "source").is_some();
    let backing: Vec<String> = chain().map_while(name).collect();
    let storage = Storage::of(node);
    Some(Disk {
        target: attribute("target", "dev")?,
        alias: attribute("alias", "name"),
        kind: node.attribute("type").unwrap_or("file").to_owned(),
        file: storage.as_ref().and_then(|storage| storage.name.clone()),
        present: storage.is_some(),
        storage,
        format: attribute("driver", "type").unwrap_or_else(|| "raw".into()),
        is_whole: chain().nth(backing.len()).is_none_or(|image| !has_source(&image)),
        backing,
        depth: 1 + chain().take_while(has_source).count(),
        protocol: attribute("source", "protocol"),
        source_name: attribute("source", "name"),
        volume: volume(node).map(|(pool, volume)| (pool.to_owned(), volume.to_owned())),
        needs_secret: nbd::needs_secret(node),
        encrypted: xml::child(node, "source")
            .is_some_and(|source| xml::child(source, "encryption").is_some()),
        is_lun: node.attribute("device") == Some("lun"),
        read_only: has("readonly"),
        shareable: has("shareable"),
        transient: has("transient"),
        is_merging: xml::attribute(node, "mirror", "job") == Some("active-commit"),
        job_ready: xml::attribute(node, "mirror", "ready") == Some("yes"),
        snapshot: node.attribute("snapshot").map(str::to_owned),
        cache: attribute("driver", "cache"),
        io: attribute("driver", "io"),
        discard: attribute("driver", "discard"),
    })
}

/// The storage pool and the volume that a disk, or an image below one, is on.
pub fn volume<'a>(image: Node<'a, '_>) -> Option<(&'a str, &'a str)> {
    let is_on_volume = image.attribute("type") == Some("volume");
    let source = xml::child(image, "source").filter(|_| is_on_volume)?;
    Some((source.attribute("pool")?, source.attribute("volume")?))
}

/// The UEFI variables. Their file is the text of `<nvram>`, or a `<source>` in it.
fn nvram(domain: Node) -> Option<Nvram> {
    let nvram = xml::child(xml::child(domain, "os")?, "nvram")?;
    let source = xml::child(nvram, "source").and_then(|source| source.attribute("file"));
    Some(Nvram {
        file: source.or(nvram.text().map(str::trim)).unwrap_or_default().into(),
        format: nvram.attribute("format").unwrap_or("raw").into(),
    })
}

fn holds_leases(domain: Node) -> bool {
    let Some(devices) = xml::child(domain, "devices") else { return false };
    let macvtap = xml::children(devices, "interface").any(|interface| {
        interface.attribute("type") == Some("direct")
            || xml::attribute(interface, "actual", "type") == Some("direct")
    });
    macvtap || xml::child(devices, "lease").is_some()
}

fn has_persistent_memory(domain: Node) -> bool {
    let devices = xml::child(domain, "devices");
    let mut memory = devices.into_iter().flat_map(|devices| xml::children(devices, "memory"));
    memory.any(|memory| matches!(memory.attribute("model"), Some("nvdimm" | "virtio-pmem")))
}

type Edits = Vec<(Range<usize>, String)>;

/// The edits that put one `<disk>` onto another image. A disk that is on it already stays to the
/// letter.
fn edit_disk(disk: Node, source: &Source, edits: &mut Edits) -> Result<()> {
    let Some(old) = xml::child(disk, "source") else {
        fail!(
            XmlError,
            "disk '{}' has no <source> in the domain XML, and an image in QEMU",
            source.target
        );
    };
    let Storage { kind, name, .. } = &source.storage;
    if Storage::of(disk)
        .is_some_and(|old| old == source.storage || old.name.is_some() && old.name == *name)
    {
        return Ok(());
    }
    put_source(old, &source.storage, edits);
    match disk.attribute_node("type") {
        Some(attribute) => {
            edits.push((attribute.range(), format!("type='{}'", escape(kind.as_str()))))
        }
        None => {
            let at = disk.range().start + "<disk".len();
            edits.push((at..at, format!(" type='{}'", escape(kind.as_str()))));
        }
    }
    // Older XML has the `<auth>` of network storage beside the source.
    edits.extend(xml::child(disk, "auth").map(|auth| (auth.range(), String::new())));
    match xml::child(disk, "driver") {
        Some(driver) => match driver.attribute_node("type") {
            Some(format) => {
                edits.push((format.range(), format!("type='{}'", escape(source.format))))
            }
            None => {
                let at = driver.range().start + "<driver".len();
                edits.push((at..at, format!(" type='{}'", escape(source.format))));
            }
        },
        None => {
            let at = old.range().start;
            edits.push((
                at..at,
                format!("<driver name='qemu' type='{}'/>\n      ", escape(source.format)),
            ));
        }
    }
    // It describes the chain below the old image. Without it, libvirt reads the chain from the
    // image.
    if let Some(backing) = xml::child(disk, "backingStore") {
        edits.push((backing.range(), String::new()));
    }
    Ok(())
}

/// The edits that replace a `<source>`. Security labels are for any image that QEMU opens, and
/// stay. Everything else in the old element is about its image only: a part of it, hosts,
/// reservations.
fn put_source(old: Node, new: &Storage, edits: &mut Edits) {
    let is_label = |child: &Node| child.tag_name().name() == "seclabel";
    let old_path = old.attributes().find(|attribute| matches!(attribute.name(), "file" | "dev"));
    if let (Some(attribute), Some(path), Some(_)) =
        (old_path, &new.name, new.source.strip_suffix("'/>"))
    {
        let name = if new.kind == "block" { "dev" } else { "file" };
        edits.push((attribute.range(), format!("{name}='{}'", escape(path.as_str()))));
        let others = old.children().filter(|child| child.is_element() && !is_label(child));
        edits.extend(others.map(|child| (child.range(), String::new())));
        return;
    }
    let text = old.document().input_text();
    let labels: String =
        old.children().filter(is_label).map(|label| &text[label.range()]).collect();
    let labelled = new.source.strip_suffix("/>").filter(|_| !labels.is_empty());
    edits.push((
        old.range(),
        labelled.map_or(new.source.clone(), |open| format!("{open}>{labels}</source>")),
    ));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_keeps_its_content_is_known_by_its_model() {
        let has = |devices: &str| {
            let text = format!("<domain><name>vm</name>{devices}</domain>");
            Domain::parse(&text).unwrap().has_persistent_memory
        };
        for (model, persistent) in
            [("dimm", false), ("virtio-mem", false), ("nvdimm", true), ("virtio-pmem", true)]
        {
            let memory = format!("<memory model='dimm'/><memory model='{model}'/>");
            assert_eq!(has(&format!("<devices>{memory}</devices>")), persistent, "{model}");
        }
        assert!(!has("<memory unit='KiB'>1024</memory>") && !has("<devices/>"));
    }
}
