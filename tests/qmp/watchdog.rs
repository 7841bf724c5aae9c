// SPDX-License-Identifier: LGPL-2.1-or-later

//! The watchdog of a snapshot: a program that moves memory into its image, and depends on nothing
//! of its caller.

use std::ffi::c_int;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use common::backend::open;
use common::watchdog::{kill_watchdog_of, program_of, watchdog_of};
use common::{
    At, INSTANTLY, Opened, Trace, assert_error, assert_says, image_format, machine, named,
    through_proxy,
};
use instantsnap::engine::{EarlyStart, Phase, WatchdogKind};
use instantsnap::error::Code;
use instantsnap::image::Format;
use instantsnap_testkit::compile::{gcc, workspace};
use instantsnap_testkit::program::process;
use instantsnap_testkit::{Binary, DEADLINE, Guest, Machine, process, skip, test, wait_for};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

/// The variable that says what happens to a test's caller.
const DEED: &str = "INSTANTSNAP_TEST_DEED";
/// The variable that names the program. An empty value means: no program.
const PROGRAM: &str = "INSTANTSNAP_WATCHDOG";
/// The size of the stack that musl gives to a thread.
const SMALL_STACK: usize = 128 << 10;

/// Not a test of its own: a caller that takes a snapshot. The snapshot's name says what happens to
/// the caller in the drain.
#[process]
fn caller() {
    let directory = std::env::var("INSTANTSNAP_TEST_DIRECTORY").unwrap();
    let deed = std::env::var(DEED).unwrap();
    let take = move || {
        let directory = Path::new(&directory);
        let state = directory.join("state");
        let handle = open(directory, &directory.join("qmp.sock"), None, &state).unwrap();
        let mut observer = At(|phase| match (phase, &*deed) {
            (Phase::Drain, "stopped") => signal_self(Signal::STOP),
            (Phase::Drain, "killed") => signal_self(Signal::KILL),
            (Phase::Switch, "replaced") => drop(kill_watchdog_of(std::process::id())),
            (Phase::Arm, "replaced") => signal_self(Signal::KILL),
            _ => {}
        });
        handle.create(&named(&deed), INSTANTLY, &mut observer).unwrap();
    };
    std::thread::Builder::new().stack_size(SMALL_STACK).spawn(take).unwrap().join().unwrap();
}

fn signal_self(signal: Signal) {
    kill_process(rustix::process::getpid(), signal).unwrap();
}

fn caller_of(guest: &Guest, deed: &str) -> Command {
    let mut command = process(module_path!(), "caller");
    command
        .env("INSTANTSNAP_TEST_DIRECTORY", guest.directory())
        .env(DEED, deed)
        .stdout(Stdio::null());
    command
}

/// A machine whose guest writes to all of its memory in each round. That is more than a pipe holds.
fn busy(binary: &'static Binary) -> Machine {
    machine(binary, 1).memory(128).prealloc().append("dense=64")
}

/// Waits until the watchdog of a killed caller has undone the snapshot. A driver merges its own
/// overlays.
fn wait_undone(opened: &Opened, before: &Trace) {
    if !common::backend::by_driver() {
        wait_for(DEADLINE, || (opened.trace() == *before).then_some(()))
            .unwrap_or_else(|| common::assert_untouched(opened, before));
    }
}

fn is_stopped(caller: &Child) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", caller.id()));
    stat.is_ok_and(|stat| stat.contains(") T"))
}

fn wait_stopped(caller: &Child) {
    wait_for(DEADLINE, || is_stopped(caller).then_some(())).expect("it stops");
}

fn go_on(caller: &Child) {
    kill_process(Pid::from_raw(caller.id() as i32).unwrap(), Signal::CONT).unwrap();
}

#[test]
fn stopped_caller_does_not_freeze_its_guest_in_the_drain() {
    for binary in Binary::any() {
        let opened = Opened::start(&busy(binary));
        let mut caller = caller_of(&opened.guest, "stopped").spawn().unwrap();
        wait_stopped(&caller);
        // In each round the guest writes to all of its memory.
        opened.guest.wait_ticks(3);
        let saved = wait_for(DEADLINE, || {
            let migration = opened.guest.control().execute("query-migrate", json!({})).unwrap();
            (migration["status"] == "completed").then_some(())
        });
        assert!(saved.is_some() && is_stopped(&caller));
        go_on(&caller);
        assert!(caller.wait().unwrap().success());
        opened.restore_clone("stopped");
        opened.guest.wait_ticks(3);
    }
}

