// SPDX-License-Identifier: LGPL-2.1-or-later

//! A snapshot that a thread of its own takes. It reports events in order. Its caller continues at
//! the instant, and can wait for it, follow it, cancel it or drop it.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use common::backend::{by_driver, open_guest};
use common::jobs::{Listener, SlowDrain, next, readable, rest, steps};
use common::{
    ALL_SECTORS, Handle, INSTANTLY, Opened, assert_error, assert_untouched, machine, named,
    through_proxy,
};
use instantsnap::engine::{Event, EventKind, Job, Phase, Returns};
use instantsnap::error::Code;
use instantsnap::image::Format;
use instantsnap::model::Record;
use instantsnap::model::flags::NO_METADATA;
use instantsnap_testkit::{Binary, DEADLINE, Fault, Gate, Machine, test, wait_for};
use serde_json::json;

use EventKind::{Complete, Failed, Instant, Paused, Progress, Switched};

/// Longer than the test takes.
const NEVER: Duration = Duration::from_secs(3600);
const NOW: Duration = Duration::ZERO;

/// A machine with so much memory that its drain takes a while.
fn large(binary: &'static Binary) -> Machine {
    machine(binary, 2).append("dense=32")
}

#[test]
fn start_returns_at_the_instant_while_memory_drains() {
    for binary in Binary::any() {
        let opened = Opened::start(&large(binary));
        let (slow, listener) = SlowDrain::new(&opened.guest, 1 << 20, Listener::default());
        let before = opened.guest.wait_ticks(0);
        let job = opened.start_job(&named("s"), INSTANTLY, listener, Returns::AtInstant).unwrap();
        let after = opened.guest.serial().tick.unwrap();
        assert!(job.info().instant);
        wait_for(DEADLINE, || (job.info().phase == Some(Phase::Drain)).then_some(()))
            .expect("it drains");
        let migration = opened.guest.control().execute("query-migrate", json!({})).unwrap();
        assert_eq!(migration["status"], "active");

        // The functions report that it has not ended.
        assert!(!job.wait(Some(NOW)) && !job.wait(Some(Duration::from_millis(20))));
        let yet = "the snapshot is still being taken";
        assert_error(job.result(), Code::OperationInvalid, yet);
        assert_error(job.xml(), Code::OperationInvalid, yet);
        assert_error(job.stats(), Code::OperationInvalid, yet);
        let early = job.info();
        assert!(early.paused > NOW && early.elapsed > early.paused, "{early:?}");

        drop(slow);
        assert!(job.wait(None) && job.wait(Some(NOW)));
        opened.guest.wait_ticks(ALL_SECTORS);
        assert_eq!(job.result().unwrap(), "s");
        assert_eq!(job.xml().unwrap(), opened.handle.snapshot_list().xml("s").unwrap());
        assert_eq!(Some(job.stats().unwrap()), opened.handle.stats());
        let late = job.info();
        assert_eq!((late.phase, late.instant, late.paused), (None, true, early.paused));
        assert!(late.flow.done > early.flow.done && late.flow.total == late.flow.done, "{late:?}");
        assert_eq!(late, job.info(), "its time has stopped");

        let (_clone, first) = opened.restore_clone("s");
        assert!(
            (before..=after + 2).contains(&first),
            "from {first}, and taken between {before} and {after}"
        );
    }
}

