//! QEMU's migration as the means of saving and loading memory: its settings, and waiting for it.

mod flow;
mod maker;
pub mod overlap;
mod reactivate;
pub mod run_state;
mod still;
mod warm;
mod work;

pub use self::flow::{Flow, FlowObserver};
pub use self::reactivate::reactivate_disks;
pub use self::still::Still;
pub use self::warm::warm;
pub use self::work::Work;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use serde_json::{Map, Value, json};

use crate::backend::{DEFAULT_TIMEOUT, Guest, Liveness};
use crate::cancel::{Cancel, timeout};
use crate::deadline::Deadline;
use crate::error::{Code, Error, Result, fail};
use crate::image::{self, Drain, MemoryImage, throw_away};
use crate::monitor::Failure;
use crate::monitor::commands::{self, Migration, MigrationRam, Progress};
use crate::sys::{self, now};

const BACKGROUND: &str = "background-snapshot";
const TLS: &str = "tls-creds";
/// A migration for which QEMU is to use credentials that it does not have fails as it begins, and
/// changes nothing. This is their name, which whoever begins it is told.
const LOCK: &str = "instantsnap: a snapshot of this guest is being taken";
/// Where the settings are noted as they were: QEMU uses it with credentials only.
const RECORD: &str = "tls-hostname";
/// What the note begins with.
const RECORDED: &str = "instantsnap: ";
/// The capabilities that QEMU refuses beside credentials, and beside which it refuses them.
const EXCLUDE_TLS: [&str; 2] = ["mapped-ram", "zero-copy-send"];
/// The name under which QEMU keeps our pipe until a migration takes it.
pub const FD_NAME: &str = "instantsnap-memory";

/// How memory is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The guest runs on: a background snapshot.
    Background,
    /// The guest is paused throughout.
    Paused,
}

/// QEMU's migration capabilities and parameters as they were found, to be put back.
#[derive(Clone, Debug)]
pub struct Settings {
    capabilities: Vec<(String, bool)>,
    parameters: Map<String, Value>,
    /// Other clients are locked out while our settings are in force.
    locked: bool,
    /// The process that puts them back where this one cannot.
    pub watchdog: Option<u32>,
}

impl Settings {
    /// Reads them, for a snapshot. What a snapshot has left whose process and watchdog were killed
    /// is put back first.
    pub fn read(guest: &mut dyn Guest) -> Result<Settings> {
        let mut settings = Settings::query(guest)?;
        if let Some(leftover) = Leftover::find(&settings, guest.never_sets_background_snapshot()) {
            leftover.check_maker()?;
            leftover.mend(guest)?;
            settings = Settings::query(guest)?;
        }
        settings.locked = settings.parameters.contains_key(TLS);
        Ok(settings)
    }

    /// Reads them, for memory that is to be loaded: the migration is the one that QEMU waits for,
    /// and no one is locked out.
    pub fn read_incoming(guest: &mut dyn Guest) -> Result<Settings> {
        Settings::query(guest)
    }

    fn query(guest: &mut dyn Guest) -> Result<Settings> {
        let capabilities =
            commands::query_migrate_capabilities(guest, Deadline::after(DEFAULT_TIMEOUT))?;
        let parameters =
            commands::query_migrate_parameters(guest, Deadline::after(DEFAULT_TIMEOUT))?;
        Ok(Settings { capabilities, parameters, locked: false, watchdog: None })
    }

    /// Whether this QEMU knows background snapshots at all.
    pub fn require_background(&self) -> Result<()> {
        if !self.capabilities.iter().any(|(name, _)| name == BACKGROUND) {
            fail!(
                ArgumentUnsupported,
                "migration option '{BACKGROUND}' is not supported by this QEMU binary"
            );
        }
        Ok(())
    }

