// SPDX-License-Identifier: LGPL-2.1-or-later

//! The guest's `<domain>` XML: which disks it names, and how it reads with the files that they have
//! now.

use std::ops::Range;
use std::os::unix::fs::FileTypeExt;

use quick_xml::escape::escape;
use roxmltree::Node;

use super::nbd::{self, Export};
use super::xml;
use crate::error::{Result, fail};

/// A `<domain>` element, kept to the letter.
#[derive(Clone, Debug, Default)]
pub struct Domain {
    text: String,
    /// Its name.
    pub name: String,
    /// Its disks that have a target.
    pub disks: Vec<Disk>,
    /// Its UEFI variables.
    pub nvram: Option<Nvram>,
    /// `<cpu>`, to the letter.
    pub cpu: Option<String>,
    /// It has what libvirt gives away while a domain is paused: disk leases or macvtap devices.
    pub holds_leases: bool,
}

/// A `<disk>` of a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// `<target dev=>`.
    pub target: String,
    /// `<alias name=>`: the id that libvirt gave, or the user.
    pub alias: Option<String>,
    /// `type=`.
    pub kind: String,
    /// Where its image is; `None` where there is no medium.
    pub storage: Option<Storage>,
    /// The image, by its path or an NBD export's URI: `None` where there is no medium, or one that
    /// has no such name.
    pub file: Option<String>,
    /// There is a medium.
    pub present: bool,
    /// The image's format.
    pub format: String,
    /// The images that the XML names below it, from the top down.
    pub backing: Vec<String>,
    /// The XML tells of no image below those.
    pub is_whole: bool,
    /// How many images it is on, as far as the XML tells: those without a name too.
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
    /// What is written to it is forgotten.
    pub transient: bool,
    /// Its image is being merged into one below.
    pub is_merging: bool,
    /// A block job that only waits to be ended.
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
    /// Its file; empty where it is in none.
    pub file: String,
    /// Its format.
    pub format: String,
}

impl Disk {
    /// Its images from the top down, as libvirt calls them.
    pub fn layers(&self) -> Vec<&str> {
        self.file.iter().chain(&self.backing).map(String::as_str).collect()
    }
}

/// What a disk's image is now.
#[derive(Clone, Debug)]
pub struct Source<'a> {
    /// `<target dev=>` of the disk.
    pub target: &'a str,
    /// Where its image is.
    pub storage: Storage,
    /// The image's format.
    pub format: &'a str,
}

/// Where an image is, as a `<disk>` says it: `type=` and `<source>` belong together, and libvirt
/// starts no domain in which they do not match what is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Storage {
    kind: String,
    source: String,
    name: Option<String>,
}

impl Storage {
    /// Of an image by its path, or by QEMU's name of a server's: a device is `type='block'`,
    /// everything else a file.
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

    /// Of a file that need not be there yet.
    pub fn file(path: &str) -> Storage {
        Storage::local("file", path)
    }

    fn local(kind: &str, path: &str) -> Storage {
        let attribute = if kind == "block" { "dev" } else { "file" };
        let source = format!("<source {attribute}='{}'/>", escape(path));
        Storage { kind: kind.into(), source, name: Some(path.into()) }
    }

    /// Of an element with a `type=` and a `<source>`: a disk, or a disk's `<backingStore>`. `None`
    /// where it has no medium.
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

    /// `<source>`, to the letter.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The image's name: the path of a file or a device of the host that the XML names, or an NBD
    /// export's URI.
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }
}

/// `file=` or `dev=`.
fn local_path<'a>(source: Node<'a, '_>) -> Option<&'a str> {
    source.attribute("file").or_else(|| source.attribute("dev"))
}

/// Whether a `<source>` says nothing of a medium: libvirt 12 writes one, with the number of its
/// node, for a drive that has none.
fn is_empty(source: Node) -> bool {
    let says = |name: &str| !matches!(name, "index" | "startupPolicy");
    !source.attributes().any(|attribute| says(attribute.name()))
        && !source.children().any(|child| child.is_element())
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
        let Some(name) = xml::text(root, "name") else {
            fail!(XmlError, "<domain> XML has no <name>")
        };
        Ok(Domain {
            // Without what a file has around it (an XML declaration), and a document inside another
            // cannot have.
            text: text[root.range()].into(),
            name,
            disks: disks(root),
            nvram: nvram(root),
            cpu: xml::child(root, "cpu").map(|cpu| text[cpu.range()].to_owned()),
            holds_leases: holds_leases(root),
        })
    }

    /// The disk of this target.
    pub fn disk(&self, target: &str) -> Option<&Disk> {
        self.disks.iter().find(|disk| disk.target == target)
    }

    /// Where the image of a disk is; `None` where there is no such disk, or none with a medium.
    pub fn storage(&self, target: &str) -> Option<Storage> {
        self.disk(target)?.storage.clone()
    }

    /// A document of our own for a QEMU without one: enough for a person, and for libvirt's save
    /// image tools. Disks are called by their number there, as `vda`: a drive's own name is seldom
    /// one that libvirt takes.
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
        // What is put in before an element that is replaced goes before it.
        edits.sort_by_key(|(range, _)| (range.start, range.end));
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

/// The disks of a domain's XML that have a target.
pub fn domain_disks(domain_xml: &str) -> Result<Vec<Disk>> {
    let document = xml::parse(domain_xml, "domain", &xml::GIVEN)?;
    Ok(disks(document.root_element()))
}

/// The disks of a `<domain>`, or of an element like one, that have a target.
pub fn disks(domain: Node) -> Vec<Disk> {
    disk_nodes(domain).filter_map(disk).collect()
}

/// One of them.
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

/// UEFI variables, whose file is the text of `<nvram>`, or a `<source>` in it.
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
    // Of network storage, where older XML has it beside the source.
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
    // It tells the chain below the old image; without it libvirt looks for itself.
    if let Some(backing) = xml::child(disk, "backingStore") {
        edits.push((backing.range(), String::new()));
    }
    Ok(())
}

/// The edits that put a new `<source>` in the place of another. Labels are for whatever QEMU opens,
/// and stay; what else is in the old one is of its image alone: a part of it, hosts, reservations.
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
