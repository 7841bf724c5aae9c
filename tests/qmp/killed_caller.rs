// SPDX-License-Identifier: LGPL-2.1-or-later

//! A caller that is killed leaves a running guest, and nothing of its snapshot.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use common::backend::{by_driver, by_socket_only, open};
use common::{
    At, INSTANTLY, Loop, Opened, assert_says, files_below, machine, named, run, through_proxy,
};
use instantsnap::engine::{EarlyStart, Phase};
use instantsnap::error::Code;
use instantsnap_testkit::program::process;
use instantsnap_testkit::{
    Binary, DEADLINE, Fingerprint, Guest, Machine, fingerprint, process, skip, test, wait_for,
};
use rustix::process::Pid;
use serde_json::json;

const PHASES: [Phase; 5] = [Phase::Pause, Phase::Switch, Phase::Arm, Phase::Drain, Phase::Finish];

/// The process that the tests below start. It kills itself in the phase that it is told.
#[process]
fn child() {
    let directory = std::env::var("INSTANTSNAP_TEST_DIRECTORY").unwrap();
    let phase: usize = std::env::var("INSTANTSNAP_TEST_PHASE").unwrap().parse().unwrap();
    let directory = Path::new(&directory);
    let socket = std::env::var("INSTANTSNAP_TEST_SOCKET").unwrap_or("qmp.sock".into());
    let handle = open(directory, &directory.join(socket), None, &directory.join("state")).unwrap();
    if std::env::var_os("INSTANTSNAP_TEST_OVERLAP").is_some() {
        handle
            .set_early_start(EarlyStart { tries: 1, stop_after: Some(Duration::from_millis(50)) });
    }
    let mut observer = At(|now| {
        if PHASES.get(phase) == Some(&now) {
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL)
                .unwrap();
        }
    });
    let xml = std::env::var("INSTANTSNAP_TEST_XML").unwrap_or_else(|_| named("killed"));
    handle.create(&xml, INSTANTLY, &mut observer).unwrap();
    panic!("it was to be killed");
}

/// The command of that process. With a `phase` beyond `PHASES` the test kills it itself.
fn child_process(guest: &Guest, phase: usize) -> Command {
    let mut command = process(module_path!(), "child");
    command
        .env("INSTANTSNAP_TEST_DIRECTORY", guest.directory())
        .env("INSTANTSNAP_TEST_PHASE", phase.to_string())
        .stdout(std::process::Stdio::null());
    command
}

fn take_snapshot_and_die(guest: &Guest, phase: usize, early_start: bool) {
    let mut command = child_process(guest, phase);
    if early_start {
        command.env("INSTANTSNAP_TEST_OVERLAP", "1");
    }
    let status = command.status().unwrap();
    assert_eq!(status.signal(), Some(9), "{status}");
}

/// Waits until the settings are what they were, after the watchdog has drained the restore stream.
fn wait_until_settled(guest: &Guest, before: &Fingerprint) {
    let settled = wait_for(Duration::from_secs(60), || {
        let mut client = guest.control();
        let now = fingerprint(&mut client);
        let migration = client.execute("query-migrate", json!({})).unwrap();
        let under_way =
            ["setup", "active", "cancelling"].iter().any(|status| migration["status"] == *status);
        let same = ["capabilities", "parameters", "status", "jobs"]
            .iter()
            .all(|part| now.0[part] == before.0[part]);
        (same && !under_way).then_some(())
    });
    assert!(settled.is_some(), "the migration settings are not what they were");
}

/// QEMU's block nodes, and the files of the guest and of its state directory.
fn nodes_and_files(opened: &Opened) -> (Vec<String>, Vec<PathBuf>) {
    let nodes =
        opened.guest.control().execute("query-named-block-nodes", json!({ "flat": true })).unwrap();
    let name = |node: &serde_json::Value| node["node-name"].as_str().unwrap_or_default().to_owned();
    let mut nodes: Vec<_> = nodes.as_array().unwrap().iter().map(name).collect();
    nodes.sort();
    // The directory's lock file stays, and is empty.
    let files =
        files_below(opened.guest.directory()).into_iter().filter(|file| !file.ends_with(".lock"));
    (nodes, files.collect())
}

