// SPDX-License-Identifier: LGPL-2.1-or-later

//! Checks that a copy of UEFI variables is the one that was recorded. A record alone is no reason
//! to remove a file, or to use it.

use std::io::{self, Read};
use std::path::Path;

use super::record::RecordedNvram;
use crate::sys;

/// No firmware has more variables than this.
pub const LARGEST: u64 = 256 << 20;

/// The path of the copy of a drive's variables, beside the memory image.
pub fn copy_path(memory_file: &str, drive: &str) -> String {
    format!("{memory_file}.{}.nvram", drive.replace('/', "_"))
}

/// The fingerprint of a copy's content: its length, and a checksum (FNV-1a).
pub fn content_id(content: &[u8]) -> String {
    let sum = content.iter().fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{}-{sum:016x}", content.len())
}

/// The state of a recorded copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// It is as it was recorded.
    Whole,
    /// It does not exist.
    Missing,
    /// It is another file, or has another content.
    Another,
}

impl RecordedNvram {
    /// Reads the copy, and compares it.
    pub fn compare(&self, memory_file: &str) -> io::Result<Found> {
        let path = Path::new(&self.copy);
        let metadata = match path.symlink_metadata() {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Missing),
            Err(error) => return Err(error),
        };
        if self.copy != copy_path(memory_file, &self.name)
            || !metadata.is_file()
            || metadata.len() > LARGEST
        {
            return Ok(Found::Another);
        }
        // Earlier versions did not record the content.
        let Some(content) = &self.content else { return Ok(Found::Whole) };
        let mut now = Vec::new();
        sys::open_file(path)?.take(LARGEST).read_to_end(&mut now)?;
        Ok(if content_id(&now) == *content { Found::Whole } else { Found::Another })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_known_by_its_name_and_its_content() {
        let directory = tempfile::tempdir().unwrap();
        let memory = directory.path().join("s.mem").display().to_string();
        let copy = copy_path(&memory, "a/b");
        assert!(copy.ends_with("s.mem.a_b.nvram"));
        let recorded = RecordedNvram {
            name: "a/b".into(),
            copy: copy.clone(),
            original: "/nowhere".into(),
            format: "raw".into(),
            content: Some(content_id(b"variables")),
        };
        let compare = |recorded: &RecordedNvram| recorded.compare(&memory).unwrap();
        assert_eq!(compare(&recorded), Found::Missing);
        std::fs::write(&copy, "variables").unwrap();
        assert_eq!(compare(&recorded), Found::Whole);
        std::fs::write(&copy, "variablez").unwrap();
        assert_eq!(compare(&recorded), Found::Another);
        assert_eq!(compare(&RecordedNvram { content: None, ..recorded.clone() }), Found::Whole);
        let precious = directory.path().join("precious").display().to_string();
        std::fs::write(&precious, "variables").unwrap();
        assert_eq!(
            compare(&RecordedNvram { copy: precious.clone(), ..recorded.clone() }),
            Found::Another
        );
        std::fs::remove_file(&copy).unwrap();
        std::os::unix::fs::symlink(&precious, &copy).unwrap();
        assert_eq!(compare(&recorded), Found::Another);
    }
}
