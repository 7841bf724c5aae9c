//! The QEMU binaries to test with: the system's, and unpacked package trees of other versions.
//!
//! A tree is a Debian package of QEMU unpacked into a directory (`usr/bin/qemu-system-x86_64` and so
//! on). Trees are found in `INSTANTSNAP_QEMU_DIRS` (separated by colons), by default in
//! `target/qemu-10.0`. `INSTANTSNAP_TEST_QEMU=7.2` restricts the tests to that version.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use crate::compile::workspace;

/// One QEMU binary, with what it needs around it.
#[derive(Debug)]
pub struct Binary {
    /// Major and minor version: "7.2".
    pub name: String,
    /// Major, minor and micro version.
    pub version: (u32, u32, u32),
    /// The executable.
    pub path: PathBuf,
    /// Directories of firmware, for `-L`; none where the built-in ones are right.
    pub firmware: Vec<PathBuf>,
    /// Directory of QEMU's loadable modules, where the built-in one is wrong.
    pub modules: Option<PathBuf>,
}

impl Binary {
    /// All binaries to test with, the system's first; at least one.
    pub fn all() -> &'static [Binary] {
        static ALL: OnceLock<Vec<Binary>> = OnceLock::new();
        ALL.get_or_init(|| {
            let system = Binary::probe(PathBuf::from("qemu-system-x86_64"), None);
            let unpacked = trees()
                .into_iter()
                .filter_map(|tree| Binary::probe(tree.join("usr/bin/qemu-system-x86_64"), Some(&tree)));
            let mut all: Vec<Binary> = system.into_iter().chain(unpacked).collect();
            if let Ok(wanted) = std::env::var("INSTANTSNAP_TEST_QEMU") {
                all.retain(|binary| binary.name == wanted);
            }
            assert!(!all.is_empty(), "no QEMU to test with: install qemu-system-x86");
            all
        })
    }

    /// A command that runs this binary, with its firmware and modules but no other options.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.path);
        for directory in &self.firmware {
            command.arg("-L").arg(directory);
        }
        if let Some(modules) = &self.modules {
            command.env("QEMU_MODULE_DIR", modules);
        }
        command
    }

    fn probe(path: PathBuf, tree: Option<&Path>) -> Option<Binary> {
        let mut binary = Binary {
            name: String::new(),
            version: (0, 0, 0),
            path,
            // A tree has QEMU's own firmware; SeaBIOS is a package of its own.
            firmware: tree.map_or(Vec::new(), |tree| {
                ["usr/share/qemu", "usr/share/seabios"]
                    .iter()
                    .map(|directory| tree.join(directory))
                    .chain([PathBuf::from("/usr/share/seabios")])
                    .filter(|directory| directory.exists())
                    .collect()
            }),
            modules: tree.map(|tree| tree.join("usr/lib/x86_64-linux-gnu/qemu")),
        };
        let output = binary.command().arg("--version").output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout);
        let mut numbers = text
            .strip_prefix("QEMU emulator version ")?
            .split(|c: char| !c.is_ascii_digit())
            .map_while(|number| number.parse().ok());
        binary.version = (numbers.next()?, numbers.next()?, numbers.next().unwrap_or(0));
        binary.name = format!("{}.{}", binary.version.0, binary.version.1);
        Some(binary)
    }
}

fn trees() -> Vec<PathBuf> {
    match std::env::var_os("INSTANTSNAP_QEMU_DIRS") {
        Some(list) => std::env::split_paths(&list).collect(),
        None => vec![workspace().join("target/qemu-10.0")],
    }
}
