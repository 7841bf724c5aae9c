// SPDX-License-Identifier: LGPL-2.1-or-later

//! The QEMU binaries to test with: the system's, and other versions in unpacked packages.
//!
//! A tree is a Debian package of QEMU unpacked into a directory (`usr/bin/qemu-system-x86_64` and
//! so on). Trees are found in `INSTANTSNAP_QEMU_DIRS` (separated by colons; none where it is
//! empty), by default in `target/qemu-10.0`. `INSTANTSNAP_TEST_QEMU=7.2` restricts the tests to
//! that version.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use crate::compile::workspace;
use crate::{program, run, thorough};

/// One QEMU binary, and the files that it needs.
#[derive(Debug)]
pub struct Binary {
    /// Major and minor version: "7.2".
    pub name: String,
    /// Major, minor and micro version.
    pub version: (u32, u32, u32),
    /// The executable.
    pub path: PathBuf,
    /// Directories of firmware, for `-L`; empty where the built-in ones are right.
    pub firmware: Vec<PathBuf>,
    /// Directory of QEMU's loadable modules, where the built-in one is not right.
    pub modules: Option<PathBuf>,
}

impl Binary {
    /// All binaries to test with, the system's first. There is at least one.
    pub fn all() -> &'static [Binary] {
        static ALL: OnceLock<Vec<Binary>> = OnceLock::new();
        ALL.get_or_init(|| {
            let system = Binary::probe(PathBuf::from("qemu-system-x86_64"), None);
            let unpacked = trees().into_iter().filter_map(|tree| {
                Binary::probe(tree.join("usr/bin/qemu-system-x86_64"), Some(&tree))
            });
            let mut all: Vec<Binary> = system.into_iter().chain(unpacked).collect();
            if let Ok(wanted) = std::env::var("INSTANTSNAP_TEST_QEMU") {
                all.retain(|binary| binary.name == wanted);
            }
            assert!(!all.is_empty(), "no QEMU to test with: install qemu-system-x86");
            all
        })
    }

    /// The binaries for tests of behaviour that can differ between QEMUs: one, or all in the long
    /// run. The tests are divided among all binaries by name, so that each test has the same one in
    /// every run.
    pub fn some() -> &'static [Binary] {
        let all = Binary::all();
        if thorough() {
            return all;
        }
        let name = program::current().unwrap_or_default();
        let sum = name.bytes().fold(0, |sum: usize, byte| sum + usize::from(byte));
        &all[sum % all.len()..][..1]
    }

    /// The binaries for tests of the library's own behaviour: the first, or all in the long run.
    pub fn any() -> &'static [Binary] {
        if thorough() { Binary::all() } else { &Binary::all()[..1] }
    }

    /// The binaries for tests under libvirt: the system's, which its libvirt is made for.
    pub fn under_libvirt() -> &'static [Binary] {
        &Binary::all()[..1]
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

    /// A program that libvirt can run: this binary, or a script that adds its firmware and modules.
    pub fn emulator(&self) -> PathBuf {
        let modules = match &self.modules {
            Some(modules) => modules,
            None => return in_path(&self.path),
        };
        let firmware: String = self
            .firmware
            .iter()
            .map(|directory| format!(" -L '{}'", directory.display()))
            .collect();
        let text = format!(
            "#!/bin/sh\nQEMU_MODULE_DIR='{}'\nexport QEMU_MODULE_DIR\nexec '{}'{firmware} \"$@\"\n",
            self.own_modules(modules).display(),
            self.path.display()
        );
        let script = workspace().join("target/testkit").join(format!("qemu-{}", self.name));
        // The script is written once: libvirt compares its time stamps to know whether the QEMU is
        // the same.
        if std::fs::read_to_string(&script).ok().as_ref() != Some(&text) {
            make_script(&script, &text);
        }
        script
    }

    /// A directory with the tree's modules, and an empty file in place of each module that only the
    /// system's QEMU has. libvirt asks QEMU for all types, QEMU then loads all modules, and it
    /// would abort at a module of another version.
    fn own_modules(&self, modules: &Path) -> PathBuf {
        let own = workspace().join("target/testkit").join(format!("qemu-{}.modules", self.name));
        std::fs::create_dir_all(&own).expect("target/testkit cannot be created");
        let names = |directory: &Path| {
            std::fs::read_dir(directory).into_iter().flatten().flatten().map(|e| e.file_name())
        };
        // Another process can do the same at the same time; its files are equal.
        for name in names(modules) {
            let _ = std::os::unix::fs::symlink(modules.join(&name), own.join(&name));
        }
        for name in names(Path::new("/usr/lib/x86_64-linux-gnu/qemu")) {
            let _ = std::fs::File::create_new(own.join(&name));
        }
        own
    }

    fn probe(path: PathBuf, tree: Option<&Path>) -> Option<Binary> {
        let mut binary = Binary {
            name: String::new(),
            version: (0, 0, 0),
            path,
            // A tree has QEMU's own firmware, and SeaBIOS is in another package.
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
        let text = run::once(&format!("version of {}", binary.path.display()), || {
            let output = binary.command().arg("--version").output();
            output.map_or(String::new(), |output| String::from_utf8_lossy(&output.stdout).into())
        });
        let mut numbers = text
            .strip_prefix("QEMU emulator version ")?
            .split(|c: char| !c.is_ascii_digit())
            .map_while(|number| number.parse().ok());
        binary.version = (numbers.next()?, numbers.next()?, numbers.next().unwrap_or(0));
        binary.name = format!("{}.{}", binary.version.0, binary.version.1);
        Some(binary)
    }
}

fn in_path(program: &Path) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places = std::env::split_paths(&path).map(|directory| directory.join(program));
    places.find(|place| place.exists()).unwrap_or_else(|| program.to_owned())
}

/// Writes the script and renames it into place, because another process can do the same at the same
/// time.
fn make_script(script: &Path, text: &str) {
    let directory = script.parent().expect("a directory");
    std::fs::create_dir_all(directory).expect("target/testkit cannot be created");
    let own = script.with_extension(std::process::id().to_string());
    std::fs::write(&own, text)
        .and_then(|()| std::fs::set_permissions(&own, std::fs::Permissions::from_mode(0o755)))
        .and_then(|()| std::fs::rename(&own, script))
        .unwrap_or_else(|error| panic!("{}: {error}", script.display()));
}

fn trees() -> Vec<PathBuf> {
    match std::env::var_os("INSTANTSNAP_QEMU_DIRS") {
        Some(list) => std::env::split_paths(&list).filter(|tree| tree.is_absolute()).collect(),
        None => vec![workspace().join("target/qemu-10.0")],
    }
}
