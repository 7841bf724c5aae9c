// SPDX-License-Identifier: LGPL-2.1-or-later

//! The driver backend in a daemon, c-tests/daemon.c: one event loop, four guests, and a client
//! in Python.

use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::OnceLock;

use instantsnap_testkit::compile::{gcc, tick_guest, workspace};
use instantsnap_testkit::machine::make_image;
use instantsnap_testkit::{Binary, DEADLINE, Format, Serial, test, wait_for};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

const GUESTS: [&str; 4] = ["a", "b", "c", "d"];

/// The path of the library, which cargo puts beside this program.
fn library() -> PathBuf {
    std::env::current_exe().unwrap().with_file_name("libinstantsnap.so")
}

fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let include = workspace().join("include");
        let options =
            format!("-Wl,--no-as-needed -I{} {} -lpthread", include.display(), library().display());
        gcc(&workspace().join("c-tests/daemon.c"), "daemon", &options)
    })
}

/// A daemon whose guests count. It ends with its guests when this is dropped.
struct Daemon {
    child: Child,
    directory: TempDir,
}

impl Daemon {
    fn start(binary: &Binary) -> Daemon {
        let directory = tempfile::Builder::new().prefix("instantsnap-").tempdir().unwrap();
        symlink(library(), directory.path().join("libinstantsnap.so.0")).unwrap();
        let qemu = binary.command();
        let mut command = match std::env::var_os("INSTANTSNAP_TEST_VALGRIND") {
            Some(_) => valgrind(program()),
            None => Command::new(program()),
        };
        command.arg(directory.path().join("daemon.sock")).arg(directory.path());
        for guest in GUESTS {
            let image = directory.path().join(format!("{guest}.qcow2"));
            make_image(&image, Format::Qcow2, None);
            command.arg(format!("{guest}={}", image.display()));
        }
        command.arg("--").arg(&binary.path).args(qemu.get_args());
        command.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-accel",
            "tcg",
            "-m",
            "64",
        ]);
        command.args(["-serial", "file:serial.log"]).arg("-kernel").arg(tick_guest());
        command.args(["-append", "wait=1"]);
        command.envs(qemu.get_envs().filter_map(|(name, value)| Some((name, value?))));
        command.env("LD_LIBRARY_PATH", directory.path());
        let daemon = Daemon { child: command.spawn().unwrap(), directory };
        wait_for(DEADLINE, || UnixStream::connect(daemon.socket()).ok())
            .expect("the daemon does not listen");
        daemon
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("daemon.sock")
    }

    /// Sends requests. Returns whether all succeeded, and the replies.
    fn ask(&self, requests: &[String]) -> (bool, Vec<String>) {
        let client = workspace().join("c-tests/daemon_client.py");
        let output =
            Command::new("python3").arg(client).arg(self.socket()).args(requests).output().unwrap();
        let answers = String::from_utf8(output.stdout).unwrap();
        eprint!("{answers}{}", String::from_utf8_lossy(&output.stderr));
        (output.status.success(), answers.lines().map(str::to_owned).collect())
    }

    #[track_caller]
    fn get(&self, request: &str) -> String {
        let (content, mut answers) = self.ask(&[request.into()]);
        assert!(content, "{request}: {answers:?}");
        answers.pop().unwrap()
    }

    fn log(&self, guest: &str) -> PathBuf {
        self.directory.path().join(guest).join("serial.log")
    }

    /// Waits until a guest has counted this much further. Returns its number.
    #[track_caller]
    fn wait_ticks(&self, guest: &str, more: u32) -> u32 {
        let mut goal = None;
        wait_for(DEADLINE, || {
            let serial = Serial::read(&self.log(guest));
            assert_eq!(serial.trouble, None, "guest {guest}");
            let tick = serial.tick?;
            (tick >= *goal.get_or_insert(tick + more)).then_some(tick)
        })
        .unwrap_or_else(|| panic!("guest {guest} does not count"))
    }

    /// The first number that a reverted guest prints completely.
    fn first_tick(&self, guest: &str) -> u32 {
        let log = std::fs::read_to_string(self.log(guest)).unwrap();
        log.lines()
            .find_map(|line| line.strip_prefix("T ")?.parse().ok())
            .expect("the guest has said a number")
    }
}

