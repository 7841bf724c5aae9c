//! Holding a guest for one operation.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::thread::sleep;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType, bind, sendto, shutdown, socket_with,
};

use super::PATIENCE;
use crate::error::{Error, Result, fail};
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
        let _ = shutdown(&self.held, Shutdown::Both);
        own.remove(&self.name);
    }
}

impl Exclusive {
    /// Takes it; `whose` says in an error what is held by another.
    pub fn take(whose: &str, name: String) -> Result<Exclusive> {
        match Exclusive::try_take(name)? {
            Ok(exclusive) => Ok(exclusive),
            Err(_) => fail!(OperationInvalid, "another snapshot operation on {whose} is under way: wait for it to end"),
        }
    }

    /// The same; who has it where it is held.
    pub fn try_take(name: String) -> Result<std::result::Result<Exclusive, Holder>> {
        let system = |errno: Errno| Error::system("cannot take the guest for this operation", errno);
        let address = SocketAddrUnix::new_abstract_name(name.as_bytes()).map_err(system)?;
        let held = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None).map_err(system)?;
        sys::wait_until_forked();
        let deadline = Deadline::after(PATIENCE);
        loop {
            let mut own = sys::lock(&OWN);
            match bind(&held, &address) {
                Ok(()) => {
                    own.insert(name.clone());
                    return Ok(Ok(Exclusive { held, name }));
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
