// SPDX-License-Identifier: LGPL-2.1-or-later

//! The snapshot's durable journal, to which the watchdog appends how far its undo is.

use std::ffi::CString;

use super::files::{self, Discard};
use crate::model::journal::Line;
use crate::own_file::KnownFile;
use crate::sys;

/// The durable journal, with its lines made in advance.
#[derive(Debug)]
pub struct DurableJournal {
    path: CString,
    id: (u64, u64),
    file: Discard,
    resumed: Vec<u8>,
    undoing: Vec<u8>,
    undone: Vec<u8>,
}

impl DurableJournal {
    pub fn new(file: &KnownFile) -> Option<DurableJournal> {
        let text = |line: Line| line.text().ok();
        Some(DurableJournal {
            path: files::path(&file.path)?,
            id: file.id,
            file: Discard::new(file)?,
            resumed: text(Line::Resumed)?,
            undoing: text(Line::Undoing)?,
            undone: text(Line::Undone)?,
        })
    }

    /// Notes that the guest runs again. It is not synced: after a loss of power there is no guest.
    pub fn resumed(&self) {
        sys::append(&self.path, self.id, &self.resumed, false);
    }

    /// Notes that the snapshot is being undone. Returns whether that is on disk.
    pub fn undoing(&self) -> bool {
        self.append(&self.undoing)
    }

    /// Notes a line that was made in advance. Returns whether it is on disk.
    pub fn append(&self, line: &[u8]) -> bool {
        sys::append(&self.path, self.id, line, true)
    }

    /// The snapshot is undone: removes the journal. If a storage hook may have made something, the
    /// journal stays, for a recovery that names it.
    pub fn end(&self, may_be_stored: bool) {
        match may_be_stored {
            true => drop(self.append(&self.undone)),
            false => self.file.run(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::path::PathBuf;

    use super::*;
    use crate::own_file::Undo;

    #[test]
    fn a_line_takes_the_place_of_half_a_line_and_only_in_the_file_itself() {
        let directory = tempfile::tempdir().unwrap();
        let path: PathBuf = directory.path().join("journal");
        let whole = format!("{}\n{}\n", "a".repeat(100), "b".repeat(2000));
        for half in [String::new(), "h".into(), "h".repeat(511), "h".repeat(5000)] {
            std::fs::write(&path, format!("{whole}{half}")).unwrap();
            let found = path.metadata().unwrap();
            let id = (found.dev(), found.ino());
            let known = |id| KnownFile { path: path.clone(), id, undo: Undo::Remove };
            let another = DurableJournal::new(&known((id.0, id.1 + 1))).unwrap();
            assert!(!another.undoing());
            let journal = DurableJournal::new(&known(id)).unwrap();
            journal.resumed();
            assert!(journal.undoing());
            let expected = format!("{whole}\"Resumed\"\n\"Undoing\"\n");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), expected);
            another.end(false);
            assert!(path.exists());
            journal.end(true);
            assert!(std::fs::read_to_string(&path).unwrap().ends_with("\"Undone\"\n"));
            journal.end(false);
            assert!(!path.exists());
        }
    }
}
