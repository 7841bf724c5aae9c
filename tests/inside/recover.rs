// SPDX-License-Identifier: LGPL-2.1-or-later

//! Both the daemon and the watchdog of its snapshot are killed.

use std::path::PathBuf;

use common::inside::{Subject, session};
use common::watchdog::kill_watchdog_of;
use common::{files_below, machine};
use instantsnap_testkit::{Binary, Daemon, domain_fingerprint, test, wait_for};
use rustix::process::{Pid, Signal, kill_process};

/// The journals of the daemon's snapshots.
fn journals(daemon: &Daemon) -> Vec<PathBuf> {
    let mut files = files_below(&daemon.directory().join("state"));
    files.retain(|file| file.extension().is_some_and(|end| end == "journal"));
    files
}

#[test]
fn next_snapshot_in_the_daemon_recovers_the_domain_first() {
    let daemon = session(&[]);
    // QEMU 7.2 freezes its guest if the reader of its stream is killed.
    let freezes = |binary: &Binary| binary.version < (9, 0, 0);
    let all = Binary::all();
    let binary = all.iter().find(|binary| !freezes(binary)).unwrap_or(&all[0]);
    let is_frozen = freezes(binary);
    let machine = machine(binary, 1).prealloc().append("dense=32 rest=20000");
    let subject = Subject::start(&machine, &daemon);
    let (before, files) =
        (domain_fingerprint(&subject.guest), files_below(subject.guest.directory()));
    let client = subject.spawn("s");
    let slowed = subject.slow_down("s");
    let recorded = || (subject.snapshots() == ["s"]).then_some(());
    wait_for(std::time::Duration::from_secs(60), recorded).expect("it is not recorded");
    assert_eq!(journals(&daemon).len(), 1);
    // A daemon that runs would replace its watchdog.
    let process = Pid::from_raw(daemon.pid() as i32).unwrap();
    kill_process(process, Signal::STOP).unwrap();
    kill_watchdog_of(daemon.pid());
    daemon.kill();
    assert!(!client.wait_with_output().unwrap().status.success());
    drop(slowed);
    daemon.start_again();
    assert!(subject.guest.virsh("domblklist", &[]).contains(".s"));
    if is_frozen {
        // The domain can be ended and started: its disks are put back first.
        subject.guest.kill();
        let is_off = || (subject.guest.virsh("domstate", &[]).trim() == "shut off").then_some(());
        wait_for(std::time::Duration::from_secs(60), is_off).expect("libvirt notices it");
        subject.guest.start_domain();
        subject.guest.wait_ticks(2);
    }
    assert_eq!(subject.snapshot("next").as_deref(), Ok("next"));
    assert_eq!(subject.snapshots(), ["next"]);
    assert!(!subject.guest.virsh("domblklist", &[]).contains(".s\n"));
    assert_eq!(journals(&daemon), [] as [PathBuf; 0]);
    subject.guest.wait_ticks(3);
    subject.restore_clone("next", &Daemon::session());
    assert_eq!(subject.on_snapshot("next", "delete(0)"), Ok("0".into()));
    if !is_frozen {
        let after = domain_fingerprint(&subject.guest);
        assert!(after == before, "{}", before.differences(&after));
    }
    assert_eq!(files_below(subject.guest.directory()), files);
}
