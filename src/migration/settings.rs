// SPDX-License-Identifier: LGPL-2.1-or-later

//! QEMU's migration settings: reads them, sets those of a snapshot, locks other clients out, and
//! puts the settings back.

use serde_json::{Map, Value, json};

use super::lazy::{Arrival, Lazy};
use super::leftover::Leftover;
use super::names::{BACKGROUND, FD_NAME, LAZY_LOCK, LOCK, POST_COPY, RECORD, TLS};
use crate::backend::{DEFAULT_TIMEOUT, Guest};
use crate::deadline::Deadline;
use crate::error::{Code, Error, Result, fail};
use crate::monitor::Failure;
use crate::monitor::commands;

/// The capabilities that QEMU refuses together with TLS credentials.
const EXCLUDE_TLS: [&str; 2] = ["mapped-ram", "zero-copy-send"];

/// How memory is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The guest runs on: a background snapshot.
    Background,
    /// The guest is paused throughout: a non-live migration.
    Paused,
}

/// QEMU's migration capabilities and parameters as they were found: they are put back at the end.
#[derive(Clone, Debug)]
pub struct Settings {
    pub(super) capabilities: Vec<(String, bool)>,
    pub(super) parameters: Map<String, Value>,
    /// Other clients are locked out while our settings are in force.
    locked: bool,
    /// The watchdog: the process that puts them back if this one cannot.
    pub watchdog: Option<u32>,
}

impl Settings {
    /// Reads the settings, for a snapshot. Where an earlier snapshot, whose process and watchdog
    /// were killed, has left its settings, those before it are put back first.
    pub fn read(guest: &mut dyn Guest) -> Result<Settings> {
        let mut settings = Settings::query(guest)?;
        if let Some(leftover) = settings.leftover(guest) {
            leftover.check_maker()?;
            Settings::put_leftover_back(leftover, guest)?;
            settings = Settings::query(guest)?;
        }
        settings.locked = settings.parameters.contains_key(TLS);
        Ok(settings)
    }

    /// Puts the settings back that an earlier snapshot, which was killed, has left. Returns whether
    /// there were any.
    pub fn recover(guest: &mut dyn Guest) -> Result<bool> {
        let Some(leftover) = Settings::query(guest)?.leftover(guest) else { return Ok(false) };
        leftover.check_maker()?;
        Settings::put_leftover_back(leftover, guest)?;
        Ok(true)
    }

    /// Puts the settings back that a load has left whose memory followed. The caller has proof that
    /// all of that is in: so the process that made the load needs them no more.
    pub fn recover_arrived(guest: &mut dyn Guest) -> Result<()> {
        let leftover = Settings::query(guest)?.leftover(guest);
        match leftover.filter(|leftover| leftover.lazy.is_some()) {
            Some(leftover) => Settings::put_parts_back(leftover, guest),
            None => Ok(()),
        }
    }

    /// The load whose memory follows, or has followed and left its settings.
    pub fn lazy(guest: &mut dyn Guest) -> Result<Option<Lazy>> {
        let parameters =
            commands::query_migrate_parameters(guest, Deadline::after(DEFAULT_TIMEOUT))?;
        Ok(Leftover::find(&[], &parameters, false).and_then(|leftover| leftover.lazy))
    }

    /// Prepares QEMU for memory that follows, and records that. Other clients are not locked out
    /// yet: QEMU would take that for its own credentials.
    pub fn apply_lazy(&self, guest: &mut dyn Guest, lazy: &Lazy) -> Result<()> {
        if !self.capabilities.iter().any(|(name, _)| name == POST_COPY) {
            fail!(
                ArgumentUnsupported,
                "this QEMU has no migration capability '{POST_COPY}': load all of the memory first"
            );
        }
        self.switch_off(guest, Mode::Paused, |name| EXCLUDE_TLS.contains(&name))?;
        let changed = self.lazy_parameters();
        let names = changed.keys().map(String::as_str);
        let record =
            Leftover::describe(&self.capabilities, &self.parameters, names, None, Some(lazy));
        let own = [(RECORD, json!(record)), (TLS, json!(""))];
        let own = own.into_iter().filter(|(name, _)| changed.contains_key(*name));
        let own = own.map(|(name, value)| (name.to_owned(), value)).collect();
        commands::migrate_set_parameters(guest, own, Deadline::after(DEFAULT_TIMEOUT))?;
        self.switch_off(guest, Mode::Paused, |_| true)?;
        let on = [(POST_COPY.to_owned(), true)];
        set_capabilities(guest, &on, Deadline::after(DEFAULT_TIMEOUT)).map_err(explain_lazy)
    }