    /// Prepares for `mode`. Everything that changes the stream or excludes a background snapshot is
    /// off: the stream goes through one pipe, in the plainest form, and whatever the guest's next
    /// migration was set up for is back before that.
    ///
    /// As long as it is so, another client's save or dump would be a background snapshot too, and
    /// before QEMU 9 its guest would run on behind its back. So others are locked out, but for the
    /// moment in which our own migration begins ([`Settings::unlock`], [`Settings::lock`]), until
    /// [`Settings::restore`].
    pub fn apply(&self, guest: &mut dyn Guest, mode: Mode) -> Result<()> {
        // Beside these QEMU can refuse every parameter, having taken the others before it took
        // these.
        self.switch_off(guest, mode, |name| EXCLUDE_TLS.contains(&name))?;
        // Then what the settings were, where the next snapshot finds it should this process be
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

    /// Notes another watchdog, where the settings are noted.
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

    /// Lets the next migration begin, which is to be ours.
    pub fn unlock(&self, guest: &mut dyn Guest, deadline: Deadline) -> Result<()> {
        self.set_lock(guest, "", deadline)
    }

    /// Locks others out again: QEMU lets it be set while our migration is under way, which has no
    /// use for it any more.
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

    /// Whether no other client's migration can have begun since [`Settings::lock`], as far as QEMU
    /// can tell.
    fn is_still_locked(&self, guest: &mut dyn Guest) -> Result<bool> {
        let parameters =
            commands::query_migrate_parameters(guest, Deadline::after(DEFAULT_TIMEOUT))?;
        Ok(!self.locked || parameters.get(TLS).is_some_and(|credentials| credentials == LOCK))
    }

    /// Puts back what [`Settings::apply`], [`Settings::unlock`] and [`Settings::lock`] can have
    /// changed.
    pub fn restore(&self, guest: &mut dyn Guest, mode: Mode) -> Result<()> {
        self.put_back(guest, self.original_parameters(mode))
    }

    /// The capabilities come first and the lock last, so that there is no instant at which another
    /// client's migration is a background snapshot. Only the capabilities that QEMU refuses beside
    /// the lock follow it.
    fn put_back(&self, guest: &mut dyn Guest, parameters: Map<String, Value>) -> Result<()> {
        let explain =
            |failure: Failure| failure.into_error("cannot put the migration capabilities back");
        match self.put_capabilities_back(guest, |name| !EXCLUDE_TLS.contains(&name))? {
            Ok(()) => {}
            // Whichever it refuses: as long as this one is on, no one may be let in.
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

    /// Sets those capabilities that are not as they were found, all at once.
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

    /// What [`Settings::restore`] would say, for whoever says it in its place: in the same order,
    /// for the same reason.
    pub fn script(&self, mode: Mode) -> Vec<(&'static str, Value)> {
        let capabilities = |which: &dyn Fn(&str) -> bool| {
            let capabilities = self.changeable().filter(|(name, _)| which(name));
            let list: Vec<_> = capabilities
                .map(|(name, state)| json!({ "capability": name, "state": state }))
                .collect();
            ("migrate-set-capabilities", json!({ "capabilities": list }))
        };
        let mut script = vec![
            // At once, and alone, so that no other one's being refused keeps it from being put
            // back.
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

    /// The parameters that `mode` changes, as they were found.
    fn original_parameters(&self, mode: Mode) -> Map<String, Value> {
        let changed = self.parameters_for(mode);
        changed
            .into_iter()
            .map(|(name, _)| (name.clone(), self.parameters[&name].clone()))
            .collect()
    }

    /// `events` changes nothing but what is told.
    fn changeable(&self) -> impl Iterator<Item = &(String, bool)> {
        self.capabilities.iter().filter(|(name, _)| name != "events")
    }

    /// A background snapshot has no limit of its bandwidth, and is slowed by one that is set.
    fn parameters_for(&self, mode: Mode) -> Map<String, Value> {
        let mut parameters = Map::new();
        if mode == Mode::Paused && self.parameters.contains_key("max-bandwidth") {
            parameters.insert("max-bandwidth".into(), json!(i64::MAX));
        }
        let tls = if self.locked { LOCK } else { "" };
        for (name, plain) in [(TLS, tls), ("mode", "normal")] {
            if self.parameters.get(name).is_some_and(|value| value != plain) {
                parameters.insert(name.into(), json!(plain));
            }
        }
        if self.locked && self.parameters.contains_key(RECORD) {
            let changed = parameters.keys().map(String::as_str).chain([RECORD]);
            let record = Leftover::describe(self, changed);
            parameters.insert(RECORD.into(), json!(record));
        }
        parameters
    }
}

/// What a snapshot has left in QEMU whose process and watchdog were killed, or could not reach QEMU
/// any more.
///
/// QEMU itself keeps what its settings were before: in the parameter `tls-hostname`, which QEMU has
/// no use for as long as there are no credentials to go with it. So it outlives all of our
/// processes, and ends with QEMU.
#[derive(Debug)]
struct Leftover {
    /// As they were before that snapshot, as far as it is known.
    capabilities: Vec<(String, bool)>,
    /// Those that it has changed.
    parameters: Map<String, Value>,
    /// Who has made it: see [`maker`].
    maker: Value,
}

impl Leftover {
    /// What is noted of the settings: the capabilities that are on, and the parameters that will be
    /// changed.
    fn describe<'a>(settings: &Settings, changed: impl Iterator<Item = &'a str>) -> String {
        let on = settings.capabilities.iter().filter(|(_, state)| *state);
        let capabilities: Vec<_> = on.map(|(name, _)| name).collect();
        let parameters: Map<_, _> =
            changed.map(|name| (name.to_owned(), settings.parameters[name].clone())).collect();
        let maker = maker::note(settings.watchdog);
        format!(
            "{RECORDED}{}",
            json!({ "capabilities": capabilities, "parameters": parameters, "maker": maker })
        )
    }

    /// Finds it; `never_set`: nobody but us sets `background-snapshot` in this guest.
    fn find(found: &Settings, never_set: bool) -> Option<Leftover> {
        let text =
            |name: &str| found.parameters.get(name).and_then(Value::as_str).unwrap_or_default();
        let recorded = text(RECORD).strip_prefix(RECORDED);
        if let Some(leftover) = recorded.and_then(|recorded| Leftover::parse(recorded, found)) {
            return Some(leftover);
        }
        let is_on = found.capabilities.iter().any(|(name, state)| name == BACKGROUND && *state);
        if text(TLS) != LOCK && !(is_on && never_set) {
            return None;
        }
        // What else it has switched off is not known.
        let off = |(name, state): &(String, bool)| (name.clone(), *state && name != BACKGROUND);
        let locked = (text(TLS) == LOCK).then(|| (TLS.to_owned(), json!("")));
        let capabilities = found.capabilities.iter().map(off).collect();
        Some(Leftover {
            capabilities,
            parameters: locked.into_iter().collect(),
            maker: Value::Null,
        })
    }

    fn parse(recorded: &str, found: &Settings) -> Option<Leftover> {
        let mut recorded: Value = serde_json::from_str(recorded).ok()?;
        let Value::Object(parameters) = recorded["parameters"].take() else { return None };
        let on = recorded["capabilities"].as_array()?;
        let was = |(name, _): &(String, bool)| (name.clone(), on.iter().any(|on| on == name));
        let capabilities = found.capabilities.iter().map(was).collect();
        Some(Leftover { capabilities, parameters, maker: recorded["maker"].take() })
    }

    /// Refuses what another snapshot may need still, which this process cannot know to have ended.
    fn check_maker(&self) -> Result<()> {
        match maker::at_work(&self.maker) {
            None => Ok(()),
            Some(who) => fail!(
                OperationInvalid,
                "another snapshot of this guest is under way, or has left its settings in QEMU: it \
                 is {who}. Wait for it to end; if it was killed, take a snapshot from where it was \
                 begun, or clear QEMU's migration parameter '{RECORD}' (migrate-set-parameters) \
                 and try again"
            ),
        }
    }

    /// Puts the settings back.
    fn mend(self, guest: &mut dyn Guest) -> Result<()> {
        // The pipe that QEMU may have been passed; refused where there is none.
        let _ = commands::closefd(guest, FD_NAME, Deadline::after(DEFAULT_TIMEOUT));
        let Leftover { capabilities, parameters, maker: _ } = self;
        let settings =
            Settings { capabilities, parameters: Map::new(), locked: false, watchdog: None };
        settings.put_back(guest, parameters).map_err(|error| {
            let left = "what an earlier snapshot of this guest, which was killed, has left in QEMU cannot be put back";
            Error::new(error.code, format!("{left}: {}", error.message))
        })
    }
}

fn set_capabilities(
    guest: &mut dyn Guest,
    changes: &[(String, bool)],
    deadline: Deadline,
) -> std::result::Result<(), Failure> {
    if changes.is_empty() {
        return Ok(());
    }
    commands::migrate_set_capabilities(guest, changes, deadline)
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
                     is a shared file on a disk cannot be write-protected; memory of memfd, of a \
                     file on tmpfs or hugetlbfs, or anonymous memory can"
                ),
            )
        }
        Failure::Refused(_, reason) if mode == Mode::Background => {
            Error::new(Code::ArgumentUnsupported, format!("{step}: {reason}"))
        }
        failure => failure.into_error(step),
    }
}

