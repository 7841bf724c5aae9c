//! QEMU's migration as the means of saving and loading memory: its settings, and waiting for it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use serde_json::{Map, Value, json};

use super::cancel::{Cancel, timeout};
use super::clock::Clock;
use super::event::Flow;
use crate::error::{Code, Error, Result, fail};
use crate::guest::{Guest, PATIENCE};
use crate::image::{self, Drain, MemoryImage, throw_away};
use crate::monitor::commands::{self, Migration, Progress};
use crate::monitor::{Deadline, Failure};
use crate::sys::now;

const BACKGROUND: &str = "background-snapshot";
const TLS: &str = "tls-creds";
/// A migration for which QEMU is to use credentials that it does not have fails as it begins, and changes nothing. This is
/// their name, which whoever begins it is told.
const LOCK: &str = "instantsnap: a snapshot of this guest is being taken";
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
    /// Others are locked out while a migration is prepared.
    locked: bool,
}

impl Settings {
    /// Reads them.
    pub fn read(guest: &mut dyn Guest) -> Result<Settings> {
        let capabilities = commands::query_migrate_capabilities(guest, Deadline::after(PATIENCE))?;
        let parameters = commands::query_migrate_parameters(guest, Deadline::after(PATIENCE))?;
        let locked = guest.is_shared() && parameters.contains_key(TLS);
        Ok(Settings { capabilities, parameters, locked })
    }

    /// Whether this QEMU knows background snapshots at all.
    pub fn require_background(&self) -> Result<()> {
        if !self.capabilities.iter().any(|(name, _)| name == BACKGROUND) {
            fail!(ArgumentUnsupported, "migration option '{BACKGROUND}' is not supported by this QEMU binary");
        }
        Ok(())
    }

    /// Prepares for `mode`. Everything that changes the stream or excludes a background snapshot is off: the stream goes
    /// through one pipe, in the plainest form, and whatever the guest's next migration was set up for is back before that.
    ///
    /// As long as it is so, another client's save or dump of a guest that is shared would be a background snapshot too, and
    /// before QEMU 9 its guest would run on behind its back. So others are locked out until [`Settings::unlock`].
    pub fn apply(&self, guest: &mut dyn Guest, mode: Mode) -> Result<()> {
        let on = self.changeable().filter(|(_, state)| *state);
        let off: Vec<_> = on.map(|(name, _)| (name.clone(), false)).collect();
        set_capabilities(guest, &off, Deadline::after(PATIENCE)).map_err(|failure| explain(failure, mode))?;
        let parameters = self.parameters_for(mode);
        if !parameters.is_empty() {
            commands::migrate_set_parameters(guest, parameters, Deadline::after(PATIENCE))?;
        }
        if mode == Mode::Background {
            let background = [(BACKGROUND.into(), true)];
            set_capabilities(guest, &background, Deadline::after(PATIENCE))
                .map_err(|failure| explain(failure, mode))?;
        }
        Ok(())
    }

    /// Lets the next migration begin, which is to be ours.
    pub fn unlock(&self, guest: &mut dyn Guest, deadline: Deadline) -> Result<()> {
        self.set_lock(guest, "", deadline)
    }

    /// Locks others out again.
    pub fn lock(&self, guest: &mut dyn Guest) -> Result<()> {
        self.set_lock(guest, LOCK, Deadline::after(PATIENCE))
    }

    fn set_lock(&self, guest: &mut dyn Guest, credentials: &str, deadline: Deadline) -> Result<()> {
        if !self.locked {
            return Ok(());
        }
        commands::migrate_set_parameters(guest, Map::from_iter([(TLS.to_owned(), json!(credentials))]), deadline)
    }

    /// Puts back what [`Settings::apply`] and [`Settings::unlock`] can have changed.
    pub fn restore(&self, guest: &mut dyn Guest, mode: Mode) -> Result<()> {
        let parameters = self.original_parameters(mode);
        // Before the capabilities: with some of them set (`mapped-ram`), QEMU refuses parameters that it let be set first.
        let parameters = match parameters.is_empty() {
            true => Ok(()),
            false => commands::migrate_set_parameters(guest, parameters, Deadline::after(PATIENCE)),
        };
        let now = commands::query_migrate_capabilities(guest, Deadline::after(PATIENCE))?;
        let changes: Vec<_> = self.changeable().filter(|capability| !now.contains(capability)).cloned().collect();
        set_capabilities(guest, &changes, Deadline::after(PATIENCE))
            .map_err(|failure| failure.into_error("cannot put the migration capabilities back"))?;
        parameters
    }

