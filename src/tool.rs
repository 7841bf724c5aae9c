// SPDX-License-Identifier: LGPL-2.1-or-later

//! Runs the programs that the library needs: qemu-img, xmllint, virsh.
//!
//! A program has an absolute path, which the build has fixed (`core/build.rs`) unless the caller's
//! environment names another one. It gets an environment of its own, and only the library
//! takes its exit status.
//!
//! The status of an ordinary child process is lost if the caller ignores SIGCHLD, or if a thread of
//! the caller's waits for any child. So an intermediate process starts the program, and reports the
//! status through a socket. Its own end raises no SIGCHLD, an ordinary `wait` does not see it, and
//! SIGCHLD is not ignored in it. A missing status is a failure, because it is not known then what
//! the program has done.
//!
//! A program that only reads images has a deadline, because an image can name another one on a
//! server that never answers. A program that changes an image has none, because it must not be
//! killed halfway.

use std::env;
use std::ffi::{OsStr, OsString, c_int};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair};
use rustix::pipe::{PipeFlags, pipe_with};

use crate::error::{Code, Error};
use crate::sys::{self, Child, CommandLine, Program, Stdio};

/// The search path for programs if the caller's PATH cannot be trusted, or does not exist.
const DIRECTORIES: &str = "/usr/bin:/bin:/usr/sbin:/sbin";

/// The programs, each with the variable that names another one, and with the path that the build
/// has fixed.
const PROGRAMS: [(&str, &str, Option<&str>); 3] = [
    ("qemu-img", "INSTANTSNAP_QEMU_IMG", option_env!("INSTANTSNAP_QEMU_IMG")),
    ("virsh", "INSTANTSNAP_VIRSH", option_env!("INSTANTSNAP_VIRSH")),
    ("xmllint", "INSTANTSNAP_XMLLINT", option_env!("INSTANTSNAP_XMLLINT")),
];

/// The variables of the caller's environment that a program gets: they say where a user's files and
/// sockets are, and where the program's own libraries and modules are. LD_PRELOAD and this
/// library's settings are not for the program.
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

/// The intermediate process reports that it has closed the descriptors that are not for it.
const READY: u8 = b'r';
/// How long to wait for that.
const READY_MS: c_int = 10_000;
/// Precedes the status in a report.
const ENDED: u8 = b'e';

/// A program with its arguments.
#[derive(Debug)]
pub struct Tool {
    name: &'static str,
    arguments: Vec<OsString>,
}

impl Tool {
    /// The program of this name, without arguments.
    pub fn new(name: &'static str) -> Tool {
        Tool { name, arguments: Vec::new() }
    }

