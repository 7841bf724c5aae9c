//! What libvirt is told of a snapshot, and what its domain XML tells us.

use quick_xml::Writer;
use quick_xml::events::{BytesText, Event};

use crate::model::domain::{self, Storage};
use crate::model::{DiskPlan, Notes, Record, RecordedDisk, xml};

type XmlWriter = Writer<Vec<u8>>;

/// Disks that are left out, by target.
pub type LeftOut = Vec<String>;

/// `<domainsnapshot>` that makes libvirt switch these disks, and no other, to overlays that exist.
pub fn switch(name: &str, disks: &[DiskPlan], left_out: &LeftOut) -> String {
    write(|writer| {
        text(writer, "name", name)?;
        let disks = disks.iter().map(|disk| (disk.drive.name(), disk.overlay.as_str()));
        write_disks(writer, disks, left_out)
    })
}

/// `<domainsnapshot>` that libvirt records as its own.
pub fn record(
    record: &Record,
    parent: Option<&str>,
    left_out: &LeftOut,
    inactive_domain: Option<&str>,
) -> String {
    write(|writer| {
        text(writer, "name", &record.name)?;
        if let Some(description) = &record.description {
            text(writer, "description", description)?;
        }
        text(writer, "state", record.state.as_str())?;
        if let Some(parent) = parent {
            writer
                .create_element("parent")
                .write_inner_content(|writer| text(writer, "name", parent))?;
        }
        text(writer, "creationTime", &record.creation_time.to_string())?;
        let memory = [("snapshot", "external"), ("file", record.memory_file.as_str())];
        writer.create_element("memory").with_attributes(memory).write_empty()?;
        let disks = record.disks.iter().map(|disk| (disk.name.as_str(), disk.overlay.as_str()));
        write_disks(writer, disks, left_out)?;
        verbatim(writer, &noted(record))?;
        match inactive_domain.and_then(as_inactive_domain) {
            Some(inactive) => verbatim(writer, &inactive),
            None => Ok(()),
        }
    })
}

/// The record's domain, with what we note down of the snapshot.
fn noted(record: &Record) -> String {
    let of_disk = |disk: &RecordedDisk| {
        disk.frozen.iter().map(|frozen| (disk.name.clone(), frozen.clone())).collect::<Vec<_>>()
    };
    let notes =
        Notes { frozen: record.disks.iter().flat_map(of_disk).collect(), ..Notes::default() };
    // Without notes it is a snapshot as libvirt takes them.
    notes.put_into(&record.domain_xml, "domain").unwrap_or_else(|_| record.domain_xml.clone())
}

fn write(content: impl FnOnce(&mut XmlWriter) -> std::io::Result<()>) -> String {
    let mut writer = Writer::new_with_indent(Vec::new(), b' ', 2);
    writer
        .create_element("domainsnapshot")
        .write_inner_content(content)
        .expect("writing to memory cannot fail");
    String::from_utf8(writer.into_inner()).expect("only strings were written")
}

fn write_disks<'a>(
    writer: &mut XmlWriter,
    external: impl Iterator<Item = (&'a str, &'a str)>,
    left_out: &LeftOut,
) -> std::io::Result<()> {
    writer.create_element("disks").write_inner_content(|writer| {
        for (name, overlay) in external {
            let storage = Storage::at(overlay);
            let attributes = [("name", name), ("snapshot", "external"), ("type", storage.kind())];
            writer.create_element("disk").with_attributes(attributes).write_inner_content(
                |writer| {
                    writer
                        .create_element("driver")
                        .with_attribute(("type", "qcow2"))
                        .write_empty()?;
                    verbatim(writer, storage.source())
                },
            )?;
        }
        for name in left_out {
            let attributes = [("name", name.as_str()), ("snapshot", "no")];
            writer.create_element("disk").with_attributes(attributes).write_empty()?;
        }
        Ok(())
    })?;
    Ok(())
}

fn text(writer: &mut XmlWriter, name: &str, text: &str) -> std::io::Result<()> {
    writer.create_element(name).write_text_content(BytesText::new(text)).map(drop)
}

/// An element of libvirt's, as it stands.
fn verbatim(writer: &mut XmlWriter, element: &str) -> std::io::Result<()> {
    writer.write_event(Event::Text(BytesText::from_escaped(format!("\n{}\n", element.trim()))))
}

/// The element's name changed.
fn as_inactive_domain(domain: &str) -> Option<String> {
    let inner = domain.trim().strip_prefix("<domain")?.strip_suffix("</domain>")?;
    Some(format!("<inactiveDomain{inner}</inactiveDomain>"))
}

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
    let element = format!("<parent><name>{}</name></parent>", quick_xml::escape::escape(parent));
    match (xml::child(root, "parent"), xml::child(root, "name")) {
        (Some(old), _) => changed.replace_range(old.range(), &element),
        (None, Some(name)) => changed.insert_str(name.range().end, &element),
        (None, None) => {}
    }
    changed
}
