//! The drop-in of a unit, by which systemd starts its daemon with the library.

use std::fs;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use crate::{Result, units};

/// The file, there or not.
pub struct DropIn {
    path: PathBuf,
}

impl DropIn {
    /// Of a unit of the system below `root`.
    pub fn of(root: &Path, unit: &str) -> DropIn {
        DropIn { path: root.join(format!("etc/systemd/system/{unit}.service.d/{}", units::OURS)) }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes it, whole or not at all. `others` is what the unit preloads by itself.
    pub fn write(&self, others: &str, library: &Path, upgrade_live: bool, most: Option<u32>) -> Result<()> {
        let failed = |error| format!("cannot write {}: {error}", self.path.display());
        let text = text(others, &library.display().to_string(), upgrade_live, most);
        let directory = self.path.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(directory).map_err(failed)?;
        let fresh = self.path.with_extension("conf.new");
        let written = fs::File::create(&fresh).and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            file.sync_all()
        });
        written.and_then(|()| fs::rename(&fresh, &self.path)).map_err(|error| {
            let _ = fs::remove_file(&fresh);
            failed(error)
        })
    }

    /// Removes it, and its directory where that is empty then. False where there is none.
    pub fn remove(&self) -> Result<bool> {
        match fs::remove_file(&self.path) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(format!("cannot remove {}: {error}", self.path.display())),
        }
        if let Some(directory) = self.path.parent() {
            let _ = fs::remove_dir(directory);
        }
        Ok(true)
    }

    /// What it preloads; none where there is no such file.
    pub fn library(&self) -> Result<Option<String>> {
        match fs::read_to_string(&self.path) {
            Ok(text) => Ok(units::preload_of(&text)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(format!("cannot read {}: {error}", self.path.display())),
        }
    }
}

fn text(others: &str, library: &str, upgrade_live: bool, most: Option<u32>) -> String {
    let preload = if others.is_empty() { library.to_owned() } else { format!("{others}:{library}") };
    let mut text = format!(
        "# Written by `instantsnap daemon enable`; `instantsnap daemon disable` removes it.\n\
         [Service]\n\
         Environment=\"LD_PRELOAD={}\"\n",
        preload.replace('%', "%%")
    );
    if upgrade_live {
        text += "Environment=INSTANTSNAP_UPGRADE_LIVE=1\n";
    }
    if let Some(most) = most {
        text += &format!("Environment=INSTANTSNAP_MAX_SNAPSHOTS={most}\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_what_systemd_reads() {
        let text = text("/a.so", "/opt/100%/libinstantsnap.so.0", true, Some(4));
        assert!(text.contains("Environment=\"LD_PRELOAD=/a.so:/opt/100%%/libinstantsnap.so.0\"\n"));
        assert!(text.contains("Environment=INSTANTSNAP_UPGRADE_LIVE=1\nEnvironment=INSTANTSNAP_MAX_SNAPSHOTS=4\n"));
        assert_eq!(units::preload_of(&text).as_deref(), Some("/a.so:/opt/100%/libinstantsnap.so.0"));
    }
}
