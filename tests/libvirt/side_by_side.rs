// SPDX-License-Identifier: LGPL-2.1-or-later

//! Many domains side by side do not wait for each other; two snapshots of one domain do not meet.

use std::sync::{Arc, Barrier};

use common::virt::OpenedDomain;
use common::{At, Handle, INSTANTLY, assert_error, machine};
use instantsnap::backend::LibvirtConnector;
use instantsnap::engine::Phase;
use instantsnap::error::Code;
use instantsnap::libvirt::Connect;
use instantsnap_testkit::program::process;
use instantsnap_testkit::{Binary, Daemon, process, test, thorough};

const DOMAINS: usize = 8;

#[test]
fn eight_domains_are_snapshotted_side_by_side() {
    // As many workers as its configuration has by default.
    let daemon = Daemon::session();
    let clones = daemon.another();
    let binaries = Binary::all().iter().cycle();
    let domains: Vec<_> = binaries
        .take(DOMAINS)
        .map(|binary| OpenedDomain::open(machine(binary, 2).memory(32).start_under(&daemon)))
        .collect();
    for domain in &domains {
        domain.guest.wait_ticks(2);
    }
    // Each is there when all have got to the drain: nobody has waited for another's end.
    let all = Barrier::new(DOMAINS);
    std::thread::scope(|scope| {
        for domain in &domains {
            let mut meet = At(|phase| {
                if phase == Phase::Drain {
                    all.wait();
                }
            });
            scope.spawn(move || domain.snapshot_observed("side", &mut meet).unwrap());
        }
    });
    for (n, domain) in domains.iter().enumerate() {
        domain.guest.wait_ticks(3);
        if thorough() || n < 2 {
            let clone = clones.restore(&domain.guest, &domain.memory_file("side"));
            clone.wait_ticks(5);
        }
    }
}

/// A second snapshot of a domain whose first one is being taken.
fn second(uri: &str, uuid: &str, memory: &str) {
    let domain = Connect::open(uri).unwrap().unwrap().domain(uuid).unwrap();
    let handle = Handle::open_libvirt(Arc::new(LibvirtConnector::open(domain).unwrap()));
    let xml = format!(
        "<domainsnapshot><name>second</name><memory snapshot='external' \
         file='{memory}'/></domainsnapshot>"
    );
    assert_error(
        handle.create(&xml, INSTANTLY, &mut ()),
        Code::OperationInvalid,
        "is under way: wait for it to end",
    );
}

const SECOND: &str = "INSTANTSNAP_TEST_SECOND";

#[process]
fn other_process() {
    let second_of = std::env::var(SECOND).unwrap();
    let [uri, uuid, memory] = second_of.split('\n').collect::<Vec<_>>()[..] else {
        panic!("{second_of}")
    };
    second(uri, uuid, memory);
}

#[test]
fn a_second_snapshot_of_a_domain_is_refused_by_whatever_process_and_touches_nothing() {
    let daemon = Daemon::session();
    let domain = OpenedDomain::start(&machine(&Binary::all()[0], 1), &daemon);
    let (uri, uuid) = (daemon.uri(), domain.guest.virsh("domuuid", &[]));
    let memory = domain.memory_file("second").display().to_string();
    let files = |domain: &OpenedDomain| common::files_below(domain.guest.directory());
    let mut meanwhile = At(|phase| {
        if !matches!(phase, Phase::Prepare | Phase::Switch | Phase::Drain) {
            return;
        }
        let before = files(&domain);
        second(&uri, uuid.trim(), &memory);
        assert_error(
            domain.snapshot("third"),
            Code::OperationInvalid,
            "another snapshot of this guest is being taken",
        );
        let output = process(module_path!(), "other_process")
            .env(SECOND, [&uri, uuid.trim(), &memory].join("\n"))
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(files(&domain), before);
    });
    domain.snapshot_observed("first", &mut meanwhile).unwrap();
    assert_eq!(domain.guest.virsh("snapshot-list", &["--name"]).trim(), "first");
    domain.restore_clone("first");
    domain.guest.wait_ticks(3);
    // It is free again.
    domain.snapshot("fourth").unwrap();
}
