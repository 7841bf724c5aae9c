// SPDX-License-Identifier: LGPL-2.1-or-later

//! Compiles the C sources that the tests need (the tick guest, preload libraries) with `gcc`, once
//! per process, into the workspace's `target` directory.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use crate::run;

/// The workspace's root directory.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("tests/kit is two levels down")
}

/// The ELF file of the tick guest, `tests/guest/tick.c`.
pub fn tick_guest() -> &'static Path {
    static ELF: OnceLock<PathBuf> = OnceLock::new();
    ELF.get_or_init(|| {
        // No SSE, because the guest does not enable it. No loop patterns, because there is no
        // memset.
        let options = "-m32 -march=i686 -mno-sse -ffreestanding -fno-pic -fno-stack-protector \
                       -fno-asynchronous-unwind-tables -fno-tree-loop-distribute-patterns \
                       -fcf-protection=none -nostdlib -static -no-pie \
                       -Wl,-N,-Ttext=0x100000,--build-id=none,--no-warn-rwx-segments";
        gcc(&workspace().join("tests/guest/tick.c"), "tick.elf", options)
    })
}

/// Compiles `source` to `<output>` in the run's directory, unless another test of this run has done
/// so. Outside a run it compiles to `target/testkit`. Returns the path.
///
/// Other test processes can do the same at the same time. Each compiles to a name of its own, and
/// the rename makes the complete file visible.
pub fn gcc(source: &Path, output: &str, options: &str) -> PathBuf {
    let run = run::directory();
    let whole = run.as_ref().map(|run| run.join(output)).filter(|file| file.exists());
    if let Some(file) = whole {
        return file;
    }
    let directory = run.unwrap_or_else(|| workspace().join("target/testkit"));
    std::fs::create_dir_all(&directory).expect("target/testkit cannot be created");
    let own = directory.join(format!("{output}.{}", std::process::id()));
    let result = Command::new("gcc")
        .args(["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror"])
        .args(options.split_whitespace())
        .arg("-o")
        .args([&own, source])
        .output()
        .expect("gcc cannot be run");
    assert!(
        result.status.success(),
        "gcc {}: {}",
        source.display(),
        String::from_utf8_lossy(&result.stderr)
    );
    let whole = directory.join(output);
    std::fs::rename(&own, &whole).expect("the compiled file cannot be renamed");
    whole
}