/// The watchdog is a program: it has no copy of the caller's memory, and its environment and its
/// working directory are not the caller's.
#[test]
fn watchdog_has_nothing_of_its_callers_memory_environment_and_directory() {
    const CALLERS: usize = 128 << 20;
    let opened = Opened::start(&busy(&Binary::any()[0]));
    let memory = vec![1_u8; CALLERS];
    let mut seen = None;
    let mut observer = At(|phase| {
        if phase == Phase::Drain {
            let pid = watchdog_of(std::process::id()).expect("there is a watchdog");
            let of = |what: &str| format!("/proc/{pid}/{what}");
            let status = std::fs::read_to_string(of("status")).unwrap();
            let size = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
            let kib: usize = size.trim().strip_suffix(" kB").unwrap().parse().unwrap();
            let environment = std::fs::read_to_string(of("environ")).unwrap();
            seen = Some((
                program_of(pid),
                kib << 10 < CALLERS / 2,
                environment.contains("INSTANTSNAP"),
                std::fs::read_link(of("cwd")).unwrap(),
            ));
        }
    });
    opened.handle.create(&named("s"), INSTANTLY, &mut observer).unwrap();
    assert_eq!(seen, Some(("instantsnap-watchdog".into(), true, false, "/".into())));
    assert!(memory.iter().all(|byte| *byte == 1));
    assert_eq!(watchdog_of(std::process::id()), None);
}

/// The caller's stack is small. The watchdog does not use it.
#[test]
fn caller_with_a_small_stack_that_is_killed_leaves_a_guest_that_runs() {
    for binary in Binary::any() {
        let opened = Opened::start(&busy(binary));
        let before = opened.trace();
        let status = caller_of(&opened.guest, "killed").status().unwrap();
        assert_eq!(status.signal(), Some(9), "{status}");
        opened.guest.wait_ticks(3);
        wait_undone(&opened, &before);
    }
}

/// If there is no program, the library forks, and a thread of the caller moves memory.
#[test]
fn without_the_program_a_fork_is_the_watchdog() {
    for binary in Binary::any() {
        let opened = Opened::start(&busy(binary));
        let before = opened.trace();
        let status = caller_of(&opened.guest, "killed").env(PROGRAM, "").status().unwrap();
        assert_eq!(status.signal(), Some(9), "{status}");
        opened.guest.wait_ticks(3);
        wait_undone(&opened, &before);
        let whole = caller_of(&opened.guest, "whole").env(PROGRAM, "/nonexistent").status();
        assert!(whole.unwrap().success());
        opened.restore_clone("whole");
    }
}

/// Its successor goes on where it was: the image has every byte, as the clone shows. (Once pages
/// have come, that is so for a raw image only.)
#[test]
fn watchdog_that_is_killed_in_the_pause_or_the_drain_is_replaced() {
    for binary in Binary::any() {
        let opened = Opened::start(&busy(binary));
        for killed in [Phase::Pause, Phase::Switch, Phase::Arm, Phase::Drain, Phase::Finish] {
            let (mut first, mut last) = (None, None);
            let mut observer = At(|phase| {
                if phase == killed {
                    first = Some(kill_watchdog_of(std::process::id()));
                }
                if phase == Phase::Finish {
                    last = watchdog_of(std::process::id());
                }
            });
            let name = format!("{killed:?}");
            let format = if killed == Phase::Drain { Some(Format::Raw) } else { image_format() };
            opened.handle.create_as(format, &named(&name), INSTANTLY, &mut observer).unwrap();
            assert_eq!(opened.handle.stats().unwrap().watchdog, WatchdogKind::Program, "{name}");
            assert!(killed == Phase::Finish || last.is_some() && first != last, "{name}");
            opened.restore_clone(&name);
        }
        opened.assert_well();
    }
}