    /// What [`Settings::restore`] would say, for whoever says it in its place.
    pub fn script(&self, mode: Mode) -> Vec<(&'static str, Value)> {
        let parameters = self.original_parameters(mode);
        let capabilities: Vec<_> =
            self.changeable().map(|(name, state)| json!({ "capability": name, "state": state })).collect();
        vec![
            ("closefd", json!({ "fdname": FD_NAME })),
            ("migrate-set-parameters", Value::Object(parameters)),
            ("migrate-set-capabilities", json!({ "capabilities": capabilities })),
        ]
    }

    /// The parameters that `mode` changes, as they were found.
    fn original_parameters(&self, mode: Mode) -> Map<String, Value> {
        let mut parameters = self.parameters_for(mode);
        for (name, value) in &mut parameters {
            *value = self.parameters[name].clone();
        }
        parameters
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
        parameters
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
        Failure::Refused(_, reason) if mode == Mode::Background && reason.contains("host kernel") => Error::new(
            Code::ArgumentUnsupported,
            format!(
                "background snapshots are refused by this QEMU ({reason}): it needs Linux 5.7 or later and permission to \
                 use userfaultfd. Run it as root, or `sysctl vm.unprivileged_userfaultfd=1`, or, with QEMU 8.0 or later, \
                 give its user access to /dev/userfaultfd; shared (memfd) guest memory needs Linux 5.19"
            ),
        ),
        Failure::Refused(_, reason) if mode == Mode::Background && reason.contains("memory configuration") => {
            Error::new(
                Code::ArgumentUnsupported,
                format!(
                    "background snapshots are refused by this QEMU ({reason}): guest memory that is a shared file on a disk cannot \
                 be write-protected; memory of memfd, of a file on tmpfs or hugetlbfs, or anonymous memory can"
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
        let spare = duplicate().map_err(|error| Error::system("cannot set up the memory pipe", error))?;
        let drain = Drain::start(read, image.file()?, image.path(), image.stream_offset())?;
        Ok(Stream { drain, offset: image.stream_offset(), spare, write: Some(write) })
    }

    /// Passes QEMU its end, as [`FD_NAME`].
    pub fn pass(&mut self, guest: &mut dyn Guest) -> Result<()> {
        match self.write.take() {
            Some(write) => commands::getfd(guest, FD_NAME, write.as_fd(), Deadline::after(PATIENCE)),
            None => Ok(()),
        }
    }

    /// QEMU's stream.
    pub fn pipe(&self) -> BorrowedFd<'_> {
        self.spare.as_fd()
    }

    /// Waits until all of memory is in the file, and QEMU says so. Returns the image's bytes.
    pub fn wait_saved(&self, guest: &mut dyn Guest, cancel: &Cancel, clock: &mut Clock) -> Result<u64> {
        let so_far = Flow { done: self.flow(None).done, ..clock.flow() };
        let mut meter = clock.interval().map(|interval| Meter::new(interval, so_far));
        let bytes = loop {
            cancel.check()?;
            if let Some(outcome) = self.drain.outcome() {
                break outcome?;
            }
            if let Some(meter) = meter.as_mut().filter(|meter| meter.left().is_zero()) {
                clock.progress(meter.read(self, guest));
                continue;
            }
            wait_either(self.drain.done(), cancel, meter.as_ref().map(Meter::left))?;
        };
        // The stream's end comes a moment before QEMU's word on it.
        match wait_ended(guest, Deadline::after(PATIENCE))? {
            Ended::Completed => Ok(self.offset + bytes),
            Ended::Failed(reason) => fail!(OperationFailed, "cannot save memory: {reason}"),
        }
    }

    /// How far memory has come, by what QEMU says of it.
    pub fn flow(&self, migration: Option<&Migration>) -> Flow {
        /// What goes before each page in the stream.
        const HEADER: u64 = 8;
        let bytes = self.drain.bytes();
        let mut flow = Flow { done: self.offset + bytes, ..Flow::default() };
        if let Some(ram) = migration.and_then(|migration| migration.ram.as_ref()).filter(|ram| ram.page_size > 0) {
            flow.pages_left = ram.remaining / ram.page_size;
            // Some of what QEMU has sent is in the pipe still.
            flow.total = self.offset + ram.transferred.max(bytes) + flow.pages_left * (ram.page_size + HEADER);
        }
        flow
    }

    /// Memory is not wanted any more. The stream is read on, and thrown away. [`Stream::wait_given_up`] sees to the rest.
    pub fn give_up(&self, guest: &mut dyn Guest, mode: Mode) -> Result<()> {
        self.drain.discard();
        match mode {
            Mode::Background => Ok(()),
            Mode::Paused => commands::migrate_cancel(guest, Deadline::after(PATIENCE)),
        }
    }

    /// Returns when nothing is written to the image any more, after [`Stream::give_up`].
    pub fn wait_discarded(&self, cancel: &Cancel) -> Result<()> {
        while self.drain.outcome().is_none() {
            cancel.check()?;
            wait_either(self.drain.done(), cancel, None)?;
        }
        Ok(())
    }

    /// Returns when QEMU has closed the stream. Its thread is at its end then; the status says so before, and a migration
    /// begun in between would be one beside it.
    fn wait_closed(&self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        // Asked for nothing, it tells of the other end's having gone.
        let mut fds = [PollFd::new(&self.spare, PollFlags::empty())];
        while !fds[0].revents().contains(PollFlags::HUP) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                fail!(OperationTimeout, "saving memory has ended, and QEMU does not close its stream");
            }
            match poll(&mut fds, Some(&timeout(left))) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(Error::system("cannot wait for QEMU to close its stream", errno)),
            }
        }
        Ok(())
    }

    /// Returns when QEMU says that the migration has ended; before that, it may yet stop the guest to save its devices.
    ///
    /// A background snapshot is cancelled only where that is safe. QEMU 7.2 leaves the guest's memory write-protected when
    /// one is cancelled or fails, its pipe's end closed included: the guest freezes for good at its next write. QEMU 10.0
    /// does not, but where it is cancelled before it has armed, QEMU closes its own descriptor 0, whatever that is by then.
    /// What cannot be cancelled is left to complete.
    pub fn wait_given_up(&self, guest: &mut dyn Guest, mode: Mode) -> Result<()> {
        let nap = Nap::default();
        let mut progress = Progressing::new(self.drain.bytes());
        let mut cancellable = mode == Mode::Background && guest.background_can_be_cancelled();
        loop {
            let migration = commands::query_migrate(guest, Deadline::after(PATIENCE))?;
            if migration.progress() != Progress::UnderWay {
                // Where it never began, QEMU keeps its end; refused where a migration has taken it.
                let _ = commands::closefd(guest, FD_NAME, Deadline::after(PATIENCE));
                return self.wait_closed();
            }
            if cancellable && migration.has_pages() {
                commands::migrate_cancel(guest, Deadline::after(PATIENCE))?;
                cancellable = false;
            }
            // While it sets up no byte can come, however long that takes.
            if migration.is_setting_up() {
                progress = Progressing::new(self.drain.bytes());
            }
            self.unblock(&mut progress)?;
            nap.sleep();
        }
    }

    /// QEMU cannot look at anything while it waits for room in the pipe, and a drain whose file system hangs makes none.
    fn unblock(&self, progress: &mut Progressing) -> Result<()> {
        const HANGING: Duration = Duration::from_secs(1);
        let mut bytes = self.drain.bytes();
        if progress.standstill(bytes) > HANGING {
            while let Ok(got @ 1..) = throw_away(&self.spare) {
                progress.extra += got as u64;
            }
            bytes = self.drain.bytes();
        }
        if progress.standstill(bytes) > 2 * PATIENCE {
            fail!(OperationTimeout, "saving memory was given up, and does not come to its end");
        }
        Ok(())
    }
}

