// SPDX-License-Identifier: LGPL-2.1-or-later

//! Sparse memory images of domains: libvirt 11.2 and later restores them, but not by its own
//! revert; earlier ones cannot read them at all.

use common::tree::{Maker, Tree};
use common::{assert_says, machine, virt};
use instantsnap::error::Code;
use instantsnap::image::{Contents, Format, convert};
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
