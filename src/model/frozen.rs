// SPDX-License-Identifier: LGPL-2.1-or-later

//! The state of an image when a snapshot froze it. A comparison shows whether the file was written
//! or replaced since.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use quick_xml::escape::escape;
use roxmltree::Node;

use crate::error::{Result, fail};

/// The state of a file. The time of other changes (owner, permissions) is left out, because libvirt
/// makes such changes itself. So is the device, whose number can change when the host is restarted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frozen {
    /// The image's path.
    pub file: String,
    inode: u64,
    size: u64,
    /// Seconds and nanoseconds of the last write.
    written: (i64, i64),
}

impl Frozen {
    /// The state of a file now. `None` if it is no regular file: then its inode tells nothing about
    /// its content.
    pub fn of(file: &str) -> Option<Frozen> {
        let metadata = Path::new(file).metadata().ok().filter(|metadata| metadata.is_file())?;
        Some(Frozen {
            file: file.to_owned(),
            inode: metadata.ino(),
            size: metadata.size(),
            written: (metadata.mtime(), metadata.mtime_nsec()),
        })
    }

    /// The state of several images.
    pub fn of_all<'a>(files: impl IntoIterator<Item = &'a String>) -> Vec<Frozen> {
        files.into_iter().filter_map(|file| Frozen::of(file)).collect()
    }

    /// Refuses a revert if the image has changed. `disk` and `snapshot` are named in the error.
    pub fn check(&self, disk: &str, snapshot: &str) -> Result<()> {
        match self.change() {
            None => Ok(()),
            Some(change) => fail!(
                SnapshotRevertRisky,
                "cannot revert to snapshot '{snapshot}': the image '{}' of disk '{disk}' {change} \
                 since the snapshot froze it, so that memory and disks would not be of one moment; \
                 where you know that the content is the same (a copy), revert with \
                 VIR_DOMAIN_SNAPSHOT_REVERT_FORCE (virsh snapshot-revert --force)",
                self.file
            ),
        }
    }

    /// What has changed, as a part of a message.
    pub fn change(&self) -> Option<&'static str> {
        let Some(now) = Frozen::of(&self.file) else {
            return Some("does not exist, or is no file any more");
        };
        match () {
            () if now.inode != self.inode => Some("was replaced by another file"),
            () if (now.size, now.written) != (self.size, self.written) => Some("was written to"),
            () => None,
        }
    }

    /// Its attributes in XML, with a space before each.
    pub fn attributes(&self) -> String {
        let Frozen { file, inode, size, written: (seconds, nanoseconds) } = self;
        format!(
            " file=\"{}\" inode=\"{inode}\" size=\"{size}\" written=\"{seconds}.{nanoseconds:09}\"",
            escape(file)
        )
    }

    /// Reads the attributes; `None` if one is missing or invalid.
    pub fn read(node: Node) -> Option<Frozen> {
        let number = |name: &str| node.attribute(name)?.parse().ok();
        let (seconds, nanoseconds) = node.attribute("written")?.split_once('.')?;
        Some(Frozen {
            file: node.attribute("file")?.to_owned(),
            inode: number("inode")?,
            size: number("size")?,
            written: (seconds.parse().ok()?, nanoseconds.parse().ok()?),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_file_that_was_written_or_replaced_is_noticed_and_one_with_another_mode_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a<'b");
        let file = path.to_str().unwrap();
        std::fs::write(&path, "one").unwrap();
        let frozen = Frozen::of(file).unwrap();
        let text = format!("<image{}/>", frozen.attributes());
        let document = roxmltree::Document::parse(&text).unwrap();
        assert_eq!(Frozen::read(document.root_element()), Some(frozen.clone()));
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o400)).unwrap();
        assert_eq!(frozen.change(), None);
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
        // The kernel's clock for file times ticks only every few milliseconds.
        while frozen.change().is_none() {
            std::fs::write(&path, "two").unwrap();
        }
        assert_eq!(frozen.change(), Some("was written to"));
        let written = Frozen::of(file).unwrap();
        std::fs::copy(&path, directory.path().join("copy")).unwrap();
        std::fs::rename(directory.path().join("copy"), &path).unwrap();
        assert_eq!(written.change(), Some("was replaced by another file"));
        std::fs::remove_file(&path).unwrap();
        assert_eq!(written.change(), Some("does not exist, or is no file any more"));
        assert_eq!(Frozen::of(directory.path().to_str().unwrap()), None);
    }
}