/// The way of memory from QEMU to its image, open.
#[derive(Debug)]
pub struct Stream {
    drain: Drain,
    /// Where it begins in the image.
    offset: u64,
    /// The pipe's end once more, to empty it should the drain hang.
    spare: OwnedFd,
    /// QEMU's end, until it has it.
    write: Option<OwnedFd>,
}

impl Stream {
    /// Opens it.
    pub fn open(image: &MemoryImage) -> Result<Stream> {
        let (read, write) = image::pipe()?;
        let duplicate = || {
            fcntl_setfl(&read, fcntl_getfl(&read)? | OFlags::NONBLOCK)?;
            rustix::io::fcntl_dupfd_cloexec(&read, 0)
        };
        let spare =
            duplicate().map_err(|error| Error::system("cannot set up the memory pipe", error))?;
        let drain = Drain::start(read, image.file()?, image.path(), image.stream_offset())?;
        Ok(Stream { drain, offset: image.stream_offset(), spare, write: Some(write) })
    }

    /// Passes QEMU its end, as [`FD_NAME`].
    pub fn pass(&mut self, guest: &mut dyn Guest) -> Result<()> {
        match self.write.take() {
            Some(write) => {
                commands::getfd(guest, FD_NAME, write.as_fd(), Deadline::after(DEFAULT_TIMEOUT))
            }
            None => Ok(()),
        }
    }