#[test]
fn job_descriptor_is_readable_exactly_while_events_are_pending() {
    for binary in Binary::any() {
        let opened = Opened::start(&large(binary));
        let gates = [Phase::Pause, Phase::Drain].map(|phase| (phase, Gate::default()));
        let held = |listener: Listener, (phase, gate): &(Phase, Gate)| listener.hold(*phase, gate);
        let listener =
            gates.iter().fold(Listener::default(), held).every(Duration::from_millis(20));
        let (slow, listener) = SlowDrain::new(&opened.guest, 4 << 20, listener);
        let job = opened.start_at_once(&named("s"), INSTANTLY, listener);
        let [before_the_pause, draining] = &gates.map(|(_, gate)| gate);

        assert!(before_the_pause.wait_arrived(DEADLINE));
        assert!(!readable(&job, NOW) && job.next_event().is_none());
        before_the_pause.release();
        assert!(draining.wait_arrived(DEADLINE));
        for expected in [Paused, Switched, Instant] {
            assert!(readable(&job, NOW) && readable(&job, NOW), "it stays so until they are taken");
            assert_eq!(job.next_event().map(|event| event.kind), Some(expected));
        }
        assert!(!readable(&job, NOW) && job.next_event().is_none());
        draining.release();

        // Progress events that are not taken replace each other.
        let progress = next(&job);
        assert_eq!(progress.kind, Progress);
        wait_for(DEADLINE, || {
            (job.info().flow.done > progress.flow.done + (1 << 20)).then_some(())
        })
        .expect("it drains");
        assert!(
            next(&job).flow.done > progress.flow.done + (1 << 19),
            "it is not the one after the first"
        );
        drop(slow);
        assert!(job.wait(None));
        let last = rest(&job);
        assert!(matches!(steps(&last)[..], [Complete]) && last.len() <= 2, "{last:?}");
        assert!(!readable(&job, NOW) && job.next_event().is_none());
    }
}

/// Of a sparse image it is that of a raw one.
#[test]
fn progress_matches_the_memory_image() {
    for (binary, format) in Binary::all().iter().cycle().zip([Format::Raw, Format::Sparse]) {
        let opened = Opened::start(&large(binary));
        let (slow, listener) = SlowDrain::new(
            &opened.guest,
            8 << 20,
            Listener::default().every(Duration::from_millis(50)),
        );
        let heard = listener.heard();
        let job = opened
            .start_job_as(Some(format), &named("s"), INSTANTLY, listener, Returns::AtInstant)
            .unwrap();
        let flowing = || heard.events().iter().filter(|event| event.kind == Progress).count() > 5;
        wait_for(DEADLINE, || flowing().then_some(())).expect("there is progress");
        drop(slow);
        assert!(job.wait(None));

        let events = heard.events();
        let path = opened.state_dir().join("s.mem");
        let image = match format {
            Format::Raw => path.metadata().unwrap().size(),
            Format::Zstd(_) | Format::Sparse => events.last().unwrap().flow.done,
        };
        let flow: Vec<_> =
            events.iter().filter(|event| matches!(event.kind, Instant | Progress)).collect();
        let pages = (64 << 20) / 4096;
        assert!((pages / 2..pages + 1024).contains(&flow[0].flow.pages_left), "{:?}", flow[0]);
        for pair in flow.windows(2) {
            let (earlier, later) = (pair[0].flow, pair[1].flow);
            assert!(later.done >= earlier.done, "{pair:?}");
            assert!(later.pages_left <= earlier.pages_left, "{pair:?}");
            assert!(later.done <= later.total && later.done <= image, "{pair:?}");
            let took = (pair[1].time - pair[0].time).as_secs_f64();
            let rate = (later.done - earlier.done) as f64 / took;
            let said = later.per_second as f64;
            // The event of the instant has the time at which the library noticed it, a little after
            // the instant.
            assert!(
                pair[0].kind == Instant || (said - rate).abs() <= rate * 0.5 + 1e6,
                "{said} and {rate}: {pair:?}"
            );
        }
        let (first, last) = (flow[0].flow, flow[flow.len() - 1].flow);
        assert!(first.done < last.done && first.pages_left > last.pages_left, "{first:?} {last:?}");
        assert!(first.total >= image, "at most {}, and it has become {image}", first.total);
        let end = events.last().unwrap();
        assert_eq!(
            (end.kind, end.flow.done, end.flow.total, end.flow.pages_left),
            (Complete, image, image, 0)
        );
    }
}

