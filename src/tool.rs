// SPDX-License-Identifier: LGPL-2.1-or-later

//! The programs that the library runs: qemu-img, xmllint, virsh.
//!
//! A program is found at an absolute path, gets an environment of its own, and nobody but the
//! library takes its exit status.
//!
//! A caller that ignores SIGCHLD, or a thread of the caller's that waits for any child, takes away
//! the status of a plain child process. So a process in between starts the program and reports the
//! status through a socket: it raises no SIGCHLD, no plain `wait` sees it, and in it SIGCHLD is not
//! ignored. A status that does not arrive is a failure: what the program has done is not known
//! then.
//!
//! A program that only looks at images has a deadline: an image can name another on a server that
//! never answers. One that changes an image has none, as it must not be ended halfway.

use std::env;
use std::ffi::{OsStr, OsString, c_int};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair};
use rustix::pipe::{PipeFlags, pipe_with};

use crate::error::{Code, Error};
use crate::sys::{self, Child, CommandLine, Program, Stdio};

/// Where programs are looked for when the caller's PATH is not to be trusted, or there is none.
const DIRECTORIES: &str = "/usr/bin:/bin:/usr/sbin:/sbin";

/// What a program keeps of the caller's environment: where a user's files and sockets are, and
/// where the program's own libraries and modules are. What is preloaded into the caller is not for
/// the program, nor are this library's settings.
const KEPT: [&str; 12] = [
    "HOME",
    "USER",
    "LOGNAME",
    "TMPDIR",
    "XDG_CACHE_HOME",
    "XDG_CONFIG_HOME",
    "XDG_DATA_HOME",
    "XDG_RUNTIME_DIR",
    "LIBVIRT_AUTH_FILE",
    "KRB5CCNAME",
    "LD_LIBRARY_PATH",
    "QEMU_MODULE_DIR",
];

/// The process in between has its own descriptors only.
const READY: u8 = b'r';
/// For it to get there.
const READY_MS: c_int = 10_000;
/// Before the status in a report.
const ENDED: u8 = b'e';

/// A program to be run.
#[derive(Debug)]
pub struct Tool {
    name: &'static str,
    arguments: Vec<OsString>,
}

impl Tool {
    /// By its name, without arguments.
    pub fn new(name: &'static str) -> Tool {
        Tool { name, arguments: Vec::new() }
    }

    /// One more argument.
    pub fn arg(&mut self, argument: impl AsRef<OsStr>) -> &mut Tool {
        self.arguments.push(argument.as_ref().to_owned());
        self
    }

    /// More arguments.
    pub fn args<S: AsRef<OsStr>>(&mut self, arguments: impl IntoIterator<Item = S>) -> &mut Tool {
        self.arguments.extend(arguments.into_iter().map(|argument| argument.as_ref().to_owned()));
        self
    }

    /// Runs it. An error is what it said on its standard error, or how it ended.
    pub fn run(&self) -> Result<(), String> {
        self.execute(None).map(drop)
    }

    /// The same with a file as its standard input.
    pub fn run_on(&self, file: &File) -> Result<(), String> {
        self.execute(Some(file)).map(drop)
    }

    /// Runs a program that changes nothing but this file of ours, its standard input. After this
    /// time it is ended, and the code of the error is `OperationTimeout`.
    pub fn run_on_within(&self, file: &File, limit: Duration) -> Result<(), Error> {
        self.execute_within(Some(file), limit).map(drop)
    }

    /// The same for one that changes nothing; what it wrote to its standard output.
    pub fn output_within(&self, limit: Duration) -> Result<Vec<u8>, Error> {
        self.execute_within(None, limit)
    }

    fn execute_within(&self, stdin: Option<&File>, limit: Duration) -> Result<Vec<u8>, Error> {
        let late = || {
            let name = self.name;
            let waits = "an image that it opens can be on a server, or in a file system, that does not answer";
            Error::new(
                Code::OperationTimeout,
                format!("{name} did not end within {limit:?} ({waits})"),
            )
        };
        let said = self.start(stdin, Some(Instant::now() + limit));
        self.judge(said.map_err(failed)?.ok_or_else(late)?).map_err(failed)
    }

