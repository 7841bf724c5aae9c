//! The file of an overlay.
//!
//! qemu-img, which may run with more rights than whoever can change an image or the names that lead to it, is given the open file,
//! and told what is below it: it believes neither a name nor what an image says of itself.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::PATIENCE;
use crate::error::{Code, Error, Result, fail};
use crate::own_file::OwnFile;
use crate::sys;
use crate::tool::Tool;

/// The standard input of whoever opens it.
const STDIN: &str = "/proc/self/fd/0";

/// Creates the file, owned and readable as the image below it, so that whoever could open that one can open this.
pub fn create(path: &str, image: &str, disk: &str) -> Result<OwnFile> {
    let step = format!("cannot create external snapshot file '{path}' of disk '{disk}'");
    let own = match OwnFile::create(Path::new(path)) {
        Ok(own) => own,
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            fail!(ConfigUnsupported, "external snapshot file for disk '{disk}' already exists: '{path}'; name another")
        }
        Err(error) => return Err(Error::system(step, error)),
    };
    if let Err(error) = sys::liken(own.file(), Path::new(image)) {
        let _ = own.remove();
        return Err(Error::system(step, error));
    }
    Ok(own)
}

/// Formats the file as an overlay of an image, which QEMU has open: it is not asked for its size.
pub fn format(overlay: &OwnFile, image: &str, image_format: &str, size: u64) -> std::result::Result<(), String> {
    let mut create = Tool::new("qemu-img");
    create.args(["create", "-q", "-u", "-f", "qcow2", "-F", image_format, "-b", image, STDIN]).arg(size.to_string());
    create.run_on(overlay.file())
}

/// Makes a file an overlay of an image that nobody has open.
pub fn create_on(overlay: &File, image: &str, format: &str) -> Result<()> {
    let mut create = Tool::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-F", format, "-b", image, STDIN]);
    // It opens the image and all below, for its size.
    create
        .run_on_within(overlay, PATIENCE)
        .map_err(|error| Error::new(error.code, format!("cannot create an overlay of '{image}': {}", error.message)))
}

/// Merges an overlay that no QEMU has open into the image that it was made on.
pub fn commit(overlay: &File, image: &str, image_format: &str) -> Result<()> {
    let failed = |reason: String| Error::new(Code::OperationFailed, reason);
    check_own_data(overlay).map_err(failed)?;
    let mut commit = Tool::new("qemu-img");
    commit.args(["commit", "-q", "-d"]);
    if image.starts_with('/') {
        let image = image.replace(',', ",,");
        let below = format!("backing.driver={image_format},backing.file.filename={image}");
        commit.args(["--image-opts", &format!("driver=qcow2,file.filename={STDIN},{below}")]);
    } else {
        // Not a file: it is called in ways that only qemu-img understands.
        commit.args(["-f", "qcow2", STDIN]);
    }
    commit.run_on(overlay).map_err(failed)
}

/// A qcow2 image can name another file that has its data: ours do not.
fn check_own_data(overlay: &File) -> std::result::Result<(), String> {
    const INCOMPATIBLE_FEATURES: u64 = 72;
    const EXTERNAL_DATA_FILE: u64 = 1 << 2;
    let mut features = [0; 8];
    overlay.read_exact_at(&mut features, INCOMPATIBLE_FEATURES).map_err(|error| error.to_string())?;
    if u64::from_be_bytes(features) & EXTERNAL_DATA_FILE != 0 {
        return Err("it has its data in another file, which no overlay of a snapshot has".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tool(name: &'static str, words: &[&str]) {
        Tool::new(name).args(words).run().unwrap();
    }

    #[test]
    fn an_overlay_is_merged_into_the_image_that_it_was_made_on_whatever_it_says_of_itself() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        let (image, victim, overlay) = (path("image, raw"), path("victim"), path("overlay"));
        for file in [&image, &victim] {
            std::fs::write(file, vec![0; 1 << 20]).unwrap();
        }
        let own = create(&overlay, &image, "vda").unwrap();
        format(&own, &image, "raw", 1 << 20).unwrap();
        tool("qemu-io", &["-f", "qcow2", "-c", "write -P 7 0 4k", &overlay]);
        tool("qemu-img", &["rebase", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", &victim, &overlay]);
        commit(own.file(), &image, "raw").unwrap();
        assert_eq!(std::fs::read(&image).unwrap()[..4097], [vec![7; 4096], vec![0]].concat());
        assert!(std::fs::read(&victim).unwrap().iter().all(|byte| *byte == 0));
    }

    #[test]
    fn an_image_with_its_data_elsewhere_is_not_merged() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        let (image, overlay) = (path("image"), path("overlay"));
        std::fs::write(&image, vec![0; 1 << 20]).unwrap();
        let data = format!("data_file={},data_file_raw=off", path("data"));
        tool("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &data, &overlay, "1M"]);
        let error = commit(&File::open(&overlay).unwrap(), &image, "raw").unwrap_err();
        assert!(error.message.contains("its data in another file"), "{error}");
    }
}
