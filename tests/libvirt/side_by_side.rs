// SPDX-License-Identifier: LGPL-2.1-or-later

//! Snapshots of many domains at once do not wait for each other; two snapshots of one domain
//! exclude each other.

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
fn eight_domains_are_snapshotted_at_once() {
    // The daemon has the default number of workers.
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
    // All snapshots reach the drain before one of them ends.
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

/// Takes a second snapshot of a domain whose first one is being taken.
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
fn second_snapshot_is_refused_in_the_same_and_in_another_process() {
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
    // The domain can be snapshotted again.
    domain.snapshot("fourth").unwrap();
}
