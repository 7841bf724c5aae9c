// SPDX-License-Identifier: LGPL-2.1-or-later

//! Finds and checks the library for a daemon.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::Result;
use super::root::Root;

const NAME: &str = "libinstantsnap-preload.so";
/// The prefix of the file names of the library for programs, which earlier versions preloaded into
/// daemons.
const FORMER: &str = "libinstantsnap.so";
/// The mark in front of the version in the library's file.
const MARK: &[u8] = b"instantsnap-preload/";
/// The mark in front of the version in the library for programs, in versions that were preloaded
/// into daemons.
const FORMER_MARK: &[u8] = b"instantsnap-library/";

/// The kind of one of our libraries, by its file's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The library for LD_PRELOAD.
    Preload,
    /// The library for programs, with which a daemon takes no instant snapshots.
    Former,
}

impl Kind {
    /// The kind of the library at a path; `None` if it is neither.
    pub fn of(path: &str) -> Option<Kind> {
        let name = path.rsplit('/').next()?;
        // The name is the same as it is installed and as cargo has built it, except for `_`.
        let is_preload = name.replace('_', "-").starts_with(NAME);
        let is_former = name.starts_with(FORMER);
        is_preload.then_some(Kind::Preload).or(is_former.then_some(Kind::Former))
    }
}

/// The other libraries in a list of preloaded libraries.
pub fn others(list: &str) -> String {
    let libraries = list.split([':', ' ']).filter(|library| !library.is_empty());
    libraries.filter(|library| Kind::of(library).is_none()).collect::<Vec<_>>().join(":")
}

/// The installed library, as that system sees its path: in this command's own prefix, or in a
/// distribution's directory.
pub fn installed(root: &Root) -> Result<PathBuf> {
    let prefix = std::env::current_exe()
        .ok()
        .and_then(|program| Some(program.parent()?.parent()?.to_owned()));
    let prefixes = prefix.into_iter().chain(["/usr/local".into(), "/usr".into()]);
    let triplet = format!("lib/{}-linux-gnu", std::env::consts::ARCH);
    let below = |prefix: PathBuf| {
        [triplet.as_str(), "lib64", "lib"].map(|directory| prefix.join(directory).join(NAME))
    };
    let mut candidates = prefixes.flat_map(below);
    // A link may lead to a file that only that system sees, so it need only exist.
    candidates
        .find(|path| root.has(path))
        .ok_or_else(|| format!("{NAME} is not installed: give its path by --library"))
}

/// Refuses a library that is not safe for a daemon of root's, or that the daemon cannot use. The
/// path is as that system sees it.
pub fn check(root: &Root, library: &Path) -> Result<()> {
    let shown = library.display();
    let text = library.to_str().ok_or_else(|| format!("{shown}: the path is not UTF-8"))?;
    if !library.is_absolute() {
        return Err(format!(
            "{shown}: an absolute path is needed, because the daemon has another directory"
        ));
    }
    if text.contains(|letter: char| {
        letter.is_whitespace() || letter == ':' || letter == '"' || letter == '$'
    }) {
        return Err(format!(
            "{shown}: the loader accepts no path with a space or a colon, and systemd none with a \
             quote or a $"
        ));
    }
    let file = follow(root.path(), library)?;
    let shown = file.display();
    if !root.has_file(library) {
        return Err(format!("{shown} is not a file"));
    }
    let mut bytes = Vec::new();
    let read = root.open_file(library).and_then(|mut file| file.read_to_end(&mut bytes));
    read.map_err(|error| format!("{shown}: {error}"))?;
    if is_ours(&bytes) {
        Ok(())
    } else if is_former(&bytes) {
        Err(format!(
            "{shown} is the library for programs: a daemon needs {NAME}, which is installed with it"
        ))
    } else {
        Err(format!("{shown} is not a {NAME} for this machine"))
    }
}

/// The file that a path leads to in the system below `root`. Returns an error if users other than
/// root can change the file, or any directory on the way, including those of symbolic links: such a
/// user could put another file there.
fn follow(root: &Path, path: &Path) -> Result<PathBuf> {
    /// The kernel's limit.
    const MOST_LINKS: usize = 40;
    let parts = |path: &Path| {
        path.components().rev().map(|part| part.as_os_str().to_owned()).collect::<Vec<_>>()
    };
    let failed = |path: &Path, error: io::Error| format!("{}: {error}", path.display());
    let root = fs::canonicalize(root).map_err(|error| failed(root, error))?;
    let (mut at, mut pending, mut links) = (root.clone(), parts(path), 0);
    while let Some(part) = pending.pop() {
        match part.to_str() {
            Some("/") => at.clone_from(&root),
            Some("..") if at == root => {}
            Some("..") => _ = at.pop(),
            _ => at.push(part),
        }
        let data = fs::symlink_metadata(&at).map_err(|error| failed(&at, error))?;
        if data.is_symlink() {
            links += 1;
            if links > MOST_LINKS {
                return Err(format!("{}: too many symbolic links", path.display()));
            }
            let target = fs::read_link(&at).map_err(|error| failed(&at, error))?;
            at.pop();
            pending.extend(parts(&target));
            continue;
        }
        check_owner(&at, &data)?;
    }
    Ok(at)
}

