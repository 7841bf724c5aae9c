// SPDX-License-Identifier: LGPL-2.1-or-later

//! What a recovery notes in the snapshot's journal.

use crate::error::{Error, Result};
use crate::model::journal::{JournalFile, Line, ReadJournal};

/// Notes a line.
pub fn note(file: &mut JournalFile, line: &Line) -> Result<()> {
    file.append(line)
        .map_err(|error| Error::system("cannot write to the snapshot's journal", error))
}

/// Notes that the snapshot is being undone, before anything of it is changed: from here on it is
/// not complete, whatever a recovery that is interrupted itself leaves of it.
pub fn note_undo(journal: &ReadJournal, file: &mut JournalFile) -> Result<()> {
    if journal.is_undoing() { Ok(()) } else { note(file, &Line::Undoing) }
}