/// Waits for one of the two.
fn wait_either(done: BorrowedFd, cancel: &Cancel, at_most: Option<Duration>) -> Result<()> {
    let mut fds =
        [PollFd::from_borrowed_fd(done, PollFlags::IN), PollFd::from_borrowed_fd(cancel.event(), PollFlags::IN)];
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
        let migration = asked.then(|| commands::query_migrate(guest, Deadline::after(SOON)).ok()).flatten();
        if asked && migration.is_none() {
            self.ask = now() + PATIENCE;
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
    let migration = commands::query_migrate(guest, Deadline::after(PATIENCE))?;
    Ok(match migration.progress() {
        Progress::UnderWay => None,
        Progress::Completed => Some(Ended::Completed),
        // None: it never began.
        Progress::None | Progress::Failed => Some(Ended::Failed(migration.reason().into())),
    })
}

fn wait_ended(guest: &mut dyn Guest, deadline: Deadline) -> Result<Ended> {
    let nap = Nap::default();
    loop {
        if let Some(ended) = query_ended(guest)? {
            return Ok(ended);
        }
        if deadline.left().is_none() {
            fail!(OperationTimeout, "memory is saved, and QEMU does not say so");
        }
        nap.sleep();
    }
}

/// Waits until write tracking is armed: from then on the guest may run, and its memory is saved as it is now.
///
/// Only page counts prove it (or that the migration has ended): see [`commands::Migration::has_pages`]. Their reply came
/// through QEMU's main loop, so a `cont` sent after it is carried out after the arming. Returns that reply.
pub fn wait_armed(guest: &mut dyn Guest, cancel: &Cancel, deadline: Deadline) -> Result<Migration> {
    let nap = Nap::default();
    loop {
        let migration = match commands::query_migrate(guest, deadline) {
            // The limit has passed while it answered, or while we slept.
            Err(error) if error.code == Code::OperationTimeout => {
                fail!(OperationTimeout, "the tracking of memory writes is not armed within the limit of the pause")
            }
            answer => answer?,
        };
        match migration.progress() {
            Progress::Completed => return Ok(migration),
            Progress::UnderWay if migration.has_pages() => return Ok(migration),
            Progress::UnderWay => {}
            Progress::None | Progress::Failed => {
                fail!(OperationFailed, "cannot arm the tracking of memory writes: {}", migration.reason())
            }
        }
        cancel.check()?;
        nap.sleep();
    }
}

/// Waits until a guest can be resumed that was to be paused while its migration set up, by somebody who does not know whether
/// that was done, and in time. Returns whether it is to be resumed now.
///
/// When it has set up, QEMU stops a guest that runs, arms, and resumes it by itself; a `cont` in between it overlooks, or it
/// waits for good for a pause that is no more. It does not stop one that is paused already. So a guest that runs is left
/// alone, and one that was seen paused before QEMU was seen setting up was not paused by QEMU.
pub fn wait_resumable(guest: &mut dyn Guest) -> bool {
    let (nap, deadline) = (Nap::default(), Deadline::after(PATIENCE));
    let mut look = || {
        let running = guest.status()?.running;
        let migration = commands::query_migrate(guest, deadline)?;
        let stopping =
            migration.progress() == Progress::UnderWay && !migration.is_setting_up() && !migration.has_pages();
        Ok::<_, Error>((running, stopping))
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

/// Waits for what QEMU does not announce: for a fiftieth of what the waiting has taken so far, so that the end is noticed
/// soon after a short wait, and QEMU is not asked more than it takes to answer in a long one.
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

/// Waits until an incoming migration has ended. It can take as long as memory is large, so only QEMU's silence is bounded.
pub fn wait_loaded(guest: &mut dyn Guest) -> Result<()> {
    let nap = Nap::default();
    loop {
        let migration = commands::query_migrate(guest, Deadline::after(PATIENCE))?;
        match migration.progress() {
            Progress::Completed => return Ok(()),
            Progress::Failed => fail!(OperationFailed, "QEMU cannot load the memory image: {}", migration.reason()),
            // Not begun yet, or under way.
            Progress::None | Progress::UnderWay => {}
        }
        nap.sleep();
    }
}
