// SPDX-License-Identifier: LGPL-2.1-or-later

//! Recovers a guest whose snapshot was interrupted: both the process that took it and its watchdog
//! were killed, or the host lost its power.
//!
//! The snapshot's durable journal (`model/journal.rs`) says what was going to be made, and how far
//! the snapshot was. What happened after its last line is found out by asking QEMU, or, if QEMU has
//! ended, from the files. A snapshot that is proved to be complete is finished (`finish.rs`). Else
//! it is undone, with QEMU (`online.rs`) or without (`offline.rs`). What cannot be proved is left
//! as it is, and named.
//!
//! A recovery holds the name of the snapshot. The snapshot's process and its watchdog hold the same
//! lock as long as one of them is alive, so a recovery and a live snapshot exclude each other, in
//! whichever namespaces they are. A recovery that is interrupted itself can be repeated.

mod files;
mod finish;
mod offline;
mod online;
mod report;

use std::path::Path;
use std::time::Duration;

use self::report::Report;
pub use self::report::{Action, Recovered, What};
use crate::backend::{Connector, Guest};
use crate::deadline::Deadline;
use crate::error::{Code, Error, Result, fail};
use crate::migration::Settings;
use crate::model::journal::ReadJournal;
use crate::model::{Reservation, Store};
use crate::sys;

/// A process that was killed ends in this time, even if it was writing to a busy disk.
const EXIT_TIMEOUT: Duration = Duration::from_secs(5);
/// The same before another operation, which a snapshot that is under way must not delay for long.
const SHORT_EXIT_TIMEOUT: Duration = Duration::from_millis(500);

/// Recovers a guest whose QEMU runs. It is an error if another operation holds the guest.
pub fn recover(connector: &dyn Connector) -> Result<Vec<Recovered>> {
    let mut guest = connector.begin()?;
    let guest = &mut *guest;
    let mut found = Vec::new();
    if let Some(store) = connector.store() {
        for name in store.journals()? {
            let Some(reservation) = claim(store, &name, EXIT_TIMEOUT)? else {
                return Err(alive(&name));
            };
            found.extend(recover_one(store, &reservation, Some(guest))?);
        }
    }
    // An earlier version, or libvirt's backend, keeps no journal.
    if Settings::recover(guest)? {
        let mut report = Report::new("");
        report.undone(What::Settings, "migration", "QEMU has the settings of before the snapshot");
        found.extend(report.found);
    }
    Ok(found)
}

/// Recovers the guest of a state directory whose QEMU has ended.
pub fn recover_offline(state_dir: &Path) -> Result<Vec<Recovered>> {
    let store = Store::open(state_dir)?;
    let mut found = Vec::new();
    for name in store.journals()? {
        let Some(reservation) = claim(&store, &name, EXIT_TIMEOUT)? else {
            return Err(alive(&name));
        };
        found.extend(recover_one(&store, &reservation, None)?);
    }
    Ok(found)
}

/// Holds the name of a snapshot. `None` if its process or its watchdog is still alive after
/// `patience`.
fn claim(store: &Store, name: &str, patience: Duration) -> Result<Option<Reservation>> {
    let deadline = Deadline::after(patience);
    loop {
        match store.claim(name)? {
            // A process that was killed needs a moment to end.
            None if deadline.left().is_some() => std::thread::sleep(Duration::from_millis(20)),
            claimed => return Ok(claimed),
        }
    }
}

/// The report of a recovery as JSON.
pub fn recovery_report(found: &[Recovered]) -> String {
    serde_json::json!(found).to_string()
}

fn alive(name: &str) -> Error {
    Error::new(
        Code::OperationInvalid,
        format!(
            "the snapshot '{name}' is being taken or undone: its process, its watchdog, or a child \
             that its process has forked is alive; wait for it to end"
        ),
    )
}

