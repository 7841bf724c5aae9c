//! The system calls that no safe wrapper covers, and small helpers around files that several modules share.

use std::fs::{File, Permissions};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::Path;
use std::thread::{Builder, JoinHandle};

use crate::error::{Error, Result};

/// Starts a thread in which every signal is blocked, so that the caller's handlers never run in it, and a pipe whose
/// reader is gone answers EPIPE rather than SIGPIPE.
pub fn spawn_quiet<T: Send + 'static>(name: &str, body: impl FnOnce() -> T + Send + 'static) -> Result<JoinHandle<T>> {
    let mut all = MaybeUninit::<libc::sigset_t>::uninit();
    let mut before = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: both point to storage for a sigset_t; sigfillset initialises `all` before it is read, and the first
    // pthread_sigmask initialises `before`. Only this thread's mask changes, and it is put back below.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr());
    }
    // The new thread inherits the mask of this moment.
    let thread = Builder::new().name(name.into()).spawn(body);
    // SAFETY: `before` was initialised above.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), std::ptr::null_mut()) };
    thread.map_err(|error| Error::system("cannot start a thread", error))
}

/// Makes the entry of `path` in its directory durable.
pub fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
}

/// Gives a new file the owner and the permissions of `model`, so that whoever could open that one can open this.
pub fn liken(file: &File, model: &Path) -> io::Result<()> {
    // Network storage has no owner to go by.
    let Ok(model) = model.metadata() else { return Ok(()) };
    let own = file.metadata()?;
    if (own.uid(), own.gid()) != (model.uid(), model.gid()) {
        match fchown(file, Some(model.uid()), Some(model.gid())) {
            // Not root, and a member of neither: then QEMU runs as us, or will say that it cannot open it.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
            other => other?,
        }
    }
    file.set_permissions(Permissions::from_mode(model.mode() & 0o666))
}

/// Whether two paths name one and the same file.
pub fn same_file(a: &Path, b: &Path) -> bool {
    match (a.metadata(), b.metadata()) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => a == b,
    }
}

/// Removes a file, and does not mind that it is gone already.
pub fn remove_file(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The process at the other end of a Unix socket; none where it is in a pid namespace that cannot be seen from here.
pub fn peer_pid(socket: BorrowedFd) -> Option<u32> {
    let mut credentials = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut size = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: both point to live storage of the size said, and the descriptor is open for the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &raw mut size,
        )
    };
    (result == 0 && credentials.pid > 0).then_some(credentials.pid as u32)
}
