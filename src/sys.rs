// SPDX-License-Identifier: LGPL-2.1-or-later

//! The system calls that have no safe wrapper, and small functions for files that several modules
//! share.

use std::convert::Infallible;
use std::ffi::{CStr, CString, OsStr, OsString, c_char, c_int, c_uint, c_void};
use std::fs::{File, Metadata, Permissions};
use std::io;
use std::mem::MaybeUninit;
use std::ops::{Deref, Range};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Signal, pidfd_send_signal};
use tempfile::NamedTempFile;

use crate::error::{Error, Result};
use crate::uncancelled::Uncancelled;

/// Runs `body` while every signal is blocked in this thread. Threads and processes that it starts
/// inherit that.
fn with_signals_blocked<T>(body: impl FnOnce() -> T) -> T {
    let mut all = MaybeUninit::<libc::sigset_t>::uninit();
    let mut before = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: both point to storage for a sigset_t; sigfillset initialises `all` before it is read,
    // and the first pthread_sigmask initialises `before`. Only this thread's mask changes, and it
    // is restored below.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr());
    }
    let result = body();
    // SAFETY: `before` was initialised above.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), std::ptr::null_mut()) };
    result
}

/// Locks a mutex whose content is consistent even after a panic of a thread that had locked it.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The time by CLOCK_MONOTONIC. A caller can compare such time stamps with its own.
///
/// It uses libc, because rustix does not find the clock under valgrind.
pub fn now() -> Duration {
    let mut now = MaybeUninit::<libc::timespec>::uninit();
    // SAFETY: it points to storage for a timespec. The call initialises it, because every Linux has
    // this clock.
    let now = unsafe {
        libc::clock_gettime(libc::CLOCK_MONOTONIC, now.as_mut_ptr());
        now.assume_init()
    };
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec as u32)
}

/// Starts a thread in which every signal is blocked, so that the caller's handlers never run in it,
/// and a write to a pipe without a reader fails with EPIPE and raises no SIGPIPE.
pub fn spawn_quiet<T: Send + 'static>(
    name: &str,
    body: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>> {
    let body = move || {
        // A callback of the caller's could cancel the thread.
        let _uncancelled = Uncancelled::enter();
        body()
    };
    with_signals_blocked(|| Builder::new().name(name.into()).spawn(body))
        .map_err(|error| Error::system("cannot start a thread", error))
}

/// Locked while a forked process still has copies of all of this process's descriptors.
static FORKING: Mutex<()> = Mutex::new(());

/// Runs `body`, which forks, and which returns only when the new process has closed the descriptors
/// that are not for it.
pub fn while_forking<T>(body: impl FnOnce() -> T) -> T {
    let _forking = lock(&FORKING);
    body()
}

/// Waits until no forked process of ours has a copy of a descriptor that this process has closed.
/// Call it before a lock, or a name that only one socket can have, is taken again.
pub fn wait_until_forked() {
    while_forking(|| ());
}

/// A process that was started by this one: in a session of its own, with every signal blocked. Its
/// end raises no SIGCHLD, and an ordinary `wait` of the caller does not return it. Dropping it
/// waits for its end, for 30 seconds at most if it is a program.
#[derive(Debug)]
pub struct Child {
    pid: libc::pid_t,
    ended: OwnedFd,
    /// This process is the parent, and has not waited for it yet.
    to_reap: bool,
    /// It goes on, and is not waited for.
    is_left: bool,
}

