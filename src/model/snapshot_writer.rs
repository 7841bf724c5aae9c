// SPDX-License-Identifier: LGPL-2.1-or-later

//! Writes `<domainsnapshot>`: the request to libvirt to switch disks, the definition for libvirt's
//! snapshot list, and our own record.
//!
//! libvirt's format names, for each disk, the overlay that became active at the snapshot. Our own
//! record also has elements in our own namespace, which libvirt ignores.

use std::io::Result;

use quick_xml::Writer;
use quick_xml::escape::escape;
use quick_xml::events::{BytesText, Event};

use super::domain::{Source, Storage};
use super::notes::{NotedMemory, Notes};
use super::plan::DiskPlan;
use super::record::{ManualDisk, Record, RecordedDisk, RecordedNvram};

/// The namespace is for other programs that read a record. [`Record::parse`] ignores it, and so it
/// reads the records of earlier, unreleased versions too, which have another namespace.
const NAMESPACE: &str = "urn:instantsnap:record:1";

type XmlWriter = Writer<Vec<u8>>;

/// The request that makes libvirt switch only these disks, to overlays that exist. `left_out`: the
/// targets of the other disks.
pub fn switch_order(name: &str, disks: &[DiskPlan], left_out: &[String]) -> String {
    document(None, |writer| {
        text(writer, "name", name)?;
        element(writer, "disks", |writer| {
            let nothing = |_: &mut XmlWriter| Ok(());
            disks
                .iter()
                .try_for_each(|disk| external(writer, disk.drive.name(), &disk.overlay, nothing))?;
            left_out.iter().try_for_each(|name| excluded(writer, name))
        })
    })
}

/// The definition of a snapshot for libvirt's snapshot list, with our notes in its `<domain>`.
pub fn definition(
    record: &Record,
    memory: Option<NotedMemory>,
    parent: Option<&str>,
    left_out: &[String],
    inactive_domain: Option<&str>,
) -> String {
    document(None, |writer| {
        head(writer, record, parent)?;
        element(writer, "disks", |writer| {
            let nothing = |_: &mut XmlWriter| Ok(());
            record
                .disks
                .iter()
                .try_for_each(|disk| external(writer, &disk.name, &disk.overlay, nothing))?;
            left_out.iter().try_for_each(|name| excluded(writer, name))
        })?;
        verbatim(writer, &domain_with_notes(record, memory))?;
        let inactive = inactive_domain.and_then(as_inactive_domain);
        inactive.map_or(Ok(()), |inactive| verbatim(writer, &inactive))
    })
}

impl Record {
    /// Our own record, which [`Record::parse`] reads.
    pub fn to_xml(&self) -> String {
        let mut xml = document(Some(("xmlns:instantsnap", NAMESPACE)), |writer| {
            head(writer, self, self.parent.as_deref())?;
            element(writer, "disks", |writer| {
                self.disks.iter().try_for_each(|disk| recorded(writer, disk))?;
                self.manual.iter().try_for_each(|disk| manual(writer, disk))?;
                self.nvram.iter().try_for_each(|copy| nvram(writer, copy))
            })?;
            verbatim(writer, &self.domain_xml)
        });
        xml.push('\n');
        xml
    }
}

/// The `<disk>` of a disk that is on an overlay.
pub fn external_disk(overlay: &Source) -> String {
    let Source { target, storage, format } = overlay;
    format!(
        "<disk name='{}' snapshot='external' type='{}'><driver type='{}'/>{}</disk>",
        escape(*target),
        storage.kind(),
        escape(*format),
        storage.source()
    )
}

/// The `<disk>` of a disk that the snapshot does not change.
pub fn excluded_disk(target: &str) -> String {
    format!("<disk name='{}' snapshot='no'/>", escape(target))
}

/// `<parent>`.
pub fn parent(name: &str) -> String {
    format!("<parent><name>{}</name></parent>", escape(name))
}

fn document(
    attribute: Option<(&str, &str)>,
    content: impl FnOnce(&mut XmlWriter) -> Result<()>,
) -> String {
    let mut writer = Writer::new_with_indent(Vec::new(), b' ', 2);
    writer
        .create_element("domainsnapshot")
        .with_attributes(attribute)
        .write_inner_content(content)
        .expect("writing to memory cannot fail");
    String::from_utf8(writer.into_inner()).expect("only strings were written")
}

