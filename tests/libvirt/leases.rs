// SPDX-License-Identifier: LGPL-2.1-or-later

//! libvirt's locks on disk images: it gives them away while a domain is paused, and a snapshot must
//! leave them held.

use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use common::virt::OpenedDomain;
use common::{At, machine};
use instantsnap::engine::Phase;
use instantsnap_testkit::{Binary, DEADLINE, Daemon, test, wait_for};

/// A session's daemon that locks images. It starts its virtlockd itself.
fn locking_daemon() -> Daemon {
    let daemon = Daemon::session();
    daemon.kill();
    let config = daemon.directory().join("etc/libvirt/qemu.conf");
    let mut config = std::fs::OpenOptions::new().append(true).open(config).unwrap();
    config.write_all(b"lock_manager = \"lockd\"\n").unwrap();
    daemon.start_again();
    daemon
}

/// Which of its bytes virtlockd holds of a file, and how: lines of /proc/locks without their
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

/// The image that the disk is on.
fn image(domain: &OpenedDomain) -> std::path::PathBuf {
    let list = domain.guest.virsh("domblklist", &[]);
    list.lines().find_map(|line| line.trim().strip_prefix("vda")).expect("vda").trim().into()
}

/// Locks on the image that the disk is on.
fn held(domain: &OpenedDomain) -> Vec<String> {
    locks(&image(domain))
}

#[test]
fn the_locks_on_the_images_are_held_again_after_a_snapshot() {
    let daemon = locking_daemon();
    for binary in Binary::under_libvirt() {
        let domain = OpenedDomain::start(&machine(binary, 2), &daemon);
        let first = held(&domain);
        assert_eq!(first.len(), 1, "QEMU {}: {first:?}", binary.name);
        domain.guest.virsh("suspend", &[]);
        assert_eq!(held(&domain), [""; 0], "given away in a pause");
        domain.guest.virsh("resume", &[]);
        let by_hand = held(&domain);
        assert_eq!(by_hand.len(), 1);

        let mut after_the_instant = Vec::new();
        let mut look = At(|phase| {
            if phase == Phase::Drain {
                after_the_instant = held(&domain);
            }
        });
        let before = image(&domain);
        domain.snapshot_observed("locked", &mut look).unwrap();
        assert_ne!(image(&domain), before);
        assert_eq!(after_the_instant.len(), 1, "QEMU {}: while memory is being saved", binary.name);
        assert_eq!(held(&domain), after_the_instant, "QEMU {}", binary.name);
        // The same lock by the same holder, on another file.
        let what =
            |lock: &String| lock.split_whitespace().take(4).map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(what(&after_the_instant[0]), what(&by_hand[0]), "QEMU {}", binary.name);
        domain.guest.wait_ticks(3);

        // As libvirt itself leaves it after a pause.
        domain.guest.virsh("suspend", &[]);
        domain.guest.virsh("resume", &[]);
        assert_eq!(held(&domain), after_the_instant, "QEMU {}", binary.name);
        domain.restore_clone("locked");
    }
}

#[test]
fn the_locks_are_held_again_after_a_snapshot_that_failed() {
    let daemon = locking_daemon();
    for binary in Binary::under_libvirt() {
        for at in [Phase::Switch, Phase::Arm, Phase::Drain] {
            let domain = OpenedDomain::start(&machine(binary, 1), &daemon);
            let before = held(&domain);
            let mut cancel = At(|phase| {
                if phase == at {
                    domain.handle.cancel().unwrap();
                }
            });
            domain.snapshot_observed("failed", &mut cancel).unwrap_err();
            let again = wait_for(DEADLINE, || (held(&domain) == before).then_some(()));
            assert!(
                again.is_some(),
                "QEMU {} in {at:?}: {before:?}, now {:?}",
                binary.name,
                held(&domain)
            );
            domain.guest.wait_ticks(3);
        }
    }
}
