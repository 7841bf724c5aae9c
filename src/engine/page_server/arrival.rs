// SPDX-License-Identifier: LGPL-2.1-or-later

//! Finds out how far a guest's memory is, waits for it, and starts another page server where both
//! processes of the first were killed.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::json;

use super::server::PageServer;
use super::task::{NUMBERS, Task};
use crate::backend::locks::is_in_use;
use crate::backend::{Connector, DEFAULT_TIMEOUT, Guest};
use crate::deadline::Deadline;
use crate::error::{Code, Error, Result, fail};
use crate::image::Image;
use crate::migration::post_copy::{Progress, Seen, Start};
use crate::migration::{Arrival, FD_NAME, Lazy, Settings};
use crate::monitor::{Command, commands};
use crate::sys::{self, wait_ready};

/// How often a state is asked for that nothing announces.
const PAUSE: Duration = Duration::from_millis(20);
/// A page server that is started so often, and sends nothing new, will never do.
const TRIES: u32 = 3;
/// An operation that ends within this time does not make a question fail: the page server holds the
/// guest for a moment at the end.
const HELD: Duration = Duration::from_secs(10);
/// How long a change is waited for before the state is asked for again.
const BUSY: Duration = Duration::from_secs(1);

/// How far a guest's memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryProgress {
    /// Whether memory is still to come.
    pub is_coming: bool,
    /// The bytes of pages that are not zero: those that are in, and all. 0 if that is not known,
    /// and when nothing is to come.
    pub pages: Progress,
}

const NOTHING: MemoryProgress =
    MemoryProgress { is_coming: false, pages: Progress { bytes: 0, total: 0 } };

/// Refuses an operation on a guest whose memory is still coming. If its page server was killed,
/// starts another one. If all is in, puts the settings back that the load has left.
pub fn check_arrived(guest: &mut dyn Guest) -> Result<()> {
    match rest(guest)? {
        Rest::Nothing => Ok(()),
        Rest::Coming(lazy) | Rest::Resumed(lazy) => Err(lazy.still_coming()),
        // The page server finds nothing to do then.
        Rest::Ending(_) => Settings::recover_arrived(guest),
    }
}

/// Does something. If it is refused, the reason can be memory that is still coming, or the settings
/// of a load that has ended: then this returns the error of [`check_arrived`], or tries again.
pub fn when_arrived<T>(
    guest: &mut dyn Guest,
    act: impl Fn(&mut dyn Guest) -> Result<T>,
) -> Result<T> {
    match act(guest) {
        Err(error) if error.code == Code::OperationInvalid => {
            check_arrived(guest)?;
            act(guest)
        }
        result => result,
    }
}

/// How far the guest's memory is.
pub fn progress(connector: &dyn Connector) -> Result<MemoryProgress> {
    let (Rest::Coming(lazy) | Rest::Resumed(lazy)) = look(connector, Deadline::after(HELD))? else {
        return Ok(NOTHING);
    };
    let pages = see(&processes(&lazy)).map(|seen| seen.progress).unwrap_or_default();
    Ok(MemoryProgress { is_coming: true, pages })
}

/// Waits until all of the guest's memory is in, and QEMU has its settings back. `timeout`: how long
/// at most; `None`: without limit. Returns whether all is in. It is an error if the rest cannot be
/// read from the image.
pub fn wait(connector: &dyn Connector, timeout: Option<Duration>) -> Result<bool> {
    let deadline = timeout.map(Deadline::after);
    let left = || deadline.map_or(BUSY, |deadline| deadline.left().unwrap_or_default().min(BUSY));
    let (mut most, mut resumed) = (0, 0);
    loop {
        let rest = look(connector, Deadline::after(HELD))?;
        let is_resumed = matches!(rest, Rest::Resumed(_));
        let (Rest::Coming(lazy) | Rest::Resumed(lazy) | Rest::Ending(lazy)) = rest else {
            return Ok(true);
        };
        let seen = see(&processes(&lazy));
        let bytes = seen.map(|seen| seen.progress.bytes).unwrap_or_default();
        if bytes > most {
            (most, resumed) = (bytes, 0);
        }
        resumed += u32::from(is_resumed);
        if resumed > TRIES || seen.is_some_and(|seen| seen.is_unreadable) {
            fail!(
                OperationFailed,
                "the rest of the guest's memory does not come: it cannot be read from the memory \
                 image '{}' of snapshot '{}'. See to its storage, and wait again: a guest that needs \
                 this memory waits too",
                lazy.image.display(),
                lazy.snapshot
            );
        }
        if left().is_zero() {
            return Ok(false);
        }
        let servers: Vec<_> = processes(&lazy).into_iter().filter_map(open).collect();
        if servers.is_empty() {
            sleep(PAUSE);
        }
        for server in servers {
            wait_ready([Some(&server), None], left().as_millis() as i32);
        }
    }
}

/// What there still is. Waits for the end of another operation, for example of the page server's,
/// which puts the settings back.
fn look(connector: &dyn Connector, deadline: Deadline) -> Result<Rest> {
    loop {
        match connector.begin().and_then(|mut guest| rest(&mut *guest)) {
            Err(error) if error.code == Code::OperationInvalid && deadline.left().is_some() => {
                sleep(PAUSE);
            }
            other => return other,
        }
    }
}