/// A signal to a whole service can kill the watchdog and cancel the snapshot at once. Another
/// process must read QEMU's stream on, also while the snapshot is undone.
#[test]
fn snapshot_that_is_cancelled_or_not_raw_when_its_watchdog_is_killed_leaves_the_guest_running() {
    for binary in Binary::any() {
        let opened = Opened::start(&busy(binary));
        let before = opened.trace();
        let zstd = Format::named("zstd").unwrap();
        for format in [Format::Raw, Format::Sparse, zstd] {
            for killed in [Phase::Arm, Phase::Drain] {
                let mut observer = At(|phase| {
                    if phase == killed {
                        kill_watchdog_of(std::process::id());
                    }
                    if phase == Phase::Drain {
                        opened.handle.cancel().unwrap();
                    }
                });
                let result =
                    opened.handle.create_as(Some(format), &named("s"), INSTANTLY, &mut observer);
                assert_error(result.map(drop), Code::OperationAborted, "cancelled");
                opened.guest.wait_ticks(3);
                common::assert_untouched(&opened, &before);
            }
        }
        // What only the killed process knows of these images is lost: the snapshot fails.
        let mut kill = At(|phase| {
            if phase == Phase::Drain {
                // Pages have come by now, because write tracking is armed.
                kill_watchdog_of(std::process::id());
            }
        });
        for format in [Format::Sparse, zstd] {
            let mut create = || {
                let created =
                    opened.handle.create_as(Some(format), &named("s"), INSTANTLY, &mut kill);
                // On a busy machine all of memory can be saved before the kill.
                created.map(|_| opened.handle.delete("s", 0).unwrap()).err()
            };
            let mut try_once = || {
                let before = opened.trace();
                create().map(|error| (error, before))
            };
            let (error, before) = (0..20).find_map(|_| try_once()).expect("it is killed in time");
            assert_error::<()>(Err(error), Code::SystemError, "was killed");
            opened.guest.wait_ticks(3);
            common::assert_untouched(&opened, &before);
        }
        opened.assert_well();
    }
}

/// A successor undoes the snapshot of a caller that is killed, like the first watchdog.
#[test]
fn successor_of_a_watchdog_that_was_killed_in_the_pause_resumes_the_guest_of_a_killed_caller() {
    for binary in Binary::any() {
        let opened = Opened::start(&busy(binary));
        let before = opened.trace();
        let status = caller_of(&opened.guest, "replaced").status().unwrap();
        assert_eq!(status.signal(), Some(9), "{status}");
        opened.guest.wait_ticks(3);
        wait_undone(&opened, &before);
    }
}

/// In a slow drain into a raw image, each watchdog is killed as soon as it is in charge. At last the
/// caller of the second snapshot is killed.
#[test]
fn watchdogs_that_are_killed_again_and_again_lose_no_byte_and_no_guest() {
    const KILLS: usize = 20;
    for binary in Binary::any() {
        let opened = Opened::start(&busy(binary));
        let say =
            |command: &str, arguments| opened.guest.control().execute(command, arguments).unwrap();
        let bandwidth = say("query-migrate-parameters", json!({}))["max-bandwidth"].clone();
        for deed in ["whole", "last"] {
            let before = opened.trace();
            let mut caller = caller_of(&opened.guest, deed)
                .env("INSTANTSNAP_TEST_IMAGE_FORMAT", "raw")
                .spawn()
                .unwrap();
            // The caller names a watchdog in QEMU's settings once it has told it the stage.
            let wait_in_charge = |pid: u32| {
                let noted = || {
                    let parameters = say("query-migrate-parameters", json!({}));
                    let note = parameters["tls-hostname"].as_str().unwrap_or_default().to_owned();
                    note.contains(&pid.to_string()).then_some(())
                };
                wait_for(DEADLINE, noted).expect("it is named");
            };
            let next_watchdog = || {
                let next = wait_for(DEADLINE, || watchdog_of(caller.id())).expect("it is replaced");
                wait_in_charge(next);
                next
            };
            // A drain that begins forgets the limit of before. A watchdog that is stopped until then
            // would not do: while the pipe is full, QEMU may not answer.
            let armed = || {
                say("migrate-set-parameters", json!({ "max-bandwidth": 1 << 20 }));
                let ram = say("query-migrate", json!({}))["ram"].clone();
                let has_pages = |kind: &str| ram[kind].as_u64().unwrap_or(0) > 0;
                (has_pages("normal") || has_pages("duplicate")).then_some(())
            };
            wait_for(DEADLINE, armed).expect("it is armed");
            say("migrate-set-parameters", json!({ "max-bandwidth": 1 << 20 }));
            let mut killed = Vec::new();
            while killed.len() < KILLS {
                assert_eq!(program_of(next_watchdog()), "instantsnap-watchdog");
                killed.push(kill_watchdog_of(caller.id()));
            }
            killed.dedup();
            assert_eq!(killed.len(), KILLS);
            if deed == "last" {
                next_watchdog();
                caller.kill().unwrap();
            }
            say("migrate-set-parameters", json!({ "max-bandwidth": bandwidth }));
            assert_eq!(caller.wait().unwrap().success(), deed == "whole");
            match deed {
                "whole" => drop(opened.restore_clone("whole")),
                _ => wait_undone(&opened, &before),
            }
            opened.guest.wait_ticks(3);
        }
    }
}

