// SPDX-License-Identifier: LGPL-2.1-or-later

//! The images of a domain and of its snapshots, and which is the backing file of which.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::guest::DEFAULT_TIMEOUT;
use super::open_images;
use crate::error::{Code, Error, Result};
use crate::model::nbd::Export;
use crate::monitor::json::parse;
use crate::sys;
use crate::tool::Tool;

/// Identifies an image, whichever of its names is used.
pub type Id = PathBuf;

/// Images by their identity, whichever paths lead to them.
#[derive(Debug, Default)]
pub struct Graph {
    images: BTreeMap<Id, Image>,
}

/// One image.
#[derive(Clone, Debug)]
pub struct Image {
    /// Its path, as it was first named.
    pub path: String,
    /// Its format.
    pub format: String,
    /// Its backing file.
    pub backing: Option<Id>,
    /// Its data is in another file (an external data file).
    pub has_data_elsewhere: bool,
}

/// The identity of an image: the file that the path leads to, or one fixed name of a server's
/// export.
pub fn id(path: &str) -> Id {
    if let Some(export) = Export::named(path) {
        return export.uri().into();
    }
    let path = Path::new(path);
    path.canonicalize().unwrap_or_else(|_| path.to_owned())
}

impl Graph {
    /// Adds an image and all images below it. Does nothing if the image does not exist (any more).
    pub fn add(&mut self, path: &str, format: &str) -> Result<()> {
        if self.images.contains_key(&id(path)) || !is_there(path, format) {
            return Ok(());
        }
        let layers = chain(path, format)?;
        for (n, layer) in layers.iter().enumerate() {
            let backing = layers.get(n + 1).map(|below| id(&below.path));
            let Layer { path, format, has_data_elsewhere } = layer.clone();
            self.images.entry(id(&path)).or_insert(Image {
                path,
                format,
                backing,
                has_data_elsewhere,
            });
        }
        Ok(())
    }

    /// Adds an image without reading a file.
    #[cfg(test)]
    pub fn insert(&mut self, image: &Id, backing: Option<&Id>) {
        let path = image.to_string_lossy().into_owned();
        let image = image.clone();
        let backing = backing.cloned();
        self.images.insert(
            image,
            Image { path, format: "qcow2".into(), backing, has_data_elsewhere: false },
        );
    }

    /// The image.
    pub fn get(&self, id: &Id) -> Option<&Image> {
        self.images.get(id)
    }

    /// The image and all images below it, from the top down.
    pub fn chain<'a>(&'a self, top: &'a Id) -> impl Iterator<Item = &'a Id> {
        std::iter::successors(Some(top), |id| self.images.get(*id)?.backing.as_ref())
    }

    /// The images and all images below them.
    pub fn with_all_below<'a>(&self, tops: impl IntoIterator<Item = &'a Id>) -> BTreeSet<Id> {
        tops.into_iter().flat_map(|top| self.chain(top).cloned().collect::<Vec<_>>()).collect()
    }

    /// The overlays of an image.
    pub fn overlays<'a>(&'a self, image: &'a Id) -> impl Iterator<Item = &'a Id> {
        self.images
            .iter()
            .filter(move |(_, overlay)| overlay.backing.as_ref() == Some(image))
            .map(|(id, _)| id)
    }
}

/// Whether an overlay has data of its own. A file of no length, or a device whose header was wiped,
/// has none. It is an error if the file has no header that can be read: it may have had data.
pub fn has_data(file: &File) -> std::io::Result<bool> {
    if let Some(header) = Header::read(file) {
        return header.is_empty(file).map(|empty| !empty);
    }
    let found = file.metadata()?;
    let mut head = [0; 4];
    let mut is_wiped = || -> std::io::Result<bool> {
        file.read_exact_at(&mut head, 0)?;
        Ok(head == [0; 4])
    };
    match found.file_type().is_block_device() {
        false if found.len() == 0 => Ok(false),
        true if is_wiped()? => Ok(false),
        _ => Err(std::io::Error::other("it has no header of a qcow2 image")),
    }
}

