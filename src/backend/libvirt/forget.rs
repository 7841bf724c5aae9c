// SPDX-License-Identifier: LGPL-2.1-or-later

//! Having libvirt forget a snapshot; its files stay.

use super::call::CallError;
use super::managed_domain::ManagedDomain;
use super::snapshot_def::SnapshotDef;
use super::snapshot_tree::SnapshotTree;
use crate::error::{Error, Result};
use crate::model::flags::DeleteFlags;

/// Has libvirt forget the snapshot of this name, if there is one.
pub fn forget(domain: &ManagedDomain, name: &str) -> Result<()> {
    let tree = SnapshotTree::read(domain)?;
    match tree.get(name) {
        Ok(snapshot) => forget_alone(domain, &tree, snapshot, DeleteFlags::METADATA_ONLY),
        Err(_) => Ok(()),
    }
}

/// Has libvirt forget a snapshot, and nothing else: it would put the children on the snapshot's
/// images, as if theirs had been merged into them (see [`SnapshotDef::without_overlays`]).
pub fn forget_alone(
    domain: &ManagedDomain,
    tree: &SnapshotTree,
    target: &SnapshotDef,
    flags: DeleteFlags,
) -> Result<()> {
    let forget = || domain.forget(&target.name, flags.bits());
    if flags != DeleteFlags::METADATA_ONLY || tree.children(&target.name).next().is_none() {
        return forget().map_err(|trouble| by_libvirt(trouble, &target.name));
    }
    let step = format!("cannot change the record of snapshot '{}' to delete it", target.name);
    let redefine = |xml: &str| domain.redefine(xml, tree.is_current(target));
    redefine(&target.without_overlays()).map_err(|trouble| trouble.into_error(&step))?;
    forget().map_err(|trouble| {
        if let CallError::Refused(_) = trouble {
            let _ = redefine(target.xml());
        }
        by_libvirt(trouble, &target.name)
    })
}

/// libvirt's own error as it is; ours with what was tried.
pub fn by_libvirt(trouble: CallError, name: &str) -> Error {
    match trouble {
        CallError::Refused(error) => error.into(),
        trouble => trouble.into_error(&format!("cannot delete snapshot '{name}'")),
    }
}