fn check_killed_caller(machine: &Machine, phase: usize, early_start: bool) {
    let opened = Opened::start(machine);
    let before = fingerprint(&mut opened.guest.control());
    let nothing = nodes_and_files(&opened);
    take_snapshot_and_die(&opened.guest, phase, early_start);
    // The guest counts, and its memory is not write-protected: each round writes every page.
    opened.guest.wait_ticks(5);
    wait_until_settled(&opened.guest, &before);
    // A driver is not told that its disks are off the overlays, so the overlays stay.
    if !by_driver() || PHASES[phase] == Phase::Pause {
        let nothing_left = wait_for(Duration::from_secs(60), || {
            (nodes_and_files(&opened) == nothing).then_some(())
        });
        assert!(nothing_left.is_some(), "{:?} is left of {nothing:?}", nodes_and_files(&opened));
    }
    // The next snapshot succeeds.
    opened.snapshot("next").unwrap_or_else(|error| opened.guest.fail(&error.message));
    opened.restore_clone("next");
    opened.guest.wait_ticks(3);
}

#[test(long)]
fn guest_of_a_killed_caller_runs_and_can_be_snapshotted_again() {
    for binary in Binary::any() {
        for (index, phase) in PHASES.iter().enumerate() {
            eprintln!("{}: killed in {phase:?}", binary.name);
            // With this much memory the drain is long, and the guest writes into all of it.
            check_killed_caller(
                &machine(binary, 1).memory(256).prealloc().append("dense=128"),
                index,
                false,
            );
        }
    }
}

/// In the pause phase the migration has begun, and the guest still runs.
#[test]
fn guest_of_a_caller_killed_during_early_start_runs() {
    for binary in Binary::all().iter().filter(|binary| binary.version >= (10, 0, 0)) {
        for index in [0, 1] {
            check_killed_caller(
                &machine(binary, 1).append("dense=16").long_setup(Duration::from_millis(500)),
                index,
                true,
            );
        }
    }
}

/// The caller is killed after its migration has begun. Its watchdog has the rest of memory to read,
/// and a user pauses the guest meanwhile.
#[test]
fn watchdog_does_not_resume_a_guest_that_a_user_pauses_in_the_drain() {
    if by_driver() {
        return;
    }
    for binary in Binary::any() {
        let (opened, proxy) =
            through_proxy(&machine(binary, 1).memory(256).prealloc().append("dense=128"));
        let nothing = nodes_and_files(&opened);
        let say =
            |command: &str, arguments| opened.guest.control().execute(command, arguments).unwrap();
        let bandwidth = say("query-migrate-parameters", json!({}))["max-bandwidth"].clone();
        let gate = proxy.hold_reply("migrate", 1);
        let mut caller = child_process(&opened.guest, PHASES.len())
            .env("INSTANTSNAP_TEST_SOCKET", "proxy.sock")
            .spawn();
        let caller = caller.as_mut().unwrap();
        assert!(gate.wait_arrived(DEADLINE));
        let armed = wait_for(DEADLINE, || {
            let ram = say("query-migrate", json!({}))["ram"].clone();
            (ram["normal"].as_u64().unwrap_or(0) + ram["duplicate"].as_u64().unwrap_or(0) > 0)
                .then_some(())
        });
        armed.expect("it is armed");
        // The rest of the drain is slow.
        say("migrate-set-parameters", json!({ "max-bandwidth": 1 << 20 }));
        caller.kill().unwrap();
        caller.wait().unwrap();
        gate.release();
        let resumed = || proxy.commands().iter().filter(|command| *command == "cont").count();
        wait_for(DEADLINE, || (resumed() == 2).then_some(()))
            .expect("the guest is resumed as soon as it is armed");
        assert_eq!(say("query-migrate", json!({}))["status"], "active");
        say("stop", json!({}));
        say("migrate-set-parameters", json!({ "max-bandwidth": bandwidth }));
        let undone = wait_for(DEADLINE, || (nodes_and_files(&opened) == nothing).then_some(()));
        assert!(undone.is_some(), "{:?} is left of {nothing:?}", nodes_and_files(&opened));
        assert_eq!(say("query-status", json!({}))["status"], "paused");
        say("cont", json!({}));
        opened.guest.wait_ticks(3);
    }
}