impl Child {
    /// Forks a process that runs `body`.
    ///
    /// # Safety
    /// `body` must be safe in the child of a process with threads: it makes only system calls on
    /// memory that exists already, and does not allocate, lock or panic.
    pub unsafe fn fork(body: impl FnOnce() -> Infallible) -> io::Result<Child> {
        let pid = with_signals_blocked(|| {
            // A clone without flags is a fork without SIGCHLD, and without the handlers of
            // pthread_atfork. SAFETY: without flags there is no shared memory and no new stack: the
            // child continues with a copy of this one.
            match unsafe { libc::syscall(libc::SYS_clone, 0, 0, 0, 0, 0) } {
                -1 => Err(io::Error::last_os_error()),
                0 => {
                    // SAFETY: only system calls; the name is NUL-terminated. The action of SIGCHLD
                    // is reset because the caller may ignore it, and then the status of the
                    // child's own children would be lost.
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
        Child::adopt(pid)
    }

    /// Starts a program in such a process, by vfork on a separate stack. So no memory of this
    /// process is copied, and this thread's stack may be small. These descriptors become the
    /// program's 0, 1 and so on. The program has no others, and has every signal blocked.
    ///
    /// The kernel has the end of every child that executes a program raise SIGCHLD. So a process in
    /// between starts the program, and ends: then the program is a child of init.
    pub fn start<const N: usize>(command: &CommandLine, fds: [c_int; N]) -> io::Result<Child> {
        /// More than a few system calls need.
        const STACK: usize = 64 << 10;
        let (arguments, environment) = (command.arguments(), command.environment());
        let path = *arguments.first().ok_or(io::ErrorKind::InvalidInput)?;
        let (arguments, environment) = (arguments.as_ptr(), environment.as_ptr());
        let mut stacks = [(); 2].map(|()| vec![0_u128; STACK / size_of::<u128>()]);
        let [between, programs] = stacks.each_mut().map(|stack| stack.as_mut_ptr_range().end);
        let mut launch = Launch {
            execution: Execution { path, arguments, environment, fds, errno: 0 },
            stack: programs.cast(),
            pid: -1,
            pidfd: -1,
        };
        // The process in between shares the descriptors, so that this one gets the program's.
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_FILES;
        let pid = with_signals_blocked(|| {
            let argument = (&raw mut launch).cast();
            // SAFETY: this thread goes on when the process in between has ended, and that goes on
            // when the program was executed, or could not be: until then the stacks and `launch`
            // are theirs, and they change nothing else.
            match unsafe { libc::clone(self::launch::<N>, between.cast(), flags, argument) } {
                -1 => Err(io::Error::last_os_error()),
                child => Ok(child),
            }
        })?;
        reap(pid);
        // SAFETY: the kernel has made it for this process, and nothing else has it.
        let ended = (launch.pidfd != -1).then(|| unsafe { OwnedFd::from_raw_fd(launch.pidfd) });
        match (ended, launch.execution.errno) {
            (Some(ended), 0) => {
                Ok(Child { pid: launch.pid, ended, to_reap: false, is_left: false })
            }
            (_, errno) => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    /// Makes a `Child` of a new process that was not waited for yet.
    fn adopt(pid: libc::pid_t) -> io::Result<Child> {
        // SAFETY: the descriptor is new, close-on-exec, and not used elsewhere.
        match unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) } {
            -1 => {
                let error = io::Error::last_os_error();
                // SAFETY: the child has this pid until it is reaped.
                unsafe { libc::kill(pid, libc::SIGKILL) };
                reap(pid);
                Err(error)
            }
            // SAFETY: as above.
            fd => Ok(Child {
                pid,
                ended: unsafe { OwnedFd::from_raw_fd(fd as c_int) },
                to_reap: true,
                is_left: false,
            }),
        }
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.pid.unsigned_abs()
    }

    /// A descriptor that becomes readable when the process has ended.
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.ended.as_fd()
    }

    /// Whether the process has ended.
    pub fn has_ended(&self) -> bool {
        wait_ready([Some(&self.ended), None], 0)
    }

    /// Waits for its end. Returns its status as `waitpid` gives it; none if that is not known, as
    /// it never is of a program that [`Child::start`] has started.
    pub fn wait(mut self) -> Option<c_int> {
        if std::mem::take(&mut self.to_reap) {
            return reap(self.pid);
        }
        wait_ready([Some(&self.ended), None], -1);
        None
    }

    /// Leaves a program to itself: it goes on, and this process does not wait for its end.
    pub fn leave(mut self) {
        self.is_left = true;
    }

    /// Kills it, and waits for its end.
    pub fn kill(self) {
        // It may have ended.
        let _ = pidfd_send_signal(&self.ended, Signal::KILL);
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        /// A program that a file system holds does not end before that answers.
        const LONGEST_MS: c_int = 30_000;
        if self.to_reap {
            reap(self.pid);
        } else if !self.is_left {
            wait_ready([Some(&self.ended), None], LONGEST_MS);
        }
    }
}

/// What the process in between needs to start a program.
struct Launch<const N: usize> {
    execution: Execution<N>,
    /// The end of the program's stack until it is executed.
    stack: *mut c_void,
    /// The program's process, once it was started.
    pid: libc::pid_t,
    pidfd: c_int,
}

extern "C" fn launch<const N: usize>(launch: *mut c_void) -> c_int {
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD;
    // SAFETY: `Child::start` passes a `Launch`, and waits. This process goes on when the program
    // was executed, or its process has ended.
    unsafe {
        let launch = &mut *launch.cast::<Launch<N>>();
        let (argument, pidfd) = ((&raw mut launch.execution).cast(), &raw mut launch.pidfd);
        launch.pid = libc::clone(execute::<N>, launch.stack, flags, argument, pidfd);
        if launch.pid == -1 {
            launch.execution.errno = *libc::__errno_location();
        } else if launch.execution.errno != 0 {
            libc::waitpid(launch.pid, std::ptr::null_mut(), libc::__WALL);
        }
        libc::_exit(0)
    }
}

/// The program that a child executes. Until then the child shares its parent's memory.
struct Execution<const N: usize> {
    path: *const c_char,
    arguments: *const *const c_char,
    environment: *const *const c_char,
    fds: [c_int; N],
    /// The error if the child cannot execute it; otherwise 0.
    errno: c_int,
}

extern "C" fn execute<const N: usize>(execution: *mut c_void) -> c_int {
    // SAFETY: `Child::start` passes an `Execution`, and waits. The child shares only memory with
    // its parent, so the signal handlers that it changes are its own. The pointers are to
    // NUL-terminated strings, and arrays that end with a NULL.
    unsafe {
        let execution = &mut *execution.cast::<Execution<N>>();
        (1..=SIGNALS).for_each(default_action);
        libc::setsid();
        if keep_only(execution.fds).is_some() {
            libc::execve(execution.path, execution.arguments, execution.environment);
        }
        execution.errno = *libc::__errno_location();
        libc::_exit(127)
    }
}

fn reap(pid: libc::pid_t) -> Option<c_int> {
    let mut status = 0;
    loop {
        // SAFETY: `status` is live; the child is ours. If another thread has reaped it, by a `wait`
        // that includes such children, the call fails, and the status is not known.
        match unsafe { libc::waitpid(pid, &raw mut status, libc::__WALL) } {
            -1 if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            -1 => return None,
            _ => return Some(status),
        }
    }
}

/// Numbers that this process shares with another, all 0 at first.
#[derive(Debug)]
pub struct SharedNumbers<const N: usize> {
    numbers: NonNull<[AtomicU64; N]>,
    /// The memory; `None` if only forks of this process can share it.
    memory: Option<OwnedFd>,
}

// SAFETY: it is a reference to atomic numbers, in memory that only this unmaps.
unsafe impl<const N: usize> Send for SharedNumbers<N> {}
// SAFETY: as above.
unsafe impl<const N: usize> Sync for SharedNumbers<N> {}

impl<const N: usize> SharedNumbers<N> {
    const SIZE: usize = size_of::<[AtomicU64; N]>();

    /// Makes new numbers. If the kernel or a sandbox refuses memory that has a descriptor, only
    /// forks of this process can share them.
    pub fn new() -> io::Result<SharedNumbers<N>> {
        match memfd_create(c"instantsnap", MemfdFlags::CLOEXEC) {
            Ok(memory) => {
                rustix::fs::ftruncate(&memory, SharedNumbers::<N>::SIZE as u64)?;
                SharedNumbers::open(memory)
            }
            Err(_) => SharedNumbers::map(None),
        }
    }

    /// Opens the numbers that another process has made.
    pub fn open(memory: OwnedFd) -> io::Result<SharedNumbers<N>> {
        if rustix::fs::fstat(&memory)?.st_size < SharedNumbers::<N>::SIZE as i64 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        SharedNumbers::map(Some(memory))
    }

    fn map(memory: Option<OwnedFd>) -> io::Result<SharedNumbers<N>> {
        let (number, anonymous) =
            memory.as_ref().map_or((-1, libc::MAP_ANONYMOUS), |memory| (memory.as_raw_fd(), 0));
        // SAFETY: a new mapping, at an address that the kernel chooses. The memory is anonymous, or
        // of a file that is long enough.
        let mapped = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                SharedNumbers::<N>::SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | anonymous,
                number,
                0,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let numbers = NonNull::new(mapped.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(SharedNumbers { numbers, memory })
    }

    /// The memory, for another process; `None` if only forks of this process can share it.
    pub fn memory(&self) -> Option<BorrowedFd<'_>> {
        self.memory.as_ref().map(AsFd::as_fd)
    }
}

impl<const N: usize> Deref for SharedNumbers<N> {
    type Target = [AtomicU64; N];

    fn deref(&self) -> &[AtomicU64; N] {
        // SAFETY: the memory is mapped until this is dropped, and aligned to a page. Any bytes are
        // valid numbers, and other processes change them atomically too.
        unsafe { self.numbers.as_ref() }
    }
}

impl<const N: usize> Drop for SharedNumbers<N> {
    fn drop(&mut self) {
        // SAFETY: `map` has mapped this memory with this size, and no reference to it is left.
        unsafe { libc::munmap(self.numbers.as_ptr().cast(), SharedNumbers::<N>::SIZE) };
    }
}

/// Numbers that this process shares with processes that it forks later, all 0 at first.
#[derive(Debug)]
pub struct ForkedNumbers {
    numbers: NonNull<AtomicU64>,
    count: usize,
}

// SAFETY: it is a reference to atomic numbers, in memory that only this unmaps.
unsafe impl Send for ForkedNumbers {}
// SAFETY: as above.
unsafe impl Sync for ForkedNumbers {}

impl ForkedNumbers {
    /// Makes so many numbers, at least one.
    pub fn new(count: usize) -> io::Result<ForkedNumbers> {
        let count = count.max(1);
        let size = count.checked_mul(size_of::<AtomicU64>()).ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: a new anonymous mapping, at an address that the kernel chooses.
        let mapped = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let numbers = NonNull::new(mapped.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(ForkedNumbers { numbers, count })
    }
}

impl Deref for ForkedNumbers {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: `new` has mapped memory for so many numbers, which are 0 at first, and it is
        // mapped until this is dropped. Other processes change them atomically too.
        unsafe { std::slice::from_raw_parts(self.numbers.as_ptr(), self.count) }
    }
}

impl Drop for ForkedNumbers {
    fn drop(&mut self) {
        // SAFETY: `new` has mapped this memory with this size, and no reference to it is left.
        unsafe { libc::munmap(self.numbers.as_ptr().cast(), self.count * size_of::<AtomicU64>()) };
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
        // SAFETY: `local` is within `bytes`. The other addresses are those of another process, and
        // one that is not mapped there is an error.
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

/// The number of signals of the kernel.
const SIGNALS: c_int = 64;

/// Gives a signal its default action, in a process of [`Child::fork`].
///
/// It makes the system call itself, because glibc's `sigaction` (2.41 and later) has a lock for
/// SIGABRT. A thread of the caller's, for example one that starts a program, may have held that
/// lock when this process was forked, and does not exist here to release it.
fn default_action(signal: c_int) {
    /// The kernel's structure of handler, flags, restorer and mask, all zero. It is shorter than
    /// this.
    const ACTION: [u64; 8] = [0; 8];
    // SAFETY: the structure is only read. The call has no effect on signals whose action cannot be
    // changed (SIGKILL).
    unsafe {
        let none = std::ptr::null_mut::<libc::c_void>();
        libc::syscall(libc::SYS_rt_sigaction, signal, ACTION.as_ptr(), none, SIGNALS as usize / 8);
    }
}

/// A program's path and arguments, and its environment, as arrays for the kernel. They are made
/// before they are needed.
#[derive(Debug)]
pub struct CommandLine {
    /// The strings that the pointers point to.
    _strings: [Vec<CString>; 2],
    arguments: Vec<*const c_char>,
    environment: Vec<*const c_char>,
}

impl CommandLine {
    /// Makes it of an absolute path with arguments, and an environment. None if one of them
    /// contains a NUL.
    pub fn new(arguments: Vec<OsString>, environment: Vec<OsString>) -> Option<CommandLine> {
        let strings = |strings: Vec<OsString>| -> Option<Vec<CString>> {
            strings.into_iter().map(|string| CString::new(string.into_vec()).ok()).collect()
        };
        let arguments = strings(arguments)?;
        let variables = strings(environment)?;
        let pointers = |strings: &[CString]| {
            strings.iter().map(|string| string.as_ptr()).chain([std::ptr::null()]).collect()
        };
        Some(CommandLine {
            arguments: pointers(&arguments),
            environment: pointers(&variables),
            _strings: [arguments, variables],
        })
    }

    /// The path, the arguments, and a NULL.
    pub fn arguments(&self) -> &[*const c_char] {
        &self.arguments
    }

    /// The environment, and a NULL.
    pub fn environment(&self) -> &[*const c_char] {
        &self.environment
    }
}

/// A program's standard input, output and error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stdio {
    /// All are /dev/null.
    Null,
    /// The output goes to this descriptor, which is none of the first three; the others are
    /// /dev/null.
    Output(c_int),
    /// The program has those of its parent, and ends when its parent ends.
    Inherited,
}

/// A program that a process of [`Child::fork`] runs.
#[derive(Debug)]
pub struct Program(Child);

impl Program {
    /// Starts a program. None if the fork fails.
    pub fn start(command_line: &CommandLine, stdio: Stdio) -> Option<Program> {
        let (arguments, environment) = (command_line.arguments(), command_line.environment());
        let path = *arguments.first()?;
        // SAFETY: it changes nothing.
        let parent = unsafe { libc::getpid() };
        // SAFETY: only system calls. The pointers are valid in the new process's memory too, and
        // all strings and arrays are terminated.
        let run = || unsafe {
            if stdio == Stdio::Inherited {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                if libc::getppid() != parent {
                    libc::_exit(127);
                }
            } else {
                let null = libc::open(c"/dev/null".as_ptr(), libc::O_RDWR);
                let output = if let Stdio::Output(fd) = stdio { fd } else { null };
                for (number, fd) in (0..).zip([null, output, null]) {
                    libc::dup2(fd, number);
                }
            }
            // The first three stay open.
            let _ = libc::syscall(libc::SYS_close_range, 3, c_uint::MAX, 0);
            (1..=SIGNALS).for_each(default_action);
            let mut none = MaybeUninit::<libc::sigset_t>::uninit();
            libc::sigemptyset(none.as_mut_ptr());
            libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut());
            libc::execve(path, arguments.as_ptr(), environment.as_ptr());
            libc::_exit(127)
        };
        // SAFETY: the child makes only system calls.
        unsafe { Child::fork(run) }.ok().map(Program)
    }

    /// Waits until it has ended, or until one of the others is readable. Returns whether it has
    /// ended.
    pub fn wait_ended(&self, [one, other]: [Option<&OwnedFd>; 2]) -> bool {
        wait_ready([Some(&self.0.ended), one, other], -1);
        wait_ready([Some(&self.0.ended), None], 0)
    }

    /// Waits for its end. Returns its status as `waitpid` gives it; none if that is not known.
    pub fn wait(self) -> Option<c_int> {
        self.0.wait()
    }

    /// Ends it.
    pub fn kill(self) {
        self.0.kill();
    }

    /// Waits for its end. Returns whether it has succeeded.
    pub fn succeeded(self) -> bool {
        self.wait() == Some(0)
    }
}

/// The device and the inode of a file, without following a symbolic link. For a process of
/// [`Child::fork`].
pub fn file_id(path: &CStr) -> Option<(u64, u64)> {
    let mut found = std::mem::MaybeUninit::<libc::stat>::uninit();
    // SAFETY: a NUL-terminated path, and storage for the result, which is initialised if the call
    // succeeds.
    unsafe {
        if libc::lstat(path.as_ptr(), found.as_mut_ptr()) != 0 {
            return None;
        }
        let found = found.assume_init();
        Some((found.st_dev, found.st_ino))
    }
}

/// Releases the lock on a guest, or the reservation of a name, for every process that has this
/// descriptor: a socket is shut down, a file is unlocked.
pub fn let_go(fd: &OwnedFd) {
    // SAFETY: each call fails without effect if the descriptor is of the other kind.
    unsafe {
        libc::shutdown(fd.as_raw_fd(), libc::SHUT_RDWR);
        libc::flock(fd.as_raw_fd(), libc::LOCK_UN);
    }
}

/// Whether a file exists. For a process of [`Child::fork`].
pub fn exists(path: &CStr) -> bool {
    file_id(path).is_some()
}

/// Removes a file. For a process of [`Child::fork`].
pub fn unlink(path: &CStr) {
    // SAFETY: a NUL-terminated string.
    unsafe { libc::unlink(path.as_ptr()) };
}

/// Changes a file if it still has this device and inode, and no process has it open and locked as
/// QEMU does with an image. For a process of [`Child::fork`].
pub fn change_unused(path: &CStr, id: (u64, u64), change: fn(&OwnedFd)) {
    // SAFETY: a NUL-terminated string; the descriptor is new, and not used elsewhere.
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
    // SAFETY: an open descriptor, and storage for the result, which is initialised if the call
    // succeeds.
    let same = unsafe {
        libc::fstat(file.as_raw_fd(), found.as_mut_ptr()) == 0 && {
            let found = found.assume_init();
            (found.st_dev, found.st_ino) == id
        }
    };
    let mut lock = image_lock(IMAGE_LOCKS);
    // SAFETY: an open descriptor and an initialised flock, which the call changes.
    let queried = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLK, &raw mut lock) };
    if same && queried == 0 && lock.l_type == libc::F_UNLCK as libc::c_short {
        change(&file);
    }
}

/// Appends a line to a file of lines, if the file still has this device and inode. Half a line at
/// the file's end is overwritten. Returns whether the line was written, and is on disk if `synced`.
/// For a process of [`Child::fork`].
pub fn append(path: &CStr, id: (u64, u64), line: &[u8], synced: bool) -> bool {
    const AT_ONCE: usize = 512;
    let mut found = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: a NUL-terminated string; the descriptor is new, and not used elsewhere. The result is
    // initialised if the call succeeds.
    let (file, found) = unsafe {
        let flags = libc::O_RDWR | libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
        let file = match libc::open(path.as_ptr(), flags) {
            -1 => return false,
            fd => OwnedFd::from_raw_fd(fd),
        };
        if libc::fstat(file.as_raw_fd(), found.as_mut_ptr()) != 0 {
            return false;
        }
        (file, found.assume_init())
    };
    if (found.st_dev, found.st_ino) != id {
        return false;
    }
    // The end of the last whole line.
    let mut end = found.st_size;
    let mut buffer = [0_u8; AT_ONCE];
    while end > 0 {
        let begin = (end - AT_ONCE as i64).max(0);
        let length = (end - begin) as usize;
        // SAFETY: an open descriptor, and a buffer that is not shorter than the length.
        let read =
            unsafe { libc::pread(file.as_raw_fd(), buffer.as_mut_ptr().cast(), length, begin) };
        if read != length as isize {
            return false;
        }
        match buffer.iter().take(length).rposition(|byte| *byte == b'\n') {
            Some(at) => {
                end = begin + at as i64 + 1;
                break;
            }
            None => end = begin,
        }
    }
    // SAFETY: an open descriptor, and a line of the passed length.
    unsafe {
        let fd = file.as_raw_fd();
        libc::ftruncate(fd, end) == 0
            && libc::pwrite(fd, line.as_ptr().cast(), line.len(), end) == line.len() as isize
            && (!synced || libc::fdatasync(fd) == 0)
    }
}

/// Syncs a directory. For a process of [`Child::fork`].
pub fn sync_directory(path: &CStr) -> bool {
    // SAFETY: a NUL-terminated string; the descriptor is new, and not used elsewhere.
    unsafe {
        let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC;
        match libc::open(path.as_ptr(), flags) {
            -1 => false,
            fd => libc::fsync(OwnedFd::from_raw_fd(fd).as_raw_fd()) == 0,
        }
    }
}

/// Empties a file.
pub fn empty(file: &OwnedFd) {
    // SAFETY: an open descriptor.
    unsafe { libc::ftruncate(file.as_raw_fd(), 0) };
}

/// Overwrites the header of a qcow2 image.
pub fn wipe(file: &OwnedFd) {
    const MAGIC: [u8; 4] = *b"QFI\xfb";
    const SECTOR: [u8; 512] = [0; 512];
    let mut magic = [0_u8; MAGIC.len()];
    // SAFETY: an open descriptor, and buffers of the passed lengths.
    unsafe {
        let read = libc::pread(file.as_raw_fd(), magic.as_mut_ptr().cast(), magic.len(), 0);
        if read == MAGIC.len() as isize && magic == MAGIC {
            libc::pwrite(file.as_raw_fd(), SECTOR.as_ptr().cast(), SECTOR.len(), 0);
            libc::fsync(file.as_raw_fd());
        }
    }
}

/// Ends a process of [`Child::fork`].
pub fn exit_now() -> ! {
    // SAFETY: it ends the process without running any handler.
    unsafe { libc::_exit(0) }
}

/// Closes every descriptor except these, which become 0, 1 and so on. For a process of
/// [`Child::fork`].
pub fn keep_only<const N: usize>(fds: [c_int; N]) -> Option<[c_int; N]> {
    let mut kept = [0; N];
    // First they get high numbers, so that none is overwritten, and then their final ones.
    for (to, from) in kept.iter_mut().zip(fds) {
        // SAFETY: it duplicates a descriptor to a free number.
        *to = unsafe { libc::fcntl(from, libc::F_DUPFD_CLOEXEC, N.max(10) as c_int) };
        if *to == -1 {
            return None;
        }
    }
    for (number, from) in kept.iter_mut().enumerate() {
        // SAFETY: in this process these numbers are not used.
        *from = unsafe { libc::dup2(*from, number as c_int) };
    }
    // SAFETY: as above. Linux before 5.9 does not have this call; then the loop below closes them.
    if unsafe { libc::syscall(libc::SYS_close_range, N as c_uint, c_uint::MAX, 0) } == -1 {
        // SAFETY: to close a number that is not open is an error without effect.
        (N as c_int..65536).for_each(|fd| unsafe {
            libc::close(fd);
        });
    }
    Some(std::array::from_fn(|number| number as c_int))
}

/// Takes the `N` descriptors from this number on, which this program has inherited. Returns `None`
/// if one of them is missing.
///
/// # Safety
/// Nothing in this process owns them.
pub unsafe fn inherited<const N: usize>(first: c_int) -> Option<[OwnedFd; N]> {
    let numbers: [c_int; N] = std::array::from_fn(|place| first + place as c_int);
    // SAFETY: a number that is not open is an error without effect.
    let is_there = |fd: &c_int| unsafe { libc::fcntl(*fd, libc::F_SETFD, libc::FD_CLOEXEC) } != -1;
    // SAFETY: they are open, and nothing else owns them.
    numbers.iter().all(is_there).then(|| numbers.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// Sets the name of this process that users see.
pub fn set_process_name(name: &CStr) {
    // SAFETY: a NUL-terminated string, which is copied.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
}

/// The file that this code was loaded from: a shared library, or a program. The kernel's list of
/// mappings says so; of a program the loader knows only what its user called it.
pub fn own_file() -> Option<PathBuf> {
    let own = own_file as fn() -> Option<PathBuf> as usize;
    let mappings = std::fs::read("/proc/self/maps").ok()?;
    mappings.split(|byte| *byte == b'\n').find_map(|mapping| {
        // 7f0c5e000000-7f0c5e021000 r-xp 00000000 fe:00 131   /usr/lib/libinstantsnap.so.0.1.0
        let range = mapping.split(|byte| *byte == b' ').next()?;
        let (begin, end) = std::str::from_utf8(range).ok()?.split_once('-')?;
        let address = |hexadecimal| usize::from_str_radix(hexadecimal, 16).ok();
        let path = mapping.iter().position(|byte| *byte == b'/')?;
        (address(begin)?..address(end)?)
            .contains(&own)
            .then(|| OsStr::from_bytes(&mapping[path..]).into())
    })
}

/// Waits until one of the descriptors is readable or at its end, at most for this time (-1: for
/// ever). Returns whether one is. A signal handler of the caller's does not end the wait.
pub fn wait_ready<const N: usize>(fds: [Option<&OwnedFd>; N], milliseconds: c_int) -> bool {
    // `poll` ignores a negative number.
    let mut polls = fds.map(|fd| libc::pollfd {
        fd: fd.map_or(-1, |fd| fd.as_raw_fd()),
        events: libc::POLLIN,
        revents: 0,
    });
    let end = now() + Duration::from_millis(milliseconds.max(0).unsigned_abs().into());
    let mut left = milliseconds;
    loop {
        // SAFETY: the pointer is to `N` live pollfds.
        let ready = unsafe { libc::poll(polls.as_mut_ptr(), N as libc::nfds_t, left) };
        if ready != -1 || io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return ready > 0;
        }
        if milliseconds >= 0 {
            left = end.saturating_sub(now()).as_millis() as c_int;
        }
    }
}

/// Whether this process has more rights than the user who has started it (a setuid program, for
/// example). Then it must not trust its environment, which that user has set.
pub fn is_secure() -> bool {
    // SAFETY: it changes nothing.
    unsafe { libc::getauxval(libc::AT_SECURE) != 0 }
}

/// Syncs the directory that contains `path`.
pub fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let flags = libc::O_DIRECTORY | libc::O_NONBLOCK;
    File::options()
        .read(true)
        .custom_flags(flags)
        .open(parent.unwrap_or(Path::new(".")))?
        .sync_all()
}

/// Creates a hidden file in the directory of `path`, which is named after it, and ends with this.
pub fn new_file_beside(path: &Path, suffix: &str) -> io::Result<NamedTempFile> {
    let mut prefix = OsString::from(".");
    prefix.push(path.file_name().unwrap_or_default());
    prefix.push(".");
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    tempfile::Builder::new()
        .prefix(&prefix)
        .suffix(suffix)
        .tempfile_in(directory.unwrap_or(Path::new(".")))
}

/// Opens a file or a block device for reading. If another user has put a pipe in its place, this
/// does not wait for a writer.
pub fn open_file(path: &Path) -> io::Result<File> {
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let kind = file.metadata()?.file_type();
    if kind.is_file() || kind.is_block_device() {
        Ok(file)
    } else {
        Err(io::Error::other("it is not a file"))
    }
}

/// Opens a regular file for reading. It is an error if it belongs neither to this user nor to root,
/// or is a symbolic link. Does not wait for the writer of a pipe.
pub fn open_trusted(path: &Path) -> io::Result<File> {
    check_trusted(
        File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW).open(path),
    )
}

