// SPDX-License-Identifier: LGPL-2.1-or-later

//! A private libvirtd. The machine's own libvirtd is never touched, and nothing is left of the
//! private one when it is dropped.
//!
//! It runs under a keeper (`shim/keeper.c`), which ends it and every QEMU that it has started, even
//! when the test process is killed. All its files are in one directory with a short name, because
//! the directory has Unix sockets in it.

mod cache;
mod layout;

use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock};

use tempfile::TempDir;

use crate::compile::{gcc, workspace};
use crate::guest::Guest;
use crate::machine::Machine;
use crate::run;
use crate::wait::{DEADLINE, wait_for};
use layout::Layout;

/// Events are held while this file exists in the daemon's directory.
const HOLD: &str = "hold-events";

/// Variables in addition to the usual ones.
type Environment = Vec<(&'static str, PathBuf)>;

/// libvirt's two kinds of daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// `qemu:///session`: a user's own daemon. When the tests run as root, the user is `nobody`.
    Session,
    /// `qemu:///system`: root's daemon, whose QEMUs run as another user, in a mount namespace of
    /// its own.
    System,
}

/// A running libvirtd. Clones are the same daemon. It ends when the last of them and of its guests
/// is dropped.
#[derive(Clone)]
pub struct Daemon {
    inner: Arc<Inner>,
}

struct Inner {
    mode: Mode,
    layout: Layout,
    keeper: Mutex<Keeper>,
    /// The keeper removes it; this field is for the case that the keeper was killed.
    _directory: TempDir,
}

