//! The library that a daemon is to have.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::Result;

const NAME: &str = "libinstantsnap.so.0";
/// Before its version in the library, which has it for this.
const MARK: &[u8] = b"instantsnap-library/";

/// The one beside this command's prefix, or where distributions have theirs.
pub fn installed() -> Result<PathBuf> {
    let prefix = std::env::current_exe().ok().and_then(|program| Some(program.parent()?.parent()?.to_owned()));
    let prefixes = prefix.into_iter().chain(["/usr/local".into(), "/usr".into()]);
    let triplet = format!("lib/{}-linux-gnu", std::env::consts::ARCH);
    let below = |prefix: PathBuf| [triplet.as_str(), "lib64", "lib"].map(|directory| prefix.join(directory).join(NAME));
    let mut candidates = prefixes.flat_map(below);
    candidates.find(|path| path.is_file()).ok_or_else(|| format!("{NAME} is not installed: give its path by --library"))
}

/// Refuses what a daemon of root's must not be given, or cannot use.
pub fn check(library: &Path) -> Result<()> {
    let shown = library.display();
    let text = library.to_str().ok_or_else(|| format!("{shown}: the path is not UTF-8"))?;
    if !library.is_absolute() {
        return Err(format!("{shown}: an absolute path is needed, for the daemon's directory is another"));
    }
    if text.contains(|letter: char| letter.is_whitespace() || letter == ':' || letter == '"' || letter == '$') {
        return Err(format!(
            "{shown}: the loader takes no path with a space or a colon, systemd none with a quote or a $"
        ));
    }
    let data = fs::metadata(library).map_err(|error| format!("{shown}: {error}"))?;
    if !data.is_file() {
        return Err(format!("{shown} is not a file"));
    }
    let directory = library.parent().and_then(|directory| fs::metadata(directory).ok());
    for (what, data) in [("it", Some(&data)), ("its directory", directory.as_ref())] {
        let Some(data) = data else { continue };
        if data.uid() != 0 || data.mode() & 0o002 != 0 {
            return Err(format!(
                "{shown}: {what} does not belong to root alone, and whoever can change it could do what the daemon can: \
                 install the library as root (meson install), or give the path of one that is"
            ));
        }
    }
    let bytes = fs::read(library).map_err(|error| format!("{shown}: {error}"))?;
    if !is_ours(&bytes) {
        return Err(format!("{shown} is not a libinstantsnap for this machine"));
    }
    Ok(())
}

/// A shared object of this machine's kind that has the driver's function.
fn is_ours(bytes: &[u8]) -> bool {
    const SHARED_OBJECT: u8 = 3;
    let class = if usize::BITS == 64 { 2 } else { 1 };
    let is_elf = bytes.starts_with(b"\x7fELF") && bytes.get(4) == Some(&class) && bytes.get(16) == Some(&SHARED_OBJECT);
    let contains = |name: &[u8]| bytes.windows(name.len()).any(|window| window == name);
    is_elf && contains(b"\0qemuSnapshotCreateXML\0") && contains(MARK)
}

/// Its version, as far as it has one.
pub fn version(bytes: &[u8]) -> Option<String> {
    let at = bytes.windows(MARK.len()).position(|window| window == MARK)? + MARK.len();
    let version: String = bytes[at..]
        .iter()
        .map(|byte| char::from(*byte))
        .take_while(|c| c.is_ascii_alphanumeric() || "-.+".contains(*c))
        .collect();
    (!version.is_empty()).then_some(version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_what_is_after_the_mark() {
        assert_eq!(version(b"\0xinstantsnap-library/1.2.3-rc1\0y").as_deref(), Some("1.2.3-rc1"));
        assert_eq!(version(b"nothing"), None);
    }

    #[test]
    fn a_path_that_the_loader_cannot_take_is_refused() {
        for path in ["lib.so", "/a b/lib.so", "/a:b/lib.so", "/nowhere/lib.so", "/tmp"] {
            assert!(check(Path::new(path)).is_err(), "{path}");
        }
    }
}
