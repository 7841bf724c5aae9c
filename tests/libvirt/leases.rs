// SPDX-License-Identifier: LGPL-2.1-or-later

//! libvirt's locks on disk images: libvirt releases them while a domain is paused, and after a
//! snapshot they must be held.

use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use common::virt::OpenedDomain;
use common::{At, machine};
use instantsnap::engine::Phase;
use instantsnap_testkit::{Binary, DEADLINE, Daemon, test, wait_for};

/// A session daemon that locks images. It starts its virtlockd itself.
fn locking_daemon() -> Daemon {
    let daemon = Daemon::session();
    daemon.kill();
    let config = daemon.directory().join("etc/libvirt/qemu.conf");
    let mut config = std::fs::OpenOptions::new().append(true).open(config).unwrap();
    config.write_all(b"lock_manager = \"lockd\"\n").unwrap();
    daemon.start_again();
    daemon
}

/// The byte ranges of a file that virtlockd has locked, and how: lines of /proc/locks without their
/// number.
fn locks(file: &Path) -> Vec<String> {
    let inode = format!(":{}", std::fs::metadata(file).unwrap().ino());
    let all = std::fs::read_to_string("/proc/locks").unwrap();
    let of_file =
        all.lines().filter(|line| line.split_whitespace().any(|word| word.ends_with(&inode)));
    // QEMU's own locks are OFDLCK.
    let posix = of_file.filter(|line| line.contains("POSIX"));
    let mut locks: Vec<_> =
        posix.filter_map(|line| Some(line.split_once(": ")?.1.to_owned())).collect();
    locks.sort();
    locks
}

/// The disk's active image.
fn image(domain: &OpenedDomain) -> std::path::PathBuf {
    let list = domain.guest.virsh("domblklist", &[]);
    list.lines().find_map(|line| line.trim().strip_prefix("vda")).expect("vda").trim().into()
}

/// The locks on the disk's active image.
fn locks_on_active_image(domain: &OpenedDomain) -> Vec<String> {
    locks(&image(domain))
}

#[test]
fn image_locks_are_held_after_a_snapshot() {
    let daemon = locking_daemon();
    for binary in Binary::under_libvirt() {
        let domain = OpenedDomain::start(&machine(binary, 2), &daemon);
        let first = locks_on_active_image(&domain);
        assert_eq!(first.len(), 1, "QEMU {}: {first:?}", binary.name);
        domain.guest.virsh("suspend", &[]);
        assert_eq!(locks_on_active_image(&domain), [""; 0], "given away in a pause");
        domain.guest.virsh("resume", &[]);
        let by_hand = locks_on_active_image(&domain);
        assert_eq!(by_hand.len(), 1);

        let mut after_the_instant = Vec::new();
        let mut look = At(|phase| {
            if phase == Phase::Drain {
                after_the_instant = locks_on_active_image(&domain);
            }
        });
        let before = image(&domain);
        domain.snapshot_observed("locked", &mut look).unwrap();
        assert_ne!(image(&domain), before);
        assert_eq!(after_the_instant.len(), 1, "QEMU {}: while memory is being saved", binary.name);
        assert_eq!(locks_on_active_image(&domain), after_the_instant, "QEMU {}", binary.name);
        // The same kind of lock by the same process, on another file.
        let what =
            |lock: &String| lock.split_whitespace().take(4).map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(what(&after_the_instant[0]), what(&by_hand[0]), "QEMU {}", binary.name);
        domain.guest.wait_ticks(3);

        // A pause and a resume by libvirt itself leave the same locks.
        domain.guest.virsh("suspend", &[]);
        domain.guest.virsh("resume", &[]);
        assert_eq!(locks_on_active_image(&domain), after_the_instant, "QEMU {}", binary.name);
        domain.restore_clone("locked");
    }
}

#[test]
fn image_locks_are_held_after_a_failed_snapshot() {
    let daemon = locking_daemon();
    for binary in Binary::under_libvirt() {
        for at in [Phase::Switch, Phase::Arm, Phase::Drain] {
            let domain = OpenedDomain::start(&machine(binary, 1), &daemon);
            let before = locks_on_active_image(&domain);
            let mut cancel = At(|phase| {
                if phase == at {
                    domain.handle.cancel().unwrap();
                }
            });
            domain.snapshot_observed("failed", &mut cancel).unwrap_err();
            let again =
                wait_for(DEADLINE, || (locks_on_active_image(&domain) == before).then_some(()));
            assert!(
                again.is_some(),
                "QEMU {} in {at:?}: {before:?}, now {:?}",
                binary.name,
                locks_on_active_image(&domain)
            );
            domain.guest.wait_ticks(3);
        }
    }
}