    /// Puts all settings back that [`Settings::apply_lazy`] can have changed.
    pub fn restore_lazy(&self, guest: &mut dyn Guest) -> Result<()> {
        self.put_back(guest, self.lazy_parameters())
    }

    /// The parameters that [`Settings::apply_lazy`] changes, as they were.
    fn lazy_parameters(&self) -> Map<String, Value> {
        let names = [TLS, RECORD].into_iter().filter(|name| self.parameters.contains_key(*name));
        names.map(|name| (name.to_owned(), self.parameters[name].clone())).collect()
    }

    /// Locks other clients' migrations out while memory follows, or lets QEMU's own go on.
    pub fn lock_lazy(guest: &mut dyn Guest, locked: bool) -> Result<()> {
        let credentials = json!(if locked { LAZY_LOCK } else { "" });
        let parameters = Map::from_iter([(TLS.to_owned(), credentials)]);
        commands::migrate_set_parameters(guest, parameters, Deadline::after(DEFAULT_TIMEOUT))
    }

    /// Puts the settings back that an earlier snapshot has left changed. Refuses those of a load
    /// whose memory follows, or may: what QEMU says of that can be of another client's migration.
    fn put_leftover_back(leftover: Leftover, guest: &mut dyn Guest) -> Result<()> {
        match &leftover.lazy {
            Some(lazy) if Arrival::ask(guest)? != Arrival::NotBegun => Err(lazy.still_coming()),
            _ => Settings::put_parts_back(leftover, guest),
        }
    }

    fn put_parts_back(leftover: Leftover, guest: &mut dyn Guest) -> Result<()> {
        // QEMU may still have the snapshot's pipe; otherwise it refuses this.
        let _ = commands::closefd(guest, FD_NAME, Deadline::after(DEFAULT_TIMEOUT));
        let Leftover { capabilities, parameters, lazy, .. } = leftover;
        let settings =
            Settings { capabilities, parameters: Map::new(), locked: false, watchdog: None };
        // The record of a load stays as long as anything of it is left: it is also the lock.
        let first = match lazy {
            Some(_) => settings.put_capabilities_back(guest, |name| !EXCLUDE_TLS.contains(&name)),
            None => Ok(Ok(())),
        };
        let first = first.and_then(|put| {
            put.map_err(|failure| failure.into_error("cannot put the migration capabilities back"))
        });
        first.and_then(|()| settings.put_back(guest, parameters)).map_err(|error| {
            Error::new(
                error.code,
                format!(
                    "cannot put back the migration settings that an earlier snapshot of this \
                     guest, which was killed, has left in QEMU: {}",
                    error.message
                ),
            )
        })
    }

    /// Whether QEMU has the settings of a snapshot that is under way, or was killed.
    pub fn has_leftover(guest: &mut dyn Guest) -> Result<bool> {
        Ok(Settings::query(guest)?.leftover(guest).is_some())
    }

    /// What an earlier snapshot, which was killed, has left in these settings.
    fn leftover(&self, guest: &dyn Guest) -> Option<Leftover> {
        Leftover::find(
            &self.capabilities,
            &self.parameters,
            guest.capabilities().never_sets_background_snapshot,
        )
    }