/// All memory of a non-live snapshot is saved by its instant.
#[test]
fn progress_of_a_non_live_snapshot_precedes_its_instant() {
    for binary in Binary::any() {
        let opened = Opened::start(&large(binary));
        let listener = Listener::default().every(Duration::from_millis(1));
        let heard = listener.heard();
        let job = opened.start_job(&named("s"), 0, listener, Returns::AtInstant).unwrap();
        assert!(job.wait(None));
        job.result().unwrap();
        let mut events = heard.events();
        events.dedup_by_key(|event| event.kind);
        let all: Vec<_> = events.iter().map(|event| event.kind).collect();
        assert_eq!(all, [Paused, Switched, Progress, Instant, Complete]);
        assert_eq!(events[3].flow, events[4].flow, "nothing is left at the instant");
    }
}

/// Asserts that events are in order and report one pause.
#[track_caller]
fn assert_in_order(events: &[Event], expected: &[EventKind]) {
    assert_eq!(steps(events), expected, "{events:?}");
    assert!(events.is_sorted_by_key(|event| event.time), "{events:?}");
    // The pause grows until the instant, where QEMU's own measurement may replace the library's.
    let paused = |what| events.iter().find(|event| event.kind == what).map(|event| event.paused);
    let (paused_at, switched, instant) = (paused(Paused), paused(Switched), paused(Instant));
    if let (Some(first), Some(second)) = (paused_at, switched) {
        assert!(NOW < first && first <= second, "{events:?}");
    }
    if paused_at.is_none() {
        assert!(events.iter().all(|event| event.paused == NOW), "{events:?}");
    }
    if let Some(all) = instant {
        assert!(
            events
                .iter()
                .rev()
                .take_while(|event| event.kind != Instant)
                .all(|event| event.paused == all)
        );
        assert_eq!(all > NOW, paused_at.is_some(), "{events:?}");
    }
}

#[test]
fn successful_snapshot_reports_events_in_order() {
    for binary in Binary::any() {
        let opened = Opened::start(&machine(binary, 2));
        let all = [Paused, Switched, Instant, Complete];
        let check = |name: &str, flags, expected: &[EventKind]| {
            let listener = Listener::default();
            let heard = listener.heard();
            let job = opened.start_at_once(&named(name), flags, listener);
            let taken = rest(&job);
            // The listener gets the last event before it can be taken by the descriptor.
            assert_eq!(taken, heard.events(), "the same, by callback and by descriptor");
            assert_in_order(&taken, expected);
            let stats = job.stats().unwrap();
            let paused = stats.paused.map_or(NOW, |(paused, _)| paused);
            assert_eq!(taken.last().unwrap().paused, paused);
            assert_eq!(job.info().elapsed, stats.total.max(job.info().elapsed));

            // The blocking call reports the same events.
            let mut listener = Listener::default();
            opened
                .handle
                .create(&named(&format!("{name}-blocking")), flags, &mut listener)
                .unwrap();
            assert_in_order(&listener.heard().events(), expected);
        };
        check("running", INSTANTLY, &all);
        check("plain", 0, &all);
        opened.guest.wait_ticks(ALL_SECTORS);
        opened.guest.control().execute("stop", json!({})).unwrap();
        if binary.version >= (10, 0, 0) {
            check("paused", INSTANTLY, &all[1..]);
        } else {
            // QEMU does not save a paused guest a second time before it has run.
            let job = opened.start_at_once(&named("paused"), INSTANTLY, Listener::default());
            assert_in_order(&rest(&job), &all[1..]);
        }
    }
}

/// A command that fails in a phase, and the events before that.
struct Fails {
    phase: Phase,
    command: &'static str,
    after: &'static [EventKind],
}

