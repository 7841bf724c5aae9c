// SPDX-License-Identifier: LGPL-2.1-or-later

//! The system calls that no safe wrapper covers, and small helpers around files that several
//! modules share.

use std::convert::Infallible;
use std::ffi::{CStr, CString, OsString, c_char, c_int, c_uint};
use std::fs::{File, Metadata, Permissions};
use std::io;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use crate::error::{Error, Result};
use crate::uncancelled::Uncancelled;

/// Blocks every signal in this thread for the time of `body`; what is started in it inherits that.
fn with_signals_blocked<T>(body: impl FnOnce() -> T) -> T {
    let mut all = MaybeUninit::<libc::sigset_t>::uninit();
    let mut before = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: both point to storage for a sigset_t; sigfillset initialises `all` before it is read,
    // and the first pthread_sigmask initialises `before`. Only this thread's mask changes, and it
    // is put back below.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr());
    }
    let result = body();
    // SAFETY: `before` was initialised above.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), std::ptr::null_mut()) };
    result
}

/// Takes a lock whose content is whole at any time, a panic of its holder included.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// CLOCK_MONOTONIC, for time stamps that a caller can compare with his own.
///
/// By libc: under valgrind it finds the clock, and rustix would not.
pub fn now() -> Duration {
    let mut now = MaybeUninit::<libc::timespec>::uninit();
    // SAFETY: it points to storage for a timespec, which a clock that every Linux has initialises.
    let now = unsafe {
        libc::clock_gettime(libc::CLOCK_MONOTONIC, now.as_mut_ptr());
        now.assume_init()
    };
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec as u32)
}

/// Starts a thread in which every signal is blocked, so that the caller's handlers never run in it,
/// and a pipe whose reader is gone answers EPIPE rather than SIGPIPE.
pub fn spawn_quiet<T: Send + 'static>(
    name: &str,
    body: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>> {
    let body = move || {
        // A callback could have it cancelled.
        let _uncancelled = Uncancelled::enter();
        body()
    };
    with_signals_blocked(|| Builder::new().name(name.into()).spawn(body))
        .map_err(|error| Error::system("cannot start a thread", error))
}

/// Held while a forked process has descriptors that are not its own yet.
static FORKING: Mutex<()> = Mutex::new(());

/// Runs what forks, up to the moment from which the new process has its own descriptors only.
pub fn while_forking<T>(body: impl FnOnce() -> T) -> T {
    let _forking = lock(&FORKING);
    body()
}

/// Waits until no forked process of ours holds a copy of what this process has closed: a lock, or a
/// name that only one socket can have. For before it is taken again.
pub fn wait_until_forked() {
    while_forking(|| ());
}

/// A process that was forked from this one: in a session of its own, with every signal blocked. Its
/// end raises no SIGCHLD, and no plain `wait` of the caller's sees it. Dropping it waits for its
/// end.
#[derive(Debug)]
pub struct Child {
    pid: libc::pid_t,
    ended: OwnedFd,
    reaped: bool,
}

impl Child {
    /// Forks it.
    ///
    /// # Safety
    /// `body` must be fit for the child of a process with threads: system calls on memory that
    /// exists already, no allocation, no lock, no panic.
    pub unsafe fn fork(body: impl FnOnce() -> Infallible) -> io::Result<Child> {
        let pid = with_signals_blocked(|| {
            // A bare clone with no flags is a fork without SIGCHLD, and without the handlers of
            // pthread_atfork. SAFETY: no flags, thus no shared memory and no new stack. The child
            // goes on with a copy of this one.
            match unsafe { libc::syscall(libc::SYS_clone, 0, 0, 0, 0, 0) } {
                -1 => Err(io::Error::last_os_error()),
                0 => {
                    // SAFETY: system calls; the name is NUL-terminated. Where the caller ignores
                    // SIGCHLD, the status of this process's own children would be lost.
                    unsafe {
                        default_action(libc::SIGCHLD);
                        libc::setsid();
                        libc::prctl(libc::PR_SET_NAME, c"instantsnap".as_ptr());
                    }
                    match body() {}
                }
                child => Ok(child as libc::pid_t),
            }
        })?;
        // SAFETY: a child that nobody has waited for. The descriptor is new, close-on-exec, and
        // nobody else's.
        match unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) } {
            -1 => {
                let error = io::Error::last_os_error();
                // SAFETY: its number is its own until it is reaped.
                unsafe { libc::kill(pid, libc::SIGKILL) };
                reap(pid);
                Err(error)
            }
            // SAFETY: as above.
            fd => Ok(Child {
                pid,
                ended: unsafe { OwnedFd::from_raw_fd(fd as c_int) },
                reaped: false,
            }),
        }
    }

    /// Its number.
    pub fn id(&self) -> u32 {
        self.pid.unsigned_abs()
    }

    /// Becomes readable when it has ended.
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.ended.as_fd()
    }

    /// Waits for its end; its status as `waitpid` gives it, where that is known.
    pub fn wait(mut self) -> Option<c_int> {
        self.reaped = true;
        reap(self.pid)
    }

    /// Ends it.
    pub fn kill(self) {
        // SAFETY: its number is its own until it is reaped.
        unsafe { libc::kill(self.pid, libc::SIGKILL) };
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if !self.reaped {
            reap(self.pid);
        }
    }
}