/// Not a test of its own: a caller that is stopped in the pause.
#[process]
fn caller_stopped_in_the_pause() {
    let directory = std::env::var("INSTANTSNAP_TEST_DIRECTORY").unwrap();
    let deed = std::env::var(DEED).unwrap();
    let directory = Path::new(&directory);
    let state = directory.join("state");
    let handle = open(directory, &directory.join("qmp.sock"), None, &state).unwrap();
    handle.set_pause_limit(Duration::from_secs(8));
    let mut observer = At(|phase| {
        if format!("{phase:?}") == deed {
            signal_self(Signal::STOP);
        }
    });
    let error = handle.create(&named("s"), INSTANTLY, &mut observer).unwrap_err();
    eprintln!("{error}");
    assert_says(&error, Code::OperationTimeout, &["the watchdog had to resume the guest"]);
}

#[test(long)]
fn caller_that_is_stopped_in_the_pause_stops_its_guest_until_the_limit_only() {
    for binary in Binary::any() {
        let opened = Opened::start(&busy(binary));
        for phase in [Phase::Switch, Phase::Arm] {
            let before = opened.trace();
            let mut caller = process(module_path!(), "caller_stopped_in_the_pause")
                .env("INSTANTSNAP_TEST_DIRECTORY", opened.guest.directory())
                .env(DEED, format!("{phase:?}"))
                .spawn()
                .unwrap();
            wait_stopped(&caller);
            // The guest is paused first, and then runs.
            opened.guest.wait_ticks(3);
            assert!(is_stopped(&caller));
            go_on(&caller);
            assert!(caller.wait().unwrap().success());
            common::assert_untouched(&opened, &before);
        }
        opened.assert_well();
    }
}

/// Not a test of its own: a caller whose snapshot is cancelled, and that is stopped before its
/// undo.
#[process]
fn caller_stopped_in_the_undo() {
    let directory = std::env::var("INSTANTSNAP_TEST_DIRECTORY").unwrap();
    let directory = Path::new(&directory);
    let handle =
        open(directory, &directory.join("proxy.sock"), None, &directory.join("state")).unwrap();
    handle.set_pause_limit(Duration::from_secs(5));
    let mut observer = At(|phase| match phase {
        Phase::Switch => std::thread::scope(|scope| {
            scope.spawn(|| handle.cancel().unwrap());
        }),
        Phase::Undo => signal_self(Signal::STOP),
        _ => {}
    });
    handle.create(&named("s"), INSTANTLY, &mut observer).unwrap_err();
}