const FAILURES: [Fails; 8] = [
    Fails { phase: Phase::Validate, command: "query-migrate-capabilities", after: &[] },
    Fails { phase: Phase::Plan, command: "query-block", after: &[] },
    Fails { phase: Phase::Prepare, command: "getfd", after: &[] },
    Fails { phase: Phase::Pause, command: "stop", after: &[] },
    Fails { phase: Phase::Switch, command: "transaction", after: &[Paused] },
    Fails { phase: Phase::Arm, command: "migrate", after: &[Paused, Switched] },
    Fails { phase: Phase::Drain, command: "query-migrate", after: &[Paused, Switched, Instant] },
    Fails {
        phase: Phase::Finish,
        command: "query-migrate-capabilities",
        after: &[Paused, Switched, Instant],
    },
];

#[test]
fn failed_snapshot_reports_events_in_order_and_the_last_after_undo() {
    for binary in Binary::any() {
        let (opened, proxy) = through_proxy(&machine(binary, 2));
        let proxy = Arc::new(proxy);
        for Fails { phase, command, after } in FAILURES {
            for returns in [Returns::AtOnce, Returns::AtInstant] {
                eprintln!("{} {phase:?} {returns:?}", binary.name);
                let before = opened.trace();
                let theirs = Arc::clone(&proxy);
                let fail = move || theirs.rule(command, 1, Fault::fail("not today"));
                let listener = Listener::default().every(NEVER).at(phase, fail);
                let heard = listener.heard();
                let started = opened.start_job(&named("s"), INSTANTLY, listener, returns);
                let passed = after.contains(&Instant);
                assert_eq!(started.is_ok(), passed || returns == Returns::AtOnce);
                let error = match started {
                    Ok(job) => {
                        assert_eq!(rest(&job), heard.events());
                        assert!(job.wait(Some(NOW)));
                        let (error, info) = (job.result().unwrap_err(), job.info());
                        assert_eq!((info.phase, info.instant), (None, passed));
                        assert_eq!(job.xml(), Err(error.clone()));
                        assert_eq!(Some(job.stats().unwrap()), opened.handle.stats());
                        error
                    }
                    Err(error) => error,
                };
                assert!(error.message.contains("not today"), "{error}");
                let expected: Vec<_> =
                    after.iter().copied().chain([Failed(error.number())]).collect();
                assert_in_order(&heard.events(), &expected);
                assert_untouched(&opened, &before);
                assert_eq!(proxy.rules_left(), 0);
            }
        }
        drop(proxy);
    }
}

#[test]
fn job_can_be_cancelled_in_each_phase() {
    // The number of events that are reported nevertheless.
    let phases = [
        (Phase::Validate, 0..=0),
        (Phase::Plan, 0..=0),
        (Phase::Prepare, 0..=0),
        (Phase::Pause, 1..=1),
        (Phase::Switch, 2..=2),
        // Write tracking can be armed by the time that the cancel is noticed.
        (Phase::Arm, 2..=3),
        (Phase::Drain, 3..=3),
        (Phase::Finish, 3..=3),
    ];
    for binary in Binary::any() {
        let opened = Opened::start(&machine(binary, 2));
        for (phase, happens) in &phases {
            eprintln!("{} {phase:?}", binary.name);
            let (before, gate) = (opened.trace(), Gate::default());
            let job = opened.start_at_once(
                &named("s"),
                INSTANTLY,
                Listener::default().hold(*phase, &gate),
            );
            assert!(gate.wait_arrived(DEADLINE));
            assert_eq!(job.info().phase, Some(*phase));
            job.cancel();
            gate.release();
            let mut expected = steps(&rest(&job));
            assert_eq!(expected.pop(), Some(Failed(Code::OperationAborted as i32)));
            assert!(
                happens.contains(&expected.len())
                    && [Paused, Switched, Instant].starts_with(&expected)
            );
            let error = job.result().unwrap_err();
            assert_eq!(error.message, "the snapshot was cancelled");
            assert_untouched(&opened, &before);
            opened.guest.wait_ticks(1);
        }
        opened.assert_well();
    }
}