fn reap(pid: libc::pid_t) -> Option<c_int> {
    let mut status = 0;
    loop {
        // SAFETY: `status` is live; the child is ours. Should another thread have reaped it, by a
        // `wait` for such children too, the call fails, and the status is not known.
        match unsafe { libc::waitpid(pid, &raw mut status, libc::__WALL) } {
            -1 if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            -1 => return None,
            _ => return Some(status),
        }
    }
}

/// Reads one byte of every page of another process's memory, between two addresses.
pub fn touch(pid: u32, begin: u64, end: u64) -> io::Result<()> {
    const PAGE: usize = 4096;
    const AT_ONCE: usize = 1024;
    let pages: Vec<u64> = (begin..end).step_by(PAGE).collect();
    let mut bytes = [0u8; AT_ONCE];
    for pages in pages.chunks(AT_ONCE) {
        let local = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: pages.len() };
        let remote: Vec<_> = pages
            .iter()
            .map(|&page| libc::iovec { iov_base: page as *mut _, iov_len: 1 })
            .collect();
        // SAFETY: `local` is `bytes`, of which no more than there is is written; the other
        // addresses are another process's, and what is not there is an error.
        let read = unsafe {
            libc::process_vm_readv(
                pid as libc::pid_t,
                &raw const local,
                1,
                remote.as_ptr(),
                remote.len() as u64,
                0,
            )
        };
        if read < 0 {
            return Err(io::Error::last_os_error());
        }
        if (read as usize) < pages.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}

/// As many signals as the kernel has.
const SIGNALS: c_int = 64;

/// Gives a signal its default action, in a process of [`Child::fork`].
///
/// By the system call: glibc's `sigaction` takes a lock for SIGABRT (2.41 and later). A thread of
/// the caller's that held it when this process was forked, as one does that starts a program, does
/// not exist here to release it.
fn default_action(signal: c_int) {
    /// More than the kernel's structure of handler, flags, restorer and mask, which is all zero.
    const ACTION: [u64; 8] = [0; 8];
    // SAFETY: the structure is read, and nothing is written; what cannot be changed stays
    // (SIGKILL).
    unsafe {
        let none = std::ptr::null_mut::<libc::c_void>();
        libc::syscall(libc::SYS_rt_sigaction, signal, ACTION.as_ptr(), none, SIGNALS as usize / 8);
    }
}

/// A program's path and arguments, and its environment, as the kernel wants them: made before they
/// are needed.
#[derive(Debug)]
pub struct CommandLine {
    /// What the pointers point to.
    _strings: [Vec<CString>; 2],
    arguments: Vec<*const c_char>,
    environment: Vec<*const c_char>,
}

impl CommandLine {
    /// Of an absolute path and arguments, and an environment; nothing where one of them holds a
    /// NUL.
    pub fn new(words: Vec<OsString>, environment: Vec<OsString>) -> Option<CommandLine> {
        let strings = |words: Vec<OsString>| -> Option<Vec<CString>> {
            words.into_iter().map(|word| CString::new(word.into_vec()).ok()).collect()
        };
        let words = strings(words)?;
        let variables = strings(environment)?;
        let pointers = |strings: &[CString]| {
            strings.iter().map(|string| string.as_ptr()).chain([std::ptr::null()]).collect()
        };
        Some(CommandLine {
            arguments: pointers(&words),
            environment: pointers(&variables),
            _strings: [words, variables],
        })
    }

    /// The arguments, the path first, and a NULL.
    pub fn arguments(&self) -> &[*const c_char] {
        &self.arguments
    }

    /// The environment, and a NULL.
    pub fn environment(&self) -> &[*const c_char] {
        &self.environment
    }
}