/// What there still is of a load whose memory follows.
enum Rest {
    Nothing,
    /// Memory is still to come.
    Coming(Lazy),
    /// It is, and another page server was started.
    Resumed(Lazy),
    /// All is in, and the page server is about to put the settings back.
    Ending(Lazy),
}

/// Finds out what there still is. Starts another page server if there is none any more and memory
/// is still to come, and puts the settings back if all is in and no page server does that.
fn rest(guest: &mut dyn Guest) -> Result<Rest> {
    let Some(lazy) = Settings::lazy(guest)? else { return Ok(Rest::Nothing) };
    let is_interrupted = match Arrival::ask(guest)? {
        Arrival::Interrupted => true,
        Arrival::NotBegun => return Settings::recover(guest).map(|_| Rest::Nothing),
        // A page server knows it better.
        Arrival::UnderWay | Arrival::Unclear if is_complete(&lazy) => {
            return Ok(Rest::Ending(lazy));
        }
        Arrival::UnderWay => false,
        Arrival::Unclear => match ask_often(guest, &lazy)? {
            Some(is_interrupted) => is_interrupted,
            None => return Settings::recover_arrived(guest).map(|()| Rest::Nothing),
        },
    };
    if is_interrupted {
        resume(guest, &lazy).map_err(|error| {
            error.and(format!(
                "the guest waits for memory of snapshot '{}', whose page server was killed",
                lazy.snapshot
            ))
        })?;
        return Ok(Rest::Resumed(lazy));
    }
    Ok(Rest::Coming(lazy))
}

/// Whether a page server is there and says that all is in.
fn is_complete(lazy: &Lazy) -> bool {
    see(&processes(lazy)).is_some_and(|seen| seen.is_complete)
}

/// Finds out how far the memory is where QEMU does not say it: `None` if all is in, otherwise
/// whether QEMU waits for another source. Only a page server that has ended long enough that QEMU
/// must have noticed it, and the image that is not used any more, prove that all is in.
fn ask_often(guest: &mut dyn Guest, lazy: &Lazy) -> Result<Option<bool>> {
    let deadline = Deadline::after(BUSY);
    loop {
        if !processes(lazy).is_empty() {
            return Ok(Some(false));
        }
        if Arrival::is_interrupted(guest)? {
            return Ok(Some(true));
        }
        if deadline.left().is_none() {
            // Processes of another container cannot be seen from here.
            return Ok(is_in_use(&lazy.image).then_some(false));
        }
        sleep(PAUSE);
    }
}

/// Starts another page server for a QEMU whose first one was lost.
fn resume(guest: &mut dyn Guest, lazy: &Lazy) -> Result<()> {
    let image = Image::open(&lazy.image)?;
    let found = image.file.metadata().map_err(|error| cannot_read(&lazy.image, error))?;
    if (found.dev(), found.ino()) != lazy.id {
        fail!(
            OperationFailed,
            "'{}' is no longer the memory image that the guest was loaded from",
            lazy.image.display()
        );
    }
    sys::mark_in_use(&image.file).map_err(|error| cannot_read(&lazy.image, error))?;
    let monitor: Option<PathBuf> = guest.monitor_socket();
    let (mut server, socket) = PageServer::start(&Task {
        start: Start::Resumed,
        image: &image,
        token: &lazy.token,
        monitor: monitor.as_deref(),
        // Those were the first that the lost one sent.
        first: Vec::new(),
        bandwidth: None,
    })?;
    let deadline = || Deadline::after(DEFAULT_TIMEOUT);
    // QEMU would take the lock for credentials of the connection.
    Settings::lock_lazy(guest, false)?;
    let command = Command::new("migrate-recover", json!({ "uri": format!("fd:{FD_NAME}") }));
    let resumed = commands::getfd(guest, FD_NAME, socket.as_fd(), deadline()).and_then(|()| {
        drop(socket);
        guest.run("cannot resume the loading of memory", command, deadline())?;
        server.begin()
    });
    let locked = Settings::lock_lazy(guest, true);
    if let Err(error) = resumed {
        let _ = commands::closefd(guest, FD_NAME, deadline());
        return Err(error);
    }
    server.leave();
    locked
}

fn cannot_read(image: &Path, error: std::io::Error) -> Error {
    Error::system(format!("cannot read memory snapshot file '{}'", image.display()), error)
}

/// The processes that serve this guest's pages, as far as they can be seen from here.
fn processes(lazy: &Lazy) -> Vec<u32> {
    let end = format!("\0{}\0", lazy.token);
    let serves = |pid: &u32| {
        let is_trusted = std::fs::metadata(format!("/proc/{pid}"))
            .is_ok_and(|process| sys::is_trusted(process.uid()));
        is_trusted
            && std::fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| line.ends_with(end.as_bytes()))
    };
    let all = std::fs::read_dir("/proc").into_iter().flatten();
    all.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).filter(serves).collect()
}

fn open(pid: u32) -> Option<OwnedFd> {
    pidfd_open(Pid::from_raw(pid.try_into().ok()?)?, PidfdFlags::empty()).ok()
}

/// What the page server's numbers say, which one of these processes has.
fn see(processes: &[u32]) -> Option<Seen> {
    processes.iter().find_map(|pid| {
        let mut bytes = [0; Seen::SIZE];
        let numbers = format!("/proc/{pid}/fd/{NUMBERS}");
        let numbers = sys::open_file(Path::new(&numbers)).ok()?;
        numbers.read_exact_at(&mut bytes, 0).ok()?;
        Some(Seen::from_bytes(&bytes))
    })
}
