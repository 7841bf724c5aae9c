// SPDX-License-Identifier: LGPL-2.1-or-later

//! The monitor fails. However it fails, the guest runs again, and nothing of the snapshot is left.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use common::backend::{by_driver, by_socket_only};
use common::{INSTANTLY, Opened, assert_error, assert_untouched, machine, named, through_proxy};
use instantsnap::engine::Handle;
use instantsnap::error::Code;
use instantsnap_testkit::{Binary, Client, DEADLINE, Fault, Proxy, test, wait_for};

/// Opens a socket whose server treats its one client like this.
#[track_caller]
fn assert_open_fails(serve: impl FnOnce(UnixStream) + Send, code: Code, part: &str) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| serve(listener.accept().unwrap().0));
        let result = Handle::open_qmp(&path, None, directory.path());
        let error = result.map(drop).expect_err("this is no QMP");
        eprintln!("{error}");
        assert_eq!(error.code, code, "{error}");
        assert!(
            error.message.contains(part) && error.message.contains(path.to_str().unwrap()),
            "{error}"
        );
    });
}

/// Reads until the client has closed the connection.
fn wait_gone(mut client: UnixStream) {
    let _ = client.read_to_end(&mut Vec::new());
}

#[test]
fn error_names_a_missing_socket() {
    let directory = tempfile::tempdir().unwrap();
    for (path, reason) in
        [("missing", "No such file or directory"), ("file", "refused"), (".", "refused")]
    {
        let path = directory.path().join(path);
        if path.ends_with("file") {
            std::fs::write(&path, "").unwrap();
        }
        let result = Handle::open_qmp(&path, None, directory.path()).map(drop);
        let error = result.expect_err("nobody listens");
        assert_eq!(error.code, Code::SystemError, "{error}");
        for part in [reason, path.to_str().unwrap()] {
            assert!(error.message.contains(part), "{error}");
        }
    }
    let long = directory.path().join("x".repeat(200));
    assert_error(
        Handle::open_qmp(&long, None, directory.path()).map(drop),
        Code::SystemError,
        "xxx",
    );
}

#[test]
fn socket_that_does_not_speak_qmp_is_refused() {
    let say = |what: &'static str| {
        move |mut client: UnixStream| {
            let _ = client.write_all(what.as_bytes());
            wait_gone(client);
        }
    };
    assert_open_fails(say("SSH-2.0-OpenSSH_9.2\r\n"), Code::OperationFailed, "not a QMP socket");
    assert_open_fails(say("\0\u{ff}\n"), Code::OperationFailed, "not a QMP socket");
    assert_open_fails(say("{}\n"), Code::OperationFailed, "no QMP greeting");
    assert_open_fails(say("[1, 2]\n"), Code::OperationFailed, "no QMP greeting");
    assert_open_fails(drop, Code::OperationFailed, "not a QMP socket");
    let forever = |mut client: UnixStream| while client.write_all(&[b'x'; 4096]).is_ok() {};
    assert_open_fails(forever, Code::OperationFailed, "not JSON");
    let without_end = |mut client: UnixStream| while client.write_all(&[b'['; 4096]).is_ok() {};
    assert_open_fails(without_end, Code::OperationFailed, "too long");
    let half = |mut client: UnixStream| {
        let _ = client.write_all(b"{\"QMP\": ");
    };
    assert_open_fails(half, Code::OperationFailed, "not a QMP socket");
}

#[test]
fn old_qemu_is_refused() {
    let greet = |mut client: UnixStream| {
        let greeting = r#"{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 5}}, "capabilities": []}}"#;
        let _ = client.write_all(
            format!(
                "{greeting}\r\n{{\"return\": {{}}, \"id\": 1}}\r\n{{\"return\": [], \"id\": 2}}\r\n"
            )
            .as_bytes(),
        );
        wait_gone(client);
    };
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| greet(listener.accept().unwrap().0));
        let result = Handle::open_qmp(&path, None, directory.path()).map(drop);
        assert_error(result, Code::ConfigUnsupported, "QEMU 5.2 is too old");
    });
}

