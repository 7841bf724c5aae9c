//! The images of a domain and of its snapshots: which is the backing file of which.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::PATIENCE;
use crate::error::{Code, Error, Result};
use crate::monitor::json::parse;
use crate::sys;
use crate::tool::Tool;

/// An image file, however it is called.
pub type Id = PathBuf;

/// Images by what they are, whatever paths lead to them.
#[derive(Debug, Default)]
pub struct Graph {
    images: BTreeMap<Id, Image>,
}

/// One image.
#[derive(Clone, Debug)]
pub struct Image {
    /// A path of it, as whoever named it calls it.
    pub path: String,
    /// Its format.
    pub format: String,
    /// What it is an overlay of.
    pub backing: Option<Id>,
    /// Its data is in another file, which it names.
    pub has_data_elsewhere: bool,
}

/// What a path leads to.
pub fn id(path: &str) -> Id {
    let path = Path::new(path);
    path.canonicalize().unwrap_or_else(|_| path.to_owned())
}

/// What the names of images end with that a revert has made.
pub const REVERT: &str = ".revert";

/// Whether an image is called as those are: IMAGE.SNAPSHOT-XXXXXX.revert.
pub fn is_of_revert(image: &Id) -> bool {
    let name = image.file_name().unwrap_or_default().to_string_lossy();
    let random = name.strip_suffix(REVERT).and_then(|name| name.rsplit_once('-')).map(|(_, random)| random);
    random.is_some_and(|random| random.len() == 6 && random.chars().all(|c| c.is_ascii_alphanumeric()))
}

impl Graph {
    /// Adds an image and all below it. One that is not there (any more) is passed over.
    pub fn add(&mut self, path: &str, format: &str) -> Result<()> {
        if self.images.contains_key(&id(path)) || !Path::new(path).exists() {
            return Ok(());
        }
        let layers = chain(path, format)?;
        for (n, layer) in layers.iter().enumerate() {
            let backing = layers.get(n + 1).map(|below| id(&below.path));
            let Layer { path, format, has_data_elsewhere } = layer.clone();
            self.images.entry(id(&path)).or_insert(Image { path, format, backing, has_data_elsewhere });
        }
        Ok(())
    }

    /// An image that no file is looked at for.
    #[cfg(test)]
    pub fn insert(&mut self, image: &Id, backing: Option<&Id>) {
        let path = image.to_string_lossy().into_owned();
        let image = image.clone();
        let backing = backing.cloned();
        self.images.insert(image, Image { path, format: "qcow2".into(), backing, has_data_elsewhere: false });
    }

    /// The image.
    pub fn get(&self, id: &Id) -> Option<&Image> {
        self.images.get(id)
    }

    /// It and all below it, from the top down.
    pub fn chain<'a>(&'a self, top: &'a Id) -> impl Iterator<Item = &'a Id> {
        std::iter::successors(Some(top), |id| self.images.get(*id)?.backing.as_ref())
    }

    /// These and all below them.
    pub fn with_all_below<'a>(&self, tops: impl IntoIterator<Item = &'a Id>) -> BTreeSet<Id> {
        tops.into_iter().flat_map(|top| self.chain(top).cloned().collect::<Vec<_>>()).collect()
    }

    /// The overlays of an image.
    pub fn overlays<'a>(&'a self, image: &'a Id) -> impl Iterator<Item = &'a Id> {
        self.images.iter().filter(move |(_, overlay)| overlay.backing.as_ref() == Some(image)).map(|(id, _)| id)
    }
}

/// The file below an image and its format, read from the image itself. None where there is none, or
/// where it cannot be read, or is named otherwise than by its path.
pub fn below(path: &str, format: &str) -> Option<(String, String)> {
    const LONGEST: usize = 1023;
    if format != "qcow2" {
        return None;
    }
    let file = sys::open_file(Path::new(path)).ok()?;
    let mut header = [0; 20];
    file.read_exact_at(&mut header, 0).ok()?;
    let offset = u64::from_be_bytes(header[8..16].try_into().ok()?);
    let length = u32::from_be_bytes(header[16..20].try_into().ok()?) as usize;
    if header[..4] != *b"QFI\xfb" || offset == 0 || length > LONGEST {
        return None;
    }
    let mut name = vec![0; length];
    file.read_exact_at(&mut name, offset).ok()?;
    let name = String::from_utf8(name).ok()?;
    let below = Path::new(path).parent()?.join(file_named(&name)?).to_str()?.to_owned();
    // What the image says of the format is in an extension; a file that begins as qcow2 is taken for it.
    Some((below, "qcow2".into()))
}

