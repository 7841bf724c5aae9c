// SPDX-License-Identifier: LGPL-2.1-or-later

//! Sparse memory images of domains: libvirt 11.2 and later restores them, but not by its own
//! revert; earlier ones cannot read them at all.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;

use common::backend::by_client_only;
use common::tree::{Maker, Tree};
use common::{INSTANTLY, assert_says, machine, named, virt};
use instantsnap::engine::revert_managed;
use instantsnap::error::{Code, Error};
use instantsnap::image::{Contents, Format, convert};
use instantsnap::model::flags::RevertFlags;
use instantsnap_testkit::{Binary, Daemon, skip, test};

/// The first libvirt that restores sparse images.
const RESTORES_SPARSE: (u32, u32, u32) = (11, 2, 0);

#[test]
fn stock_restore_and_our_revert_read_a_sparse_image() {
    if Daemon::version() < RESTORES_SPARSE {
        skip("libvirt 11.2 or later is needed");
    }
    for daemon in virt::daemons() {
        let mut tree = Tree::start(&machine(&Binary::all()[0], 2), &daemon, Maker::Instant);
        tree.snapshot("a");
        tree.snapshot("b");
        let xml = |tree: &Tree| {
            let memory = tree.memory("a").display().to_string();
            tree.opened.guest.daemon().virsh(&["save-image-dumpxml", &memory])
        };
        let before = xml(&tree);
        convert(&tree.memory("a"), Format::Sparse).unwrap();
        assert_eq!(xml(&tree), before);
        tree.opened.restore_clone("a");
        tree.revert("a");
        tree.opened.guest.wait_ticks(3);
        tree.revert("b");
        tree.opened.guest.virsh("destroy", &[]);
        tree.revert("a");
        convert(&tree.memory("a"), Format::Raw).unwrap();
        tree.assert_all_can_be_reverted_to();
    }
}

/// The first libvirt that restores zstd images.
const RESTORES_ZSTD: (u32, u32, u32) = (10, 4, 0);

fn zstd() -> Format {
    Format::named("zstd").unwrap()
}

#[test]
fn stock_restore_and_libvirts_own_revert_read_a_zstd_image() {
    if Daemon::version() < RESTORES_ZSTD {
        skip("libvirt 10.4 or later is needed");
    }
    let mut tree = Tree::start(&machine(&Binary::all()[0], 2), &virt::session(), Maker::Instant);
    tree.snapshot("a");
    convert(&tree.memory("a"), zstd()).unwrap();
    tree.opened.restore_clone("a");
    tree.revert("a");
    tree.opened.guest.wait_ticks(3);
    tree.opened.guest.virsh("destroy", &[]);
    tree.revert("a");
    tree.assert_all_can_be_reverted_to();
}

#[test]
fn zstd_image_is_refused_before_anything_is_changed_where_libvirt_cannot_restore_it() {
    if Daemon::version() >= RESTORES_ZSTD {
        skip("this libvirt can restore it");
    }
    let mut tree = Tree::start(&machine(&Binary::all()[0], 1), &virt::session(), Maker::Instant);
    let before = tree.opened.trace();
    let wanted = tree.opened.handle.create_as(Some(zstd()), &named("z"), INSTANTLY, &mut ());
    let error = wanted.map(drop).expect_err("libvirt cannot restore it");
    assert_says(&error, Code::ConfigUnsupported, &["'zstd'", "libvirt 10.4"]);
    tree.opened.assert_untouched(&before);
    tree.snapshot("a");
    convert(&tree.memory("a"), zstd()).unwrap();
    let before = tree.opened.trace();
    let error = tree.try_revert("a", 0).expect_err("libvirt cannot restore it");
    let memory = tree.memory("a");
    let parts = [memory.to_str().unwrap(), "zstd", "10.4", "instantsnap_image_convert()"];
    assert_says(&error, Code::ConfigUnsupported, &parts);
    tree.opened.assert_untouched(&before);
    convert(&tree.memory("a"), Format::Raw).unwrap();
    tree.assert_all_can_be_reverted_to();
}

#[test]
fn zstd_snapshot_of_a_domain_has_notes_which_go_with_it_and_libvirts_own_zstd_image_is_read() {
    if Daemon::version() < RESTORES_ZSTD {
        skip("libvirt 10.4 or later is needed");
    }
    let opened = virt::OpenedDomain::start(&machine(&Binary::all()[0], 1), &virt::session());
    opened.handle.create_as(Some(zstd()), &opened.xml("s", ""), INSTANTLY, &mut ()).unwrap();
    opened.restore_clone("s");
    let (guest, saved) = (&opened.guest, opened.memory_file("saved"));
    let name = saved.to_str().unwrap();
    guest.virsh("save", &[name, "--image-format", "zstd"]);
    let zstd = Contents::read(&saved).unwrap();
    assert_eq!((zstd.format, zstd.domain.as_deref()), ("zstd", Some(guest.name())));
    convert(&saved, Format::Sparse).unwrap();
    assert_eq!(Contents::read(&saved).unwrap().blocks, zstd.blocks);
    guest.daemon().virsh(&["restore", name]);
    guest.wait_ticks(5);
}