    /// Reads the settings as they are now. If they are applied for loading memory, no other client
    /// is locked out, because QEMU waits for this migration already.
    pub fn query(guest: &mut dyn Guest) -> Result<Settings> {
        let capabilities =
            commands::query_migrate_capabilities(guest, Deadline::after(DEFAULT_TIMEOUT))?;
        let parameters =
            commands::query_migrate_parameters(guest, Deadline::after(DEFAULT_TIMEOUT))?;
        Ok(Settings { capabilities, parameters, locked: false, watchdog: None })
    }

    /// Refuses a QEMU that does not support background snapshots.
    pub fn require_background(&self) -> Result<()> {
        if !self.capabilities.iter().any(|(name, _)| name == BACKGROUND) {
            fail!(
                ArgumentUnsupported,
                "migration option '{BACKGROUND}' is not supported by this QEMU binary"
            );
        }
        Ok(())
    }

    /// Prepares QEMU for `mode`. Switches off everything that changes the stream or excludes a
    /// background snapshot: the stream goes through one pipe, in its simplest form. Settings that
    /// were made for the guest's next migration are put back before that.
    ///
    /// As long as these settings are in force, another client's save or dump would be a background
    /// snapshot too, and before QEMU 9 the guest would run on without that client's knowing. So
    /// other clients are locked out until [`Settings::restore`], except for the moment in which our
    /// own migration begins ([`Settings::unlock`], [`Settings::lock`]).
    pub fn apply(&self, guest: &mut dyn Guest, mode: Mode) -> Result<()> {
        // While these are on, QEMU can refuse to set any parameter. It had accepted the parameters
        // that are set before these were on.
        self.switch_off(guest, mode, |name| EXCLUDE_TLS.contains(&name))?;
        // Then the settings are recorded where the next snapshot finds them if this process is
        // killed.
        let mut parameters = self.parameters_for(mode);
        if let Some(record) = parameters.remove_entry(RECORD) {
            commands::migrate_set_parameters(
                guest,
                Map::from_iter([record]),
                Deadline::after(DEFAULT_TIMEOUT),
            )?;
        }
        self.switch_off(guest, mode, |_| true)?;
        if !parameters.is_empty() {
            commands::migrate_set_parameters(guest, parameters, Deadline::after(DEFAULT_TIMEOUT))?;
        }
        if mode == Mode::Background {
            let background = [(BACKGROUND.into(), true)];
            set_capabilities(guest, &background, Deadline::after(DEFAULT_TIMEOUT))
                .map_err(|failure| explain(failure, mode))?;
        }
        Ok(())
    }

    fn switch_off(
        &self,
        guest: &mut dyn Guest,
        mode: Mode,
        which: impl Fn(&str) -> bool,
    ) -> Result<()> {
        let on = self.changeable().filter(|(name, state)| *state && which(name));
        let off: Vec<_> = on.map(|(name, _)| (name.clone(), false)).collect();
        set_capabilities(guest, &off, Deadline::after(DEFAULT_TIMEOUT))
            .map_err(|failure| explain(failure, mode))
    }

    /// Names another watchdog in the record of the settings.
    pub fn watch(&self, guest: &mut dyn Guest, mode: Mode, watchdog: Option<u32>) -> Result<()> {
        let watched = Settings { watchdog, ..self.clone() };
        match watched.parameters_for(mode).remove_entry(RECORD) {
            Some(record) => commands::migrate_set_parameters(
                guest,
                Map::from_iter([record]),
                Deadline::after(DEFAULT_TIMEOUT),
            ),
            None => Ok(()),
        }
    }

    /// Lets the next migration begin: our own.
    pub fn unlock(&self, guest: &mut dyn Guest, deadline: Deadline) -> Result<()> {
        self.set_lock(guest, "", deadline)
    }

    /// Locks other clients out again. QEMU allows that while our migration is under way, which does
    /// not use the credentials any more.
    pub fn lock(&self, guest: &mut dyn Guest, deadline: Deadline) -> Result<()> {
        self.set_lock(guest, LOCK, deadline)
    }