/// Recovers the guest before an operation, if a snapshot of it was interrupted. Returns an error if
/// something is left that has to be decided on. A snapshot that is under way is left alone.
pub fn before_operation(connector: &dyn Connector) -> Result<()> {
    let Some(store) = connector.store() else { return Ok(()) };
    let names = store.journals()?;
    if names.is_empty() {
        return Ok(());
    }
    let mut begun = None;
    for name in names {
        let Some(reservation) = claim(store, &name, SHORT_EXIT_TIMEOUT)? else { continue };
        let guest = match &mut begun {
            Some(guest) => guest,
            None => begun.insert(connector.begin()?),
        };
        let found = recover_one(store, &reservation, Some(&mut **guest))?;
        if let Some(left) = found.iter().find(|found| found.blocks) {
            fail!(
                OperationInvalid,
                "the snapshot '{name}' of this guest was interrupted, and something is left of it: \
                 {left}; when that is settled, call instantsnap_recover(), or remove '{}'",
                store.journal_path(&name).display()
            );
        }
    }
    Ok(())
}

/// Recovers what is left of one snapshot, whose name is held. Without a `guest`, its QEMU must have
/// ended.
fn recover_one(
    store: &Store,
    reservation: &Reservation,
    guest: Option<&mut dyn Guest>,
) -> Result<Vec<Recovered>> {
    let name = &reservation.name;
    let path = store.journal_path(name);
    let mut report = Report::new(name);
    let journal = match store.read_journal(name)? {
        // The watchdog has removed it meanwhile.
        None => return Ok(Vec::new()),
        Some(Ok(journal)) => journal,
        Some(Err(why)) => {
            report.undecided(
                What::Snapshot,
                name,
                format!("its journal '{}' {why}", path.display()),
            );
            return Ok(report.found);
        }
    };
    match (qemu(&journal, guest.as_deref()), guest) {
        (Qemu::Another, _) => {
            let why = "its QEMU still runs, and is not the one of this guest: open that guest, and \
                       recover it";
            report.undecided(What::Snapshot, name, why);
        }
        (Qemu::Unknown, _) => {
            let why = "it cannot be seen from here whether this QEMU is the one of the snapshot, \
                       or was started since: recover the guest where QEMU's process can be seen";
            report.undecided(What::Snapshot, name, why);
        }
        (Qemu::Same, Some(guest)) => {
            if !finish::finish(store, &journal, reservation, Some(guest), &mut report)? {
                online::undo(guest, &journal, &mut report)?;
            }
        }
        (Qemu::Same | Qemu::Ended, _) => {
            if !finish::finish(store, &journal, reservation, None, &mut report)? {
                offline::undo(store, &journal, &mut report)?;
            }
        }
    }
    if report.is_settled() {
        sys::remove_file(&path)
            .and_then(|()| sys::sync_parent(&path))
            .map_err(|error| Error::system(format!("cannot remove '{}'", path.display()), error))?;
    }
    Ok(report.found)
}

/// The QEMU of an interrupted snapshot.
enum Qemu {
    /// It is this guest's.
    Same,
    /// It runs, and is not this guest's.
    Another,
    /// This guest's QEMU may be another one, and its overlays may have data.
    Unknown,
    /// It has ended; or nothing is known of it, and locks on the images show whether it runs.
    Ended,
}

fn qemu(journal: &ReadJournal, guest: Option<&dyn Guest>) -> Qemu {
    let noted = journal.intent.planned.qemu.as_ref().map(|qemu| qemu.pid);
    match (journal.has_qemu_ended(), guest) {
        (Some(true), _) => Qemu::Ended,
        (Some(false), Some(guest)) if guest.pid() == noted => Qemu::Same,
        (Some(false), _) => Qemu::Another,
        // Either process cannot be seen from here.
        (None, Some(guest)) if guest.pid().is_none() || noted.is_none() => {
            if journal.may_have_switched() { Qemu::Unknown } else { Qemu::Same }
        }
        (None, Some(_)) => Qemu::Another,
        (None, None) => Qemu::Ended,
    }
}
