// SPDX-License-Identifier: LGPL-2.1-or-later

//! The drop-in of a unit, which makes systemd start its daemon with the library.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use super::root::Root;
use super::{Result, units};

/// The directory of the units' own files and drop-ins.
const SYSTEM: &str = "etc/systemd/system";

/// A drop-in file, which need not exist.
pub struct DropIn<'a> {
    root: &'a Root,
    /// Its directory's name.
    directory: String,
}

impl DropIn<'_> {
    /// The drop-in of a unit in a system.
    pub fn of<'a>(root: &'a Root, unit: &str) -> DropIn<'a> {
        DropIn { root, directory: format!("{unit}.service.d") }
    }

    /// Its path, for messages.
    pub fn path(&self) -> PathBuf {
        self.root.shown(self.file())
    }

    fn place(&self) -> PathBuf {
        Path::new(SYSTEM).join(&self.directory)
    }

    fn file(&self) -> PathBuf {
        self.place().join(units::OURS)
    }

    fn failed(&self, what: &str, error: &io::Error) -> String {
        format!("cannot {what} {}: {error}", self.path().display())
    }

    /// Writes the drop-in atomically. `others` are the libraries that the unit preloads anyway.
    pub fn write(
        &self,
        others: &str,
        library: &Path,
        upgrade_live: bool,
        max_snapshots: Option<u32>,
    ) -> Result<()> {
        let text = text(others, &library.display().to_string(), upgrade_live, max_snapshots);
        let directory = self.root.make_directory(self.place());
        directory
            .and_then(|directory| directory.write(units::OURS, &text))
            .map_err(|error| self.failed("write", &error))
    }

    /// Removes the drop-in, and its directory if that is empty then. Returns false if there is
    /// none.
    pub fn remove(&self) -> Result<bool> {
        match self
            .root
            .directory(self.place())
            .and_then(|directory| directory.remove_file(units::OURS))
        {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(self.failed("remove", &error)),
        }
        if let Ok(above) = self.root.directory(SYSTEM) {
            let _ = above.remove_directory(&self.directory);
        }
        Ok(true)
    }

    /// The libraries that it preloads; `None` if there is no drop-in.
    pub fn library(&self) -> Result<Option<String>> {
        match self.root.read(self.file()) {
            Ok(text) => Ok(units::preload_of(&text)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.failed("read", &error)),
        }
    }
}

fn text(others: &str, library: &str, upgrade_live: bool, max_snapshots: Option<u32>) -> String {
    let preload =
        if others.is_empty() { library.to_owned() } else { format!("{others}:{library}") };
    let mut text = format!(
        "# Written by `instantsnap daemon enable`; `instantsnap daemon disable` removes it.\n\
         [Service]\n\
         Environment=\"LD_PRELOAD={}\"\n",
        preload.replace('%', "%%")
    );
    if upgrade_live {
        text += "Environment=INSTANTSNAP_UPGRADE_LIVE=1\n";
    }
    if let Some(max_snapshots) = max_snapshots {
        text += &format!("Environment=INSTANTSNAP_MAX_SNAPSHOTS={max_snapshots}\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_what_systemd_reads() {
        let text = text("/a.so", "/opt/100%/libinstantsnap-preload.so", true, Some(4));
        assert!(
            text.contains(
                "Environment=\"LD_PRELOAD=/a.so:/opt/100%%/libinstantsnap-preload.so\"\n"
            )
        );
        assert!(text.contains(
            "Environment=INSTANTSNAP_UPGRADE_LIVE=1\nEnvironment=INSTANTSNAP_MAX_SNAPSHOTS=4\n"
        ));
        assert_eq!(
            units::preload_of(&text).as_deref(),
            Some("/a.so:/opt/100%/libinstantsnap-preload.so")
        );
    }
}