    fn set_lock(&self, guest: &mut dyn Guest, credentials: &str, deadline: Deadline) -> Result<()> {
        if !self.locked {
            return Ok(());
        }
        commands::migrate_set_parameters(
            guest,
            Map::from_iter([(TLS.to_owned(), json!(credentials))]),
            deadline,
        )
    }

    /// Whether the lock is still set, so that no other client's migration can have begun since
    /// [`Settings::lock`].
    pub fn is_still_locked(&self, guest: &mut dyn Guest) -> Result<bool> {
        let parameters =
            commands::query_migrate_parameters(guest, Deadline::after(DEFAULT_TIMEOUT))?;
        Ok(!self.locked || parameters.get(TLS).is_some_and(|credentials| credentials == LOCK))
    }

    /// Puts all settings back that [`Settings::apply`], [`Settings::unlock`] and [`Settings::lock`]
    /// can have changed.
    pub fn restore(&self, guest: &mut dyn Guest, mode: Mode) -> Result<()> {
        self.put_back(guest, self.original_parameters(mode))
    }

    /// Puts the capabilities back first and the lock last, so that there is no moment at which
    /// another client's migration is a background snapshot. Only the capabilities that QEMU refuses
    /// together with the lock follow it.
    fn put_back(&self, guest: &mut dyn Guest, parameters: Map<String, Value>) -> Result<()> {
        let explain =
            |failure: Failure| failure.into_error("cannot put the migration capabilities back");
        match self.put_capabilities_back(guest, |name| !EXCLUDE_TLS.contains(&name))? {
            Ok(()) => {}
            // QEMU refused one of them. As long as this one is on, no other client may be let in.
            Err(Failure::Refused(..)) => {
                self.put_capabilities_back(guest, |name| name == BACKGROUND)?.map_err(explain)?;
            }
            Err(failure) => return Err(explain(failure)),
        }
        let now = commands::query_migrate_parameters(guest, Deadline::after(DEFAULT_TIMEOUT))?;
        let changed = parameters.into_iter().filter(|(name, value)| now.get(name) != Some(value));
        let parameters: Map<_, _> = changed.collect();
        if !parameters.is_empty() {
            commands::migrate_set_parameters(guest, parameters, Deadline::after(DEFAULT_TIMEOUT))?;
        }
        self.put_capabilities_back(guest, |_| true)?.map_err(explain)
    }

    /// Sets those capabilities that are not as they were found, by one command.
    fn put_capabilities_back(
        &self,
        guest: &mut dyn Guest,
        which: impl Fn(&str) -> bool,
    ) -> Result<std::result::Result<(), Failure>> {
        let now = commands::query_migrate_capabilities(guest, Deadline::after(DEFAULT_TIMEOUT))?;
        let changed = self
            .changeable()
            .filter(|capability| which(&capability.0) && !now.contains(capability));
        let changes: Vec<_> = changed.cloned().collect();
        Ok(set_capabilities(guest, &changes, Deadline::after(DEFAULT_TIMEOUT)))
    }

    /// The commands of [`Settings::restore`] for the watchdog, which sends them in its place: in
    /// the same order, for the same reason.
    pub fn script(&self, mode: Mode) -> Vec<(&'static str, Value)> {
        let capabilities = |which: &dyn Fn(&str) -> bool| {
            let capabilities = self.changeable().filter(|(name, _)| which(name));
            let list: Vec<_> = capabilities
                .map(|(name, state)| json!({ "capability": name, "state": state }))
                .collect();
            ("migrate-set-capabilities", json!({ "capabilities": list }))
        };
        let mut script = vec![
            // This one comes first and alone, so that it is put back even if QEMU refuses another
            // one.
            capabilities(&|name| name == BACKGROUND),
            ("closefd", json!({ "fdname": FD_NAME })),
            capabilities(&|name| !EXCLUDE_TLS.contains(&name)),
            ("migrate-set-parameters", Value::Object(self.original_parameters(mode))),
        ];
        if self.changeable().any(|(name, state)| *state && EXCLUDE_TLS.contains(&name.as_str())) {
            script.push(capabilities(&|_| true));
        }
        script
    }

