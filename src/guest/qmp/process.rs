//! The QEMU process behind a socket: holding it for one operation, and what /proc says of it.

use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, socket_with};

use crate::error::{Error, Result, fail};
use crate::monitor::Peer;

/// Held while one operation changes a QEMU, by whatever process, handle or monitor socket.
///
/// Two snapshots at once would each take the other's migration capabilities for the original ones. It is the name of an
/// abstract Unix socket, which exactly one process can have, which leaves no file, and which the kernel frees when its
/// holder dies.
#[derive(Debug)]
pub struct Exclusive {
    _held: OwnedFd,
}

impl Exclusive {
    /// Holds the QEMU behind a socket: the process, where it is known, else the socket.
    pub fn take(socket: &Path, qemu: Option<&Peer>) -> Result<Exclusive> {
        let name = match (qemu, socket.metadata()) {
            // A pid is used again one day; with its start time it is not.
            (Some(Peer { pid, .. }), _) => format!("instantsnap/{pid}/{}", start_time(*pid).unwrap_or_default()),
            (None, Ok(socket)) => format!("instantsnap/{:x}:{:x}", socket.dev(), socket.ino()),
            (None, Err(error)) => {
                return Err(Error::system(format!("cannot look at QMP socket '{}'", socket.display()), error));
            }
        };
        let system = |errno: Errno| Error::system("cannot take the guest for this operation", errno);
        let address = SocketAddrUnix::new_abstract_name(name.as_bytes()).map_err(system)?;
        let held = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None).map_err(system)?;
        match bind(&held, &address) {
            Ok(()) => Ok(Exclusive { _held: held }),
            Err(Errno::ADDRINUSE) => fail!(
                OperationInvalid,
                "another snapshot operation on the guest of QMP socket '{}' is under way: wait for it to end",
                socket.display()
            ),
            Err(errno) => Err(system(errno)),
        }
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