#[test]
fn job_cancelled_in_the_drain_ends() {
    for binary in Binary::any() {
        let opened = Opened::start(&large(binary));
        let before = opened.trace();
        let (slow, listener) = SlowDrain::new(&opened.guest, 1 << 20, Listener::default());
        let job = opened.start_job(&named("s"), INSTANTLY, listener, Returns::AtInstant).unwrap();
        wait_for(DEADLINE, || (job.info().phase == Some(Phase::Drain)).then_some(()))
            .expect("it drains");
        job.cancel();
        // Where QEMU cannot be told to end the migration, the bandwidth is restored to keep the
        // wait short.
        drop(slow);
        assert!(job.wait(None));
        assert_error(job.result(), Code::OperationAborted, "cancelled");
        // A second cancel does no harm.
        job.cancel();
        assert_untouched(&opened, &before);
        opened.guest.wait_ticks(3);
    }
}

#[test]
fn completed_job_cannot_be_cancelled() {
    let opened = Opened::start(&machine(&Binary::all()[0], 1));
    let job = opened.start_at_once(&named("s"), INSTANTLY, Listener::default());
    assert!(job.wait(None));
    job.cancel();
    assert_eq!(job.result().unwrap(), "s");
    opened.restore_clone("s");
}

/// The progress is not essential.
#[test]
fn failing_progress_query_does_not_fail_the_snapshot() {
    for binary in Binary::any() {
        let (opened, proxy) = through_proxy(&large(binary));
        let proxy = Arc::new(proxy);
        let theirs = Arc::clone(&proxy);
        let fail = move || theirs.rule("query-migrate", 1, Fault::fail("not today"));
        let listener = Listener::default().every(Duration::from_millis(20)).at(Phase::Drain, fail);
        let (slow, listener) = SlowDrain::new(&opened.guest, 1 << 20, listener);
        let heard = listener.heard();
        let job = opened.start_job(&named("s"), INSTANTLY, listener, Returns::AtInstant).unwrap();
        let told = || heard.events().iter().filter(|event| event.kind == Progress).count() > 3;
        wait_for(DEADLINE, || told().then_some(())).expect("there is progress all the same");
        assert_eq!(proxy.rules_left(), 0);
        let asked = proxy.commands().len();
        drop(slow);
        assert!(job.wait(None));
        job.result().unwrap();
        let events = heard.events();
        let progress = events.iter().filter(|event| event.kind == Progress).map(|event| event.flow);
        let at_instant = events.iter().find(|event| event.kind == Instant).unwrap().flow;
        assert!(progress.clone().is_sorted_by_key(|flow| flow.done), "{events:?}");
        let as_told = |flow: instantsnap::engine::Flow| {
            flow.pages_left == at_instant.pages_left && flow.total >= flow.done
        };
        assert!(progress.take(3).all(as_told), "what is not known is as it was: {events:?}");
        // The library then stops asking QEMU for a while.
        let drain = &proxy.commands()[..asked];
        assert_eq!(drain.last().unwrap(), "query-migrate", "{drain:?}");
        assert_eq!(job.result().unwrap(), "s");
        opened.restore_clone("s");
        drop(proxy);
    }
}

#[test]
fn dropped_job_of_a_closed_guest_continues() {
    for binary in Binary::any() {
        let opened = Opened::start(&machine(binary, 2));
        let (gate, listener) = (Gate::default(), Listener::default());
        let heard = listener.heard();
        let another =
            open_guest(&opened.guest, &opened.guest.qmp(), None, &opened.state_dir()).unwrap();
        let listener = listener.hold(Phase::Drain, &gate);
        let job =
            another.start(&named("s"), INSTANTLY, Box::new(listener), Returns::AtInstant).unwrap();
        assert!(gate.wait_arrived(DEADLINE));
        drop(another);
        drop(job);
        gate.release();
        let ended = || matches!(heard.events().last()?.kind, Complete | Failed(_)).then_some(());
        wait_for(DEADLINE, ended).expect("it ends");
        assert_in_order(&heard.events(), &[Paused, Switched, Instant, Complete]);
        opened.guest.wait_ticks(ALL_SECTORS);
        opened.restore_clone("s");
    }
}