    /// The original values of the parameters that `mode` changes.
    fn original_parameters(&self, mode: Mode) -> Map<String, Value> {
        let changed = self.parameters_for(mode);
        changed
            .into_iter()
            .map(|(name, _)| (name.clone(), self.parameters[&name].clone()))
            .collect()
    }

    /// The capabilities that a snapshot may change. `events` stays as it is: it only makes QEMU
    /// send events.
    fn changeable(&self) -> impl Iterator<Item = &(String, bool)> {
        self.capabilities.iter().filter(|(name, _)| name != "events")
    }

    /// The parameters to set for `mode`. `max-bandwidth` is not set for a background snapshot: it
    /// has no limit of its bandwidth, and is slowed by one that is set.
    fn parameters_for(&self, mode: Mode) -> Map<String, Value> {
        let mut parameters = Map::new();
        if mode == Mode::Paused && self.parameters.contains_key("max-bandwidth") {
            parameters.insert("max-bandwidth".into(), json!(i64::MAX));
        }
        let tls = if self.locked { LOCK } else { "" };
        for (name, wanted) in [(TLS, tls), ("mode", "normal")] {
            if self.parameters.get(name).is_some_and(|value| value != wanted) {
                parameters.insert(name.into(), json!(wanted));
            }
        }
        if self.locked && self.parameters.contains_key(RECORD) {
            let changed = parameters.keys().map(String::as_str).chain([RECORD]);
            let record = Leftover::describe(
                &self.capabilities,
                &self.parameters,
                changed,
                self.watchdog,
                None,
            );
            parameters.insert(RECORD.into(), json!(record));
        }
        parameters
    }
}

pub(super) fn set_capabilities(
    guest: &mut dyn Guest,
    changes: &[(String, bool)],
    deadline: Deadline,
) -> std::result::Result<(), Failure> {
    if changes.is_empty() {
        return Ok(());
    }
    commands::migrate_set_capabilities(guest, changes, deadline)
}

fn explain_lazy(failure: Failure) -> Error {
    match failure {
        Failure::Refused(_, reason) => Error::new(
            Code::ArgumentUnsupported,
            format!(
                "memory that follows is refused by this QEMU ({reason}): it needs permission to \
                 use userfaultfd. Run it as root, or `sysctl vm.unprivileged_userfaultfd=1`, or, \
                 with QEMU 8.0 or later, give its user access to /dev/userfaultfd; or load all of \
                 the memory first"
            ),
        ),
        failure => failure.into_error("cannot set the migration capabilities"),
    }
}

fn explain(failure: Failure, mode: Mode) -> Error {
    let step = "cannot set the migration capabilities";
    match failure {
        Failure::Refused(_, reason)
            if mode == Mode::Background && reason.contains("host kernel") =>
        {
            Error::new(
                Code::ArgumentUnsupported,
                format!(
                    "background snapshots are refused by this QEMU ({reason}): it needs Linux 5.7 \
                     or later and permission to use userfaultfd. Run it as root, or `sysctl \
                     vm.unprivileged_userfaultfd=1`, or, with QEMU 8.0 or later, give its user \
                     access to /dev/userfaultfd; shared (memfd) guest memory needs Linux 5.19"
                ),
            )
        }
        Failure::Refused(_, reason)
            if mode == Mode::Background && reason.contains("memory configuration") =>
        {
            Error::new(
                Code::ArgumentUnsupported,
                format!(
                    "background snapshots are refused by this QEMU ({reason}): guest memory that \
                     is a file on a disk cannot be write-protected; memory of memfd, of a \
                     file on tmpfs or hugetlbfs, or anonymous memory can. A guest that maps the \
                     memory image of a snapshot (memory 'map') is such a guest: load it with memory \
                     'full' or 'lazy' instead, or keep that image on tmpfs"
                ),
            )
        }
        Failure::Refused(_, reason) if mode == Mode::Background => {
            Error::new(Code::ArgumentUnsupported, format!("{step}: {reason}"))
        }
        failure => failure.into_error(step),
    }
}
