// SPDX-License-Identifier: LGPL-2.1-or-later

//! Holds a guest for one operation.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;
use std::thread::sleep;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType, bind, sendto,
    shutdown, socket_with,
};

use crate::deadline::Deadline;
use crate::error::{Code, Error, Result};
use crate::sys;

/// The lock that is held while one operation changes a QEMU, whichever process, handle or monitor
/// socket the operation uses.
///
/// Two snapshots at once would each take the other's migration capabilities for the original ones.
/// The lock is the name of an abstract Unix socket: exactly one process can have it, it leaves no
/// file, and the kernel frees it when its holder dies. A child that another thread forks has the
/// socket too, until it executes its program or ends. So the holder shuts the socket down to
/// release the lock, which is visible in all copies. The next holder then takes the first free one
/// of some further names; no two of all these names are held at a time.
#[derive(Debug)]
pub struct Exclusive {
    held: OwnedFd,
    name: String,
    is_left: bool,
}

/// The number of names for one lock. Children of earlier holders can keep some names in use.
const NAMES: usize = 64;
/// A process that has finished its work exits in this time.
pub const EXIT_TIMEOUT: Duration = Duration::from_millis(500);

/// The error for a guest that is held already; `label` names the guest.
pub fn busy(label: &str) -> Error {
    let message = format!("another snapshot operation on {label} is under way: wait for it to end");
    Error::new(Code::OperationInvalid, message)
}

/// The names of the locks that this process holds.
static OWN: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// The holder of a lock that cannot be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holder {
    /// This process.
    Us,
    /// Another process.
    Another,
}

impl Drop for Exclusive {
    fn drop(&mut self) {
        let mut own = sys::lock(&OWN);
        if !self.is_left {
            let _ = shutdown(&self.held, Shutdown::Both);
        }
        own.remove(&self.name);
    }
}

impl Exclusive {
    /// The socket that holds the lock. If a child of this process has it too, the lock is held
    /// until both have ended, or until this process has released it.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.held.as_fd()
    }

    /// Leaves the lock to a child that has [`Exclusive::as_fd`]: dropping this does not release it.
    pub fn leave(&mut self) {
        self.is_left = true;
    }

    /// Takes the lock. `label` names the guest in the error.
    pub fn take(label: &str, name: String) -> Result<Exclusive> {
        let deadline = Deadline::after(EXIT_TIMEOUT);
        loop {
            match Exclusive::try_take(name.clone())? {
                Ok(exclusive) => return Ok(exclusive),
                // The holder may be a watchdog that has finished its work and is about to exit.
                Err(Holder::Another) if deadline.left().is_some() => {
                    sleep(Duration::from_millis(20))
                }
                Err(_) => return Err(busy(label)),
            }
        }
    }

    /// Takes the lock without waiting. Returns its holder if it is held.
    pub fn try_take(name: String) -> Result<std::result::Result<Exclusive, Holder>> {
        let system =
            |errno: Errno| Error::system("cannot take the guest for this operation", errno);
        let addresses: Vec<_> = (0..NAMES)
            .map(|n| address(&name, n))
            .collect::<std::result::Result<_, _>>()
            .map_err(system)?;
        sys::wait_until_forked();
        let mut own = sys::lock(&OWN);
        if own.contains(&name) {
            return Ok(Err(Holder::Us));
        }
        for (n, address) in addresses.iter().enumerate() {
            let held =
                socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
                    .map_err(system)?;
            match bind(&held, address) {
                Ok(()) => {
                    // Another process may have bound another of the names at the same time: then
                    // neither has the lock.
                    let others = addresses.iter().enumerate().filter(|(other, _)| *other != n);
                    if others.map(|(_, other)| state(other)).any(|other| other == State::Held) {
                        let _ = shutdown(&held, Shutdown::Both);
                        return Ok(Err(Holder::Another));
                    }
                    own.insert(name.clone());
                    return Ok(Ok(Exclusive { held, name, is_left: false }));
                }
                // It may have been freed since; then the next name is used.
                Err(Errno::ADDRINUSE) if state(address) != State::Held => {}
                Err(Errno::ADDRINUSE) => return Ok(Err(Holder::Another)),
                Err(errno) => return Err(system(errno)),
            }
        }
        Ok(Err(Holder::Another))
    }
}

/// The address of the nth name. The first is the lock's own name.
fn address(name: &str, n: usize) -> rustix::io::Result<SocketAddrUnix> {
    match n {
        0 => SocketAddrUnix::new_abstract_name(name.as_bytes()),
        n => SocketAddrUnix::new_abstract_name(format!("{name}#{n}").as_bytes()),
    }
}

/// The state of a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// No process has it.
    Free,
    /// Its holder has released it; only a child that was forked meanwhile still has a copy.
    Released,
    /// A process holds it.
    Held,
}

fn state(address: &SocketAddrUnix) -> State {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let Ok(probe) = socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None) else {
        return State::Held;
    };
    match sendto(&probe, b"", SendFlags::NOSIGNAL, address) {
        Err(Errno::CONNREFUSED) => State::Free,
        Err(Errno::PIPE) => State::Released,
        // A process has the socket open. It never reads.
        Ok(_) | Err(_) => State::Held,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(name: &str) -> std::result::Result<Exclusive, Holder> {
        Exclusive::try_take(format!("instantsnap/test/{}/{name}", std::process::id())).unwrap()
    }

    /// A copy of the socket, as a child has that was forked meanwhile and executes no program.
    fn forked(held: &Exclusive) -> OwnedFd {
        held.as_fd().try_clone_to_owned().unwrap()
    }

    #[test]
    fn what_is_let_go_can_be_taken_though_forked_children_have_it_still() {
        let mut children = Vec::new();
        for _ in 0..5 {
            let held = take("forked").unwrap();
            assert_eq!(take("forked").unwrap_err(), Holder::Us);
            children.push(forked(&held));
        }
        // The first two end: their names are free, and are taken first.
        children.drain(..2);
        let held = take("forked").unwrap();
        drop(children);
        assert_eq!(take("forked").unwrap_err(), Holder::Us);
        drop(held);
        assert!(take("forked").is_ok());
    }

    #[test]
    fn what_another_has_by_a_further_name_is_held() {
        let name = format!("instantsnap/test/{}/further", std::process::id());
        let another =
            socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
                .unwrap();
        bind(&another, &address(&name, 3).unwrap()).unwrap();
        assert_eq!(take("further").unwrap_err(), Holder::Another);
        shutdown(&another, Shutdown::Both).unwrap();
        assert!(take("further").is_ok());
    }
}