    /// Adds an argument.
    pub fn arg(&mut self, argument: impl AsRef<OsStr>) -> &mut Tool {
        self.arguments.push(argument.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    pub fn args<S: AsRef<OsStr>>(&mut self, arguments: impl IntoIterator<Item = S>) -> &mut Tool {
        self.arguments.extend(arguments.into_iter().map(|argument| argument.as_ref().to_owned()));
        self
    }

    /// Runs the program. The error is its standard error, or its exit status.
    pub fn run(&self) -> Result<(), String> {
        self.execute(None).map(drop)
    }

    /// Like [`Tool::run`], with a file as the standard input.
    pub fn run_on(&self, file: &File) -> Result<(), String> {
        self.execute(Some(file)).map(drop)
    }

    /// Runs a program that changes nothing except this file of ours, its standard input. After this
    /// time it is killed, and the code of the error is `OperationTimeout`.
    pub fn run_on_within(&self, file: &File, limit: Duration) -> Result<(), Error> {
        self.execute_within(Some(file), limit).map(drop)
    }

    /// Runs a program that changes nothing, with the same limit. Returns its standard output.
    pub fn output_within(&self, limit: Duration) -> Result<Vec<u8>, Error> {
        self.execute_within(None, limit)
    }

    fn execute_within(&self, stdin: Option<&File>, limit: Duration) -> Result<Vec<u8>, Error> {
        let late = || {
            let name = self.name;
            Error::new(
                Code::OperationTimeout,
                format!(
                    "{name} did not end within {limit:?} (an image that it opens can be on a \
                     server, or in a file system, that does not answer)"
                ),
            )
        };
        let output = self.start(stdin, Some(Instant::now() + limit));
        self.judge(output.map_err(failed)?.ok_or_else(late)?).map_err(failed)
    }

    fn execute(&self, stdin: Option<&File>) -> Result<Vec<u8>, String> {
        // Without a deadline there is always an output.
        self.start(stdin, None)?.map_or_else(|| Err(self.name.into()), |output| self.judge(output))
    }

    /// Runs the program. None if it was killed at the deadline.
    fn start(
        &self,
        stdin: Option<&File>,
        deadline: Option<Instant>,
    ) -> Result<Option<ToolOutput>, String> {
        let (name, package) = (self.name, package(self.name));
        let program = look_for(name)
            .map_err(|why| format!("cannot run {name} (install {package}): {why}"))?;
        let arguments =
            std::iter::once(program.into_os_string()).chain(self.arguments.iter().cloned());
        let Some(command) = command_line(arguments) else {
            return Err(format!("cannot run {name}: an argument contains a NUL"));
        };
        run(&command, stdin, deadline).map_err(|error| format!("cannot run {name}: {error}"))
    }

    /// The standard output of a program that succeeded, or the error of one that failed.
    fn judge(&self, output: ToolOutput) -> Result<Vec<u8>, String> {
        let (name, ToolOutput { status, stdout, stderr }) = (self.name, output);
        let stderr = String::from_utf8_lossy(&stderr).trim().to_owned();
        match status {
            Some(status) if status.success() => Ok(stdout),
            Some(status) if stderr.is_empty() => Err(format!("{name}: {status}")),
            Some(_) => Err(stderr),
            None => {
                Err(format!("{name} was started, but its exit status cannot be known {stderr}")
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

/// The absolute path of an executable program.
pub fn find(name: &str) -> Option<PathBuf> {
    look_for(name).ok()
}

/// The same, or the reason why there is none.
fn look_for(name: &str) -> Result<PathBuf, String> {
    let known = PROGRAMS.iter().find(|(program, ..)| *program == name);
    let named = known.and_then(|(_, variable, _)| env::var_os(variable));
    let built_in = known.and_then(|(.., path)| *path);
    choose(name, sys::is_secure(), named, built_in, env::var_os("PATH"))
}

/// The program that a variable names, or else the one that the build has fixed, or else the first
/// one in PATH. The variable is ignored in a process with more rights than the user who has started
/// it, because that user has set it.
fn choose(
    name: &str,
    secure: bool,
    named: Option<OsString>,
    built_in: Option<&str>,
    path: Option<OsString>,
) -> Result<PathBuf, String> {
    let named = named.filter(|named| !secure && !named.is_empty());
    let built_in = built_in.filter(|path| !path.is_empty());
    match named.or_else(|| built_in.map(OsString::from)).map(PathBuf::from) {
        Some(program) if is_program(&program) => Ok(program),
        Some(program) => Err(format!("'{}' is no program", program.display())),
        None => env::split_paths(&search_path(secure, path))
            .map(|directory| directory.join(name))
            .find(|file| is_program(file))
            .ok_or_else(|| "it was not found".into()),
    }
}

/// Whether this is the absolute path of a program.
pub fn is_program(file: &Path) -> bool {
    file.is_absolute()
        && file
            .metadata()
            .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// Whether a program that others run is installed.
pub fn is_installed(name: &str) -> bool {
    let path = search_path(sys::is_secure(), env::var_os("PATH"));
    env::split_paths(&path)
        .chain(env::split_paths(DIRECTORIES))
        .any(|directory| directory.is_absolute() && is_program(&directory.join(name)))
}

/// The directories in which programs are searched. PATH is ignored in a process with more rights
/// than the user who has started it, because that user has set it.
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
    // The library reads some messages, which must not be translated.
    let own = [variable("PATH", &path), variable("LC_ALL", OsStr::new("C"))];
    let kept = KEPT
        .iter()
        .filter(|_| !secure)
        .filter_map(|name| Some(variable(name, &env::var_os(name)?)));
    own.into_iter().chain(kept).collect()
}

/// A program's absolute path and arguments, with the environment that it gets. None if one of them
/// contains a NUL.
pub fn command_line(
    arguments: impl IntoIterator<Item = impl Into<OsString>>,
) -> Option<CommandLine> {
    CommandLine::new(arguments.into_iter().map(Into::into).collect(), environment(sys::is_secure()))
}

/// The result of a program that has ended.
struct ToolOutput {
    /// Its exit status; none if that is not known.
    status: Option<ExitStatus>,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

/// Runs a program. None if the deadline has passed, and the program was killed.
fn run(
    command: &CommandLine,
    stdin: Option<&File>,
    deadline: Option<Instant>,
) -> io::Result<Option<ToolOutput>> {
    let null =
        File::from(rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?);
    let stdin = stdin.unwrap_or(&null);
    let (stdout, child_stdout) = pipe_with(PipeFlags::CLOEXEC)?;
    let (stderr, child_stderr) = pipe_with(PipeFlags::CLOEXEC)?;
    let (report, child_report) =
        socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    for fd in [&stdout, &stderr, &report] {
        rustix::io::ioctl_fionbio(fd, true)?;
    }
    let fds = [
        stdin.as_raw_fd(),
        child_stdout.as_raw_fd(),
        child_stderr.as_raw_fd(),
        child_report.as_raw_fd(),
    ];
    // Until the intermediate process is ready, it has a copy of every descriptor of this process,
    // those of locks and names too.
    let intermediate = sys::while_forking(|| {
        // SAFETY: the child makes only system calls, on memory that exists already, and never
        // returns.
        let child = unsafe { Child::fork(|| start_and_report(command, fds)) };
        drop((child_stdout, child_stderr, child_report));
        if child.is_ok() {
            sys::wait_ready([Some(&report), None], READY_MS);
        }
        child
    })?;

    // This waits for the end of the process, and not for that of the pipes: a process that another
    // thread has forked meanwhile may have the pipes too.
    let mut output = ToolOutput { status: None, stdout: Vec::new(), stderr: Vec::new() };
    let mut reported = Vec::new();
    let mut open = [true; 3];
    let mut ended = false;
    while !ended {
        let fds = [&report, &stdout, &stderr];
        let mut polls: Vec<_> =
            std::iter::once(PollFd::from_borrowed_fd(intermediate.ended(), PollFlags::IN))
                .chain(
                    fds.iter()
                        .zip(open)
                        .filter(|(_, open)| *open)
                        .map(|(fd, _)| PollFd::new(*fd, PollFlags::IN)),
                )
                .collect();
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            // The program ends together with the intermediate process.
            intermediate.kill();
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
        // All that was written before the end is read below.
        ended = !polls[0].revents().is_empty();
        let buffers = [&mut reported, &mut output.stdout, &mut output.stderr];
        for ((fd, open), buffer) in fds.iter().zip(&mut open).zip(buffers) {
            *open = *open && read_available(fd, buffer)?;
        }
    }
    output.status = status(&reported);
    Ok(Some(output))
}

/// Reads the data that is available. Returns whether more may come.
fn read_available(fd: &OwnedFd, into: &mut Vec<u8>) -> io::Result<bool> {
    let mut buffer = [0; 4096];
    loop {
        match rustix::io::read(fd.as_fd(), &mut buffer) {
            Ok(0) => return Ok(false),
            Ok(length) => into.extend_from_slice(&buffer[..length]),
            Err(Errno::AGAIN) => return Ok(true),
            Err(Errno::INTR) => {}
            // The process at the socket's other end was killed.
            Err(Errno::CONNRESET) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
    }
}

/// The exit status in a report; none if the report is not complete.
fn status(report: &[u8]) -> Option<ExitStatus> {
    let rest = report.strip_prefix(&[READY])?.strip_prefix(&[ENDED])?;
    Some(ExitStatus::from_raw(c_int::from_ne_bytes(rest.try_into().ok()?)))
}

/// The body of the intermediate process. `fds` are the program's standard input, output and error,
/// and the socket for the report.
fn start_and_report(command: &CommandLine, fds: [c_int; 4]) -> ! {
    let Some([.., report]) = sys::keep_only(fds) else { sys::exit_now() };
    // SAFETY: it is new, and not used elsewhere in this process.
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

    /// No test takes longer.
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
        // This is more than a pipe holds.
        assert_eq!(shell("head -c 300000 /dev/zero").output_within(LIMIT).unwrap().len(), 300_000);
    }

    /// The intermediate process is killed, so it is not known what the program has done.
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

    /// Waits until the process whose number is in the file has ended. It may be a zombie.
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
        // The limit grows until the program has had the time to write its number.
        while !std::fs::read_to_string(&pid).is_ok_and(|pid| pid.ends_with('\n')) {
            let hangs = shell(&format!("echo $$ > {}; exec sleep 600", pid.display()));
            let error = hangs.output_within(limit).unwrap_err();
            assert_eq!(error.code, Code::OperationTimeout, "{error}");
            assert!(error.message.contains("sh did not end within"), "{error}");
            limit *= 2;
        }
        wait_ended(&pid);
    }

    /// If another thread holds a lock of the C library's at the fork, it is never released in the
    /// new process.
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
        let output = String::from_utf8(Tool::new("env").output_within(LIMIT).unwrap()).unwrap();
        let names: Vec<_> =
            output.lines().filter_map(|line| line.split_once('=')).map(|(name, _)| name).collect();
        assert!(names.contains(&"PATH"), "{output}");
        assert!(
            names.iter().all(|name| KEPT.contains(name) || ["PATH", "LC_ALL"].contains(name)),
            "{output}"
        );
    }

    #[test]
    fn a_program_is_the_one_that_is_named_or_the_builds_or_the_first_in_path() {
        let directory = tempfile::tempdir().unwrap();
        let place = |name: &str, mode| {
            let file = directory.path().join(name);
            std::fs::write(&file, "").unwrap();
            std::fs::set_permissions(&file, PermissionsExt::from_mode(mode)).unwrap();
            file
        };
        let [named, built_in, first] = ["named", "built-in", "tool"].map(|name| place(name, 0o755));
        let none = place("none", 0o644);
        let path = || Some(directory.path().into());
        let choose = |secure, named: Option<&PathBuf>, built_in: Option<&PathBuf>| {
            let built_in = built_in.map(|file| file.to_str().unwrap());
            choose("tool", secure, named.map(OsString::from), built_in, path())
        };
        assert_eq!(choose(false, Some(&named), Some(&built_in)), Ok(named.clone()));
        assert_eq!(choose(false, Some(&PathBuf::new()), Some(&built_in)), Ok(built_in.clone()));
        assert_eq!(choose(false, None, Some(&built_in)), Ok(built_in.clone()));
        assert_eq!(choose(false, None, None), Ok(first));
        // A user who has started a setuid process does not choose its programs.
        assert_eq!(choose(true, Some(&named), Some(&built_in)), Ok(built_in.clone()));
        assert!(choose(true, Some(&named), None).is_err());
        // No other takes the place of one that was chosen.
        for wrong in [&none, &directory.path().join("gone"), &PathBuf::from("named")] {
            let error = choose(false, Some(wrong), Some(&built_in)).unwrap_err();
            assert!(error.contains(wrong.to_str().unwrap()), "{error}");
            choose(false, None, Some(wrong)).unwrap_err();
        }
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
