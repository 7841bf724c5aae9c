// SPDX-License-Identifier: LGPL-2.1-or-later

//! Names the files that a revert makes: IMAGE.SNAPSHOT-XXXXXX.revert.

use std::ffi::OsStr;
use std::io;
use std::path::Path;

use tempfile::NamedTempFile;

/// The suffix of their names.
const SUFFIX: &str = ".revert";

/// The number of random letters and digits in a name.
const RANDOM: usize = 6;

/// Makes a new file in a directory, named after an image and a snapshot. The file is removed when
/// it is dropped.
pub fn create_in(directory: &Path, image: &Path, snapshot: &str) -> io::Result<NamedTempFile> {
    // A name may be as long as NAME_MAX (255) already.
    let image = image.file_stem().unwrap_or(OsStr::new("disk")).to_string_lossy();
    let image: String = image.chars().take(40).collect();
    let snapshot: String = snapshot.chars().take(20).collect();
    tempfile::Builder::new()
        .prefix(&format!("{image}.{snapshot}-"))
        .rand_bytes(RANDOM)
        .suffix(SUFFIX)
        .tempfile_in(directory)
}

/// Whether a file has the name of a revert's file.
pub fn has_revert_name(file: &Path) -> bool {
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    let random =
        name.strip_suffix(SUFFIX).and_then(|name| name.rsplit_once('-')).map(|(_, random)| random);
    random.is_some_and(|random| {
        random.len() == RANDOM && random.chars().all(|c| c.is_ascii_alphanumeric())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_revert_makes_is_known_by_its_name_and_other_files_are_not() {
        let directory = tempfile::tempdir().unwrap();
        for (image, snapshot) in
            [("/images/a.qcow2", "s1"), ("/", ""), (&*"x".repeat(255), "a-b.c"), ("ä", "ß")]
        {
            let file = create_in(directory.path(), Path::new(image), snapshot).unwrap();
            assert!(has_revert_name(file.path()), "{}", file.path().display());
        }
        for name in ["a.s1", "a.revert", "a.s1-abcde.revert", "a.s1-abcde_.revert", "a.s1-abcdef"] {
            assert!(!has_revert_name(Path::new(name)), "{name}");
        }
    }
}