#[test]
fn silent_socket_times_out() {
    assert_open_fails(wait_gone, Code::OperationTimeout, "no QMP greeting");
}

/// The reply never comes, and there is always something to read.
#[test]
fn flood_of_events_does_not_extend_the_deadline() {
    let flood = |mut client: UnixStream| {
        let greeting = r#"{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}}, "capabilities": []}}"#;
        let _ = client.write_all(greeting.as_bytes());
        let events = r#"{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 1}} {"return": {}, "id": "x"} "#;
        while client.write_all(events.repeat(1000).as_bytes()).is_ok() {}
    };
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| flood(listener.accept().unwrap().0));
        let result = Handle::open_qmp(&path, None, directory.path()).map(drop);
        assert_error(
            result,
            Code::OperationTimeout,
            "cannot begin QMP: QEMU did not answer in time",
        );
    });
}

/// Both for events that the library uses and for others.
#[test]
fn flood_of_events_does_not_fail_a_snapshot() {
    for binary in Binary::any() {
        for event in ["RTC_CHANGE", "STOP"] {
            let (opened, proxy) = through_proxy(&machine(binary, 2));
            proxy.flood(event, 3000);
            opened.snapshot("s").unwrap();
            opened.restore_clone("s");
        }
    }
}

/// QEMU nests each image in the description of the image above it. Programs in other languages can
/// have threads with small stacks.
#[test]
fn chain_of_hundreds_of_images_is_read_on_a_small_stack() {
    for binary in Binary::any() {
        let (opened, proxy) = through_proxy(&machine(binary, 2));
        let deep = |mut reply: serde_json::Value| {
            for block in reply["return"].as_array_mut().unwrap() {
                let image = block["inserted"]["image"].clone();
                let nest = |below, n| {
                    let mut above = image.clone();
                    above["filename"] =
                        format!("json:{{\"driver\": \"qcow2\", \"n\": {n}}}").into();
                    above["backing-image"] = below;
                    above
                };
                block["inserted"]["image"] = (0..450).fold(image.clone(), nest);
            }
            reply
        };
        proxy.rule("query-block", 1, Fault::EditReply(Box::new(deep)));
        std::thread::scope(|scope| {
            let small = std::thread::Builder::new().stack_size(256 << 10);
            small.spawn_scoped(scope, || opened.snapshot("s").unwrap()).unwrap().join().unwrap();
        });
        assert_eq!(proxy.rules_left(), 0);
        opened.restore_clone("s");
    }
}

/// `pretty=on` is for people who read the monitor themselves, and some leave it on.
#[test]
fn monitor_with_pretty_json_is_supported() {
    by_socket_only();
    for binary in Binary::any() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("pretty.sock");
        let option = format!("unix:{},server=on,wait=off", socket.display());
        let guest = machine(binary, 2).arg("-qmp-pretty").arg(&option).start();
        guest.wait_ticks(2);
        let opened = Opened::through(guest, &socket);
        opened.snapshot("s").unwrap();
        opened.snapshot("t").unwrap();
        opened.handle.delete("t", 0).unwrap();
    }
}

#[test]
fn socket_in_use_by_another_client_times_out_with_a_hint() {
    by_socket_only();
    let binary = &Binary::all()[0];
    let opened = Opened::start(&machine(binary, 1));
    let other = Client::connect(&opened.guest.qmp()).unwrap();
    let error = opened.assert_fails(
        &named("s"),
        INSTANTLY,
        Code::OperationTimeout,
        &["another client is connected"],
    );
    assert!(error.message.contains(opened.guest.qmp().to_str().unwrap()), "{error}");
    drop(other);
    opened.assert_well();
}