/// Whether it is certain that an overlay has no data of its own. For a forked child: allocates
/// nothing.
pub fn is_surely_empty(file: &File) -> bool {
    let mut header = [0; 48];
    if file.read_exact_at(&mut header, 0).is_err() {
        return file.metadata().is_ok_and(|found| found.is_file() && found.len() == 0);
    }
    Header::parse(&header).is_some_and(|header| header.is_empty(file).unwrap_or(false))
}

fn long(header: &[u8; 48], at: usize) -> u64 {
    header[at..at + 8].try_into().map_or(0, u64::from_be_bytes)
}

fn short(header: &[u8; 48], at: usize) -> u32 {
    header[at..at + 4].try_into().map_or(0, u32::from_be_bytes)
}

/// The header of a qcow2 image.
#[derive(Clone, Debug)]
pub struct Header {
    /// The name of its backing file.
    pub backing: Option<String>,
    /// The virtual size in bytes.
    pub size: u64,
    /// The offset of the L1 table, and its number of entries.
    clusters: (u64, u32),
}

impl Header {
    /// Reads the header of the file at a path; `None` if the file cannot be read, or is no qcow2
    /// image.
    pub fn at(path: &str) -> Option<Header> {
        Header::read(&sys::open_file(Path::new(path)).ok()?)
    }

    /// Reads the header of an open file; `None` if the file is no qcow2 image.
    pub fn read(file: &File) -> Option<Header> {
        const LONGEST: usize = 1023;
        let mut header = [0; 48];
        file.read_exact_at(&mut header, 0).ok()?;
        let parsed = Header::parse(&header)?;
        let offset = long(&header, 8);
        let length = short(&header, 16) as usize;
        let backing = || {
            let mut name = vec![0; length];
            file.read_exact_at(&mut name, offset).ok()?;
            String::from_utf8(name).ok()
        };
        let backing = if offset == 0 || length > LONGEST { None } else { backing() };
        Some(Header { backing, ..parsed })
    }

    /// Reads the beginning of a file, without the name of the backing file.
    fn parse(header: &[u8; 48]) -> Option<Header> {
        if header[..4] != *b"QFI\xfb" {
            return None;
        }
        let clusters = (long(header, 40), short(header, 36));
        Some(Header { backing: None, size: long(header, 24), clusters })
    }

    /// Whether the image has no data of its own: the guest sees only its backing file.
    pub fn is_empty(&self, file: &File) -> std::io::Result<bool> {
        const AT_ONCE: usize = 1 << 16;
        let (mut offset, tables) = self.clusters;
        let mut left = tables as usize * size_of::<u64>();
        let mut entries = [0; AT_ONCE];
        while left > 0 {
            let part = &mut entries[..left.min(AT_ONCE)];
            file.read_exact_at(part, offset)?;
            if part.iter().any(|byte| *byte != 0) {
                return Ok(false);
            }
            (left, offset) = (left - part.len(), offset.saturating_add(part.len() as u64));
        }
        Ok(true)
    }
}

/// Whether an image exists. A block device stays when the overlay on it is removed ([`remove`]):
/// then it has no qcow2 header any more.
pub fn is_there(path: &str, format: &str) -> bool {
    let Ok(found) = Path::new(path).metadata() else { return false };
    let is_gone =
        || sys::open_file(Path::new(path)).is_ok_and(|device| Header::read(&device).is_none());
    !(format == "qcow2" && found.file_type().is_block_device() && is_gone())
}

/// Removes an overlay that is not needed any more. On a block device only the header is wiped, so
/// that the rest cannot be taken for an overlay.
pub fn remove(path: &Path) -> std::io::Result<()> {
    match path.metadata() {
        Ok(found) if found.file_type().is_block_device() => {
            let flags = libc::O_NONBLOCK;
            wipe(&File::options().read(true).write(true).custom_flags(flags).open(path)?)
        }
        _ => sys::remove_file(path),
    }
}

/// Wipes the header of a qcow2 image.
pub fn wipe(image: &File) -> std::io::Result<()> {
    const SECTOR: [u8; 512] = [0; 512];
    if Header::read(image).is_none() {
        return Ok(());
    }
    image.write_all_at(&SECTOR, 0)?;
    image.sync_all()
}