/// What a program has as its standard input, output and error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stdio {
    /// Nothing.
    Null,
    /// Nothing, but for its output, which goes to this descriptor, none of the first three.
    Output(c_int),
    /// Those of its parent, with which it ends.
    Inherited,
}

/// A program that a process of [`Child::fork`] runs.
#[derive(Debug)]
pub struct Program(Child);

impl Program {
    /// Starts it.
    pub fn start(command_line: &CommandLine, stdio: Stdio) -> Option<Program> {
        let (arguments, environment) = (command_line.arguments(), command_line.environment());
        let path = *arguments.first()?;
        // SAFETY: only looks.
        let parent = unsafe { libc::getpid() };
        // SAFETY: system calls, and the pointers live on in the new process's memory,
        // NUL-terminated all.
        let run = || unsafe {
            if stdio == Stdio::Inherited {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                if libc::getppid() != parent {
                    libc::_exit(127);
                }
            } else {
                let null = libc::open(c"/dev/null".as_ptr(), libc::O_RDWR);
                let output = if let Stdio::Output(fd) = stdio { fd } else { null };
                for (place, fd) in (0..).zip([null, output, null]) {
                    libc::dup2(fd, place);
                }
            }
            // After `dup2`, which leaves the three open.
            let _ = libc::syscall(libc::SYS_close_range, 3, c_uint::MAX, 0);
            (1..=SIGNALS).for_each(default_action);
            let mut none = MaybeUninit::<libc::sigset_t>::uninit();
            libc::sigemptyset(none.as_mut_ptr());
            libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut());
            libc::execve(path, arguments.as_ptr(), environment.as_ptr());
            libc::_exit(127)
        };
        // SAFETY: the child makes system calls only.
        unsafe { Child::fork(run) }.ok().map(Program)
    }

    /// Waits until it has ended, or until `other` can be read: false.
    pub fn wait_ended(&self, other: Option<&OwnedFd>) -> bool {
        wait_ready([Some(&self.0.ended), other], -1);
        wait_ready([Some(&self.0.ended), None], 0)
    }

    /// Waits for its end; its status as `waitpid` gives it, where that is known.
    pub fn wait(self) -> Option<c_int> {
        self.0.wait()
    }

    /// Whether it has ended well.
    pub fn succeeded(self) -> bool {
        self.wait() == Some(0)
    }
}

/// Device and inode of what a path leads to, symbolic links not followed; for a child that was
/// forked.
pub fn file_id(path: &CStr) -> Option<(u64, u64)> {
    let mut found = std::mem::MaybeUninit::<libc::stat>::uninit();
    // SAFETY: a NUL-terminated path, and storage for the answer, which is filled in where the call
    // succeeds.
    unsafe {
        if libc::lstat(path.as_ptr(), found.as_mut_ptr()) != 0 {
            return None;
        }
        let found = found.assume_init();
        Some((found.st_dev, found.st_ino))
    }
}

/// Lets go of what holds a guest or a name, for every process that has it: by what kind it is.
pub fn let_go(fd: &OwnedFd) {
    // SAFETY: refused where it is no socket, or nothing that is locked.
    unsafe {
        libc::shutdown(fd.as_raw_fd(), libc::SHUT_RDWR);
        libc::flock(fd.as_raw_fd(), libc::LOCK_UN);
    }
}

/// Whether there is a file of this path; for a child that was forked.
pub fn exists(path: &CStr) -> bool {
    file_id(path).is_some()
}

/// Removes a file, by a process that [`Child::fork`] has started.
pub fn unlink(path: &CStr) {
    // SAFETY: a NUL-terminated string.
    unsafe { libc::unlink(path.as_ptr()) };
}

/// Changes a file, where it is still that of this device and inode, and no process has it open as
/// QEMU opens an image. For a process that [`Child::fork`] has started.
pub fn change_unused(path: &CStr, id: (u64, u64), change: fn(&OwnedFd)) {
    // SAFETY: a NUL-terminated string; the descriptor is new, and nobody else's.
    let file = unsafe {
        match libc::open(
            path.as_ptr(),
            libc::O_RDWR | libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC,
        ) {
            -1 => return,
            fd => OwnedFd::from_raw_fd(fd),
        }
    };
    let mut found = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: an open descriptor, and storage for the answer, which is filled in where the call
    // succeeds.
    let same = unsafe {
        libc::fstat(file.as_raw_fd(), found.as_mut_ptr()) == 0 && {
            let found = found.assume_init();
            (found.st_dev, found.st_ino) == id
        }
    };
    let mut lock = image_lock(IMAGE_LOCKS);
    // SAFETY: an open descriptor and a whole flock, which the call fills in.
    let asked = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLK, &raw mut lock) };
    if same && asked == 0 && lock.l_type == libc::F_UNLCK as libc::c_short {
        change(&file);
    }
}