/// Writes the elements before the disks.
fn head(writer: &mut XmlWriter, record: &Record, parent: Option<&str>) -> Result<()> {
    text(writer, "name", &record.name)?;
    if let Some(description) = &record.description {
        text(writer, "description", description)?;
    }
    text(writer, "state", record.state.as_str())?;
    if let Some(parent) = parent {
        element(writer, "parent", |writer| text(writer, "name", parent))?;
    }
    text(writer, "creationTime", &record.creation_time.to_string())?;
    let memory = [("snapshot", "external"), ("file", record.memory_file.as_str())];
    writer.create_element("memory").with_attributes(memory).write_empty().map(drop)
}

/// Writes a disk that was switched to an overlay. `more` writes further elements into it.
fn external(
    writer: &mut XmlWriter,
    name: &str,
    overlay: &str,
    more: impl FnOnce(&mut XmlWriter) -> Result<()>,
) -> Result<()> {
    let storage = Storage::at(overlay);
    let place = if storage.kind() == "block" { "dev" } else { "file" };
    let attributes = [("name", name), ("snapshot", "external"), ("type", storage.kind())];
    let disk = writer.create_element("disk").with_attributes(attributes);
    disk.write_inner_content(|writer| {
        writer.create_element("driver").with_attribute(("type", "qcow2")).write_empty()?;
        writer.create_element("source").with_attribute((place, overlay)).write_empty()?;
        more(writer)
    })
    .map(drop)
}

/// Writes a disk that was left out.
fn excluded(writer: &mut XmlWriter, name: &str) -> Result<()> {
    let attributes = [("name", name), ("snapshot", "no")];
    writer.create_element("disk").with_attributes(attributes).write_empty().map(drop)
}

fn recorded(writer: &mut XmlWriter, disk: &RecordedDisk) -> Result<()> {
    external(writer, &disk.name, &disk.overlay, |writer| {
        image(writer, &disk.image, &disk.format)?;
        disk.frozen.iter().try_for_each(|frozen| {
            let element = format!("<instantsnap:frozen{}/>", frozen.attributes());
            writer.write_event(Event::Text(BytesText::from_escaped(element)))
        })
    })
}

fn manual(writer: &mut XmlWriter, disk: &ManualDisk) -> Result<()> {
    let attributes = [("name", disk.name.as_str()), ("snapshot", "manual")];
    let element = writer.create_element("disk").with_attributes(attributes);
    element.write_inner_content(|writer| image(writer, &disk.source, &disk.format)).map(drop)
}

fn image(writer: &mut XmlWriter, file: &str, format: &str) -> Result<()> {
    let attributes = [("file", file), ("format", format)];
    writer.create_element("instantsnap:image").with_attributes(attributes).write_empty().map(drop)
}

fn nvram(writer: &mut XmlWriter, nvram: &RecordedNvram) -> Result<()> {
    let attributes = [
        ("name", nvram.name.as_str()),
        ("file", &nvram.copy),
        ("original", &nvram.original),
        ("format", &nvram.format),
    ];
    let content = nvram.content.as_deref().map(|content| ("content", content));
    let element = writer.create_element("instantsnap:nvram").with_attributes(attributes);
    element.with_attributes(content).write_empty().map(drop)
}

fn element(
    writer: &mut XmlWriter,
    name: &str,
    content: impl FnOnce(&mut XmlWriter) -> Result<()>,
) -> Result<()> {
    writer.create_element(name).write_inner_content(content).map(drop)
}

fn text(writer: &mut XmlWriter, name: &str, text: &str) -> Result<()> {
    writer.create_element(name).write_text_content(BytesText::new(text)).map(drop)
}

/// Writes an element unchanged: it is neither escaped nor formatted.
fn verbatim(writer: &mut XmlWriter, element: &str) -> Result<()> {
    let element = format!("\n  {}\n", element.trim());
    writer.write_event(Event::Text(BytesText::from_escaped(element)))
}

fn domain_with_notes(record: &Record, memory: Option<NotedMemory>) -> String {
    let of_disk = |disk: &RecordedDisk| {
        disk.frozen.iter().map(|frozen| (disk.name.clone(), frozen.clone())).collect::<Vec<_>>()
    };
    let frozen = record.disks.iter().flat_map(of_disk).collect();
    let notes = Notes { frozen, memory, ..Notes::default() };
    // Without notes the snapshot still is a valid one of libvirt's.
    notes.put_into(&record.domain_xml, "domain").unwrap_or_else(|_| record.domain_xml.clone())
}

/// The `<domain>` element, renamed to `<inactiveDomain>`.
fn as_inactive_domain(domain: &str) -> Option<String> {
    let inner = domain.trim().strip_prefix("<domain")?.strip_suffix("</domain>")?;
    Some(format!("<inactiveDomain{inner}</inactiveDomain>"))
}
