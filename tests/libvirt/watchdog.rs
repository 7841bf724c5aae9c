// SPDX-License-Identifier: LGPL-2.1-or-later

//! The watchdog of a snapshot through a stock libvirt: a caller that is stopped does not stop its
//! guest.

use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use common::virt::OpenedDomain;
use common::watchdog::{kill_watchdog_of, program_of, watchdog_of};
use common::{At, Handle, INSTANTLY, assert_says, machine};
use instantsnap::backend::LibvirtConnector;
use instantsnap::engine::Phase;
use instantsnap::error::Code;
use instantsnap::libvirt::Connect;
use instantsnap_testkit::program::process;
use instantsnap_testkit::{Binary, DEADLINE, Daemon, process, test, wait_for};
use rustix::process::{Pid, Signal, getpid, kill_process};

/// Not a test of its own: a caller that is stopped in the phase that a variable names.
#[process]
fn caller() {
    let variable = |name: &str| std::env::var(format!("INSTANTSNAP_TEST_{name}")).unwrap();
    let domain = Connect::open(&variable("URI")).unwrap().unwrap().domain(&variable("UUID"));
    let connector = LibvirtConnector::open(domain.unwrap()).unwrap();
    let handle = Handle::open_libvirt(Arc::new(connector));
    handle.set_pause_limit(Duration::from_secs(4));
    let stopped = variable("PHASE");
    let mut observer = At(|phase| {
        if format!("{phase:?}") == stopped {
            kill_process(getpid(), Signal::STOP).unwrap();
        }
    });
    let taken = handle.create(&variable("XML"), INSTANTLY, &mut observer);
    if stopped == "Drain" {
        taken.unwrap();
    } else {
        let error = taken.expect_err("the limit of the pause has passed");
        assert_says(&error, Code::OperationTimeout, &[&variable("SAYS")]);
    }
}

fn caller_of(opened: &OpenedDomain, phase: Phase) -> Command {
    let mut command = process(module_path!(), "caller");
    command
        .env("INSTANTSNAP_TEST_URI", opened.guest.daemon().uri())
        .env("INSTANTSNAP_TEST_UUID", opened.guest.virsh("domuuid", &[]).trim())
        .env("INSTANTSNAP_TEST_XML", opened.xml("stopped", ""))
        .env("INSTANTSNAP_TEST_PHASE", format!("{phase:?}"))
        .env("INSTANTSNAP_TEST_SAYS", "the watchdog had to resume the guest")
        .stdout(Stdio::null());
    command
}

fn is_stopped(caller: &Child) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", caller.id()));
    stat.is_ok_and(|stat| stat.contains(") T"))
}

#[test]
fn caller_that_is_stopped_does_not_stop_its_domain() {
    let daemon = Daemon::session();
    for binary in Binary::under_libvirt() {
        // In each round the guest writes to more memory than a pipe holds.
        let machine = machine(binary, 1).memory(128).prealloc().append("dense=64");
        let opened = OpenedDomain::start(&machine, &daemon);
        for phase in [Phase::Switch, Phase::Arm, Phase::Drain] {
            let before = opened.trace();
            let mut caller = caller_of(&opened, phase).spawn().unwrap();
            wait_for(DEADLINE, || is_stopped(&caller).then_some(())).expect("it stops");
            // In the pause, the guest is paused first, and then runs.
            opened.guest.wait_ticks(3);
            assert!(is_stopped(&caller), "{phase:?}");
            kill_process(Pid::from_raw(caller.id() as i32).unwrap(), Signal::CONT).unwrap();
            assert!(caller.wait().unwrap().success(), "{phase:?}");
            if phase != Phase::Drain {
                opened.assert_untouched(&before);
            }
        }
        opened.guest.wait_ticks(3);
        opened.restore_clone("stopped");
    }
}

/// The message does not say that the watchdog has resumed a guest that it could not resume.
#[test]
fn watchdog_whose_virsh_fails_says_so() {
    let daemon = Daemon::session();
    let opened = OpenedDomain::start(&machine(&Binary::under_libvirt()[0], 1), &daemon);
    let virsh = opened.guest.directory().join("virsh");
    let called = opened.guest.directory().join("called");
    let script = format!("#!/bin/sh\necho >> '{}'\nexit 1\n", called.display());
    std::fs::write(&virsh, script).unwrap();
    std::fs::set_permissions(&virsh, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::write(&called, "").unwrap();
    let before = opened.trace();
    let mut caller = caller_of(&opened, Phase::Arm)
        .env("INSTANTSNAP_VIRSH", &virsh)
        .env("INSTANTSNAP_TEST_SAYS", "the watchdog tried in vain to resume the guest")
        .spawn()
        .unwrap();
    // `virsh resume` fails, then `cont` by virsh, and both once more: the first failure is
    // reported.
    let tried = || std::fs::read(&called).is_ok_and(|calls| calls.len() >= 4).then_some(());
    wait_for(DEADLINE, tried).expect("the watchdog runs virsh");
    assert!(is_stopped(&caller));
    kill_process(Pid::from_raw(caller.id() as i32).unwrap(), Signal::CONT).unwrap();
    assert!(caller.wait().unwrap().success());
    opened.assert_untouched(&before);
    opened.guest.wait_ticks(3);
}

/// Its successor goes on where it was: the image has every byte, as the clone shows.
#[test]
fn watchdog_that_is_killed_is_replaced() {
    let daemon = Daemon::session();
    let machine = machine(&Binary::under_libvirt()[0], 1).memory(128).prealloc().append("dense=64");
    let opened = OpenedDomain::start(&machine, &daemon);
    for killed in [Phase::Switch, Phase::Drain] {
        let (mut first, mut last) = (None, None);
        let mut observer = At(|phase| {
            if phase == killed {
                first = Some(kill_watchdog_of(std::process::id()));
            }
            if phase == Phase::Finish {
                last = watchdog_of(std::process::id()).map(|pid| (pid, program_of(pid)));
            }
        });
        let name = format!("{killed:?}");
        opened.handle.create(&opened.xml(&name, ""), INSTANTLY, &mut observer).unwrap();
        let (pid, program) = last.unwrap();
        assert_eq!((first == Some(pid), &*program), (false, "instantsnap-watchdog"), "{name}");
        opened.restore_clone(&name);
    }
    opened.guest.wait_ticks(3);
}
