// SPDX-License-Identifier: LGPL-2.1-or-later

//! Another client starts a domain while offline images of it are merged, by the undo of a failed
//! snapshot or by a delete. The domain must not continue on images that are removed.

use std::path::{Path, PathBuf};

use common::virt::OpenedDomain;
use common::{ALL_SECTORS, At, QEMU_IMG, assert_error, files_below, machine, qemu_img_stand_in};
use instantsnap::engine::Phase;
use instantsnap::error::Code;
use instantsnap_testkit::{Binary, Daemon, test};

/// A qemu-img that starts the domain after its `nth` merge.
fn starts_after_merge(directory: &Path, domain: &OpenedDomain, nth: usize) -> PathBuf {
    let (uri, name) = (domain.guest.daemon().uri(), domain.guest.name());
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = commit ] || exec /usr/bin/qemu-img \"$@\"\n/usr/bin/qemu-img \"$@\" \
         || exit\necho >>{0}/merged\n[ \"$(wc -l <{0}/merged)\" -ne {nth} ] || /usr/bin/virsh -q \
         -c '{uri}' start {name} >{0}/said 2>&1\nexit 0\n",
        directory.display()
    );
    qemu_img_stand_in(directory, &script)
}

/// Runs `call` with this qemu-img.
fn with_qemu_img<T>(qemu_img: &Path, call: impl FnOnce() -> T) -> T {
    // SAFETY: this process runs this test only, and its other threads, which are the harness's and
    // libvirt's, do not read the environment.
    unsafe { std::env::set_var(QEMU_IMG, qemu_img) };
    let result = call();
    // SAFETY: as above.
    unsafe { std::env::remove_var(QEMU_IMG) };
    result
}

/// Asserts that the disks are on their images without any overlay, and that the guest counts on and
/// finds its data.
fn assert_on_images(domain: &OpenedDomain, images: &[String], said: &Path) {
    assert_eq!(std::fs::read_to_string(said).unwrap(), "", "the domain is started");
    for flags in [&[][..], &["--inactive"]] {
        let sources = domain.guest.virsh("domblklist", flags);
        assert!(
            images.iter().all(|image| sources.contains(&format!(" {image}\n"))),
            "{images:?}\n{sources}"
        );
    }
    let overlays = files_below(domain.guest.directory())
        .into_iter()
        .filter(|file| file.extension() == Some("s".as_ref()));
    assert_eq!(overlays.collect::<Vec<_>>(), Vec::<std::path::PathBuf>::new());
    domain.guest.wait_ticks(ALL_SECTORS);
}

fn images(domain: &OpenedDomain) -> Vec<String> {
    domain.guest.disks().iter().map(|disk| disk.file.display().to_string()).collect()
}

#[test]
fn domain_started_during_undo_is_on_its_images() {
    let daemon = Daemon::session();
    for nth in [1, 2] {
        let domain = OpenedDomain::start(&machine(&Binary::under_libvirt()[0], 2), &daemon);
        let images = images(&domain);
        let directory = tempfile::tempdir().unwrap();
        let qemu_img = starts_after_merge(directory.path(), &domain, nth);
        let mut destroy = At(|phase| {
            if phase == Phase::Drain {
                domain.guest.virsh("destroy", &[]);
            }
        });
        let snapshot = || domain.snapshot_observed("s", &mut destroy);
        assert_error(
            with_qemu_img(&qemu_img, snapshot),
            Code::OperationFailed,
            "the guest's QEMU has ended meanwhile",
        );
        assert_on_images(&domain, &images, &directory.path().join("said"));
        domain.snapshot("again").unwrap();
        domain.restore_clone("again");
    }
}

#[test]
fn domain_started_during_delete_loses_nothing() {
    let daemon = Daemon::session();
    let domain = OpenedDomain::start(&machine(&Binary::under_libvirt()[0], 2), &daemon);
    let images = images(&domain);
    domain.snapshot("s").unwrap();
    domain.guest.wait_ticks(ALL_SECTORS);
    domain.guest.virsh("destroy", &[]);
    let directory = tempfile::tempdir().unwrap();
    let qemu_img = starts_after_merge(directory.path(), &domain, 2);
    let delete = with_qemu_img(&qemu_img, || domain.delete("s", 0));
    assert_error(delete, Code::OperationFailed, "delete the snapshot again");
    domain.guest.wait_ticks(ALL_SECTORS);
    domain.delete("s", 0).unwrap();
    assert_on_images(&domain, &images, &directory.path().join("said"));
}
