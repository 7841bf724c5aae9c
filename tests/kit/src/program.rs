// SPDX-License-Identifier: LGPL-2.1-or-later

//! The program that runs the tests. Each test has a process of its own, so that it can change its
//! environment, crash or hang without affecting another test.
//!
//! A test that cannot be run here calls [`skip`], and is counted as ignored, with its reason. The
//! output of a test is shown where it fails. A test that takes longer than its limit is ended
//! together with its QEMUs, and the place where it hung is printed.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::panic::{catch_unwind, resume_unwind};
use std::process::{Child, Command, ExitCode, ExitStatus};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

use crate::run;
use crate::thorough;

/// The variable with the time limit of a test, in seconds.
pub const LIMIT: &str = "INSTANTSNAP_TEST_LIMIT";
/// The variable with the name of the function that a process runs.
const FUNCTION: &str = "INSTANTSNAP_TEST_FUNCTION";
/// The exit status of a skipped test. The last line of its output is the reason.
const SKIPPED: u8 = 77;
/// The memory that a test can need: two guests and a libvirtd.
const MEMORY_OF_A_TEST: u64 = 1 << 30;

/// The purpose of a function.
#[derive(Clone, Copy, PartialEq)]
pub enum Kind {
    /// A test. Long tests are started before the others.
    Test { long: bool },
    /// Another process of a test: see [`process`].
    Process,
}

/// A function that is marked with `#[test]` or `#[process]`.
pub struct Entry {
    pub module: &'static str,
    pub name: &'static str,
    pub run: fn(),
    pub kind: Kind,
}

inventory::collect!(Entry);

impl Entry {
    /// The path that the command line names it by, without the program's name.
    fn path(&self) -> String {
        match self.module.split_once("::") {
            Some((_, module)) => format!("{module}::{}", self.name),
            None => self.name.into(),
        }
    }
}

struct Skip(String);

/// Ends this test, which cannot be run here or now, for this reason.
pub fn skip(reason: impl std::fmt::Display) -> ! {
    resume_unwind(Box::new(Skip(reason.to_string())))
}

/// A command that runs a `#[process]` of the caller's own module in another process.
pub fn process(module: &str, name: &str) -> Command {
    let path =
        module.split_once("::").map_or(name.into(), |(_, module)| format!("{module}::{name}"));
    let mut command = Command::new(std::env::current_exe().expect("a program has a file"));
    command.env(FUNCTION, path);
    command
}

/// Runs the tests that the command line selects, which are all by default. The options and filters
/// are those of every Rust test program. `--ignored` runs the functions that are not tests
/// themselves.
pub fn main() -> ExitCode {
    if let Ok(path) = std::env::var(FUNCTION) {
        // SAFETY: no other thread runs yet.
        unsafe { std::env::remove_var(FUNCTION) };
        return run_here(&path);
    }
    let (options, filters) = split(std::env::args());
    let mut arguments = Arguments::from_iter(options);
    arguments.test_threads = arguments.test_threads.or(Some(concurrency()));
    let _run = run::begin();
    let mut entries: Vec<_> = inventory::iter::<Entry>.into_iter().collect();
    entries.sort_by_key(|entry| (entry.kind != Kind::Test { long: true }, entry.path()));
    if !arguments.ignored {
        entries.retain(|entry| entry.kind != Kind::Process);
    }
    let asked_for = |path: &str| match arguments.exact {
        true => filters.iter().any(|filter| filter == path),
        false => filters.iter().any(|filter| path.contains(filter.as_str())),
    };
    entries.retain(|entry| filters.is_empty() || asked_for(&entry.path()));
    let trial = |entry: &Entry| {
        let path = entry.path();
        let trial = Trial::ignorable_test(path.clone(), move || run_in_process(&path));
        trial.with_ignored_flag(entry.kind == Kind::Process)
    };
    let conclusion = libtest_mimic::run(&arguments, entries.into_iter().map(trial).collect());
    print_slowest();
    conclusion.exit_code()
}

/// Splits the arguments into options and names of tests. Rust's own test programs accept several
/// names.
fn split(arguments: impl Iterator<Item = String>) -> (Vec<String>, Vec<String>) {
    const WITH_VALUE: [&str; 6] =
        ["--color", "--format", "--logfile", "--skip", "--test-threads", "-Z"];
    let (mut options, mut filters, mut is_value) = (Vec::new(), Vec::new(), true);
    for argument in arguments {
        let is_option = is_value || argument.starts_with('-');
        is_value = WITH_VALUE.contains(&argument.as_str());
        if is_option { options.push(argument) } else { filters.push(argument) }
    }
    (options, filters)
}

/// The number of tests to run at once, by the machine's cores and memory. It is half as many again
/// as cores, because a test waits for a guest's rest or a time limit a part of its time.
fn concurrency() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = available.and_then(|rest| rest.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    let room = kib.map_or(1, |kib| kib * 1024 / MEMORY_OF_A_TEST);
    (cores + cores / 2).min(usize::try_from(room).unwrap_or(1)).max(1)
}

