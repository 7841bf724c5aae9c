// SPDX-License-Identifier: LGPL-2.1-or-later

//! Through a stock libvirt: a caller that is killed leaves a running guest, and nothing else.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::nbd::NbdDomain;
use common::virt::{DomainTrace, OpenedDomain};
use common::{ALL_SECTORS, At, Handle, INSTANTLY, machine};
use instantsnap::backend::LibvirtConnector;
use instantsnap::engine::Phase;
use instantsnap::image::Image;
use instantsnap::libvirt::Connect;
use instantsnap::model::flags::HALT;
use instantsnap_testkit::program::process;
use instantsnap_testkit::{Binary, Daemon, process, skip, test, wait_for};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

const PHASES: [Phase; 5] = [Phase::Pause, Phase::Switch, Phase::Arm, Phase::Drain, Phase::Finish];

/// The size of the stack that musl gives to a thread.
const SMALL_STACK: usize = 128 << 10;

extern "C" fn ignore(_signal: std::ffi::c_int) {}

/// Blocks or unblocks the timer's signal in this thread.
fn block_interruptions(how: std::ffi::c_int) {
    // SAFETY: `sigemptyset` initialises the set.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGALRM);
        assert_eq!(libc::pthread_sigmask(how, &raw const set, std::ptr::null_mut()), 0);
    }
}

/// From now on signals interrupt this thread's system calls all the time, as a profiler's timer
/// does.
fn begin_interruptions() {
    block_interruptions(libc::SIG_UNBLOCK);
    let every = libc::timeval { tv_sec: 0, tv_usec: 500 };
    let timer = libc::itimerval { it_interval: every, it_value: every };
    // SAFETY: the handler does nothing, and the structures are initialised: without SA_RESTART.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = ignore as *const () as libc::sighandler_t;
        assert_eq!(libc::sigaction(libc::SIGALRM, &raw const action, std::ptr::null_mut()), 0);
        assert_eq!(libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut()), 0);
    }
}

/// The process that the tests below start. It kills itself in the phase that it is told. Its thread
/// has a small stack, and is interrupted by signals.
#[process]
fn child() {
    let uri = std::env::var("INSTANTSNAP_TEST_URI").unwrap();
    let variable = |name: &str| std::env::var(format!("INSTANTSNAP_TEST_{name}")).unwrap();
    let phase: usize = variable("PHASE").parse().unwrap();
    let domain = Connect::open(&uri).unwrap().unwrap().domain(&variable("UUID")).unwrap();
    let handle = Handle::open_libvirt(std::sync::Arc::new(LibvirtConnector::open(domain).unwrap()));
    let flags = if phase == PHASES.len() { INSTANTLY | HALT } else { INSTANTLY };
    let mut observer = At(|now| {
        if PHASES.get(phase) == Some(&now) {
            if let Ok(image) = std::env::var("INSTANTSNAP_TEST_WRITE_PROTECT") {
                set_mode(Path::new(&image), 0o444);
            }
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL)
                .unwrap();
        }
    });
    let xml = variable("XML");
    block_interruptions(libc::SIG_BLOCK);
    let take = || {
        begin_interruptions();
        handle.create(&xml, flags, &mut observer).unwrap();
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(SMALL_STACK);
        thread.spawn_scoped(scope, take).unwrap().join().unwrap();
    });
    assert_eq!(flags & HALT, HALT, "it was to be killed");
    // The test kills the process while it sleeps.
    std::thread::sleep(Duration::from_secs(600));
}

/// The command of that process. The phase after the last one stands for HALT.
fn child_in(opened: &OpenedDomain, phase: usize) -> Command {
    let mut command = process(module_path!(), "child");
    command
        .env("INSTANTSNAP_TEST_URI", opened.guest.daemon().uri())
        .env("INSTANTSNAP_TEST_UUID", opened.guest.virsh("domuuid", &[]).trim())
        .env("INSTANTSNAP_TEST_XML", opened.xml("killed", ""))
        .env("INSTANTSNAP_TEST_PHASE", phase.to_string())
        .stdout(std::process::Stdio::null());
    command
}

fn set_mode(file: &Path, mode: u32) {
    std::fs::set_permissions(file, std::fs::Permissions::from_mode(mode)).unwrap();
}

/// A receiver in place of the system log, on a machine that has none.
struct Log(UnixDatagram);

impl Log {
    const PLACE: &str = "/dev/log";

    fn start() -> Option<Log> {
        let log = UnixDatagram::bind(Log::PLACE).ok()?;
        log.set_read_timeout(Some(Duration::from_secs(90))).unwrap();
        Some(Log(log))
    }

    fn line(&self) -> String {
        let mut buffer = [0; 4096];
        let got = self.0.recv(&mut buffer).expect("the log is told of nothing");
        String::from_utf8(buffer[..got].to_vec()).unwrap()
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(Log::PLACE);
    }
}

fn take_snapshot_and_die(opened: &OpenedDomain, phase: usize) {
    run_and_die(&mut child_in(opened, phase));
}

fn run_and_die(caller: &mut Command) {
    let status = caller.status().unwrap();
    assert_eq!(status.signal(), Some(9), "{status}");
}

/// Waits until the guest is as before: it can still be paused, or its disks can still be merged.
fn wait_untouched(opened: &OpenedDomain, before: &DomainTrace, phase: Phase) {
    let settled = wait_for(Duration::from_secs(90), || (opened.trace() == *before).then_some(()));
    if settled.is_none() {
        eprintln!("killed in {phase:?}");
        opened.assert_untouched(before);
    }
}

