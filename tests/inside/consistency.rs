// SPDX-License-Identifier: LGPL-2.1-or-later

//! Inside a stock libvirtd: memory, every disk and the serial line of a snapshot are of one moment,
//! for unmodified clients.

use common::inside::{Subject, has_mapped, library, session};
use common::machine;
use instantsnap_testkit::{Binary, Daemon, MachineType, Mode, test, thorough};

#[test]
fn every_snapshot_in_a_row_is_of_one_moment() {
    let clones = Daemon::session();
    for binary in Binary::under_libvirt() {
        let system = Daemon::preloaded(Mode::System, &[&library()], &[]);
        for daemon in [Some(session(&[])), system].into_iter().flatten() {
            assert!(has_mapped(daemon.pid(), &library()));
            let all = [(MachineType::Q35, 3), (MachineType::Pc, 1)];
            for (machine_type, disks) in all.into_iter().take(if thorough() { 2 } else { 1 }) {
                eprintln!("{} {:?} {machine_type:?}, {disks} disks", binary.name, daemon.mode());
                let subject = Subject::start(
                    &machine(binary, disks).restless().machine_type(machine_type),
                    &daemon,
                );
                // libvirt must not pass the preloaded library on to QEMU.
                assert!(!has_mapped(subject.guest.pid(), &library()));
                for round in 0..2 {
                    let name = format!("s{round}");
                    let before = subject.guest.wait_ticks(1);
                    assert_eq!(subject.snapshot(&name), Ok(name.clone()), "{}", daemon.log());
                    let after = subject.guest.wait_ticks(1);
                    let clones =
                        if daemon.mode() == Mode::System { &daemon.another() } else { &clones };
                    let clone = subject.restore_clone(&name, clones);
                    let first = common::first_tick(&clone);
                    assert!(
                        (before..=after + 2).contains(&first),
                        "round {round}: the clone goes on from {first}, the snapshot was taken \
                         between {before} and {after}"
                    );
                }
                assert_eq!(subject.snapshots(), ["s0", "s1"]);
                assert!(subject.guest.virsh("snapshot-current", &["--name"]).contains("s1"));
                subject.guest.wait_ticks(3);
                assert!(!daemon.log().contains("instantsnap"), "{}", daemon.log());
            }
        }
    }
}
