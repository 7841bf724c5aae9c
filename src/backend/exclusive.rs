// SPDX-License-Identifier: LGPL-2.1-or-later

//! Holding a guest for one operation.

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

/// Held while one operation changes a QEMU, by whatever process, handle or monitor socket.
///
/// Two snapshots at once would each take the other's migration capabilities for the original ones.
/// It is the name of an abstract Unix socket, which exactly one process can have, which leaves no
/// file, and which the kernel frees when its holder dies. A child that another thread forks has it
/// too until it executes its program, or ends; so whoever lets go shuts the socket down, which all
/// of them see. The next holder takes the first of some further names then: of all of them no two
/// are held at a time.
#[derive(Debug)]
pub struct Exclusive {
    held: OwnedFd,
    name: String,
    left: bool,
}

/// So many names there are for one thing to be held. Each can be kept from the next holder by
/// children of earlier ones.
const NAMES: usize = 64;
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
    /// What holds it: in a child of this process it is held until both have ended, or this one has
    /// let go.
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
                // It may be a watchdog that has done what it was there for, and is about to end.
                Err(Holder::Another) if deadline.left().is_some() => {
                    sleep(Duration::from_millis(20))
                }
                Err(_) => return Err(busy(whose)),
            }
        }
    }

    /// The same; who has it where it is held.
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
                    // Another may have found one before it free, or one after it, at the same time:
                    // then neither has it.
                    let others = addresses.iter().enumerate().filter(|(other, _)| *other != n);
                    if others.map(|(_, other)| state(other)).any(|other| other == State::Held) {
                        let _ = shutdown(&held, Shutdown::Both);
                        return Ok(Err(Holder::Another));
                    }
                    own.insert(name.clone());
                    return Ok(Ok(Exclusive { held, name, left: false }));
                }
                // By the time that it is looked at it may be free; the next will do.
                Err(Errno::ADDRINUSE) if state(address) != State::Held => {}
                Err(Errno::ADDRINUSE) => return Ok(Err(Holder::Another)),
                Err(errno) => return Err(system(errno)),
            }
        }
        Ok(Err(Holder::Another))
    }
}

/// The first name is the thing's own.
fn address(name: &str, n: usize) -> rustix::io::Result<SocketAddrUnix> {
    match n {
        0 => SocketAddrUnix::new_abstract_name(name.as_bytes()),
        n => SocketAddrUnix::new_abstract_name(format!("{name}#{n}").as_bytes()),
    }
}

/// What has become of a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nobody has it.
    Free,
    /// Its holder has let it go, and only a child that was forked meanwhile has it.
    LetGo,
    Held,
}

fn state(address: &SocketAddrUnix) -> State {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let Ok(probe) = socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None) else {
        return State::Held;
    };
    match sendto(&probe, b"", SendFlags::NOSIGNAL, address) {
        Err(Errno::CONNREFUSED) => State::Free,
        Err(Errno::PIPE) => State::LetGo,
        // Somebody is there, and never reads.
        Ok(_) | Err(_) => State::Held,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(name: &str) -> std::result::Result<Exclusive, Holder> {
        Exclusive::try_take(format!("instantsnap/test/{}/{name}", std::process::id())).unwrap()
    }

    /// As a child has it that was forked meanwhile, and executes nothing.
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
        // The first two end: their names are free, and taken first.
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