impl Daemon {
    /// Ends the daemon and its guests.
    fn end(&mut self) -> std::io::Result<ExitStatus> {
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        self.child.wait()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.end();
    }
}

/// The program under valgrind, which does not check QEMU.
fn valgrind(program: &Path) -> Command {
    let mut command = Command::new("valgrind");
    let options =
        ["--quiet", "--error-exitcode=99", "--leak-check=full", "--errors-for-leak-kinds=definite"];
    command.args(options).args([
        "--show-leak-kinds=definite",
        "--trace-children-skip=*qemu*",
        "--trace-children=yes",
    ]);
    command.arg(program);
    command
}

#[test]
fn event_loop_daemon_snapshots_and_reverts_four_guests() {
    for binary in Binary::any() {
        let mut daemon = Daemon::start(binary);
        let before = GUESTS.map(|guest| daemon.wait_ticks(guest, 2));
        let mut requests = GUESTS.map(|guest| format!("snapshot {guest} first")).to_vec();
        requests.push("stats".into());
        let (content, answers) = daemon.ask(&requests);
        assert!(content, "{answers:?}");
        let after = GUESTS.map(|guest| daemon.wait_ticks(guest, 1));
        for guest in GUESTS {
            let place = |answer: String| {
                answers.iter().position(|line| *line == answer).expect("an answer is missing")
            };
            assert!(place(format!("instant {guest} first")) < place(format!("done {guest} first")));
        }
        // A request during the snapshots gets its reply at once.
        assert!(answers[0].starts_with("ok longest iteration"), "{answers:?}");
        assert_eq!(answers.len(), 2 * GUESTS.len() + 1);
        assert_eq!(
            daemon.ask(&GUESTS.map(|guest| format!("list {guest}"))),
            (true, vec!["ok first".into(); 4])
        );

        // Two snapshots of one guest at once, one of an unknown guest, and one whose name exists.
        let (content, answers) =
            daemon.ask(&["snapshot a second".into(), "snapshot a third".into()]);
        assert!(!content && answers.contains(&"error a the guest is busy".into()));
        assert!(answers.contains(&"done a second".into()));
        let (content, answers) = daemon.ask(&["snapshot nobody".into(), "snapshot b first".into()]);
        assert!(!content && answers[0].starts_with("error nobody "), "{answers:?}");
        assert!(
            answers[1].starts_with("error b ") && answers[1].contains("'first' already exists"),
            "{answers:?}"
        );
        assert_eq!(daemon.get("list a"), "ok first second");

        // The guest checks every page and every sector against its number, and would say TORN.
        daemon.wait_ticks("a", 20);
        assert_eq!(daemon.get("revert a first"), "done a first");
        daemon.wait_ticks("a", 65);
        let first = daemon.first_tick("a");
        assert!(
            (before[0]..=after[0] + 2).contains(&first),
            "{first} is not from {} to {}",
            before[0],
            after[0]
        );
        // A reverted guest can be snapshotted again, and the other guests are not affected.
        assert_eq!(daemon.get("snapshot a again"), "done a again");
        for guest in GUESTS {
            daemon.wait_ticks(guest, 3);
        }

        // After deletes of its snapshots, from the newest on, a guest keeps what it has written
        // since.
        let (content, answers) = daemon.ask(&["delete a first".into(), "delete b first".into()]);
        assert!(
            !content
                && answers
                    .iter()
                    .any(|line| line.starts_with("error a ") && line.contains("children"))
        );
        assert!(answers.contains(&"done b first".into()), "{answers:?}");
        assert_eq!(daemon.get("delete a again"), "done a again");
        assert_eq!(daemon.get("list a"), "ok first second");
        assert_eq!(daemon.get("list b"), "ok");
        for guest in GUESTS {
            daemon.wait_ticks(guest, 65);
        }
        daemon.get("stats");
        let ended = daemon.end().unwrap();
        assert!(ended.success(), "{ended}");
    }
}
