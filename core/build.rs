// SPDX-License-Identifier: LGPL-2.1-or-later

//! Fixes the absolute paths of the programs that the library runs. A variable in the environment of
//! the build names such a path; otherwise it is the path of the program on this machine. The library
//! looks for a program without such a path when it needs it (`src/tool.rs`).

use std::env;
use std::path::Path;

const PROGRAMS: [(&str, &str); 3] = [
    ("qemu-img", "INSTANTSNAP_QEMU_IMG"),
    ("virsh", "INSTANTSNAP_VIRSH"),
    ("xmllint", "INSTANTSNAP_XMLLINT"),
];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    for (program, variable) in PROGRAMS {
        println!("cargo::rerun-if-env-changed={variable}");
        match env::var(variable).ok().filter(|path| !path.is_empty()) {
            // The compiler has the variable already.
            Some(path) if Path::new(&path).is_absolute() => {}
            Some(path) => println!("cargo::error={variable} is no absolute path: {path}"),
            None => {
                if let Some(path) = look_for(program) {
                    println!("cargo::rustc-env={variable}={path}");
                }
            }
        }
    }
}

/// Where a program is on this machine, if the library is for this kind of machine.
fn look_for(program: &str) -> Option<String> {
    let is_native = env::var_os("HOST") == env::var_os("TARGET");
    let directories = ["/usr/bin", "/bin", "/usr/sbin", "/sbin"].iter().filter(|_| is_native);
    directories
        .map(|directory| format!("{directory}/{program}"))
        .find(|path| Path::new(path).is_file())
}