#[test]
fn second_job_is_refused_and_touches_nothing() {
    for binary in Binary::any() {
        let opened = Opened::start(&machine(binary, 2));
        let other_state = opened.guest.directory().join("other");
        std::fs::create_dir_all(&other_state).unwrap();
        // Only the driver may connect to its socket.
        let socket = if by_driver() { "control.sock" } else { "qmp.sock" };
        let other =
            Handle::open_qmp(&opened.guest.directory().join(socket), None, &other_state).unwrap();
        let gate = Gate::default();
        let first = opened.start_at_once(
            &named("first"),
            INSTANTLY,
            Listener::default().hold(Phase::Prepare, &gate),
        );
        assert!(gate.wait_arrived(DEADLINE));
        let files = common::files_below(opened.guest.directory());

        let second = |handle: &Handle, returns| {
            handle.start(&named("second"), INSTANTLY, Box::new(()), returns)
        };
        for returns in [Returns::AtInstant, Returns::AtOnce] {
            let busy = "another snapshot of this guest is being taken";
            assert_error(second(&opened.handle, returns).map(drop), Code::OperationInvalid, busy);
        }
        let busy = "another snapshot operation on the guest";
        assert_error(second(&other, Returns::AtInstant).map(drop), Code::OperationInvalid, busy);
        let job = second(&other, Returns::AtOnce).unwrap();
        assert_in_order(&rest(&job), &[Failed(Code::OperationInvalid as i32)]);
        assert_error(job.result(), Code::OperationInvalid, busy);
        assert_eq!(common::files_below(opened.guest.directory()), files);

        gate.release();
        rest(&first);
        // The next snapshot can begin as soon as the last event was reported.
        let next = opened
            .start_job(&named("next"), INSTANTLY, Listener::default(), Returns::AtInstant)
            .unwrap();
        next.wait(None);
        assert_eq!(
            (first.result().unwrap(), next.result().unwrap()),
            ("first".into(), "next".into())
        );
        second(&other, Returns::AtInstant).unwrap().wait(None);
        opened.guest.wait_ticks(ALL_SECTORS);
        opened.restore_clone("first");
    }
}

#[test]
fn unrecorded_snapshot_has_xml() {
    for binary in Binary::any() {
        let opened = Opened::start(&machine(binary, 2));
        let xml = "<domainsnapshot><name>s</name><description>two &lt; three</description></domainsnapshot>";
        let job = opened.start_at_once(xml, INSTANTLY | NO_METADATA, Listener::default());
        assert!(job.wait(None));
        assert_eq!(job.result().unwrap(), "s");
        assert_eq!(opened.handle.store().unwrap().list().unwrap(), []);
        let record = Record::parse(&job.xml().unwrap()).unwrap();
        assert_eq!(
            (record.name.as_str(), record.description.as_deref()),
            ("s", Some("two < three"))
        );
        assert!(Path::new(&record.memory_file).exists());
        assert_eq!(record.disks.len(), 2);
        for (disk, name) in record.disks.iter().zip(["vd0", "vd1"]) {
            assert_eq!(opened.active_image(name), disk.overlay);
        }
    }
}

/// Only Rust's listeners can panic.
#[test]
fn panicking_listener_fails_the_snapshot_only() {
    let opened = Opened::start(&machine(&Binary::all()[0], 2));
    for phase in [Phase::Validate, Phase::Switch, Phase::Drain] {
        let before = opened.trace();
        let job: Job = opened.start_at_once(
            &named("s"),
            INSTANTLY,
            Listener::default().at(phase, || panic!("on purpose")),
        );
        assert!(job.wait(None));
        assert_error(job.result(), Code::InternalError, "a defect of instantsnap");
        assert_eq!(rest(&job).last().unwrap().kind, Failed(Code::InternalError as i32));
        assert_untouched(&opened, &before);
    }
    opened.assert_well();
}