/// The commands of one snapshot, each with its number among those of the same name. Of commands
/// that are repeated while polling, only the first ones count: the next snapshot may need no more.
fn sequence(opened: &Opened, proxy: &Proxy) -> Vec<(String, u32)> {
    let from = proxy.commands().len();
    opened.snapshot("first").unwrap();
    let mut seen = HashMap::new();
    let mut sequence = Vec::new();
    for command in proxy.commands().split_off(from) {
        let occurrence = seen.entry(command.clone()).or_insert(0);
        *occurrence += 1;
        let most = match command.as_str() {
            "query-migrate" | "job-dismiss" => 3,
            "query-jobs" | "qom-list" | "query-status" => 2,
            _ => 4,
        };
        // The driver sends this one itself, before the operation.
        let drivers = by_driver() && command == "qmp_capabilities";
        // The library populates memory before the first snapshot only.
        let firsts = command == "query-memory-devices";
        if *occurrence <= most && !drivers && !firsts {
            sequence.push((command, *occurrence));
        }
    }
    for command in
        ["stop", "transaction", "migrate", "getfd", "blockdev-create", "migrate-set-capabilities"]
    {
        assert!(seen.contains_key(command), "{command} is not in {sequence:?}");
    }
    sequence
}

/// Injects the fault at each command of a snapshot in turn. The snapshot succeeds where the command
/// is dispensable.
fn at_each_command(name: &str, fault: impl Fn() -> Fault, dispensable: &[(&str, u32)]) {
    for binary in Binary::any() {
        let (opened, proxy) = through_proxy(&machine(binary, 2));
        let sequence = sequence(&opened, &proxy);
        let mut failed = 0;
        for (index, (command, occurrence)) in sequence.iter().enumerate() {
            let what = format!("{}: {name} at {command} {occurrence}", binary.name);
            let before = opened.trace();
            proxy.rule(command, *occurrence, fault());
            let result = opened.snapshot(&format!("{name}-{index}"));
            assert_eq!(proxy.rules_left(), 0, "{what}");
            match result {
                Err(error) => {
                    eprintln!("{what}: {error}");
                    failed += 1;
                    assert!(!dispensable.contains(&(command, *occurrence)), "{what}");
                    let code = match (name, command.as_str(), *occurrence) {
                        // By this error QEMU says that it cannot take the snapshot.
                        ("fails", "migrate-set-capabilities", 1) => Code::ArgumentUnsupported,
                        _ => Code::OperationFailed,
                    };
                    assert_eq!(error.code, code, "{what}: {error}");
                    // The message has the cause only: everything was restored.
                    assert!(!error.message.contains(';'), "{what}: {error}");
                    let why =
                        if name == "fails" { "not today" } else { "lost the connection to QEMU" };
                    assert!(error.message.contains(why), "{what}: {error}");
                    assert_untouched(&opened, &before);
                }
                Ok(_) => {
                    assert!(
                        dispensable.contains(&(command, *occurrence)),
                        "{what}: this cannot succeed"
                    );
                    let after = opened.trace();
                    for part in
                        ["status", "capabilities", "parameters", "jobs", "block jobs", "fdsets"]
                    {
                        assert_eq!(before.qemu.0[part], after.qemu.0[part], "{what}");
                    }
                }
            }
            opened.guest.wait_ticks(1);
        }
        assert!(failed > 20, "{failed} of {}", sequence.len());
        opened.assert_well();
    }
}

#[test]
fn snapshot_is_undone_when_any_command_fails() {
    let dispensable = [
        // It identifies QEMU where the socket does not.
        ("query-cpus-fast", 1),
        // Some QEMUs do not have it.
        ("human-monitor-command", 1),
        // The library repeats it.
        ("job-dismiss", 1),
        ("job-dismiss", 2),
        // Capabilities that QEMU refuses are set again; the first command is the background
        // snapshot's.
        ("migrate-set-capabilities", 2),
    ];
    at_each_command("fails", || Fault::fail("not today"), &dispensable);
}

#[test]
fn snapshot_is_undone_when_the_connection_is_lost_before_any_command() {
    by_socket_only();
    at_each_command("hangs-up", || Fault::Hangup, &[]);
}

#[test]
fn snapshot_is_undone_when_the_connection_is_lost_after_any_command() {
    by_socket_only();
    at_each_command("hangs-up-after", || Fault::HangupAfter, &[]);
}