    /// QEMU's stream.
    pub fn pipe(&self) -> BorrowedFd<'_> {
        self.spare.as_fd()
    }

    /// Waits until all of memory is in the file, and QEMU says so. Returns the image's bytes.
    pub fn wait_saved(
        &self,
        guest: &mut dyn Guest,
        image: &MemoryImage,
        settings: &Settings,
        cancel: &Cancel,
        observer: &mut dyn FlowObserver,
    ) -> Result<u64> {
        let so_far = Flow { done: self.flow(None).done, ..observer.flow() };
        let mut meter = observer.interval().map(|interval| Meter::new(interval, so_far));
        let mut quiet = Quiet::new(self.drain.bytes());
        let mut muddled = false;
        let bytes = loop {
            cancel.check()?;
            if let Some(outcome) = self.drain.outcome() {
                break outcome?;
            }
            if quiet.is_long(self.drain.bytes()) {
                muddled |= self.look_for_end(guest, image, settings)?;
                quiet = Quiet::new(self.drain.bytes());
            }
            if let Some(meter) = meter.as_mut().filter(|meter| meter.left().is_zero()) {
                observer.progress(meter.read(self, guest));
                continue;
            }
            let at_most = meter.as_ref().map_or(QUIET, |meter| meter.left().min(QUIET));
            wait_either(self.drain.done(), cancel, Some(at_most))?;
        };
        // The stream's end comes a moment before QEMU's word on it.
        match wait_ended(guest, settings, Deadline::after(DEFAULT_TIMEOUT))? {
            Ended::Completed => Ok(self.offset + bytes),
            // This is what QEMU says of another client's that came after ours. Then the stream
            // itself tells.
            Ended::Failed(reason)
                if (muddled || reason.contains(LOCK)) && image.has_whole_stream()? =>
            {
                Ok(self.offset + bytes)
            }
            Ended::Failed(reason) => fail!(OperationFailed, "cannot save memory: {reason}"),
        }
    }

    /// Nothing has come for a while. There are two reasons for which nothing ever will, not even
    /// the end:
    ///
    /// * A process that the caller has forked, before QEMU had its end of the pipe, has that end
    ///   too as long as it does not execute a program: then the pipe does not end, though QEMU has
    ///   closed it. What a migration has written is in the pipe before QEMU says that it has
    ///   completed.
    /// * QEMU is setting up for ever: it has saved memory, said so, and had not closed its end of
    ///   the pipe when another client's `migrate` came, which QEMU refused for the lock. Then it
    ///   has forgotten the pipe (seen with QEMU 10.0; QEMU 7.2 ends there). Under the lock no
    ///   migration can be another client's, and before its own has set up the stream is not whole.
    ///   It is cancelled, as QEMU would refuse every other migration, and new settings, for good.
    ///
    /// Returns whether it was the latter.
    fn look_for_end(
        &self,
        guest: &mut dyn Guest,
        image: &MemoryImage,
        settings: &Settings,
    ) -> Result<bool> {
        let migration = match commands::query_migrate(guest, Deadline::after(QUIET)) {
            Ok(migration) => migration,
            // QEMU may be too busy to answer, or the daemon be restarted.
            Err(error) if error.code == Code::OperationTimeout => return Ok(false),
            Err(error) if guest.liveness() == Liveness::Exited => return Err(error),
            Err(_) => return Ok(false),
        };
        let muddled = migration.is_setting_up()
            && image.has_whole_stream()?
            && settings.is_still_locked(guest)?;
        match migration.progress() {
            _ if muddled => commands::migrate_cancel(guest, Deadline::after(DEFAULT_TIMEOUT))?,
            Progress::UnderWay => return Ok(false),
            Progress::Completed => {
                let waiting = rustix::io::ioctl_fionread(&self.spare).unwrap_or_default();
                let came = self.drain.bytes() + waiting;
                let sent = migration.ram.as_ref().map_or(0, MigrationRam::least);
                if came < sent {
                    fail!(
                        OperationFailed,
                        "QEMU has saved {sent} bytes of memory, and {came} have come here: another \
                         client has saved the guest meanwhile"
                    );
                }
            }
            Progress::None | Progress::Failed => {}
        }
        self.drain.end_when_empty();
        Ok(muddled)
    }

    /// How far memory has come, by what QEMU says of it.
    pub fn flow(&self, migration: Option<&Migration>) -> Flow {
        /// What goes before each page in the stream.
        const HEADER: u64 = 8;
        let bytes = self.drain.bytes();
        let mut flow = Flow { done: self.offset + bytes, ..Flow::default() };
        if let Some(ram) =
            migration.and_then(|migration| migration.ram.as_ref()).filter(|ram| ram.page_size > 0)
        {
            flow.pages_left = ram.remaining / ram.page_size;
            // Some of what QEMU has sent is in the pipe still.
            flow.total = self.offset
                + ram.transferred.max(bytes)
                + flow.pages_left * (ram.page_size + HEADER);
        }
        flow
    }

    /// Memory is not wanted any more. The stream is read on, and thrown away.
    /// [`Stream::wait_given_up`] sees to the rest.
    pub fn give_up(&self, guest: &mut dyn Guest, mode: Mode) -> Result<()> {
        self.drain.discard();
        match mode {
            Mode::Background => Ok(()),
            // Ours is over: what could be cancelled now is another client's.
            Mode::Paused if self.is_closed() => Ok(()),
            Mode::Paused => commands::migrate_cancel(guest, Deadline::after(DEFAULT_TIMEOUT)),
        }
    }

    /// Returns when nothing is written to the image any more, after [`Stream::wait_given_up`].
    pub fn wait_discarded(&self, cancel: &Cancel) -> Result<()> {
        self.drain.end_when_empty();
        while self.drain.outcome().is_none() {
            cancel.check()?;
            wait_either(self.drain.done(), cancel, None)?;
        }
        Ok(())
    }

    /// Whether QEMU has closed the stream. Then our migration is over: one that is under way is
    /// another client's.
    fn is_closed(&self) -> bool {
        let mut fds = [PollFd::new(&self.spare, PollFlags::empty())];
        poll(&mut fds, Some(&timeout(Duration::ZERO))).is_ok()
            && fds[0].revents().contains(PollFlags::HUP)
    }

    /// Returns when QEMU has closed the stream. Its thread is at its end then; the status says so
    /// before, and a migration begun in between would be one beside it.
    fn wait_closed(&self, guest: &dyn Guest) -> Result<()> {
        let deadline = Instant::now() + DEFAULT_TIMEOUT;
        // Asked for nothing, it tells of the other end's having gone.
        let mut fds = [PollFd::new(&self.spare, PollFlags::empty())];
        while !fds[0].revents().contains(PollFlags::HUP) {
            // Another process may have that end too.
            if guest.pid().and_then(|pid| sys::has_open(pid, &self.spare)) == Some(false) {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                fail!(
                    OperationTimeout,
                    "saving memory has ended, and QEMU does not close its stream"
                );
            }
            match poll(&mut fds, Some(&timeout(left.min(LOOK)))) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => {
                    return Err(Error::system("cannot wait for QEMU to close its stream", errno));
                }
            }
        }
        Ok(())
    }

    /// Returns when QEMU says that the migration has ended; before that, it may yet stop the guest
    /// to save its devices.
    ///
    /// A background snapshot is cancelled only where that is safe. QEMU 7.2 leaves the guest's
    /// memory write-protected when one is cancelled or fails, its pipe's end closed included: the
    /// guest freezes for good at its next write. QEMU 10.0 does not, but where it is cancelled
    /// before it has armed, QEMU closes its own descriptor 0, whatever that is by then. What cannot
    /// be cancelled is left to complete.
    pub fn wait_given_up(&self, guest: &mut dyn Guest, mode: Mode) -> Result<()> {
        let nap = Nap::default();
        let mut progress = Progressing::new(self.drain.bytes());
        let mut cancellable = mode == Mode::Background && guest.background_can_be_cancelled();
        let mut stopping = None;
        loop {
            if self.is_closed() {
                return Ok(());
            }
            let migration = commands::query_migrate(guest, Deadline::after(DEFAULT_TIMEOUT))?;
            if migration.progress() != Progress::UnderWay {
                // Where it never began, QEMU keeps its end; refused where a migration has taken it.
                let _ = commands::closefd(guest, FD_NAME, Deadline::after(DEFAULT_TIMEOUT));
                return self.wait_closed(guest);
            }
            if cancellable && migration.has_pages() {
                commands::migrate_cancel(guest, Deadline::after(DEFAULT_TIMEOUT))?;
                cancellable = false;
            }
            if !migration.is_between_setup_and_armed() || mode != Mode::Background {
                stopping = None;
            } else if stopping.get_or_insert_with(Instant::now).elapsed() > LOST_STOP {
                repeat_stop(guest)?;
                stopping = None;
            }
            // While it sets up no byte can come, however long that takes.
            if migration.is_setting_up() {
                progress = Progressing::new(self.drain.bytes());
            }
            self.unblock(&mut progress)?;
            nap.sleep();
        }
    }

    /// QEMU cannot look at anything while it waits for room in the pipe, and a drain whose file
    /// system hangs makes none.
    fn unblock(&self, progress: &mut Progressing) -> Result<()> {
        const HANGING: Duration = Duration::from_secs(1);
        let mut bytes = self.drain.bytes();
        if progress.standstill(bytes) > HANGING {
            while let Ok(got @ 1..) = throw_away(&self.spare) {
                progress.extra += got as u64;
            }
            bytes = self.drain.bytes();
        }
        if progress.standstill(bytes) > 2 * DEFAULT_TIMEOUT {
            fail!(OperationTimeout, "saving memory was given up, and does not come to its end");
        }
        Ok(())
    }
}

