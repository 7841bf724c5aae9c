//! The file of an overlay.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Command;

use crate::error::{Code, Error, Result, fail};
use crate::sys;

/// Creates the file, owned and readable as the image below it, so that whoever could open that one can open this.
pub fn create(path: &str, image: &str, disk: &str) -> Result<File> {
    let step = format!("cannot create external snapshot file '{path}' of disk '{disk}'");
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    let file = match file {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            fail!(ConfigUnsupported, "external snapshot file for disk '{disk}' already exists: '{path}'; name another")
        }
        Err(error) => return Err(Error::system(step, error)),
    };
    if let Err(error) = sys::liken(&file, Path::new(image)) {
        let _ = sys::remove_file(Path::new(path));
        return Err(Error::system(step, error));
    }
    Ok(file)
}

/// Makes `overlay`, which exists and is replaced, an overlay of an image.
pub fn create_on(overlay: &Path, image: &str, format: &str) -> Result<()> {
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-F", format, "-b", image]).arg(overlay);
    sys::run_tool(&mut create)
        .map_err(|reason| Error::new(Code::OperationFailed, format!("cannot create an overlay of '{image}': {reason}")))
}

/// Merges a file that no QEMU has open into the image below it.
pub fn commit(overlay: &str) -> Result<()> {
    let mut commit = Command::new("qemu-img");
    commit.args(["commit", "-q", "-d", "-f", "qcow2", overlay]);
    sys::run_tool(&mut commit).map_err(|reason| Error::new(Code::OperationFailed, reason))
}