/// Whether a name names an image on a server.
pub fn is_of_server(name: &str) -> bool {
    const SERVERS: [&str; 10] =
        ["nbd", "rbd", "iscsi", "ssh", "http", "https", "ftp", "ftps", "gluster", "nfs"];
    let is_server = |driver: &str| SERVERS.contains(&driver);
    match name.strip_prefix("json:") {
        Some(options) => {
            let Ok(options) = parse(options.as_bytes()) else { return false };
            let below = |options: &'_ Value| options["file"].is_object();
            let mut layers = vec![&*options];
            while let Some(layer) = layers.last().filter(|layer| below(layer)) {
                layers.push(&layer["file"]);
            }
            let drivers = layers.iter().flat_map(|layer| [&layer["driver"], &layer["file.driver"]]);
            drivers.filter_map(Value::as_str).any(is_server)
        }
        // `nbd+unix://...`, `rbd:...`
        None if file_named(name).is_some() => false,
        None => name.split([':', '+']).next().is_some_and(is_server),
    }
}

/// Resolves the name of a backing file in the image at `image`: relative names are relative to the
/// image. A name that is no path is returned unchanged.
pub fn resolve(image: &str, name: &str) -> String {
    let path = file_named(name).and_then(|name| Some(Path::new(image).parent()?.join(name)));
    path.and_then(|path| path.to_str().map(str::to_owned)).unwrap_or_else(|| name.to_owned())
}

/// The backing file of an image, and its format, read from the image itself. `None` if there is
/// none, if the image cannot be read, or if the backing file is not named by its path.
pub fn below(path: &str, format: &str) -> Option<(String, String)> {
    if format != "qcow2" {
        return None;
    }
    let name = Header::at(path)?.backing?;
    file_named(&name)?;
    // The header names the format in an extension, which is not read here: a backing file is taken
    // for qcow2.
    Some((resolve(path, &name), "qcow2".into()))
}

/// The files that a qcow2 image has for its backing file, by its header: one, or none, or those of
/// its options (`json:`).
pub fn files_below(path: &str) -> Vec<String> {
    match Header::at(path).and_then(|header| header.backing) {
        Some(name) if name.starts_with("json:") => open_images::files(&name),
        Some(name) => vec![resolve(path, &name)],
        None => Vec::new(),
    }
}

/// The name of an overlay's backing file, if that is on a server.
pub fn server_below(overlay: &str) -> Option<String> {
    Header::at(overlay)?.backing.filter(|below| is_of_server(below))
}

/// The virtual size in bytes of an image on a server. The server must answer within a timeout.
pub fn size_on_server(name: &str, format: &str) -> Result<u64> {
    size_on_server_within(name, format, DEFAULT_TIMEOUT)
}

/// The same with another timeout.
pub fn size_on_server_within(name: &str, format: &str, limit: Duration) -> Result<u64> {
    let mut info = Tool::new("qemu-img");
    info.args(["info", "-U", "--output=json", "-f", format, name]);
    let step = |error: &dyn std::fmt::Display| {
        format!("cannot ask the server of the image '{name}': {error}")
    };
    let info_json =
        info.output_within(limit).map_err(|error| Error::new(error.code, step(&error.message)))?;
    let info_json =
        parse(&info_json).map_err(|error| Error::new(Code::InternalError, step(&error)))?;
    info_json["virtual-size"]
        .as_u64()
        .ok_or_else(|| failed(step(&"qemu-img does not tell its size")))
}

/// The file that QEMU opens by a name. By QEMU's rule, a colon before the first slash ends the name
/// of a protocol. `None` if the name is not a file's (`nbd:...`, `nbd://...`), or has more options
/// than a file (`json:...`).
fn file_named(name: &str) -> Option<&str> {
    if let Some(file) = name.strip_prefix("file:") {
        return Some(file);
    }
    let has_protocol = name.find([':', '/']).is_some_and(|at| name[at..].starts_with(':'));
    (!has_protocol).then_some(name)
}

/// An image of a chain, as qemu-img reports it.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Its path.
    pub path: String,
    /// Its format.
    pub format: String,
    has_data_elsewhere: bool,
}

