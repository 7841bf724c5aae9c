// SPDX-License-Identifier: LGPL-2.1-or-later

//! libvirtd is killed, is restarted, or waits for another client, while a snapshot is being taken.

use std::fs::File;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::Duration;

use common::virt::OpenedDomain;
use common::{At, machine};
use instantsnap::engine::Phase;
use instantsnap::error::{Code, Error};
use instantsnap_testkit::{Binary, DEADLINE, Daemon, Machine, test, wait_for};
use serde_json::{Value, json};

/// The settings of QEMU that a snapshot must not change, even where the daemon was restarted.
fn settings(domain: &OpenedDomain) -> [Value; 2] {
    let ask = |command| domain.guest.control().execute(command, json!({})).unwrap();
    [ask("query-migrate-capabilities"), ask("query-migrate-parameters")]
}

fn dense(binary: &'static Binary) -> Machine {
    machine(binary, 2).append("dense=32")
}

#[derive(Clone, Copy, Debug)]
enum End {
    Killed,
    /// By SIGTERM, as a service manager ends it.
    Terminated,
}

fn end(daemon: &Daemon, how: End) {
    match how {
        End::Killed => daemon.kill(),
        End::Terminated => {
            let file = daemon.directory().join("run/libvirtd.pid");
            let pid = std::fs::read_to_string(file).unwrap().trim().parse().unwrap();
            let pid = rustix::process::Pid::from_raw(pid).unwrap();
            rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
            let gone = || rustix::process::test_kill_process(pid).is_err().then_some(());
            wait_for(DEADLINE, gone).expect("libvirtd ends when it is asked to");
        }
    }
}

/// Takes a snapshot, ends the daemon in this phase and starts it again at once, as a service
/// manager does.
fn snapshot_with_restart(domain: &OpenedDomain, at: Phase, how: End) -> Result<String, Error> {
    let daemon = domain.guest.daemon().clone();
    let mut starting = None;
    let mut restart = At(|phase| {
        if phase == at && starting.is_none() {
            end(&daemon, how);
            let daemon = daemon.clone();
            starting = Some(std::thread::spawn(move || daemon.start_again()));
        }
    });
    let result = domain.snapshot_observed("restarted", &mut restart);
    starting.expect("the phase was entered").join().unwrap();
    result
}

/// Asserts that a successful snapshot can be restored, that nothing is left of a failed one, and
/// that the guest runs in both cases.
fn check(
    domain: &OpenedDomain,
    before: &common::virt::DomainTrace,
    result: &Result<String, Error>,
    what: &str,
) {
    eprintln!("{what}: {result:?}");
    assert_eq!(domain.guest.virsh("domstate", &[]).trim(), "running", "{what}");
    domain.guest.wait_ticks(3);
    match result {
        Ok(name) => {
            assert!(domain.find(name).is_some(), "{what}: recorded");
            domain.restore_clone(name);
        }
        Err(_) => domain.assert_untouched(before),
    }
}

#[test]
fn libvirtd_restart_in_the_drain_does_not_fail_the_snapshot() {
    for binary in Binary::under_libvirt() {
        for how in [End::Killed, End::Terminated] {
            let daemon = Daemon::session();
            let domain = OpenedDomain::start(&dense(binary), &daemon);
            let (before, settings_before) = (domain.trace(), settings(&domain));
            let result = snapshot_with_restart(&domain, Phase::Drain, how);
            let what = format!("QEMU {}, {how:?}", binary.name);
            assert!(result.is_ok(), "{what}: {result:?}");
            assert_eq!(settings(&domain), settings_before, "{what}");
            check(&domain, &before, &result, &what);
        }
    }
}

#[test]
fn libvirtd_restart_in_the_pause_leaves_a_running_guest() {
    for binary in Binary::under_libvirt() {
        for (at, how) in [
            (Phase::Switch, End::Killed),
            (Phase::Arm, End::Killed),
            (Phase::Switch, End::Terminated),
        ] {
            let daemon = Daemon::session();
            let domain = OpenedDomain::start(&dense(binary), &daemon);
            let (before, settings_before) = (domain.trace(), settings(&domain));
            let result = snapshot_with_restart(&domain, at, how);
            let what = format!("QEMU {}, {how:?} in {at:?}", binary.name);
            check(&domain, &before, &result, &what);
            assert_eq!(settings(&domain), settings_before, "{what}");
        }
    }
}

#[test]
fn libvirtd_restart_after_the_pause_limit_leaves_a_running_guest() {
    for binary in Binary::under_libvirt() {
        let daemon = Daemon::session();
        let domain = OpenedDomain::start(&dense(binary), &daemon);
        domain.handle.set_pause_limit(Duration::from_secs(1));
        let before = domain.trace();
        let mut starting = None;
        let mut restart = At(|phase| match phase {
            Phase::Switch => daemon.kill(),
            Phase::Undo => {
                let daemon = daemon.clone();
                starting = Some(std::thread::spawn(move || daemon.start_again()));
            }
            _ => {}
        });
        let error = domain.snapshot_observed("late", &mut restart).unwrap_err();
        starting.expect("it was undone").join().unwrap();
        assert_eq!(error.code, Code::Rpc, "{error}");
        assert!(error.message.contains("lost the connection to the libvirt daemon"), "{error}");
        check(&domain, &before, &Err(error), &binary.name);
    }
}

/// A `virsh dump` that holds the domain's job until its output is read.
struct Dump {
    virsh: std::process::Child,
    fifo: PathBuf,
    unread: File,
}

