// SPDX-License-Identifier: LGPL-2.1-or-later

//! Restores a memory image in libvirt's format with `virsh` only.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::daemon::Daemon;
use crate::guest::{Disk, Guest};
use crate::machine::{Format, Machine, make_image};

/// See [`Daemon::restore`].
pub fn restore(
    daemon: &Daemon,
    machine: &Machine,
    image: &Path,
    edit: impl FnOnce(String) -> String,
) -> Guest {
    let directory = daemon.guest_directory();
    // A copy, which a daemon of another user can read, and whose owner a system daemon may change.
    let memory = directory.path().join("memory");
    std::fs::copy(image, &memory).unwrap_or_else(|error| panic!("{}: {error}", image.display()));
    std::fs::set_permissions(&memory, std::fs::Permissions::from_mode(0o600))
        .expect("chmod of the memory image");
    daemon.give(directory.path());
    let memory = memory.to_str().expect("a path of UTF-8").to_owned();

    let xml = daemon.virsh(&["save-image-dumpxml", &memory, "--security-info"]);
    let mut disks = Vec::new();
    let xml = edit_elements(&xml, "disk", |disk| on_overlay(disk, directory.path(), &mut disks));
    let xml = edit_elements(&xml, "nvram", |nvram| copied(nvram, directory.path()));
    let serial = format!("<source path='{}'", directory.path().join("serial.log").display());
    let on_new_file = |device: &str| match part(device, "<source path='", "'") {
        Some(path) => device.replace(&format!("<source path='{path}'"), &serial),
        None => device.to_owned(),
    };
    let xml = edit_elements(&xml, "serial", on_new_file);
    let xml = edit(edit_elements(&xml, "console", on_new_file));
    let file = directory.path().join("domain.xml");
    std::fs::write(&file, &xml).expect("domain.xml");
    daemon.give(directory.path());

    let name = part(&xml, "<name>", "</name>").expect("a name").to_owned();
    let guest = Guest::of_libvirt(machine.clone(), directory, daemon.clone(), name, disks);
    daemon
        .try_virsh(&["restore", &memory, "--xml", file.to_str().expect("a path of UTF-8")])
        .unwrap_or_else(|error| {
            guest.fail(&format!("virsh restore: {error}\n--- XML\n{xml}"));
        });
    guest
}

/// Puts a disk on a new overlay of its image. Disks that cannot be written stay as they are.
fn on_overlay(disk: &str, directory: &Path, disks: &mut Vec<Disk>) -> String {
    if disk.contains("device='cdrom'")
        || disk.contains("device='floppy'")
        || disk.contains("<readonly/>")
    {
        return disk.to_owned();
    }
    // QEMU finds the images below by itself.
    let disk = edit_elements(disk, "backingStore", |_| String::new());
    let (before, after) =
        match (part(&disk, "<source file='", "'"), part(&disk, "<source dev='", "'")) {
            (Some(file), _) => (file, format!("<source file='{file}'")),
            (_, Some(device)) => (device, format!("<source dev='{device}'")),
            _ => panic!("a disk without a file: {disk}"),
        };
    let format = if part(&disk, " type='", "'").is_some() && disk.contains("type='raw'") {
        Format::Raw
    } else {
        Format::Qcow2
    };
    let device = part(&disk, "<target dev='", "'").expect("a target").to_owned();
    let overlay = directory.join(format!("overlay-{device}.qcow2"));
    make_image(&overlay, Format::Qcow2, Some((Path::new(before), format)));
    let xml = disk
        .replace(&after, &format!("<source file='{}'", overlay.display()))
        .replace("<disk type='block'", "<disk type='file'")
        .replace("type='raw'", "type='qcow2'");
    disks.push(Disk { device, backend: String::new(), file: overlay, format: Format::Qcow2 });
    xml
}

/// Copies UEFI variables, because QEMU writes what it loads back to the file.
fn copied(nvram: &str, directory: &Path) -> String {
    let Some(path) = part(nvram, "<source file='", "'").or_else(|| part(nvram, ">", "</nvram>"))
    else {
        return nvram.to_owned();
    };
    let copy = directory.join("nvram");
    std::fs::copy(path, &copy).unwrap_or_else(|error| panic!("{path}: {error}"));
    nvram.replace(path, &copy.display().to_string())
}

/// Edits each outermost element of this name. This suffices because libvirt writes XML in one form
/// only.
fn edit_elements(xml: &str, name: &str, mut edit: impl FnMut(&str) -> String) -> String {
    let (mut result, mut rest) = (String::new(), xml);
    while let Some(start) = find_start(rest, name) {
        let length = element_length(&rest[start..], name);
        result.push_str(&rest[..start]);
        result.push_str(&edit(&rest[start..start + length]));
        rest = &rest[start + length..];
    }
    result + rest
}

fn find_start(xml: &str, name: &str) -> Option<usize> {
    let ends_name = |after: &str| after.starts_with([' ', '>', '/', '\n']);
    let opening = format!("<{name}");
    xml.match_indices(&opening)
        .map(|(start, _)| start)
        .find(|start| ends_name(&xml[start + opening.len()..]))
}

/// The length of the element at the beginning.
fn element_length(xml: &str, name: &str) -> usize {
    let (closing, mut depth, mut at) = (format!("</{name}>"), 0, 0);
    loop {
        let open = find_start(&xml[at..], name).map(|start| at + start);
        let close = xml[at..].find(&closing).map(|start| at + start);
        match (open, close) {
            (Some(open), close) if close.is_none_or(|close| open < close) => {
                let end = open + xml[open..].find('>').expect("the end of a tag") + 1;
                at = end;
                if xml[..end].ends_with("/>") && depth == 0 {
                    return end;
                }
                depth += usize::from(!xml[..end].ends_with("/>"));
            }
            (_, Some(close)) => {
                at = close + closing.len();
                depth -= 1;
                if depth == 0 {
                    return at;
                }
            }
            _ => panic!("<{name}> has no end in {xml}"),
        }
    }
}

/// The text between two strings.
fn part<'a>(text: &'a str, before: &str, after: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(before)?;
    Some(rest.split_once(after)?.0)
}