/// The file that QEMU opens by a name, by QEMU's rule: a colon before the first slash ends the name of a protocol. None where
/// that is no file's (`nbd:...`, `nbd://...`), or where there is more to it than a file (`json:...`).
fn file_named(name: &str) -> Option<&str> {
    if let Some(file) = name.strip_prefix("file:") {
        return Some(file);
    }
    let has_protocol = name.find([':', '/']).is_some_and(|at| name[at..].starts_with(':'));
    (!has_protocol).then_some(name)
}

/// An image, as qemu-img tells of it.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Its path.
    pub path: String,
    /// Its format.
    pub format: String,
    has_data_elsewhere: bool,
}

/// An image and all below it. Nothing is locked: QEMU may have them open.
pub fn chain(path: &str, format: &str) -> Result<Vec<Layer>> {
    chain_within(path, format, PATIENCE)
}

/// The same within this time: one below can be on a server that does not answer.
fn chain_within(path: &str, format: &str, limit: Duration) -> Result<Vec<Layer>> {
    let step = || format!("cannot read the image '{path}' and those below it");
    // A pipe that nobody writes to would be waited for.
    let kind = Path::new(path).metadata().map(|metadata| metadata.file_type());
    if kind.is_ok_and(|kind| !kind.is_file() && !kind.is_block_device()) {
        return Err(failed(format!("{}: it is neither a file nor a block device", step())));
    }
    let mut info = Tool::new("qemu-img");
    info.args(["info", "-U", "--backing-chain", "--output=json", "-f", format, path]);
    let said =
        info.output_within(limit).map_err(|error| Error::new(error.code, format!("{}: {}", step(), error.message)))?;
    let layers =
        parse(&said).map_err(|error| Error::new(Code::InternalError, format!("{}: qemu-img says {error}", step())))?;
    let text = |layer: &Value, key: &str| layer[key].as_str().unwrap_or_default().to_owned();
    let layer = |layer: &Value| Layer {
        path: text(layer, "filename"),
        format: text(layer, "format"),
        has_data_elsewhere: layer["format-specific"]["data"]["data-file"].is_string(),
    };
    Ok(layers.as_array().into_iter().flatten().map(layer).collect())
}

/// Writes what is in `top`, and in the images between, to `base`. `top` stays as it is.
pub fn commit(top: &Image, base: &str) -> Result<()> {
    let mut commit = Tool::new("qemu-img");
    commit.args(["commit", "-q", "-d", "-f", &top.format, "-b", base, &top.path]);
    commit.run().map_err(|reason| failed(format!("cannot merge the image '{}' into '{base}': {reason}", top.path)))
}

/// Makes an image an overlay of another with the same content as its backing file has.
pub fn rebase(overlay: &Image, base: &str, format: &str) -> Result<()> {
    let mut rebase = Tool::new("qemu-img");
    rebase.args(["rebase", "-q", "-u", "-f", &overlay.format, "-F", format, "-b", base, &overlay.path]);
    rebase
        .run()
        .map_err(|reason| failed(format!("cannot make '{base}' the backing file of '{}': {reason}", overlay.path)))
}

fn failed(message: String) -> Error {
    Error::new(Code::OperationFailed, message)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    /// A qcow2 image that names this one below it, which is not looked at.
    fn image_on(image: &Path, below: &str) {
        let mut create = Tool::new("qemu-img");
        create.args(["create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", below]).arg(image).arg("1M");
        create.run().unwrap();
    }

    #[test]
    fn an_image_below_by_a_protocol_or_by_options_is_no_file_beside_the_image() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("image");
        let path = |name: &str| Some((directory.path().join(name).to_str().unwrap().to_owned(), "qcow2".to_owned()));
        for (name, found) in [
            ("base", path("base")),
            ("./a:b", path("./a:b")),
            ("file:nbd:odd", path("nbd:odd")),
            ("/images/base", Some(("/images/base".into(), "qcow2".into()))),
            ("nbd:unix:/run/nbd", None),
            ("nbd://server/export", None),
            ("json:{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"/base\"}}", None),
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
        // Clients are let in by the kernel, and never answered.
        let _silent = UnixListener::bind(&socket).unwrap();
        image_on(&image, &format!("nbd:unix:{}", socket.display()));
        let image = image.to_str().unwrap();
        let error = chain_within(image, "qcow2", Duration::from_millis(300)).unwrap_err();
        assert_eq!(error.code, Code::OperationTimeout, "{error}");
        assert!(error.message.contains(image) && error.message.contains("qemu-img did not end"), "{error}");
    }
}
