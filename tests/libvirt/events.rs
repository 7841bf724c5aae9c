// SPDX-License-Identifier: LGPL-2.1-or-later

//! What a third client hears of a snapshot: the guest is paused, and runs again.

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdout, Command, Stdio};

use common::virt::OpenedDomain;
use common::{At, machine};
use instantsnap::engine::Phase;
use instantsnap_testkit::{Binary, Daemon, test};

/// Says "ready", and then each lifecycle event of a domain, by its numbers.
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
/// VIR_DOMAIN_EVENT_SHUTDOWN, VIR_DOMAIN_EVENT_SHUTDOWN_HOST: QEMU says it when it is ended.
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

    /// What is heard until the domain, which is destroyed now, has ended.
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
fn a_third_client_hears_that_the_guest_is_paused_and_runs_again() {
    let daemon = Daemon::session();
    for binary in Binary::under_libvirt() {
        let domain = OpenedDomain::start(&machine(binary, 1), &daemon);
        let mut listener = Listener::start(&domain);
        let mut heard = Vec::new();
        let mut listen = At(|phase| {
            // The instant has passed: both have been said, and memory is yet to be saved.
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
fn a_third_client_hears_that_the_guest_runs_again_after_a_snapshot_that_failed() {
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
            // A migration that is given up while it sets up pauses the guest once more.
            let whole = !heard.is_empty() && heard.chunks(2).all(|pair| pair == [PAUSED, RESUMED]);
            assert!(whole, "QEMU {} in {at:?}: {heard:?}", binary.name);
        }
    }
}