/// An image and all images below it. No image is locked: QEMU may have them open. No server is
/// asked: it may accept only QEMU, or not answer. So the chain ends with the first image on a
/// server.
pub fn chain(path: &str, format: &str) -> Result<Vec<Layer>> {
    if server_of(path, format).is_none() {
        return query_info(path, format, &["--backing-chain"], DEFAULT_TIMEOUT)
            .map(|layers| layers.into_iter().map(|(layer, _)| layer).collect());
    }
    let mut layers: Vec<Layer> = Vec::new();
    let mut next = Some((path.to_owned(), format.to_owned()));
    while let Some((path, format)) = next.take() {
        if is_of_server(&path) {
            layers.push(Layer { path, format, has_data_elsewhere: false });
            break;
        }
        // A chain with a loop is an error.
        if layers.iter().any(|layer| layer.path == path) {
            return Err(failed(format!(
                "the image '{path}' is its own backing file, directly or by other images"
            )));
        }
        for (layer, below) in query_info(&path, &format, &[], DEFAULT_TIMEOUT)? {
            layers.push(layer);
            next = below;
        }
    }
    Ok(layers)
}

/// The image on a server that is this image, or that is below it at any depth.
pub fn server_of(path: &str, format: &str) -> Option<String> {
    let mut seen = BTreeSet::new();
    let mut next = Some(path.to_owned());
    while let Some(path) = next.take().filter(|path| seen.insert(path.clone())) {
        if is_of_server(&path) {
            return Some(path);
        }
        let header = if format == "qcow2" { Header::at(&path) } else { None };
        next = header.and_then(|header| header.backing).map(|name| resolve(&path, &name));
    }
    None
}

/// An image's name and its format.
type Below = (String, String);

/// Asks qemu-img for an image, or for its whole chain. Returns each image with its backing file and
/// that one's format.
fn query_info(
    path: &str,
    format: &str,
    options: &[&str],
    limit: Duration,
) -> Result<Vec<(Layer, Option<Below>)>> {
    let step = || format!("cannot read the image '{path}' and those below it");
    // qemu-img would wait for a pipe without a writer.
    let kind = Path::new(path).metadata().map(|metadata| metadata.file_type());
    if kind.is_ok_and(|kind| !kind.is_file() && !kind.is_block_device()) {
        return Err(failed(format!("{}: it is neither a file nor a block device", step())));
    }
    let mut info = Tool::new("qemu-img");
    info.args(["info", "-U", "--output=json"]).args(options).args(["-f", format, path]);
    let info_json = info
        .output_within(limit)
        .map_err(|error| Error::new(error.code, format!("{}: {}", step(), error.message)))?;
    let info_json = parse(&info_json).map_err(|error| {
        Error::new(Code::InternalError, format!("{}: qemu-img says {error}", step()))
    })?;
    let text = |layer: &Value, key: &str| layer[key].as_str().map(str::to_owned);
    let layer = |layer: &Value| {
        let path = text(layer, "filename").unwrap_or_default();
        let below = text(layer, "backing-filename").map(|name| resolve(&path, &name));
        let below = below.map(|below| {
            (below, text(layer, "backing-filename-format").unwrap_or_else(|| "raw".into()))
        });
        let format = text(layer, "format").unwrap_or_default();
        let has_data_elsewhere = layer["format-specific"]["data"]["data-file"].is_string();
        (Layer { path, format, has_data_elsewhere }, below)
    };
    Ok(match info_json.as_array() {
        Some(layers) => layers.iter().map(layer).collect(),
        None => vec![layer(&info_json)],
    })
}

/// Merges `top`, and the images between, into `base`. `top` stays as it is.
pub fn commit(top: &Image, base: &str) -> Result<()> {
    let called = called_above(top, base);
    let mut commit = Tool::new("qemu-img");
    commit.args(["commit", "-q", "-d", "-f", &top.format, "-b", &called, &top.path]);
    commit.run().map_err(|reason| {
        failed(format!("cannot merge the image '{}' into '{base}': {reason}", top.path))
    })
}