/// The lock of a guest uses names that are local to a network namespace: processes in two
/// namespaces do not exclude each other.
#[test]
fn snapshot_from_another_network_namespace_is_not_taken_for_a_stale_one() {
    by_socket_only();
    if !Command::new("unshare")
        .args(["--net", "true"])
        .status()
        .is_ok_and(|status| status.success())
    {
        skip("no network namespace can be made here");
    }
    for binary in Binary::any() {
        let (opened, proxy) = through_proxy(&machine(binary, 1));
        let directory = opened.guest.directory();
        std::fs::create_dir(directory.join("other-state")).unwrap();
        let here =
            open(directory, &directory.join("control.sock"), None, &directory.join("other-state"))
                .unwrap();
        let settings = || {
            let mut control = opened.guest.control();
            let mut ask = |command: &str| control.execute(command, json!({})).unwrap();
            (ask("query-migrate-capabilities"), ask("query-migrate-parameters"))
        };
        let before = settings();
        let there = || {
            let gate = proxy.hold_reply("getfd", 1);
            let exe = child_process(&opened.guest, PHASES.len());
            let child = Command::new("unshare")
                .args(["--net", "--"])
                .arg(exe.get_program())
                .args(exe.get_args())
                .envs(exe.get_envs().filter_map(|(name, value)| Some((name, value?))))
                .env("INSTANTSNAP_TEST_SOCKET", "proxy.sock")
                .stdout(std::process::Stdio::null())
                .spawn()
                .unwrap();
            // QEMU has the snapshot's settings now.
            assert!(gate.wait_arrived(DEADLINE));
            (gate, child)
        };
        let (gate, mut child) = there();
        let error =
            here.create(&named("s"), INSTANTLY, &mut ()).expect_err("the other is being taken");
        assert_says(
            &error,
            Code::OperationInvalid,
            &["another network namespace", "Wait", "'tls-hostname'"],
        );
        gate.release();
        child.wait().unwrap();
        assert_eq!(settings(), before);
        opened.restore_clone("killed");
        opened.handle.delete("killed", 0).unwrap();

        let (_gate, mut child) = there();
        // The snapshot's process and its watchdog.
        let note = settings().1["tls-hostname"].as_str().unwrap().to_owned();
        let note: serde_json::Value =
            serde_json::from_str(note.strip_prefix("instantsnap: ").unwrap()).unwrap();
        let processes = note["maker"]["processes"].as_array().unwrap();
        assert_eq!(
            (processes.len(), processes[0]["pid"].as_u64()),
            (2, Some(child.id().into())),
            "{note}"
        );
        for process in processes.iter().rev() {
            let pid = Pid::from_raw(process["pid"].as_i64().unwrap() as i32).unwrap();
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
            let stat = format!("/proc/{}/stat", pid.as_raw_nonzero());
            // A zombie counts as ended: its parent need not have waited for it.
            let lives = || std::fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z"));
            wait_for(DEADLINE, || (!lives()).then_some(())).expect("it was killed");
        }
        child.wait().unwrap();
        here.create(&named("next"), INSTANTLY, &mut ()).unwrap();
        assert_eq!(settings(), before);
        opened.guest.wait_ticks(3);
    }
}

#[test]
fn killed_caller_leaves_precreated_overlays_empty() {
    if by_driver() {
        // A driver is not told that its disks are off the overlays, so the overlays stay.
        return;
    }
    for binary in Binary::any() {
        let opened = Opened::start(&machine(binary, 2).memory(128).prealloc().append("dense=64"));
        let empty = opened.guest.directory().join("empty");
        std::fs::write(&empty, "").unwrap();
        let backing = opened.guest.directory().join("backing");
        std::fs::File::create(&backing).unwrap().set_len(32 << 20).unwrap();
        let device = Loop::try_on(&backing);
        let file = format!("<disk name='vd0'><source file='{}'/></disk>", empty.display());
        let block = device.iter().map(|device| {
            format!("<disk name='vd1' type='block'><source dev='{}'/></disk>", device.0)
        });
        let disks = file + &block.collect::<String>();
        let xml =
            format!("<domainsnapshot><name>killed</name><disks>{disks}</disks></domainsnapshot>");
        for phase in [Phase::Pause, Phase::Drain] {
            let before = fingerprint(&mut opened.guest.control());
            let nothing = nodes_and_files(&opened);
            let index = PHASES.iter().position(|known| *known == phase).unwrap();
            let status = child_process(&opened.guest, index)
                .env("INSTANTSNAP_TEST_XML", &xml)
                .status()
                .unwrap();
            assert_eq!(status.signal(), Some(9), "{status}");
            opened.guest.wait_ticks(3);
            wait_until_settled(&opened.guest, &before);
            let is_raw = |device: &Loop| {
                run("qemu-img", &["info", "-U", &device.0]).contains("file format: raw")
            };
            let is_empty =
                || std::fs::metadata(&empty).unwrap().len() == 0 && device.iter().all(is_raw);
            let undone = wait_for(Duration::from_secs(60), || {
                (nodes_and_files(&opened) == nothing && is_empty()).then_some(())
            });
            assert!(
                undone.is_some(),
                "killed in {phase:?}: {:?}, of {nothing:?}",
                nodes_and_files(&opened)
            );
        }
        opened.guest.wait_ticks(65);
    }
}