/// The library does not wait longer than the limit of the pause for a reply inside the pause.
#[test]
fn missing_reply_ends_the_pause_at_its_limit() {
    for binary in Binary::any() {
        let (opened, proxy) = through_proxy(&machine(binary, 2));
        opened.handle.set_pause_limit(Duration::from_secs(1));
        for (command, occurrence) in
            [("stop", 1), ("transaction", 1), ("migrate", 1), ("query-migrate", 2)]
        {
            for fault in [Fault::SwallowReply, Fault::Drop] {
                eprintln!("{}: {fault:?} at {command} {occurrence}", binary.name);
                proxy.rule(command, occurrence, fault);
                // On a busy machine the limit can pass before the library comes to that command.
                let mut reached = false;
                for _ in 0..10 {
                    let error =
                        opened.assert_fails(&named("s"), INSTANTLY, Code::OperationTimeout, &[]);
                    assert!(!error.message.contains(';'), "{error}");
                    reached = proxy.rules_left() == 0;
                    if reached {
                        break;
                    }
                }
                assert!(reached, "{command} {occurrence}");
            }
        }
        opened.handle.set_pause_limit(Duration::from_secs(30));
        opened.assert_well();
    }
}

/// QEMU stops replying while its guest is paused. When it continues, the guest is resumed.
#[test]
fn guest_of_a_temporarily_unresponsive_qemu_runs_again() {
    for binary in Binary::any() {
        let (opened, proxy) = through_proxy(&machine(binary, 2));
        opened.handle.set_pause_limit(Duration::from_secs(3));
        let before = opened.trace();
        let gate = proxy.hold_reply("transaction", 1);
        let error = std::thread::scope(|scope| {
            let call = scope.spawn(|| {
                opened.handle.create(&named("s"), INSTANTLY, &mut ()).expect_err("it hangs")
            });
            assert!(gate.wait_arrived(DEADLINE));
            // The library has waited for a reply, and sends `cont` again.
            let insists = || proxy.commands().iter().any(|command| command == "cont").then_some(());
            wait_for(DEADLINE, insists).expect("the guest is not left paused");
            gate.release();
            call.join().unwrap()
        });
        assert_eq!(error.code, Code::OperationTimeout, "{error}");
        assert!(!error.message.contains(';'), "{error}");
        assert_untouched(&opened, &before);
        opened.handle.set_pause_limit(Duration::from_secs(30));
        opened.assert_well();
    }
}

/// The reply is late, but within the limit.
#[test]
fn late_replies_within_the_limit_are_awaited() {
    for binary in Binary::any() {
        let (opened, proxy) = through_proxy(&machine(binary, 2));
        for (command, occurrence) in
            [("blockdev-create", 2), ("stop", 1), ("transaction", 1), ("migrate", 1)]
        {
            let gate = proxy.hold_reply(command, occurrence);
            std::thread::scope(|scope| {
                let call = scope.spawn(|| opened.snapshot(&format!("{command}-late")));
                assert!(gate.wait_arrived(DEADLINE));
                assert!(!call.is_finished());
                gate.release();
                call.join().unwrap().unwrap();
            });
            opened.restore_clone(&format!("{command}-late"));
        }
        opened.assert_well();
    }
}

/// QEMU lives on when a proxy ends or closes its socket, so the library must not treat the guest as
/// ended.
#[test]
fn reconnection_after_a_lost_connection_finds_the_same_qemu() {
    by_socket_only();
    for binary in Binary::any() {
        let (opened, proxy) = through_proxy(&machine(binary, 2));
        // The connection is lost a second time during the undo.
        proxy.rule("migrate", 1, Fault::HangupAfter);
        proxy.rule("block-commit", 1, Fault::Hangup);
        let before = opened.trace();
        let error = opened.snapshot("s").expect_err("the connection was lost");
        assert_eq!(error.code, Code::OperationFailed, "{error}");
        assert_eq!(proxy.rules_left(), 0);
        // The library could not switch the disks back by the lost connection, so the overlays stay,
        // and the error names them.
        assert!(error.message.contains("must not be removed"), "{error}");
        let after = opened.trace();
        assert_eq!(before.qemu.0["status"], after.qemu.0["status"]);
        assert!(Path::new(&opened.active_image("vd0")).exists());
        opened.assert_well();
    }
}