/// The name by which the overlay on `base` names it: qemu-img compares the names of server images
/// as text.
fn called_above(top: &Image, base: &str) -> String {
    let server = server_of(&top.path, &top.format).filter(|name| id(name) == id(base));
    server.unwrap_or_else(|| base.to_owned())
}

/// Changes the backing file of an overlay to another one with the same content.
pub fn rebase(overlay: &Image, base: &str, format: &str) -> Result<()> {
    let mut rebase = Tool::new("qemu-img");
    rebase.args([
        "rebase",
        "-q",
        "-u",
        "-f",
        &overlay.format,
        "-F",
        format,
        "-b",
        base,
        &overlay.path,
    ]);
    rebase.run().map_err(|reason| {
        failed(format!("cannot make '{base}' the backing file of '{}': {reason}", overlay.path))
    })
}

fn failed(message: String) -> Error {
    Error::new(Code::OperationFailed, message)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    /// Makes a qcow2 image with a backing file that need not exist.
    fn image_on(image: &Path, below: &str) {
        let mut create = Tool::new("qemu-img");
        create
            .args(["create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", below])
            .arg(image)
            .arg("1M");
        create.run().unwrap();
    }

    #[test]
    fn an_image_below_by_a_protocol_or_by_options_is_no_file_beside_the_image() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("image");
        let path = |name: &str| {
            Some((directory.path().join(name).to_str().unwrap().to_owned(), "qcow2".to_owned()))
        };
        for (name, found) in [
            ("base", path("base")),
            ("./a:b", path("./a:b")),
            ("file:nbd:odd", path("nbd:odd")),
            ("/images/base", Some(("/images/base".into(), "qcow2".into()))),
            ("nbd:unix:/run/nbd", None),
            ("nbd://server/export", None),
            (
                "json:{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"/base\"}}",
                None,
            ),
        ] {
            image_on(&image, name);
            assert_eq!(below(image.to_str().unwrap(), "qcow2"), found, "{name}");
            std::fs::remove_file(&image).unwrap();
        }
    }

    #[test]
    fn a_chain_on_a_server_that_does_not_answer_is_not_waited_for_without_end() {
        let directory = tempfile::tempdir().unwrap();
        let (image, socket) = (directory.path().join("image"), directory.path().join("nbd"));
        // The kernel accepts clients, and they get no answer.
        let _silent = UnixListener::bind(&socket).unwrap();
        image_on(&image, &format!("nbd:unix:{}", socket.display()));
        let image = image.to_str().unwrap();
        let error = query_info(image, "qcow2", &["--backing-chain"], Duration::from_millis(300))
            .unwrap_err();
        assert_eq!(error.code, Code::OperationTimeout, "{error}");
        assert!(
            error.message.contains(image) && error.message.contains("qemu-img did not end"),
            "{error}"
        );
        // The server is known by its name, and is not asked.
        let layers = chain(image, "qcow2").unwrap();
        let names: Vec<_> = layers.iter().map(|layer| layer.path.as_str()).collect();
        assert_eq!(names, [image, &format!("nbd:unix:{}", socket.display())]);
    }

    #[test]
    fn names_of_servers_are_told_from_paths_and_paths_from_options() {
        for name in [
            "nbd:localhost:10809",
            "nbd+unix:///remote?socket=/run/nbd",
            "rbd:pool/image",
            "https://host/disk",
            r#"json:{"driver": "qcow2", "file": {"driver": "nbd", "server": {"type": "unix", "path": "/run/nbd"}}}"#,
            r#"json:{"driver":"raw","file.driver":"rbd","file.pool":"p"}"#,
        ] {
            assert!(is_of_server(name) && resolve("/images/overlay", name) == name, "{name}");
        }
        let local =
            r#"json:{"driver": "qcow2", "file": {"driver": "file", "filename": "/nbd/image"}}"#;
        for name in
            ["/images/a:b", "image", "nbd", "dir/nbd:image", "file:nbd:image", local, "json:{"]
        {
            assert!(!is_of_server(name), "{name}");
        }
        assert_eq!(resolve("/images/overlay", "file:image"), "/images/image");
        assert_eq!(resolve("/images/overlay", "/image"), "/image");
    }
}