/// Empties a file.
pub fn empty(file: &OwnedFd) {
    // SAFETY: an open descriptor.
    unsafe { libc::ftruncate(file.as_raw_fd(), 0) };
}

/// Takes the header of a qcow2 image away.
pub fn wipe(file: &OwnedFd) {
    const MAGIC: [u8; 4] = *b"QFI\xfb";
    const SECTOR: [u8; 512] = [0; 512];
    let mut magic = [0_u8; MAGIC.len()];
    // SAFETY: an open descriptor, and buffers of the lengths said.
    unsafe {
        let read = libc::pread(file.as_raw_fd(), magic.as_mut_ptr().cast(), magic.len(), 0);
        if read == MAGIC.len() as isize && magic == MAGIC {
            libc::pwrite(file.as_raw_fd(), SECTOR.as_ptr().cast(), SECTOR.len(), 0);
            libc::fsync(file.as_raw_fd());
        }
    }
}

/// Ends a process that [`Child::fork`] has started.
pub fn exit_now() -> ! {
    // SAFETY: ends the process without running anything of it.
    unsafe { libc::_exit(0) }
}

/// Closes every descriptor but these, which become 0, 1 and so on. For a process that
/// [`Child::fork`] has started.
pub fn keep_only<const N: usize>(fds: [c_int; N]) -> Option<[c_int; N]> {
    let mut kept = [0; N];
    // First out of the way of each other, then to their places.
    for (to, from) in kept.iter_mut().zip(fds) {
        // SAFETY: duplicates a descriptor to a free number.
        *to = unsafe { libc::fcntl(from, libc::F_DUPFD_CLOEXEC, 10) };
        if *to == -1 {
            return None;
        }
    }
    for (place, from) in kept.iter_mut().enumerate() {
        // SAFETY: in this process nobody uses these numbers.
        *from = unsafe { libc::dup2(*from, place as c_int) };
    }
    // SAFETY: as above; an error (Linux before 5.9 has no such call) is made good below.
    if unsafe { libc::syscall(libc::SYS_close_range, N as c_uint, c_uint::MAX, 0) } == -1 {
        // SAFETY: closing a number that is not open is an error without effect.
        (N as c_int..65536).for_each(|fd| unsafe {
            libc::close(fd);
        });
    }
    Some(std::array::from_fn(|place| place as c_int))
}

/// Waits until one of the descriptors can be read, its end included, for so many milliseconds (-1:
/// for ever). A signal handler of the caller's does not cut it short.
pub fn wait_ready(fds: [Option<&OwnedFd>; 2], milliseconds: c_int) -> bool {
    // A negative number is passed over.
    let mut polls = fds.map(|fd| libc::pollfd {
        fd: fd.map_or(-1, |fd| fd.as_raw_fd()),
        events: libc::POLLIN,
        revents: 0,
    });
    let end = now() + Duration::from_millis(milliseconds.max(0).unsigned_abs().into());
    let mut left = milliseconds;
    loop {
        // SAFETY: points to as many live pollfds as it says.
        let ready = unsafe { libc::poll(polls.as_mut_ptr(), 2, left) };
        if ready != -1 || io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return ready > 0;
        }
        if milliseconds >= 0 {
            left = end.saturating_sub(now()).as_millis() as c_int;
        }
    }
}

/// Whether this process has more rights than the user who has started it: then that user's
/// environment is not to be believed.
pub fn is_secure() -> bool {
    // SAFETY: only looks.
    unsafe { libc::getauxval(libc::AT_SECURE) != 0 }
}

/// Makes the entry of `path` in its directory durable.
pub fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let flags = libc::O_DIRECTORY | libc::O_NONBLOCK;
    File::options()
        .read(true)
        .custom_flags(flags)
        .open(parent.unwrap_or(Path::new(".")))?
        .sync_all()
}

/// Opens a file for reading. What somebody has put in its place, a pipe that nobody writes to, is
/// not waited for.
pub fn open_file(path: &Path) -> io::Result<File> {
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let kind = file.metadata()?.file_type();
    if kind.is_file() || kind.is_block_device() {
        Ok(file)
    } else {
        Err(io::Error::other("it is not a file"))
    }
}

