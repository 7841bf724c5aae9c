// SPDX-License-Identifier: LGPL-2.1-or-later

//! Jobs of a domain of a stock libvirt, which work like those of a guest by QMP, and jobs of other
//! clients.

use std::time::Duration;

use common::jobs::{Listener, next, readable, rest, steps};
use common::virt::OpenedDomain;
use common::{ALL_SECTORS, At, Handle, INSTANTLY, assert_error, files_below, machine, named};
use instantsnap::engine::{EventKind, Phase, Returns};
use instantsnap::error::Code;
use instantsnap::model::flags::NO_METADATA;
use instantsnap_testkit::{Binary, DEADLINE, Daemon, Gate, test, wait_for};
use serde_json::json;

use EventKind::{Complete, Failed, Instant, Paused, Switched};

fn start_job(
    domain: &OpenedDomain,
    name: &str,
    flags: u32,
    listener: Listener,
    returns: Returns,
) -> instantsnap::engine::Job {
    domain.handle.start(&domain.xml(name, ""), flags, Box::new(listener), returns).unwrap()
}

#[test]
fn domain_job_returns_at_the_instant_and_reports_events() {
    let daemon = Daemon::session();
    for binary in Binary::under_libvirt() {
        let domain = OpenedDomain::start(&machine(binary, 2), &daemon);
        let gate = Gate::default();
        let listener = Listener::default().hold(Phase::Drain, &gate);
        let heard = listener.heard();
        let job = start_job(&domain, "s", INSTANTLY, listener, Returns::AtInstant);
        // The caller can use the domain again.
        domain.guest.wait_ticks(ALL_SECTORS);
        assert!(!job.wait(Some(Duration::ZERO)) && job.info().instant);
        for what in [Paused, Switched, Instant] {
            assert_eq!(next(&job).kind, what);
        }
        assert!(!readable(&job, Duration::ZERO));
        gate.release();
        assert_eq!(steps(&rest(&job)), [Complete]);
        assert_eq!(steps(&heard.events()), [Paused, Switched, Instant, Complete]);
        assert_eq!(job.result().unwrap(), "s");
        let xml = domain.guest.virsh("snapshot-dumpxml", &["s"]);
        assert_eq!(job.xml().unwrap().trim(), xml.trim(), "as libvirt has recorded it");
        domain.restore_clone("s");

        // A snapshot that libvirt does not record is described by the XML that libvirt would have
        // been given.
        let job = start_job(
            &domain,
            "unrecorded",
            INSTANTLY | NO_METADATA,
            Listener::default(),
            Returns::AtOnce,
        );
        assert!(job.wait(None));
        assert_eq!(job.result().unwrap(), "unrecorded");
        let (xml, memory) = (job.xml().unwrap(), domain.memory_file("unrecorded"));
        assert!(
            xml.contains("<name>unrecorded</name>") && xml.contains(memory.to_str().unwrap()),
            "{xml}"
        );
        assert!(domain.find("unrecorded").is_none());
        domain.guest.wait_ticks(3);
    }
}

#[test]
fn domain_job_can_be_cancelled_before_in_and_after_the_pause() {
    let daemon = Daemon::session();
    for binary in Binary::under_libvirt() {
        let domain = OpenedDomain::start(&machine(binary, 1), &daemon);
        let before = domain.trace();
        for phase in [Phase::Prepare, Phase::Switch, Phase::Drain] {
            let gate = Gate::default();
            let job = start_job(
                &domain,
                "s",
                INSTANTLY,
                Listener::default().hold(phase, &gate),
                Returns::AtOnce,
            );
            assert!(gate.wait_arrived(DEADLINE));
            job.cancel();
            gate.release();
            let events = rest(&job);
            assert_eq!(
                events.last().unwrap().kind,
                Failed(Code::OperationAborted as i32),
                "{phase:?}"
            );
            assert_error(job.result(), Code::OperationAborted, "cancelled");
            domain.assert_untouched(&before);
            domain.guest.wait_ticks(1);
        }
        domain.guest.wait_ticks(ALL_SECTORS);
    }
}