/// The caller has told the watchdog that it undoes the snapshot, and has not resumed the guest.
#[test]
fn caller_that_is_stopped_in_the_undo_stops_its_guest_until_the_limit_only() {
    common::backend::by_socket_only();
    for binary in Binary::any() {
        let (opened, proxy) = through_proxy(&busy(binary));
        let before = opened.trace();
        let mut caller = process(module_path!(), "caller_stopped_in_the_undo")
            .env("INSTANTSNAP_TEST_DIRECTORY", opened.guest.directory())
            .spawn()
            .unwrap();
        wait_stopped(&caller);
        // The undo begins with this query.
        let gate = proxy.hold_reply("query-status", 1);
        go_on(&caller);
        assert!(gate.wait_arrived(DEADLINE));
        kill_process(Pid::from_raw(caller.id() as i32).unwrap(), Signal::STOP).unwrap();
        wait_stopped(&caller);
        gate.release();
        opened.guest.wait_ticks(3);
        assert!(is_stopped(&caller));
        go_on(&caller);
        assert!(caller.wait().unwrap().success());
        common::assert_untouched(&opened, &before);
    }
}

/// Not a test of its own: a caller that begins the migration early.
#[process]
fn caller_that_starts_early() {
    let directory = std::env::var("INSTANTSNAP_TEST_DIRECTORY").unwrap();
    let directory = Path::new(&directory);
    let handle =
        open(directory, &directory.join("proxy.sock"), None, &directory.join("state")).unwrap();
    handle.set_pause_limit(Duration::from_secs(3));
    handle.set_early_start(EarlyStart { tries: 1, stop_after: Some(Duration::from_millis(50)) });
    handle.create(&named("s"), INSTANTLY, &mut ()).unwrap_err();
}

/// Then nothing more comes from the stream, which is how the watchdog sees that QEMU has armed.
#[test]
fn guest_of_a_stopped_caller_runs_again_if_its_migration_has_ended_before_the_arming() {
    common::backend::by_socket_only();
    for binary in Binary::all().iter().filter(|binary| binary.version >= (10, 0, 0)) {
        let machine = machine(binary, 1).long_setup(Duration::from_millis(500));
        let (opened, proxy) = through_proxy(&machine);
        let gate = proxy.hold_reply("stop", 1);
        let mut caller = process(module_path!(), "caller_that_starts_early")
            .env("INSTANTSNAP_TEST_DIRECTORY", opened.guest.directory())
            .spawn()
            .unwrap();
        assert!(gate.wait_arrived(DEADLINE));
        kill_process(Pid::from_raw(caller.id() as i32).unwrap(), Signal::STOP).unwrap();
        wait_stopped(&caller);
        let say = |command: &str| opened.guest.control().execute(command, json!({})).unwrap();
        say("migrate_cancel");
        wait_for(DEADLINE, || (say("query-migrate")["status"] == "cancelled").then_some(()))
            .expect("it is cancelled");
        assert_eq!(say("query-status")["running"], false);
        gate.release();
        opened.guest.wait_ticks(3);
        assert!(is_stopped(&caller));
        go_on(&caller);
        assert!(caller.wait().unwrap().success());
        opened.guest.wait_ticks(3);
    }
}

/// A cgroup (v2) of the test's.
struct Cgroup(PathBuf);