/// For so long nothing comes before QEMU is asked whether anything more does.
const QUIET: Duration = Duration::from_secs(1);
/// How often it is looked whether QEMU has closed its end.
const LOOK: Duration = Duration::from_millis(20);

/// Since when nothing has come.
struct Quiet {
    bytes: u64,
    since: Instant,
}

impl Quiet {
    fn new(bytes: u64) -> Quiet {
        Quiet { bytes, since: Instant::now() }
    }

    fn is_long(&mut self, bytes: u64) -> bool {
        if bytes != self.bytes {
            *self = Quiet::new(bytes);
        }
        self.since.elapsed() >= QUIET
    }
}

/// Waits for one of the two.
fn wait_either(done: BorrowedFd, cancel: &Cancel, at_most: Option<Duration>) -> Result<()> {
    let mut fds = [
        PollFd::from_borrowed_fd(done, PollFlags::IN),
        PollFd::from_borrowed_fd(cancel.event(), PollFlags::IN),
    ];
    match poll(&mut fds, at_most.map(timeout).as_ref()) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(Error::system("cannot wait for memory to be saved", errno)),
    }
}

/// Looks at intervals how far memory has come.
struct Meter {
    interval: Duration,
    looked: Duration,
    last: Flow,
    /// QEMU, when it did not answer, is not asked again before this.
    ask: Duration,
}