#[test]
fn snapshot_is_refused_before_the_pause_during_a_job_of_another_client() {
    let daemon = Daemon::session();
    let domain = OpenedDomain::start(&machine(&Binary::under_libvirt()[0], 2), &daemon);
    let file = |name: &str| domain.guest.directory().join(name).display().to_string();
    let virsh = |command: &str, args: &[&str]| domain.guest.virsh(command, args);
    let refused = |parts: &[&str]| {
        let mut early = At(|phase| {
            assert!([Phase::Validate, Phase::Plan].contains(&phase), "{phase:?} is too late")
        });
        let before = files_below(domain.guest.directory());
        let error = domain.snapshot_observed("s", &mut early).unwrap_err();
        assert_eq!(error.code, Code::OperationInvalid, "{error}");
        parts
            .iter()
            .for_each(|part| assert!(error.message.contains(part), "{part:?} is not in {error}"));
        assert_eq!(files_below(domain.guest.directory()), before);
        domain.guest.wait_ticks(1);
    };
    let backup = format!(
        "<domainbackup mode='pull'><server transport='unix' socket='{}'/><disks><disk name='vda' \
         backup='no'/><disk name='vdb' type='file'><scratch \
         file='{}'/></disk></disks></domainbackup>",
        file("nbd.sock"),
        file("scratch")
    );
    std::fs::write(file("backup.xml"), backup).unwrap();
    virsh("backup-begin", &[&file("backup.xml")]);
    refused(&["'vdb' has an active block job"]);
    virsh("domjobabort", &[]);
    // Jobs that libvirt knows of, and jobs that it does not.
    virsh("blockcopy", &["vdb", &file("copy"), "--transient-job"]);
    refused(&["'vdb' has an active block job"]);
    virsh("blockjob", &["vdb", "--abort"]);
    let mut monitor = domain.guest.control();
    let blocks = monitor.execute("query-block", json!({})).unwrap();
    let node = blocks[1]["inserted"]["node-name"].clone();
    monitor
        .execute(
            "blockdev-add",
            json!({ "driver": "null-co", "node-name": "theirs", "size": 16 << 20 }),
        )
        .unwrap();
    let mirror = json!({ "job-id": "mirror0", "device": node, "target": "theirs", "sync": "full", "speed": 1 });
    monitor.execute("blockdev-mirror", mirror).unwrap();
    refused(&["'vdb'", "'mirror0'", "mirror"]);
    monitor.execute("block-job-cancel", json!({ "device": "mirror0", "force": true })).unwrap();
    let ended = || {
        (domain.guest.control().execute("query-block-jobs", json!({})).unwrap() == json!([]))
            .then_some(())
    };
    wait_for(DEADLINE, ended).expect("the job does not end");
    domain.snapshot("s").unwrap();
    domain.restore_clone("s");
}

#[test]
fn domain_handle_and_socket_handle_of_one_qemu_exclude_each_other() {
    let daemon = Daemon::session();
    let directory = tempfile::tempdir().unwrap();
    std::os::unix::fs::chown(directory.path(), Some(daemon.user()), None).unwrap();
    let socket = directory.path().join("second.sock");
    let second = format!("unix:{},server=on,wait=off", socket.display());
    let machine = machine(&Binary::under_libvirt()[0], 1).arg("-qmp").arg(&second);
    let domain = OpenedDomain::start(&machine, &daemon);
    let state = directory.path().join("state");
    std::fs::create_dir(&state).unwrap();
    let by_socket = Handle::open_qmp(&socket, None, &state).unwrap();
    let busy = "another snapshot operation";
    let mut meanwhile = At(|phase| {
        if [Phase::Prepare, Phase::Drain].contains(&phase) {
            assert_error(
                by_socket.create(&named("theirs"), INSTANTLY, &mut ()),
                Code::OperationInvalid,
                busy,
            );
        }
    });
    domain.snapshot_observed("s", &mut meanwhile).unwrap();
    let mut meanwhile = At(|phase| {
        if [Phase::Prepare, Phase::Drain].contains(&phase) {
            assert_error(domain.snapshot("theirs"), Code::OperationInvalid, busy);
        }
    });
    // libvirt does not know of overlays that it has not created, so this request creates none.
    let nothing = "<domainsnapshot><name>t</name><disks><disk name='virtio-disk0' snapshot='no'/></disks></domainsnapshot>";
    by_socket.create(nothing, INSTANTLY, &mut meanwhile).unwrap();
    domain.snapshot("u").unwrap();
    domain.guest.wait_ticks(2);
}