#[test]
fn sparse_image_is_refused_before_the_domain_is_ended_where_libvirt_cannot_restore_it() {
    if Daemon::version() >= RESTORES_SPARSE {
        skip("this libvirt can restore it");
    }
    let mut tree = Tree::start(&machine(&Binary::all()[0], 1), &virt::session(), Maker::Instant);
    tree.snapshot("a");
    convert(&tree.memory("a"), Format::Sparse).unwrap();
    let before = tree.opened.trace();
    let error = tree.try_revert("a", 0).expect_err("libvirt cannot restore it");
    let memory = tree.memory("a");
    let parts = [memory.to_str().unwrap(), "sparse", "instantsnap_image_convert()"];
    assert_says(&error, Code::ConfigUnsupported, &parts);
    tree.opened.assert_untouched(&before);
    convert(&tree.memory("a"), Format::Raw).unwrap();
    tree.assert_all_can_be_reverted_to();
}

/// Reverts to `a` with the right to look at all files, and to read none that others may not read.
fn revert_as_another_user(tree: &Tree) -> Result<(), Error> {
    const ANOTHER: u32 = 54321;
    // The connection is the caller's.
    let snapshot = tree.opened.find("a").expect("the snapshot");
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: it takes no pointers, and changes only this thread, and those that it starts.
            unsafe { libc::setfsuid(ANOTHER) };
            revert_managed(&snapshot, RevertFlags::parse(0)?)
        });
        thread.join().unwrap()
    })
}

/// libvirt's own revert would end the domain, and fail then.
#[test]
fn revert_of_a_caller_that_may_not_read_the_image_is_left_to_libvirt_only_if_libvirt_can_read_it() {
    by_client_only();
    if Daemon::version() < RESTORES_SPARSE {
        skip("libvirt 11.2 or later is needed");
    }
    if !rustix::process::geteuid().is_root() {
        skip("only root can look at all files and read none");
    }
    let start = || Tree::start(&machine(&Binary::all()[0], 1), &virt::session(), Maker::Instant);
    let open_up = |tree: &Tree| {
        let guest = &tree.opened.guest;
        let temporary = std::env::temp_dir();
        for directory in guest.directory().ancestors().take_while(|path| *path != temporary) {
            let mode = directory.metadata().unwrap().permissions().mode();
            std::fs::set_permissions(directory, Permissions::from_mode(mode | 0o011)).unwrap();
        }
        for disk in guest.disks() {
            for image in [disk.file.clone(), disk.file.with_extension("a")] {
                std::fs::set_permissions(image, Permissions::from_mode(0o644)).unwrap();
            }
        }
    };
    let refused = |tree: &Tree, code: Code, parts: &[&str]| {
        let before = tree.opened.trace();
        let error = revert_as_another_user(tree).expect_err("no right to read");
        assert_says(&error, code, parts);
        tree.opened.assert_untouched(&before);
        tree.opened.guest.wait_ticks(2);
    };

    // By the notes it is sparse: the library makes overlays, and may not do so here.
    let mut tree = start();
    tree.snapshot_as("a", Format::Sparse);
    open_up(&tree);
    refused(&tree, Code::SystemError, &["cannot create an overlay"]);
    // It is another file since: nothing tells what it is.
    convert(&tree.memory("a"), Format::Raw).unwrap();
    let memory = tree.memory("a");
    refused(&tree, Code::AccessDenied, &[memory.to_str().unwrap(), "as a user that may read"]);
    tree.revert("a");

    // By the notes it is raw.
    let mut tree = start();
    tree.snapshot("a");
    open_up(&tree);
    revert_as_another_user(&tree).unwrap();
    tree.assert_is_at("a");
}

#[test]
fn sparse_image_that_libvirt_has_saved_is_read_and_converted() {
    if Daemon::version() < RESTORES_SPARSE {
        skip("libvirt 11.2 or later is needed");
    }
    let opened = virt::OpenedDomain::start(&machine(&Binary::all()[0], 1), &virt::session());
    let (guest, saved) = (&opened.guest, opened.memory_file("saved"));
    let name = saved.to_str().unwrap();
    guest.virsh("save", &[name, "--image-format", "sparse"]);
    let sparse = Contents::read(&saved).unwrap();
    assert_eq!(sparse.format, "sparse");
    assert_eq!(sparse.domain.as_deref(), Some(guest.name()));
    convert(&saved, Format::Raw).unwrap();
    let raw = Contents::read(&saved).unwrap();
    assert_eq!((raw.format, raw.blocks), ("raw", sparse.blocks));
    guest.daemon().virsh(&["restore", name]);
    guest.wait_ticks(5);
}