impl Meter {
    fn new(interval: Duration, so_far: Flow) -> Meter {
        Meter { interval, looked: now(), last: so_far, ask: Duration::ZERO }
    }

    /// Until it is to be looked again.
    fn left(&self) -> Duration {
        (self.looked + self.interval).saturating_sub(now())
    }

    fn read(&mut self, stream: &Stream, guest: &mut dyn Guest) -> Flow {
        /// For an answer that nothing depends on. A cancel has to wait for it.
        const SOON: Duration = Duration::from_secs(1);
        // What is wrong with QEMU is found by whoever needs it.
        let asked = now() >= self.ask;
        let migration =
            asked.then(|| commands::query_migrate(guest, Deadline::after(SOON)).ok()).flatten();
        if asked && migration.is_none() {
            self.ask = now() + DEFAULT_TIMEOUT;
        }
        let (now, mut flow) = (now(), stream.flow(migration.as_ref()));
        if flow.total == 0 {
            // Not told: as it was.
            flow.pages_left = self.last.pages_left;
            flow.total = if self.last.total == 0 { 0 } else { self.last.total.max(flow.done) };
        }
        let micros = (now - self.looked).as_micros().max(1);
        flow.per_second = (u128::from(flow.done - self.last.done) * 1_000_000 / micros) as u64;
        (self.looked, self.last) = (now, flow);
        flow
    }
}