#[test]
fn network_disk_is_on_its_image_again_after_the_caller_was_killed() {
    let daemon = Daemon::session();
    let remote = NbdDomain::start(&daemon);
    let before = remote.opened.trace();
    for phase in [1, 3] {
        run_and_die(
            child_in(&remote.opened, phase).env("INSTANTSNAP_TEST_XML", remote.xml("killed")),
        );
        wait_untouched(&remote.opened, &before, PHASES[phase]);
        remote.assert_on_server();
        assert!(!remote.overlay("killed").exists());
        remote.guest().wait_ticks(ALL_SECTORS);
    }
}

#[test]
fn domain_of_a_killed_caller_is_as_before_and_can_be_snapshotted_again() {
    let daemon = Daemon::session();
    for binary in Binary::under_libvirt() {
        // With this much memory the drain is long, and the guest writes into all of it.
        let machine = machine(binary, 2).memory(128).prealloc().append("dense=64");
        let opened = OpenedDomain::start(&machine, &daemon);
        for (index, phase) in PHASES.iter().enumerate() {
            eprintln!("{}: killed in {phase:?}", binary.name);
            let before = opened.trace();
            take_snapshot_and_die(&opened, index);
            wait_untouched(&opened, &before, *phase);
            // The guest counts, and its memory is not write-protected: each round writes every
            // page.
            opened.guest.wait_ticks(5);
        }
        opened.snapshot("next").unwrap_or_else(|error| opened.guest.fail(&error.message));
        opened.restore_clone("next");
        opened.guest.wait_ticks(3);
    }
}

#[test]
fn killed_caller_leaves_its_precreated_overlay_empty() {
    let daemon = Daemon::session();
    let machine = machine(&Binary::under_libvirt()[0], 1).memory(128).prealloc().append("dense=64");
    let opened = OpenedDomain::start(&machine, &daemon);
    let empty = opened.guest.directory().join("empty");
    std::fs::write(&empty, "").unwrap();
    std::os::unix::fs::chown(&empty, Some(daemon.user()), Some(daemon.user())).unwrap();
    let overlay =
        format!("<disks><disk name='vda'><source file='{}'/></disk></disks>", empty.display());
    let before = opened.trace();
    let mut caller = child_in(&opened, 3);
    run_and_die(caller.env("INSTANTSNAP_TEST_XML", opened.xml("killed", &overlay)));
    wait_untouched(&opened, &before, Phase::Drain);
    let is_empty = wait_for(Duration::from_secs(30), || {
        (std::fs::metadata(&empty).unwrap().len() == 0).then_some(())
    });
    assert!(is_empty.is_some(), "{} bytes are left", std::fs::metadata(&empty).unwrap().len());
    opened.guest.wait_ticks(65);
}

/// The caller is gone, so the log is the only place for the message.
#[test]
fn watchdog_keeps_and_logs_an_overlay_that_it_cannot_merge() {
    let Some(log) = Log::start() else { skip("this machine has a log") };
    let daemon = Daemon::session();
    let opened = OpenedDomain::start(&machine(&Binary::under_libvirt()[0], 1), &daemon);
    let image = opened.guest.disks()[0].file.clone();
    let drain = PHASES.iter().position(|phase| *phase == Phase::Drain).unwrap();
    let mut caller = child_in(&opened, drain);
    assert!(!caller.env("INSTANTSNAP_TEST_WRITE_PROTECT", &image).status().unwrap().success());
    let (line, overlay) = (log.line(), image.with_extension("killed"));
    for part in ["'killed'", overlay.to_str().unwrap(), "'vda'", image.to_str().unwrap()] {
        assert!(line.contains(part), "{line}");
    }
    opened.guest.wait_ticks(3);
    // The command that the message recommends works.
    set_mode(&image, 0o644);
    let words = line.split('`').nth(1).unwrap().strip_prefix("virsh ").unwrap();
    daemon.virsh(&words.split(' ').collect::<Vec<_>>());
    assert!(opened.guest.virsh("domblklist", &[]).contains(&*format!("{}\n", image.display())));
    opened.guest.wait_ticks(3);
}

/// The memory image is on disk and the snapshot is recorded. The guest ends, and only the image has
/// its memory.
#[test]
fn caller_killed_during_halt_leaves_the_complete_snapshot() {
    let daemon = Daemon::session();
    let binary = &Binary::under_libvirt()[0];
    let opened = OpenedDomain::start(&machine(binary, 1), &daemon);
    let qemu = Pid::from_raw(opened.guest.pid() as i32).unwrap();
    let qemu = pidfd_open(qemu, PidfdFlags::empty()).unwrap();
    let mut caller = child_in(&opened, PHASES.len()).spawn().unwrap();
    // libvirtd will learn of it next, and the caller waits for libvirtd.
    poll(&mut [PollFd::new(&qemu, PollFlags::IN)], None).unwrap();
    caller.kill().unwrap();
    caller.wait().unwrap();
    // A watchdog that were still alive would hold the domain, and release it after the undo of the
    // snapshot.
    let ended = wait_for(Duration::from_secs(60), || {
        let error = opened.snapshot("next").expect_err("the domain has ended");
        error.message.contains("is not running").then_some(())
    });
    assert!(ended.is_some(), "the domain is held");
    assert!(opened.find("killed").is_some(), "the record is gone");
    assert!(Image::open(&opened.memory_file("killed")).is_ok());
    opened.restore_clone("killed").wait_ticks(3);
}
