// SPDX-License-Identifier: LGPL-2.1-or-later

//! An examination of a domain agrees with what a snapshot then does, and changes nothing.

use common::virt::{self, OpenedDomain};
use instantsnap::engine::{Finding, Verdict};
use instantsnap_testkit::{Binary, Format, Machine, test};

fn failed(found: &[Finding]) -> Vec<&str> {
    let failed = found.iter().filter(|found| found.verdict == Verdict::Fail);
    failed.map(|found| found.check).collect()
}

#[test]
fn domain_is_examined_whether_it_runs_or_not() {
    let daemon = virt::session();
    let machine = Machine::new(&Binary::all()[0]).disk(Format::Qcow2).disk(Format::Raw);
    let domain = OpenedDomain::start(&machine, &daemon);
    let before = domain.trace();
    let found = domain.handle.examine();
    domain.assert_untouched(&before);
    assert_eq!(failed(&found), [""; 0], "{found:?}");
    let disks: Vec<_> = found.iter().filter(|found| found.check == "disk").collect();
    assert_eq!(disks.len(), 2, "{found:?}");
    assert!(disks.iter().all(|disk| disk.verdict == Verdict::Pass), "{found:?}");
    domain.snapshot("s").unwrap();
    domain.guest.virsh("destroy", &[]);
    let found = domain.handle.examine();
    assert_eq!(failed(&found), ["guest"], "{found:?}");
}
