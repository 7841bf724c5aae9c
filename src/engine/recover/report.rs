// SPDX-License-Identifier: LGPL-2.1-or-later

//! The report of a recovery: what was found, and what was done with it.

use std::fmt;

use serde::Serialize;

/// What a recovery did with one thing that it found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// It was finished.
    Finished,
    /// It was undone.
    Undone,
    /// It was left as it is.
    Left,
}

/// The kind of a thing that a recovery found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum What {
    /// A snapshot as a whole, by its journal.
    Snapshot,
    /// The guest's run state.
    Guest,
    /// QEMU's migration settings.
    Settings,
    /// An overlay.
    Overlay,
    /// A memory image.
    Memory,
    /// A copy of UEFI variables.
    Firmware,
    /// A disk that was left to a storage hook.
    Storage,
}

/// One thing that a recovery found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Recovered {
    /// The name of the snapshot that was interrupted; empty if it is not known.
    pub snapshot: String,
    /// The kind of the thing.
    pub what: What,
    /// The thing: a path, a disk's name, or a word.
    pub object: String,
    /// What was done with it.
    pub action: Action,
    /// Why.
    pub why: String,
    /// Someone must decide what to do with it before the guest's next operation.
    pub blocks: bool,
}

impl Action {
    fn word(self) -> &'static str {
        match self {
            Action::Finished => "finished",
            Action::Undone => "undone",
            Action::Left => "left",
        }
    }
}

impl Recovered {
    /// One line for a log.
    pub fn line(&self) -> String {
        format!("interrupted snapshot '{}': {}: {self}", self.snapshot, self.action.word())
    }
}

impl fmt::Display for Recovered {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "'{}': {}", self.object, self.why)
    }
}

/// What the recovery of one snapshot has found so far.
#[derive(Debug)]
pub struct Report {
    snapshot: String,
    pub found: Vec<Recovered>,
    /// Something is left that only a person can settle, and that does not concern later operations.
    keeps_journal: bool,
}

impl Report {
    pub fn new(snapshot: &str) -> Report {
        Report { snapshot: snapshot.into(), found: Vec::new(), keeps_journal: false }
    }

    fn add(&mut self, what: What, object: &str, action: Action, why: String, blocks: bool) {
        let (snapshot, object) = (self.snapshot.clone(), object.into());
        self.found.push(Recovered { snapshot, what, object, action, why, blocks });
    }

    pub fn finished(&mut self, what: What, object: &str, why: &str) {
        self.add(what, object, Action::Finished, why.into(), false);
    }

    pub fn undone(&mut self, what: What, object: &str, why: &str) {
        self.add(what, object, Action::Undone, why.into(), false);
    }

    /// Something is left that does not concern later operations.
    pub fn left(&mut self, what: What, object: &str, why: impl Into<String>) {
        self.add(what, object, Action::Left, why.into(), false);
    }

    /// Something is left that does not concern later operations. The journal stays, so that each
    /// recovery names it.
    pub fn kept(&mut self, what: What, object: &str, why: impl Into<String>) {
        self.left(what, object, why);
        self.keeps_journal = true;
    }

    /// Something is left that has to be decided on. The journal stays.
    pub fn undecided(&mut self, what: What, object: &str, why: impl Into<String>) {
        self.add(what, object, Action::Left, why.into(), true);
    }

    /// Whether nothing is left that has to be decided on.
    pub fn is_settled(&self) -> bool {
        !self.found.iter().any(|found| found.blocks)
    }

    /// Whether the journal stays although all is settled that can be settled here.
    pub fn keeps_journal(&self) -> bool {
        self.keeps_journal
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_neither_blocks_nor_lets_the_journal_go() {
        let mut report = Report::new("s");
        report.undone(What::Overlay, "/o", "it is removed");
        assert!(report.is_settled() && !report.keeps_journal());
        report.kept(What::Storage, "vdb", "look there");
        assert!(report.is_settled() && report.keeps_journal());
        let lines: Vec<_> = report.found.iter().map(Recovered::line).collect();
        assert_eq!(
            lines,
            [
                "interrupted snapshot 's': undone: '/o': it is removed",
                "interrupted snapshot 's': left: 'vdb': look there"
            ]
        );
        report.undecided(What::Memory, "/m", "it cannot be removed");
        assert!(!report.is_settled());
    }
}