static CURRENT: OnceLock<String> = OnceLock::new();

/// The test that this process runs.
pub fn current() -> Option<&'static str> {
    CURRENT.get().map(String::as_str)
}

fn run_here(path: &str) -> ExitCode {
    CURRENT.get_or_init(|| path.into());
    let entry = inventory::iter::<Entry>.into_iter().find(|entry| entry.path() == path);
    let entry = entry.unwrap_or_else(|| panic!("no function '{path}' in this program"));
    let thread = std::thread::Builder::new().name(path.into()).spawn(|| catch_unwind(entry.run));
    let result = thread.expect("a thread can be started").join().expect("panics are caught");
    match result.map_err(|payload| payload.downcast::<Skip>()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Ok(skip)) => {
            eprintln!("\n{}", skip.0.replace('\n', " "));
            ExitCode::from(SKIPPED)
        }
        Err(Err(_)) => ExitCode::FAILURE,
    }
}

fn run_in_process(path: &str) -> Result<Completion, Failed> {
    let began = Instant::now();
    let mut output = tempfile::tempfile()?;
    let own = Pid::as_raw(Some(rustix::process::getpid()));
    let mut command = Command::new(std::env::current_exe()?);
    command.env(FUNCTION, path).stdin(File::open("/dev/null")?);
    command.stdout(output.try_clone()?).stderr(output.try_clone()?);
    let with_the_program = move || {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        // The parent can have ended before the signal was set.
        match Pid::as_raw(rustix::process::getppid()) == own {
            true => Ok(()),
            false => Err(std::io::ErrorKind::BrokenPipe.into()),
        }
    };
    // SAFETY: the closure makes two system calls and allocates nothing.
    unsafe { command.pre_exec(with_the_program) };
    let status = wait(command.spawn()?, path)?;
    let mut said = Vec::new();
    output.rewind()?;
    output.read_to_end(&mut said)?;
    let said = String::from_utf8_lossy(&said);
    record_time(path, began.elapsed());
    match status.code() {
        Some(0) => Ok(Completion::Completed),
        Some(code) if code == i32::from(SKIPPED) => {
            Ok(Completion::ignored_with(said.lines().last().unwrap_or_default()))
        }
        _ => Err(format!("{}{said}", describe_end(status)).into()),
    }
}

fn describe_end(status: ExitStatus) -> String {
    status.signal().map_or(String::new(), |signal| format!("ended by signal {signal}\n"))
}

/// Waits for the child's end, no longer than the limit.
fn wait(mut child: Child, path: &str) -> std::io::Result<ExitStatus> {
    let pid = Pid::from_child(&child);
    let fd = pidfd_open(pid, PidfdFlags::empty())?;
    let limit = limit();
    let until = Timespec::try_from(limit).expect("a time that fits");
    if poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&until))? == 0 {
        end_hanging_test(pid, path, limit);
    }
    child.wait()
}

fn limit() -> Duration {
    let otherwise = if thorough() { 7200 } else { 600 };
    let wanted = std::env::var(LIMIT).map(|limit| limit.parse().expect("a number of seconds"));
    Duration::from_secs(wanted.unwrap_or(otherwise))
}

/// Prints what the threads of a test do, where a debugger is installed, and kills the test with its
/// children, which are QEMUs.
fn end_hanging_test(test: Pid, path: &str, limit: Duration) {
    eprintln!("{path} has not ended within {limit:?}: it is ended");
    let pid = test.as_raw_nonzero().to_string();
    let _ = Command::new("timeout")
        .args(["120", "gdb", "-p", &pid, "-batch", "-ex", "thread apply all bt"])
        .status();
    let children = children(&pid);
    let _ = kill_process(test, Signal::KILL);
    for child in children {
        let _ = kill_process(child, Signal::KILL);
    }
}

fn children(pid: &str) -> Vec<Pid> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let of_task = |task: std::fs::DirEntry| {
        std::fs::read_to_string(task.path().join("children")).unwrap_or_default()
    };
    let all: String = tasks.map(of_task).collect();
    all.split_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect()
}

static TIMES: Mutex<Vec<(Duration, String)>> = Mutex::new(Vec::new());

fn record_time(path: &str, time: Duration) {
    TIMES.lock().expect("nobody panics with it").push((time, path.into()));
}

/// Prints the tests that took longest.
fn print_slowest() {
    let mut all = TIMES.lock().expect("nobody panics with it");
    all.sort();
    let slow: Vec<_> = all.iter().rev().take(10).filter(|(time, _)| time.as_secs() >= 5).collect();
    if !slow.is_empty() {
        println!("longest:");
    }
    for (time, path) in slow {
        println!("{:4} s  {path}", time.as_secs());
    }
}
