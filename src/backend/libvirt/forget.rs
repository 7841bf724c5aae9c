// SPDX-License-Identifier: LGPL-2.1-or-later

//! Removes a snapshot from libvirt's snapshot list. Its files stay.

use super::call::CallError;
use super::managed_domain::ManagedDomain;
use super::snapshot_def::SnapshotDef;
use super::snapshot_tree::SnapshotTree;
use crate::error::{Error, Result};
use crate::model::flags::DeleteFlags;

/// Removes the snapshot of this name from the list, if there is one.
pub fn forget(domain: &ManagedDomain, name: &str) -> Result<()> {
    let tree = SnapshotTree::read(domain)?;
    match tree.get(name) {
        Ok(snapshot) => forget_alone(domain, &tree, snapshot, DeleteFlags::METADATA_ONLY),
        Err(_) => Ok(()),
    }
}

/// Removes only the metadata of a snapshot. libvirt would also put the children on the snapshot's
/// images, as if theirs had been merged into them (see [`SnapshotDef::without_overlays`]).
pub fn forget_alone(
    domain: &ManagedDomain,
    tree: &SnapshotTree,
    target: &SnapshotDef,
    flags: DeleteFlags,
) -> Result<()> {
    let forget = || domain.forget(&target.name, flags.bits());
    if flags != DeleteFlags::METADATA_ONLY || tree.children(&target.name).next().is_none() {
        return forget().map_err(|error| by_libvirt(error, &target.name));
    }
    let step = format!("cannot change the record of snapshot '{}' to delete it", target.name);
    let redefine = |xml: &str| domain.redefine(xml, tree.is_current(target));
    redefine(&target.without_overlays()).map_err(|error| error.into_error(&step))?;
    forget().map_err(|error| {
        if let CallError::Refused(_) = error {
            let _ = redefine(target.xml());
        }
        by_libvirt(error, &target.name)
    })
}

/// libvirt's own error unchanged, or ours with the operation's name.
pub fn by_libvirt(error: CallError, name: &str) -> Error {
    match error {
        CallError::Refused(error) => error.into(),
        error => error.into_error(&format!("cannot delete snapshot '{name}'")),
    }
}