impl Cgroup {
    fn create() -> Option<Cgroup> {
        let mounts = std::fs::read_to_string("/proc/self/mounts").ok()?;
        let mount = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2"))?;
        let name = format!("instantsnap-test-{}", std::process::id());
        let directory = Path::new(mount.split(' ').nth(1)?).join(name);
        std::fs::create_dir(&directory).ok()?;
        Some(Cgroup(directory))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// Not a test of its own: a caller whose environment names a cgroup for the watchdog.
#[process]
fn caller_with_a_cgroup() {
    let directory = std::env::var("INSTANTSNAP_TEST_DIRECTORY").unwrap();
    let directory = Path::new(&directory);
    let state = directory.join("state");
    let handle = open(directory, &directory.join("qmp.sock"), None, &state).unwrap();
    let mut cgroup = None;
    let mut observer = At(|phase| {
        if phase == Phase::Drain {
            let pid = watchdog_of(std::process::id()).expect("there is a watchdog");
            cgroup = Some(std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap());
        }
    });
    handle.create(&named("s"), INSTANTLY, &mut observer).unwrap();
    let place = std::env::var("INSTANTSNAP_WATCHDOG_CGROUP").unwrap();
    let name = Path::new(&place).file_name().unwrap().to_str().unwrap();
    let is_there = cgroup.unwrap().contains(name);
    let kind = handle.stats().unwrap().watchdog;
    match Path::new(&place).exists() {
        true => assert_eq!((is_there, kind), (true, WatchdogKind::Program)),
        false => {
            assert_eq!((is_there, kind), (false, WatchdogKind::Fork));
            handle.set_needs_watchdog(true);
            let error = handle.create(&named("refused"), INSTANTLY, &mut ()).unwrap_err();
            assert_says(&error, Code::OperationFailed, &["cgroup"]);
        }
    }
}

#[test]
fn watchdog_enters_the_cgroup_that_its_caller_names() {
    let Some(cgroup) = Cgroup::create() else { skip("no cgroup (v2) can be made here") };
    for place in [cgroup.0.clone(), cgroup.0.join("none")] {
        let opened = Opened::start(&busy(&Binary::any()[0]));
        let status = process(module_path!(), "caller_with_a_cgroup")
            .env("INSTANTSNAP_TEST_DIRECTORY", opened.guest.directory())
            .env("INSTANTSNAP_WATCHDOG_CGROUP", &place)
            .status();
        assert!(status.unwrap().success(), "{}", place.display());
        opened.restore_clone("s");
    }
}

/// Not a test of its own: a caller whose sandbox refuses `memfd_create`.
#[process]
fn caller_without_memfd() {
    let directory = std::env::var("INSTANTSNAP_TEST_DIRECTORY").unwrap();
    let directory = Path::new(&directory);
    refuse(libc::SYS_memfd_create);
    let state = directory.join("state");
    let handle = open(directory, &directory.join("qmp.sock"), None, &state).unwrap();
    handle.create(&named("taken"), INSTANTLY, &mut ()).unwrap();
    assert_eq!(handle.stats().unwrap().watchdog, WatchdogKind::Fork);
}

/// Makes a system call fail with ENOSYS in this process from now on.
fn refuse(number: libc::c_long) {
    let step =
        |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter { code: code as u16, jt, jf, k };
    let mut filter = [
        // The number of the call comes first in what the filter looks at.
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, number as u32),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the program and its filter are live, and the kernel copies them.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let mode = libc::SECCOMP_MODE_FILTER;
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program, 0, 0), 0);
    }
}

#[test]
fn sandbox_without_memfd_has_a_fork_as_the_watchdog() {
    let opened = Opened::start(&busy(&Binary::any()[0]));
    let status = process(module_path!(), "caller_without_memfd")
        .env("INSTANTSNAP_TEST_DIRECTORY", opened.guest.directory())
        .status();
    assert!(status.unwrap().success());
    opened.restore_clone("taken");
}

/// Kills the watchdog before the pause, and returns the kind of the one that replaces it.
fn replace_killed_watchdog() -> Vec<WatchdogKind> {
    let mut kinds = Vec::new();
    for binary in Binary::any() {
        let (opened, proxy) = through_proxy(&busy(binary));
        // By then QEMU has the snapshot's settings.
        let gate = proxy.hold_reply("getfd", 1);
        let (mut first, mut second) = (None, None);
        std::thread::scope(|scope| {
            let killer = scope.spawn(|| {
                assert!(gate.wait_arrived(DEADLINE));
                let pid = kill_watchdog_of(std::process::id());
                gate.release();
                pid
            });
            let mut observer = At(|phase| {
                if phase == Phase::Drain {
                    second = watchdog_of(std::process::id());
                }
            });
            opened.handle.create(&named("s"), INSTANTLY, &mut observer).unwrap();
            first = Some(killer.join().unwrap());
        });
        assert!(second.is_some() && first != second, "{first:?} {second:?}");
        kinds.push(opened.handle.stats().unwrap().watchdog);
        opened.restore_clone("s");
    }
    kinds
}

#[test]
fn watchdog_that_is_killed_before_the_pause_is_replaced() {
    let kinds = replace_killed_watchdog();
    assert!(kinds.iter().all(|kind| *kind == WatchdogKind::Program), "{kinds:?}");
}