/// Like [`open_trusted`], for reading and writing.
pub fn open_trusted_to_write(path: &Path) -> io::Result<File> {
    let flags = libc::O_NONBLOCK | libc::O_NOFOLLOW;
    check_trusted(File::options().read(true).write(true).custom_flags(flags).open(path))
}

/// Like [`open_trusted`], for reading and writing. Creates the file with mode 0600 if it does not
/// exist.
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
        // It is a pipe or a socket.
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

/// Whether files of this user are trusted: it is root or this process's user.
pub fn is_trusted(owner: u32) -> bool {
    owner == 0 || owner == user()
}

/// The effective user of this process.
pub fn user() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// Gives a new file the owner and the permissions of `model`, so that the same users can open it.
pub fn copy_owner_and_mode(file: &File, model: &Path) -> io::Result<()> {
    // An image on network storage has no owner here.
    let Ok(model) = model.metadata() else { return Ok(()) };
    let own = file.metadata()?;
    if (own.uid(), own.gid()) != (model.uid(), model.gid()) {
        match fchown(file, Some(model.uid()), Some(model.gid())) {
            // This process may not set the owner. Then QEMU runs as the same user, or will report
            // that it cannot open the file.
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

/// Whether two paths name the same file, or nodes of the same block device.
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

/// A write lock on these bytes, for a query.
fn image_lock(bytes: Range<i64>) -> libc::flock {
    libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: bytes.start,
        l_len: bytes.end - bytes.start,
        l_pid: 0,
    }
}

/// Marks a file as in use, as QEMU does with an image that it reads. The mark lasts until every
/// copy of this descriptor is closed, in whichever process.
pub fn mark_in_use(file: &File) -> io::Result<()> {
    let mut lock =
        libc::flock { l_type: libc::F_RDLCK as libc::c_short, l_len: 1, ..image_lock(IMAGE_LOCKS) };
    // SAFETY: an open file and an initialised flock.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw mut lock) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Whether another process has a lock on some of these bytes of a file.
pub fn is_locked(file: &File, bytes: Range<i64>) -> bool {
    let mut lock = image_lock(bytes);
    // SAFETY: an open file and an initialised flock, which the call changes.
    let queried = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLK, &raw mut lock) };
    queried == 0 && lock.l_type != libc::F_UNLCK as libc::c_short
}

/// Removes a file, if it still exists. A block device's node stays, and so does a link to one: to
/// remove it would free nothing, and its owner needs the name.
pub fn remove_file(path: &Path) -> io::Result<()> {
    if std::fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device()) {
        return Ok(());
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Whether another process has this pipe open; none if its descriptors cannot be read.
pub fn has_open(pid: u32, pipe: &OwnedFd) -> Option<bool> {
    let pipe = rustix::fs::fstat(pipe).ok()?;
    let link = format!("pipe:[{}]", pipe.st_ino);
    for fd in std::fs::read_dir(format!("/proc/{pid}/fd")).ok()? {
        match fd.ok()?.path().read_link() {
            Ok(file) if file.as_os_str() == link.as_str() => return Some(true),
            Ok(_) => {}
            // The process has closed it since.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(_) => return None,
        }
    }
    Some(false)
}

/// The process at the other end of a Unix socket; none if it is in a PID namespace that cannot be
/// seen from here.
pub fn peer_pid(socket: BorrowedFd) -> Option<u32> {
    let mut credentials = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut size = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: both point to live storage of the passed size, and the descriptor is open.
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