/// Since when no byte has come.
struct Progressing {
    seen: u64,
    extra: u64,
    since: Instant,
}

impl Progressing {
    fn new(bytes: u64) -> Progressing {
        Progressing { seen: bytes, extra: 0, since: Instant::now() }
    }

    fn standstill(&mut self, bytes: u64) -> Duration {
        if bytes + self.extra != self.seen {
            self.seen = bytes + self.extra;
            self.since = Instant::now();
        }
        self.since.elapsed()
    }
}

/// How a migration has ended.
enum Ended {
    Completed,
    Failed(String),
}

fn query_ended(guest: &mut dyn Guest) -> Result<Option<Ended>> {
    let migration = commands::query_migrate(guest, Deadline::after(DEFAULT_TIMEOUT))?;
    Ok(match migration.progress() {
        Progress::UnderWay => None,
        Progress::Completed => Some(Ended::Completed),
        // None: it never began.
        Progress::None | Progress::Failed => Some(Ended::Failed(migration.reason().into())),
    })
}

/// Waits for the end of a migration whose stream has come to its end.
fn wait_ended(guest: &mut dyn Guest, settings: &Settings, deadline: Deadline) -> Result<Ended> {
    let nap = Nap::default();
    loop {
        if let Some(ended) = query_ended(guest)? {
            return Ok(ended);
        }
        if !settings.is_still_locked(guest)? {
            fail!(
                OperationFailed,
                "another client has changed QEMU's migration parameter '{TLS}', and begun a \
                 migration of the guest, before QEMU could be asked whether memory was saved: take \
                 the snapshot again"
            );
        }
        if deadline.left().is_none() {
            fail!(OperationTimeout, "memory is saved, and QEMU does not say so");
        }
        nap.sleep();
    }
}

/// Waits until write tracking is armed: from then on the guest may run, and its memory is saved as
/// it is now.
///
/// Only page counts prove it (or that the migration has ended): see
/// [`commands::Migration::has_pages`]. Their reply came through QEMU's main loop, so a `cont` sent
/// after it is carried out after the arming. Returns that reply.
///
/// While it sets up, the guest must stay in a state that QEMU can capture: see [`run_state`].
/// `ran`: it ran before.
pub fn wait_armed(
    guest: &mut dyn Guest,
    ran: bool,
    cancel: &Cancel,
    deadline: Deadline,
) -> Result<Migration> {
    let nap = Nap::default();
    loop {
        let migration = match commands::query_migrate(guest, deadline) {
            // The limit has passed while it answered, or while we slept.
            Err(error) if error.code == Code::OperationTimeout => {
                fail!(
                    OperationTimeout,
                    "the tracking of memory writes is not armed within the limit of the pause"
                )
            }
            answer => answer?,
        };
        match migration.progress() {
            Progress::Completed => return Ok(migration),
            Progress::UnderWay if migration.has_pages() => return Ok(migration),
            Progress::UnderWay if migration.is_setting_up() => {
                run_state::keep_capturable(guest, deadline).inspect_err(|_| {
                    if !ran {
                        pause_once_armed(guest);
                    }
                })?
            }
            Progress::UnderWay => {}
            Progress::None | Progress::Failed => {
                fail!(
                    OperationFailed,
                    "cannot arm the tracking of memory writes: {}",
                    migration.reason()
                )
            }
        }
        cancel.check()?;
        nap.sleep();
    }
}

