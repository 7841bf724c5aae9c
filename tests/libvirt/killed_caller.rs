// SPDX-License-Identifier: LGPL-2.1-or-later

//! P3 and P4 through a stock libvirt: a caller that is killed leaves a guest that runs, and nothing
//! else.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::nbd::OnServer;
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

/// Not a test of its own: the process that the test below starts, which kills itself in the phase
/// it is told.
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
    handle.create(&variable("XML"), flags, &mut observer).unwrap();
    assert_eq!(flags & HALT, HALT, "it was to be killed");
    // Whatever it does now, it is killed by the test.
    std::thread::sleep(Duration::from_secs(600));
}

/// Such a process; after the last phase comes HALT.
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

/// The machine's log, on a machine that has none.
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

/// A guest that is still paused, or being merged, is not there yet.
fn wait_untouched(opened: &OpenedDomain, before: &DomainTrace, phase: Phase) {
    let settled = wait_for(Duration::from_secs(90), || (opened.trace() == *before).then_some(()));
    if settled.is_none() {
        eprintln!("killed in {phase:?}");
        opened.assert_untouched(before);
    }
}

#[test]
fn a_disk_on_a_server_is_on_it_again_when_the_caller_of_its_snapshot_was_killed() {
    let daemon = Daemon::session();
    let remote = OnServer::start(&daemon);
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
fn a_domain_whose_snapshot_loses_its_caller_is_as_before_and_can_be_snapshotted_again() {
    let daemon = Daemon::session();
    for binary in Binary::under_libvirt() {
        // Memory enough for the drain to be long, and a guest that writes into all of it.
        let machine = machine(binary, 2).memory(128).prealloc().append("dense=64");
        let opened = OpenedDomain::start(&machine, &daemon);
        for (index, phase) in PHASES.iter().enumerate() {
            eprintln!("{}: killed in {phase:?}", binary.name);
            let before = opened.trace();
            take_snapshot_and_die(&opened, index);
            wait_untouched(&opened, &before, *phase);
            // It counts, and its memory is not write-protected: each round writes every page.
            opened.guest.wait_ticks(5);
        }
        opened.snapshot("next").unwrap_or_else(|error| opened.guest.fail(&error.message));
        opened.restore_clone("next");
        opened.guest.wait_ticks(3);
    }
}

#[test]
fn a_caller_that_is_killed_leaves_its_empty_file_empty() {
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

/// Nobody else is left who could be told.
#[test]
fn an_overlay_that_the_watchdog_of_a_killed_caller_cannot_merge_stays_and_the_log_says_so() {
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
    // As it says.
    set_mode(&image, 0o644);
    let words = line.split('`').nth(1).unwrap().strip_prefix("virsh ").unwrap();
    daemon.virsh(&words.split(' ').collect::<Vec<_>>());
    assert!(opened.guest.virsh("domblklist", &[]).contains(&*format!("{}\n", image.display())));
    opened.guest.wait_ticks(3);
}

/// The memory is on disk, and the snapshot recorded: the guest ends, and nothing else has its
/// memory.
#[test]
fn a_caller_that_is_killed_while_its_domain_is_halted_leaves_the_complete_snapshot() {
    let daemon = Daemon::session();
    let binary = &Binary::under_libvirt()[0];
    let opened = OpenedDomain::start(&machine(binary, 1), &daemon);
    let qemu = Pid::from_raw(opened.guest.pid() as i32).unwrap();
    let qemu = pidfd_open(qemu, PidfdFlags::empty()).unwrap();
    let mut caller = child_in(&opened, PHASES.len()).spawn().unwrap();
    // libvirtd is about to hear of it, and the caller waits for libvirtd.
    poll(&mut [PollFd::new(&qemu, PollFlags::IN)], None).unwrap();
    caller.kill().unwrap();
    caller.wait().unwrap();
    // A watchdog that still stood would hold the domain, and let it go when it has undone the
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