    fn execute(&self, stdin: Option<&File>) -> Result<Vec<u8>, String> {
        // Without a deadline there is always something said.
        self.start(stdin, None)?.map_or_else(|| Err(self.name.into()), |said| self.judge(said))
    }

    /// Runs it; nothing where it was ended at the deadline.
    fn start(
        &self,
        stdin: Option<&File>,
        deadline: Option<Instant>,
    ) -> Result<Option<Said>, String> {
        let (name, package) = (self.name, package(self.name));
        let program = find(name)
            .ok_or_else(|| format!("cannot run {name} (install {package}): it was not found"))?;
        let words = std::iter::once(program.into_os_string()).chain(self.arguments.iter().cloned());
        let Some(command) = command_line(words) else {
            return Err(format!("cannot run {name}: an argument holds a NUL"));
        };
        run(&command, stdin, deadline).map_err(|error| format!("cannot run {name}: {error}"))
    }

    fn judge(&self, said: Said) -> Result<Vec<u8>, String> {
        let (name, Said { status, output, complaint }) = (self.name, said);
        let complaint = String::from_utf8_lossy(&complaint).trim().to_owned();
        match status {
            Some(status) if status.success() => Ok(output),
            Some(status) if complaint.is_empty() => Err(format!("{name}: {status}")),
            Some(_) => Err(complaint),
            None => {
                Err(format!("{name} was started, and how it ended cannot be known {complaint}")
                    .trim()
                    .to_owned())
            }
        }
    }
}

fn failed(reason: String) -> Error {
    Error::new(Code::OperationFailed, reason)
}

fn package(name: &str) -> &'static str {
    match name {
        "xmllint" => "libxml2-utils",
        "virsh" => "libvirt-clients",
        _ => "qemu-utils",
    }
}

/// The absolute path of a program that can be run.
pub fn find(name: &str) -> Option<PathBuf> {
    let runs = |file: &PathBuf| {
        file.is_absolute()
            && file
                .metadata()
                .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    };
    env::split_paths(&search_path(sys::is_secure(), env::var_os("PATH")))
        .map(|directory| directory.join(name))
        .find(runs)
}

/// Where programs are looked for. In a process with more rights than the user who has started it,
/// PATH is that user's word.
fn search_path(secure: bool, path: Option<OsString>) -> OsString {
    path.filter(|path| !secure && !path.is_empty()).unwrap_or_else(|| DIRECTORIES.into())
}

/// A program's environment.
fn environment(secure: bool) -> Vec<OsString> {
    let variable = |name: &str, value: &OsStr| {
        let mut variable = OsString::from(format!("{name}="));
        variable.push(value);
        variable
    };
    let path = search_path(secure, env::var_os("PATH"));
    // The words of messages are read.
    let own = [variable("PATH", &path), variable("LC_ALL", OsStr::new("C"))];
    let kept = KEPT
        .iter()
        .filter(|_| !secure)
        .filter_map(|name| Some(variable(name, &env::var_os(name)?)));
    own.into_iter().chain(kept).collect()
}

/// A program's absolute path and arguments, with the environment that it gets; nothing where one of
/// them holds a NUL.
pub fn command_line(words: impl IntoIterator<Item = impl Into<OsString>>) -> Option<CommandLine> {
    CommandLine::new(words.into_iter().map(Into::into).collect(), environment(sys::is_secure()))
}

/// What a program that has ended has said.
struct Said {
    /// How it ended, where that is known.
    status: Option<ExitStatus>,
    output: Vec<u8>,
    complaint: Vec<u8>,
}