struct Keeper {
    child: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Daemon {
    /// Starts a session daemon.
    pub fn session() -> Daemon {
        Daemon::start(Mode::Session, |_| Vec::new())
            .unwrap_or_else(|error| panic!("no session daemon: {error}"))
    }

    /// Starts a session daemon whose driver can be kept from handling events: `shim/late-event.c`.
    pub fn with_late_events() -> Daemon {
        static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
        let source = || workspace().join("tests/kit/shim/late-event.c");
        let library =
            LIBRARY.get_or_init(|| gcc(&source(), "late-event.so", "-shared -fPIC")).clone();
        let environment = |directory: &Path| {
            vec![("LD_PRELOAD", library), ("INSTANTSNAP_HOLD_EVENTS", directory.join(HOLD))]
        };
        Daemon::start(Mode::Session, environment)
            .unwrap_or_else(|error| panic!("no session daemon: {error}"))
    }

    /// Starts a daemon into which libraries are preloaded, with more variables in its environment.
    /// Returns `None` where a system daemon is not possible.
    pub fn preloaded(
        mode: Mode,
        libraries: &[&Path],
        variables: &[(&'static str, &str)],
    ) -> Option<Daemon> {
        Daemon::configured(mode, libraries, variables, "")
    }

    /// The same with more lines in libvirtd.conf.
    pub fn configured(
        mode: Mode,
        libraries: &[&Path],
        variables: &[(&'static str, &str)],
        conf: &str,
    ) -> Option<Daemon> {
        if mode == Mode::System && !rustix::process::geteuid().is_root() {
            eprintln!("not root: a libvirtd of the system's kind is not tried");
            return None;
        }
        let libraries: Vec<_> =
            libraries.iter().map(|library| library.display().to_string()).collect();
        let environment = |_: &Path| {
            let more = variables.iter().map(|(name, value)| (*name, PathBuf::from(value)));
            [("LD_PRELOAD", PathBuf::from(libraries.join(":")))].into_iter().chain(more).collect()
        };
        match Daemon::start_configured(mode, environment, conf) {
            Ok(daemon) => Some(daemon),
            Err(error) if mode == Mode::System => {
                eprintln!("a libvirtd of the system's kind is not tried: {error}");
                None
            }
            Err(error) => panic!("no session daemon: {error}"),
        }
    }

    /// Keeps the driver from handling events until [`Daemon::release_events`]. The daemon has to be
    /// from [`Daemon::with_late_events`].
    pub fn hold_events(&self) {
        File::create(self.directory().join(HOLD)).expect("a file of the daemon's");
    }

    /// Lets the driver handle the held events.
    pub fn release_events(&self) {
        std::fs::remove_file(self.directory().join(HOLD)).expect("a file of the daemon's");
    }

    /// Starts a system daemon where that is possible, which needs root and mount namespaces.
    /// Elsewhere prints the reason.
    pub fn system() -> Option<Daemon> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("not root: a libvirtd of the system's kind is not tried");
            return None;
        }
        Daemon::start(Mode::System, |_| Vec::new())
            .inspect_err(|error| eprintln!("a libvirtd of the system's kind is not tried: {error}"))
            .ok()
    }

    /// A session daemon, and a system daemon where that is possible.
    pub fn all() -> Vec<Daemon> {
        [Some(Daemon::session()), Daemon::system()].into_iter().flatten().collect()
    }

    /// Starts another daemon of the same mode.
    pub fn another(&self) -> Daemon {
        Daemon::start(self.mode(), |_| Vec::new())
            .unwrap_or_else(|error| panic!("no second daemon: {error}"))
    }

    fn start(mode: Mode, environment: impl FnOnce(&Path) -> Environment) -> Result<Daemon, String> {
        Daemon::start_configured(mode, environment, "")
    }

    fn start_configured(
        mode: Mode,
        environment: impl FnOnce(&Path) -> Environment,
        conf: &str,
    ) -> Result<Daemon, String> {
        let directory =
            tempfile::Builder::new().prefix("isl-").tempdir().expect("no temporary directory");
        let mut layout = Layout::make(mode, directory.path());
        layout.configure(conf);
        let keeper = Keeper::start(&layout, environment(directory.path()))?;
        cache::seed(&layout);
        let daemon = Daemon {
            inner: Arc::new(Inner {
                mode,
                layout,
                keeper: Mutex::new(keeper),
                _directory: directory,
            }),
        };
        daemon.start_again();
        Ok(daemon)
    }

    /// The daemon's kind.
    pub fn mode(&self) -> Mode {
        self.inner.mode
    }

    /// The URI for clients.
    pub fn uri(&self) -> String {
        let mode = match self.mode() {
            Mode::Session => "session",
            Mode::System => "system",
        };
        format!("qemu+unix:///{mode}?socket={}", self.socket().display())
    }

    /// The socket for clients.
    pub fn socket(&self) -> PathBuf {
        self.inner.layout.socket()
    }

    /// The directory of all its files and its guests'.
    pub fn directory(&self) -> &Path {
        self.inner.layout.directory()
    }

    /// The user that its QEMUs run as, who has to own their files.
    pub fn user(&self) -> u32 {
        self.inner.layout.user()
    }

    /// The daemon's log of warnings and errors.
    pub fn log(&self) -> String {
        let bytes = std::fs::read(self.inner.layout.log()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The log of QEMU's standard error and command line.
    pub fn qemu_log(&self, domain: &str) -> PathBuf {
        self.inner.layout.qemu_logs().join(format!("{domain}.log"))
    }

    /// The version of libvirt.
    pub fn version() -> (u32, u32, u32) {
        static VERSION: OnceLock<(u32, u32, u32)> = OnceLock::new();
        *VERSION.get_or_init(|| {
            let output = Command::new(layout::LIBVIRTD).arg("--version").output();
            let output = output.expect("libvirtd cannot be run: scripts/deps test installs it");
            // "libvirtd (libvirt) 9.0.0"
            let text = String::from_utf8_lossy(&output.stdout);
            let version = text.split_whitespace().last().unwrap_or("");
            let mut numbers = version.split('.').map_while(|number| number.parse().ok());
            let mut next =
                || numbers.next().unwrap_or_else(|| panic!("libvirtd --version says {text:?}"));
            (next(), next(), next())
        })
    }

    /// Runs a virsh command and returns its output. Panics with all known details when it fails.
    #[track_caller]
    pub fn virsh(&self, args: &[&str]) -> String {
        self.try_virsh(args)
            .unwrap_or_else(|error| panic!("virsh {args:?}: {error}\n--- libvirtd\n{}", self.log()))
    }

    /// The same; the error is virsh's message.
    pub fn try_virsh(&self, args: &[&str]) -> Result<String, String> {
        let output =
            self.virsh_command(args).stdin(Stdio::null()).output().expect("virsh cannot be run");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    /// Runs several virsh commands in one process, because most of virsh's time is its start.
    /// Returns the output of each, which is empty where the command fails.
    #[track_caller]
    pub(crate) fn virsh_each(&self, commands: &[&[&str]]) -> Vec<String> {
        const END: &str = "= end of a command =";
        let quoted = |word: &&str| {
            assert!(!word.contains('\''), "virsh would end the word at the quote: {word}");
            format!("'{word}'")
        };
        let line = |words: &&[&str]| {
            let words: Vec<_> = words.iter().map(quoted).collect();
            format!("{}; echo '{END}'; ", words.join(" "))
        };
        let script: String = commands.iter().map(line).collect();
        let all = self.virsh(&[&script]);
        let outputs: Vec<_> = all.split_terminator(END).map(str::to_owned).collect();
        assert_eq!(outputs.len(), commands.len(), "virsh '{script}': {all}");
        outputs
    }

    /// Starts a virsh command that runs beside the test, with pipes for its output.
    pub fn virsh_spawn(&self, args: &[&str]) -> Child {
        let mut command = self.virsh_command(args);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().expect("virsh cannot be run")
    }

    fn virsh_command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("virsh");
        // virsh must not read or write files in the user's home directory.
        command
            .args(["-q", "-c", &self.uri()])
            .args(args)
            .env("LC_ALL", "C")
            .env("HOME", self.directory().join("client"));
        command
    }

    /// The process id of libvirtd.
    pub fn pid(&self) -> u32 {
        let file = self.directory().join("run/libvirtd.pid");
        let text = std::fs::read_to_string(&file)
            .unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        text.trim().parse().expect("a process id")
    }

    /// Kills libvirtd. Its QEMUs keep running.
    pub fn kill(&self) {
        let answer =
            self.inner.keeper.lock().expect("poisoned").ask("kill").expect("the keeper has ended");
        assert_eq!(answer, "killed");
    }

    /// Starts libvirtd after [`Daemon::kill`]. Returns when it answers and has reconnected to its
    /// QEMUs.
    pub fn start_again(&self) {
        let answer =
            self.inner.keeper.lock().expect("poisoned").ask("start").expect("the keeper has ended");
        let pid = answer
            .strip_prefix("started ")
            .unwrap_or_else(|| panic!("libvirtd is not started: {answer}"));
        wait_for(DEADLINE, || {
            if !Path::new("/proc").join(pid).exists() {
                panic!("libvirtd has ended\n{}", self.log());
            }
            UnixStream::connect(self.socket()).ok()
        })
        .unwrap_or_else(|| panic!("libvirtd does not answer\n{}", self.log()));
        // It accepts connections before its drivers are ready, and then holds each domain while it
        // connects to the domain's QEMU. A command that takes the domain's job waits for that.
        for domain in self.virsh(&["list", "--name"]).split_whitespace() {
            let _ = self.try_virsh(&["dommemstat", domain]); // QEMU may have ended
        }
    }

    /// The process id of the QEMU that runs a domain, if one does.
    pub fn qemu_pid(&self, domain: &str) -> Option<u32> {
        let file = self.inner.layout.pid_files().join(format!("{domain}.pid"));
        let pid = std::fs::read_to_string(file).ok()?.trim().parse().ok()?;
        // The file can be older than the last kill -9, and another process can have the number by
        // now. A zombie has no command line.
        let command_line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let name = format!("guest={domain},");
        command_line
            .split(|byte| *byte == 0)
            .any(|arg| arg.starts_with(name.as_bytes()))
            .then_some(pid)
    }

    /// Kills the QEMU of a domain as `kill -9` does, and waits until it is gone.
    pub(crate) fn kill_qemu(&self, domain: &str) {
        let Some(pid) = self.qemu_pid(domain) else {
            return;
        };
        let process =
            i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw).expect("a process id");
        let _ = rustix::process::kill_process(process, rustix::process::Signal::KILL);
        let gone =
            wait_for(DEADLINE, || self.qemu_pid(domain).is_none_or(|now| now != pid).then_some(()));
        assert!(gone.is_some() || std::thread::panicking(), "QEMU {pid} survives kill -9");
    }

    /// Restores a memory image in libvirt's format, on fresh overlays of the disks that its XML
    /// names. The original must not be running under this daemon: see [`Daemon::another`].
    pub fn restore(&self, original: &Guest, image: &Path) -> Guest {
        self.restore_edited(original.machine(), image, |xml| xml)
    }

    /// The same for any machine, with a last edit of the XML.
    pub fn restore_edited(
        &self,
        machine: &Machine,
        image: &Path,
        edit: impl FnOnce(String) -> String,
    ) -> Guest {
        crate::restore::restore(self, machine, image, edit)
    }

    /// A directory for a guest, which QEMU may use.
    pub(crate) fn guest_directory(&self) -> TempDir {
        let parent = self.directory().join("guests");
        tempfile::Builder::new()
            .prefix("g-")
            .tempdir_in(parent)
            .expect("no directory for the guest")
    }

    /// Gives a directory and the files directly in it to QEMU's user.
    pub fn give(&self, directory: &Path) {
        if self.user() != rustix::process::geteuid().as_raw() {
            crate::machine::give_to(self.user(), directory);
        }
    }

    /// Keeps this daemon's capabilities of QEMUs for later daemons.
    pub(crate) fn keep_capabilities(&self) {
        cache::keep(&self.inner.layout);
    }
}

impl fmt::Debug for Daemon {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        write!(formatter, "Daemon({})", self.uri())
    }
}

impl Keeper {
    fn start(layout: &Layout, environment: Environment) -> Result<Keeper, String> {
        static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
        let program =
            PROGRAM.get_or_init(|| gcc(&workspace().join("tests/kit/shim/keeper.c"), "keeper", ""));
        let mut command = Command::new(program);
        command
            .arg(layout.directory())
            .arg(layout.daemon_user().map_or("-".to_owned(), |uid| uid.to_string()));
        command.args(
            layout.mounts().iter().map(|(source, target)| format!("{}={target}", source.display())),
        );
        command.arg("--").args(layout.libvirtd());
        let watchdog = std::env::var_os(run::WATCHDOG).map(|program| (run::WATCHDOG, program));
        command.env_clear().envs(layout.environment()).envs(watchdog).envs(environment);
        let log = File::create(layout.log()).expect("the log");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log).current_dir("/");
        let mut child =
            command.spawn().map_err(|error| format!("{}: {error}", program.display()))?;
        let commands = child.stdin.take().expect("a pipe");
        let answers = BufReader::new(child.stdout.take().expect("a pipe"));
        let mut keeper = Keeper { child, commands, answers };
        match keeper.answer() {
            Ok(answer) if answer == "ready" => Ok(keeper),
            Ok(answer) => Err(answer),
            Err(error) => Err(format!("the keeper has ended: {error}")),
        }
    }

    fn ask(&mut self, command: &str) -> std::io::Result<String> {
        writeln!(self.commands, "{command}")?;
        self.answer()
    }

    fn answer(&mut self) -> std::io::Result<String> {
        let mut line = String::new();
        if self.answers.read_line(&mut line)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        Ok(line.trim_end().to_owned())
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // A watchdog that the library has forked can have the pipe open, so closing it may not
        // suffice.
        let _ = writeln!(self.commands, "quit");
        let _ = self.child.wait();
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        cache::keep(&self.layout);
    }
}
