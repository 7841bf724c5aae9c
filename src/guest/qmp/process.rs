//! The QEMU process behind a socket: holding it for one operation, and what /proc says of it.

use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType, bind, sendto, shutdown, socket_with,
};

use crate::error::{Error, Result, fail};
use crate::guest::PATIENCE;
use crate::monitor::{Deadline, Peer};
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
}

impl Drop for Exclusive {
    fn drop(&mut self) {
        let _ = shutdown(&self.held, Shutdown::Both);
    }
}

impl Exclusive {
    /// Holds a socket: all that is known before it is connected to. A connection that QEMU does not accept while it has
    /// another client takes a place in its queue until then, and there are two.
    pub fn take_socket(socket: &Path) -> Result<Exclusive> {
        let step = |error| Error::system(format!("cannot connect to QMP socket '{}'", socket.display()), error);
        let metadata = socket.metadata().map_err(step)?;
        Exclusive::take(socket, format!("instantsnap/{:x}:{:x}", metadata.dev(), metadata.ino()))
    }

    /// Holds the process behind a socket, whatever other sockets it has.
    pub fn take_qemu(socket: &Path, qemu: &Peer) -> Result<Exclusive> {
        // A pid is used again one day; with its start time it is not.
        Exclusive::take(socket, format!("instantsnap/{}/{}", qemu.pid, start_time(qemu.pid).unwrap_or_default()))
    }

    fn take(socket: &Path, name: String) -> Result<Exclusive> {
        let system = |errno: Errno| Error::system("cannot take the guest for this operation", errno);
        let address = SocketAddrUnix::new_abstract_name(name.as_bytes()).map_err(system)?;
        let held = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None).map_err(system)?;
        sys::wait_until_forked();
        let deadline = Deadline::after(PATIENCE);
        loop {
            match bind(&held, &address) {
                Ok(()) => return Ok(Exclusive { held }),
                Err(Errno::ADDRINUSE) if is_let_go(&address) && deadline.left().is_some() => {
                    sleep(Duration::from_millis(1));
                }
                Err(Errno::ADDRINUSE) => fail!(
                    OperationInvalid,
                    "another snapshot operation on the guest of QMP socket '{}' is under way: wait for it to end",
                    socket.display()
                ),
                Err(errno) => return Err(system(errno)),
            }
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

fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The fields after the command, which is in parentheses and can hold anything; the start time is field 22.
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// The path of its binary.
pub fn executable(pid: u32) -> Option<String> {
    std::fs::read_link(format!("/proc/{pid}/exe")).ok()?.into_os_string().into_string().ok()
}

/// A file name of QEMU's as an absolute path: relative ones are relative to where QEMU was started.
pub fn absolute(file: &str, pid: Option<u32>) -> Option<String> {
    if file.starts_with('/') {
        return Some(file.into());
    }
    let directory: PathBuf = std::fs::read_link(format!("/proc/{}/cwd", pid?)).ok()?;
    let path = directory.join(Path::new(file));
    path.exists().then(|| path.into_os_string().into_string().ok()).flatten()
}