/// Nothing where the deadline has passed: then the program was ended.
fn run(
    command: &CommandLine,
    stdin: Option<&File>,
    deadline: Option<Instant>,
) -> io::Result<Option<Said>> {
    let null =
        File::from(rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?);
    let stdin = stdin.unwrap_or(&null);
    let (output, stdout) = pipe_with(PipeFlags::CLOEXEC)?;
    let (complaint, stderr) = pipe_with(PipeFlags::CLOEXEC)?;
    let (report, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    for fd in [&output, &complaint, &report] {
        rustix::io::ioctl_fionbio(fd, true)?;
    }
    let fds = [stdin.as_raw_fd(), stdout.as_raw_fd(), stderr.as_raw_fd(), theirs.as_raw_fd()];
    // Until it has closed them it holds a copy of every descriptor of this process, locks and names
    // among them.
    let between = sys::while_forking(|| {
        // SAFETY: the child makes system calls only, on memory that exists already, and never
        // returns.
        let child = unsafe { Child::fork(|| start_and_report(command, fds)) };
        drop((stdout, stderr, theirs));
        if child.is_ok() {
            sys::wait_ready([Some(&report), None], READY_MS);
        }
        child
    })?;

    // The ends of the pipes are not waited for: a process that another thread has forked meanwhile
    // may have them too.
    let mut said = Said { status: None, output: Vec::new(), complaint: Vec::new() };
    let mut reported = Vec::new();
    let mut open = [true; 3];
    let mut ended = false;
    while !ended {
        let fds = [&report, &output, &complaint];
        let mut polls: Vec<_> =
            std::iter::once(PollFd::from_borrowed_fd(between.ended(), PollFlags::IN))
                .chain(
                    fds.iter()
                        .zip(open)
                        .filter(|(_, open)| *open)
                        .map(|(fd, _)| PollFd::new(*fd, PollFlags::IN)),
                )
                .collect();
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            // The program ends with it.
            between.kill();
            return Ok(None);
        }
        let timespec = |left: Duration| Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: left.subsec_nanos().into(),
        };
        match poll(&mut polls, left.map(timespec).as_ref()) {
            Err(Errno::INTR) => continue,
            polled => polled?,
        };
        // What it had written before is read below.
        ended = !polls[0].revents().is_empty();
        for ((fd, open), into) in
            fds.iter().zip(&mut open).zip([&mut reported, &mut said.output, &mut said.complaint])
        {
            *open = *open && read_what_is_there(fd, into)?;
        }
    }
    said.status = status(&reported);
    Ok(Some(said))
}