impl Dump {
    fn start(domain: &OpenedDomain) -> Dump {
        let (guest, daemon) = (&domain.guest, domain.guest.daemon());
        let fifo = guest.directory().join("fifo");
        let mode = rustix::fs::Mode::from_raw_mode(0o666);
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        daemon.give(guest.directory());
        let unread = File::options().read(true).write(true).open(&fifo).unwrap();
        let virsh = daemon.virsh_spawn(&["dump", guest.name(), fifo.to_str().unwrap()]);
        wait_for(DEADLINE, || {
            let job = daemon.try_virsh(&["domjobinfo", guest.name()]);
            job.is_ok_and(|job| job.contains("Dump")).then_some(())
        })
        .expect("the job has begun");
        Dump { virsh, fifo, unread }
    }

    fn finish(mut self) {
        let mut reader = File::open(&self.fifo).unwrap();
        drop(self.unread);
        std::io::copy(&mut reader, &mut std::io::sink()).unwrap();
        self.virsh.wait().unwrap();
        std::fs::remove_file(self.fifo).unwrap();
    }
}

/// Removes the snapshot's lock on migrations in QEMU, as if the other client had come before it was
/// set.
fn lift_migration_lock(domain: &OpenedDomain) {
    let monitor = common::virt::domain(&domain.guest);
    for command in [
        json!({ "execute": "migrate-set-capabilities",
            "arguments": { "capabilities": [{ "capability": "background-snapshot", "state": false }] } }),
        json!({ "execute": "migrate-set-parameters", "arguments": { "tls-creds": "" } }),
    ] {
        let reply = monitor.monitor_command(&command.to_string(), None).unwrap();
        assert!(!reply.contains("error"), "{reply}");
    }
}

#[test(long)]
fn job_of_another_client_does_not_extend_the_pause_beyond_its_limit() {
    let daemon = Daemon::session();
    for binary in Binary::under_libvirt() {
        let domain = OpenedDomain::start(&dense(binary), &daemon);
        domain.handle.set_pause_limit(Duration::from_secs(1));
        // At the first dump libvirt raises QEMU's bandwidth limit, and leaves it raised.
        let first = domain.guest.directory().join("first");
        domain.guest.virsh("dump", &["--live", first.to_str().unwrap()]);
        std::fs::remove_file(first).unwrap();
        let before = domain.trace();
        let mut dump = None;
        let mut ticks = None;
        let (guest, ticked) = (&domain.guest, &mut ticks);
        let result = std::thread::scope(|scope| {
            let mut ticked = Some(ticked);
            let mut hold = At(|phase| match phase {
                Phase::Switch => {
                    lift_migration_lock(&domain);
                    dump = Some(Dump::start(&domain));
                }
                Phase::Undo => {
                    let (dump, ticked) = (dump.take().unwrap(), ticked.take().unwrap());
                    scope.spawn(move || {
                        // The other client's job ends only after the guest has been resumed.
                        *ticked = Some(guest.try_ticks(3, DEADLINE));
                        dump.finish();
                    });
                }
                _ => {}
            });
            domain.snapshot_observed("waited", &mut hold)
        });
        eprintln!("QEMU {}: {ticks:?}, {result:?}", binary.name);
        assert!(
            ticks.is_some_and(|ticks| ticks.is_ok()),
            "QEMU {}: the guest runs beside the other's job",
            binary.name
        );
        let error = result.unwrap_err();
        assert_eq!(error.code, Code::OperationTimeout, "{error}");
        assert!(error.message.contains("cannot switch the domain's disks"), "{error}");
        check(&domain, &before, &Err(error), &binary.name);
    }
}

/// As a hanging daemon does, or a service manager's socket whose daemon does not start.
#[test]
fn unresponsive_libvirtd_does_not_extend_the_pause_beyond_its_limit() {
    for binary in Binary::under_libvirt() {
        let daemon = Daemon::session();
        let domain = OpenedDomain::start(&dense(binary), &daemon);
        domain.handle.set_pause_limit(Duration::from_secs(1));
        let (before, settings_before) = (domain.trace(), settings(&domain));
        let (undone, wait_undone) = mpsc::channel();
        let mut wait_undone = Some(wait_undone);
        let mut starting = None;
        let mut hang = At(|phase| match phase {
            Phase::Switch => {
                daemon.kill();
                std::fs::remove_file(daemon.socket()).unwrap();
                let silent = UnixListener::bind(daemon.socket()).unwrap();
                let (daemon, wait_undone) = (daemon.clone(), wait_undone.take().unwrap());
                starting = Some(std::thread::spawn(move || {
                    let in_time = wait_undone.recv_timeout(DEADLINE).is_ok();
                    drop(silent);
                    std::fs::remove_file(daemon.socket()).unwrap();
                    daemon.start_again();
                    in_time
                }));
            }
            Phase::Undo => undone.send(()).unwrap(),
            _ => {}
        });
        let error = domain.snapshot_observed("silent", &mut hang).unwrap_err();
        let in_time = starting.expect("the disks were to be switched").join().unwrap();
        assert!(
            in_time,
            "QEMU {}: it is undone while the daemon is still silent: {error}",
            binary.name
        );
        common::assert_says(
            &error,
            Code::Rpc,
            &["lost the connection to the libvirt daemon", "does not answer in time"],
        );
        check(&domain, &before, &Err(error), &binary.name);
        assert_eq!(settings(&domain), settings_before, "QEMU {}", binary.name);
    }
}
