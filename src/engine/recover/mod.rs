// SPDX-License-Identifier: LGPL-2.1-or-later

//! Recovers a guest whose snapshot was interrupted: both the process that took it and its watchdog
//! were killed, or the host lost its power.
//!
//! The snapshot's durable journal (`model/journal.rs`) says what was going to be made, and how far
//! the snapshot was. What happened after its last line is found out by asking QEMU, or, if QEMU has
//! ended, from the files. A snapshot that is proved to be complete is finished (`finish.rs`). Else
//! it is undone, with QEMU (`online.rs`) or without (`offline.rs`). What cannot be proved is left
//! as it is, and named. A domain of libvirt has a way of its own (`domain.rs`), which asks libvirt
//! instead of QEMU.
//!
//! A recovery holds the name of the snapshot. The snapshot's process and its watchdog hold the same
//! lock as long as one of them is alive, so a recovery and a live snapshot exclude each other, in
//! whichever namespaces they are. A recovery that is interrupted itself can be repeated.

mod domain;
mod files;
mod finish;
mod needed;
mod note;
mod offline;
mod online;
mod report;
mod whose;

use std::path::Path;
use std::time::Duration;

use self::note::note;
use self::report::Report;
pub use self::report::{Action, Recovered, What};
pub use self::whose::Next;
use crate::backend::{Connector, Guest};
use crate::deadline::Deadline;
use crate::engine::page_server::arrival::check_arrived;
use crate::error::{Code, Error, Result, fail};
use crate::machine_log::Message;
use crate::migration::Settings;
use crate::model::journal::{JournalFile, Line, ReadJournal};
use crate::model::{Reservation, Store};
use crate::sys;

/// A process that was killed ends in this time, even if it was writing to a busy disk.
const EXIT_TIMEOUT: Duration = Duration::from_secs(5);
/// The same before another operation, which a snapshot that is under way must not delay for long.
const SHORT_EXIT_TIMEOUT: Duration = Duration::from_millis(500);

/// Recovers a guest. Its QEMU runs, unless it is a domain of libvirt. It is an error if another
/// operation holds the guest.
pub fn recover(connector: &dyn Connector) -> Result<Vec<Recovered>> {
    let mut guest = connector.begin_recovery()?;
    let guest = &mut *guest;
    if guest.has_qemu() {
        check_arrived(guest)?;
    }
    let mut found = Vec::new();
    if let Some(journals) = connector.journals()? {
        let store = &journals.store;
        for name in journals.names()? {
            if !journals.are_own()
                && let Some(Ok(journal)) = store.read_journal(&name)?
                && !whose::is_of(&journal, guest)?
            {
                found.extend(name_others(&name, &journal));
                continue;
            }
            found.extend(recover_named(store, &name, Some(guest))?);
        }
    }
    // An earlier version, or a caller without a directory for them, keeps no journal.
    if guest.has_qemu() && Settings::recover(guest)? {
        let mut report = Report::new("");
        report.undone(What::Settings, "migration", "QEMU has the settings of before the snapshot");
        found.extend(report.found);
    }
    Ok(found)
}

/// Names the snapshot of another guest of the same state directory.
fn name_others(name: &str, journal: &ReadJournal) -> Vec<Recovered> {
    let mut report = Report::new(name);
    let why = match (journal.other_host(), journal.has_qemu_ended()) {
        (Some(host), _) => format!("it is of another guest, on the host '{host}'"),
        (None, Some(true)) => "it is of another guest, whose QEMU has ended: recover that guest \
                               (instantsnap_recover_offline() recovers all of this state directory)"
            .into(),
        (None, _) => "it is of another guest: open that one, and recover it".into(),
    };
    report.left(What::Snapshot, name, why);
    report.found
}

/// Recovers the guest of a state directory whose QEMU has ended.
pub fn recover_offline(state_dir: &Path) -> Result<Vec<Recovered>> {
    let store = Store::open(state_dir)?;
    let mut found = Vec::new();
    for name in store.journals()? {
        found.extend(recover_named(&store, &name, None)?);
    }
    Ok(found)
}

/// Recovers what is left of one snapshot. It is an error if it is under way.
fn recover_named(
    store: &Store,
    name: &str,
    guest: Option<&mut dyn Guest>,
) -> Result<Vec<Recovered>> {
    if let Some(named) = name_other_host(store, name)? {
        return Ok(named);
    }
    let Some(reservation) = claim(store, name, EXIT_TIMEOUT)? else { return Err(alive(name)) };
    recover_one(store, &reservation, guest)
}