/// Whether there may be more.
fn read_what_is_there(fd: &OwnedFd, into: &mut Vec<u8>) -> io::Result<bool> {
    let mut buffer = [0; 4096];
    loop {
        match rustix::io::read(fd.as_fd(), &mut buffer) {
            Ok(0) => return Ok(false),
            Ok(got) => into.extend_from_slice(&buffer[..got]),
            Err(Errno::AGAIN) => return Ok(true),
            Err(Errno::INTR) => {}
            // Of a socket whose other end was killed.
            Err(Errno::CONNRESET) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
    }
}

/// The status in a report that is whole.
fn status(report: &[u8]) -> Option<ExitStatus> {
    let rest = report.strip_prefix(&[READY])?.strip_prefix(&[ENDED])?;
    Some(ExitStatus::from_raw(c_int::from_ne_bytes(rest.try_into().ok()?)))
}

/// The process in between. `fds` become the program's standard input, output and error; the report
/// goes to the last.
fn start_and_report(command: &CommandLine, fds: [c_int; 4]) -> ! {
    let Some([.., report]) = sys::keep_only(fds) else { sys::exit_now() };
    // SAFETY: it was just made, and is nobody else's in this process.
    let report = unsafe { OwnedFd::from_raw_fd(report) };
    let _ = send(&report, &[READY], SendFlags::NOSIGNAL);
    if let Some(status) = Program::start(command, Stdio::Inherited).and_then(Program::wait) {
        let [a, b, c, d] = status.to_ne_bytes();
        let _ = send(&report, &[ENDED, a, b, c, d], SendFlags::NOSIGNAL);
    }
    sys::exit_now()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// More than a test needs.
    const LIMIT: Duration = Duration::from_secs(60);

    fn shell(script: &str) -> Tool {
        let mut tool = Tool::new("sh");
        tool.args(["-c", script]);
        tool
    }

    #[test]
    fn a_program_that_fails_is_heard_and_one_that_is_killed_silently_has_failed() {
        assert_eq!(shell("printf said").output_within(LIMIT).unwrap(), b"said");
        assert_eq!(shell("echo why >&2; exit 1").run().unwrap_err(), "why");
        assert_eq!(shell("exit 3").run().unwrap_err(), "sh: exit status: 3");
        assert_eq!(shell("kill -9 $$").run().unwrap_err(), "sh: signal: 9 (SIGKILL)");
        // More than a pipe holds.
        assert_eq!(shell("head -c 300000 /dev/zero").output_within(LIMIT).unwrap().len(), 300_000);
    }

    /// The process between the library and the program is killed: nobody knows what the program has
    /// done.
    #[test]
    fn what_cannot_be_known_is_a_failure_and_the_program_does_not_go_on_alone() {
        let directory = tempfile::tempdir().unwrap();
        let pid = directory.path().join("pid");
        let error = shell(&format!("echo $$ > {}; kill -9 $PPID; exec sleep 60", pid.display()))
            .run()
            .unwrap_err();
        assert!(error.contains("cannot be known"), "{error}");
        wait_ended(&pid);
    }

    /// Waits until the process whose number is in the file has ended; nobody has to have taken note
    /// of that.
    fn wait_ended(pid: &std::path::Path) {
        let pid = std::fs::read_to_string(pid).unwrap();
        let stat = format!("/proc/{}/stat", pid.trim());
        while std::fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z")) {
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_program_that_only_looks_is_ended_at_its_deadline() {
        let directory = tempfile::tempdir().unwrap();
        let pid = directory.path().join("pid");
        let mut limit = Duration::from_millis(100);
        // Until it had the time to say who it is.
        while !std::fs::read_to_string(&pid).is_ok_and(|pid| pid.ends_with('\n')) {
            let hangs = shell(&format!("echo $$ > {}; exec sleep 600", pid.display()));
            let error = hangs.output_within(limit).unwrap_err();
            assert_eq!(error.code, Code::OperationTimeout, "{error}");
            assert!(error.message.contains("sh did not end within"), "{error}");
            limit *= 2;
        }
        wait_ended(&pid);
    }

    /// A lock of the C library's that another thread holds at the fork is held for good in the new
    /// process.
    #[test]
    fn programs_start_while_another_thread_holds_the_c_librarys_lock_of_signals() {
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    // SAFETY: the action that it has already.
                    unsafe { libc::signal(libc::SIGABRT, libc::SIG_DFL) };
                }
            });
            let results: Vec<_> = (0..30).map(|_| Tool::new("true").run()).collect();
            done.store(true, std::sync::atomic::Ordering::Relaxed);
            assert!(results.iter().all(Result::is_ok), "{results:?}");
        });
    }

    #[test]
    fn a_program_has_no_preloaded_library_and_no_setting_of_ours() {
        let said = String::from_utf8(Tool::new("env").output_within(LIMIT).unwrap()).unwrap();
        let names: Vec<_> =
            said.lines().filter_map(|line| line.split_once('=')).map(|(name, _)| name).collect();
        assert!(names.contains(&"PATH"), "{said}");
        assert!(
            names.iter().all(|name| KEPT.contains(name) || ["PATH", "LC_ALL"].contains(name)),
            "{said}"
        );
    }

    #[test]
    fn a_setuid_process_does_not_search_the_path_of_its_user() {
        let path = || Some(OsString::from("/home/user/bin"));
        assert_eq!(search_path(false, path()), "/home/user/bin");
        assert_eq!(search_path(true, path()), DIRECTORIES);
        assert_eq!(search_path(false, None), DIRECTORIES);
        assert_eq!(
            environment(true),
            [format!("PATH={DIRECTORIES}").into(), OsString::from("LC_ALL=C")]
        );
    }
}