/// Opens a file for reading that only this user or root can have made: no link, and no pipe that
/// would be waited for.
pub fn open_trusted(path: &Path) -> io::Result<File> {
    check_trusted(
        File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW).open(path),
    )
}

/// The same for reading and writing; a file that is not there is made, mode 0600.
pub fn open_or_create_trusted(path: &Path) -> io::Result<File> {
    let flags = libc::O_NONBLOCK | libc::O_NOFOLLOW;
    check_trusted(
        File::options()
            .read(true)
            .write(true)
            .create(true)
            .mode(0o600)
            .custom_flags(flags)
            .open(path),
    )
}

fn check_trusted(opened: io::Result<File>) -> io::Result<File> {
    let file = opened.map_err(|error| match error.raw_os_error() {
        Some(libc::ELOOP) => io::Error::other("it is a symbolic link"),
        // A pipe or a socket.
        Some(libc::ENXIO) => io::Error::other("it is not a regular file"),
        _ => error,
    })?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    if !is_trusted(metadata.uid()) {
        return Err(io::Error::other(format!("it belongs to another user ({})", metadata.uid())));
    }
    Ok(file)
}

/// Whether what this user has made can do us no harm.
pub fn is_trusted(owner: u32) -> bool {
    owner == 0 || owner == user()
}

/// The user that this process is.
pub fn user() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// Gives a new file the owner and the permissions of `model`, so that whoever could open that one
/// can open this.
pub fn copy_owner_and_mode(file: &File, model: &Path) -> io::Result<()> {
    // Network storage has no owner to go by.
    let Ok(model) = model.metadata() else { return Ok(()) };
    let own = file.metadata()?;
    if (own.uid(), own.gid()) != (model.uid(), model.gid()) {
        match fchown(file, Some(model.uid()), Some(model.gid())) {
            // Not root, and a member of neither: then QEMU runs as us, or will say that it cannot
            // open it.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
            other => other?,
        }
    }
    file.set_permissions(Permissions::from_mode(model.mode() & 0o666))
}

/// Gives a new file the owner of `model`, and leaves its permissions.
pub fn give_to_owner_of(model: &Path, file: &File) -> io::Result<()> {
    let model = model.metadata()?;
    fchown(file, Some(model.uid()), Some(model.gid()))
}

/// Whether two paths name one and the same file, or nodes of one and the same block device.
pub fn same_file(a: &Path, b: &Path) -> bool {
    let is_device = |found: &Metadata| found.file_type().is_block_device();
    match (a.metadata(), b.metadata()) {
        (Ok(a), Ok(b)) if is_device(&a) && is_device(&b) => a.rdev() == b.rdev(),
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => a == b,
    }
}

/// The bytes of an image that QEMU locks while it has it open.
pub const IMAGE_LOCKS: Range<i64> = 100..300;

/// A lock of these bytes, to be asked for.
fn image_lock(bytes: Range<i64>) -> libc::flock {
    libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: bytes.start,
        l_len: bytes.end - bytes.start,
        l_pid: 0,
    }
}

/// Whether another process has a lock on some of these bytes of a file.
pub fn is_locked(file: &File, bytes: Range<i64>) -> bool {
    let mut lock = image_lock(bytes);
    // SAFETY: an open file and a whole flock, which the call fills in.
    let asked = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLK, &raw mut lock) };
    asked == 0 && lock.l_type != libc::F_UNLCK as libc::c_short
}

/// Removes a file, and does not mind that it is gone already. The node of a device stays, and so
/// does a link to one: the device would be there as before, and its owner would miss its name.
pub fn remove_file(path: &Path) -> io::Result<()> {
    if std::fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device()) {
        return Ok(());
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Whether another process has this pipe open; none where it cannot be looked into.
pub fn has_open(pid: u32, pipe: &OwnedFd) -> Option<bool> {
    let pipe = rustix::fs::fstat(pipe).ok()?;
    let link = format!("pipe:[{}]", pipe.st_ino);
    for fd in std::fs::read_dir(format!("/proc/{pid}/fd")).ok()? {
        match fd.ok()?.path().read_link() {
            Ok(file) if file.as_os_str() == link.as_str() => return Some(true),
            Ok(_) => {}
            // Closed since.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(_) => return None,
        }
    }
    Some(false)
}

/// The process at the other end of a Unix socket; none where it is in a pid namespace that cannot
/// be seen from here.
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