/// Refuses a file that users other than root can change. The error has the commands that fix it.
fn check_owner(path: &Path, data: &fs::Metadata) -> Result<()> {
    const STICKY: u32 = 0o1000;
    const GROUP_OR_OTHERS: u32 = 0o022;
    let shown = path.display();
    let owner = (data.uid() != 0).then(|| format!("chown root {shown}"));
    let mode = (data.mode() & GROUP_OR_OTHERS != 0).then(|| format!("chmod go-w {shown}"));
    let commands: Vec<String> = owner.into_iter().chain(mode).collect();
    if commands.is_empty() {
        return Ok(());
    }
    // A directory like /tmp is writable on purpose.
    let is_shared = data.is_dir() && data.mode() & STICKY != 0;
    let advice = if is_shared {
        "install the library somewhere else".to_owned()
    } else {
        format!("{}, or install the library as root (meson install)", commands.join(" && "))
    };
    Err(format!(
        "{shown} does not belong to root alone, and a user who can change it could do what the \
         daemon can: {advice}"
    ))
}

/// Whether a file is a shared object for this machine that has the driver's function and our mark.
fn is_ours(bytes: &[u8]) -> bool {
    const SHARED_OBJECT: u8 = 3;
    let class = if usize::BITS == 64 { 2 } else { 1 };
    let is_elf = bytes.starts_with(b"\x7fELF")
        && bytes.get(4) == Some(&class)
        && bytes.get(16) == Some(&SHARED_OBJECT);
    is_elf && contains(bytes, b"\0qemuSnapshotCreateXML\0") && contains(bytes, MARK)
}

/// Whether a file is the library for programs: it has the C API.
fn is_former(bytes: &[u8]) -> bool {
    contains(bytes, b"\0instantsnap_last_error\0")
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

/// The version in a library's file.
pub fn version(bytes: &[u8]) -> Option<String> {
    let after = |mark: &[u8]| {
        bytes.windows(mark.len()).position(|window| window == mark).map(|at| at + mark.len())
    };
    let at = after(MARK).or_else(|| after(FORMER_MARK))?;
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
        assert_eq!(version(b"\0xinstantsnap-preload/1.2.3-rc1\0y").as_deref(), Some("1.2.3-rc1"));
        assert_eq!(version(b"\0xinstantsnap-library/0.0.9:").as_deref(), Some("0.0.9"));
        assert_eq!(version(b"nothing"), None);
    }

    #[test]
    fn our_libraries_are_told_from_others() {
        let all = "/l/libinstantsnap.so.0:/a.so /l/libinstantsnap-preload.so:/libinstant.so";
        let kinds: Vec<_> = all.split([':', ' ']).map(Kind::of).collect();
        assert_eq!(kinds, [Some(Kind::Former), None, Some(Kind::Preload), None]);
        assert_eq!(Kind::of("/l/libinstantsnap_preload.so"), Some(Kind::Preload));
        assert_eq!(others(all), "/a.so:/libinstant.so");
    }

    fn refused(path: &str) -> String {
        check(&Root::open(Path::new("/")).unwrap(), Path::new(path)).unwrap_err()
    }

    #[test]
    fn a_path_that_the_loader_cannot_take_is_refused() {
        assert!(refused("lib.so").contains("absolute path"));
        assert!(refused("/a b/lib.so").contains("a space"));
        assert!(refused("/a:b/lib.so").contains("a colon"));
        assert!(refused("/nowhere/lib.so").contains("No such file"));
    }

    #[test]
    fn what_is_no_library_is_refused() {
        assert!(refused("/usr/bin").contains("is not a file"));
        assert!(refused("/usr/bin/env").contains("is not a libinstantsnap-preload.so"));
        assert!(refused("/etc/passwd").contains("is not a libinstantsnap-preload.so"));
    }

    #[test]
    fn a_directory_that_all_may_write_to_is_refused_sticky_or_not() {
        let directory = tempfile::tempdir_in("/tmp").unwrap();
        let library = directory.path().join(NAME);
        fs::write(&library, "").unwrap();
        let said = refused(library.to_str().unwrap());
        assert!(
            said.starts_with("/tmp does not belong to root alone")
                && said.contains("somewhere else"),
            "{said}"
        );
        assert!(!said.contains("chmod"), "{said}");
    }
}