/// QEMU's own stop of the guest, before the capture, is over sooner by far.
const LOST_STOP: Duration = Duration::from_secs(1);

/// Frees a migration whose thread waits for the CPUs of a guest that runs. QEMU stops a guest that
/// it finds running before it captures it, and waits until all CPUs stand. Another client's `cont`,
/// or a reset, can have them run again before the thread has seen that: then the thread waits for
/// good, and the migration can be neither completed nor cancelled. When the guest is stopped once
/// more, the thread goes on. The guest runs again after that.
fn repeat_stop(guest: &mut dyn Guest) -> Result<()> {
    if !guest.status()?.running {
        return Ok(());
    }
    let deadline = Deadline::after(LOST_STOP);
    // Where it comes too late, the guest may be paused all the same.
    let paused = guest.pause(deadline);
    let nap = Nap::default();
    while deadline.left().is_some()
        && commands::query_migrate(guest, deadline)
            .is_ok_and(|migration| migration.is_between_setup_and_armed())
    {
        nap.sleep();
    }
    if !guest.status()?.running {
        guest.resume(Deadline::after(DEFAULT_TIMEOUT))?;
    }
    paused
}

/// Pauses a guest that was resumed for the sake of QEMU, which is going to stop and resume it by
/// itself before that.
fn pause_once_armed(guest: &mut dyn Guest) {
    let (nap, deadline) = (Nap::default(), Deadline::after(DEFAULT_TIMEOUT));
    while deadline.left().is_some()
        && commands::query_migrate(guest, deadline).is_ok_and(|migration| {
            migration.progress() == Progress::UnderWay && !migration.has_pages()
        })
    {
        nap.sleep();
    }
    let _ = guest.pause(deadline);
}

/// Waits until a guest can be resumed that was to be paused while its migration set up, by somebody
/// who does not know whether that was done, and in time. Returns whether it is to be resumed now.
///
/// When it has set up, QEMU stops a guest that runs, arms, and resumes it by itself; a `cont` in
/// between it overlooks, or it waits for good for a pause that is no more. It does not stop one
/// that is paused already. So a guest that runs is left alone, and one that was seen paused before
/// QEMU was seen setting up was not paused by QEMU.
pub fn wait_resumable(guest: &mut dyn Guest, deadline: Deadline) -> bool {
    let nap = Nap::default();
    let mut look = || {
        let running = commands::query_status(guest, deadline)?.running;
        let migration = commands::query_migrate(guest, deadline)?;
        Ok::<_, Error>((running, migration.is_between_setup_and_armed()))
    };
    while deadline.left().is_some() {
        match look() {
            Ok((true, _)) => return false,
            Ok((false, false)) => return true,
            // What is not known now may be in a moment.
            Ok((false, true)) | Err(_) => nap.sleep(),
        }
    }
    true
}

/// Waits for what QEMU does not announce: for a fiftieth of what the waiting has taken so far, so
/// that the end is noticed soon after a short wait, and QEMU is not asked more than it takes to
/// answer in a long one.
#[derive(Debug)]
struct Nap(Instant);

impl Default for Nap {
    fn default() -> Nap {
        Nap(Instant::now())
    }
}

impl Nap {
    fn sleep(&self) {
        sleep((self.0.elapsed() / 50).clamp(Duration::from_micros(20), Duration::from_millis(10)));
    }
}

/// Waits until an incoming migration has ended. It can take as long as memory is large, so only
/// QEMU's silence is bounded.
pub fn wait_loaded(guest: &mut dyn Guest) -> Result<()> {
    let nap = Nap::default();
    loop {
        let migration = commands::query_migrate(guest, Deadline::after(DEFAULT_TIMEOUT))?;
        match migration.progress() {
            Progress::Completed => return Ok(()),
            Progress::Failed => {
                fail!(OperationFailed, "QEMU cannot load the memory image: {}", migration.reason())
            }
            // Not begun yet, or under way.
            Progress::None | Progress::UnderWay => {}
        }
        nap.sleep();
    }
}