/// Names a snapshot that was taken on another host. `None` if it was not. The locks of that host
/// may not be seen from here, so none is taken.
fn name_other_host(store: &Store, name: &str) -> Result<Option<Vec<Recovered>>> {
    let Some(Ok(journal)) = store.read_journal(name)? else { return Ok(None) };
    let Some(host) = journal.other_host() else { return Ok(None) };
    let mut report = Report::new(name);
    let why = format!(
        "it was taken on another host ('{host}'), whose processes and locks cannot be seen from \
         here: recover the guest there; nothing was changed"
    );
    report.undecided(What::Snapshot, name, why);
    Ok(Some(report.found))
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

/// Recovers the guest before an operation, if a snapshot of it was interrupted, or one of another
/// guest that has made files which the operation uses. Returns an error if something is left that
/// has to be decided on. A snapshot that is under way is left alone, and so is any other one of
/// another guest.
pub fn before_operation(connector: &dyn Connector, next: Next) -> Result<()> {
    let Some(journals) = connector.journals()? else { return Ok(()) };
    let (store, names) = (&journals.store, journals.names()?);
    if names.is_empty() {
        return Ok(());
    }
    let mut begun = None;
    for name in names {
        let journal = match store.read_journal(&name)? {
            None => continue,
            Some(journal) => journal.ok(),
        };
        let guest = match &mut begun {
            Some(guest) => guest,
            None => match connector.begin_recovery() {
                Ok(guest) => begun.insert(guest),
                // The operation itself reports that another one holds the guest.
                Err(error) if error.code == Code::OperationInvalid => return Ok(()),
                Err(error) => return Err(error),
            },
        };
        // A journal that cannot be read may be this guest's.
        let is_own = journals.are_own()
            || journal.as_ref().map_or(Ok(true), |journal| whose::is_of(journal, &mut **guest))?;
        if !is_own && !journal.is_some_and(|journal| whose::touches(store, &journal, next)) {
            continue;
        }
        let guest: Option<&mut dyn Guest> = if is_own { Some(&mut **guest) } else { None };
        settle(store, &name, guest)?;
    }
    Ok(())
}

/// The same before a revert to a snapshot is prepared, for which no guest is opened.
pub fn before_revert(store: &Store, snapshot: &str) -> Result<()> {
    for name in store.journals()? {
        let touches = match store.read_journal(&name)? {
            None => continue,
            Some(Err(_)) => true,
            Some(Ok(journal)) => whose::touches(store, &journal, Next::Load(snapshot)),
        };
        if touches {
            settle(store, &name, None)?;
        }
    }
    Ok(())
}

/// Recovers one snapshot before an operation, unless it is under way.
fn settle(store: &Store, name: &str, guest: Option<&mut dyn Guest>) -> Result<()> {
    let found = match name_other_host(store, name)? {
        Some(found) => found,
        None => {
            let claimed = claim(store, name, SHORT_EXIT_TIMEOUT)?;
            let Some(reservation) = claimed else { return Ok(()) };
            recover_one(store, &reservation, guest)?
        }
    };
    if let Some(left) = found.iter().find(|found| found.blocks) {
        fail!(
            OperationInvalid,
            "the snapshot '{}' was interrupted, and something is left of it: {left}; when that is \
             settled, call instantsnap_recover(), or remove '{}'",
            left.snapshot,
            store.journal_path(name).display()
        );
    }
    // The operation's caller is not told.
    let is_repeated = store.journal_path(name).exists();
    for found in found.iter().filter(|found| !is_repeated || found.what != What::Storage) {
        Message::notice(&found.line()).send();
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
    if let Some(domain) = &journal.intent.planned.domain {
        report = Report::new(&domain.snapshot);
        domain::recover(store, reservation, &journal, domain, guest, &mut report)?;
        return end(&path, report);
    }
    if journal.is_undone() {
        name_storage(store, &journal, &mut report);
        return Ok(report.found);
    }
    match (qemu(&journal, guest.as_deref()), guest) {
        // Whatever its QEMU does now, the snapshot is complete.
        (Qemu::Another | Qemu::Unknown, _) if finish::is_recorded(store, &journal) => {
            finish::finish(store, &journal, reservation, None, &mut report)?;
        }
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
                let mut file = store.continue_journal(reservation)?;
                if online::undo(guest, store, &journal, &mut file, &mut report)? {
                    end_undo(store, &journal, &mut file, &mut report)?;
                }
            }
        }
        (Qemu::Same | Qemu::Ended, _) => {
            if !finish::finish(store, &journal, reservation, None, &mut report)? {
                let mut file = store.continue_journal(reservation)?;
                if offline::undo(store, &journal, &mut file, &mut report)? {
                    end_undo(store, &journal, &mut file, &mut report)?;
                }
            }
        }
    }
    end(&path, report)
}

/// Removes the journal, if it is needed no more.
fn end(journal: &Path, report: Report) -> Result<Vec<Recovered>> {
    if report.is_settled() && !report.keeps_journal() {
        let removed = sys::remove_file(journal).and_then(|()| sys::sync_parent(journal));
        removed.map_err(|error| {
            Error::system(format!("cannot remove '{}'", journal.display()), error)
        })?;
    }
    Ok(report.found)
}

/// Removes the snapshot's files, once its overlays are gone. Names what a storage hook may have
/// left.
fn end_undo(
    store: &Store,
    journal: &ReadJournal,
    file: &mut JournalFile,
    report: &mut Report,
) -> Result<()> {
    files::remove(journal, report);
    if journal.may_have_switched() {
        name_storage(store, journal, report);
    }
    if report.is_settled() && report.keeps_journal() {
        note(file, &Line::Undone)?;
    }
    Ok(())
}

/// Names what a storage hook may have left: the library cannot tell whether it has made its
/// snapshot.
fn name_storage(store: &Store, journal: &ReadJournal, report: &mut Report) {
    let path = store.journal_path(&journal.intent.snapshot);
    for disk in &journal.intent.planned.manual {
        let why = format!(
            "the storage hook may have made a snapshot of it: look there, remove that snapshot, \
             and then remove '{}'",
            path.display()
        );
        report.kept(What::Storage, disk, why);
    }
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
