// SPDX-License-Identifier: LGPL-2.1-or-later

//! The lifecycle events that another client receives of a snapshot: the guest is paused and
//! resumed.

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdout, Command, Stdio};

use common::virt::OpenedDomain;
use common::{At, machine};
use instantsnap::engine::Phase;
use instantsnap_testkit::{Binary, Daemon, test};

/// Prints "ready", and then the numbers of each lifecycle event of a domain.
const LISTENER: &str = r"
import sys, libvirt
libvirt.virEventRegisterDefaultImpl()
connection = libvirt.open(sys.argv[1])
domain = connection.lookupByUUIDString(sys.argv[2])
connection.domainEventRegisterAny(domain, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE,
    lambda connection, domain, event, detail, opaque: print(event, detail, flush=True), None)
print('ready', flush=True)
while True:
    libvirt.virEventRunDefaultImpl()
";

/// VIR_DOMAIN_EVENT_SUSPENDED, VIR_DOMAIN_EVENT_SUSPENDED_PAUSED.
const PAUSED: &str = "3 0";
/// VIR_DOMAIN_EVENT_RESUMED, VIR_DOMAIN_EVENT_RESUMED_UNPAUSED.
const RESUMED: &str = "4 0";
/// VIR_DOMAIN_EVENT_STOPPED, VIR_DOMAIN_EVENT_STOPPED_DESTROYED.
const DESTROYED: &str = "5 1";
/// VIR_DOMAIN_EVENT_SHUTDOWN, VIR_DOMAIN_EVENT_SHUTDOWN_HOST: QEMU emits it when it is terminated.
const ENDING: &str = "6 2";

struct Listener {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Listener {
    fn start(domain: &OpenedDomain) -> Listener {
        let uuid = domain.guest.virsh("domuuid", &[]);
        let mut command = Command::new("/usr/bin/python3");
        command
            .args(["-c", LISTENER, &domain.guest.daemon().uri(), uuid.trim()])
            .stdout(Stdio::piped());
        let mut child = command.spawn().expect("python3 cannot be run");
        let lines = BufReader::new(child.stdout.take().unwrap());
        let mut listener = Listener { child, lines };
        assert_eq!(listener.next(), "ready");
        listener
    }

    fn next(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    /// The remaining events of the domain, which is destroyed now, up to its end.
    fn rest(&mut self, domain: &OpenedDomain) -> Vec<String> {
        domain.guest.virsh("destroy", &[]);
        let all = std::iter::repeat_with(|| self.next()).filter(|heard| heard != ENDING);
        all.take_while(|heard| heard != DESTROYED && !heard.is_empty()).collect()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn other_clients_receive_suspended_and_resumed_events() {
    let daemon = Daemon::session();
    for binary in Binary::under_libvirt() {
        let domain = OpenedDomain::start(&machine(binary, 1), &daemon);
        let mut listener = Listener::start(&domain);
        let mut heard = Vec::new();
        let mut listen = At(|phase| {
            // The instant has passed: QEMU has reported both, and memory is not saved yet.
            if phase == Phase::Drain {
                heard = vec![listener.next(), listener.next()];
            }
        });
        domain.snapshot_observed("heard", &mut listen).unwrap();
        assert_eq!(heard, [PAUSED, RESUMED], "QEMU {}", binary.name);
        assert_eq!(listener.rest(&domain), [""; 0], "QEMU {}: no more than that", binary.name);
    }
}

#[test]
fn other_clients_receive_the_resumed_event_of_a_failed_snapshot() {
    let daemon = Daemon::session();
    for binary in Binary::under_libvirt() {
        for at in [Phase::Switch, Phase::Arm, Phase::Drain] {
            let domain = OpenedDomain::start(&machine(binary, 1), &daemon);
            let mut listener = Listener::start(&domain);
            let mut cancel = At(|phase| {
                if phase == at {
                    domain.handle.cancel().unwrap();
                }
            });
            let before = domain.trace();
            domain.snapshot_observed("failed", &mut cancel).unwrap_err();
            domain.assert_untouched(&before);
            domain.guest.wait_ticks(3);
            let heard = listener.rest(&domain);
            // A migration that is given up during its setup pauses the guest once more.
            let whole = !heard.is_empty() && heard.chunks(2).all(|pair| pair == [PAUSED, RESUMED]);
            assert!(whole, "QEMU {} in {at:?}: {heard:?}", binary.name);
        }
    }
}
