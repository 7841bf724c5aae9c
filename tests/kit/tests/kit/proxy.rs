// SPDX-License-Identifier: LGPL-2.1-or-later

//! The proxy is transparent without rules, and each fault does what its name says.

use std::os::fd::AsFd;
use std::time::Duration;

use instantsnap_testkit::{Binary, Client, Fault, Guest, Machine, Proxy, test, wait_for};
use serde_json::json;

const SOON: Duration = Duration::from_secs(10);

fn is_running(guest: &Guest) -> bool {
    guest.control().execute("query-status", json!({})).expect("query-status")["running"] == true
}

fn started() -> (Guest, Proxy) {
    let guest = Machine::new(&Binary::all()[0]).append("delay=1000").start();
    let proxy = Proxy::start(&guest.directory().join("proxy.sock"), &guest.qmp());
    (guest, proxy)
}

fn client(proxy: &Proxy) -> Client {
    Client::connect(proxy.path()).expect("a connection through the proxy")
}

#[test]
fn passes_on_commands_events_and_file_descriptors() {
    let (guest, proxy) = started();
    for _ in 0..3 {
        let mut client = client(&proxy);
        client.execute("stop", json!({})).expect("stop");
        assert!(client.wait_event("STOP").is_some());
        client.execute("cont", json!({})).expect("cont");
        let file = std::fs::File::open("/dev/zero").expect("/dev/zero");
        client.execute_with_fd("getfd", json!({"fdname": "zero"}), file.as_fd()).expect("getfd");
        assert_eq!(guest.open_files()["/dev/zero"], 1);
        client.execute("closefd", json!({"fdname": "zero"})).expect("closefd");
        client.execute("no-such-command", json!({})).expect_err("QEMU's own error");
    }
    assert_eq!(proxy.commands()[..3], ["qmp_capabilities", "stop", "cont"]);
}

#[test]
fn fails_the_chosen_occurrence_only() {
    let (_guest, proxy) = started();
    let mut client = client(&proxy);
    proxy.rule("query-status", 2, Fault::fail("not today"));
    client.execute("query-status", json!({})).expect("the first");
    assert_eq!(proxy.rules_left(), 1);
    let error = client.execute("query-status", json!({})).expect_err("the second");
    assert_eq!(error["desc"], "not today");
    client.execute("query-status", json!({})).expect("the third");
    assert_eq!(proxy.rules_left(), 0);
}

#[test]
fn edits_replies_and_hides_events() {
    let (_guest, proxy) = started();
    let mut client = client(&proxy);
    proxy.hide_event("STOP");
    proxy.rule(
        "query-status",
        1,
        Fault::EditReply(Box::new(|mut reply| {
            reply["return"]["status"] = json!("guest-panicked");
            reply
        })),
    );
    client.execute("stop", json!({})).expect("stop");
    client.execute("cont", json!({})).expect("cont");
    let status = client.execute("query-status", json!({})).expect("query-status");
    assert_eq!(status["status"], "guest-panicked");
    let events = client.events();
    assert!(events.iter().any(|event| event.name == "RESUME"));
    assert!(events.iter().all(|event| event.name != "STOP"));
}

#[test]
fn hangs_up_and_serves_the_next_client() {
    let (guest, proxy) = started();

    proxy.rule("stop", 1, Fault::Hangup);
    let error = client(&proxy).execute("stop", json!({})).expect_err("no connection");
    assert_eq!(error["class"], "Disconnected");
    assert!(is_running(&guest), "QEMU has not got it");

    proxy.rule("stop", 1, Fault::HangupAfter);
    client(&proxy).execute("stop", json!({})).expect_err("no connection");
    assert!(!is_running(&guest), "QEMU has got it");

    client(&proxy).execute("cont", json!({})).expect("cont");
}

#[test]
fn drops_commands_and_swallows_replies() {
    let (guest, proxy) = started();
    for (fault, running) in [(Fault::Drop, true), (Fault::SwallowReply, false)] {
        proxy.rule("stop", 1, fault);
        let mut client = client(&proxy);
        let waiting = std::thread::spawn(move || client.execute("stop", json!({})));
        wait_for(SOON, || (proxy.rules_left() == 0).then_some(())).expect("the command has come");
        wait_for(SOON, || (is_running(&guest) == running).then_some(())).expect("as wanted");
        assert!(!waiting.is_finished(), "no answer");
        proxy.hang_up();
        let error = waiting.join().expect("no panic").expect_err("no connection");
        assert_eq!(error["class"], "Disconnected");
    }
    client(&proxy).execute("cont", json!({})).expect("the proxy serves on");
}

#[test]
fn holds_a_command_or_its_reply_until_released() {
    let (guest, proxy) = started();
    for (command, before, after) in [("stop", true, false), ("cont", false, true)] {
        let gate = proxy.hold(command, 1);
        let mut client = client(&proxy);
        let waiting = std::thread::spawn(move || client.execute(command, json!({})));
        assert!(gate.wait_arrived(SOON));
        assert_eq!(is_running(&guest), before);
        gate.release();
        waiting.join().expect("no panic").expect(command);
        assert_eq!(is_running(&guest), after);
    }
    let gate = proxy.hold_reply("stop", 1);
    let mut client = client(&proxy);
    let waiting = std::thread::spawn(move || client.execute("stop", json!({})));
    assert!(gate.wait_arrived(SOON));
    assert!(!is_running(&guest), "executed");
    assert!(!waiting.is_finished(), "but not answered");
    gate.release();
    waiting.join().expect("no panic").expect("stop");
}

#[test]
fn fails_every_occurrence_until_mended() {
    let (_guest, proxy) = started();
    let mut client = client(&proxy);
    proxy.fail_every("stop", "never");
    for _ in 0..3 {
        assert_eq!(client.execute("stop", json!({})).expect_err("fails")["desc"], "never");
    }
    proxy.mend("stop");
    client.execute("stop", json!({})).expect("stop");
}

#[test]
fn kills_qemu_before_and_after_a_command() {
    for fault in [Fault::KillBefore, Fault::KillAfter] {
        let (guest, proxy) = started();
        proxy.rule("stop", 1, fault(guest.pid()));
        let error = client(&proxy).execute("stop", json!({})).expect_err("no connection");
        assert_eq!(error["class"], "Disconnected");
        wait_for(SOON, || (!guest.alive()).then_some(())).expect("QEMU has been killed");
    }
}

#[test]
fn dropped_proxy_closes_everything() {
    let (_guest, proxy) = started();
    let gate = proxy.hold("stop", 1);
    let mut client = client(&proxy);
    let waiting = std::thread::spawn(move || client.execute("stop", json!({})));
    assert!(gate.wait_arrived(SOON));
    drop(proxy);
    let _ = waiting.join().expect("no panic"); // an error, or a reply that was faster
}
