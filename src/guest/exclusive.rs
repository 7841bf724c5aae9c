//! Holding a guest for one operation.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;
use std::thread::sleep;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType, bind, sendto, shutdown, socket_with,
};

use crate::error::{Code, Error, Result};
use crate::monitor::Deadline;
use crate::sys;

/// Held while one operation changes a QEMU, by whatever process, handle or monitor socket.
///
/// Two snapshots at once would each take the other's migration capabilities for the original ones. It is the name of an
/// abstract Unix socket, which exactly one process can have, which leaves no file, and which the kernel frees when its
/// holder dies. A child that another thread forks has it too until it executes its program; so whoever lets go shuts the
/// socket down, which all of them see.
#[derive(Debug)]
pub struct Exclusive {
    held: OwnedFd,
    name: String,
    left: bool,
}

/// A child that another thread has forked executes its program in this time.
const LETTING_GO: Duration = Duration::from_secs(5);
/// A process that is done ends in this time.
const ENDING: Duration = Duration::from_millis(500);

/// What whoever wants it is told; `whose` says of what.
pub fn busy(whose: &str) -> Error {
    let message = format!("another snapshot operation on {whose} is under way: wait for it to end");
    Error::new(Code::OperationInvalid, message)
}

/// The names that this process holds.
static OWN: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// Who holds a name that is not to be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holder {
    /// This process.
    Us,
    /// Another one.
    Another,
}

impl Drop for Exclusive {
    fn drop(&mut self) {
        let mut own = sys::lock(&OWN);
        if !self.left {
            let _ = shutdown(&self.held, Shutdown::Both);
        }
        own.remove(&self.name);
    }
}

impl Exclusive {
    /// What holds it: in a child of this process it is held until both have ended, or this one has let go.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.held.as_fd()
    }

    /// Leaves it to a child that has [`Exclusive::as_fd`].
    pub fn leave(&mut self) {
        self.left = true;
    }

    /// Takes it; `whose` says in an error what is held by another.
    pub fn take(whose: &str, name: String) -> Result<Exclusive> {
        let deadline = Deadline::after(ENDING);
        loop {
            match Exclusive::try_take(name.clone())? {
                Ok(exclusive) => return Ok(exclusive),
                // It may be a guard that has done what it was there for, and is about to end.
                Err(Holder::Another) if deadline.left().is_some() => sleep(Duration::from_millis(20)),
                Err(_) => return Err(busy(whose)),
            }
        }
    }

    /// The same; who has it where it is held.
    pub fn try_take(name: String) -> Result<std::result::Result<Exclusive, Holder>> {
        let system = |errno: Errno| Error::system("cannot take the guest for this operation", errno);
        let address = SocketAddrUnix::new_abstract_name(name.as_bytes()).map_err(system)?;
        let held = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None).map_err(system)?;
        sys::wait_until_forked();
        let deadline = Deadline::after(LETTING_GO);
        loop {
            let mut own = sys::lock(&OWN);
            match bind(&held, &address) {
                Ok(()) => {
                    own.insert(name.clone());
                    return Ok(Ok(Exclusive { held, name, left: false }));
                }
                Err(Errno::ADDRINUSE) if own.contains(&name) => return Ok(Err(Holder::Us)),
                Err(Errno::ADDRINUSE) if is_let_go(&address) && deadline.left().is_some() => {}
                Err(Errno::ADDRINUSE) => return Ok(Err(Holder::Another)),
                Err(errno) => return Err(system(errno)),
            }
            drop(own);
            sleep(Duration::from_millis(1));
        }
    }
}

/// Whether its holder has let it go, and only a child that was forked meanwhile has it for a moment longer.
fn is_let_go(address: &SocketAddrUnix) -> bool {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let Ok(probe) = socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None) else { return false };
    match sendto(&probe, b"", SendFlags::NOSIGNAL, address) {
        // Shut down; or gone altogether since.
        Err(Errno::PIPE | Errno::CONNREFUSED) => true,
        // Somebody is there, and never reads.
        Ok(_) | Err(_) => false,
    }
}