/// A thread of the caller has begun to read the stream beside a forked watchdog.
#[test]
fn forked_watchdog_that_is_killed_before_the_pause_is_replaced() {
    // SAFETY: this process runs this test only, and the harness's threads do not read the
    // environment meanwhile.
    unsafe { std::env::set_var(PROGRAM, "") };
    let kinds = replace_killed_watchdog();
    assert!(kinds.iter().all(|kind| *kind == WatchdogKind::Fork), "{kinds:?}");
}

/// The number of signals SIGCHLD that this process has got.
static CHILDREN_ENDED: AtomicU32 = AtomicU32::new(0);

extern "C" fn count_child(_signal: c_int) {
    CHILDREN_ENDED.fetch_add(1, Ordering::SeqCst);
}

/// Not a test of its own: a caller that looks for children of its own.
#[process]
fn caller_without_children() {
    let directory = std::env::var("INSTANTSNAP_TEST_DIRECTORY").unwrap();
    let directory = Path::new(&directory);
    let handle =
        open(directory, &directory.join("qmp.sock"), None, &directory.join("state")).unwrap();
    // SAFETY: the handler is async-signal-safe.
    unsafe { libc::signal(libc::SIGCHLD, count_child as *const () as libc::sighandler_t) };
    let mut children = None;
    let mut observer = At(|phase| {
        if phase == Phase::Drain {
            // SAFETY: no status is asked for.
            let waited = unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) };
            let errno = std::io::Error::last_os_error().raw_os_error();
            children = Some((waited, errno, watchdog_of(std::process::id()).is_some()));
        }
    });
    handle.create(&named("s"), INSTANTLY, &mut observer).unwrap();
    assert_eq!(children, Some((-1, Some(libc::ECHILD), true)));
    assert_eq!(CHILDREN_ENDED.load(Ordering::SeqCst), 0);
}

#[test]
fn watchdog_is_no_child_of_its_caller_and_raises_no_sigchld() {
    let opened = Opened::start(&busy(&Binary::any()[0]));
    for program in [None, Some("")] {
        let mut caller = process(module_path!(), "caller_without_children");
        caller.env("INSTANTSNAP_TEST_DIRECTORY", opened.guest.directory());
        if let Some(program) = program {
            caller.env(PROGRAM, program);
        }
        assert!(caller.status().unwrap().success(), "{program:?}");
        opened.handle.delete("s", 0).unwrap();
    }
}

/// Not a test of its own: a caller for which the library can start no process.
#[process]
fn caller_without_processes() {
    let directory = std::env::var("INSTANTSNAP_TEST_DIRECTORY").unwrap();
    let directory = Path::new(&directory);
    let state = directory.join("state");
    let handle = open(directory, &directory.join("qmp.sock"), None, &state).unwrap();
    handle.set_needs_watchdog(true);
    let error = handle.create(&named("refused"), INSTANTLY, &mut ()).unwrap_err();
    assert_says(&error, Code::OperationFailed, &["no watchdog", "limit"]);
    handle.set_needs_watchdog(false);
    handle.create(&named("taken"), INSTANTLY, &mut ()).unwrap();
    assert_eq!(handle.stats().unwrap().watchdog, WatchdogKind::None);
}

#[test]
fn snapshot_without_a_watchdog_says_so_and_is_refused_where_one_is_required() {
    let shim = gcc(
        &workspace().join("tests/kit/shim/no-process.c"),
        "no-process.so",
        "-shared -fPIC -ldl",
    );
    for binary in Binary::any() {
        let opened = Opened::start(&busy(binary));
        let before = opened.trace();
        let status = process(module_path!(), "caller_without_processes")
            .env("INSTANTSNAP_TEST_DIRECTORY", opened.guest.directory())
            .env("LD_PRELOAD", &shim)
            .status();
        assert!(status.unwrap().success());
        assert_eq!(opened.trace().qemu.0["status"], before.qemu.0["status"]);
        opened.restore_clone("taken");
        opened.guest.wait_ticks(3);
    }
}
